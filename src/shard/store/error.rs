//! What can go wrong with a request, in the words clients know.
//!
//! One variant for each text or code. Codes are the wire's business; each variant says which of
//! vineyard's it is.

use crate::shard::ids::ObjectId;

/// Why a request on the store failed. `Display` is the text clients get.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// NotEnoughMemory: the arena is full, by count or by fragmentation.
    #[error(
        "Failed to allocate memory of size {size}, total available memory size are {limit}, and {used} are already in use"
    )]
    NotEnoughMemory {
        /// Bytes asked for.
        size: u64,
        /// The limit.
        limit: u64,
        /// What is in use.
        used: u64,
    },
    /// NotEnoughMemory: neither memory nor disk has room.
    #[error(
        "Failed to allocate memory of size {size}, total available memory size are {limit}, and {used} are already in use; on disk: {reason}"
    )]
    NoRoomOnDisk {
        /// Bytes asked for.
        size: u64,
        /// The limit of memory.
        limit: u64,
        /// What is in use of it.
        used: u64,
        /// Why it is not on disk.
        reason: String,
    },
    /// NotEnoughMemory: there is no room on disk for a blob that is to go there.
    #[error("no room on disk for blob {id}: {reason}")]
    DiskFull {
        /// The blob.
        id: ObjectId,
        /// Why.
        reason: String,
    },
    /// IOError: a blob cannot be written to disk or read from there.
    #[error("blob {id} on disk: {reason}")]
    Disk {
        /// The blob.
        id: ObjectId,
        /// Why.
        reason: String,
    },
    /// NotEnoughMemory: the connection has too many spilled blobs mapped.
    #[error("this connection has {0} spilled blobs mapped, the most there can be; connect anew")]
    TooManyMappings(usize),
    /// Invalid: there is nowhere to spill to.
    #[error("Spill path is not set")]
    SpillDisabled,
    /// ObjectNotExists: no such blob to seal.
    #[error("seal: id = {0}")]
    SealUnknown(ObjectId),
    /// ObjectNotExists: no such blob to drop.
    #[error("delete: id = {0}")]
    DropUnknown(ObjectId),
    /// ObjectNotExists: no such blob to shrink.
    #[error("blob '{0}' not found")]
    ShrinkUnknown(ObjectId),
    /// ObjectSealed.
    #[error("cannot shrink as the blob has already been sealed")]
    ShrinkSealed,
    /// Invalid.
    #[error("cannot shrink to size {size} since the current size is {current}")]
    ShrinkGrows {
        /// Bytes asked for.
        size: u64,
        /// Bytes there are.
        current: u64,
    },
    /// ObjectNotSealed.
    #[error("Failed to get blob with id {0}")]
    NotSealed(ObjectId),
    /// ObjectNotExists: the connection holds blobs, but not this one.
    #[error("DependencyTracker: failed to find object during remove dependency: {0}")]
    NotHeld(ObjectId),
    /// KeyError: the connection holds no blob.
    #[error("DependencyTracker: connection not exist.")]
    NothingHeld,
    /// ObjectNotExists: the blob whose bytes are copied has been deleted.
    #[error("blob {0} has been deleted")]
    BlobGone(ObjectId),
    /// Invalid: bytes beyond the end of a blob.
    #[error("{length} bytes at {at} are not within blob {id} of size {size}")]
    OutOfBounds {
        /// The blob.
        id: ObjectId,
        /// Where, within the blob.
        at: u64,
        /// How many.
        length: u64,
        /// Bytes the blob has.
        size: u64,
    },
    /// IOError: the system refused to read or write the arena.
    #[error("accessing the memory of blob {id}: {reason}")]
    Memory {
        /// The blob.
        id: ObjectId,
        /// Why.
        reason: String,
    },

    /// MetaTreeInvalid: metadata is no JSON object.
    #[error("the incoming metadata is not a JSON object")]
    NotAnObject,
    /// MetaTreeInvalid: no `typename`, or one that is no string.
    #[error("No 'typename' field in incoming metadata")]
    NoTypename,
    /// AssertionFailed: a blob where an object is created.
    #[error("type != \"vineyard::Blob\": Blob has no metadata")]
    BlobHasNoMetadata,
    /// AssertionFailed.
    #[error("tree.contains(\"instance_id\"): The instance_id filed must be presented")]
    NoInstanceId,
    /// MetaTreeInvalid: a reserved field has another type than it must have.
    #[error("the field '{field}' in metadata must be {expected}")]
    Field {
        /// Its key.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// MetaTreeNameNotExists: a member without an id. Shows its metadata.
    #[error("failed to diff meta tree: in metadata: {0}")]
    MemberWithoutId(String),
    /// MetaTreeInvalid: a member's id is no id.
    #[error("failed to diff meta tree: the id of member '{0}' is not an object id")]
    MemberId(String),
    /// MetaTreeTypeNotExists: a member without a type. Shows its metadata.
    #[error("failed to diff meta tree: in metadata: {0}")]
    MemberWithoutType(String),
    /// MetaTreeSubtreeNotExists: a member that is only an id, which nobody knows.
    #[error("failed to diff meta tree: get subtree failed: {0}")]
    MemberUnknown(String),
    /// MetaTreeInvalid: a member that is only an id, and a blob's.
    #[error("failed to diff meta tree: The blobs cannot be added as a 'placeholder'.")]
    BlobPlaceholder,
    /// MetaTreeInvalid: a member that is to be created, or linked by signature, has none.
    #[error("failed to diff meta tree: the member {0} has no signature")]
    MemberWithoutSignature(ObjectId),
    /// GlobalObjectInvalid.
    #[error("failed to diff meta tree: Local object cannot refer remote objects")]
    RemoteMember,
    /// GlobalObjectInvalid.
    #[error("failed to diff meta tree: Global object cannot have nested structure")]
    NestedGlobal,
    /// MetaTreeInvalid: more levels than any reader is asked to follow.
    #[error("failed to diff meta tree: the metadata has more than {0} levels")]
    TooDeep(u16),
    /// MetaTreeInvalid: with all its members the tree would not fit a reply.
    #[error("failed to diff meta tree: the metadata has more than {0} bytes with its members")]
    TooLarge(u64),

    /// AssertionFailed.
    #[error("!IsBlob(id): The blobs cannot be persisted")]
    PersistBlob,
    /// AssertionFailed.
    #[error("!IsBlob(id): The blobs cannot be shallow copied")]
    CopyBlob,
    /// AssertionFailed: arrays and objects cannot be added to a copy.
    #[error(
        "item.value().is_primitive(): The value of items in 'extra_metadata' must be primitives"
    )]
    CopyExtra,
    /// AssertionFailed.
    #[error("!IsBlob(id): The blobs cannot be labelled")]
    LabelBlob,
    /// ObjectNotExists: no such object to label.
    #[error("object {0} doesn't exist")]
    LabelUnknown(ObjectId),
    /// MetaTreeSubtreeNotExists: no such object to persist or to copy.
    #[error("get subtree failed: {0}")]
    Unknown(ObjectId),
    /// AssertionFailed.
    #[error("IsBlob(id): Fastpath deletion can only be applied to blobs")]
    FastpathObject,

    /// Invalid.
    #[error("blobs cannot have name")]
    NameBlob,
    /// ObjectNotExists: no such object to name.
    #[error("failed to put name: object {0} doesn't exist")]
    NameUnknown(ObjectId),
    /// Invalid.
    #[error("transient objects cannot have name, please persist it first")]
    NameTransient,
    /// Invalid: the empty name.
    #[error("the name must not be empty")]
    NameEmpty,
    /// ObjectNotExists.
    #[error("failed to find name: {0}")]
    NameNotFound(String),

    /// ObjectExists.
    #[error("stream already exists: {0}")]
    StreamExists(ObjectId),
    /// ObjectNotExists.
    #[error("stream cannot be open: {0}")]
    StreamOpenUnknown(ObjectId),
    /// StreamOpened: in that mode.
    #[error("Stream already opened")]
    StreamOpened,
    /// ObjectNotExists.
    #[error("failed to allocate from stream")]
    StreamAllocateUnknown,
    /// ObjectNotExists.
    #[error("failed to push to stream")]
    StreamPushUnknown,
    /// ObjectNotExists.
    #[error("failed to pull from stream")]
    StreamPullUnknown,
    /// ObjectNotExists.
    #[error("failed to stop stream: {0}")]
    StreamStopUnknown(ObjectId),
    /// ObjectNotExists.
    #[error("failed to drop stream: {0}")]
    StreamDropUnknown(ObjectId),
    /// InvalidStreamState: it has been stopped, so there is nothing to write to.
    #[error("!stream->drained && !stream->failed")]
    StreamNotRunning,
    /// InvalidStreamState: another request waits for a chunk.
    #[error("!stream->reader_")]
    StreamHasReader,
    /// InvalidStreamState: another request waits for room.
    #[error("!stream->writer_")]
    StreamHasWriter,
    /// InvalidStreamState: it is stopped once only.
    #[error("Stream already stopped")]
    StreamStopped,
    /// StreamDrained: all has been read.
    #[error("Stream drained: no more chunks")]
    StreamDrained,
    /// StreamFailed: its writer said so, or it has been dropped.
    #[error("Stream source failed")]
    StreamFailed,
}
