//! A disk in memory that fails on demand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::MemfdFlags;
use vinelet::shard::ids::ObjectId;
use vinelet::shard::spill::{DATA, Error, Removal, Sink, Source, SpillStore};

/// What is wrong with the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// There is no space for anything more.
    Full,
    /// Nothing can be written.
    Writes,
    /// Nothing can be read.
    Reads,
    /// What is written breaks off in the middle, and what there is of it stays there.
    Crash,
}

#[derive(Debug)]
struct Entry {
    file: File,
    size: u64,
    is_complete: bool,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<ObjectId, Entry>,
    /// Of writes that broke off.
    debris: Vec<File>,
    fault: Fault,
}

/// Blobs in anonymous files. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeDisk(Arc<Mutex<State>>);

fn failed(what: &'static str) -> Error {
    Error::Io {
        what,
        path: "the fake disk".into(),
        source: io::Error::other("it is broken"),
    }
}

impl FakeDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.state().fault = fault;
    }

    pub(crate) fn files(&self) -> Vec<ObjectId> {
        self.state().files.keys().copied().collect()
    }
}

impl SpillStore for FakeDisk {
    fn write(&self, id: ObjectId, size: u64, source: Source<'_>) -> Result<(), Error> {
        let file = self.create(id, size)?;
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        let fault = self.state().fault;
        let half = bytes.len() / 2;
        let copied = match fault {
            Fault::Crash => source(0, &mut bytes[..half]).and(Err(io::Error::other("killed"))),
            Fault::None | Fault::Full | Fault::Writes | Fault::Reads => {
                source(0, &mut bytes[..half]).and_then(|()| source(half as u64, &mut bytes[half..]))
            }
        };
        if copied.is_err() {
            let mut state = self.state();
            state.files.remove(&id);
            state.debris.push(file);
            return Err(failed("writing"));
        }
        file.write_all_at(&bytes, DATA).unwrap();
        self.complete(id, size)
    }

    fn create(&self, id: ObjectId, size: u64) -> Result<File, Error> {
        let mut state = self.state();
        match state.fault {
            Fault::Full => {
                let path = "the fake disk".into();
                return Err(Error::NoSpace { id, size, path });
            }
            Fault::Writes => return Err(failed("creating")),
            Fault::None | Fault::Reads | Fault::Crash => {}
        }
        if state.files.contains_key(&id) {
            return Err(Error::Exists(id));
        }
        let file = File::from(rustix::fs::memfd_create("blob", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(DATA + size).unwrap();
        let entry = Entry {
            file: file.try_clone().unwrap(),
            size,
            is_complete: false,
        };
        state.files.insert(id, entry);
        Ok(file)
    }

    fn complete(&self, id: ObjectId, size: u64) -> Result<(), Error> {
        let mut state = self.state();
        if matches!(state.fault, Fault::Writes | Fault::Crash) {
            return Err(failed("completing"));
        }
        let entry = state.files.get_mut(&id).ok_or(Error::Unknown(id))?;
        entry.size = size;
        entry.is_complete = true;
        Ok(())
    }

    fn read(&self, id: ObjectId, sink: Sink<'_>) -> Result<(), Error> {
        let state = self.state();
        if state.fault == Fault::Reads {
            return Err(failed("reading"));
        }
        let entry = state.files.get(&id).ok_or(Error::Unknown(id))?;
        if !entry.is_complete {
            return Err(failed("reading what is not complete"));
        }
        let mut bytes = vec![0; usize::try_from(entry.size).unwrap()];
        entry.file.read_exact_at(&mut bytes, DATA).unwrap();
        drop(state);
        sink(0, &bytes).map_err(|_| failed("handing over"))
    }

    fn open(&self, id: ObjectId) -> Result<File, Error> {
        let state = self.state();
        if state.fault == Fault::Reads {
            return Err(failed("opening"));
        }
        let entry = state.files.get(&id).ok_or(Error::Unknown(id))?;
        Ok(entry.file.try_clone().unwrap())
    }

    fn remove(&self, id: ObjectId, removal: Removal) -> Result<(), Error> {
        let entry = self.state().files.remove(&id).ok_or(Error::Unknown(id))?;
        if removal == Removal::Erase {
            let length = entry.file.metadata().unwrap().len();
            entry.file.set_len(0).unwrap();
            entry.file.set_len(length).unwrap();
        }
        Ok(())
    }

    fn used(&self) -> u64 {
        let state = self.state();
        let lengths = state.files.values().map(|entry| entry.file.metadata());
        lengths.map(|metadata| metadata.unwrap().len()).sum()
    }
}
