//! Random operations on a store with a disk that fails at times: nobody ever sees other bytes
//! than those of the blob, nothing is lost, and all figures are true after every step.
//!
//! Each client remembers where it has mapped what it holds, and looks there.

// A test may fail anywhere.
#![allow(clippy::unwrap_used)]

mod disk;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use disk::{FakeDisk, Fault};
use proptest::prelude::*;
use proptest::sample::Index;
use vinelet::shard::ids::ObjectId;
use vinelet::shard::spill::DATA;
use vinelet::shard::store::{
    Config, Error, Lease, Payload, Region, Spilling, Store, Transport, Watermarks,
};

const LIMIT: u64 = 8_000;
const CONNECTIONS: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    Create(usize, Vec<u64>),
    Shrink(Index),
    Seal(usize, Index),
    Get(usize, Vec<Index>),
    Release(usize, Index),
    Drop(Index),
    Evict(usize, Vec<Index>),
    Load(Vec<Index>, bool),
    Unpin(Index),
    Disconnect(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let conn = || 0..CONNECTIONS;
    let one = any::<Index>;
    let some = || prop::collection::vec(any::<Index>(), 1..4);
    let size =
        prop_oneof![1 => Just(0), 20 => 1..3_000_u64, 1 => Just(LIMIT), 1 => Just(LIMIT + 1)];
    prop_oneof![
        8 => (conn(), prop::collection::vec(size, 1..4)).prop_map(|(c, s)| Op::Create(c, s)),
        1 => one().prop_map(Op::Shrink),
        8 => (conn(), one()).prop_map(|(c, b)| Op::Seal(c, b)),
        8 => (conn(), some()).prop_map(|(c, b)| Op::Get(c, b)),
        6 => (conn(), one()).prop_map(|(c, b)| Op::Release(c, b)),
        1 => one().prop_map(Op::Drop),
        2 => (conn(), some()).prop_map(|(c, b)| Op::Evict(c, b)),
        2 => (some(), any::<bool>()).prop_map(|(b, p)| Op::Load(b, p)),
        1 => one().prop_map(Op::Unpin),
        2 => conn().prop_map(Op::Disconnect),
        1 => Just(Op::Clear),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        12 => Just(Fault::None),
        1 => Just(Fault::Full),
        1 => Just(Fault::Writes),
        1 => Just(Fault::Reads),
        1 => Just(Fault::Crash),
    ]
}

#[derive(Clone, Copy)]
struct Blob {
    id: ObjectId,
    size: u64,
    is_sealed: bool,
    writer: usize,
    pins: u32,
}

/// Where a client sees a blob.
#[derive(Clone, Copy)]
struct Seen {
    region: Region,
    offset: u64,
}

#[derive(Default)]
struct Client {
    files: BTreeMap<i32, File>,
    holds: BTreeMap<ObjectId, Seen>,
    writes: BTreeMap<ObjectId, Seen>,
}

struct World {
    store: Store,
    disk: FakeDisk,
    leases: Vec<Lease>,
    clients: Vec<Client>,
    blobs: Vec<Blob>,
    ids: Vec<ObjectId>,
}

fn fill(id: ObjectId, size: u64) -> Vec<u8> {
    vec![(id.0 % 251) as u8 + 1; usize::try_from(size).unwrap()]
}

impl World {
    fn new() -> Self {
        let config = Config {
            memory_limit: LIMIT,
            arena_dir: None,
            reserve_memory: false,
            deployment: "local".into(),
            hostname: "host".into(),
            nodename: "node".into(),
            ipc_socket: "/s".into(),
            rpc_endpoint: "0.0.0.0:0".into(),
        };
        let disk = FakeDisk::default();
        let spilling = Spilling {
            disk: Box::new(disk.clone()),
            watermarks: Watermarks::of(LIMIT, 0.3, 0.8).unwrap(),
        };
        let store = Store::open_with(config, Some(spilling)).unwrap();
        let leases = (0..CONNECTIONS).map(|_| store.connect(Transport::Ipc));
        Self {
            leases: leases.collect(),
            store,
            disk,
            clients: (0..CONNECTIONS).map(|_| Client::default()).collect(),
            blobs: Vec::new(),
            ids: vec![ObjectId(1 << 63 | 4711)],
        }
    }

    fn pick(&self, index: &Index) -> ObjectId {
        *index.get(&self.ids)
    }

    fn pick_all(&self, indexes: &[Index]) -> Vec<ObjectId> {
        indexes.iter().map(|index| self.pick(index)).collect()
    }

    fn blob(&mut self, id: ObjectId) -> Option<&mut Blob> {
        self.blobs.iter_mut().find(|blob| blob.id == id)
    }

    /// What a client learns from a payload, and the file it gets with it.
    fn see(&mut self, connection: usize, payload: &Payload) -> Seen {
        if let Region::File { number, length } = payload.region {
            assert!(length >= payload.offset + payload.size);
            let files = &mut self.clients[connection].files;
            match self.leases[connection].take_file(number) {
                Some(file) => assert!(files.insert(number, file).is_none(), "sent once"),
                None => assert!(files.contains_key(&number), "a file that was never sent"),
            }
        }
        Seen {
            region: payload.region,
            offset: payload.offset,
        }
    }

    fn file(&self, connection: usize, seen: Seen) -> File {
        match seen.region {
            Region::Arena => File::from(self.store.arena().try_clone_to_owned().unwrap()),
            Region::File { number, .. } => {
                self.clients[connection].files[&number].try_clone().unwrap()
            }
        }
    }

    fn forget(&mut self, is_gone: impl Fn(&Blob) -> bool) {
        for blob in self.blobs.iter().filter(|blob| is_gone(blob)) {
            for client in &mut self.clients {
                client.holds.remove(&blob.id);
                client.writes.remove(&blob.id);
            }
        }
        self.blobs.retain(|blob| !is_gone(blob));
    }

    fn create(&mut self, connection: usize, sizes: &[u64], fault: Fault) {
        let result = self.leases[connection].create_blobs(sizes);
        let created = match result {
            Ok(created) => created,
            Err(Error::NotEnoughMemory { .. }) => {
                assert!(sizes.contains(&(LIMIT + 1)), "{sizes:?}");
                return;
            }
            Err(error) => {
                assert!(matches!(error, Error::NoRoomOnDisk { .. }), "{error}");
                assert_ne!(fault, Fault::None, "{error}");
                return;
            }
        };
        for (payload, &size) in created.iter().zip(sizes).filter(|(_, size)| **size > 0) {
            assert_eq!(payload.size, size);
            let seen = self.see(connection, payload);
            let bytes = fill(payload.id, size);
            self.file(connection, seen)
                .write_all_at(&bytes, seen.offset)
                .unwrap();
            self.clients[connection].writes.insert(payload.id, seen);
            self.ids.push(payload.id);
            self.blobs.push(Blob {
                id: payload.id,
                size,
                is_sealed: false,
                writer: connection,
                pins: 0,
            });
        }
    }

    fn seal(&mut self, connection: usize, id: ObjectId, fault: Fault) {
        let result = self.leases[connection].seal(id);
        let Some(blob) = self.blob(id) else {
            assert_eq!(result, Err(Error::SealUnknown(id)));
            return;
        };
        if result.is_err() {
            assert_ne!(fault, Fault::None, "{result:?}");
            return;
        }
        blob.is_sealed = true;
        let writer = blob.writer;
        let seen = self.clients[writer].writes.remove(&id);
        if let (true, Some(seen)) = (writer == connection, seen) {
            self.clients[connection].holds.insert(id, seen);
        }
    }

    fn get(&mut self, connection: usize, ids: &[ObjectId], fault: Fault) {
        let result = self.leases[connection].get_blobs(ids, false);
        let known: Vec<Blob> = ids
            .iter()
            .filter_map(|&id| self.blob(id).copied())
            .collect();
        let found = match result {
            Ok(found) => found,
            Err(Error::NotSealed(_)) => {
                assert!(known.iter().any(|blob| !blob.is_sealed));
                return;
            }
            Err(error) => {
                assert_ne!(fault, Fault::None, "{error}");
                return;
            }
        };
        assert_eq!(found.len(), known.len());
        for (payload, blob) in found.iter().zip(known) {
            assert_eq!((payload.id, payload.size), (blob.id, blob.size));
            let seen = self.see(connection, payload);
            self.clients[connection].holds.insert(blob.id, seen);
        }
    }

    fn step(&mut self, op: &Op, fault: Fault) {
        match op {
            Op::Create(connection, sizes) => self.create(*connection, sizes, fault),
            Op::Shrink(index) => {
                let id = self.pick(index);
                let result = self.leases[0].shrink_blob(id, 1);
                if let Some(blob) = self.blob(id).filter(|blob| !blob.is_sealed) {
                    blob.size = 1;
                    result.unwrap();
                }
            }
            Op::Seal(connection, index) => self.seal(*connection, self.pick(index), fault),
            Op::Get(connection, indexes) => self.get(*connection, &self.pick_all(indexes), fault),
            Op::Release(connection, index) => {
                let id = self.pick(index);
                drop(self.leases[*connection].release(id));
                self.clients[*connection].holds.remove(&id);
            }
            Op::Drop(index) => {
                let id = self.pick(index);
                drop(self.leases[0].drop_blob(id));
                self.forget(|blob| blob.id == id);
            }
            Op::Evict(connection, indexes) => {
                let ids = self.pick_all(indexes);
                let result = self.leases[*connection].evict(&ids);
                assert!(result.is_ok() || fault != Fault::None, "{result:?}");
                // What a client evicts itself it gets anew.
                for id in ids {
                    let holds = &mut self.clients[*connection].holds;
                    if self.store.is_spilled(id)
                        && holds
                            .get(&id)
                            .is_some_and(|seen| seen.region == Region::Arena)
                    {
                        holds.remove(&id);
                    }
                }
            }
            Op::Load(indexes, pin) => {
                let ids = self.pick_all(indexes);
                let result = self.store.load(&ids, *pin);
                if result.is_ok() {
                    let ids: std::collections::BTreeSet<_> = ids.into_iter().collect();
                    for id in ids {
                        if let Some(blob) = self.blob(id) {
                            blob.pins += u32::from(*pin);
                        }
                    }
                } else if *pin {
                    // Some may be pinned now: nobody knows, so nobody is.
                    for id in ids {
                        let pins = self
                            .blob(id)
                            .map_or(0, |blob| std::mem::take(&mut blob.pins));
                        for _ in 0..=pins {
                            self.store.unpin(&[id]);
                        }
                    }
                }
            }
            Op::Unpin(index) => {
                let id = self.pick(index);
                self.store.unpin(&[id]);
                if let Some(blob) = self.blob(id) {
                    blob.pins = blob.pins.saturating_sub(1);
                }
            }
            Op::Disconnect(connection) => {
                let connection = *connection;
                self.leases[connection] = self.store.connect(Transport::Ipc);
                self.forget(|blob| !blob.is_sealed && blob.writer == connection);
                self.clients[connection] = Client::default();
            }
            Op::Clear => {
                self.store.clear();
                self.forget(|_| true);
            }
        }
    }

    fn check(&self) {
        let (spilled, resident): (Vec<Blob>, Vec<Blob>) = self
            .blobs
            .iter()
            .partition(|blob| self.store.is_spilled(blob.id));
        let used: u64 = resident.iter().map(|blob| blob.size).sum();
        assert_eq!(self.store.status().memory_usage, used);
        assert!(used <= LIMIT);
        let mut on_disk: Vec<ObjectId> = spilled.iter().map(|blob| blob.id).collect();
        on_disk.sort_unstable();
        assert_eq!(self.disk.files(), on_disk);
        for &id in &self.ids {
            let is_there = self.blobs.iter().any(|blob| blob.id == id);
            assert_eq!(self.store.exists(id), is_there, "{id}");
        }
        for blob in &self.blobs {
            let pin = self.store.pin(blob.id).unwrap();
            assert_eq!(pin.payload().size, blob.size);
            let mut bytes = fill(blob.id, blob.size);
            bytes.fill(0);
            self.store.read_blob(pin.payload(), 0, &mut bytes).unwrap();
            assert!(bytes == fill(blob.id, blob.size), "bytes over TCP");
            assert!(blob.pins == 0 || !self.store.is_spilled(blob.id), "pinned");
        }
        for (connection, client) in self.clients.iter().enumerate() {
            for (&id, &seen) in client.holds.iter().chain(&client.writes) {
                let blob = self.blobs.iter().find(|blob| blob.id == id).unwrap();
                let mut bytes = fill(id, blob.size);
                bytes.fill(0);
                let file = self.file(connection, seen);
                file.read_exact_at(&mut bytes, seen.offset).unwrap();
                assert!(bytes == fill(id, blob.size), "bytes in a mapping");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn no_client_ever_sees_foreign_bytes_and_nothing_is_lost(
        steps in prop::collection::vec((op(), fault()), 1..80)
    ) {
        let mut world = World::new();
        for (op, fault) in steps {
            world.disk.set(fault);
            world.step(&op, fault);
            world.disk.set(Fault::None);
            world.check();
        }
        world.store.clear();
        prop_assert_eq!(world.store.status().memory_usage, 0);
        prop_assert_eq!(world.disk.files(), vec![]);
        prop_assert!(DATA.is_multiple_of(64));
        world.leases[0].create_blob(LIMIT).unwrap();
    }
}
