//! The kernel's mount table: what is mounted where, and the only hands that change it.
//!
//! Invariant: a bind mount is identified by `(device, root)`, never by the `source` column of
//! mountinfo: two directories of one filesystem, bound to two targets, print the same source.

mod fake;
mod linux;
mod resolve;
mod sys;
mod table;

pub use fake::{Fake, Fault};
pub use linux::{Linux, detach_all_beneath, selinux_enforcing};
pub use table::{MountEntry, MountTable, TableError};

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// A directory that must be reached from a trusted base without a symbolic link on the way.
///
/// Resolved with `openat2(2)` and `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS`
/// from `base`, so nobody who can write below `base` can lead a mount elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    base: PathBuf,
    relative: PathBuf,
}

impl Place {
    /// The place `path`, which must lie strictly beneath `base` and hold no `.` or `..`.
    pub fn beneath(base: &Path, path: &Path) -> Result<Self, Error> {
        let relative = path
            .strip_prefix(base)
            .ok()
            .filter(|relative| {
                let mut components = relative.components().peekable();
                components.peek().is_some() && components.all(|c| matches!(c, Component::Normal(_)))
            })
            .ok_or_else(|| Error::Outside {
                path: path.to_path_buf(),
                base: base.to_path_buf(),
            })?;
        Ok(Self {
            base: base.to_path_buf(),
            relative: relative.to_path_buf(),
        })
    }

    /// The trusted directory.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The way from the base.
    pub fn relative(&self) -> &Path {
        &self.relative
    }

    /// The whole path, for messages and comparisons.
    pub fn path(&self) -> PathBuf {
        self.base.join(&self.relative)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path().display().fmt(f)
    }
}

/// A device number, as mountinfo prints it: `major:minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What a mount shows: the directory `root` of the filesystem on `device`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shown {
    /// The filesystem.
    pub device: Device,
    /// The directory within it, absolute in that filesystem.
    pub root: PathBuf,
}

/// One mount, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// What it shows.
    pub shown: Shown,
    /// Filesystem type with subtype: `ext4`, `fuse.vineyard-fuse`.
    pub fstype: String,
    /// Whether this mount refuses writes.
    pub read_only: bool,
    /// Whether its server still answers: false where a `stat` says ENOTCONN.
    pub alive: bool,
}

/// What is at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No directory entry.
    Nothing,
    /// A directory on which nothing is mounted.
    Directory,
    /// A symbolic link, with its text.
    Symlink(PathBuf),
    /// Some other kind of file.
    Other,
    /// The topmost mount.
    Mount(Mounted),
}

/// How a bind mount shall show its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindOptions {
    /// Refuse writes through this mount. `connect(2)` to a socket still works.
    pub read_only: bool,
}

/// Names of a FUSE mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuseOptions {
    /// The `source` column.
    pub source: String,
    /// The part of the type behind `fuse.`.
    pub subtype: String,
}

/// A FUSE filesystem that exists but is not shown anywhere yet.
#[derive(Debug)]
pub struct DetachedFuse {
    /// `/dev/fuse`, for the server; the kernel's INIT request waits in it.
    pub device: OwnedFd,
    /// The detached mount, for [`Mounter::attach`].
    pub mount: OwnedFd,
}

/// A tmpfs of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TmpfsOptions {
    /// Size limit in bytes.
    pub size: u64,
    /// Permission bits of its root directory.
    pub mode: u32,
}

/// Changes to the mount table, each atomic: seen whole or not at all.
///
/// Directories at a place are made and removed by `create_dir` and `remove_dir`, so that they
/// too are resolved without following links. All calls block only on the kernel; none of them
/// waits for a FUSE server.
pub trait Mounter: Send + Sync + 'static {
    /// What is at `place` itself. Costs the same with one mount present and with thousands.
    fn inspect(&self, place: &Place) -> Result<Found, Error>;

    /// What a bind of the directory `source` would show.
    fn shown(&self, source: &Place) -> Result<Shown, Error>;

    /// Whether the directory at `place` has no entries.
    fn is_empty(&self, place: &Place) -> Result<bool, Error>;

    /// Makes the directory `place` with its missing parents; `true` if it was made now.
    fn create_dir(&self, place: &Place, mode: u32) -> Result<bool, Error>;

    /// Removes the empty directory or the symbolic link at `place`; absent is fine.
    fn remove(&self, place: &Place) -> Result<(), Error>;

    /// Shows the directory `source` at the directory `target` too, not recursively,
    /// `nosuid,nodev,noexec`, in a peer group of its own. Never stacks: a target on which
    /// something is mounted is refused.
    fn bind(&self, source: &Place, target: &Place, options: BindOptions) -> Result<(), Error>;

    /// Makes a FUSE filesystem, read-only and visible to all users, not yet shown anywhere.
    fn fuse(&self, options: &FuseOptions) -> Result<DetachedFuse, Error>;

    /// Shows a detached mount at the directory `target`. What is mounted there now is replaced
    /// from beneath: at no moment is there no mount, and afterwards there is exactly one.
    fn attach(&self, mount: OwnedFd, target: &Place) -> Result<(), Error>;

    /// Mounts a tmpfs at `target`, with transparent huge pages where the kernel has them; one
    /// that is there already keeps what it holds and takes on the size.
    /// Never stacks: a target on which something is mounted is refused.
    fn tmpfs(&self, target: &Place, options: TmpfsOptions) -> Result<(), Error>;

    /// Detaches everything mounted at `target`; how many mounts that were.
    fn unmount(&self, target: &Place) -> Result<usize, Error>;
}

/// Why the mount table could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is not where mounts may be made.
    #[error("{} is not beneath {}", path.display(), base.display())]
    Outside {
        /// The path asked for.
        path: PathBuf,
        /// Where it would have to lie.
        base: PathBuf,
    },
    /// A symbolic link stands on the way.
    #[error("{place} is reached through a symbolic link")]
    SymbolicLink {
        /// The place asked for.
        place: Place,
    },
    /// Something on the way does not exist.
    #[error("{place} does not exist")]
    NotFound {
        /// The place asked for.
        place: Place,
    },
    /// The kernel refuses for lack of rights.
    #[error(
        "no permission for {what}: CAP_SYS_ADMIN in the mount namespace's user namespace is needed"
    )]
    Permission {
        /// The operation and its place.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A mount was to be made where one is already.
    #[error("{place} already shows {} of device {}", found.shown.root.display(), found.shown.device)]
    Taken {
        /// The target.
        place: Place,
        /// What is mounted there.
        found: Box<Mounted>,
    },
    /// Any other answer of the kernel.
    #[error("{what}")]
    Kernel {
        /// The operation and its place.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// What the kernel's answer `source` to the operation `what` means.
    fn answered(what: String, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::PermissionDenied {
            Self::Permission { what, source }
        } else {
            Self::Kernel { what, source }
        }
    }
}
