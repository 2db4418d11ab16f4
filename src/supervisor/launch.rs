//! Starts one child, and knows alone how.
//!
//! A child is our own program again. It gets its end of the channel as descriptor 0, its log
//! lines go where ours go, and every other descriptor of ours is closed on exec. It starts with
//! no signal blocked, in a process group of its own: a Ctrl-C in a terminal reaches the
//! supervisor alone, which then stops its children in order.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::datagram;
use super::message::ChildPlan;

/// Tells a child who its supervisor is, and that it has one.
pub(super) const SUPERVISOR_PID: &str = "VINELET_SUPERVISOR_PID";

/// What `argv[0]` of a child says: the program takes its role from it, so it is the same
/// whatever the file is called.
const ARGV0: &str = "vinelet";

/// A child that runs.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) pid: Pid,
    /// The process itself, whatever becomes of its number.
    pub(super) pidfd: OwnedFd,
    /// Our end of the channel.
    pub(super) channel: OwnedFd,
}

/// Starts `program` as the plan says.
///
/// `posix_spawn(3)` rather than `std::process::Command`: the latter passes our blocked signals on
/// to the child.
pub(super) fn launch(program: &PathBuf, plan: &ChildPlan) -> io::Result<Launched> {
    let (ours, theirs) = datagram::pair()?;

    let mut files = PosixSpawnFileActions::init()?;
    files.add_dup2(theirs.as_raw_fd(), 0)?;
    files.add_dup2(2, 1)?;

    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
            | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
    )?;
    attributes.set_sigmask(&SigSet::empty())?;
    let mut default = SigSet::empty();
    for signal in [
        Signal::SIGPIPE,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        default.add(signal);
    }
    attributes.set_sigdefault(&default)?;
    attributes.set_pgroup(Pid::from_raw(0))?;

    let args = std::iter::once(ARGV0)
        .chain(plan.args.iter().map(String::as_str))
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
    let pid = posix_spawn(program, &files, &attributes, &args, &environment(plan)?)?;
    // Should this fail, the process finds its channel closed and exits.
    let pidfd = pidfd(pid)?;
    Ok(Launched {
        pid,
        pidfd,
        channel: ours,
    })
}

fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(rustix::io::Errno::SRCH)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Our environment, what the plan adds, and who we are.
fn environment(plan: &ChildPlan) -> io::Result<Vec<CString>> {
    let is_ours = |name: &OsString| {
        let replaced = |text: &str| plan.env.contains_key(text) || text == SUPERVISOR_PID;
        !name.to_str().is_some_and(replaced)
    };
    let inherited = std::env::vars_os().filter(|(name, _)| is_ours(name));
    let added = plan
        .env
        .iter()
        .map(|(name, value)| (name.into(), value.into()));
    let pid = (SUPERVISOR_PID.into(), std::process::id().to_string().into());
    let variables =
        inherited
            .chain(added)
            .chain([pid])
            .map(|(name, value): (OsString, OsString)| {
                let mut text = name.into_vec();
                text.push(b'=');
                text.append(&mut value.into_vec());
                CString::new(text)
            });
    Ok(variables.collect::<Result<_, _>>()?)
}
