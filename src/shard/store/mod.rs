//! The domain: blobs, objects, names, and who holds what.
//!
//! [`Store`] is one handle on one lock. [`Lease`] is what one connection has of it: dropping it
//! gives back what the connection held and had not sealed.
//!
//! The lock is a `std` mutex: it is held for decisions only, which take microseconds. Giving
//! pages back, copying bytes and waking those who wait happen outside; a range of the arena is
//! not given to others before that is done.
//!
//! ```text
//! spilling.rs  between the arena and the disk; what may move when, and why
//! shared.rs    the lock; performs the effects that State asks for
//! state.rs   ● every change, by calling the others; returns Effects
//! blob.rs    ● created → sealed → deleted; where in the arena
//! create.rs  ● a client's tree → records
//! objects.rs ● records → trees; labels, persistence, copies, signatures
//! object.rs  ● one record, one link
//! graph.rs   ● who uses whom; delete sets
//! name.rs    ● names, and who waits for one
//! eviction.rs ● watermarks and coldness → what goes to disk
//! lease.rs   ● which connection holds which blob
//! wait.rs    ● who waits for objects
//! stream.rs  ● chunks between a writer and a reader; stream_state.rs, stream_lease.rs: what it entails
//! pattern.rs ● wildcards and expressions
//! ```

mod blob;
mod create;
mod error;
mod eviction;
mod graph;
mod lease;
mod name;
mod object;
mod objects;
mod pattern;
mod shared;
mod spilling;
#[cfg(test)]
mod spilling_tests;
mod state;
mod stream;
mod stream_lease;
#[cfg(test)]
mod tests;
mod wait;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokio::sync::oneshot;

pub use self::blob::Region;
pub use self::error::Error;
pub use self::eviction::Watermarks;
use self::lease::ConnectionId;
use self::shared::{Guarded, Parked, Shared, enough};
pub use self::spilling::Spilling;
use self::spilling::{Bytes, Mappings};
use self::state::{Answer, State};
pub use self::stream_lease::{ChunkRequest, Pull};
use self::wait::WaiterId;
use crate::shard::ids::{InstanceId, ObjectId, SessionId, Signature};
use crate::shard::memory::{self, Pool, Segment};

/// A blob as the store knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The blob.
    pub id: ObjectId,
    /// Start within the region's file, in bytes; a multiple of 64.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether others may see it.
    pub is_sealed: bool,
    /// What it is in.
    pub region: Region,
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
    /// Whether to take all pages at start. Then they are never given back either.
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

/// Why a store cannot open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No file is that long.
    #[error("a store of {0} bytes is larger than any file")]
    Size(u64),
    /// There is no arena.
    #[error("opening the arena")]
    Arena(#[from] memory::Error),
}

/// A store; clones are the same store.
///
/// All methods may be called from any thread, and from tasks: none but [`Self::delete`],
/// [`Self::clear`] and the copying ones does more than a few microseconds' work per object.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

/// The clock, in milliseconds since the epoch.
fn now() -> u64 {
    u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
}

fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl Store {
    /// A store with nothing in it, and no disk to spill to.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        Self::open_with(config, None)
    }

    /// As [`Self::open`], perhaps with a disk to spill to.
    pub fn open_with(config: Config, spilling: Option<Spilling>) -> Result<Self, OpenError> {
        let limit = config.memory_limit;
        let pool = match config.reserve_memory {
            false => Pool::sparse(limit),
            true => Pool::reserved(limit),
        };
        let pool = pool.ok_or(OpenError::Size(limit))?;
        let segment = Segment::create(config.arena_dir.as_deref(), pool.region())?;
        if config.reserve_memory {
            segment.reserve()?;
        }
        // The embedded metadata has this one instance.
        let instance = InstanceId(0);
        let state = State::new(instance, pool);
        let guarded = Mutex::new(Guarded {
            state,
            parked: HashMap::new(),
        });
        let trimmed = Condvar::new();
        let enough = AtomicU64::new(enough(limit));
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                instance,
                segment,
                spiller: spilling.map(Into::into),
                guarded,
                trimmed,
                enough,
                stream_threshold: AtomicU32::new(stream_lease::THRESHOLD),
            }),
        })
    }

    /// What the store was opened with.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// This instance among those that share metadata.
    pub fn instance_id(&self) -> InstanceId {
        self.shared.instance
    }

    /// The session that the store is of.
    pub fn session_id(&self) -> SessionId {
        SessionId::ROOT
    }

    /// Begins a connection.
    pub fn connect(&self, transport: Transport) -> Lease {
        let connection = self.shared.lock().state.connect(transport);
        Lease {
            store: self.clone(),
            connection,
            transport,
            mappings: Mappings::default(),
        }
    }

    /// The arena file, for clients to map `[0, arena_size)`.
    pub fn arena(&self) -> BorrowedFd<'_> {
        self.shared.segment.fd()
    }

    /// Length of the arena in bytes: more than the limit.
    pub fn arena_size(&self) -> u64 {
        self.shared.segment.size()
    }

    /// The figures of this moment.
    pub fn status(&self) -> InstanceStatus {
        let figures = self.shared.lock().state.figures();
        InstanceStatus {
            instance_id: self.shared.instance,
            deployment: self.shared.config.deployment.clone(),
            memory_usage: figures.used,
            memory_limit: figures.limit,
            deferred_requests: figures.parked,
            ipc_connections: figures.ipc,
            rpc_connections: figures.rpc,
        }
    }

    /// `{"i0": {...}}`, as `cluster_meta` answers.
    pub fn cluster_meta(&self) -> Map<String, Value> {
        let Config {
            hostname,
            nodename,
            ipc_socket,
            rpc_endpoint,
            ..
        } = self.config();
        let mut hash = DefaultHasher::new();
        (hostname, nodename).hash(&mut hash);
        let now = since_epoch();
        let timestamp = (now.as_secs() << 32) + u64::from(now.subsec_micros());
        let mut instance = Map::new();
        // Any number that differs from host to host; 48 bits survive a reader that uses floats.
        instance.insert("hostid".into(), (hash.finish() >> 16).into());
        instance.insert("hostname".into(), hostname.as_str().into());
        instance.insert("nodename".into(), nodename.as_str().into());
        instance.insert("ipc_socket".into(), ipc_socket.as_str().into());
        instance.insert("rpc_endpoint".into(), rpc_endpoint.as_str().into());
        instance.insert("timestamp".into(), timestamp.into());
        Map::from_iter([(self.shared.instance.to_string(), Value::Object(instance))])
    }

    /// Whether a blob is in memory. Upstream up to 0.24.2 said whether somebody holds it; since
    /// then, and here, only a spilled blob is not in use.
    pub fn is_in_use(&self, id: ObjectId) -> bool {
        !self.is_spilled(id)
    }

    /// A new object with this metadata.
    pub fn create_object(&self, content: Value) -> Result<Created, Error> {
        let created = self.create_objects(vec![content])?;
        created.into_iter().next().ok_or(Error::NotAnObject)
    }

    /// New objects with this metadata, all or none. None of them can be a member of another.
    pub fn create_objects(&self, contents: Vec<Value>) -> Result<Vec<Created>, Error> {
        let now = now();
        self.shared
            .try_change(|state| state.create_objects(contents, now))
    }

    /// Object text → tree; what is missing is absent.
    pub fn get_objects(&self, ids: &[ObjectId]) -> Map<String, Value> {
        let (found, broken) = self.shared.lock().state.get_objects(ids);
        for (id, why) in broken {
            tracing::warn!(object_id = %id, ?why, "an object cannot be shown");
        }
        found
    }

    /// As `get_objects`, once all of them exist. Dropping the future ends the wait.
    pub async fn wait_objects(&self, ids: &[ObjectId]) -> Map<String, Value> {
        loop {
            let parked = self.park(|state| state.wait_objects(ids.to_vec()));
            match parked {
                Ok(found) => return found,
                Err((_guard, answer)) => {
                    if let Ok(Answer::Objects(found)) = answer.await {
                        return found;
                    }
                }
            }
        }
    }

    /// Trees of the first `limit` objects whose typename matches, then of sealed blobs if there
    /// is room and the pattern, as a wildcard, fits their type.
    pub fn list_objects(&self, pattern: &str, regex: bool, limit: u64) -> Map<String, Value> {
        self.shared.lock().state.list_objects(pattern, regex, limit)
    }

    /// The blobs of the delete set, those that never existed included. What may not be deleted
    /// stays; that is no error.
    pub fn delete(&self, ids: &[ObjectId], options: DeleteOptions) -> Result<Vec<ObjectId>, Error> {
        self.shared.try_change(|state| state.delete(ids, options))
    }

    /// Deletes all objects and blobs, also those in use and unsealed ones. Names stay.
    pub fn clear(&self) {
        self.shared.change(|state| ((), state.clear()));
    }

    /// Whether there is such an object, or such a blob, sealed or not.
    pub fn exists(&self, id: ObjectId) -> bool {
        self.shared.lock().state.exists(id)
    }

    /// Makes an object known cluster-wide, and the transient ones below it.
    pub fn persist(&self, id: ObjectId) -> Result<(), Error> {
        self.shared.lock().state.persist(id)
    }

    /// Whether [`Self::persist`] has been called for it.
    pub fn is_persisted(&self, id: ObjectId) -> Result<bool, Error> {
        self.shared.lock().state.is_persisted(id)
    }

    /// Adds labels to an object, replacing those with the same key.
    pub fn label(&self, id: ObjectId, labels: Vec<(String, String)>) -> Result<(), Error> {
        self.shared.lock().state.label(id, labels)
    }

    /// A new object with the fields and members of another, and some fields more.
    pub fn shallow_copy(&self, id: ObjectId, extra: Map<String, Value>) -> Result<ObjectId, Error> {
        let now = now();
        self.shared
            .try_change(|state| state.shallow_copy(id, extra, now))
    }

    /// Gives a name to a persisted object, whoever had it.
    pub fn put_name(&self, id: ObjectId, name: &str) -> Result<(), Error> {
        self.shared
            .try_change(|state| Ok(((), state.put_name(id, name)?)))
    }

    /// The object of that name; it may be gone.
    pub fn get_name(&self, name: &str) -> Result<ObjectId, Error> {
        self.shared.lock().state.get_name(name)
    }

    /// As `get_name`, once the name exists. Dropping the future ends the wait.
    pub async fn wait_name(&self, name: &str) -> ObjectId {
        loop {
            let parked = self.park(|state| state.wait_name(name));
            match parked {
                Ok(id) => return id,
                Err((_guard, answer)) => {
                    if let Ok(Answer::Name(id)) = answer.await {
                        return id;
                    }
                }
            }
        }
    }

    /// The first `limit` names that match, in ascending order.
    pub fn list_names(&self, pattern: &str, regex: bool, limit: u64) -> BTreeMap<String, ObjectId> {
        self.shared.lock().state.list_names(pattern, regex, limit)
    }

    /// Takes a name away; one that is not there is no error.
    pub fn drop_name(&self, name: &str) -> Result<(), Error> {
        self.shared.lock().state.drop_name(name);
        Ok(())
    }

    /// Keeps the bytes of a blob in place while they are copied, even if it is deleted
    /// meanwhile. None where there is no such blob.
    pub fn pin(&self, id: ObjectId) -> Option<Pin> {
        let payload = self.shared.lock().state.pin(id)?;
        Some(Pin {
            store: self.clone(),
            payload,
        })
    }

    /// Bytes of a sealed or unsealed blob, for the doors that pass bytes.
    pub fn read_blob(&self, payload: &Payload, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let length = buffer.len() as u64;
        self.copy(payload, at, length, |bytes, offset| {
            bytes.read(offset, buffer)
        })
    }

    /// Fills bytes of a blob, for the doors that pass bytes.
    pub fn write_blob(&self, payload: &Payload, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let length = bytes.len() as u64;
        self.copy(payload, at, length, |place, offset| {
            place.write(offset, bytes)
        })
    }

    fn copy(
        &self,
        payload: &Payload,
        at: u64,
        length: u64,
        copy: impl FnOnce(&Bytes<'_>, u64) -> io::Result<()>,
    ) -> Result<(), Error> {
        let Payload { id, size, .. } = *payload;
        if at.checked_add(length).is_none_or(|end| end > size) {
            return Err(Error::OutOfBounds {
                id,
                at,
                length,
                size,
            });
        }
        if length == 0 {
            return Ok(());
        }
        // Nobody may get these bytes while they are copied. A blob that is deleted already is
        // kept by the pin of whoever goes on with it.
        let pin = self.pin(id);
        // Since it was described it may have gone to disk, or come back.
        let payload = Payload {
            size,
            ..*pin.as_ref().map_or(payload, Pin::payload)
        };
        if !self.shared.lock().state.is_backed(&payload) {
            return Err(Error::BlobGone(id));
        }
        let bytes = self.shared.bytes(&payload)?;
        copy(&bytes, payload.offset + at).map_err(|err| Error::Memory {
            id,
            reason: err.to_string(),
        })
    }

    /// What is wanted if it is there, or a parked request.
    fn park<T>(
        &self,
        wait: impl FnOnce(&mut State) -> Result<T, WaiterId>,
    ) -> Result<T, (Parked, oneshot::Receiver<Answer>)> {
        let mut guarded = self.shared.lock();
        wait(&mut guarded.state).map_err(|waiter| {
            let (sender, receiver) = oneshot::channel();
            guarded.parked.insert(waiter, sender);
            (
                Parked {
                    shared: Arc::clone(&self.shared),
                    waiter,
                },
                receiver,
            )
        })
    }
}

/// A blob whose bytes stay in place for as long as this exists.
#[derive(Debug)]
pub struct Pin {
    store: Store,
    payload: Payload,
}

impl Pin {
    /// The blob as it was when it was pinned.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let Payload { id, offset, .. } = self.payload;
        self.store
            .shared
            .change(|state| ((), state.unpin(id, offset)));
    }
}

/// What one connection has of a store.
///
/// Dropping it releases what it holds and frees the blobs it created that nobody sealed.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    connection: ConnectionId,
    transport: Transport,
    /// The files it was given, or is to be given.
    mappings: Mappings,
}

impl Lease {
    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A new, unsealed blob; of no bytes, the empty one.
    pub fn create_blob(&self, size: u64) -> Result<Payload, Error> {
        let created = self.create_blobs(&[size])?;
        created
            .into_iter()
            .next()
            .ok_or(Error::DropUnknown(ObjectId::INVALID))
    }

    /// New, unsealed blobs, all or none.
    pub fn create_blobs(&self, sizes: &[u64]) -> Result<Vec<Payload>, Error> {
        let created = match self.create_in_arena(sizes) {
            Err(full) => return self.create_anyway(sizes, full),
            Ok(created) => created,
        };
        self.store.shared.relieve();
        Ok(created)
    }

    fn create_in_arena(&self, sizes: &[u64]) -> Result<Vec<Payload>, Error> {
        let now = now();
        let shared = &self.store.shared;
        let mut guarded = shared.lock();
        loop {
            match guarded.state.create_blobs(self.connection, sizes, now) {
                Ok(created) => {
                    drop(guarded);
                    shared.bound_pages();
                    return Ok(created);
                }
                Err((err, false)) => return Err(err),
                Err((_, true)) => {
                    let wait = shared.trimmed.wait(guarded);
                    guarded = wait.unwrap_or_else(|_| std::process::abort());
                }
            }
        }
    }

    /// Lets others see a blob, and holds it.
    pub fn seal(&self, id: ObjectId) -> Result<(), Error> {
        self.store.shared.complete(id)?;
        let seal = |state: &mut State| Ok(((), state.seal(self.connection, id)?));
        self.store.shared.try_change(seal)
    }

    /// Unknown ids are left out; an unsealed one fails the whole unless `allow_unsealed`. Holds
    /// them.
    pub fn get_blobs(&self, ids: &[ObjectId], allow_unsealed: bool) -> Result<Vec<Payload>, Error> {
        let shared = &self.store.shared;
        {
            let state = &mut shared.lock().state;
            if shared.spiller.is_none() || !ids.iter().any(|&id| state.is_spilled(id)) {
                return state.get_blobs(self.connection, ids, allow_unsealed);
            }
        }
        match &shared.spiller {
            Some(spiller) => self.get_from_disk(spiller, ids, allow_unsealed),
            None => Ok(Vec::new()),
        }
    }

    /// Holds blobs; unknown ids are accepted.
    pub fn hold(&self, ids: &[ObjectId]) {
        self.store.shared.lock().state.hold(self.connection, ids);
    }

    /// No longer holds a blob.
    pub fn release(&self, id: ObjectId) -> Result<(), Error> {
        self.store.shared.lock().state.release(self.connection, id)
    }

    /// Frees a blob, whoever holds it.
    pub fn drop_blob(&self, id: ObjectId) -> Result<(), Error> {
        self.store
            .shared
            .try_change(|state| Ok(((), state.drop_blob(id)?)))
    }

    /// Cuts an unsealed blob; the rest of its bytes no longer count.
    pub fn shrink_blob(&self, id: ObjectId, size: u64) -> Result<(), Error> {
        self.store
            .shared
            .try_change(|state| Ok(((), state.shrink_blob(id, size)?)))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let disconnect = |state: &mut State| ((), state.disconnect(self.connection));
        self.store.shared.change(disconnect);
    }
}
