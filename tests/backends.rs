//! Every store of spilled blobs keeps the same promises; a new one joins by a line.

// A test may fail anywhere.
#![allow(clippy::unwrap_used)]

mod disk;

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use disk::{FakeDisk, Fault};
use vinelet::shard::ids::ObjectId;
use vinelet::shard::spill::{DATA, Directory, Error, Removal, SpillStore};

const ONE: ObjectId = ObjectId(1 << 63 | 1);
const TWO: ObjectId = ObjectId(1 << 63 | 2);

/// Longer than what is copied at a time.
const LONG: usize = (1 << 20) + 4097;

fn bytes(seed: u8, length: usize) -> Vec<u8> {
    let next = |i: usize| {
        u8::try_from((i * 31 + i / 251) % 256)
            .unwrap()
            .wrapping_add(seed)
    };
    (0..length).map(next).collect()
}

fn write(store: &dyn SpillStore, id: ObjectId, data: &[u8]) -> Result<(), Error> {
    store.write(id, data.len() as u64, &mut |at, buffer| {
        let at = usize::try_from(at).unwrap();
        buffer.copy_from_slice(&data[at..at + buffer.len()]);
        Ok(())
    })
}

fn read(store: &dyn SpillStore, id: ObjectId) -> Result<Vec<u8>, Error> {
    let mut data = Vec::new();
    store.read(id, &mut |at, bytes| {
        assert_eq!(at, data.len() as u64, "in order");
        data.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(data)
}

fn keeps_what_is_written(store: &dyn SpillStore) {
    for (id, length) in [(ONE, 1), (TWO, LONG)] {
        write(store, id, &bytes(7, length)).unwrap();
        assert_eq!(read(store, id).unwrap(), bytes(7, length));
    }
    assert_eq!(store.used(), 1 + LONG as u64 + 2 * DATA);
    assert!(matches!(write(store, ONE, b"x"), Err(Error::Exists(_))));
    assert_eq!(read(store, ONE).unwrap(), bytes(7, 1));
    store.remove(ONE, Removal::Keep).unwrap();
    store.remove(TWO, Removal::Erase).unwrap();
    assert_eq!(store.used(), 0);
    assert!(matches!(read(store, ONE), Err(Error::Unknown(_))));
    assert!(matches!(store.open(TWO), Err(Error::Unknown(_))));
    assert!(matches!(
        store.remove(TWO, Removal::Keep),
        Err(Error::Unknown(_))
    ));
}

fn a_created_file_becomes_a_blob(store: &dyn SpillStore) {
    let file = store.create(ONE, 5000).unwrap();
    assert!(file.metadata().unwrap().len() >= 5000 + DATA);
    file.write_all_at(&bytes(3, 5000), DATA).unwrap();
    read(store, ONE).unwrap_err();
    store.complete(ONE, 4000).unwrap();
    assert_eq!(read(store, ONE).unwrap(), bytes(3, 4000));
    store.remove(ONE, Removal::Erase).unwrap();
    assert_eq!(store.used(), 0);
}

fn an_opened_file_outlives_its_name(store: &dyn SpillStore) {
    write(store, ONE, &bytes(9, 100)).unwrap();
    let mut found = vec![0; 100];
    let file = store.open(ONE).unwrap();
    store.remove(ONE, Removal::Keep).unwrap();
    file.read_exact_at(&mut found, DATA).unwrap();
    assert_eq!(found, bytes(9, 100));

    write(store, TWO, &bytes(9, 100_000)).unwrap();
    let file = store.open(TWO).unwrap();
    store.remove(TWO, Removal::Erase).unwrap();
    let mut found = vec![1; 100_000];
    file.read_exact_at(&mut found, DATA).unwrap();
    assert!(
        found.iter().all(|&byte| byte == 0),
        "erased, and no shorter"
    );
}

fn what_cannot_be_read_leaves_nothing(store: &dyn SpillStore) {
    let failed = store.write(ONE, LONG as u64, &mut |at, _| match at {
        0 => Ok(()),
        _ => Err(io::Error::other("memory is broken")),
    });
    failed.unwrap_err();
    assert_eq!(store.used(), 0);
    write(store, ONE, &bytes(1, 10)).unwrap();
    let refused = store.read(ONE, &mut |_, _| Err(io::Error::other("memory is broken")));
    refused.unwrap_err();
    assert_eq!(read(store, ONE).unwrap(), bytes(1, 10));
    store.remove(ONE, Removal::Keep).unwrap();
}

macro_rules! conformance {
    ($name:ident: $guard:ident, $store:expr) => {
        mod $name {
            #[test]
            fn keeps_its_promises() {
                let $guard = tempfile::tempdir().unwrap();
                let store = $store;
                super::keeps_what_is_written(&store);
                super::a_created_file_becomes_a_blob(&store);
                super::an_opened_file_outlives_its_name(&store);
                super::what_cannot_be_read_leaves_nothing(&store);
            }
        }
    };
}

/// What the model relies on: a fault is an error, and costs nothing that is there.
#[test]
fn the_fake_fails_on_demand_and_keeps_what_it_has() {
    let disk = FakeDisk::default();
    write(&disk, ONE, &bytes(1, 100)).unwrap();
    for fault in [Fault::Full, Fault::Writes, Fault::Crash] {
        disk.set(fault);
        write(&disk, TWO, &bytes(1, 100)).unwrap_err();
        assert_eq!(read(&disk, ONE).unwrap(), bytes(1, 100));
        assert_eq!(disk.files(), [ONE]);
    }
    disk.set(Fault::Reads);
    read(&disk, ONE).unwrap_err();
    disk.open(ONE).unwrap_err();
    disk.set(Fault::None);
    write(&disk, TWO, &bytes(1, 100)).unwrap();
}

conformance!(directory: dir, super::open(dir.path(), None));
conformance!(in_memory: _dir, super::disk::FakeDisk::default());

fn open(path: &Path, quota: Option<u64>) -> Directory {
    Directory::open(path, quota).unwrap()
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_missing_directory_is_made_and_an_impossible_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    write(&open(&path, None), ONE, b"x").unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = Directory::open(&file, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("using {} for spilled blobs", file.display())
    );
}

#[test]
fn the_quota_is_exact_and_a_refusal_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Some(2000));
    write(&store, ONE, &bytes(1, 1000)).unwrap();
    let left = usize::try_from(2000 - 1000 - 2 * DATA).unwrap();
    let error = write(&store, TWO, &bytes(1, left + 1)).unwrap_err();
    assert!(matches!(error, Error::Quota { quota: 2000, .. }), "{error}");
    assert!(matches!(
        store.create(TWO, u64::MAX),
        Err(Error::Quota { .. })
    ));
    write(&store, TWO, &bytes(1, left)).unwrap();
    assert_eq!(store.used(), 2000);
    store.remove(ONE, Removal::Erase).unwrap();
    write(&store, ONE, &bytes(1, 1000)).unwrap();
}

#[test]
fn more_than_the_disk_has_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None);
    let error = store.create(ONE, 1 << 60).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error:?}");
    store.create(ONE, u64::MAX).unwrap_err();
    assert_eq!((store.used(), names(dir.path())), (0, vec![]));
}

#[test]
fn a_predecessors_files_go_and_everybody_elses_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None);
    write(&store, ONE, &bytes(1, 1000)).unwrap();
    let unfinished = store.create(TWO, 1000).unwrap();
    // As after a kill: the files stay, the process's lock does not.
    let killed = tempfile::tempdir().unwrap();
    let ours = names(dir.path());
    assert_eq!(ours.len(), 2);
    for name in &ours {
        fs::copy(dir.path().join(name), killed.path().join(name)).unwrap();
    }
    fs::write(killed.path().join("o8000000000000007.spill.new"), "").unwrap();
    let foreign = [
        "notes.txt",
        "o8000000000000003.spill",
        "o8000000000000004.spill.new",
        "o8000000000000001.spill.bak",
        "9223372036854775809",
    ];
    for name in foreign {
        fs::write(killed.path().join(name), "a user's own").unwrap();
    }
    fs::create_dir(killed.path().join("o8000000000000005.spill")).unwrap();
    std::os::unix::fs::symlink(
        dir.path().join(&ours[0]),
        killed.path().join("o8000000000000006.spill"),
    )
    .unwrap();
    let next = open(killed.path(), None);
    let mut expected: Vec<String> = foreign.map(str::to_owned).to_vec();
    expected.extend(["o8000000000000005.spill", "o8000000000000006.spill"].map(str::to_owned));
    expected.sort();
    assert_eq!(names(killed.path()), expected);

    // Nor is a user's file replaced by one of ours.
    let taken = ObjectId(1 << 63 | 3);
    write(&next, taken, b"x").unwrap_err();
    assert_eq!(next.used(), 0);
    drop(next);
    assert_eq!(names(killed.path()), expected);
    drop((unfinished, store));
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn two_processes_do_not_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path(), None);
    let error = Directory::open(dir.path(), None).unwrap_err();
    assert!(matches!(error, Error::Taken(_)), "{error}");
    drop(first);
    open(dir.path(), None);
}

#[test]
fn what_the_disk_changed_is_not_taken_for_the_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None);
    write(&store, ONE, &bytes(1, 1000)).unwrap();
    let path = dir.path().join(&names(dir.path())[0]);
    let whole = fs::read(&path).unwrap();
    for at in [0, 9, 20, 30, 33, 62, 64, 500, whole.len() - 1] {
        let mut changed = whole.clone();
        changed[at] ^= 4;
        fs::write(&path, &changed).unwrap();
        let error = read(&store, ONE).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{at}: {error}");
    }
    for length in [0, 10, 64, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = read(&store, ONE).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{length}: {error}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(read(&store, ONE).unwrap(), bytes(1, 1000));
}
