//! fuser on a device whose handshake is over; alone in this room in using `unsafe`.
//!
//! fuser begins every session with a handshake and keeps nothing of it but the right to serve.
//! So the handshake is held with a socket, on which the saved INIT request lies ready, and then
//! the device takes the socket's place under the same descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::thread;

use fuser::{Config, Session, SessionACL};
use nix::fcntl::OFlag;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::sync::watch;

use super::adapter::Adapter;
use super::content::Files;

/// How a session fares: `None` while it serves, then why it ended.
pub(super) type Outcome = watch::Receiver<Option<String>>;

/// A session that has shaken hands and waits for its device.
pub(super) struct Greeted {
    session: Session<Adapter>,
    reply: Vec<u8>,
}

impl Greeted {
    /// Lets fuser answer this INIT request.
    pub(super) fn with(init: &[u8], files: Files) -> io::Result<Self> {
        // A packet is read whole or not at all, as from the device. Nothing here waits: what is
        // read has been written before.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (theirs, ours) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::write(&ours, init)?;
        let session = Session::from_fd(
            Adapter::new(files),
            theirs,
            SessionACL::All,
            Config::default(),
        )?;
        // fuse_out_header and fuse_init_out have 80 bytes together.
        let mut reply = [0; 256];
        let length = rustix::io::read(&ours, &mut reply)?;
        Ok(Self {
            session,
            reply: reply[..length].to_vec(),
        })
    }

    /// What fuser answered.
    pub(super) fn reply(&self) -> &[u8] {
        &self.reply
    }

    /// Serves the device on a thread of its own, until its mount is gone.
    pub(super) fn serve(self, device: OwnedFd) -> io::Result<Outcome> {
        put_in_place(&self.session, &device)?;
        drop(device);
        let (tell, outcome) = watch::channel(None);
        // fuser serves on threads that it makes itself; this one only waits for them.
        const STACK: usize = 64 << 10;
        thread::Builder::new()
            .name("fuse".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let ended = match self.session.run() {
                    Ok(()) => "its mount is gone".to_owned(),
                    Err(error) => error.to_string(),
                };
                tell.send_replace(Some(ended));
            })?;
        Ok(outcome)
    }
}

/// Makes the session's descriptor one of `device`; the socket it was closes.
#[allow(unsafe_code)]
fn put_in_place(session: &Session<Adapter>, device: &OwnedFd) -> io::Result<()> {
    let number = session.as_fd().as_raw_fd();
    // SAFETY: `number` is open: the session owns it, is borrowed here, and no thread serves it
    // yet. It stays the session's: the second owner that dup3 returns is given up at once, so it
    // is closed once. What it refers to changes, from a socket to the device: nobody has kept
    // anything about the socket.
    let same = unsafe { nix::unistd::dup3_raw(device, number, OFlag::O_CLOEXEC) }?;
    let _ = same.into_raw_fd();
    Ok(())
}
