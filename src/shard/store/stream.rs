//! Streams: queues of chunks between a writer and a reader, one of each at a time.
//!
//! Nothing here knows blobs. A transition says what becomes of chunks and of parked requests
//! ([`Outcome`]); sealing, freeing and answering is for others.
//!
//! A chunk is handed out to be written, queued once it is sealed, pulled, and deleted when its
//! reader pulls the next one or goes. A stream goes with the connection that pulled from it; a
//! writer that goes leaves the stream to the next writer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::error::Error;
use super::lease::ConnectionId;
use super::wait::WaiterId;
use crate::shard::ids::ObjectId;

/// What a parked request of a stream gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The reader: its chunk, or why there is none.
    Chunk(Result<ObjectId, Error>),
    /// The writer: look again whether there is room, and a stream.
    Again,
}

/// What is to be done after a transition.
#[must_use = "what a transition entails must be performed"]
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Answer these.
    pub(super) wake: Vec<(WaiterId, Turn)>,
    /// Delete these: nobody can pull them any more, or their reader is done with them.
    pub(super) discard: Vec<ObjectId>,
}

/// What a pull found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pulled {
    Chunk(ObjectId),
    /// The request is parked.
    Parked,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Course {
    #[default]
    Running,
    Drained,
    Failed,
}

#[derive(Debug, Default)]
struct Stream {
    course: Course,
    /// Bits of the modes that it has been opened in.
    opened: i64,
    /// Chunks that nobody has pulled yet.
    queue: VecDeque<ObjectId>,
    /// The blob that a writer fills.
    writing: Option<ObjectId>,
    /// The chunk that a reader has, until it pulls the next one.
    reading: Option<(ConnectionId, ObjectId)>,
    /// A pull that waits for a chunk.
    reader: Option<(ConnectionId, WaiterId)>,
    /// A request for a chunk that waits for room, or is being granted.
    writer: Option<WaiterId>,
}

/// What a connection has pulled.
#[derive(Debug, Default)]
struct Reader {
    streams: BTreeSet<ObjectId>,
    /// Chunks it has of streams that are no more.
    left: Vec<ObjectId>,
}

/// All streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: BTreeMap<ObjectId, Stream>,
    readers: BTreeMap<ConnectionId, Reader>,
    /// Which stream a request is parked at.
    parked: BTreeMap<WaiterId, ObjectId>,
    /// Those of them that ask for a chunk to write.
    asking: BTreeSet<WaiterId>,
}

impl Stream {
    fn is_running(&self) -> Result<(), Error> {
        match self.course {
            Course::Running => Ok(()),
            Course::Drained | Course::Failed => Err(Error::StreamNotRunning),
        }
    }

    /// What a pull gets, if it gets anything.
    fn next(&mut self) -> Option<Result<ObjectId, Error>> {
        if let Some(chunk) = self.queue.pop_front() {
            return Some(Ok(chunk));
        }
        match self.course {
            Course::Running => None,
            Course::Drained => Some(Err(Error::StreamDrained)),
            Course::Failed => Some(Err(Error::StreamFailed)),
        }
    }
}

impl Streams {
    pub(super) fn create(&mut self, id: ObjectId) -> Result<(), Error> {
        if self.streams.contains_key(&id) {
            return Err(Error::StreamExists(id));
        }
        self.streams.insert(id, Stream::default());
        Ok(())
    }

    /// Opens for the modes whose bits are set; each can be opened once.
    pub(super) fn open(&mut self, id: ObjectId, mode: i64) -> Result<(), Error> {
        let stream = self.streams.get_mut(&id);
        let stream = stream.ok_or(Error::StreamOpenUnknown(id))?;
        if stream.opened & mode != 0 {
            return Err(Error::StreamOpened);
        }
        stream.opened |= mode;
        Ok(())
    }

    /// Begins a request for a chunk to write. It is the writer until [`Self::hand_out`] or
    /// [`Self::cancel`]. The blob that was handed out before, to be sealed and queued.
    pub(super) fn ask(
        &mut self,
        id: ObjectId,
        waiter: WaiterId,
    ) -> Result<Option<ObjectId>, Error> {
        let stream = self.streams.get_mut(&id);
        let stream = stream.ok_or(Error::StreamAllocateUnknown)?;
        if stream.writer.is_some() {
            return Err(Error::StreamHasWriter);
        }
        stream.is_running()?;
        stream.writer = Some(waiter);
        self.parked.insert(waiter, id);
        self.asking.insert(waiter);
        Ok(stream.writing.take())
    }

    /// The blob that a writer fills.
    pub(super) fn writing(&self, id: ObjectId) -> Option<ObjectId> {
        self.streams.get(&id)?.writing
    }

    /// Whether a request for a chunk still stands.
    pub(super) fn is_asking(&self, id: ObjectId, waiter: WaiterId) -> Result<(), Error> {
        // If not, the stream has been dropped, whatever has that id now.
        let stream = self.streams.get(&id);
        let asked = stream.filter(|stream| stream.writer == Some(waiter));
        asked.ok_or(Error::StreamFailed)?.is_running()
    }

    /// Grants a request for a chunk.
    pub(super) fn hand_out(
        &mut self,
        id: ObjectId,
        waiter: WaiterId,
        blob: ObjectId,
    ) -> Result<(), Error> {
        self.is_asking(id, waiter)?;
        self.forget(waiter);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.writer = None;
            stream.writing = Some(blob);
        }
        Ok(())
    }

    /// A chunk that can be pulled, whatever it is and whether or not it exists.
    pub(super) fn push(&mut self, id: ObjectId, chunk: ObjectId) -> Result<Outcome, Error> {
        let stream = self.streams.get(&id).ok_or(Error::StreamPushUnknown)?;
        stream.is_running()?;
        Ok(self.queue(id, chunk))
    }

    /// A chunk that can be pulled, even of a stream that has stopped in the meantime.
    pub(super) fn queue(&mut self, id: ObjectId, chunk: ObjectId) -> Outcome {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.queue.push_back(chunk);
        }
        self.deliver(id)
    }

    /// Gives the parked reader what there is.
    fn deliver(&mut self, id: ObjectId) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(stream) = self.streams.get_mut(&id) else {
            return outcome;
        };
        let Some((connection, waiter)) = stream.reader else {
            return outcome;
        };
        if let Some(next) = stream.next() {
            stream.reader = None;
            if let Ok(chunk) = next {
                stream.reading = Some((connection, chunk));
            }
            self.forget(waiter);
            outcome.wake.push((waiter, Turn::Chunk(next)));
        }
        outcome
    }

    /// Pulls a chunk. The reader is done with the one before, and its connection is remembered.
    pub(super) fn pull(
        &mut self,
        id: ObjectId,
        connection: ConnectionId,
        waiter: WaiterId,
    ) -> Result<(Result<Pulled, Error>, Outcome), Error> {
        let stream = self.streams.get_mut(&id);
        let stream = stream.ok_or(Error::StreamPullUnknown)?;
        if stream.reader.is_some() {
            return Err(Error::StreamHasReader);
        }
        let mut outcome = Outcome::default();
        outcome
            .discard
            .extend(stream.reading.take().map(|(_, chunk)| chunk));
        let reader = self.readers.entry(connection).or_default();
        reader.streams.insert(id);
        let pulled = match stream.next() {
            Some(Ok(chunk)) => {
                stream.reading = Some((connection, chunk));
                Ok(Pulled::Chunk(chunk))
            }
            Some(Err(err)) => Err(err),
            None => {
                stream.reader = Some((connection, waiter));
                self.parked.insert(waiter, id);
                Ok(Pulled::Parked)
            }
        };
        Ok((pulled, outcome))
    }

    /// Whether [`Self::stop`] may be; the blob that is then to be sealed and queued before.
    pub(super) fn stopping(&mut self, id: ObjectId) -> Result<Option<ObjectId>, Error> {
        let stream = self.streams.get_mut(&id);
        let stream = stream.ok_or(Error::StreamStopUnknown(id))?;
        if stream.is_running().is_err() {
            return Err(Error::StreamStopped);
        }
        if stream.writer.is_some() {
            return Err(Error::StreamHasWriter);
        }
        Ok(stream.writing.take())
    }

    /// No more chunks come, as planned or not. What is queued can still be pulled.
    pub(super) fn stop(&mut self, id: ObjectId, failed: bool) -> Outcome {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.course = match failed {
                true => Course::Failed,
                false => Course::Drained,
            };
        }
        self.deliver(id)
    }

    /// Forgets a stream, with all chunks that nobody has.
    pub(super) fn drop(&mut self, id: ObjectId) -> Result<Outcome, Error> {
        let stream = self.streams.remove(&id);
        let stream = stream.ok_or(Error::StreamDropUnknown(id))?;
        let mut outcome = Outcome::default();
        if let Some((_, reader)) = stream.reader {
            let turn = Turn::Chunk(Err(Error::StreamFailed));
            outcome.wake.push((reader, turn));
        }
        if let Some(writer) = stream.writer {
            outcome.wake.push((writer, Turn::Again));
        }
        for &(waiter, _) in &outcome.wake {
            self.forget(waiter);
        }
        outcome.discard.extend(stream.queue);
        outcome.discard.extend(stream.writing);
        if let Some((connection, chunk)) = stream.reading
            && let Some(reader) = self.readers.get_mut(&connection)
        {
            // Its reader has it still, and deletes it by going.
            reader.left.push(chunk);
        }
        for reader in self.readers.values_mut() {
            reader.streams.remove(&id);
        }
        Ok(outcome)
    }

    /// Nobody waits any longer. Whether the request was one of a stream's.
    pub(super) fn cancel(&mut self, waiter: WaiterId) -> bool {
        let Some(id) = self.forget(waiter) else {
            return false;
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.writer == Some(waiter) {
                stream.writer = None;
            }
            if stream.reader.is_some_and(|(_, reader)| reader == waiter) {
                stream.reader = None;
            }
        }
        true
    }

    /// A connection ends, and with it the streams that it has pulled from.
    pub(super) fn disconnect(&mut self, connection: ConnectionId) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(reader) = self.readers.get_mut(&connection) else {
            return outcome;
        };
        for id in std::mem::take(&mut reader.streams) {
            if let Ok(dropped) = self.drop(id) {
                outcome.wake.extend(dropped.wake);
                outcome.discard.extend(dropped.discard);
            }
        }
        let reader = self.readers.remove(&connection).unwrap_or_default();
        outcome.discard.extend(reader.left);
        outcome
    }

    /// The requests for a chunk there are, to look again when memory has become free.
    pub(super) fn writers(&self) -> impl Iterator<Item = WaiterId> {
        self.asking.iter().copied()
    }

    fn forget(&mut self, waiter: WaiterId) -> Option<ObjectId> {
        self.asking.remove(&waiter);
        self.parked.remove(&waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: ObjectId = ObjectId(5);

    fn streams() -> Streams {
        let mut streams = Streams::default();
        streams.create(STREAM).unwrap();
        streams
    }

    fn chunk(id: u64) -> ObjectId {
        ObjectId(1 << 63 | id)
    }

    #[test]
    fn a_parked_reader_gets_the_chunk_and_only_that() {
        let mut streams = streams();
        let (pulled, outcome) = streams.pull(STREAM, 1, 10).unwrap();
        assert_eq!((pulled, outcome), (Ok(Pulled::Parked), Outcome::default()));
        let outcome = streams.push(STREAM, chunk(1)).unwrap();
        assert_eq!(outcome.wake, [(10, Turn::Chunk(Ok(chunk(1))))]);
        assert_eq!(streams.push(STREAM, chunk(2)), Ok(Outcome::default()));
        let (pulled, outcome) = streams.pull(STREAM, 1, 11).unwrap();
        assert_eq!(pulled, Ok(Pulled::Chunk(chunk(2))));
        assert_eq!(outcome.discard, [chunk(1)], "its reader is done with it");
    }

    #[test]
    fn a_cancelled_reader_takes_no_chunk() {
        let mut streams = streams();
        _ = streams.pull(STREAM, 1, 10).unwrap();
        assert!(streams.cancel(10) && !streams.cancel(10));
        assert_eq!(streams.push(STREAM, chunk(1)), Ok(Outcome::default()));
        let (pulled, _) = streams.pull(STREAM, 2, 11).unwrap();
        assert_eq!(pulled, Ok(Pulled::Chunk(chunk(1))));
    }

    #[test]
    fn a_request_for_room_stands_until_it_is_granted_or_its_stream_ends() {
        let mut streams = streams();
        assert_eq!(streams.ask(STREAM, 10), Ok(None));
        assert_eq!(streams.ask(STREAM, 11), Err(Error::StreamHasWriter));
        assert_eq!(streams.writers().collect::<Vec<_>>(), [10]);
        streams.hand_out(STREAM, 10, chunk(1)).unwrap();
        assert_eq!(streams.ask(STREAM, 12), Ok(Some(chunk(1))));
        _ = streams.drop(STREAM).unwrap();
        streams.create(STREAM).unwrap();
        // Another stream under the same id is not the one it asked.
        assert_eq!(
            streams.hand_out(STREAM, 12, chunk(2)),
            Err(Error::StreamFailed)
        );
        assert_eq!(streams.writers().count(), 0);
    }

    #[test]
    fn a_dropped_stream_leaves_its_readers_chunk_until_the_reader_goes() {
        let mut streams = streams();
        for id in 1..4 {
            _ = streams.push(STREAM, chunk(id)).unwrap();
        }
        _ = streams.pull(STREAM, 1, 10).unwrap();
        let outcome = streams.drop(STREAM).unwrap();
        assert_eq!(outcome.discard, [chunk(2), chunk(3)]);
        assert_eq!(streams.disconnect(1).discard, [chunk(1)]);
        assert_eq!(streams.disconnect(1), Outcome::default());
    }

    #[test]
    fn what_is_queued_is_read_even_after_a_failure() {
        let mut streams = streams();
        _ = streams.push(STREAM, chunk(1)).unwrap();
        assert_eq!(streams.stopping(STREAM), Ok(None));
        assert_eq!(streams.stop(STREAM, true), Outcome::default());
        assert_eq!(streams.stopping(STREAM), Err(Error::StreamStopped));
        let (pulled, _) = streams.pull(STREAM, 1, 10).unwrap();
        assert_eq!(pulled, Ok(Pulled::Chunk(chunk(1))));
        let (pulled, _) = streams.pull(STREAM, 1, 10).unwrap();
        assert_eq!(pulled, Err(Error::StreamFailed));
    }
}
