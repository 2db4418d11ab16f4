//! The domain: blobs, objects, names, and who holds what.
//!
//! [`Store`] is one handle on one lock. [`Lease`] is what one connection has of it: dropping it
//! gives back what the connection held and had not sealed.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::ids::{InstanceId, ObjectId, SessionId, Signature};

/// A blob as the store knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The blob.
    pub id: ObjectId,
    /// Start within the arena file, in bytes; a multiple of 64.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether others may see it.
    pub is_sealed: bool,
}

/// Which door a client came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// UNIX socket.
    Ipc,
    /// TCP.
    Rpc,
}

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes that blobs may take together, counted as requested.
    pub memory_limit: u64,
    /// Directory of a tmpfs for the arena; none: an anonymous file (memfd).
    pub arena_dir: Option<PathBuf>,
    /// Whether to take all pages at start.
    pub reserve_memory: bool,
    /// `local` or `distributed`, only echoed.
    pub deployment: String,
    /// This instance's name for others.
    pub hostname: String,
    /// The node's name.
    pub nodename: String,
    /// As configured.
    pub ipc_socket: String,
    /// `host:port`, or `0.0.0.0:0` where RPC is off.
    pub rpc_endpoint: String,
}

/// How to delete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Also what others use, and those others.
    pub force: bool,
    /// Also members that nothing else uses.
    pub deep: bool,
    /// Give the pages back to the system.
    pub trim: bool,
    /// Ids are blobs; the graph of objects is not looked at.
    pub fastpath: bool,
}

/// A created object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// Its id.
    pub id: ObjectId,
    /// Its signature.
    pub signature: Signature,
    /// The instance it belongs to, as computed from its members.
    pub instance_id: InstanceId,
}

/// Figures of an instance, exact at the moment they are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceStatus {
    /// This instance.
    pub instance_id: InstanceId,
    /// As configured.
    pub deployment: String,
    /// Bytes requested for the blobs there are.
    pub memory_usage: u64,
    /// The most there may be.
    pub memory_limit: u64,
    /// Requests that wait for a name or an object.
    pub deferred_requests: u64,
    /// Open leases of the UNIX socket.
    pub ipc_connections: u64,
    /// Open leases of the TCP socket.
    pub rpc_connections: u64,
}

/// A store; clones are the same store.
#[derive(Clone, Debug)]
pub struct Store;

/// What one connection has of a store.
#[derive(Debug)]
pub struct Lease;

/// Why a store cannot open.
#[derive(Debug, thiserror::Error)]
#[error("opening the store")]
pub struct OpenError;

/// Why a request on the store failed. `Display` is the text clients get.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The arena is full, by count or by fragmentation.
    #[error("Failed to allocate memory of size {size}, total available memory size are {limit}, and {used} are already in use")]
    NotEnoughMemory {
        /// Bytes asked for.
        size: u64,
        /// The limit.
        limit: u64,
        /// What is in use.
        used: u64,
    },
}

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl Store {
    pub fn open(config: Config) -> Result<Self, OpenError> { unimplemented!() }
    pub fn config(&self) -> &Config { unimplemented!() }
    pub fn instance_id(&self) -> InstanceId { unimplemented!() }
    pub fn session_id(&self) -> SessionId { SessionId::ROOT }
    pub fn connect(&self, transport: Transport) -> Lease { unimplemented!() }
    /// The arena file, for clients to map `[0, arena_size)`.
    pub fn arena(&self) -> BorrowedFd<'_> { unimplemented!() }
    pub fn arena_size(&self) -> u64 { unimplemented!() }
    pub fn status(&self) -> InstanceStatus { unimplemented!() }
    /// `{"i0": {...}}`, as `cluster_meta` answers.
    pub fn cluster_meta(&self) -> Map<String, Value> { unimplemented!() }

    pub fn is_in_use(&self, id: ObjectId) -> bool { unimplemented!() }
    pub fn create_object(&self, content: Value) -> Result<Created, Error> { unimplemented!() }
    pub fn create_objects(&self, contents: Vec<Value>) -> Result<Vec<Created>, Error> { unimplemented!() }
    /// Object text → tree; what is missing is absent.
    pub fn get_objects(&self, ids: &[ObjectId]) -> Map<String, Value> { unimplemented!() }
    /// As `get_objects`, once all of them exist. Dropping the future ends the wait.
    pub async fn wait_objects(&self, ids: &[ObjectId]) -> Map<String, Value> { unimplemented!() }
    pub fn list_objects(&self, pattern: &str, regex: bool, limit: u64) -> Map<String, Value> { unimplemented!() }
    /// The blobs of the delete set, those that never existed included.
    pub fn delete(&self, ids: &[ObjectId], options: DeleteOptions) -> Result<Vec<ObjectId>, Error> { unimplemented!() }
    pub fn clear(&self) { unimplemented!() }
    pub fn exists(&self, id: ObjectId) -> bool { unimplemented!() }
    pub fn persist(&self, id: ObjectId) -> Result<(), Error> { unimplemented!() }
    pub fn is_persisted(&self, id: ObjectId) -> Result<bool, Error> { unimplemented!() }
    pub fn label(&self, id: ObjectId, labels: Vec<(String, String)>) -> Result<(), Error> { unimplemented!() }
    pub fn shallow_copy(&self, id: ObjectId, extra: Map<String, Value>) -> Result<ObjectId, Error> { unimplemented!() }
    pub fn put_name(&self, id: ObjectId, name: &str) -> Result<(), Error> { unimplemented!() }
    pub fn get_name(&self, name: &str) -> Result<ObjectId, Error> { unimplemented!() }
    /// As `get_name`, once the name exists. Dropping the future ends the wait.
    pub async fn wait_name(&self, name: &str) -> ObjectId { unimplemented!() }
    pub fn list_names(&self, pattern: &str, regex: bool, limit: u64) -> BTreeMap<String, ObjectId> { unimplemented!() }
    pub fn drop_name(&self, name: &str) -> Result<(), Error> { unimplemented!() }
    /// Bytes of a sealed or unsealed blob, for the doors that pass bytes.
    pub fn read_blob(&self, payload: &Payload, at: u64, buffer: &mut [u8]) -> Result<(), Error> { unimplemented!() }
    pub fn write_blob(&self, payload: &Payload, at: u64, bytes: &[u8]) -> Result<(), Error> { unimplemented!() }
}

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl Lease {
    pub fn store(&self) -> &Store { unimplemented!() }
    pub fn create_blob(&self, size: u64) -> Result<Payload, Error> { unimplemented!() }
    /// All or none.
    pub fn create_blobs(&self, sizes: &[u64]) -> Result<Vec<Payload>, Error> { unimplemented!() }
    pub fn seal(&self, id: ObjectId) -> Result<(), Error> { unimplemented!() }
    /// Unknown ids are left out; an unsealed one fails the whole unless `allow_unsealed`.
    pub fn get_blobs(&self, ids: &[ObjectId], allow_unsealed: bool) -> Result<Vec<Payload>, Error> { unimplemented!() }
    pub fn hold(&self, ids: &[ObjectId]) { unimplemented!() }
    pub fn release(&self, id: ObjectId) -> Result<(), Error> { unimplemented!() }
    pub fn drop_blob(&self, id: ObjectId) -> Result<(), Error> { unimplemented!() }
    pub fn shrink_blob(&self, id: ObjectId, size: u64) -> Result<(), Error> { unimplemented!() }
}
