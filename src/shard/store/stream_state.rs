//! Streams as part of the state: their chunks are blobs and objects like others.
//!
//! `stream.rs` decides what becomes of a chunk; here it is done.

use super::{
    Answer, ConnectionId, DeleteOptions, Effects, Error, Outcome, Payload, Pulled, State, Turn,
    WaiterId,
};
use crate::shard::ids::ObjectId;

/// How a chunk that nobody needs is deleted: with what only it uses, unless others use it.
const DISCARD: DeleteOptions = DeleteOptions {
    force: false,
    deep: true,
    trim: false,
    fastpath: false,
};

impl State {
    pub(in crate::shard::store) fn create_stream(&mut self, id: ObjectId) -> Result<(), Error> {
        self.streams.create(id)
    }

    pub(in crate::shard::store) fn open_stream(
        &mut self,
        id: ObjectId,
        mode: i64,
    ) -> Result<(), Error> {
        self.streams.open(id, mode)
    }

    /// The chunk of a stream that is being written, if it is in a file and is not `whole`: it
    /// cannot be pulled yet.
    pub(in crate::shard::store) fn incomplete_chunk(
        &self,
        id: ObjectId,
        whole: Option<ObjectId>,
    ) -> Option<ObjectId> {
        let written = self.streams.writing(id)?;
        let is_incomplete = whole != Some(written) && self.unsealed_on_disk(written).is_some();
        is_incomplete.then_some(written)
    }

    /// Begins a request for a chunk of a stream. What was handed out before can be pulled.
    pub(in crate::shard::store) fn ask_chunk(
        &mut self,
        id: ObjectId,
    ) -> Result<(WaiterId, Effects), Error> {
        let mut effects = Effects::default();
        let waiter = self.waits.fresh();
        if let Some(written) = self.streams.ask(id, waiter)? {
            self.queue_written(id, written, &mut effects);
        }
        Ok((waiter, effects))
    }

    /// Whether a chunk of that size may be created now; if not, its writer waits. `most` is what
    /// chunks and all else may take together.
    pub(in crate::shard::store) fn has_room(
        &self,
        id: ObjectId,
        waiter: WaiterId,
        size: u64,
        most: u64,
    ) -> Result<bool, Error> {
        self.streams.is_asking(id, waiter)?;
        let (used, limit) = (self.blobs.used(), self.blobs.limit());
        if size > 0 && size >= most {
            // However much is pulled, there will never be room.
            return Err(Error::NotEnoughMemory { size, limit, used });
        }
        Ok(size == 0 || used.saturating_add(size) < most)
    }

    pub(in crate::shard::store) fn hand_out(
        &mut self,
        id: ObjectId,
        waiter: WaiterId,
        blob: &Payload,
    ) -> Result<(), Error> {
        self.streams.hand_out(id, waiter, blob.id)
    }

    pub(in crate::shard::store) fn push_chunk(
        &mut self,
        id: ObjectId,
        chunk: ObjectId,
    ) -> Result<Effects, Error> {
        let outcome = self.streams.push(id, chunk)?;
        let mut effects = Effects::default();
        self.perform(outcome, &mut effects);
        Ok(effects)
    }

    /// A chunk, or the parked request that gets it, or why there is none. What the reader had
    /// before is gone in any of these cases.
    pub(in crate::shard::store) fn pull_chunk(
        &mut self,
        connection: ConnectionId,
        id: ObjectId,
    ) -> (Result<Result<ObjectId, WaiterId>, Error>, Effects) {
        let mut effects = Effects::default();
        let waiter = self.waits.fresh();
        match self.streams.pull(id, connection, waiter) {
            Err(err) => (Err(err), effects),
            Ok((pulled, outcome)) => {
                self.perform(outcome, &mut effects);
                let pulled = pulled.map(|pulled| match pulled {
                    Pulled::Chunk(chunk) => Ok(chunk),
                    Pulled::Parked => Err(waiter),
                });
                (pulled, effects)
            }
        }
    }

    pub(in crate::shard::store) fn stop_stream(
        &mut self,
        id: ObjectId,
        failed: bool,
    ) -> Result<Effects, Error> {
        let mut effects = Effects::default();
        if let Some(written) = self.streams.stopping(id)? {
            self.queue_written(id, written, &mut effects);
        }
        let outcome = self.streams.stop(id, failed);
        self.perform(outcome, &mut effects);
        Ok(effects)
    }

    pub(in crate::shard::store) fn drop_stream(&mut self, id: ObjectId) -> Result<Effects, Error> {
        let outcome = self.streams.drop(id)?;
        let mut effects = Effects::default();
        self.perform(outcome, &mut effects);
        Ok(effects)
    }

    pub(super) fn leave_streams(&mut self, connection: ConnectionId, effects: &mut Effects) {
        let outcome = self.streams.disconnect(connection);
        self.perform(outcome, effects);
    }

    /// Memory has become free: writers look whether it is enough for them.
    pub(super) fn wake_writers(&self, effects: &mut Effects) {
        for waiter in self.streams.writers() {
            effects.wake.push((waiter, Answer::Stream(Turn::Again)));
        }
    }

    /// What was handed out is written. If it has been deleted meanwhile, there is no such chunk.
    fn queue_written(&mut self, id: ObjectId, blob: ObjectId, effects: &mut Effects) {
        if blob != ObjectId::EMPTY_BLOB {
            let Some(writer) = self.blobs.seal(blob) else {
                return;
            };
            if let Some(writer) = writer {
                self.leases.settled(writer, blob);
                self.appeared(&[blob], effects);
            }
        }
        let outcome = self.streams.queue(id, blob);
        self.perform(outcome, effects);
    }

    fn perform(&mut self, outcome: Outcome, effects: &mut Effects) {
        let Outcome { wake, discard } = outcome;
        let answers = wake
            .into_iter()
            .map(|(waiter, turn)| (waiter, Answer::Stream(turn)));
        effects.wake.extend(answers);
        // Without `fastpath` there is nothing to refuse.
        if let Ok((_, deleted)) = self.delete(&discard, DISCARD) {
            effects.extend(deleted);
        }
    }
}
