//! Streams as a connection uses them: who waits, waits here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::error::Error;
use super::shared::{Guarded, Parked, Shared};
use super::state::{Answer, Effects, State};
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
            .change_written(id, |state| Ok(((), state.stop_stream(id, failed)?)))
    }

    /// Ends a stream and deletes the chunks that nobody has pulled.
    pub fn drop_stream(&self, id: ObjectId) -> Result<(), Error> {
        self.shared
            .try_change(|state| Ok(((), state.drop_stream(id)?)))
    }
}

impl Shared {
    /// Makes a change by which the chunk that is being written can be pulled. In a file it has to
    /// be a whole before.
    fn change_written<T>(
        &self,
        stream: ObjectId,
        mut change: impl FnMut(&mut State) -> Result<(T, Effects), Error>,
    ) -> Result<T, Error> {
        let mut whole = None;
        loop {
            let changed = self.try_change(|state| match state.incomplete_chunk(stream, whole) {
                Some(blob) => Ok((Err(blob), Effects::default())),
                None => change(state).map(|(value, effects)| (Ok(value), effects)),
            })?;
            match changed {
                Ok(value) => return Ok(value),
                Err(blob) => {
                    let completed = self.complete(blob);
                    if self.lock().state.exists(blob) {
                        completed?;
                    }
                    whole = Some(blob);
                }
            }
        }
    }
}

/// A request for a chunk to write. It ends with this.
#[derive(Debug)]
pub struct ChunkRequest {
    store: Store,
    parked: Parked,
    stream: ObjectId,
    size: u64,
}

impl ChunkRequest {
    /// Bytes that are asked for.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Waits until there is room.
    pub async fn has_room(&self) -> Result<(), Error> {
        let waiter = self.parked.waiter;
        loop {
            let more = {
                let most = self.store.most_for_streams();
                let mut guarded = self.store.shared.lock();
                let state = &guarded.state;
                if state.has_room(self.stream, waiter, self.size, most)? {
                    return Ok(());
                }
                park(&mut guarded, waiter)
            };
            // However it ends, the next look tells.
            _ = more.await;
        }
    }
}

/// A request for the next chunk of a stream. It ends with this.
#[derive(Debug)]
pub struct Pull(Result<ObjectId, (Parked, oneshot::Receiver<Answer>)>);

impl Pull {
    /// The chunk, once there is one.
    pub async fn over(self) -> Result<ObjectId, Error> {
        match self.0 {
            Ok(chunk) => Ok(chunk),
            Err((_parked, receiver)) => match receiver.await {
                Ok(Answer::Stream(Turn::Chunk(chunk))) => chunk,
                _ => Err(Error::StreamPullUnknown),
            },
        }
    }
}

impl Lease {
    /// Asks for a new blob to write into as a chunk; see [`Self::next_chunk`]. The one before is
    /// sealed and can be pulled.
    pub fn ask_chunk(&self, stream: ObjectId, size: u64) -> Result<ChunkRequest, Error> {
        let store = self.store.clone();
        let ask = |state: &mut State| state.ask_chunk(stream);
        let waiter = store.shared.change_written(stream, ask)?;
        let parked = Parked {
            shared: Arc::clone(&store.shared),
            waiter,
        };
        Ok(ChunkRequest {
            store,
            parked,
            stream,
            size,
        })
    }

    /// The unsealed blob that was asked for, when [`ChunkRequest::has_room`] is over.
    pub fn next_chunk(&self, request: &ChunkRequest) -> Result<Payload, Error> {
        let shared = &self.store.shared;
        let blob = self.create_blob(request.size)?;
        let (stream, waiter) = (request.stream, request.parked.waiter);
        let handed_out = shared.lock().state.hand_out(stream, waiter, &blob);
        if let Err(err) = handed_out {
            // The stream has ended in between. The blob may have been deleted, too.
            drop(self.drop_blob(blob.id));
            return Err(err);
        }
        Ok(blob)
    }

    /// Asks for the next chunk of a stream. The one that was pulled before is deleted.
    pub fn pull_chunk(&self, stream: ObjectId) -> Result<Pull, Error> {
        let shared = &self.store.shared;
        let pulled = shared.change_guarded(|guarded| {
            let (pulled, effects) = guarded.state.pull_chunk(self.connection, stream);
            let pulled = pulled.map(|pulled| {
                pulled.map_err(|waiter| {
                    let receiver = park(guarded, waiter);
                    let shared = Arc::clone(shared);
                    (Parked { shared, waiter }, receiver)
                })
            });
            (pulled, effects)
        });
        pulled.map(Pull)
    }
}

fn park(guarded: &mut Guarded, waiter: super::WaiterId) -> oneshot::Receiver<Answer> {
    let (sender, receiver) = oneshot::channel();
    guarded.parked.insert(waiter, sender);
    receiver
}
