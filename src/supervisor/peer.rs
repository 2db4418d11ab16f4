//! The supervisor's end of a child's channel.
//!
//! It never blocks, and what a child does not read waits in a queue that cannot grow, since all
//! there is to say is its deposits, one stop and the newest report.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags};

use super::custody::Kept;
use super::datagram::{self, Received};
use super::message::{ChildReport, Malformed, ToChild, ToSupervisor, Unsendable};

/// The supervisor's end of one process's channel.
#[derive(Debug)]
pub(super) struct Peer {
    socket: OwnedFd,
    queue: VecDeque<Queued>,
    /// The newest report; one not sent yet is replaced by the next.
    report: Option<Vec<u8>>,
    /// Whether it may still be read.
    is_open: bool,
}

#[derive(Debug)]
struct Queued {
    bytes: Vec<u8>,
    kept: Option<Kept>,
}

impl Peer {
    /// A new process's channel, on which its deposits wait to be sent.
    pub(super) fn open<'a>(
        socket: OwnedFd,
        deposits: impl Iterator<Item = (&'a String, &'a Kept)>,
    ) -> Result<Self, Unsendable> {
        let mut queue = VecDeque::new();
        for (name, kept) in deposits {
            let message = ToChild::Deposit {
                name: name.clone(),
                context: kept.context.clone(),
            };
            queue.push_back(Queued {
                bytes: message.encode()?,
                kept: Some(kept.clone()),
            });
        }
        queue.push_back(Queued {
            bytes: ToChild::Begin.encode()?,
            kept: None,
        });
        Ok(Self {
            socket,
            queue,
            report: None,
            is_open: true,
        })
    }

    /// Tells the child to stop.
    pub(super) fn stop(&mut self) -> Result<(), Unsendable> {
        self.queue.push_back(Queued {
            bytes: ToChild::Stop.encode()?,
            kept: None,
        });
        Ok(())
    }

    /// Puts up a report, in the place of one that was not sent yet.
    pub(super) fn report(&mut self, children: Vec<ChildReport>) -> Result<(), Unsendable> {
        self.report = Some(ToChild::Report { children }.encode()?);
        Ok(())
    }

    /// Sends what the child has room for.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(queued) = self.queue.front() {
            let descriptors = match &queued.kept {
                Some(kept) => datagram::borrow(&kept.descriptors),
                None => Vec::new(),
            };
            if !sent(&self.socket, &queued.bytes, &descriptors)? {
                return Ok(());
            }
            self.queue.pop_front();
        }
        if let Some(bytes) = &self.report
            && sent(&self.socket, bytes, &[])?
        {
            self.report = None;
        }
        Ok(())
    }

    /// Reads one message; `None` when there is nothing to read, now or ever again.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
    ) -> Result<Option<(ToSupervisor, Vec<OwnedFd>)>, Malformed> {
        if !self.is_open {
            return Ok(None);
        }
        match datagram::receive(self.socket.as_fd(), buffer) {
            Ok(Received::Message(length, fds)) => {
                let message = ToSupervisor::decode(&buffer[..length], fds.len())?;
                Ok(Some((message, fds)))
            }
            Ok(Received::Malformed(malformed)) => Err(malformed),
            Ok(Received::Nothing) => Ok(None),
            Ok(Received::Closed) | Err(_) => {
                self.close();
                Ok(None)
            }
        }
    }

    /// Nothing is read any more, and nothing said.
    pub(super) fn close(&mut self) {
        self.is_open = false;
        self.queue.clear();
        self.report = None;
    }

    /// Whether there is somebody to listen to.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// What to wait for.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let mut wanted = PollFlags::POLLIN;
        wanted.set(
            PollFlags::POLLOUT,
            !self.queue.is_empty() || self.report.is_some(),
        );
        PollFd::new(self.socket.as_fd(), wanted)
    }
}

fn sent(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<bool> {
    match datagram::send(socket.as_fd(), bytes, descriptors) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(false),
        // The child is gone; its death is about to be seen.
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(err) => Err(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::Readiness;

    #[test]
    fn a_child_that_does_not_read_makes_no_queue_grow() {
        let (ours, _theirs) = datagram::pair().unwrap();
        let mut peer = Peer::open(ours, std::iter::empty()).unwrap();
        peer.flush().unwrap();
        let report = ChildReport {
            name: "shard a/b".to_owned(),
            pid: None,
            state: Readiness::Ready,
            restarts: 0,
        };
        for _ in 0..1000 {
            peer.report(vec![report.clone(); 50]).unwrap();
            peer.flush().unwrap();
        }
        assert!(peer.report.is_some() && peer.queue.is_empty());
    }
}
