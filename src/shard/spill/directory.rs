//! One file per blob, in a directory that may have other files too.
//!
//! A file has a temporary name until it is complete. Files are known by name and by how they
//! begin; whatever else is in the directory is neither read nor changed. A lock on the directory
//! (flock(2), so it ends with the process) keeps two processes from taking each other's files for
//! what a killed predecessor left.
//!
//! What a predecessor left is removed at the start: without the metadata that it had in memory,
//! nobody can ask for those blobs. They survive a restart once their metadata does.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::format::{DATA, HEADER, Header, Named, is_ours, name, named, unfinished};
use super::{Error, Removal, Sink, Source, SpillStore};
use crate::shard::ids::ObjectId;

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;

/// A directory for spilled blobs. Files that are left at the end are removed.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    quota: Option<u64>,
    files: Mutex<Files>,
    /// Has the lock for as long as it is open.
    handle: File,
}

#[derive(Debug, Default)]
struct Files {
    /// Bytes of all files.
    used: u64,
    by_id: BTreeMap<ObjectId, Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    length: u64,
    is_complete: bool,
}

impl Directory {
    /// Takes a directory, which is made if there is none, for files of `quota` bytes together.
    pub fn open(path: &Path, quota: Option<u64>) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Directory {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| failed(errno.into()))
            .map(File::from)?;
        match rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(Error::Taken(path.to_owned())),
            Err(errno) => return Err(failed(errno.into())),
        }
        let directory = Self {
            path: path.to_owned(),
            quota,
            files: Mutex::default(),
            handle,
        };
        directory.remove_leftovers().map_err(failed)?;
        directory.is_writable().map_err(failed)?;
        Ok(directory)
    }

    fn remove_leftovers(&self) -> io::Result<()> {
        let mut removed = 0_u64;
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let kind = entry.file_name().to_str().map_or(Named::Foreign, named);
            if kind == Named::Foreign || !entry.file_type()?.is_file() {
                continue;
            }
            let mut start = Vec::new();
            let mut file = File::open(entry.path())?;
            file.by_ref().take(DATA).read_to_end(&mut start)?;
            // A kill may have come before the first byte.
            let is_begun = kind == Named::Unfinished && file.metadata()?.len() == 0;
            if is_ours(&start) || is_begun {
                fs::remove_file(entry.path())?;
                removed += 1;
            }
        }
        if removed > 0 {
            tracing::info!(removed, path = %self.path.display(), "removed spilled blobs of a predecessor");
        }
        Ok(())
    }

    /// Whether files can be made there: better known at the start than when memory is full.
    fn is_writable(&self) -> io::Result<()> {
        Ok(rustix::fs::accessat(
            &self.handle,
            ".",
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
            rustix::fs::AtFlags::empty(),
        )?)
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        // Each change is a whole before anything could panic.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: ObjectId) -> Result<Entry, Error> {
        let entry = self.files().by_id.get(&id).copied();
        entry.ok_or(Error::Unknown(id))
    }

    fn path_of(&self, id: ObjectId, is_complete: bool) -> PathBuf {
        self.path.join(if is_complete {
            name(id)
        } else {
            unfinished(id)
        })
    }

    /// Counts a file that is to be made: its length.
    fn reserve(&self, id: ObjectId, size: u64) -> Result<u64, Error> {
        let mut files = self.files();
        if files.by_id.contains_key(&id) {
            return Err(Error::Exists(id));
        }
        let quota = self.quota.unwrap_or(u64::MAX);
        let length = size.saturating_add(DATA);
        let used = files
            .used
            .checked_add(length)
            .filter(|&used| used <= quota)
            .ok_or(Error::Quota {
                id,
                size: length,
                quota,
                used: files.used,
            })?;
        files.used = used;
        let entry = Entry {
            length,
            is_complete: false,
        };
        files.by_id.insert(id, entry);
        Ok(length)
    }

    fn forget(&self, id: ObjectId) {
        let mut files = self.files();
        if let Some(entry) = files.by_id.remove(&id) {
            files.used -= entry.length;
        }
    }

    /// A new file with all its space and a header.
    fn begin(&self, id: ObjectId, size: u64, length: u64) -> Result<File, Error> {
        let path = self.path_of(id, false);
        let failed = |what, source| failure(id, length, &path, what, source);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed("creating", errno.into()))
            .map(File::from)?;
        let header = Header {
            id,
            size,
            checksum: None,
        };
        let begun = file
            .write_all_at(&header.encode(), 0)
            .and_then(|()| take_space(&file, length));
        begun.map_err(|source| {
            drop(fs::remove_file(&path));
            failed("taking space for", source)
        })?;
        Ok(file)
    }

    /// Makes a file whose bytes are all there a complete one.
    fn finish(&self, id: ObjectId, file: &File, header: &Header) -> Result<(), Error> {
        let path = self.path_of(id, false);
        let failed = |what, source| failure(id, header.size, &path, what, source);
        file.write_all_at(&header.encode(), 0)
            .and_then(|()| file.sync_data())
            .map_err(|source| failed("writing", source))?;
        let target = self.path_of(id, true);
        rename(&path, &target).map_err(|source| failed("renaming", source))?;
        if let Some(entry) = self.files().by_id.get_mut(&id) {
            entry.is_complete = true;
        }
        Ok(())
    }

    /// Removes what became of a file that could not be made.
    fn abandon<T>(&self, id: ObjectId, made: Result<T, Error>) -> Result<T, Error> {
        made.inspect_err(|_| {
            drop(fs::remove_file(self.path_of(id, false)));
            self.forget(id);
        })
    }

    fn write_new(
        &self,
        id: ObjectId,
        size: u64,
        length: u64,
        source: Source<'_>,
    ) -> Result<(), Error> {
        let file = self.begin(id, size, length)?;
        let mut checksum = crc32fast::Hasher::new();
        in_chunks(size, |at, buffer| {
            source(at, buffer)?;
            checksum.update(buffer);
            file.write_all_at(buffer, DATA + at)
        })
        .map_err(|source| failure(id, length, &self.path_of(id, false), "writing", source))?;
        let header = Header {
            id,
            size,
            checksum: Some(checksum.finalize()),
        };
        self.finish(id, &file, &header)
    }

    /// The file and its header, which fits.
    fn opened(&self, id: ObjectId, entry: Entry) -> Result<(File, Header, PathBuf), Error> {
        let path = self.path_of(id, entry.is_complete);
        let failed = |source| Error::Io {
            what: "opening",
            path: path.clone(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|errno| failed(errno.into()))
            .map(File::from)?;
        let damaged = |reason| Error::Damaged {
            path: path.clone(),
            reason,
        };
        let mut bytes = [0; HEADER];
        if file.metadata().map_err(failed)?.len() < entry.length {
            return Err(damaged("it is too short"));
        }
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let header = Header::decode(&bytes).map_err(damaged)?;
        if header.id != id || DATA.saturating_add(header.size) > entry.length {
            return Err(damaged("it is of another blob"));
        }
        Ok((file, header, path))
    }
}

impl SpillStore for Directory {
    fn write(&self, id: ObjectId, size: u64, source: Source<'_>) -> Result<(), Error> {
        let length = self.reserve(id, size)?;
        let written = self.write_new(id, size, length, source);
        self.abandon(id, written)
    }

    fn create(&self, id: ObjectId, size: u64) -> Result<File, Error> {
        let length = self.reserve(id, size)?;
        let begun = self.begin(id, size, length);
        self.abandon(id, begun)
    }

    fn complete(&self, id: ObjectId, size: u64) -> Result<(), Error> {
        let entry = self.entry(id)?;
        if entry.is_complete {
            return Ok(());
        }
        let (file, _, path) = self.opened(id, entry)?;
        let mut checksum = crc32fast::Hasher::new();
        in_chunks(size, |at, buffer| {
            file.read_exact_at(buffer, DATA + at)?;
            checksum.update(buffer);
            Ok(())
        })
        .map_err(|source| failure(id, size, &path, "reading", source))?;
        let header = Header {
            id,
            size,
            checksum: Some(checksum.finalize()),
        };
        self.finish(id, &file, &header)
    }

    fn read(&self, id: ObjectId, sink: Sink<'_>) -> Result<(), Error> {
        let entry = self.entry(id)?;
        let (file, header, path) = self.opened(id, entry)?;
        let mut checksum = crc32fast::Hasher::new();
        in_chunks(header.size, |at, buffer| {
            file.read_exact_at(buffer, DATA + at)?;
            checksum.update(buffer);
            sink(at, buffer)
        })
        .map_err(|source| failure(id, header.size, &path, "reading", source))?;
        match header.checksum {
            Some(expected) if expected == checksum.finalize() => Ok(()),
            Some(_) => Err(Error::Damaged {
                path,
                reason: "its data has another checksum",
            }),
            None => Err(Error::Damaged {
                path,
                reason: "it is not complete",
            }),
        }
    }

    fn open(&self, id: ObjectId) -> Result<File, Error> {
        let entry = self.entry(id)?;
        self.opened(id, entry).map(|(file, _, _)| file)
    }

    fn remove(&self, id: ObjectId, removal: Removal) -> Result<(), Error> {
        let entry = self.entry(id)?;
        let path = self.path_of(id, entry.is_complete);
        if removal == Removal::Erase
            && let Ok((file, _, _)) = self.opened(id, entry)
        {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where holes are not known, the space comes back with the last mapping.
            let _ = rustix::fs::fallocate(&file, flags, DATA, entry.length - DATA);
        }
        match fs::remove_file(&path) {
            // Somebody did it for us.
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(|source| Error::Io {
                what: "removing",
                path,
                source,
            })?,
        }
        self.forget(id);
        Ok(())
    }

    fn used(&self) -> u64 {
        self.files().used
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let ids: Vec<ObjectId> = self.files().by_id.keys().copied().collect();
        for id in ids {
            // What stays is removed at the next start.
            drop(self.remove(id, Removal::Keep));
        }
    }
}

/// Takes the disk space of a whole file. Where fallocate(2) is not known, by writing zeros.
fn take_space(file: &File, length: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => in_chunks(length - DATA, |at, buffer| {
            file.write_all_at(buffer, DATA + at)
        }),
        Err(errno) => Err(errno.into()),
    }
}

/// Calls for each part of `size` bytes, with a buffer of its length that is zeros at first.
fn in_chunks(size: u64, mut each: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let most = usize::try_from(size).map_or(CHUNK, |size| size.min(CHUNK));
    let mut buffer = vec![0; most];
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).map_or(most, |left| left.min(most));
        each(at, &mut buffer[..length])?;
        at += length as u64;
    }
    Ok(())
}

/// Gives a file its name, unless another has it.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let at = rustix::fs::CWD;
    match rustix::fs::renameat_with(at, from, at, to, RenameFlags::NOREPLACE) {
        // Not every filesystem has that flag.
        Err(Errno::INVAL | Errno::NOSYS) if !to.exists() => fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

fn failure(id: ObjectId, size: u64, path: &Path, what: &'static str, source: io::Error) -> Error {
    let path = path.to_owned();
    let is_full = matches!(
        source.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    );
    match is_full {
        true => Error::NoSpace { id, size, path },
        false => Error::Io { what, path, source },
    }
}
