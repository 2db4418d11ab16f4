//! What goes to disk, in which order, and what never does.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use super::{
    Config, DeleteOptions, Error, Lease, Payload, Region, Spilling, Store, Transport, Watermarks,
};
use crate::shard::ids::ObjectId;
use crate::shard::spill::Directory;

fn store_of(dir: &Path, limit: u64, lower: f64, upper: f64, quota: Option<u64>) -> Store {
    let config = Config {
        memory_limit: limit,
        arena_dir: None,
        reserve_memory: false,
        deployment: "local".into(),
        hostname: "vm".into(),
        nodename: "node".into(),
        ipc_socket: "/run/v.sock".into(),
        rpc_endpoint: "vm:9600".into(),
    };
    let spilling = Spilling {
        disk: Box::new(Directory::open(dir, quota).unwrap()),
        watermarks: Watermarks::of(limit, lower, upper).unwrap(),
    };
    Store::open_with(config, Some(spilling)).unwrap()
}

/// 8000 bytes, and blobs of 2000.
fn store(quota: Option<u64>) -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), 8000, 0.5, 0.8, quota);
    (dir, store)
}

fn bytes_of(id: ObjectId, size: u64) -> Vec<u8> {
    let size = usize::try_from(size).unwrap();
    id.0.to_le_bytes().into_iter().cycle().take(size).collect()
}

/// A sealed blob with bytes of its own; held by the lease.
fn put(lease: &Lease, size: u64) -> Payload {
    let blob = lease.create_blob(size).unwrap();
    let bytes = bytes_of(blob.id, size);
    lease.store().write_blob(&blob, 0, &bytes).unwrap();
    lease.seal(blob.id).unwrap();
    Payload {
        is_sealed: true,
        ..blob
    }
}

fn get(lease: &Lease, id: ObjectId) -> Payload {
    let found = lease.get_blobs(&[id], false).unwrap();
    let mut bytes = vec![0; usize::try_from(found[0].size).unwrap()];
    lease.store().read_blob(&found[0], 0, &mut bytes).unwrap();
    assert_eq!(bytes, bytes_of(id, found[0].size));
    found[0]
}

fn files(dir: &TempDir) -> usize {
    std::fs::read_dir(dir.path()).unwrap().count()
}

/// Vineyard's own example, step by step: `put` over IPC, `up` over RPC, and likewise gets.
#[test]
fn blobs_go_in_the_order_in_which_they_were_released() {
    let (dir, store) = store(None);
    let (ipc, rpc) = (store.connect(Transport::Ipc), store.connect(Transport::Rpc));
    let mut ids = vec![ObjectId::INVALID];
    let steps: &[(&str, &[usize])] = &[
        ("put 1, put 2, up 3, up 4", &[1, 2]),
        ("rget 2, put 5", &[1, 3, 4]),
        ("get 2, get 4, up 6", &[1, 3, 5, 2]),
        ("rget 1, rget 3", &[5, 2, 4, 6]),
        ("rget 6, get 3, get 4", &[5, 2, 1, 6]),
        ("up 7", &[5, 2, 1, 6]),
        ("put 8, put 9, put 10", &[1, 2, 3, 4, 5, 6, 7, 8]),
        ("rget 5, rget 3, rget 1", &[2, 4, 6, 7, 8, 9, 10]),
        ("get 2, get 4, get 6", &[5, 3, 1, 2, 7, 8, 9, 10]),
    ];
    for (operations, expected) in steps {
        for operation in operations.split(", ") {
            let (what, number) = operation.split_once(' ').unwrap();
            let number: usize = number.parse().unwrap();
            let lease = if matches!(what, "put" | "get") {
                &ipc
            } else {
                &rpc
            };
            if matches!(what, "put" | "up") {
                assert_eq!(ids.len(), number);
                ids.push(put(lease, 2000).id);
            } else {
                get(lease, ids[number]);
            }
            lease.release(ids[number]).unwrap();
        }
        let spilled = (1..ids.len()).filter(|&number| store.is_spilled(ids[number]));
        let expected: BTreeSet<usize> = expected.iter().copied().collect();
        assert_eq!(spilled.collect::<BTreeSet<_>>(), expected, "{operations}");
        let resident = (ids.len() - 1 - expected.len()) as u64;
        assert_eq!(store.status().memory_usage, 2000 * resident);
        assert_eq!(files(&dir), expected.len());
    }
    for &id in &ids[1..] {
        assert_eq!(store.is_in_use(id), !store.is_spilled(id));
    }
}

#[test]
fn what_somebody_holds_stays_where_it_is() {
    let (_dir, store) = store(None);
    let (one, two) = (store.connect(Transport::Ipc), store.connect(Transport::Ipc));
    let held: Vec<Payload> = (0..4).map(|_| put(&one, 2000)).collect();
    let more: Vec<Payload> = (0..4).map(|_| put(&two, 2000)).collect();
    for blob in &held {
        assert_eq!(get(&two, blob.id), *blob);
    }
    assert_eq!(store.status().memory_usage, 8000);
    assert!(more.iter().all(|blob| store.is_spilled(blob.id)));
    // Their files are mapped, and so they stay there as well.
    for blob in &more {
        assert_eq!(get(&one, blob.id).region, blob.region);
    }
    drop(one);
    put(&two, 2000);
    assert!(
        held.iter().all(|blob| !store.is_spilled(blob.id)),
        "two holds them"
    );
    drop(two);
    let three = store.connect(Transport::Ipc);
    assert_eq!(put(&three, 2000).region, Region::Arena);
    assert_eq!(get(&three, more[0].id).region, Region::Arena);
}

#[test]
fn what_memory_has_no_room_for_is_written_and_read_in_its_file() {
    let (dir, store) = store(None);
    let lease = store.connect(Transport::Ipc);
    put(&lease, 8000);
    let blob = lease.create_blob(3000).unwrap();
    let Region::File { number, length } = blob.region else {
        panic!("{blob:?}");
    };
    assert_eq!(length, blob.offset + 3000);
    let file: File = lease.take_file(number).unwrap();
    assert!(lease.take_file(number).is_none(), "it is sent once");
    file.write_all_at(&bytes_of(blob.id, 3000), blob.offset)
        .unwrap();
    lease.shrink_blob(blob.id, 2500).unwrap();
    assert_eq!(
        lease.get_blobs(&[blob.id], false),
        Err(Error::NotSealed(blob.id))
    );
    lease.seal(blob.id).unwrap();
    assert_eq!(get(&lease, blob.id).size, 2500);
    let other = store.connect(Transport::Ipc);
    get(&other, blob.id);
    let theirs = other.take_file(number).unwrap();
    lease.drop_blob(blob.id).unwrap();
    assert_eq!((files(&dir), store.status().memory_usage), (0, 8000));
    // Its space is back although it is mapped; whoever still looks sees zeros.
    let mut bytes = vec![1; 2500];
    theirs.read_exact_at(&mut bytes, blob.offset).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    // A writer that goes leaves no file.
    lease.create_blob(100).unwrap();
    assert_eq!(files(&dir), 1);
    drop(lease);
    assert_eq!(files(&dir), 0);
}

#[test]
fn blobs_are_spilled_loaded_and_pinned_on_demand() {
    let (dir, store) = store(None);
    let (one, two) = (store.connect(Transport::Ipc), store.connect(Transport::Ipc));
    let (mine, ours) = (put(&one, 2000).id, put(&one, 2000).id);
    get(&two, ours);
    let member = json!({"id": mine.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
    let object = json!({"typename": "x::A", "instance_id": 0, "m": member});
    let object = store.create_object(object).unwrap().id;
    let unsealed = one.create_blob(1000).unwrap().id;

    one.evict(&[object, ours, unsealed, ObjectId(1 << 63 | 5)])
        .unwrap();
    assert!(store.is_spilled(mine) && !store.is_spilled(ours) && !store.is_spilled(unsealed));
    assert_eq!(store.status().memory_usage, 3000);
    one.release(mine).unwrap();

    store.load(&[object], true).unwrap();
    assert!(!store.is_spilled(mine));
    put(&two, 2000);
    one.evict(&[mine]).unwrap();
    let last = put(&two, 4000);
    assert!(!store.is_spilled(mine), "pinned");
    assert!(store.is_spilled(last.id));
    two.release(last.id).unwrap();
    store.unpin(&[object]);
    one.evict(&[mine]).unwrap();
    assert!(store.is_spilled(mine));
    let full = store.load(&[last.id], false).unwrap_err();
    assert!(
        matches!(full, Error::NotEnoughMemory { size: 4000, .. }),
        "{full}"
    );

    let options = DeleteOptions::default();
    store.delete(&[object, ours, last.id], options).unwrap();
    assert_eq!(files(&dir), 0);
}

#[test]
fn without_a_disk_there_is_nothing_to_evict_to() {
    let (_dir, spilling) = store(None);
    let config = spilling.config().clone();
    let store = Store::open(config).unwrap();
    let lease = store.connect(Transport::Ipc);
    let id = put(&lease, 10).id;
    assert_eq!(lease.evict(&[id]), Err(Error::SpillDisabled));
    store.load(&[id], true).unwrap();
    store.unpin(&[id]);
    assert!(store.is_in_use(id) && !store.may_wait_for_disk(u64::MAX));
}

#[test]
fn the_quota_ends_what_can_be_put_and_loses_nothing() {
    let (dir, store) = store(Some(5000));
    let lease = store.connect(Transport::Ipc);
    let kept: Vec<ObjectId> = (0..6).map(|_| put(&lease, 2000).id).collect();
    let error = lease.create_blob(2000).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("Failed to allocate memory of size 2000, "),
        "{text}"
    );
    assert!(
        text.contains("exceed the quota of 5000, 4128 of which"),
        "{text}"
    );
    assert!(lease.create_blobs(&[100, 700, 300]).is_err());
    assert_eq!((files(&dir), store.status().memory_usage), (2, 8000));
    for &id in &kept {
        get(&lease, id);
    }
    // Where the disk is full, cold blobs stay in memory.
    lease.release(kept[0]).unwrap();
    lease.create_blob(2000).unwrap_err();
    assert!(!store.is_spilled(kept[0]));
    lease.drop_blob(kept[5]).unwrap();
    put(&lease, 2000);
    assert!(store.is_spilled(kept[0]));
}

#[test]
fn a_damaged_file_is_an_error_and_no_blob() {
    let (dir, store) = store(None);
    let lease = store.connect(Transport::Ipc);
    let id = put(&lease, 2000).id;
    lease.evict(&[id]).unwrap();
    let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
    let path = path.unwrap().path();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 1000).unwrap();
    let check = |result: Result<(), Error>| match result {
        Err(Error::Disk { reason, .. }) => assert!(reason.contains("is damaged"), "{reason}"),
        other => panic!("{other:?}"),
    };
    check(lease.get_blobs(&[id], false).map(drop));
    lease.release(id).unwrap();
    check(
        store
            .connect(Transport::Rpc)
            .get_blobs(&[id], false)
            .map(drop),
    );
    check(store.load(&[id], true));
    assert_eq!(store.status().memory_usage, 0);
    lease.drop_blob(id).unwrap();
    assert_eq!(files(&dir), 0);
}

#[test]
fn a_connection_maps_only_so_many_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), 1000, 0.3, 0.8, None);
    let hoarder = store.connect(Transport::Ipc);
    put(&hoarder, 1000);
    let mut last = None;
    let refused = loop {
        match hoarder.create_blob(1) {
            Ok(blob) => last = Some(blob.id),
            Err(error) => break error,
        }
    };
    assert!(
        refused.to_string().contains("768 spilled blobs mapped"),
        "{refused}"
    );
    hoarder.seal(last.unwrap()).unwrap();
    let other = store.connect(Transport::Ipc);
    other.get_blobs(&[last.unwrap()], false).unwrap();
    let own = put(&other, 1).id;
    let refused = hoarder.get_blobs(&[own], false).unwrap_err();
    assert!(matches!(refused, Error::TooManyMappings(768)), "{refused}");
}

/// What one does while another's disk work is under way.
#[test]
fn clients_at_once_find_their_bytes_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), 100_000, 0.3, 0.8, None);
    thread::scope(|scope| {
        for client in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                let lease = store.connect(Transport::Rpc);
                let mut ids = Vec::new();
                for step in 0..150_u64 {
                    let blob = put(&lease, 1000 + 500 * ((step + client) % 20));
                    ids.push(blob.id);
                    if step % 3 != 0 {
                        lease.release(blob.id).unwrap();
                    }
                    let other = ids[usize::try_from(step * 7 % ids.len() as u64).unwrap()];
                    get(&lease, other);
                    lease.release(other).unwrap();
                    match step % 5 {
                        1 => lease.evict(&[other]).unwrap(),
                        2 => drop(store.load(&[other], false)),
                        3 => lease.drop_blob(ids.remove(0)).unwrap(),
                        _ => {}
                    }
                    assert!(store.status().memory_usage <= 100_000);
                }
                for id in ids {
                    get(&lease, id);
                    lease.drop_blob(id).unwrap();
                }
            });
        }
    });
    assert_eq!((files(&dir), store.status().memory_usage), (0, 0));
}

/// A chunk to write, for which there is room; its bytes are there.
fn write_chunk(lease: &Lease, stream: ObjectId, size: u64) -> Payload {
    let request = lease.ask_chunk(stream, size).unwrap();
    assert_eq!(now(request.has_room()), Some(Ok(())));
    let blob = lease.next_chunk(&request).unwrap();
    let bytes = bytes_of(blob.id, size);
    lease.store().write_blob(&blob, 0, &bytes).unwrap();
    blob
}

/// What a future is at this moment.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

const STREAM: ObjectId = ObjectId(5);

#[test]
fn a_chunk_that_waits_for_its_reader_goes_to_disk_and_is_read_from_there() {
    let (dir, store) = store(None);
    let (writer, reader) = (store.connect(Transport::Ipc), store.connect(Transport::Ipc));
    store.create_stream(STREAM).unwrap();
    let first = write_chunk(&writer, STREAM, 2000);
    let second = write_chunk(&writer, STREAM, 2000);
    put(&writer, 2000);
    put(&writer, 2000);
    // The first one is written and can go; the second one is being written.
    assert!(store.is_spilled(first.id) && !store.is_spilled(second.id));
    let chunk = now(reader.pull_chunk(STREAM).unwrap().over()).unwrap();
    assert_eq!(chunk, Ok(first.id));
    get(&reader, first.id);
    let before = files(&dir);
    reader.release(first.id).unwrap();
    reader.evict(&[first.id]).unwrap();
    assert!(store.is_spilled(first.id));
    assert!(now(reader.pull_chunk(STREAM).unwrap().over()).is_none());
    assert!(!store.exists(first.id));
    assert!(files(&dir) <= before, "a chunk's file goes with it");
}

#[test]
fn a_chunk_that_is_written_on_disk_is_whole_when_it_is_pulled() {
    let (dir, store) = store(None);
    store.set_stream_threshold(200);
    let (writer, reader) = (store.connect(Transport::Ipc), store.connect(Transport::Rpc));
    let empty = files(&dir);
    for _ in 0..4 {
        put(&writer, 2000);
    }
    store.create_stream(STREAM).unwrap();
    let first = write_chunk(&writer, STREAM, 2000);
    let second = write_chunk(&writer, STREAM, 1000);
    for chunk in [first, second] {
        assert!(matches!(chunk.region, Region::File { .. }));
    }
    store.stop_stream(STREAM, false).unwrap();
    for chunk in [first, second] {
        let pulled = now(reader.pull_chunk(STREAM).unwrap().over()).unwrap();
        assert_eq!(pulled, Ok(chunk.id));
        get(&reader, chunk.id);
        reader.release(chunk.id).unwrap();
        // Its file is read as well where somebody maps it, and has to be sound.
        let mapper = store.connect(Transport::Ipc);
        get(&mapper, chunk.id);
    }
    let drained = reader.pull_chunk(STREAM).map(|_| ());
    assert_eq!(drained, Err(Error::StreamDrained));
    assert_eq!(files(&dir), empty, "nothing of the chunks stays");
}

#[test]
fn a_writer_goes_on_when_spilling_makes_room() {
    let (_dir, store) = store(None);
    let (writer, other) = (store.connect(Transport::Ipc), store.connect(Transport::Rpc));
    store.create_stream(STREAM).unwrap();
    let blob = put(&other, 6000);
    other.release(blob.id).unwrap();
    let request = writer.ask_chunk(STREAM, 2000).unwrap();
    let mut room = pin!(request.has_room());
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    assert!(room.as_mut().poll(&mut context).is_pending());
    other.evict(&[blob.id]).unwrap();
    assert!(woken.0.load(Ordering::Relaxed), "the writer is told");
    assert_eq!(room.as_mut().poll(&mut context), Poll::Ready(Ok(())));
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}
