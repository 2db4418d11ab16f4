//! Random operations on streams agree with a model that is too simple to be wrong.
//!
//! Several connections write, read, wait and vanish. After every step all that can be answered is
//! answered, nothing else is, and the memory in use is that of the chunks there are, to the byte.

#![allow(clippy::unwrap_used)]

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;
use vinelet::shard::ids::ObjectId;
use vinelet::shard::store::{Config, Error, Lease, Payload, Region, Store, Transport};

const LIMIT: u64 = 1000;
/// Writers wait from here on.
const MOST: u64 = 500;
const CONNECTIONS: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    Create(u64),
    Open(u64, i64),
    Ask(usize, u64, u64),
    Push(usize, u64, u64),
    Pull(usize, u64),
    Stop(u64, bool),
    Drop(u64),
    /// The client of a request that waits gives up.
    Cancel(usize),
    Disconnect(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let conn = || 0..CONNECTIONS;
    let stream = || 1..4_u64;
    let size = || prop_oneof![1 => Just(0), 10 => 1..300_u64, 1 => Just(MOST)];
    prop_oneof![
        4 => stream().prop_map(Op::Create),
        2 => (stream(), 1..4_i64).prop_map(|(s, m)| Op::Open(s, m)),
        10 => (conn(), stream(), size()).prop_map(|(c, s, z)| Op::Ask(c, s, z)),
        3 => (conn(), stream(), 1..100_u64).prop_map(|(c, s, z)| Op::Push(c, s, z)),
        10 => (conn(), stream()).prop_map(|(c, s)| Op::Pull(c, s)),
        2 => (stream(), any::<bool>()).prop_map(|(s, f)| Op::Stop(s, f)),
        1 => stream().prop_map(Op::Drop),
        2 => conn().prop_map(Op::Cancel),
        2 => conn().prop_map(Op::Disconnect),
        1 => Just(Op::Clear),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Wants {
    Room(u64, u64),
    Chunk(u64),
}

#[derive(Debug, PartialEq)]
enum Got {
    Room(Result<Payload, Error>),
    Chunk(Result<ObjectId, Error>),
}

#[derive(Default)]
struct Stream {
    opened: i64,
    stopped: Option<bool>,
    queue: VecDeque<ObjectId>,
    writing: Option<ObjectId>,
    reading: Option<(usize, ObjectId)>,
    readers: BTreeSet<usize>,
}

type Waiting = Pin<Box<dyn Future<Output = Got>>>;

struct World {
    store: Store,
    leases: Vec<Arc<Lease>>,
    pending: Vec<Option<(Wants, Waiting)>>,
    streams: BTreeMap<u64, Stream>,
    /// Size, and who has not sealed it.
    blobs: BTreeMap<ObjectId, (u64, Option<usize>)>,
    /// Chunks of streams that are gone, and who has pulled them.
    left: Vec<(usize, ObjectId)>,
}

fn poll(waiting: &mut Waiting) -> Option<Got> {
    match waiting
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(got) => Some(got),
        Poll::Pending => None,
    }
}

async fn next_chunk(lease: &Lease, stream: ObjectId, size: u64) -> Result<Payload, Error> {
    let request = lease.ask_chunk(stream, size)?;
    request.has_room().await?;
    lease.next_chunk(&request)
}

impl World {
    fn new() -> Self {
        let store = Store::open(Config {
            memory_limit: LIMIT,
            arena_dir: None,
            reserve_memory: false,
            deployment: "local".into(),
            hostname: "host".into(),
            nodename: "node".into(),
            ipc_socket: "/s".into(),
            rpc_endpoint: "0.0.0.0:0".into(),
        })
        .unwrap();
        store.set_stream_threshold(50);
        let connect = |_| Arc::new(store.connect(Transport::Ipc));
        Self {
            leases: (0..CONNECTIONS).map(connect).collect(),
            pending: (0..CONNECTIONS).map(|_| None).collect(),
            store,
            streams: BTreeMap::new(),
            blobs: BTreeMap::new(),
            left: Vec::new(),
        }
    }

    fn used(&self) -> u64 {
        self.blobs.values().map(|(size, _)| size).sum()
    }

    fn waits(&self, wants: impl Fn(Wants) -> bool) -> bool {
        self.pending.iter().flatten().any(|&(w, _)| wants(w))
    }

    fn has_writer(&self, id: u64) -> bool {
        self.waits(|wants| matches!(wants, Wants::Room(s, _) if s == id))
    }

    fn has_reader(&self, id: u64) -> bool {
        self.waits(|wants| wants == Wants::Chunk(id))
    }

    /// The chunk that was handed out is sealed, if it is still there.
    fn seal(&mut self, id: u64) {
        let stream = self.streams.get_mut(&id).unwrap();
        if let Some(blob) = stream.writing.take() {
            if let Some((_, writer)) = self.blobs.get_mut(&blob) {
                *writer = None;
                stream.queue.push_back(blob);
            } else if blob == ObjectId::EMPTY_BLOB {
                stream.queue.push_back(blob);
            }
        }
    }

    fn begin(&mut self, connection: usize, wants: Wants) {
        if self.pending[connection].is_some() {
            // A connection says nothing more while it waits.
            return;
        }
        let refused = match wants {
            Wants::Room(id, _) => match self.streams.get(&id) {
                None => Some(Got::Room(Err(Error::StreamAllocateUnknown))),
                Some(_) if self.has_writer(id) => Some(Got::Room(Err(Error::StreamHasWriter))),
                Some(stream) if stream.stopped.is_some() => {
                    Some(Got::Room(Err(Error::StreamNotRunning)))
                }
                Some(_) => {
                    self.seal(id);
                    None
                }
            },
            Wants::Chunk(id) => match self.streams.get(&id) {
                None => Some(Got::Chunk(Err(Error::StreamPullUnknown))),
                Some(_) if self.has_reader(id) => Some(Got::Chunk(Err(Error::StreamHasReader))),
                Some(_) => {
                    let stream = self.streams.get_mut(&id).unwrap();
                    stream.readers.insert(connection);
                    if let Some((_, chunk)) = stream.reading.take() {
                        self.blobs.remove(&chunk);
                    }
                    None
                }
            },
        };
        let lease = Arc::clone(&self.leases[connection]);
        let mut waiting: Waiting = Box::pin(async move {
            match wants {
                Wants::Room(id, size) => Got::Room(next_chunk(&lease, ObjectId(id), size).await),
                Wants::Chunk(id) => Got::Chunk(match lease.pull_chunk(ObjectId(id)) {
                    Ok(pull) => pull.over().await,
                    Err(err) => Err(err),
                }),
            }
        });
        if let Some(refused) = refused {
            assert_eq!(poll(&mut waiting), Some(refused));
            return;
        }
        self.pending[connection] = Some((wants, waiting));
        self.turn(connection);
    }

    /// What a request gets now, if anything; of a chunk to write only its size counts.
    fn expected(&mut self, wants: Wants) -> Option<Got> {
        let (used, limit) = (self.used(), LIMIT);
        match wants {
            Wants::Room(id, _) if !self.streams.contains_key(&id) => {
                Some(Got::Room(Err(Error::StreamFailed)))
            }
            Wants::Room(_, size) if size >= MOST => {
                Some(Got::Room(Err(Error::NotEnoughMemory { size, limit, used })))
            }
            Wants::Room(_, size) => {
                (size == 0 || used + size < MOST).then_some(Got::Room(Ok(Payload {
                    id: ObjectId::EMPTY_BLOB,
                    offset: 0,
                    size,
                    is_sealed: false,
                    region: Region::Arena,
                })))
            }
            Wants::Chunk(id) => {
                let Some(stream) = self.streams.get_mut(&id) else {
                    return Some(Got::Chunk(Err(Error::StreamFailed)));
                };
                match (stream.queue.pop_front(), stream.stopped) {
                    (Some(chunk), _) => Some(Got::Chunk(Ok(chunk))),
                    (None, Some(false)) => Some(Got::Chunk(Err(Error::StreamDrained))),
                    (None, Some(true)) => Some(Got::Chunk(Err(Error::StreamFailed))),
                    (None, None) => None,
                }
            }
        }
    }

    /// Looks whether the request of a connection is answered as it has to be; whether it is.
    fn turn(&mut self, connection: usize) -> bool {
        let Some((wants, mut waiting)) = self.pending[connection].take() else {
            return false;
        };
        let Some(expected) = self.expected(wants) else {
            assert_eq!(poll(&mut waiting), None, "{wants:?}");
            self.pending[connection] = Some((wants, waiting));
            return false;
        };
        match (poll(&mut waiting), wants) {
            (Some(Got::Room(Ok(blob))), Wants::Room(id, size)) => {
                assert!(matches!(expected, Got::Room(Ok(_))), "{blob:?}");
                assert_eq!((blob.size, blob.is_sealed), (size, false));
                self.streams.get_mut(&id).unwrap().writing = Some(blob.id);
                if size > 0 {
                    self.blobs.insert(blob.id, (size, Some(connection)));
                }
            }
            (got, _) => {
                assert_eq!(got, Some(expected), "{wants:?}");
                if let (Some(Got::Chunk(Ok(chunk))), Wants::Chunk(id)) = (got, wants) {
                    self.streams.get_mut(&id).unwrap().reading = Some((connection, chunk));
                }
            }
        }
        true
    }

    fn end_stream(&mut self, id: u64) {
        let stream = self.streams.remove(&id).unwrap();
        for chunk in stream.queue.into_iter().chain(stream.writing) {
            self.blobs.remove(&chunk);
        }
        self.left.extend(stream.reading);
    }

    fn push(&mut self, connection: usize, id: u64, size: u64) {
        if self.used() + size > LIMIT || self.pending[connection].is_some() {
            return;
        }
        let blob = self.leases[connection].create_blob(size).unwrap();
        self.leases[connection].seal(blob.id).unwrap();
        self.blobs.insert(blob.id, (size, None));
        let result = self.store.push_chunk(ObjectId(id), blob.id);
        let expected = match self.streams.get_mut(&id) {
            None => Err(Error::StreamPushUnknown),
            Some(stream) if stream.stopped.is_some() => Err(Error::StreamNotRunning),
            Some(stream) => {
                stream.queue.push_back(blob.id);
                Ok(())
            }
        };
        assert_eq!(result, expected);
    }

    fn disconnect(&mut self, connection: usize) {
        self.pending[connection] = None;
        self.leases[connection] = Arc::new(self.store.connect(Transport::Ipc));
        self.blobs
            .retain(|_, (_, writer)| *writer != Some(connection));
        let pulled =
            |(&id, stream): (&u64, &Stream)| stream.readers.contains(&connection).then_some(id);
        let pulled: Vec<u64> = self.streams.iter().filter_map(pulled).collect();
        for id in pulled {
            self.end_stream(id);
        }
        let (gone, left) = self.left.iter().partition(|(by, _)| *by == connection);
        self.left = left;
        for (_, chunk) in gone {
            self.blobs.remove(&chunk);
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Create(id) => {
                let result = self.store.create_stream(ObjectId(id));
                let expected = match self.streams.entry(id) {
                    Entry::Occupied(_) => Err(Error::StreamExists(ObjectId(id))),
                    Entry::Vacant(free) => {
                        free.insert(Stream::default());
                        Ok(())
                    }
                };
                assert_eq!(result, expected);
            }
            Op::Open(id, mode) => {
                let result = self.store.open_stream(ObjectId(id), mode);
                let expected = match self.streams.get_mut(&id) {
                    None => Err(Error::StreamOpenUnknown(ObjectId(id))),
                    Some(stream) if stream.opened & mode != 0 => Err(Error::StreamOpened),
                    Some(stream) => {
                        stream.opened |= mode;
                        Ok(())
                    }
                };
                assert_eq!(result, expected);
            }
            Op::Ask(connection, id, size) => self.begin(connection, Wants::Room(id, size)),
            Op::Pull(connection, id) => self.begin(connection, Wants::Chunk(id)),
            Op::Push(connection, id, size) => self.push(connection, id, size),
            Op::Stop(id, failed) => {
                let result = self.store.stop_stream(ObjectId(id), failed);
                let has_writer = self.has_writer(id);
                let expected = match self.streams.get_mut(&id) {
                    None => Err(Error::StreamStopUnknown(ObjectId(id))),
                    Some(stream) if stream.stopped.is_some() => Err(Error::StreamStopped),
                    Some(_) if has_writer => Err(Error::StreamHasWriter),
                    Some(stream) => {
                        stream.stopped = Some(failed);
                        self.seal(id);
                        Ok(())
                    }
                };
                assert_eq!(result, expected);
            }
            Op::Drop(id) => {
                let result = self.store.drop_stream(ObjectId(id));
                if self.streams.contains_key(&id) {
                    self.end_stream(id);
                    assert_eq!(result, Ok(()));
                } else {
                    assert_eq!(result, Err(Error::StreamDropUnknown(ObjectId(id))));
                }
            }
            Op::Cancel(connection) => self.pending[connection] = None,
            Op::Disconnect(connection) => self.disconnect(connection),
            Op::Clear => {
                self.store.clear();
                self.blobs.clear();
            }
        }
    }

    fn check(&mut self) {
        while (0..CONNECTIONS).any(|connection| self.turn(connection)) {}
        let status = self.store.status();
        assert_eq!(status.memory_usage, self.used());
        assert_eq!(status.deferred_requests, 0);
        for &id in self.blobs.keys() {
            assert!(self.store.exists(id), "{id}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn streams_agree_with_the_model(ops in prop::collection::vec(op(), 1..80)) {
        let mut world = World::new();
        for op in ops {
            world.step(&op);
            world.check();
        }
    }
}
