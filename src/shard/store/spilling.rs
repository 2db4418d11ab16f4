//! Between the arena and the disk: makes room, brings back, and serves what cannot come back.
//!
//! What is safe. A connection maps the arena once and reads it whenever it likes, and official
//! clients up to 0.24.2 never say that they are done with a blob. So a blob that a connection has
//! sealed or got, and not released, is never taken out of the arena while that connection lives:
//! the range would be given to another blob, and the client would read that one's bytes without
//! any sign. That holds for the writer of a blob too: what it gets back from sealing is a blob
//! that reads through its mapping. Only blobs that nobody holds are moved. A chunk of a stream is
//! given away by its writer, who asks for the next one instead of sealing it: nobody holds it
//! until it is pulled and got.
//!
//! Such a client alone could fill the arena for good. Therefore what does not fit, once all cold
//! blobs have been moved, goes to disk without ever being in the arena:
//!
//! * A new blob becomes a file of its own, whose space is taken in advance, and its writer maps
//!   that: to a client it is a region like the arena, with its own `store_fd`.
//! * A spilled blob that is asked for comes back if there is room or room can be made. Otherwise
//!   the client maps its file. A file lives as long as it is mapped and never changes, so there
//!   is nothing to take away from anybody later, and the page cache lets its memory go as the
//!   machine needs it. Over TCP the bytes are read from the file.
//!
//! So one client can put and get without end, in any order, whatever it holds; what the disk has
//! no room for is refused when it is created, not when it is written.
//!
//! The price is a descriptor and a mapping in the client for each file that it maps, until it
//! disconnects. Its table of mappings is keyed by `store_fd`, which never stands for another file.
//! A process has 1024 descriptors by default, and a client that runs out of them breaks; so
//! [`MAPPINGS`] is the most that one connection gets, and the next one is refused.
//!
//! Disk is waited for with [`Spiller::turn`] taken, never under the store's lock: a blob is pinned,
//! copied, and moved if it still may be. Whoever needs room while another makes it waits for that.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blob::Region;
use super::error::Error;
use super::eviction::Watermarks;
use super::shared::Shared;
use super::state::{Effects, State};
use super::{Lease, Payload, Store, Transport, now};
use crate::shard::ids::ObjectId;
use crate::shard::memory::Segment;
use crate::shard::spill::{self, Removal, SpillStore};

/// Files that one connection may have mapped: leaves a quarter of the 1024 descriptors that a
/// process has by default.
const MAPPINGS: usize = 768;

/// Where blobs go that memory has no room for, and when.
#[derive(Debug)]
pub struct Spilling {
    /// The disk.
    pub disk: Box<dyn SpillStore>,
    /// When to begin and to stop.
    pub watermarks: Watermarks,
}

/// The disk, for one at a time.
#[derive(Debug)]
pub(super) struct Spiller {
    disk: Box<dyn SpillStore>,
    marks: Watermarks,
    turn: Mutex<()>,
    /// Whether the last attempt to write failed: that is told once, not at every request.
    is_failing: AtomicBool,
}

/// Files on their way to a connection: none once it has them. By number.
pub(super) type Mappings = Mutex<BTreeMap<i32, Option<File>>>;

/// Where bytes are read and written.
pub(super) enum Bytes<'a> {
    Arena(&'a Segment),
    File(File),
}

impl Bytes<'_> {
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Arena(segment) => segment.read(offset, buffer),
            Self::File(file) => file.read_exact_at(buffer, offset),
        }
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Arena(segment) => segment.write(offset, bytes),
            Self::File(file) => file.write_all_at(bytes, offset),
        }
    }
}

impl From<Spilling> for Spiller {
    fn from(spilling: Spilling) -> Self {
        Self {
            disk: spilling.disk,
            marks: spilling.watermarks,
            turn: Mutex::new(()),
            is_failing: AtomicBool::new(false),
        }
    }
}

impl Spiller {
    fn turn(&self) -> MutexGuard<'_, ()> {
        // Guards the order of things only.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of the first of several failures to write, and when it works again.
    fn tell(&self, failure: Option<&spill::Error>) {
        let was_failing = self.is_failing.swap(failure.is_some(), Ordering::Relaxed);
        match failure {
            Some(err) if !was_failing => {
                let err = err as &(dyn std::error::Error + 'static);
                tracing::warn!(err, "blobs cannot be spilled");
            }
            None if was_failing => tracing::info!("blobs can be spilled again"),
            Some(_) | None => {}
        }
    }

    /// Removes a file; one that stays counts on.
    pub(super) fn remove(&self, id: ObjectId, removal: Removal) {
        match self.disk.remove(id, removal) {
            Ok(()) | Err(spill::Error::Unknown(_)) => {}
            Err(err) => {
                tracing::warn!(%id, err = &err as &(dyn std::error::Error + 'static), "a spilled blob's file stays");
            }
        }
    }
}

/// An error of the disk with its cause, on one line.
fn told(err: &spill::Error) -> String {
    match std::error::Error::source(err) {
        Some(source) => format!("{err}: {source}"),
        None => err.to_string(),
    }
}

fn refusal(id: ObjectId, err: &spill::Error) -> Error {
    let reason = told(err);
    match err {
        spill::Error::Quota { .. } | spill::Error::NoSpace { .. } => Error::DiskFull { id, reason },
        spill::Error::Directory { .. }
        | spill::Error::Taken(_)
        | spill::Error::Io { .. }
        | spill::Error::Damaged { .. }
        | spill::Error::Exists(_) => Error::Disk { id, reason },
        spill::Error::Unknown(_) => Error::BlobGone(id),
    }
}

fn quietly<T>(value: T) -> (T, Effects) {
    (value, Effects::default())
}

impl Shared {
    /// Moves cold blobs to disk, if as much is in use as the watermark says.
    pub(super) fn relieve(&self) {
        let Some(spiller) = &self.spiller else {
            return;
        };
        if !self.lock().state.is_tight(spiller.marks, 0) {
            return;
        }
        let _turn = spiller.turn();
        // The watermark is no limit: what cannot go stays.
        drop(self.make_room(spiller, None));
    }

    /// Moves the coldest blobs to disk, for `missing` bytes or for the watermark. Whether there
    /// were any. The turn is the caller's.
    fn make_room(&self, spiller: &Spiller, missing: Option<u64>) -> Result<bool, spill::Error> {
        let victims = self.change(|state| quietly(state.victims(spiller.marks, missing)));
        let were_any = !victims.is_empty();
        let mut failure = None;
        for victim in victims {
            if failure.is_some() {
                self.change(|state| ((), state.unpin(victim.id, victim.offset)));
                continue;
            }
            // Where room is missing, the pages are about to be used again.
            let spilled = self.write_out(spiller, &victim, |state| {
                state.spilled(&victim, None, missing.is_none())
            });
            failure = spilled.err();
        }
        failure.map_or(Ok(were_any), Err)
    }

    /// Writes a pinned blob to disk, and then moves it there if that still is possible.
    fn write_out(
        &self,
        spiller: &Spiller,
        victim: &Payload,
        move_out: impl FnOnce(&mut State) -> (bool, Effects),
    ) -> Result<(), spill::Error> {
        let Payload {
            id, offset, size, ..
        } = *victim;
        let written = spiller.disk.write(id, size, &mut |at, buffer| {
            self.segment.read(offset + at, buffer)
        });
        spiller.tell(written.as_ref().err());
        if let Err(err) = written {
            self.change(|state| ((), state.unpin(id, offset)));
            return Err(err);
        }
        if !self.change(move_out) {
            spiller.remove(id, Removal::Erase);
        }
        Ok(())
    }

    /// Brings a blob back, if it is on disk and there is room or room can be made: whether it is
    /// in the arena now. The turn is the caller's.
    fn bring_back(&self, spiller: &Spiller, id: ObjectId) -> Result<bool, Error> {
        let place = loop {
            match self.change(|state| quietly(state.begin_return(id))) {
                None => return Ok(!self.lock().state.is_spilled(id)),
                Some(Ok(place)) => break place,
                Some(Err(_)) => {
                    let size = self.lock().state.size(id).unwrap_or(0);
                    match self.make_room(spiller, Some(size)) {
                        Ok(true) => {}
                        Ok(false) => return Ok(false),
                        Err(_) => return Ok(false),
                    }
                }
            }
        };
        let read = spiller
            .disk
            .read(id, &mut |at, bytes| self.segment.write(place.0 + at, bytes));
        let is_back = self.change(|state| state.end_return(id, place, read.is_ok()));
        read.map_err(|err| refusal(id, &err))?;
        if is_back {
            // A client that mapped the file once may still read it.
            spiller.remove(id, Removal::Keep);
            self.bound_pages();
        }
        Ok(is_back)
    }

    /// A blob in a file becomes a whole there before others see it.
    pub(super) fn complete(&self, id: ObjectId) -> Result<(), Error> {
        let Some(spiller) = &self.spiller else {
            return Ok(());
        };
        let Some(blob) = self.lock().state.unsealed_on_disk(id) else {
            return Ok(());
        };
        let _turn = spiller.turn();
        match spiller.disk.complete(id, blob.size) {
            Err(spill::Error::Unknown(_)) => Err(Error::SealUnknown(id)),
            done => done.map_err(|err| refusal(id, &err)),
        }
    }

    /// Where the bytes of a pinned blob are.
    pub(super) fn bytes(&self, payload: &Payload) -> Result<Bytes<'_>, Error> {
        match (payload.region, &self.spiller) {
            (Region::Arena, _) => Ok(Bytes::Arena(&self.segment)),
            (Region::File { .. }, Some(spiller)) => {
                let file = spiller.disk.open(payload.id);
                file.map(Bytes::File)
                    .map_err(|err| refusal(payload.id, &err))
            }
            (Region::File { .. }, None) => Err(Error::BlobGone(payload.id)),
        }
    }
}

impl Store {
    /// Whether a request that creates `size` bytes, or none, may have to wait for a disk.
    pub fn may_wait_for_disk(&self, size: u64) -> bool {
        let Some(spiller) = &self.shared.spiller else {
            return false;
        };
        let state = &self.shared.lock().state;
        state.are_on_disk() || state.is_tight(spiller.marks, size)
    }

    /// Whether a blob is on disk.
    pub fn is_spilled(&self, id: ObjectId) -> bool {
        self.shared.lock().state.is_spilled(id)
    }

    /// Brings the blobs among and below `ids` back into memory. With `pin` they stay there until
    /// [`Self::unpin`], as often as they were pinned.
    pub fn load(&self, ids: &[ObjectId], pin: bool) -> Result<(), Error> {
        let shared = &self.shared;
        let blobs = shared.lock().state.blobs_below(ids);
        for id in blobs {
            if pin {
                shared.lock().state.keep(id);
            }
            let Some(spiller) = &shared.spiller else {
                continue;
            };
            if !shared.lock().state.is_spilled(id) {
                continue;
            }
            let turn = spiller.turn();
            let back = shared.bring_back(spiller, id);
            drop(turn);
            let back = match back {
                // It was deleted, or somebody copies it this moment.
                Ok(false) if shared.lock().state.size(id).is_some() => Err(self.no_room(id)),
                Ok(_) => Ok(()),
                Err(err) => Err(err),
            };
            if back.is_err() && pin {
                shared.lock().state.unkeep(id);
            }
            back?;
        }
        shared.relieve();
        Ok(())
    }

    fn no_room(&self, id: ObjectId) -> Error {
        let state = &self.shared.lock().state;
        let figures = state.figures();
        Error::NotEnoughMemory {
            size: state.size(id).unwrap_or(0),
            limit: figures.limit,
            used: figures.used,
        }
    }

    /// Ends what one `load` with a pin began.
    pub fn unpin(&self, ids: &[ObjectId]) {
        let state = &mut self.shared.lock().state;
        for id in state.blobs_below(ids) {
            state.unkeep(id);
        }
    }
}

impl Lease {
    /// Creates blobs that memory had no room for: once others have gone to disk, or there.
    pub(super) fn create_anyway(&self, sizes: &[u64], full: Error) -> Result<Vec<Payload>, Error> {
        let shared = &self.store.shared;
        let (Some(spiller), Error::NotEnoughMemory { limit, used, size }) =
            (&shared.spiller, &full)
        else {
            return Err(full);
        };
        // A blob that could never be in memory is refused, as it is without a disk.
        if sizes.iter().any(|size| size > limit) {
            return Err(full);
        }
        let _turn = spiller.turn();
        let total = sizes
            .iter()
            .try_fold(0, |sum: u64, &size| sum.checked_add(size));
        if let Some(total) = total.filter(|total| total <= limit) {
            loop {
                if let Ok(created) = self.create_in_arena(sizes) {
                    return Ok(created);
                }
                match shared.make_room(spiller, Some(total)) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => {
                        // Some may have gone before.
                        if let Ok(created) = self.create_in_arena(sizes) {
                            return Ok(created);
                        }
                        break;
                    }
                }
            }
        }
        self.create_on_disk(spiller, sizes)
            .map_err(|reason| Error::NoRoomOnDisk {
                size: *size,
                limit: *limit,
                used: *used,
                reason,
            })
    }

    fn create_on_disk(&self, spiller: &Spiller, sizes: &[u64]) -> Result<Vec<Payload>, String> {
        let shared = &self.store.shared;
        if !self.can_map(sizes.len()) {
            return Err(Error::TooManyMappings(MAPPINGS).to_string());
        }
        let now = now();
        let ids = shared.lock().state.blob_ids(sizes.len(), now);
        let wanted: Vec<(ObjectId, u64)> = ids.into_iter().zip(sizes.iter().copied()).collect();
        let mut files = Vec::with_capacity(wanted.len());
        let undo = |files: Vec<(ObjectId, File)>| {
            for (id, _) in files {
                spiller.remove(id, Removal::Erase);
            }
        };
        for &(id, size) in wanted.iter().filter(|(_, size)| *size > 0) {
            match spiller.disk.create(id, size) {
                Ok(file) => files.push((id, file)),
                Err(err) => {
                    undo(files);
                    return Err(told(&err));
                }
            }
        }
        let created = shared.lock().state.create_on_disk(self.connection, &wanted);
        let Some(created) = created else {
            undo(files);
            return Err("there have been too many files".to_owned());
        };
        let on_disk = created
            .iter()
            .filter(|payload| payload.region != Region::Arena);
        for (payload, (_, file)) in on_disk.zip(files) {
            self.map(payload, file);
        }
        Ok(created)
    }

    /// As [`Self::get_blobs`], where some of them are on disk.
    pub(super) fn get_from_disk(
        &self,
        spiller: &Spiller,
        ids: &[ObjectId],
        allow_unsealed: bool,
    ) -> Result<Vec<Payload>, Error> {
        let shared = &self.store.shared;
        let turn = spiller.turn();
        // Held first: what has come back is not to go again for the next one.
        let cold = {
            let state = &mut shared.lock().state;
            let cold = state.cold_on_disk(ids);
            state.get_blobs(self.connection, ids, allow_unsealed)?;
            cold
        };
        for id in cold {
            shared.bring_back(spiller, id)?;
        }
        let mut found = shared
            .lock()
            .state
            .get_blobs(self.connection, ids, allow_unsealed)?;
        if self.transport == Transport::Ipc {
            let mut gone = Vec::new();
            for payload in &found {
                match self.open(spiller, payload) {
                    // Deleted this moment: it is left out, as any that is not there.
                    Err(Error::BlobGone(id)) => gone.push(id),
                    opened => opened?,
                }
            }
            found.retain(|payload| !gone.contains(&payload.id));
        }
        drop(turn);
        shared.relieve();
        Ok(found)
    }

    /// Opens a blob's file for the connection, unless it has it. Its bytes are checked: a client
    /// that reads from a mapping cannot be told of an error.
    fn open(&self, spiller: &Spiller, payload: &Payload) -> Result<(), Error> {
        let Region::File { number, .. } = payload.region else {
            return Ok(());
        };
        if self.mappings().contains_key(&number) {
            return Ok(());
        }
        if !self.can_map(1) {
            return Err(Error::TooManyMappings(MAPPINGS));
        }
        let refused = |err: spill::Error| refusal(payload.id, &err);
        if payload.is_sealed {
            spiller
                .disk
                .read(payload.id, &mut |_, _| Ok(()))
                .map_err(refused)?;
        }
        let file = spiller.disk.open(payload.id).map_err(refused)?;
        self.map(payload, file);
        Ok(())
    }

    fn mappings(&self) -> MutexGuard<'_, BTreeMap<i32, Option<File>>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn can_map(&self, more: usize) -> bool {
        self.transport != Transport::Ipc || self.mappings().len().saturating_add(more) <= MAPPINGS
    }

    fn map(&self, payload: &Payload, file: File) {
        if let (Region::File { number, .. }, Transport::Ipc) = (payload.region, self.transport)
            && let Entry::Vacant(entry) = self.mappings().entry(number)
        {
            entry.insert(Some(file));
        }
    }

    /// The file of a region that the connection does not have yet; from now on it has.
    pub fn take_file(&self, number: i32) -> Option<File> {
        self.mappings().get_mut(&number)?.take()
    }

    /// Moves the blobs among and below `ids` to disk, those excepted that others hold or that
    /// are not sealed.
    pub fn evict(&self, ids: &[ObjectId]) -> Result<(), Error> {
        let shared = &self.store.shared;
        let spiller = shared.spiller.as_ref().ok_or(Error::SpillDisabled)?;
        let _turn = spiller.turn();
        let blobs = shared.lock().state.blobs_below(ids);
        for id in blobs {
            let victim = shared.change(|state| quietly(state.victim(id, self.connection)));
            let Some(victim) = victim else {
                continue;
            };
            let connection = Some(self.connection);
            shared
                .write_out(spiller, &victim, |state| {
                    state.spilled(&victim, connection, true)
                })
                .map_err(|err| refusal(id, &err))?;
        }
        Ok(())
    }
}
