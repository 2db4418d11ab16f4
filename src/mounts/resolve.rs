//! From a [`Place`] to a descriptor, without following a link, and what it means where that
//! fails.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Error, Place};

/// Opens what is at `place`, as a name only: nothing is asked of the filesystem there. A link at
/// the very end is opened as such, openat2(2).
pub(super) fn open(place: &Place) -> Result<OwnedFd, Error> {
    open_how(place, OFlags::PATH | OFlags::NOFOLLOW)
}

/// The same for a directory; a link at the end is a link on the way.
pub(super) fn open_directory(place: &Place) -> Result<OwnedFd, Error> {
    open_how(place, OFlags::PATH | OFlags::DIRECTORY)
}

pub(super) fn open_how(place: &Place, flags: OFlags) -> Result<OwnedFd, Error> {
    let base = open_base(place)?;
    resolve(base.as_fd(), place.relative(), flags)
        .map_err(|error| refused(place, format!("opening {place}"), error))
}

pub(super) fn open_base(place: &Place) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, place.base(), flags, Mode::empty())
        .map_err(|error| refused(place, format!("opening {}", place.base().display()), error))
}

pub(super) fn resolve(
    base: BorrowedFd<'_>,
    relative: &Path,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: somebody renamed or mounted meanwhile and the kernel could not be sure, openat2(2).
    // That many times in a row it is not chance.
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(base, relative, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            Err(Errno::AGAIN) if attempts < 128 => attempts += 1,
            outcome => return outcome,
        }
    }
}

/// What a failed resolution of `place` means.
pub(super) fn refused(place: &Place, what: String, error: Errno) -> Error {
    match error {
        Errno::NOENT => Error::NotFound {
            place: place.clone(),
        },
        // RESOLVE_NO_SYMLINKS.
        Errno::LOOP => Error::SymbolicLink {
            place: place.clone(),
        },
        other => failed(what, other),
    }
}

pub(super) fn failed(what: String, error: impl Into<io::Error>) -> Error {
    Error::answered(what, error.into())
}
