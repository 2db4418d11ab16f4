//! The system calls that no crate here wraps: `mount_setattr(2)`, `statmount(2)`, and a `stat`
//! asked by a process that may be left behind.
//!
//! Alone in this room in using `unsafe`; nothing here decides anything.

#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::Device;

/// `MOUNT_ATTR_*` of `linux/mount.h`.
pub(super) const ATTR_RDONLY: u64 = 1;
pub(super) const ATTR_NOSUID: u64 = 2;
pub(super) const ATTR_NODEV: u64 = 4;
pub(super) const ATTR_NOEXEC: u64 = 8;

/// `MS_PRIVATE` and `MS_SHARED` as `mount_setattr(2)` takes them in `propagation`.
pub(super) const PROPAGATION_PRIVATE: u64 = libc::MS_PRIVATE;
pub(super) const PROPAGATION_SHARED: u64 = libc::MS_SHARED;

/// `struct mount_attr`, first version.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets and clears attributes, and sets the propagation, of the mount that `fd` is the root of.
pub(super) fn mount_setattr(
    fd: BorrowedFd<'_>,
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
) -> io::Result<()> {
    let attr = MountAttr {
        attr_set,
        attr_clr,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated literal, `attr` outlives the call, and its size is
    // passed along; the kernel only reads both.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What `statmount(2)` says of one mount.
#[derive(Clone, Debug)]
pub(super) struct MountStat {
    /// Unique id of the mount it is mounted on.
    pub(super) parent: u64,
    pub(super) device: Device,
    pub(super) read_only: bool,
    pub(super) root: PathBuf,
    pub(super) point: PathBuf,
    /// With the subtype, where the kernel tells it (6.13).
    pub(super) fstype: String,
}

/// The same number on every architecture that came after the unification of the tables (6.8).
const SYS_STATMOUNT: libc::c_long = 457;
/// The fixed part of `struct statmount`; the strings follow it.
const STATMOUNT_STRINGS: usize = 512;
const STATMOUNT_SB_BASIC: u64 = 0x1;
const STATMOUNT_MNT_BASIC: u64 = 0x2;
const STATMOUNT_MNT_ROOT: u64 = 0x8;
const STATMOUNT_MNT_POINT: u64 = 0x10;
const STATMOUNT_FS_TYPE: u64 = 0x20;
const STATMOUNT_FS_SUBTYPE: u64 = 0x100;

/// `struct mnt_id_req`, first version.
#[repr(C)]
struct MntIdReq {
    size: u32,
    spare: u32,
    mnt_id: u64,
    param: u64,
}

/// Describes the mount with the unique id `id`.
pub(super) fn statmount(id: u64) -> io::Result<MountStat> {
    let request = MntIdReq {
        size: size_of::<MntIdReq>() as u32,
        spare: 0,
        mnt_id: id,
        param: STATMOUNT_SB_BASIC
            | STATMOUNT_MNT_BASIC
            | STATMOUNT_MNT_ROOT
            | STATMOUNT_MNT_POINT
            | STATMOUNT_FS_TYPE
            | STATMOUNT_FS_SUBTYPE,
    };
    let mut buffer = vec![0_u8; STATMOUNT_STRINGS + 1536];
    loop {
        // SAFETY: `request` carries its own size and is only read; the kernel writes at most
        // `buffer.len()` bytes into `buffer`, for which any byte is a valid value.
        let answer = unsafe {
            libc::syscall(
                SYS_STATMOUNT,
                &raw const request,
                buffer.as_mut_ptr(),
                buffer.len(),
                0,
            )
        };
        if answer == 0 {
            return Ok(understand(&buffer));
        }
        let error = io::Error::last_os_error();
        // Two paths of PATH_MAX, fourfold when escaped, and short words: 64 KiB hold them.
        if error.raw_os_error() == Some(libc::EOVERFLOW) && buffer.len() < 64 * 1024 {
            let larger = buffer.len() * 4;
            buffer.resize(larger, 0);
            continue;
        }
        return Err(error);
    }
}

/// Reads `struct statmount` by its offsets in `linux/mount.h`.
fn understand(buffer: &[u8]) -> MountStat {
    let u32_at = |at: usize| {
        buffer
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    let u64_at = |at: usize| {
        buffer
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_ne_bytes)
    };
    let mask = u64_at(8);
    let text_at = |bit: u64, at: usize| -> Vec<u8> {
        if mask & bit == 0 {
            return Vec::new();
        }
        let from = STATMOUNT_STRINGS.saturating_add(u32_at(at) as usize);
        let rest = buffer.get(from..).unwrap_or_default();
        rest.iter().copied().take_while(|&b| b != 0).collect()
    };
    let path_at = |bit, at| PathBuf::from(OsString::from_vec(text_at(bit, at)));
    let mut fstype = String::from_utf8_lossy(&text_at(STATMOUNT_FS_TYPE, 36)).into_owned();
    let subtype = text_at(STATMOUNT_FS_SUBTYPE, 120);
    if !subtype.is_empty() {
        fstype.push('.');
        fstype.push_str(&String::from_utf8_lossy(&subtype));
    }
    MountStat {
        parent: u64_at(48),
        device: Device {
            major: u32_at(16),
            minor: u32_at(20),
        },
        read_only: u64_at(64) & ATTR_RDONLY != 0,
        root: path_at(STATMOUNT_MNT_ROOT, 104),
        point: path_at(STATMOUNT_MNT_POINT, 108),
        fstype,
    }
}

/// A process that asks a filesystem's server one question.
///
/// Asking in a thread would be wrong: a thread whose request the server has read cannot be
/// killed before the answer, and with it this whole process could not, and where this process is
/// (or keeps alive) that server, nobody ever would answer. The child holds no descriptor but the
/// one it asks about.
#[derive(Debug)]
pub(super) struct Asking(OwnedFd);

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The kernel knows that the server is gone: `ENOTCONN`.
    Disconnected,
    /// Anything else.
    Connected,
}

/// Exit code of the child for `ENOTCONN`.
const DISCONNECTED: i32 = 107;

impl Asking {
    /// Asks for the attributes of `fd`, past every cache.
    pub(super) fn begin(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let asked = fd.as_raw_fd();
        let mut pidfd: libc::c_int = -1;
        // SAFETY: a new process with a copy of this memory and, as exit signal, none: it is
        // invisible to others' `wait` and raises no SIGCHLD. Between here and `_exit` it makes
        // system calls only, so locks that other threads held at the fork do not matter. The
        // `statx` buffer is its own and large enough; `pidfd` is written before the fork returns.
        unsafe {
            let child = libc::syscall(libc::SYS_clone, libc::CLONE_PIDFD, 0, &raw mut pidfd, 0, 0);
            if child == 0 {
                libc::syscall(libc::SYS_dup3, asked, 0, libc::O_CLOEXEC);
                libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
                let mut stat: libc::statx = std::mem::zeroed();
                let answer = libc::syscall(
                    libc::SYS_statx,
                    0,
                    c"".as_ptr(),
                    libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC,
                    libc::STATX_BASIC_STATS,
                    &raw mut stat,
                );
                let gone = answer != 0 && *libc::__errno_location() == libc::ENOTCONN;
                libc::syscall(libc::SYS_exit_group, if gone { DISCONNECTED } else { 0 });
                std::process::abort();
            }
            if child < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(pidfd)))
        }
    }

    /// The answer, if it comes within `bound`.
    pub(super) fn wait(&self, bound: Duration) -> Option<Answer> {
        let timeout = PollTimeout::try_from(bound).unwrap_or(PollTimeout::ZERO);
        let mut polled = [PollFd::new(
            std::os::fd::AsFd::as_fd(&self.0),
            PollFlags::POLLIN,
        )];
        // An interrupted poll counts as no answer yet: the question stays asked.
        if !matches!(poll(&mut polled, timeout), Ok(1..)) {
            return None;
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        match waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(&self.0)), flags) {
            Ok(WaitStatus::Exited(_, DISCONNECTED)) => Some(Answer::Disconnected),
            _ => Some(Answer::Connected),
        }
    }
}
