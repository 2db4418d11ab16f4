//! The socketpair between supervisor and child: the child's end. `peer` is the other one.
//!
//! ```text
//! child                         supervisor
//!   ◄─ Deposit + descriptors ─────      what an earlier process of this name deposited
//!   ◄─ Begin ─────────────────────
//!   ── Deposit + descriptors ────►      at any time
//!   ── State ────────────────────►
//!   ── Want ─────────────────────►      the node only
//!   ◄─ Report ────────────────────      the node only, at each change
//!   ◄─ Stop ──────────────────────
//! ```

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use super::datagram::{self, Received};
use super::launch::SUPERVISOR_PID;
use super::message::{
    ChildPlan, ChildReport, MAX_DEPOSITS, Malformed, ToChild, ToSupervisor, Unsendable,
};
use crate::readiness::Readiness;

/// How long a child waits for the supervisor to say `Begin`, or to read. The supervisor never
/// blocks, so a longer silence means that it is stopped or that the machine is.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a child hears while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromSupervisor {
    /// Drain and exit; SIGTERM follows, then SIGKILL.
    Stop,
    /// For the node: how all other children fare.
    Report(Vec<ChildReport>),
}

/// Something that outlived its last user.
#[derive(Debug)]
pub struct Deposit {
    /// The name it was deposited under.
    pub name: String,
    /// The bytes it was deposited with.
    pub context: Vec<u8>,
    /// Its descriptors, in their order.
    pub fds: Vec<OwnedFd>,
}

/// What a supervised process begins with.
#[derive(Debug)]
pub struct Inherited {
    /// The way to the supervisor.
    pub channel: ChildChannel,
    /// What earlier processes of this child's name deposited. It stays deposited.
    pub deposits: Vec<Deposit>,
}

/// A child's end; clones are the same end.
#[derive(Clone, Debug)]
pub struct ChildChannel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    socket: OwnedFd,
    /// The same socket once more, registered with the runtime by the first call of `next`. It is
    /// no datagram socket, but all that is asked of this type is when there is something to read.
    reader: OnceLock<UnixDatagram>,
    /// The names deposited, to refuse here what would cost this process its life there.
    deposited: Mutex<BTreeSet<String>>,
}

/// Why a supervised process cannot begin. It should exit.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// The environment says so, but descriptor 0 is something else.
    #[error("{SUPERVISOR_PID} is set, but standard input is not a supervisor's channel")]
    NotAChannel,
    /// The environment names no process.
    #[error("{SUPERVISOR_PID}={0:?} is not a process id")]
    Pid(String),
    /// The supervisor died first.
    #[error("the supervisor, pid {expected}, is gone: the parent is {found}")]
    Orphaned {
        /// Who started us.
        expected: i32,
        /// Whose child we are.
        found: i32,
    },
    /// The supervisor closed the channel, or said nothing for too long.
    #[error("the supervisor did not finish handing over the deposits")]
    Unfinished,
    /// The supervisor speaks another language.
    #[error("the supervisor said what cannot be understood")]
    Malformed(#[source] Malformed),
    /// The kernel refuses.
    #[error("{what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Why the supervisor was not told.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// It would not accept it.
    #[error(transparent)]
    Refused(#[from] Unsendable),
    /// It is gone, or does not read.
    #[error("the supervisor cannot be reached")]
    Unreachable(#[source] io::Error),
}

/// Makes the kernel kill this process when its supervisor ends, and sees that it has not ended
/// before. To be called again by a child that gives up root: the kernel forgets it then
/// (prctl(2), PR_SET_PDEATHSIG).
pub fn die_with_supervisor() -> Result<(), InheritError> {
    let Some(text) = std::env::var_os(SUPERVISOR_PID) else {
        return Ok(());
    };
    let expected: i32 = text
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| InheritError::Pid(text.to_string_lossy().into_owned()))?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| kernel("asking to die with the supervisor", errno))?;
    match nix::unistd::getppid().as_raw() {
        found if found == expected => Ok(()),
        found => Err(InheritError::Orphaned { expected, found }),
    }
}

fn kernel(what: &'static str, source: impl Into<io::Error>) -> InheritError {
    InheritError::Kernel {
        what,
        source: source.into(),
    }
}

impl ChildChannel {
    /// Takes over what the supervisor gave this process; `None` where there is no supervisor.
    ///
    /// To be called once, at the beginning, on the main thread, before any runtime: it waits for
    /// the deposits, and leaves `/dev/null` as standard input.
    pub fn inherited() -> Result<Option<Inherited>, InheritError> {
        if std::env::var_os(SUPERVISOR_PID).is_none() {
            return Ok(None);
        }
        die_with_supervisor()?;
        // The program is started by way of /proc/self/exe, so `ps` and `top` would say `exe`.
        nix::sys::prctl::set_name(c"vinelet")
            .map_err(|errno| kernel("naming the process", errno))?;
        let socket = take_standard_input()?;
        let deposits = read_deposits(&socket)?;
        let deposited = deposits
            .iter()
            .map(|deposit| deposit.name.clone())
            .collect();
        Ok(Some(Inherited {
            channel: Self(Arc::new(Inner {
                socket,
                reader: OnceLock::new(),
                deposited: Mutex::new(deposited),
            })),
            deposits,
        }))
    }

    /// Leaves descriptors in the supervisor's custody, for the next process of this name. An
    /// earlier deposit of this name is replaced.
    pub fn deposit(
        &self,
        name: &str,
        context: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        let message = ToSupervisor::Deposit {
            name: name.to_owned(),
            context: context.to_owned(),
        };
        // Held over the sending, so that the order here is the order there.
        let mut deposited = self.deposited();
        if deposited.len() >= MAX_DEPOSITS && !deposited.contains(name) {
            return Err(Unsendable::from(Malformed::Deposits(name.to_owned())).into());
        }
        self.send(&message, fds)?;
        deposited.insert(name.to_owned());
        Ok(())
    }

    /// Takes a deposit back. The supervisor drops its descriptors.
    pub fn withdraw(&self, name: &str) -> Result<(), SendError> {
        let message = ToSupervisor::Withdraw {
            name: name.to_owned(),
        };
        let mut deposited = self.deposited();
        self.send(&message, &[])?;
        deposited.remove(name);
        Ok(())
    }

    /// Says how this child fares. Until it has said that it is ready, its death counts towards a
    /// crash loop.
    pub fn state(&self, readiness: &Readiness) -> Result<(), SendError> {
        self.send(&ToSupervisor::State(readiness.clone()), &[])
    }

    /// Says which other children shall run: new ones are started, missing ones stopped and their
    /// deposits dropped, changed ones restarted with their deposits, the rest left alone. For the
    /// node only: it would cost any other child its life.
    pub fn want(&self, children: Vec<ChildPlan>) -> Result<(), SendError> {
        self.send(&ToSupervisor::Want { children }, &[])
    }

    /// What the supervisor says next; `None` when it is gone: then this process should exit.
    ///
    /// One task at a time may wait here. Dropping the future loses nothing.
    pub async fn next(&self) -> Option<FromSupervisor> {
        let reader = self
            .reader()
            .inspect_err(|error| tracing::error!(%error, "the supervisor cannot be listened to"))
            .ok()?;
        loop {
            reader.readable().await.ok()?;
            let read = reader.try_io(Interest::READABLE, || {
                let mut buffer = datagram::buffer();
                match datagram::receive(self.0.socket.as_fd(), &mut buffer)? {
                    Received::Message(length, _) => Ok(Some(ToChild::decode(&buffer[..length]))),
                    Received::Malformed(malformed) => Ok(Some(Err(malformed))),
                    Received::Nothing => Err(io::ErrorKind::WouldBlock.into()),
                    Received::Closed => Ok(None),
                }
            });
            match read {
                Ok(Some(Ok(ToChild::Stop))) => return Some(FromSupervisor::Stop),
                Ok(Some(Ok(ToChild::Report { children }))) => {
                    return Some(FromSupervisor::Report(children));
                }
                // Said only at the beginning.
                Ok(Some(Ok(ToChild::Deposit { .. } | ToChild::Begin))) => {}
                Ok(Some(Err(malformed))) => {
                    tracing::warn!(%malformed, "message of the supervisor not understood");
                }
                Ok(None) => return None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::error!(%error, "the channel to the supervisor cannot be read");
                    return None;
                }
            }
        }
    }

    fn reader(&self) -> io::Result<&UnixDatagram> {
        if self.0.reader.get().is_none() {
            let socket = std::os::unix::net::UnixDatagram::from(self.0.socket.try_clone()?);
            // Where somebody else was faster, theirs counts.
            drop(self.0.reader.set(UnixDatagram::from_std(socket)?));
        }
        self.0
            .reader
            .get()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn deposited(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.0
            .deposited
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &ToSupervisor, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        let bytes = message.encode(fds.len())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match datagram::send(self.0.socket.as_fd(), &bytes, fds) {
                Ok(()) => return Ok(()),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(SendError::Unreachable(err)),
            }
            match wait(&self.0.socket, PollFlags::POLLOUT, deadline) {
                Ok(true) => {}
                Ok(false) => {
                    return Err(SendError::Unreachable(io::ErrorKind::TimedOut.into()));
                }
                Err(errno) => return Err(SendError::Unreachable(errno.into())),
            }
        }
    }
}

/// Moves the channel off descriptor 0, which is not closed on exec, and leaves /dev/null there.
fn take_standard_input() -> Result<OwnedFd, InheritError> {
    use rustix::net::{SocketType, sockopt::socket_type};
    let stdin = io::stdin();
    if socket_type(stdin.as_fd()) != Ok(SocketType::SEQPACKET) {
        return Err(InheritError::NotAChannel);
    }
    // Not one of the standard three.
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)
        .map_err(|errno| kernel("moving the channel off standard input", errno))?;
    let null = std::fs::File::open("/dev/null").map_err(|err| kernel("opening /dev/null", err))?;
    nix::unistd::dup2_stdin(&null)
        .map_err(|errno| kernel("putting /dev/null on standard input", errno))?;
    Ok(socket)
}

fn read_deposits(socket: &OwnedFd) -> Result<Vec<Deposit>, InheritError> {
    let mut deposits = Vec::new();
    let mut buffer = datagram::buffer();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let received = datagram::receive(socket.as_fd(), &mut buffer)
            .map_err(|err| kernel("reading the deposits", err))?;
        match received {
            Received::Message(length, fds) => {
                match ToChild::decode(&buffer[..length]).map_err(InheritError::Malformed)? {
                    ToChild::Deposit { name, context } => {
                        deposits.push(Deposit { name, context, fds })
                    }
                    ToChild::Begin => return Ok(deposits),
                    // Neither is said before `Begin`.
                    ToChild::Stop | ToChild::Report { .. } => return Err(InheritError::Unfinished),
                }
            }
            Received::Malformed(malformed) => return Err(InheritError::Malformed(malformed)),
            Received::Closed => return Err(InheritError::Unfinished),
            Received::Nothing => match wait(socket, PollFlags::POLLIN, deadline) {
                Ok(true) => {}
                Ok(false) => return Err(InheritError::Unfinished),
                Err(errno) => return Err(kernel("waiting for the deposits", errno)),
            },
        }
    }
}

/// Waits until the socket is as wanted, or the other end is gone; false at the deadline.
fn wait(socket: &OwnedFd, wanted: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), wanted)], timeout) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::custody::Kept;
    use super::super::peer::Peer;
    use super::*;

    fn ends() -> (Peer, ChildChannel) {
        let (ours, theirs) = datagram::pair().unwrap();
        let channel = ChildChannel(Arc::new(Inner {
            socket: theirs,
            reader: OnceLock::new(),
            deposited: Mutex::default(),
        }));
        (Peer::open(ours, std::iter::empty()).unwrap(), channel)
    }

    #[tokio::test]
    async fn a_child_hears_reports_and_the_stop_and_the_end() {
        let (mut peer, channel) = ends();
        peer.report(Vec::new()).unwrap();
        peer.flush().unwrap();
        assert_eq!(
            channel.next().await,
            Some(FromSupervisor::Report(Vec::new()))
        );
        peer.stop().unwrap();
        peer.flush().unwrap();
        assert_eq!(channel.next().await, Some(FromSupervisor::Stop));
        drop(peer);
        assert_eq!(channel.next().await, None);
    }

    #[test]
    fn all_a_child_may_deposit_is_given_back_through_a_small_socket() {
        use std::rc::Rc;
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let kept = Kept {
            context: vec![255; super::super::message::MAX_CONTEXT],
            descriptors: Rc::new([null(), null()]),
        };
        let names: Vec<String> = (0..MAX_DEPOSITS).map(|n| n.to_string()).collect();
        let (ours, theirs) = datagram::pair().unwrap();
        let mut peer = Peer::open(ours, names.iter().map(|name| (name, &kept))).unwrap();
        let reader = std::thread::spawn(move || read_deposits(&theirs).unwrap());
        while !reader.is_finished() {
            peer.flush().unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        let deposits = reader.join().unwrap();
        assert_eq!(deposits.len(), MAX_DEPOSITS);
        assert!(deposits.iter().all(|deposit| deposit.fds.len() == 2));
        assert!(
            deposits
                .iter()
                .all(|deposit| deposit.context == kept.context)
        );
    }

    #[test]
    fn what_the_supervisor_would_refuse_is_refused_here() {
        let (mut peer, channel) = ends();
        let refused = channel.deposit("ipc", &[], &[]).unwrap_err();
        assert_eq!(refused.to_string(), "a deposit came with 0 descriptors");
        let plan = ChildPlan {
            name: "shard a/b".to_owned(),
            args: vec!["x".repeat(70_000)],
            env: Default::default(),
        };
        let refused = channel.want(vec![plan]).unwrap_err().to_string();
        assert!(refused.ends_with("is larger than 65536"), "{refused}");
        assert!(matches!(peer.receive(&mut datagram::buffer()), Ok(None)));
    }

    #[test]
    fn a_child_whose_supervisor_is_gone_is_told() {
        let (peer, channel) = ends();
        drop(peer);
        let refused = channel.state(&Readiness::Ready).unwrap_err();
        assert!(matches!(refused, SendError::Unreachable(_)));
    }
}
