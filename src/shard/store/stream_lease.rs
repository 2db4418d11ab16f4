//! Streams as a connection uses them: who waits, waits here.

use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::error::Error;
use super::shared::{Guarded, Parked};
use super::state::Answer;
use super::stream::Turn;
use super::{Lease, Payload, Store};
use crate::shard::ids::ObjectId;

/// Per cent of memory at which writers of streams wait, unless said otherwise.
pub(super) const THRESHOLD: u32 = 80;

impl Store {
    /// Writers of streams wait while memory in use, with what they ask for, is this many per cent
    /// of the limit or more.
    pub fn set_stream_threshold(&self, percent: u32) {
        let threshold = &self.shared.stream_threshold;
        threshold.store(percent, Ordering::Relaxed);
    }

    fn most_for_streams(&self) -> u64 {
        let percent = self.shared.stream_threshold.load(Ordering::Relaxed);
        let most = u128::from(self.config().memory_limit) * u128::from(percent) / 100;
        u64::try_from(most).unwrap_or(u64::MAX)
    }

    /// A new stream of that id.
    pub fn create_stream(&self, id: ObjectId) -> Result<(), Error> {
        self.shared.lock().state.create_stream(id)
    }

    /// Opens a stream to read (1) or to write (2); each may be once.
    pub fn open_stream(&self, id: ObjectId, mode: i64) -> Result<(), Error> {
        self.shared.lock().state.open_stream(id, mode)
    }

    /// Adds an object or a blob to a stream.
    pub fn push_chunk(&self, id: ObjectId, chunk: ObjectId) -> Result<(), Error> {
        self.shared
            .try_change(|state| Ok(((), state.push_chunk(id, chunk)?)))
    }

    /// Seals and adds the chunk that is being written; no more will come.
    pub fn stop_stream(&self, id: ObjectId, failed: bool) -> Result<(), Error> {
        self.shared
            .try_change(|state| Ok(((), state.stop_stream(id, failed)?)))
    }

    /// Ends a stream and deletes the chunks that nobody has pulled.
    pub fn drop_stream(&self, id: ObjectId) -> Result<(), Error> {
        self.shared
            .try_change(|state| Ok(((), state.drop_stream(id)?)))
    }
}

impl Lease {
    /// A new, unsealed blob to write into as a chunk, once there is room. The one before is
    /// sealed and can be pulled. Dropping the future ends the wait.
    pub async fn next_chunk(&self, stream: ObjectId, size: u64) -> Result<Payload, Error> {
        let shared = &self.store.shared;
        let waiter = shared.try_change(|state| state.ask_chunk(stream))?;
        let _asking = Parked { shared, waiter };
        loop {
            let more = {
                let most = self.store.most_for_streams();
                let mut guarded = shared.lock();
                let has_room = guarded.state.has_room(stream, waiter, size, most)?;
                (!has_room).then(|| park(&mut guarded, waiter))
            };
            let Some(more) = more else {
                break;
            };
            // However it ends, the next look tells.
            _ = more.await;
        }
        let blob = self.create_blob(size)?;
        let handed_out = shared.lock().state.hand_out(stream, waiter, &blob);
        if let Err(err) = handed_out {
            // The stream has ended in between. The blob may have been deleted, too.
            drop(self.drop_blob(blob.id));
            return Err(err);
        }
        Ok(blob)
    }

    /// The next chunk of a stream, once there is one. The one that was pulled before is deleted.
    /// Dropping the future ends the wait.
    pub async fn pull_chunk(&self, stream: ObjectId) -> Result<ObjectId, Error> {
        let shared = &self.store.shared;
        let pulled = shared.change_guarded(|guarded| {
            let (pulled, effects) = guarded.state.pull_chunk(self.connection, stream);
            let pulled = pulled.map(|pulled| {
                pulled.map_err(|waiter| {
                    let receiver = park(guarded, waiter);
                    (Parked { shared, waiter }, receiver)
                })
            });
            (pulled, effects)
        });
        match pulled? {
            Ok(chunk) => Ok(chunk),
            Err((_parked, receiver)) => match receiver.await {
                Ok(Answer::Stream(Turn::Chunk(chunk))) => chunk,
                _ => Err(Error::StreamPullUnknown),
            },
        }
    }
}

fn park(guarded: &mut Guarded, waiter: super::WaiterId) -> oneshot::Receiver<Answer> {
    let (sender, receiver) = oneshot::channel();
    guarded.parked.insert(waiter, sender);
    receiver
}
