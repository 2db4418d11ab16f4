//! Blobs on disk.
//!
//! [`SpillStore`] keeps the bytes of blobs by id. Which blobs those are and when they move is the
//! store's business. A file comes about in one of two ways: [`SpillStore::write`] copies a blob
//! out of memory, or [`SpillStore::create`] makes one that a client fills through a mapping and
//! [`SpillStore::complete`] ends.
//!
//! Always true: a blob's data begins [`DATA`] bytes into its file and does not change once it is
//! complete; a file that was opened stays readable through its descriptor and its mappings,
//! whatever becomes of its name.
//!
//! ```text
//! format.rs    ● header and checksum
//! directory.rs   one file per blob
//! ```

mod directory;
mod format;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::PathBuf;

pub use self::directory::Directory;
pub use self::format::DATA;
use crate::shard::ids::ObjectId;

/// Fills a buffer with a blob's bytes from an offset on.
pub type Source<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>;

/// Takes a blob's bytes that belong at an offset.
pub type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> io::Result<()>;

/// Where spilled blobs are. Every call may take as long as a disk does.
pub trait SpillStore: Debug + Send + Sync {
    /// Puts a whole blob on disk; when this returns it is safe there. On an error there is
    /// nothing of it.
    fn write(&self, id: ObjectId, size: u64, source: Source<'_>) -> Result<(), Error>;

    /// A new file of zeros for a blob, all of whose space is taken: who fills it through a
    /// mapping does not run out of disk.
    fn create(&self, id: ObjectId, size: u64) -> Result<File, Error>;

    /// The first `size` bytes of what [`Self::create`] made are the blob, and safe on disk.
    fn complete(&self, id: ObjectId, size: u64) -> Result<(), Error>;

    /// Hands over all bytes of a complete blob, in order; an error where they are not those that
    /// were written. What came before an error is worth nothing.
    fn read(&self, id: ObjectId, sink: Sink<'_>) -> Result<(), Error>;

    /// A blob's file, to be read, written and mapped.
    fn open(&self, id: ObjectId) -> Result<File, Error>;

    /// Forgets a blob and removes its file.
    fn remove(&self, id: ObjectId, removal: Removal) -> Result<(), Error>;

    /// Bytes that all files have together.
    fn used(&self) -> u64;
}

/// What becomes of the bytes that somebody still has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// They stay, and take disk space, until nobody has them mapped.
    Keep,
    /// They read as zeros, and their space is free at once.
    Erase,
}

/// Why a blob is not on disk, or cannot be had from there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be used.
    #[error("using {path} for spilled blobs")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process spills there.
    #[error("{0} is used for spilled blobs by another process")]
    Taken(PathBuf),
    /// More than the quota allows.
    #[error("{size} bytes of blob {id} exceed the quota of {quota}, {used} of which are used")]
    Quota {
        /// The blob.
        id: ObjectId,
        /// Bytes of its file.
        size: u64,
        /// The limit for all files.
        quota: u64,
        /// What they have.
        used: u64,
    },
    /// The disk is full.
    #[error("the disk has no space for {size} bytes of blob {id} in {path}")]
    NoSpace {
        /// The blob.
        id: ObjectId,
        /// Bytes of its file.
        size: u64,
        /// The file.
        path: PathBuf,
    },
    /// The disk, or the memory that bytes come from or go to, failed.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that shows.
        reason: &'static str,
    },
    /// There is no such blob here.
    #[error("blob {0} is not on disk")]
    Unknown(ObjectId),
    /// There is one already.
    #[error("blob {0} is on disk already")]
    Exists(ObjectId),
}
