//! The arena: one file of shared memory, which clients map whole.
//!
//! The server never maps it: bytes go in and out by pread(2) and pwrite(2), so a client that
//! truncates a file it was given can make no process but its own fault.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};

/// Name of the arena in its directory.
const NAME: &str = "arena";
/// Its name until it is complete.
const UNFINISHED: &str = "arena.new";
/// Holes are punched in whole pages; 64 KiB would do for every page size there is, but a
/// smaller hole on a kernel with larger pages is merely zeroed.
const PAGE: u64 = 4096;

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be created under its temporary name.
    #[error("creating {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no anonymous memory.
    #[error("creating an anonymous file (memfd)")]
    Memfd(#[source] io::Error),
    /// The file cannot be as long as needed.
    #[error("extending the arena to {size} bytes")]
    Extend {
        /// Bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// The pages cannot be taken in advance.
    #[error("reserving {size} bytes for the arena")]
    Reserve {
        /// Bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// The file cannot take its place.
    #[error("renaming {from} to {to}")]
    Rename {
        /// The temporary name.
        from: PathBuf,
        /// The name.
        to: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The arena file. It is closed with the value; a named one stays in its directory.
#[derive(Debug)]
pub struct Segment {
    file: File,
    size: u64,
}

impl Segment {
    /// A new arena of `size` bytes, all zero and sparse.
    ///
    /// In `dir` it takes the place of a predecessor's by rename(2): whoever has the old one
    /// mapped keeps it. Without `dir` it has no name, and a size that clients cannot change.
    pub fn create(dir: Option<&Path>, size: u64) -> Result<Self, Error> {
        let extend = |file: &File| {
            file.set_len(size)
                .map_err(|source| Error::Extend { size, source })
        };
        let file = match dir {
            None => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
                let file = rustix::fs::memfd_create("vinelet-arena", flags)
                    .map(File::from)
                    .map_err(|errno| Error::Memfd(errno.into()))?;
                extend(&file)?;
                let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
                rustix::fs::fcntl_add_seals(&file, seals)
                    .map_err(|errno| Error::Memfd(errno.into()))?;
                file
            }
            Some(dir) => {
                let from = dir.join(UNFINISHED);
                let to = dir.join(NAME);
                let file = create_private(&from).map_err(|source| Error::Create {
                    path: from.clone(),
                    source,
                })?;
                extend(&file)?;
                std::fs::rename(&from, &to).map_err(|source| Error::Rename { from, to, source })?;
                file
            }
        };
        Ok(Self { file, size })
    }

    /// Takes all pages now, so that nobody runs out of memory later.
    pub fn reserve(&self) -> Result<(), Error> {
        let size = self.size;
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, size).map_err(|errno| {
            Error::Reserve {
                size,
                source: errno.into(),
            }
        })
    }

    /// The file, for clients to map `[0, size)`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the pages it has.
    pub fn resident(&self) -> io::Result<u64> {
        // st_blocks counts units of 512 bytes, whatever the block size: stat(3type).
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Fills `buffer` from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Puts `bytes` at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Gives the whole pages within `range` back to the system; they read as zeros from now on.
    /// What is left of `range` at either end stays as it is.
    pub fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end - range.end % PAGE;
        if start >= end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(
            &self.file,
            flags,
            start,
            end - start,
        )?)
    }
}

/// A new file that nobody else may open, whatever the umask is and whatever a killed
/// predecessor left there.
fn create_private(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        Ok(()) | Err(_) => {}
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_predecessors_arena_is_replaced_and_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let old = Segment::create(Some(dir.path()), 8192).unwrap();
        old.write(100, b"old").unwrap();
        std::fs::write(dir.path().join(UNFINISHED), "left by a kill").unwrap();

        let new = Segment::create(Some(dir.path()), 4096).unwrap();
        let mut bytes = [0; 3];
        old.read(100, &mut bytes).unwrap();
        assert_eq!(&bytes, b"old");
        new.read(100, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);

        let names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap())
            .collect();
        assert_eq!(names.len(), 1);
        let metadata = names[0].metadata().unwrap();
        assert_eq!(names[0].file_name(), NAME);
        assert_eq!(
            (metadata.len(), metadata.permissions().mode() & 0o7777),
            (4096, 0o600)
        );
    }

    #[test]
    fn an_anonymous_arena_keeps_its_size_and_can_be_punched() {
        let segment = Segment::create(None, 1 << 20).unwrap();
        segment.write(0, &[7; 3 * 4096]).unwrap();
        let before = segment.resident().unwrap();
        segment.punch(1..2 * 4096 + 1).unwrap();
        assert_eq!(before - segment.resident().unwrap(), 4096);
        let mut bytes = [0; 3 * 4096];
        segment.read(0, &mut bytes).unwrap();
        assert!(bytes[..4096].iter().chain(&bytes[8192..]).all(|&b| b == 7));
        assert!(bytes[4096..8192].iter().all(|&b| b == 0));
        segment.file.set_len(0).unwrap_err();
        segment.punch(10..20).unwrap();
    }

    #[test]
    fn a_reserved_arena_has_all_its_pages() {
        let segment = Segment::create(None, 1 << 20).unwrap();
        segment.reserve().unwrap();
        assert_eq!(segment.resident().unwrap(), 1 << 20);
    }

    #[test]
    fn what_is_wrong_with_the_directory_is_said() {
        let missing = Segment::create(Some(Path::new("/nonexistent/shm")), 4096).unwrap_err();
        assert_eq!(missing.to_string(), "creating /nonexistent/shm/arena.new");
        let endless = Segment::create(None, u64::MAX).unwrap_err();
        assert_eq!(
            endless.to_string(),
            "extending the arena to 18446744073709551615 bytes"
        );
    }
}
