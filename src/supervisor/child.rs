//! One child: its plan, its life, and its process while there is one.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::process::WaitStatus;

use super::custody::Custody;
use super::launch::{Launched, launch};
use super::message::{ChildPlan, ChildReport, reason};
use super::peer::Peer;
use super::policy::{Lifecycle, Then};
use crate::readiness::Readiness;

/// How long a process may live on that has closed its channel: it can no longer be told to stop.
/// A process that exits closes it shortly before its death is seen.
const WITHOUT_CHANNEL: Duration = Duration::from_secs(1);

/// How a process came to its end.
#[derive(Debug)]
pub(super) enum Death {
    /// As wait(2) says; nothing if the kernel reaped it without us.
    Ended(Option<WaitStatus>),
    /// It never began.
    NotStarted(io::Error),
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self {
            Self::NotStarted(error) => return write!(f, "could not be started: {error}"),
            Self::Ended(None) => return f.write_str("ended"),
            Self::Ended(Some(status)) => status,
        };
        if let Some(code) = status.exit_status() {
            return write!(f, "exited with code {code}");
        }
        let number = status.terminating_signal().unwrap_or_default();
        match Signal::try_from(number) {
            Ok(signal) => write!(f, "was killed by signal {number} ({signal})"),
            // A real-time signal has no name.
            Err(_) => write!(f, "was killed by signal {number}"),
        }
    }
}

/// A running process of a child.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: Pid,
    pub(super) peer: Peer,
    pidfd: OwnedFd,
    since: Instant,
}

impl Process {
    /// Readable once the process has ended.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)
    }
}

/// A child, through all its processes.
#[derive(Debug)]
pub(super) struct Child {
    plan: ChildPlan,
    pub(super) lifecycle: Lifecycle,
    pub(super) process: Option<Process>,
    state: Readiness,
    /// Why the present process fails, in its own words: they say more than an exit code.
    complaint: Option<String>,
    is_wanted: bool,
    /// It was not wanted for a while: what it deposited goes with its process, also if it is
    /// wanted again by then.
    loses_deposits: bool,
}

impl Child {
    pub(super) fn new(plan: ChildPlan, lifecycle: Lifecycle) -> Self {
        Self {
            plan,
            lifecycle,
            process: None,
            state: Readiness::Starting("not started yet".to_owned()),
            complaint: None,
            is_wanted: true,
            loses_deposits: false,
        }
    }

    pub(super) fn plan(&self) -> &ChildPlan {
        &self.plan
    }

    /// Starts a process and queues what it begins with.
    pub(super) fn start(&mut self, program: &PathBuf, custody: &Custody, now: Instant) {
        let name = &self.plan.name;
        let launched = launch(program, &self.plan).and_then(|launched| {
            let Launched {
                pid,
                pidfd,
                channel,
            } = launched;
            // A process without its deposits must not begin: where they cannot be queued, its
            // channel is closed, and it exits.
            let peer = Peer::open(channel, custody.of(name)).map_err(io::Error::other)?;
            Ok(Process {
                pid,
                peer,
                pidfd,
                since: now,
            })
        });
        match launched {
            Ok(process) => {
                self.lifecycle.started();
                self.complaint = None;
                tracing::info!(
                    child = %name, pid = process.pid.as_raw(), restarts = self.lifecycle.restarts(),
                    "child started"
                );
                self.process = Some(process);
                if !self.lifecycle.is_crash_looping() {
                    self.state = Readiness::Starting("started, not ready yet".to_owned());
                }
            }
            Err(error) => self.died(&Death::NotStarted(error), now),
        }
    }

    /// The process has ended, or there is none to begin with.
    pub(super) fn died(&mut self, death: &Death, now: Instant) {
        let process = self.process.take();
        let was_stopping = self.lifecycle.is_stopping();
        let pause = self.lifecycle.ended(now);
        let lived = process.as_ref().map_or(Duration::ZERO, |p| now - p.since);
        let pid = process.map(|process| process.pid.as_raw());
        let child = self.plan.name.clone();
        match (pause, was_stopping) {
            (_, true) => {
                tracing::info!(%child, pid, %death, ?lived, "child stopped");
                self.state = Readiness::Starting("is replaced".to_owned());
            }
            (Some(pause), false) => {
                tracing::warn!(%child, pid, %death, ?lived, restart_in = ?pause, "child ended");
                self.state = self.state_after(death, lived, pause);
            }
            (None, false) => tracing::info!(%child, pid, %death, ?lived, "child ended"),
        }
        if self.lifecycle.is_crash_looping() {
            let in_a_row = self.lifecycle.unready_deaths();
            tracing::error!(%child, in_a_row, "child keeps ending before it is ready");
        }
    }

    fn state_after(&mut self, death: &Death, lived: Duration, pause: Duration) -> Readiness {
        let how = format!("{death} after {:.1} s", lived.as_secs_f64());
        let said = match self.complaint.take() {
            Some(complaint) => format!(" ({complaint})"),
            None => String::new(),
        };
        match self.lifecycle.is_crash_looping() {
            true => {
                let deaths = self.lifecycle.unready_deaths();
                let text = format!("ended {deaths} times before it was ready; it {how}{said}");
                Readiness::Failing(reason(&text))
            }
            false => {
                let text = format!("{how}{said}, starts again in {pause:?}");
                Readiness::Starting(reason(&text))
            }
        }
    }

    /// What the child says of itself. Whether that is news.
    pub(super) fn says(&mut self, state: Readiness, now: Instant) -> bool {
        if state.is_ready() {
            self.lifecycle.became_ready(now);
        }
        if let Readiness::Failing(why) = &state {
            self.complaint = Some(why.clone());
        }
        // In a crash loop the report keeps saying so until a process gets ready.
        let is_known = self.lifecycle.is_crash_looping();
        if is_known || state == self.state {
            return false;
        }
        let child = &self.plan.name;
        match &state {
            Readiness::Ready => tracing::info!(%child, "child ready"),
            Readiness::Failing(why) => tracing::warn!(%child, why, "child failing"),
            Readiness::Starting(_) | Readiness::Draining => {
                tracing::debug!(%child, %state, "child says");
            }
        }
        self.state = state;
        true
    }

    /// The child has another plan from now on, and starts anew with it.
    pub(super) fn replace(&mut self, plan: ChildPlan, now: Instant) {
        self.plan = plan;
        self.is_wanted = true;
        self.lifecycle.stop(Then::Restart, now);
    }

    /// The child is not wanted any more.
    pub(super) fn remove(&mut self, now: Instant) {
        self.is_wanted = false;
        self.loses_deposits = true;
        self.lifecycle.stop(Then::Remove, now);
    }

    /// Whether the deposits are to be dropped now; asked when there is no process.
    pub(super) fn takes_leave_of_deposits(&mut self) -> bool {
        self.process.is_none() && std::mem::take(&mut self.loses_deposits)
    }

    /// Whether it is to be there.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// Asks the process to stop.
    pub(super) fn ask(&mut self) {
        let Some(process) = &mut self.process else {
            return;
        };
        tracing::info!(child = %self.plan.name, pid = process.pid.as_raw(), "child is asked to stop");
        if let Err(error) = process.peer.stop() {
            tracing::error!(child = %self.plan.name, %error, "child cannot be asked to stop");
        }
    }

    /// Sends the process a signal.
    pub(super) fn signal(&self, signal: Signal) {
        let Some(process) = &self.process else {
            return;
        };
        let (child, pid) = (&self.plan.name, process.pid.as_raw());
        tracing::warn!(%child, pid, %signal, "child is sent a signal");
        let number = rustix::process::Signal::from_named_raw(signal as i32);
        let sent = number
            .ok_or(rustix::io::Errno::INVAL)
            .and_then(|number| rustix::process::pidfd_send_signal(&process.pidfd, number));
        match sent {
            // It has just ended; that is about to be seen.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(%child, pid, %signal, %error, "signal refused"),
        }
    }

    /// The process misbehaved: it is killed at once, and heard no more.
    pub(super) fn condemn(&mut self, why: &dyn fmt::Display, now: Instant) {
        let Some(process) = &mut self.process else {
            return;
        };
        tracing::error!(child = %self.plan.name, pid = process.pid.as_raw(), %why, "child misbehaves and is killed");
        process.peer.close();
        self.lifecycle.condemn(Duration::ZERO, now);
    }

    /// The process closed its channel.
    pub(super) fn lost_channel(&mut self, now: Instant) {
        self.lifecycle.condemn(WITHOUT_CHANNEL, now);
    }

    /// How it fares, for the node.
    pub(super) fn report(&self) -> ChildReport {
        ChildReport {
            name: self.plan.name.clone(),
            pid: self
                .process
                .as_ref()
                .map(|process| process.pid.as_raw().unsigned_abs()),
            state: match self.lifecycle.is_stopping() {
                true => Readiness::Draining,
                false => self.state.clone(),
            },
            restarts: self.lifecycle.restarts(),
        }
    }
}
