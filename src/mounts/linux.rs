//! [`Mounter`] by system calls; alone in making mounts.
//!
//! Needs Linux 5.12 (`mount_setattr`). From 6.5 a mount is replaced from beneath, from 6.8 the
//! kernel is asked about one mount instead of being made to print all of them.
//!
//! Invariants:
//! - Every place is opened once, as `O_PATH`, without following a link; all further calls name
//!   that descriptor, so what was looked at is what is changed.
//! - No call waits for a filesystem's server: `O_PATH` neither opens nor revalidates the root of
//!   a mount, and `AT_STATX_DONT_SYNC` answers from the kernel's memory. Whether a FUSE server
//!   is gone is asked by a child, for a bounded time.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use super::resolve::{failed, open, open_base, open_directory, open_how, refused, resolve};
use super::sys::{self, Answer, Asking, MountStat};
use super::{
    BindOptions, DetachedFuse, Device, Error, Found, FuseOptions, MountTable, Mounted, Mounter,
    Place, Shown, TmpfsOptions,
};

/// How long a FUSE server is given to be found alive. One that is gone is known at once; one
/// that does not answer in this time is slow, not dead.
const PROBE: Duration = Duration::from_millis(250);

/// `STATX_MNT_ID_UNIQUE`: the id that is never reused (6.8).
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
/// `STATX_MNT_ID`: the id of mountinfo (5.8).
const STATX_MNT_ID: u32 = 0x1000;

/// Attributes of every mount made here.
const HARMLESS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The mount table of the namespace this process is in.
#[derive(Debug, Default)]
pub struct Linux {
    /// At most one unanswered question per filesystem, so a server that hangs costs one child.
    asked: Mutex<HashMap<Device, Asking>>,
    /// As on a kernel without `statmount`.
    table_only: AtomicBool,
}

/// The kernel's name for a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MountId {
    /// For `statmount(2)`.
    Unique(u64),
    /// As in mountinfo.
    Reused(u64),
}

/// What is behind a descriptor.
struct Look {
    is_mount_root: bool,
    kind: FileType,
    mount: MountId,
}

/// One mount, from whichever source.
struct Facts {
    shown: Shown,
    fstype: String,
    read_only: bool,
    point: PathBuf,
    parent: MountId,
}

impl Linux {
    /// The mount table of this process' namespace.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, asking mountinfo only, as happens by itself on kernels before 6.8.
    pub fn without_statmount() -> Self {
        Self {
            table_only: AtomicBool::new(true),
            ..Self::default()
        }
    }

    fn look(&self, fd: BorrowedFd<'_>, place: &Place) -> Result<Look, Error> {
        let id = if self.table_only.load(Ordering::Relaxed) {
            STATX_MNT_ID
        } else {
            STATX_MNT_ID_UNIQUE
        };
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let ask = |mask| rustix::fs::statx(fd, c"", flags, StatxFlags::from_bits_retain(mask));
        let stat = ask(StatxFlags::TYPE.bits() | id)
            // Another user's FUSE mount without allow_other answers only to who asks for nothing
            // (`fuse_getattr`); the mount's id of mountinfo comes all the same.
            .or_else(|error| {
                if error == Errno::ACCESS {
                    ask(0)
                } else {
                    Err(error)
                }
            })
            .map_err(|error| failed(format!("looking at {place}"), error))?;
        let mount = if stat.stx_mask & STATX_MNT_ID_UNIQUE != 0 {
            MountId::Unique(stat.stx_mnt_id)
        } else {
            MountId::Reused(stat.stx_mnt_id)
        };
        Ok(Look {
            is_mount_root: stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
            mount,
        })
    }

    /// Describes the mount that `fd` is on.
    fn facts(&self, fd: BorrowedFd<'_>, mount: MountId, place: &Place) -> Result<Facts, Error> {
        let reused = match mount {
            MountId::Reused(id) => id,
            MountId::Unique(id) => match sys::statmount(id) {
                Ok(stat) => return from_stat(stat, place),
                // A sandbox that knows statx but not statmount: from now on as on old kernels.
                Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                    self.table_only.store(true, Ordering::Relaxed);
                    return self.facts(fd, self.look(fd, place)?.mount, place);
                }
                Err(error) => {
                    return Err(failed(format!("asking about the mount at {place}"), error));
                }
            },
        };
        let table = table(place)?;
        let entry = table.by_id(reused).ok_or_else(|| Error::Kernel {
            what: format!("finding mount {reused} of {place} in mountinfo"),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Ok(Facts {
            shown: entry.shown.clone(),
            fstype: entry.fstype.clone(),
            read_only: entry.is_read_only(),
            point: entry.target.clone(),
            parent: MountId::Reused(entry.parent),
        })
    }

    /// Whether the server of the filesystem behind `fd` is still there.
    fn is_alive(&self, fd: BorrowedFd<'_>, device: Device) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (asking, bound) = match asked.remove(&device) {
            Some(earlier) => (Ok(earlier), Duration::ZERO),
            None => (Asking::begin(fd), PROBE),
        };
        // What cannot be asked counts as alive: a mount is replaced only for a reason.
        let Ok(asking) = asking else { return true };
        match asking.wait(bound) {
            Some(answer) => answer == Answer::Connected,
            None => {
                asked.insert(device, asking);
                true
            }
        }
    }

    /// Refuses a target on which something is mounted.
    fn require_free(&self, target: BorrowedFd<'_>, place: &Place) -> Result<(), Error> {
        let look = self.look(target, place)?;
        if !look.is_mount_root {
            return Ok(());
        }
        let facts = self.facts(target, look.mount, place)?;
        Err(Error::Taken {
            place: place.clone(),
            found: Box::new(facts.mounted(true)),
        })
    }
}

fn from_stat(stat: MountStat, place: &Place) -> Result<Facts, Error> {
    let mut fstype = stat.fstype;
    let shown = Shown {
        device: stat.device,
        root: stat.root,
    };
    // From 6.8 to 6.12 statmount does not tell the subtype.
    if fstype == "fuse" {
        let table = table(place)?;
        let mut entries = table.entries().iter();
        if let Some(entry) = entries.rfind(|e| e.target == stat.point && e.shown == shown) {
            fstype.clone_from(&entry.fstype);
        }
    }
    Ok(Facts {
        shown,
        fstype,
        read_only: stat.read_only,
        point: stat.point,
        parent: MountId::Unique(stat.parent),
    })
}

impl Facts {
    fn mounted(self, alive: bool) -> Mounted {
        Mounted {
            shown: self.shown,
            fstype: self.fstype,
            read_only: self.read_only,
            alive,
        }
    }
}

impl Mounter for Linux {
    fn inspect(&self, place: &Place) -> Result<Found, Error> {
        let fd = match open(place) {
            Ok(fd) => fd,
            Err(Error::NotFound { .. }) => return Ok(Found::Nothing),
            Err(other) => return Err(other),
        };
        let look = self.look(fd.as_fd(), place)?;
        if look.is_mount_root {
            let facts = self.facts(fd.as_fd(), look.mount, place)?;
            let has_server = facts.fstype == "fuse" || facts.fstype.starts_with("fuse.");
            let alive = !has_server || self.is_alive(fd.as_fd(), facts.shown.device);
            return Ok(Found::Mount(facts.mounted(alive)));
        }
        Ok(match look.kind {
            FileType::Directory => Found::Directory,
            FileType::Symlink => {
                let text = rustix::fs::readlinkat(&fd, c"", Vec::new())
                    .map_err(|error| failed(format!("reading the link {place}"), error))?;
                Found::Symlink(PathBuf::from(OsString::from_vec(text.into_bytes())))
            }
            FileType::RegularFile
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => Found::Other,
        })
    }

    fn shown(&self, source: &Place) -> Result<Shown, Error> {
        let fd = open_directory(source)?;
        let look = self.look(fd.as_fd(), source)?;
        let facts = self.facts(fd.as_fd(), look.mount, source)?;
        if look.is_mount_root {
            return Ok(facts.shown);
        }
        // The kernel's own spelling of where the directory is, so that a base with links in it
        // compares equal to the mount point.
        let path = fs::read_link(link_of(&fd)).map_err(|error| Error::Kernel {
            what: format!("reading the path of {source}"),
            source: error,
        })?;
        let below = path.strip_prefix(&facts.point).map_err(|_| Error::Kernel {
            what: format!(
                "placing {source} in the filesystem mounted at {}",
                facts.point.display()
            ),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Ok(Shown {
            device: facts.shown.device,
            root: facts.shown.root.join(below),
        })
    }

    fn is_empty(&self, place: &Place) -> Result<bool, Error> {
        let fd = open_how(place, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let read = |error| failed(format!("reading the directory {place}"), error);
        for entry in Dir::new(fd).map_err(read)? {
            let entry = entry.map_err(read)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn create_dir(&self, place: &Place, mode: u32) -> Result<bool, Error> {
        let mode = Mode::from_raw_mode(mode);
        let making = |error| failed(format!("making the directory {place}"), error);
        let mut directory = open_base(place)?;
        let mut is_new = false;
        for component in place.relative().components() {
            let name = component.as_os_str();
            is_new = match rustix::fs::mkdirat(&directory, name, mode) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(error) => return Err(making(error)),
            };
            if is_new {
                // Against the umask.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&directory, name, flags, Mode::empty());
                let made = made.map_err(making)?;
                rustix::fs::fchmod(&made, mode).map_err(making)?;
            }
            directory = resolve(
                directory.as_fd(),
                Path::new(name),
                OFlags::PATH | OFlags::DIRECTORY,
            )
            .map_err(|error| refused(place, format!("making the directory {place}"), error))?;
        }
        Ok(is_new)
    }

    fn remove(&self, place: &Place) -> Result<(), Error> {
        let Some(name) = place.relative().file_name() else {
            return Ok(());
        };
        let removing = |error| failed(format!("removing {place}"), error);
        let above = place.relative().parent().unwrap_or(Path::new(""));
        let base = match open_base(place) {
            Err(Error::NotFound { .. }) => return Ok(()),
            base => base?,
        };
        let directory = if above.as_os_str().is_empty() {
            base
        } else {
            match resolve(base.as_fd(), above, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(refused(place, format!("removing {place}"), error)),
            }
        };
        match rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR) => {}
            Err(error) => return Err(removing(error)),
        }
        let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let kind = stat.map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind.map_err(removing)? {
            FileType::Symlink => match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err(removing(error)),
            },
            FileType::RegularFile
            | FileType::Directory
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => Err(removing(Errno::NOTDIR)),
        }
    }

    fn bind(&self, source: &Place, target: &Place, options: BindOptions) -> Result<(), Error> {
        let what = || format!("binding {source} onto {target}");
        let from = open_directory(source)?;
        let to = open_directory(target)?;
        self.require_free(to.as_fd(), target)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&from, c"", flags).map_err(|e| failed(what(), e))?;
        let harmless = sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
        // The source may be a read-only mount itself.
        let (set, clear) = match options.read_only {
            true => (harmless | sys::ATTR_RDONLY, 0),
            false => (harmless, sys::ATTR_RDONLY),
        };
        // Out of the source's peer group first, or the clone would receive, at the same place
        // below itself, the mount that it is about to become; then shared anew, so that it
        // reaches peers of the target's parent, the host among them.
        sys::mount_setattr(tree.as_fd(), set, clear, sys::PROPAGATION_PRIVATE)
            .and_then(|()| sys::mount_setattr(tree.as_fd(), 0, 0, sys::PROPAGATION_SHARED))
            .map_err(|e| failed(what(), e))?;
        place_mount(tree.as_fd(), to.as_fd(), false).map_err(|e| failed(what(), e))
    }

    fn fuse(&self, options: &FuseOptions) -> Result<DetachedFuse, Error> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::openat(CWD, c"/dev/fuse", flags, Mode::empty())
            .map_err(|error| failed("opening /dev/fuse".to_owned(), error))?;
        let make = || {
            let context = rustix::mount::fsopen(c"fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
            let set = |key: &str, value: &str| {
                rustix::mount::fsconfig_set_string(context.as_fd(), key, value)
            };
            set("source", &options.source)?;
            set("subtype", &options.subtype)?;
            set("fd", &device.as_raw_fd().to_string())?;
            set("rootmode", "40755")?;
            set("user_id", &rustix::process::geteuid().as_raw().to_string())?;
            set("group_id", &rustix::process::getegid().as_raw().to_string())?;
            for flag in ["allow_other", "default_permissions", "ro"] {
                rustix::mount::fsconfig_set_flag(context.as_fd(), flag)?;
            }
            rustix::mount::fsconfig_create(context.as_fd())?;
            let attributes = HARMLESS | MountAttrFlags::MOUNT_ATTR_RDONLY;
            rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        let what = || format!("making a filesystem of type fuse.{}", options.subtype);
        let mount = make().map_err(|error| failed(what(), error))?;
        Ok(DetachedFuse { device, mount })
    }

    fn attach(&self, mount: OwnedFd, target: &Place) -> Result<(), Error> {
        let what = || format!("mounting onto {target}");
        let fd = loop {
            let fd = open_directory(target)?;
            let look = self.look(fd.as_fd(), target)?;
            if !look.is_mount_root {
                return place_mount(mount.as_fd(), fd.as_fd(), false)
                    .map_err(|error| failed(what(), error));
            }
            // Of several mounts here all but the lowest go now: each uncovers another, and the
            // lowest alone can be replaced from beneath.
            if self.is_lowest(fd.as_fd(), look.mount, target)? {
                break fd;
            }
            detach(&fd).map_err(|error| failed(what(), error))?;
        };
        match place_mount(mount.as_fd(), fd.as_fd(), true) {
            Ok(()) => detach(&fd).map_err(|error| failed(what(), error)),
            // Before 6.5, and where propagation forbids it: EINVAL. There is then a moment
            // without a mount, and no way around it.
            Err(Errno::INVAL) => {
                detach(&fd).map_err(|error| failed(what(), error))?;
                let bare = open_directory(target)?;
                place_mount(mount.as_fd(), bare.as_fd(), false)
                    .map_err(|error| failed(what(), error))
            }
            Err(error) => Err(failed(what(), error)),
        }
    }

    fn tmpfs(&self, target: &Place, options: TmpfsOptions) -> Result<(), Error> {
        let what = || format!("mounting a tmpfs of {} bytes at {target}", options.size);
        let to = open_directory(target)?;
        let look = self.look(to.as_fd(), target)?;
        if look.is_mount_root && self.facts(to.as_fd(), look.mount, target)?.fstype == "tmpfs" {
            return resize(to.as_fd(), options.size).map_err(|error| failed(what(), error));
        }
        self.require_free(to.as_fd(), target)?;
        let make = |with_huge_pages: bool| {
            let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            let set = |key: &str, value: &str| {
                rustix::mount::fsconfig_set_string(context.as_fd(), key, value)
            };
            set("source", "vinelet")?;
            set("size", &options.size.to_string())?;
            set("mode", &format!("{:o}", options.mode))?;
            if with_huge_pages {
                set("huge", "within_size")?;
            }
            rustix::mount::fsconfig_create(context.as_fd())?;
            rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, HARMLESS)
        };
        // A kernel without transparent huge pages refuses the option.
        let tree = make(true)
            .or_else(|error| {
                if error == Errno::INVAL {
                    make(false)
                } else {
                    Err(error)
                }
            })
            .map_err(|error| failed(what(), error))?;
        place_mount(tree.as_fd(), to.as_fd(), false).map_err(|error| failed(what(), error))
    }

    fn unmount(&self, target: &Place) -> Result<usize, Error> {
        let mut detached = 0;
        loop {
            let fd = match open(target) {
                Ok(fd) => fd,
                Err(Error::NotFound { .. }) => return Ok(detached),
                Err(other) => return Err(other),
            };
            if !self.look(fd.as_fd(), target)?.is_mount_root {
                return Ok(detached);
            }
            detach(&fd).map_err(|error| failed(format!("unmounting {target}"), error))?;
            detached += 1;
        }
    }
}

impl Linux {
    /// Whether the topmost mount at `place` lies on the directory itself, not on another mount.
    fn is_lowest(&self, fd: BorrowedFd<'_>, mount: MountId, place: &Place) -> Result<bool, Error> {
        let parent = self.facts(fd, mount, place)?.parent;
        let above = place.relative().parent().unwrap_or(Path::new(""));
        let base = open_base(place)?;
        let directory = if above.as_os_str().is_empty() {
            base
        } else {
            resolve(base.as_fd(), above, OFlags::PATH | OFlags::DIRECTORY)
                .map_err(|error| refused(place, format!("looking at {place}"), error))?
        };
        Ok(self.look(directory.as_fd(), place)?.mount == parent)
    }
}

/// Shows the detached mount at, or beneath the mount at, the directory.
fn place_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>, beneath: bool) -> Result<(), Errno> {
    let mut flags =
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    if beneath {
        flags |= MoveMountFlags::MOVE_MOUNT_BENEATH;
    }
    rustix::mount::move_mount(mount, c"", target, c"", flags)
}

/// Gives the tmpfs whose root `fd` is another size limit; what it holds stays.
fn resize(fd: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = rustix::mount::fspick(fd, c"", flags)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "size", size.to_string())?;
    rustix::mount::fsconfig_reconfigure(context.as_fd())
}

/// Detaches the mount whose root `fd` is, with what is mounted below it. Through the descriptor,
/// not by path: nobody can put another mount in its place meanwhile.
fn detach(fd: &OwnedFd) -> Result<(), Errno> {
    rustix::mount::unmount(link_of(fd), UnmountFlags::DETACH)
}

fn link_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn table(place: &Place) -> Result<MountTable, Error> {
    let what = || format!("reading mountinfo for {place}");
    // The thread's: mount namespaces belong to threads.
    let text = fs::read("/proc/thread-self/mountinfo").map_err(|source| Error::Kernel {
        what: what(),
        source,
    })?;
    MountTable::parse(&text).map_err(|error| Error::Kernel {
        what: what(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

/// Whether SELinux is enforcing here. Container runtimes then relabel a volume's directory before
/// they start a container, which a read-only mount refuses with EROFS.
pub fn selinux_enforcing() -> bool {
    fs::read("/sys/fs/selinux/enforce").is_ok_and(|text| text.starts_with(b"1"))
}

/// Detaches every mount below `dir`, and on it, as this mount namespace shows them; how many
/// that were. For the end of `vinelet dev`: it reads the whole mount table.
pub fn detach_all_beneath(dir: &Path) -> Result<usize, Error> {
    let text = fs::read("/proc/thread-self/mountinfo").map_err(|source| Error::Kernel {
        what: "reading mountinfo".to_owned(),
        source,
    })?;
    let table = MountTable::parse(&text).map_err(|error| Error::Kernel {
        what: "reading mountinfo".to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })?;
    let mut detached = 0;
    // What was mounted last lies on top.
    for entry in table.entries().iter().rev() {
        if entry.target.starts_with(dir) {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            rustix::mount::unmount(&entry.target, flags)
                .map_err(|error| failed(format!("unmounting {}", entry.target.display()), error))?;
            detached += 1;
        }
    }
    Ok(detached)
}
