//! Signals as something to read, instead of something that interrupts.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::config::{RunError, kernel};

/// The signals that concern a supervisor, blocked while this lives.
#[derive(Debug)]
pub(super) struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    /// Blocks the signals for this thread. Pid 1 gets even those that it has no handler for:
    /// blocked signals are never dropped.
    pub(super) fn take() -> Result<Self, RunError> {
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
        ] {
            set.add(signal);
        }
        let before = set
            .thread_swap_mask(SigmaskHow::SIG_BLOCK)
            .map_err(|errno| kernel("blocking signals", errno))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(|errno| kernel("opening a signalfd", errno))?;
        Ok(Self { fd, before })
    }

    /// Those that came since the last time.
    pub(super) fn read(&self) -> Result<Vec<Signal>, RunError> {
        let mut signals = Vec::new();
        while let Some(info) = self
            .fd
            .read_signal()
            .map_err(|errno| kernel("reading signals", errno))?
        {
            let number = i32::try_from(info.ssi_signo).unwrap_or_default();
            signals.extend(Signal::try_from(number));
        }
        Ok(signals)
    }

    /// What to wait for.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and there is no reason for one.
        let _ = self.before.thread_set_mask();
    }
}
