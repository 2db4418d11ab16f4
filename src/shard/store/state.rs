//! Everything the store knows, and every change of it, as one value without a lock.
//!
//! Nothing here sleeps, reads a clock or touches the arena. What a change entails outside is in
//! the [`Effects`] it returns, to be performed once nobody is kept waiting by it.

#[path = "stream_state.rs"]
mod stream_state;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::{Map, Value};

use super::blob::{Blob, Blobs, Region, Vacated};
use super::create;
use super::error::Error;
use super::eviction::Watermarks;
use super::lease::{ConnectionId, Leases, NotHeld};
use super::name::Names;
use super::object::{BLOB, blob_tree};
use super::objects::{Broken, Draft, Objects};
use super::pattern::Pattern;
use super::stream::{Outcome, Pulled, Streams, Turn};
use super::wait::{Wait, WaiterId, Waits};
use super::{Created, DeleteOptions, Payload, Transport};
use crate::shard::ids::{IdGenerator, InstanceId, ObjectId};
use crate::shard::memory::{Full, Pool};

/// What a parked request gets.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Objects(Map<String, Value>),
    Name(ObjectId),
    Stream(Turn),
}

/// What is to be done after a change.
#[must_use = "what a change entails must be performed"]
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// Answer these.
    pub(super) wake: Vec<(WaiterId, Answer)>,
    /// Give these pages back, then call [`State::trimmed`].
    pub(super) trim: Vec<Range<u64>>,
    /// Remove the files of these blobs.
    pub(super) discard: Vec<ObjectId>,
}

impl Effects {
    fn add(&mut self, vacated: Vacated) {
        self.trim.extend(vacated.trim);
        self.discard.extend(vacated.discard);
    }

    fn extend(&mut self, more: Self) {
        let Self {
            wake,
            trim,
            discard,
        } = more;
        self.wake.extend(wake);
        self.trim.extend(trim);
        self.discard.extend(discard);
    }
}

impl From<Vacated> for Effects {
    fn from(vacated: Vacated) -> Self {
        let mut effects = Self::default();
        effects.add(vacated);
        effects
    }
}

/// The figures of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) used: u64,
    pub(super) limit: u64,
    pub(super) parked: u64,
    pub(super) ipc: u64,
    pub(super) rpc: u64,
}

/// The state of a store.
#[derive(Debug)]
pub(super) struct State {
    ids: IdGenerator,
    blobs: Blobs,
    objects: Objects,
    names: Names,
    leases: Leases,
    waits: Waits,
    streams: Streams,
}

/// The blob that every creation of no bytes yields.
const EMPTY: Payload = Payload {
    id: ObjectId::EMPTY_BLOB,
    offset: 0,
    size: 0,
    is_sealed: false,
    region: Region::Arena,
};

fn payload(id: ObjectId, blob: &Blob) -> Payload {
    Payload {
        id,
        offset: blob.offset,
        size: blob.size,
        is_sealed: blob.is_sealed(),
        region: blob.region,
    }
}

impl State {
    pub(super) fn new(own: InstanceId, pool: Pool) -> Self {
        Self {
            ids: IdGenerator::default(),
            blobs: Blobs::new(pool),
            objects: Objects::new(own),
            names: Names::default(),
            leases: Leases::default(),
            waits: Waits::default(),
            streams: Streams::default(),
        }
    }

    pub(super) fn figures(&self) -> Figures {
        Figures {
            used: self.blobs.used(),
            limit: self.blobs.limit(),
            parked: self.waits.len(),
            ipc: self.leases.count(Transport::Ipc),
            rpc: self.leases.count(Transport::Rpc),
        }
    }

    pub(super) fn connect(&mut self, transport: Transport) -> ConnectionId {
        self.leases.connect(transport)
    }

    /// Ends a connection: what it held is released, what it had not sealed is freed.
    pub(super) fn disconnect(&mut self, connection: ConnectionId) -> Effects {
        let mut effects = Effects::default();
        for id in self.leases.disconnect(connection, &mut self.blobs) {
            self.free(id, true, &mut effects);
        }
        self.leave_streams(connection, &mut effects);
        effects
    }

    // Blobs.

    /// New blobs of these sizes, or none; then whether there may be room once other threads
    /// have given back the pages that they are at.
    pub(super) fn create_blobs(
        &mut self,
        connection: ConnectionId,
        sizes: &[u64],
        now: u64,
    ) -> Result<Vec<Payload>, (Error, bool)> {
        let mut created = Vec::with_capacity(sizes.len());
        for &size in sizes {
            if size == 0 {
                created.push(EMPTY);
                continue;
            }
            let id = self.ids.blob(now);
            match self.blobs.create(id, size, connection) {
                Ok(blob) => created.push(payload(id, &blob)),
                Err(full) => {
                    // What this request has taken so far is in use, as upstream counts.
                    let (limit, used) = (self.blobs.limit(), self.blobs.used());
                    for payload in created {
                        self.blobs.delete(payload.id, false);
                    }
                    let soon = full == Full::Fragmented && self.blobs.is_trimming();
                    return Err((Error::NotEnoughMemory { size, limit, used }, soon));
                }
            }
        }
        for payload in created.iter().filter(|payload| payload.size > 0) {
            self.leases.created(connection, payload.id);
        }
        Ok(created)
    }

    pub(super) fn seal(
        &mut self,
        connection: ConnectionId,
        id: ObjectId,
    ) -> Result<Effects, Error> {
        let mut effects = Effects::default();
        if id == ObjectId::EMPTY_BLOB {
            return Ok(effects);
        }
        let writer = self.blobs.seal(id).ok_or(Error::SealUnknown(id))?;
        self.leases.hold(connection, id, &mut self.blobs);
        if let Some(writer) = writer {
            self.leases.settled(writer, id);
            self.appeared(&[id], &mut effects);
        }
        Ok(effects)
    }

    pub(super) fn get_blobs(
        &mut self,
        connection: ConnectionId,
        ids: &[ObjectId],
        allow_unsealed: bool,
    ) -> Result<Vec<Payload>, Error> {
        let mut found = Vec::with_capacity(ids.len());
        for &id in ids {
            if id == ObjectId::EMPTY_BLOB {
                found.push(EMPTY);
            } else if let Some(blob) = self.blobs.get(id) {
                if !blob.is_sealed() && !allow_unsealed {
                    return Err(Error::NotSealed(id));
                }
                found.push(payload(id, blob));
            }
        }
        self.hold(connection, ids);
        Ok(found)
    }

    pub(super) fn hold(&mut self, connection: ConnectionId, ids: &[ObjectId]) {
        for &id in ids.iter().filter(|&&id| id != ObjectId::EMPTY_BLOB) {
            self.leases.hold(connection, id, &mut self.blobs);
        }
    }

    pub(super) fn release(&mut self, connection: ConnectionId, id: ObjectId) -> Result<(), Error> {
        if id == ObjectId::EMPTY_BLOB {
            return Ok(());
        }
        self.leases
            .release(connection, id, &mut self.blobs)
            .map_err(|err| match err {
                NotHeld::This => Error::NotHeld(id),
                NotHeld::Any => Error::NothingHeld,
            })
    }

    pub(super) fn drop_blob(&mut self, id: ObjectId) -> Result<Effects, Error> {
        let mut effects = Effects::default();
        if id != ObjectId::EMPTY_BLOB && !self.free(id, false, &mut effects) {
            return Err(Error::DropUnknown(id));
        }
        Ok(effects)
    }

    pub(super) fn shrink_blob(&mut self, id: ObjectId, size: u64) -> Result<Effects, Error> {
        let blob = self.blobs.get(id).ok_or(Error::ShrinkUnknown(id))?;
        if blob.is_sealed() {
            return Err(Error::ShrinkSealed);
        }
        if size > blob.size {
            return Err(Error::ShrinkGrows {
                size,
                current: blob.size,
            });
        }
        let mut effects = Effects::default();
        effects.trim.extend(self.blobs.shrink(id, size));
        self.wake_writers(&mut effects);
        Ok(effects)
    }

    /// Frees a blob if it exists.
    fn free(&mut self, id: ObjectId, trim: bool, effects: &mut Effects) -> bool {
        let Some(deleted) = self.blobs.delete(id, trim) else {
            return false;
        };
        if let Some(writer) = deleted.writer {
            self.leases.settled(writer, id);
        }
        effects.add(deleted.vacated);
        self.wake_writers(effects);
        true
    }

    /// Gives all pages back that no blob has.
    pub(super) fn reclaim(&mut self) -> Effects {
        let trim = self.blobs.reclaim();
        Effects {
            trim,
            ..Effects::default()
        }
    }

    /// Pages have been given back: others may have their place.
    pub(super) fn trimmed(&mut self, ranges: Vec<Range<u64>>) {
        for range in ranges {
            self.blobs.trimmed(range);
        }
    }

    /// Keeps a blob's bytes in place until [`Self::unpin`], even if it is deleted.
    pub(super) fn pin(&mut self, id: ObjectId) -> Option<Payload> {
        self.blobs.pin(id).map(|blob| payload(id, &blob))
    }

    pub(super) fn unpin(&mut self, id: ObjectId, offset: u64) -> Effects {
        self.blobs.unpin(id, offset).into()
    }

    /// Whether the bytes that a payload describes still are that blob's.
    pub(super) fn is_backed(&self, payload: &Payload) -> bool {
        self.blobs
            .is_backed(payload.id, payload.offset, payload.size)
    }

    // Blobs on disk.

    /// Whether any blob is in a file.
    pub(super) fn are_on_disk(&self) -> bool {
        self.blobs.are_on_disk()
    }

    pub(super) fn is_spilled(&self, id: ObjectId) -> bool {
        self.blobs.get(id).is_some_and(|blob| !blob.is_resident())
    }

    pub(super) fn size(&self, id: ObjectId) -> Option<u64> {
        self.blobs.get(id).map(|blob| blob.size)
    }

    /// Whether so much is in use, `size` bytes more included, that blobs are to go to disk.
    pub(super) fn is_tight(&self, marks: Watermarks, size: u64) -> bool {
        marks.are_reached(self.blobs.used().saturating_add(size))
    }

    /// The blobs that have to go to disk, for `missing` bytes or for the watermark; pinned.
    pub(super) fn victims(&mut self, marks: Watermarks, missing: Option<u64>) -> Vec<Payload> {
        let (used, limit) = (self.blobs.used(), self.blobs.limit());
        // What does not fit by count may also be in the way of what does.
        let least = u64::from(missing.is_some());
        let excess = marks.excess(used, limit, missing).max(least);
        let victims = self.blobs.victims(excess);
        let payloads = victims.iter().map(|(id, blob)| payload(*id, blob));
        payloads.collect()
    }

    /// A blob that `connection` wants on disk, pinned, if nobody else holds it.
    pub(super) fn victim(&mut self, id: ObjectId, connection: ConnectionId) -> Option<Payload> {
        let own = u32::from(self.leases.is_held_by(connection, id));
        let blob = self.blobs.victim(id, own)?;
        Some(payload(id, &blob))
    }

    /// A victim has been written to disk: whether that is where it is from now on. It stays in
    /// memory if anybody but `connection` has come to hold it.
    pub(super) fn spilled(
        &mut self,
        victim: &Payload,
        connection: Option<ConnectionId>,
        trim: bool,
    ) -> (bool, Effects) {
        let Payload { id, offset, .. } = *victim;
        let own = connection.is_some_and(|connection| self.leases.is_held_by(connection, id));
        let (moved, vacated) = self.blobs.move_out(id, offset, own.into(), trim);
        let mut effects = Effects::from(vacated);
        if moved {
            self.wake_writers(&mut effects);
        }
        (moved, effects)
    }

    /// Room in the arena for a blob on disk; none if it is not there or somebody copies it.
    pub(super) fn begin_return(&mut self, id: ObjectId) -> Option<Result<(u64, u64), Full>> {
        self.blobs.begin_return(id)
    }

    /// Whether a blob is in the arena from now on.
    pub(super) fn end_return(
        &mut self,
        id: ObjectId,
        place: (u64, u64),
        is_read: bool,
    ) -> (bool, Effects) {
        let (moved, vacated) = self.blobs.end_return(id, place, is_read);
        let mut effects = Effects::from(vacated);
        if !moved {
            // The room is free again.
            self.wake_writers(&mut effects);
        }
        (moved, effects)
    }

    /// Those of `ids` that are on disk and that nobody has mapped there.
    pub(super) fn cold_on_disk(&self, ids: &[ObjectId]) -> Vec<ObjectId> {
        let is_cold = |blob: &Blob| !blob.is_resident() && blob.is_sealed() && !blob.is_held();
        let mut cold = ids.to_vec();
        cold.retain(|&id| self.blobs.get(id).is_some_and(is_cold));
        cold
    }

    /// Ids for blobs that are to be created on disk.
    pub(super) fn blob_ids(&mut self, count: usize, now: u64) -> Vec<ObjectId> {
        (0..count).map(|_| self.ids.blob(now)).collect()
    }

    /// Unsealed blobs whose files there are; none of them where files have used up all numbers.
    pub(super) fn create_on_disk(
        &mut self,
        connection: ConnectionId,
        files: &[(ObjectId, u64)],
    ) -> Option<Vec<Payload>> {
        let mut created = Vec::with_capacity(files.len());
        for &(id, size) in files {
            if size == 0 {
                created.push(EMPTY);
            } else if let Some(blob) = self.blobs.create_on_disk(id, size, connection) {
                self.leases.created(connection, id);
                created.push(payload(id, &blob));
            } else {
                for payload in created {
                    self.leases.settled(connection, payload.id);
                    self.blobs.delete(payload.id, false);
                }
                return None;
            }
        }
        Some(created)
    }

    /// An unsealed blob that is in a file.
    pub(super) fn unsealed_on_disk(&self, id: ObjectId) -> Option<Payload> {
        let blob = self.blobs.get(id)?;
        (!blob.is_sealed() && !blob.is_resident()).then(|| payload(id, blob))
    }

    pub(super) fn keep(&mut self, id: ObjectId) {
        self.blobs.keep(id);
    }

    pub(super) fn unkeep(&mut self, id: ObjectId) {
        self.blobs.unkeep(id);
    }

    /// The blobs among these and below them, each once.
    pub(super) fn blobs_below(&self, ids: &[ObjectId]) -> BTreeSet<ObjectId> {
        let mut seen = BTreeSet::new();
        let mut rest = ids.to_vec();
        while let Some(id) = rest.pop() {
            if seen.insert(id) && !id.is_blob() {
                rest.extend(self.objects.members(id));
            }
        }
        seen.retain(|id| id.is_blob());
        seen
    }

    // Objects.

    pub(super) fn exists(&self, id: ObjectId) -> bool {
        match id {
            ObjectId::EMPTY_BLOB => false,
            ObjectId::INVALID => true,
            _ if id.is_blob() => self.blobs.contains(id),
            _ => self.objects.contains(id),
        }
    }

    /// New objects with this metadata, or none.
    pub(super) fn create_objects(
        &mut self,
        contents: Vec<Value>,
        now: u64,
    ) -> Result<(Vec<Created>, Effects), Error> {
        let mut draft = Draft::default();
        let mut created = Vec::with_capacity(contents.len());
        for content in contents {
            let ids = self.new_object(now);
            created.push(create::draft(&self.objects, content, ids, now, &mut draft)?);
        }
        Ok((created, self.commit(draft)))
    }

    /// A signature and an id that no object has, those included whose ids came with them.
    fn new_object(&mut self, now: u64) -> (crate::shard::ids::Signature, ObjectId) {
        loop {
            let (signature, id) = self.ids.object(now, self.objects.own);
            if !self.objects.contains(id) {
                return (signature, id);
            }
        }
    }

    fn commit(&mut self, draft: Draft) -> Effects {
        let mut effects = Effects::default();
        let ids = self.objects.commit(draft);
        self.appeared(&ids, &mut effects);
        effects
    }

    /// The tree of an object, or of a blob that is sealed.
    fn tree(&self, id: ObjectId) -> Result<Value, Broken> {
        let own = self.objects.own;
        match id {
            ObjectId::EMPTY_BLOB => Ok(blob_tree(id, own, 0)),
            // Clients ask for this one to synchronize, and expect the entry upstream has.
            ObjectId::INVALID => Ok(blob_tree(id, own, self.blobs.limit())),
            _ if id.is_blob() => match self.blobs.get(id) {
                Some(blob) if blob.is_sealed() => Ok(blob_tree(id, own, blob.size)),
                Some(_) | None => Err(Broken::Missing(id)),
            },
            _ => self.objects.tree(id),
        }
    }

    /// The trees there are, and which objects exist and have none.
    pub(super) fn get_objects(
        &self,
        ids: &[ObjectId],
    ) -> (Map<String, Value>, Vec<(ObjectId, Broken)>) {
        let mut found = Map::new();
        let mut broken = Vec::new();
        for &id in ids {
            match self.tree(id) {
                Ok(tree) => _ = found.insert(id.to_string(), tree),
                Err(Broken::Missing(missing)) if missing == id => {}
                Err(why) => broken.push((id, why)),
            }
        }
        (found, broken)
    }

    pub(super) fn list_objects(
        &self,
        pattern: &str,
        is_expression: bool,
        limit: u64,
    ) -> Map<String, Value> {
        let mut found = self
            .objects
            .list(&Pattern::new(pattern, is_expression), limit);
        let room = limit.saturating_sub(found.len() as u64);
        // Upstream asks this by wildcard whatever the pattern is.
        if room > 0 && Pattern::new(pattern, false).matches(BLOB) {
            let sealed = self.blobs.iter().filter(|(_, blob)| blob.is_sealed());
            for (id, blob) in sealed.take(usize::try_from(room).unwrap_or(usize::MAX)) {
                found.insert(id.to_string(), blob_tree(id, self.objects.own, blob.size));
            }
        }
        found
    }

    /// Deletes: the blobs of the delete set, those that never existed included.
    pub(super) fn delete(
        &mut self,
        ids: &[ObjectId],
        options: DeleteOptions,
    ) -> Result<(Vec<ObjectId>, Effects), Error> {
        let DeleteOptions {
            force,
            deep,
            trim,
            fastpath,
        } = options;
        if fastpath && !ids.iter().all(|id| id.is_blob()) {
            return Err(Error::FastpathObject);
        }
        let mut set = match fastpath {
            true => ids.to_vec(),
            false => self.objects.delete_set(ids, force, deep),
        };
        self.objects.remove(&set);
        set.retain(|id| id.is_blob());
        let mut effects = Effects::default();
        for &id in &set {
            self.free(id, trim, &mut effects);
        }
        Ok((set, effects))
    }

    /// Deletes all objects and blobs; names stay.
    pub(super) fn clear(&mut self) -> Effects {
        self.objects.clear();
        let blobs: Vec<ObjectId> = self.blobs.iter().map(|(id, _)| id).collect();
        let mut effects = Effects::default();
        for id in blobs {
            self.free(id, true, &mut effects);
        }
        effects
    }

    pub(super) fn persist(&mut self, id: ObjectId) -> Result<(), Error> {
        if id.is_blob() {
            return Err(Error::PersistBlob);
        }
        self.objects.persist(id)
    }

    pub(super) fn is_persisted(&self, id: ObjectId) -> Result<bool, Error> {
        if id.is_blob() {
            return Ok(false);
        }
        let record = self.objects.get(id).ok_or(Error::Unknown(id))?;
        Ok(!record.is_transient)
    }

    pub(super) fn label(
        &mut self,
        id: ObjectId,
        labels: Vec<(String, String)>,
    ) -> Result<(), Error> {
        if id.is_blob() {
            return Err(Error::LabelBlob);
        }
        self.objects.label(id, labels)
    }

    pub(super) fn shallow_copy(
        &mut self,
        id: ObjectId,
        extra: Map<String, Value>,
        now: u64,
    ) -> Result<(ObjectId, Effects), Error> {
        if id.is_blob() {
            return Err(Error::CopyBlob);
        }
        let (_, target) = self.new_object(now);
        let draft = self.objects.copy(id, extra, target)?;
        Ok((target, self.commit(draft)))
    }

    // Names.

    pub(super) fn put_name(&mut self, id: ObjectId, name: &str) -> Result<Effects, Error> {
        if id.is_blob() {
            return Err(Error::NameBlob);
        }
        let record = self.objects.get(id).ok_or(Error::NameUnknown(id))?;
        if record.is_transient {
            return Err(Error::NameTransient);
        }
        if name.is_empty() {
            return Err(Error::NameEmpty);
        }
        self.objects.set_name(id, Some(name));
        let mut effects = Effects::default();
        for waiter in self.names.put(name, id) {
            self.waits.remove(waiter);
            effects.wake.push((waiter, Answer::Name(id)));
        }
        Ok(effects)
    }

    pub(super) fn get_name(&self, name: &str) -> Result<ObjectId, Error> {
        self.names
            .get(name)
            .ok_or_else(|| Error::NameNotFound(name.to_owned()))
    }

    pub(super) fn list_names(
        &self,
        pattern: &str,
        is_expression: bool,
        limit: u64,
    ) -> BTreeMap<String, ObjectId> {
        self.names
            .list(&Pattern::new(pattern, is_expression), limit)
    }

    pub(super) fn drop_name(&mut self, name: &str) {
        if let Some(id) = self.names.remove(name) {
            self.objects.set_name(id, None);
        }
    }

    // Parked requests.

    /// The trees of all these, or the parked request that gets them.
    pub(super) fn wait_objects(
        &mut self,
        ids: Vec<ObjectId>,
    ) -> Result<Map<String, Value>, WaiterId> {
        match self.all(&ids) {
            Ok(trees) => Ok(trees),
            Err(blocked_on) => Err(self.waits.insert(Wait::Objects { ids, blocked_on })),
        }
    }

    /// The object of that name, or the parked request that gets it.
    pub(super) fn wait_name(&mut self, name: &str) -> Result<ObjectId, WaiterId> {
        self.names.get(name).ok_or_else(|| {
            let waiter = self.waits.insert(Wait::Name(name.to_owned()));
            self.names.wait(name, waiter);
            waiter
        })
    }

    /// Nobody waits any longer.
    pub(super) fn cancel(&mut self, waiter: WaiterId) {
        if self.streams.cancel(waiter) {
            return;
        }
        if let Some(Wait::Name(name)) = self.waits.remove(waiter) {
            self.names.cancel(&name, waiter);
        }
    }

    /// All these trees, or what is in the way.
    fn all(&self, ids: &[ObjectId]) -> Result<Map<String, Value>, ObjectId> {
        let mut found = Map::new();
        for &id in ids {
            let tree = self.tree(id).map_err(|why| match why {
                Broken::Missing(missing) => missing,
                // No object that appears will mend that.
                Broken::TooDeep | Broken::TooLarge => id,
            })?;
            found.insert(id.to_string(), tree);
        }
        Ok(found)
    }

    fn appeared(&mut self, ids: &[ObjectId], effects: &mut Effects) {
        for &id in ids {
            for (waiter, ids) in self.waits.blocked_on(id) {
                match self.all(&ids) {
                    Ok(trees) => effects.wake.push((waiter, Answer::Objects(trees))),
                    Err(blocked_on) => {
                        self.waits
                            .restore(waiter, Wait::Objects { ids, blocked_on });
                    }
                }
            }
        }
    }
}
