//! Keeps processes and descriptors; knows nothing of CSI, FUSE or vineyard.
//!
//! The supervisor is one thread in one loop around poll(2): signals, the children's channels, and
//! the time of what is due next. It reads nothing but its own children's messages, which are
//! small and checked; a child that says anything else loses its life, the supervisor never.
//!
//! One child, the node, is always wanted, and says which others are. Children deposit what must
//! outlive them, and get it back when they are started again: so a listening socket stays the
//! same socket whoever serves it, and connects made meanwhile wait in its backlog.
//!
//! Invariants: no child outlives the supervisor (the kernel kills it); no wait blocks on a single
//! process; what a child deposited is dropped only when it is withdrawn, replaced, or the child is
//! no longer wanted and its process has ended.
//!
//! ```no_run
//! use vinelet::supervisor::{Config, Supervisor};
//!
//! let node = ["node", "--log", "info"].map(str::to_owned).to_vec();
//! let supervisor = Supervisor::new(Config::new("/run/vinelet".into(), node))?;
//! supervisor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod channel;
mod child;
mod config;
mod custody;
mod datagram;
mod launch;
mod lock;
mod message;
mod peer;
mod policy;
mod signals;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::WaitOptions;

pub use channel::{
    ChildChannel, Deposit, FromSupervisor, InheritError, Inherited, SendError, die_with_supervisor,
};
pub use config::{Config, NewError, RunError};
pub use lock::LockError;
pub use message::{
    ChildPlan, ChildReport, MAX_CHILDREN, MAX_CONTEXT, MAX_DEPOSITS, MAX_DESCRIPTORS, MAX_MESSAGE,
    Malformed, Unsendable,
};
pub use policy::{Backoff, Patience};

use child::{Child, Death};
use config::kernel;
use custody::Custody;
use lock::Lock;
use message::{NODE, ToSupervisor};
use policy::{Action, Lifecycle, Stage};
use signals::Signals;

/// Messages read from one child before the others have their turn.
const MESSAGES_A_TURN: usize = 32;
/// Enough for every child's deposits at their most usual size; the hard limit may be less.
const DESCRIPTORS_WISHED: u64 = 65_536;

/// Why a wait is over.
#[derive(Debug, Default)]
struct Woken {
    /// The processes that have ended.
    ended: Vec<i32>,
    /// The children with something to say.
    spoke: Vec<String>,
}

/// The supervisor.
#[derive(Debug)]
pub struct Supervisor {
    config: Config,
    _lock: Lock,
    children: BTreeMap<String, Child>,
    custody: Custody,
    stage: Stage,
    /// Something changed that the node has not been told.
    has_news: bool,
}

impl Supervisor {
    /// Takes the state directory for itself. Nothing is started yet.
    pub fn new(mut config: Config) -> Result<Self, NewError> {
        NODE.clone_into(&mut config.node.name);
        message::check_plan(&config.node).map_err(NewError::Node)?;
        Ok(Self {
            _lock: Lock::take(&config.state_dir)?,
            config,
            children: BTreeMap::new(),
            custody: Custody::default(),
            stage: Stage::Serving,
            has_news: false,
        })
    }

    /// Starts the node and keeps everything running until SIGTERM or SIGINT, then stops the
    /// children in order and returns.
    ///
    /// To be called on a thread that lives as long as the process, with no other thread around:
    /// children die with the thread that started them.
    pub fn run(mut self) -> Result<(), RunError> {
        let signals = Signals::take()?;
        prepare_process()?;
        self.add(self.config.node.clone(), Instant::now());
        let mut buffer = datagram::buffer();
        loop {
            let now = Instant::now();
            self.act(now);
            self.tell(now);
            self.advance_stage(now);
            if self.stage == Stage::Over {
                return self.end();
            }
            let woken = self.wait(&signals, now)?;
            let now = Instant::now();
            for name in &woken.spoke {
                self.listen(name, &mut buffer, now);
            }
            for signal in signals.read()? {
                self.on_signal(signal, now);
            }
            self.reap(&woken.ended, &mut buffer, now);
        }
    }

    fn end(self) -> Result<(), RunError> {
        let left: Vec<_> = self
            .children
            .iter()
            .filter_map(|(name, child)| Some((name, child.process.as_ref()?.pid)))
            .map(|(name, pid)| format!("{name} (pid {pid})"))
            .collect();
        match left.is_empty() {
            true => {
                tracing::info!("all children have ended");
                Ok(())
            }
            false => Err(RunError::LeftBehind(left.join(", "))),
        }
    }

    fn add(&mut self, plan: ChildPlan, now: Instant) {
        let patience = match plan.name == NODE {
            true => self.config.patience.node,
            false => self.config.patience.others,
        };
        let kill = self.config.patience.kill;
        let lifecycle = Lifecycle::new(self.config.backoff, patience, kill, now);
        self.children
            .insert(plan.name.clone(), Child::new(plan, lifecycle));
        self.has_news = true;
    }

    /// Takes note of every process that has ended, strays that became ours included, and of the
    /// children in `ended` that the kernel has reaped without us: so it does when somebody had
    /// SIGCHLD ignored before starting us.
    fn reap(&mut self, ended: &[i32], buffer: &mut [u8], now: Instant) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = pid.as_raw_nonzero().get();
                    if !self.bury(pid, Some(status), buffer, now) {
                        tracing::debug!(pid, "stray reaped");
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                // None has ended, or there is none.
                Ok(None) | Err(_) => break,
            }
        }
        for &pid in ended {
            self.bury(pid, None, buffer, now);
        }
    }

    /// Takes note of the end of a child's process; false if there is no such child.
    fn bury(
        &mut self,
        pid: i32,
        status: Option<rustix::process::WaitStatus>,
        buffer: &mut [u8],
        now: Instant,
    ) -> bool {
        let is_it = |child: &Child| {
            child
                .process
                .as_ref()
                .is_some_and(|p| p.pid.as_raw() == pid)
        };
        let Some(name) = self
            .children
            .iter()
            .find_map(|(name, child)| is_it(child).then(|| name.clone()))
        else {
            return false;
        };
        // It may have deposited something with its last breath. A socket holds less than so many
        // messages.
        for _ in 0..MESSAGES_A_TURN {
            if !self.listen(&name, buffer, now) {
                break;
            }
        }
        if let Some(child) = self.children.get_mut(&name) {
            child.died(&Death::Ended(status), now);
        }
        self.has_news = true;
        true
    }

    /// Does what is due.
    fn act(&mut self, now: Instant) {
        let mut gone = Vec::new();
        for (name, child) in &mut self.children {
            if child.takes_leave_of_deposits() {
                let dropped = self.custody.drop_all(name);
                tracing::debug!(child = %name, dropped, "deposits dropped");
            }
            while let Some(action) = child.lifecycle.next_action(now) {
                self.has_news = true;
                match action {
                    Action::Start => child.start(&self.config.program, &self.custody, now),
                    Action::Ask => child.ask(),
                    Action::Terminate => child.signal(Signal::SIGTERM),
                    Action::Kill => child.signal(Signal::SIGKILL),
                }
            }
            if child.lifecycle.is_over() {
                gone.push(name.clone());
            }
        }
        for name in gone {
            self.custody.drop_all(&name);
            self.children.remove(&name);
            self.has_news = true;
        }
    }

    /// Sends what there is to say.
    fn tell(&mut self, now: Instant) {
        let mut refused = Vec::new();
        if std::mem::take(&mut self.has_news) {
            let others = self.children.iter().filter(|(name, _)| *name != NODE);
            let report = others.map(|(_, child)| child.report()).collect();
            if let Some(node) = self.children.get_mut(NODE)
                && let Some(process) = &mut node.process
                && process.peer.is_open()
                && let Err(error) = process.peer.report(report)
            {
                tracing::error!(%error, "the node cannot be told how its children fare");
            }
        }
        for (name, child) in &mut self.children {
            if let Some(process) = &mut child.process
                && let Err(error) = process.peer.flush()
            {
                refused.push((name.clone(), error));
            }
        }
        for (name, error) in refused {
            if let Some(child) = self.children.get_mut(&name) {
                child.condemn(&error, now);
            }
        }
    }

    fn advance_stage(&mut self, now: Instant) {
        let is_gone = |child: &Child| child.lifecycle.is_given_up();
        let node = self.children.get(NODE).is_none_or(is_gone);
        let others = self
            .children
            .iter()
            .all(|(name, child)| name == NODE || is_gone(child));
        let Some(next) = self.stage.next(node, others) else {
            return;
        };
        self.stage = next;
        if next == Stage::OthersStop {
            for (name, child) in &mut self.children {
                if name != NODE {
                    child.remove(now);
                }
            }
        }
        // What follows from this is due at once.
        self.act(now);
        self.tell(now);
        if next == Stage::OthersStop {
            self.advance_stage(now);
        }
    }

    /// Waits for a signal, a message, an end or the next deadline.
    fn wait(&self, signals: &Signals, now: Instant) -> Result<Woken, RunError> {
        let lifecycles = self.children.values().map(|child| &child.lifecycle);
        // Rounded up: a millisecond too early would be a turn for nothing.
        let round = Duration::from_micros(999);
        let timeout = match lifecycles.filter_map(Lifecycle::deadline).min() {
            Some(at) => PollTimeout::try_from(at.saturating_duration_since(now) + round)
                .unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let processes: Vec<_> = self
            .children
            .iter()
            .filter_map(|(name, child)| Some((name, child.process.as_ref()?)))
            .collect();
        let (open, ends) = (
            processes
                .iter()
                .filter(|(_, process)| process.peer.is_open()),
            processes.iter(),
        );
        let mut fds = vec![signals.poll_fd()];
        fds.extend(ends.clone().map(|(_, process)| process.poll_fd()));
        fds.extend(open.clone().map(|(_, process)| process.peer.poll_fd()));
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Woken::default()),
            Err(errno) => return Err(kernel("waiting for signals and children", errno)),
        }
        let happened = |fd: &PollFd<'_>| {
            fd.revents()
                .is_some_and(|events| events.intersects(!PollFlags::POLLOUT))
        };
        let (ended, spoke) = fds[1..].split_at(processes.len());
        let ended = ended.iter().zip(ends).filter(|(fd, _)| happened(fd));
        let spoke = spoke.iter().zip(open).filter(|(fd, _)| happened(fd));
        Ok(Woken {
            ended: ended
                .map(|(_, (_, process))| process.pid.as_raw())
                .collect(),
            spoke: spoke.map(|(_, (name, _))| (*name).clone()).collect(),
        })
    }

    /// Hears what a child says, but not for ever; whether it may have more to say.
    fn listen(&mut self, name: &str, buffer: &mut [u8], now: Instant) -> bool {
        for _ in 0..MESSAGES_A_TURN {
            let Some(child) = self.children.get_mut(name) else {
                return false;
            };
            let Some(process) = &mut child.process else {
                return false;
            };
            let was_open = process.peer.is_open();
            let outcome = match process.peer.receive(buffer) {
                Ok(Some((message, descriptors))) => self.obey(name, message, descriptors, now),
                Ok(None) => {
                    if was_open && !process.peer.is_open() {
                        child.lost_channel(now);
                    }
                    return false;
                }
                Err(malformed) => Err(malformed),
            };
            if let Err(malformed) = outcome {
                if let Some(child) = self.children.get_mut(name) {
                    child.condemn(&malformed, now);
                }
                return false;
            }
        }
        true
    }

    fn obey(
        &mut self,
        name: &str,
        message: ToSupervisor,
        descriptors: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<(), Malformed> {
        match message {
            ToSupervisor::Deposit {
                name: deposit,
                context,
            } => {
                tracing::debug!(child = name, deposit, "deposit kept");
                self.custody.keep(name, deposit, context, descriptors)
            }
            ToSupervisor::Withdraw { name: deposit } => {
                let found = self.custody.withdraw(name, &deposit);
                tracing::debug!(child = name, deposit, found, "deposit withdrawn");
                Ok(())
            }
            ToSupervisor::State(state) => {
                if let Some(child) = self.children.get_mut(name) {
                    self.has_news |= child.says(state, now);
                }
                Ok(())
            }
            ToSupervisor::Want { .. } if name != NODE => Err(Malformed::NotTheNode),
            ToSupervisor::Want { children } => {
                if self.stage == Stage::Serving {
                    self.want(children, now);
                }
                Ok(())
            }
        }
    }

    /// Makes the other children those that are wanted.
    fn want(&mut self, plans: Vec<ChildPlan>, now: Instant) {
        let changes = {
            let others = self.children.iter().filter(|(name, _)| *name != NODE);
            let present = others
                .filter(|(_, child)| child.is_wanted())
                .map(|(name, child)| (name.as_str(), child.plan()))
                .collect();
            let wanted = plans
                .iter()
                .map(|plan| (plan.name.as_str(), plan))
                .collect();
            policy::changes(&present, &wanted)
        };
        for name in &changes.remove {
            if let Some(child) = self.children.get_mut(name) {
                tracing::info!(child = %name, "child is no longer wanted");
                child.remove(now);
            }
        }
        let touched: BTreeSet<_> = changes.add.into_iter().chain(changes.replace).collect();
        for plan in plans
            .into_iter()
            .filter(|plan| touched.contains(&plan.name))
        {
            match self.children.get_mut(&plan.name) {
                Some(child) => {
                    tracing::info!(child = %plan.name, "child is wanted with other arguments, or again");
                    child.replace(plan, now);
                }
                None => self.add(plan, now),
            }
        }
        self.has_news = true;
    }

    fn on_signal(&mut self, signal: Signal, now: Instant) {
        let is_stop = matches!(signal, Signal::SIGTERM | Signal::SIGINT);
        if !is_stop || self.stage != Stage::Serving {
            // SIGCHLD only wakes the loop up.
            tracing::debug!(%signal, "signal");
            return;
        }
        tracing::info!(%signal, "stopping");
        self.stage = Stage::NodeStops;
        if let Some(node) = self.children.get_mut(NODE) {
            node.remove(now);
        }
    }
}

/// Makes strays ours, and room for deposits.
fn prepare_process() -> Result<(), RunError> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Pid 1 is every stray's parent anyway.
    if std::process::id() != 1 {
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|errno| kernel("becoming the parent of strays", errno))?;
    }
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wished = hard.min(DESCRIPTORS_WISHED).max(soft);
        setrlimit(Resource::RLIMIT_NOFILE, wished, hard)
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    Ok(())
}
