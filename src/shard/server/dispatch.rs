//! Request → Store → Reply, and the one table from the store's errors to vineyard's codes.
//!
//! What a request needs beyond one call of the store is returned as a value: a wait, an upload, a
//! download. The connection carries it out; nothing here reads, writes or waits.

use std::fs::File;

use crate::shard::ids::{ObjectId, SessionId};
use crate::shard::protocol::VERSION;
use crate::shard::protocol::code::Code;
use crate::shard::protocol::message::{Message, MessageError};
use crate::shard::protocol::payload::{self, Payload};
use crate::shard::protocol::reply::{InstanceStatus, Reply};
use crate::shard::protocol::request::{BlobList, Deletion, Request, StoreType};
use crate::shard::store::{
    self, ChunkRequest, DeleteOptions, Lease, Pull, Region, Store, Transport,
};

/// The other end of a connection, as far as requests are concerned.
#[derive(Debug)]
pub(super) struct Client {
    lease: Lease,
    transport: Transport,
    is_registered: bool,
    /// Whether the client has the arena's descriptor.
    has_arena: bool,
}

/// What to do about a request.
#[derive(Debug)]
pub(super) enum Step {
    /// Answer.
    Reply(Reply),
    /// Answer, and pass descriptors after it, one by one.
    ReplyWithRegions(Reply, Vec<Descriptor>),
    /// Answer when what is waited for is there.
    Wait(Wait),
    /// Answer, take the blobs' bytes, see [`Client::uploaded`], answer again.
    Upload {
        go_ahead: Reply,
        blobs: Vec<store::Payload>,
    },
    /// Answer, send the blobs' bytes, see [`Client::downloaded`].
    Download {
        reply: Reply,
        blobs: Vec<store::Payload>,
    },
    /// As `Upload`, of compressed bytes.
    UploadPacked {
        go_ahead: Reply,
        blobs: Vec<store::Payload>,
    },
    /// As `Download`, with the bytes compressed.
    DownloadPacked {
        reply: Reply,
        blobs: Vec<store::Payload>,
    },
    /// Close without an answer.
    Close,
}

/// What a client is to map.
#[derive(Debug)]
pub(super) enum Descriptor {
    Arena,
    /// A blob on disk.
    File(File),
}

impl Step {
    fn upload(go_ahead: Reply, blobs: Vec<store::Payload>, compress: bool) -> Self {
        match compress {
            true => Self::UploadPacked { go_ahead, blobs },
            false => Self::Upload { go_ahead, blobs },
        }
    }

    fn download(reply: Reply, blobs: Vec<store::Payload>, compress: bool) -> Self {
        match compress {
            true => Self::DownloadPacked { reply, blobs },
            false => Self::Download { reply, blobs },
        }
    }
}

/// What a deferred request waits for.
#[derive(Debug)]
pub(super) enum Wait {
    Objects(Vec<ObjectId>),
    Name(String),
    /// Room for a chunk to write.
    Room(ChunkRequest),
    /// The next chunk of a stream.
    Chunk(Pull),
}

/// What a wait ended with; see [`Client::resume`].
#[derive(Debug)]
pub(super) enum Waited {
    Reply(Reply),
    /// There is room for a chunk to write.
    Room(ChunkRequest),
}

impl Waited {
    /// Whether [`Client::resume`] may have to wait for a disk.
    pub(super) fn may_wait_for_disk(&self, store: &Store) -> bool {
        match self {
            Self::Reply(_) => false,
            Self::Room(request) => store.may_wait_for_disk(request.size()),
        }
    }
}

impl Wait {
    /// What was waited for, once it is there.
    pub(super) async fn over(self, store: &Store) -> Waited {
        let reply = match self {
            Self::Objects(ids) => Reply::GetData {
                content: store.wait_objects(&ids).await,
            },
            Self::Name(name) => Reply::GetName {
                object_id: store.wait_name(&name).await,
            },
            Self::Room(request) => match request.has_room().await {
                Ok(()) => return Waited::Room(request),
                Err(error) => refusal(&error),
            },
            Self::Chunk(pull) => match pull.over().await {
                Ok(chunk) => Reply::PullNextStreamChunk { chunk },
                Err(error) => refusal(&error),
            },
        };
        Waited::Reply(reply)
    }
}

fn refusal(error: &store::Error) -> Reply {
    Reply::error(code_of(error), error.to_string())
}

/// A refusal, on its way to becoming a reply.
struct Refusal(Code, String);

impl From<store::Error> for Refusal {
    fn from(error: store::Error) -> Self {
        Self(code_of(&error), error.to_string())
    }
}

/// vineyard-protocol, sections 1.5, 2 and 5.4: the codes that the real server answers with.
fn code_of(error: &store::Error) -> Code {
    use store::Error as E;
    match error {
        E::NotEnoughMemory { .. }
        | E::NoRoomOnDisk { .. }
        | E::DiskFull { .. }
        | E::TooManyMappings(_) => Code::NotEnoughMemory,
        E::ShrinkGrows { .. }
        | E::OutOfBounds { .. }
        | E::NameBlob
        | E::NameTransient
        | E::NameEmpty
        | E::SpillDisabled => Code::Invalid,
        E::NothingHeld => Code::KeyError,
        E::Memory { .. } | E::Disk { .. } => Code::IoError,
        E::BlobHasNoMetadata
        | E::NoInstanceId
        | E::PersistBlob
        | E::CopyBlob
        | E::CopyExtra
        | E::LabelBlob
        | E::FastpathObject => Code::AssertionFailed,
        E::StreamExists(_) => Code::ObjectExists,
        E::StreamOpened => Code::StreamOpened,
        E::StreamNotRunning | E::StreamHasReader | E::StreamHasWriter | E::StreamStopped => {
            Code::InvalidStreamState
        }
        E::StreamDrained => Code::StreamDrained,
        E::StreamFailed => Code::StreamFailed,
        E::StreamOpenUnknown(_)
        | E::StreamAllocateUnknown
        | E::StreamPushUnknown
        | E::StreamPullUnknown
        | E::StreamStopUnknown(_)
        | E::StreamDropUnknown(_)
        | E::SealUnknown(_)
        | E::DropUnknown(_)
        | E::ShrinkUnknown(_)
        | E::NotHeld(_)
        | E::BlobGone(_)
        | E::LabelUnknown(_)
        | E::NameUnknown(_)
        | E::NameNotFound(_) => Code::ObjectNotExists,
        E::ShrinkSealed => Code::ObjectSealed,
        E::NotSealed(_) => Code::ObjectNotSealed,
        E::NotAnObject
        | E::NoTypename
        | E::Field { .. }
        | E::BlobPlaceholder
        | E::MemberWithoutSignature(_)
        | E::TooDeep(_)
        | E::TooLarge(_) => Code::MetaTreeInvalid,
        E::MemberWithoutType(_) => Code::MetaTreeTypeNotExists,
        E::MemberId(_) => Code::MetaTreeNameInvalid,
        E::MemberWithoutId(_) => Code::MetaTreeNameNotExists,
        E::MemberUnknown(_) | E::Unknown(_) => Code::MetaTreeSubtreeNotExists,
        E::RemoteMember | E::NestedGlobal => Code::GlobalObjectInvalid,
    }
}

fn not_supported(what: &str) -> Refusal {
    Refusal(Code::NotImplemented, format!("{what} not supported"))
}

fn invalid(text: impl Into<String>) -> Refusal {
    Refusal(Code::Invalid, text.into())
}

impl Client {
    /// A client that has said nothing yet.
    pub(super) fn new(store: &Store, transport: Transport) -> Self {
        Self {
            lease: store.connect(transport),
            transport,
            is_registered: false,
            has_arena: false,
        }
    }

    pub(super) fn store(&self) -> &Store {
        self.lease.store()
    }

    /// Understands a frame's body, unless the client has to register first.
    pub(super) fn understand(&self, body: &[u8]) -> Result<Request, MessageError> {
        let message = Message::read(body)?;
        if !self.is_registered && message.command != "register_request" {
            return Err(MessageError::not_registered(&message.command));
        }
        Request::read(&message)
    }

    /// Does what can be done at once.
    pub(super) fn dispatch(&mut self, request: Request) -> Step {
        self.perform(request)
            .unwrap_or_else(|Refusal(code, message)| Step::Reply(Reply::Error { code, message }))
    }

    #[allow(clippy::too_many_lines)]
    fn perform(&mut self, request: Request) -> Result<Step, Refusal> {
        let reply = match request {
            Request::Register {
                store_type,
                session_id,
                ..
            } => self.register(store_type, session_id)?,
            Request::Exit => return Ok(Step::Close),

            Request::CreateBuffer { size } => {
                let created = self.described(&self.lease.create_blob(size)?);
                let (fds, new) = self.announce(&[created]);
                let fd = fds.first().copied().unwrap_or(-1);
                return Ok(with_regions(Reply::CreateBuffer { created, fd }, new));
            }
            Request::CreateBuffers { sizes } => {
                let payloads = self.all_described(&self.lease.create_blobs(&sizes)?);
                let (fds, new) = self.announce(&payloads);
                return Ok(with_regions(Reply::CreateBuffers { payloads, fds }, new));
            }
            Request::GetBuffers(list) => {
                let blobs = self.lease.get_blobs(&list.ids, list.allow_unsealed)?;
                let payloads = self.all_described(&blobs);
                let (fds, new) = self.announce(&payloads);
                let reply = Reply::GetBuffers {
                    payloads,
                    fds,
                    compress: false,
                };
                return Ok(with_regions(reply, new));
            }
            Request::Seal { object_id } => {
                self.lease.seal(object_id)?;
                Reply::Seal
            }
            Request::DropBuffer { id } => {
                self.lease.drop_blob(id)?;
                Reply::DropBuffer
            }
            Request::ShrinkBuffer { id, size } => {
                self.lease.shrink_blob(id, size)?;
                Reply::ShrinkBuffer
            }
            Request::IncreaseReferenceCount { ids } => {
                self.lease.hold(&ids);
                Reply::IncreaseReferenceCount
            }
            Request::Release { object_id } => {
                self.lease.release(object_id)?;
                Reply::Release
            }
            Request::IsInUse { id } => Reply::IsInUse(self.store().is_in_use(id)),
            Request::IsSpilled { id } => Reply::IsSpilled(self.store().is_spilled(id)),
            Request::CreateGpuBuffer | Request::GetGpuBuffers => {
                return Err(invalid("GPU support is not enabled"));
            }
            Request::CreateDiskBuffer { .. } => return Err(not_supported("disk buffers are")),

            Request::CreateRemoteBuffer {
                size,
                compress,
                use_rdma,
            } => {
                refuse_rdma(use_rdma)?;
                let blob = self.lease.create_blob(size)?;
                let go_ahead = Reply::CreateBuffer {
                    created: self.uploading(&blob),
                    fd: -1,
                };
                return Ok(Step::upload(go_ahead, vec![blob], compress));
            }
            Request::CreateRemoteBuffers {
                sizes,
                compress,
                use_rdma,
            } => {
                refuse_rdma(use_rdma)?;
                let blobs = self.lease.create_blobs(&sizes)?;
                let go_ahead = Reply::CreateBuffers {
                    payloads: blobs.iter().map(|blob| self.uploading(blob)).collect(),
                    fds: Vec::new(),
                };
                return Ok(Step::upload(go_ahead, blobs, compress));
            }
            Request::GetRemoteBuffers(list) => return self.download(&list),
            // There is never anything locked by RDMA.
            Request::ReleaseBlobsWithRdma => Reply::ReleaseBlobsWithRdma,

            Request::CreateData { content } => {
                let created = self.store().create_object(content)?;
                Reply::CreateData {
                    id: created.id,
                    signature: created.signature,
                    instance_id: created.instance_id,
                }
            }
            Request::CreateDatas { contents } => {
                let created = self.store().create_objects(contents)?;
                Reply::CreateDatas {
                    ids: created.iter().map(|object| object.id).collect(),
                    signatures: created.iter().map(|object| object.signature).collect(),
                    instance_ids: created.iter().map(|object| object.instance_id).collect(),
                }
            }
            // Metadata of this instance is always up to date, so `sync_remote` asks for nothing.
            Request::GetData { id, wait: true, .. } => {
                return Ok(Step::Wait(Wait::Objects(id)));
            }
            Request::GetData {
                id, wait: false, ..
            } => Reply::GetData {
                content: self.store().get_objects(&id),
            },
            Request::ListData {
                pattern,
                regex,
                limit,
            } => Reply::GetData {
                content: self.store().list_objects(&pattern, regex, limit),
            },
            Request::DelData(deletion) => {
                self.delete(&deletion)?;
                Reply::DelData
            }
            Request::DelDataWithFeedbacks(deletion) => Reply::DelDataWithFeedbacks {
                deleted_bids: self.delete(&deletion)?,
            },
            Request::Exists { id } => Reply::Exists(self.store().exists(id)),
            Request::Persist { id } => {
                self.store().persist(id)?;
                Reply::Persist
            }
            Request::IfPersist { id } => Reply::IfPersist(self.store().is_persisted(id)?),
            Request::Label { id, keys, values } => {
                if keys.len() != values.len() {
                    return Err(invalid(format!(
                        "labels: {} keys and {} values",
                        keys.len(),
                        values.len()
                    )));
                }
                let labels = keys.into_iter().zip(values).collect();
                self.store().label(id, labels)?;
                Reply::Label
            }
            Request::Clear => {
                tracing::info!("a client cleared the store");
                self.store().clear();
                Reply::Clear
            }
            Request::MemoryTrim => Reply::MemoryTrim,
            Request::ShallowCopy { id, extra } => Reply::ShallowCopy {
                target_id: self.store().shallow_copy(id, extra)?,
            },

            Request::PutName { object_id, name } => {
                self.store().put_name(object_id, &name)?;
                Reply::PutName
            }
            Request::GetName { name, wait: true } => return Ok(Step::Wait(Wait::Name(name))),
            Request::GetName { name, wait: false } => Reply::GetName {
                object_id: self.store().get_name(&name)?,
            },
            Request::ListName {
                pattern,
                regex,
                limit,
            } => Reply::ListName {
                names: self.store().list_names(&pattern, regex, limit),
            },
            Request::DropName { name } => {
                self.store().drop_name(&name)?;
                Reply::DropName
            }

            Request::ClusterMeta => Reply::ClusterMeta {
                meta: self.store().cluster_meta(),
            },
            Request::InstanceStatus => Reply::InstanceStatus(self.status()),
            Request::Debug => Reply::Debug,
            Request::MigrateObject { .. } => return Err(not_supported("migration is")),
            Request::AcquireLock { .. } | Request::ReleaseLock { .. } => {
                return Err(not_supported("locks without etcd are"));
            }

            // vineyardd does these and never answers.
            Request::Evict { ids } => {
                self.lease.evict(&ids)?;
                Reply::Evict
            }
            Request::Load { ids, pin } => {
                self.store().load(&ids, pin)?;
                Reply::Load
            }
            Request::Unpin { ids } => {
                self.store().unpin(&ids);
                Reply::Unpin
            }
            Request::CreateStream { object_id } => {
                self.store().create_stream(object_id)?;
                Reply::CreateStream
            }
            Request::OpenStream { object_id, mode } => {
                self.store().open_stream(object_id, mode)?;
                Reply::OpenStream
            }
            Request::GetNextStreamChunk { id, size } => {
                return Ok(Step::Wait(Wait::Room(self.lease.ask_chunk(id, size)?)));
            }
            Request::PushNextStreamChunk { id, chunk } => {
                self.store().push_chunk(id, chunk)?;
                Reply::PushNextStreamChunk
            }
            Request::PullNextStreamChunk { id } => {
                return Ok(Step::Wait(Wait::Chunk(self.lease.pull_chunk(id)?)));
            }
            Request::StopStream { id, failed } => {
                self.store().stop_stream(id, failed)?;
                Reply::StopStream
            }
            Request::DropStream { id } => {
                self.store().drop_stream(id)?;
                Reply::DropStream
            }
            Request::MakeArena { .. } | Request::FinalizeArena { .. } => {
                return Err(not_supported("arenas of clients are"));
            }
            Request::NewSession { .. }
            | Request::DeleteSession
            | Request::MoveBuffersOwnership { .. } => return Err(not_supported("sessions are")),
            Request::CreateBufferByPlasma { .. }
            | Request::GetBuffersByPlasma
            | Request::PlasmaSeal { .. }
            | Request::PlasmaRelease { .. }
            | Request::PlasmaDeleteData { .. } => {
                return Err(not_supported("plasma stores are"));
            }
        };
        Ok(Step::Reply(reply))
    }

    /// The reply to a request that has waited, and the descriptors that follow it.
    pub(super) fn resume(&mut self, waited: Waited) -> (Reply, Vec<Descriptor>) {
        match waited {
            Waited::Reply(reply) => (reply, Vec::new()),
            Waited::Room(request) => match self.lease.next_chunk(&request) {
                Ok(blob) => {
                    let buffer = self.described(&blob);
                    let (fds, new) = self.announce(&[buffer]);
                    let fd = fds.first().copied().unwrap_or(-1);
                    (Reply::GetNextStreamChunk { buffer, fd }, new)
                }
                Err(error) => (refusal(&error), Vec::new()),
            },
        }
    }

    fn register(&mut self, store_type: StoreType, session: SessionId) -> Result<Reply, Refusal> {
        // A UNIX socket is its session, whatever the client says; a port serves all of them.
        if self.transport == Transport::Rpc && session != self.store().session_id() {
            return Err(invalid(format!("Session (sid = {session}) not exit")));
        }
        self.is_registered = true;
        let store = self.store();
        let config = store.config();
        Ok(Reply::Register {
            instance_id: store.instance_id(),
            ipc_socket: config.ipc_socket.clone(),
            rpc_endpoint: config.rpc_endpoint.clone(),
            session_id: store.session_id(),
            store_match: store_type == StoreType::Normal,
            support_rpc_compression: false,
            version: VERSION,
        })
    }

    fn status(&self) -> InstanceStatus {
        let status = self.store().status();
        InstanceStatus {
            deferred_requests: status.deferred_requests,
            deployment: status.deployment,
            instance_id: status.instance_id,
            ipc_connections: status.ipc_connections,
            memory_limit: status.memory_limit,
            memory_usage: status.memory_usage,
            rpc_connections: status.rpc_connections,
        }
    }

    fn delete(&self, deletion: &Deletion) -> Result<Vec<ObjectId>, Refusal> {
        let options = DeleteOptions {
            force: deletion.force,
            deep: deletion.deep,
            trim: deletion.memory_trim,
            fastpath: deletion.fastpath,
        };
        Ok(self.store().delete(&deletion.id, options)?)
    }

    fn described(&self, blob: &store::Payload) -> Payload {
        let arena_size = self.store().arena_size();
        let payload =
            Payload::in_arena(blob.id, blob.offset, blob.size, blob.is_sealed, arena_size);
        match blob.region {
            Region::Arena => payload,
            Region::File { number, length } => payload.in_file(number, length),
        }
    }

    fn all_described(&self, blobs: &[store::Payload]) -> Vec<Payload> {
        blobs.iter().map(|blob| self.described(blob)).collect()
    }

    /// A blob that is being uploaded is sealed as soon as its bytes are there. Its client is told
    /// so in advance, since both its replies are the same.
    fn uploading(&self, blob: &store::Payload) -> Payload {
        self.described(&store::Payload {
            is_sealed: true,
            ..*blob
        })
    }

    /// Keys and descriptors of the regions that the client has to map for these blobs and does
    /// not have yet, in the order of the blobs. From then on it has them: they follow the reply.
    fn announce(&mut self, payloads: &[Payload]) -> (Vec<i32>, Vec<Descriptor>) {
        let mut fds = Vec::new();
        let mut new = Vec::new();
        if self.transport != Transport::Ipc {
            return (fds, new);
        }
        for &Payload { store_fd, .. } in payloads {
            if store_fd == payload::ARENA && !self.has_arena {
                self.has_arena = true;
                fds.push(store_fd);
                new.push(Descriptor::Arena);
            } else if store_fd > payload::ARENA
                && let Some(file) = self.lease.take_file(store_fd)
            {
                fds.push(store_fd);
                new.push(Descriptor::File(file));
            }
        }
        (fds, new)
    }

    /// Whether a request may have to wait for a disk. All others never do.
    #[allow(clippy::wildcard_enum_match_arm)]
    pub(super) fn may_wait_for_disk(&self, request: &Request) -> bool {
        let sum = |sizes: &[u64]| {
            sizes
                .iter()
                .fold(0, |sum: u64, size| sum.saturating_add(*size))
        };
        let size = match request {
            Request::CreateBuffer { size } | Request::CreateRemoteBuffer { size, .. } => *size,
            Request::CreateBuffers { sizes } | Request::CreateRemoteBuffers { sizes, .. } => {
                sum(sizes)
            }
            Request::GetBuffers(_)
            | Request::GetRemoteBuffers(_)
            | Request::Seal { .. }
            | Request::DropBuffer { .. }
            | Request::DelData(_)
            | Request::DelDataWithFeedbacks(_)
            | Request::Clear
            | Request::Load { .. }
            // The chunk before is completed or deleted.
            | Request::GetNextStreamChunk { .. }
            | Request::PullNextStreamChunk { .. }
            | Request::StopStream { .. }
            | Request::DropStream { .. } => 0,
            // Writes even where there is room.
            Request::Evict { .. } => u64::MAX,
            _ => return false,
        };
        self.store().may_wait_for_disk(size)
    }

    fn download(&self, list: &BlobList) -> Result<Step, Refusal> {
        refuse_rdma(list.use_rdma)?;
        let blobs = self
            .lease
            .get_blobs(&list.ids, list.allow_unsealed)
            .map_err(|error| {
                let refusal = Refusal::from(error);
                match refusal.0 == Code::IoError {
                    true => refusal,
                    false => Refusal(Code::KeyError, "Failed to get objects".to_owned()),
                }
            })?;
        let reply = Reply::GetBuffers {
            payloads: self.all_described(&blobs),
            fds: Vec::new(),
            compress: list.compress,
        };
        Ok(Step::download(reply, blobs, list.compress))
    }

    /// Seals what has arrived, or gives back what could not be stored. The answer is the one that
    /// told the client to go ahead, or the error.
    pub(super) fn uploaded(
        &self,
        go_ahead: Reply,
        blobs: &[store::Payload],
        stored: Result<(), store::Error>,
    ) -> Reply {
        let sealed = stored.and_then(|()| {
            for blob in blobs {
                self.lease.seal(blob.id)?;
            }
            Ok(())
        });
        match sealed {
            Ok(()) => {
                // Sealing makes the uploader a holder; it only wanted the blob to be there.
                self.downloaded(blobs);
                go_ahead
            }
            Err(error) => {
                for blob in blobs {
                    // Whatever took the blob away in the meantime has also freed it.
                    drop(self.lease.drop_blob(blob.id));
                }
                Reply::error(code_of(&error), error.to_string())
            }
        }
    }

    /// Lets go of blobs whose bytes have been sent.
    pub(super) fn downloaded(&self, blobs: &[store::Payload]) {
        for blob in blobs {
            // The empty blob, and one deleted in the meantime, are not held.
            drop(self.lease.release(blob.id));
        }
    }
}

fn with_regions(reply: Reply, new: Vec<Descriptor>) -> Step {
    if new.is_empty() {
        Step::Reply(reply)
    } else {
        Step::ReplyWithRegions(reply, new)
    }
}

/// Bytes travel on the stream.
fn refuse_rdma(use_rdma: bool) -> Result<(), Refusal> {
    match use_rdma {
        true => Err(not_supported("RDMA is")),
        false => Ok(()),
    }
}
