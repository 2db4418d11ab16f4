//! Bytes and descriptors over a socketpair; knows no message.
//!
//! The sockets are `SOCK_SEQPACKET`: a message arrives whole or not at all, with its own
//! descriptors, and the end of the other process is seen. Both ends never block.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use super::message::{MAX_DESCRIPTORS, MAX_MESSAGE, Malformed};

/// What a read yields.
#[derive(Debug)]
pub(super) enum Received {
    /// A message: so many bytes of the buffer, and its descriptors.
    Message(usize, Vec<OwnedFd>),
    /// Something no honest peer sends.
    Malformed(Malformed),
    /// Nothing yet.
    Nothing,
    /// Nobody is at the other end.
    Closed,
}

/// A new pair of connected ends, closed on exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((ours, theirs))
}

/// Room for one message.
pub(super) fn buffer() -> Box<[u8]> {
    vec![0; MAX_MESSAGE].into_boxed_slice()
}

/// Sends one message, or fails with `WouldBlock` while the other end does not read.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let iov = [IoSlice::new(bytes)];
    loop {
        match rustix::net::sendmsg(socket, &iov, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

/// Reads one message into `buffer`. Descriptors arrive closed on exec; those of a malformed
/// message are closed.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let mut iov = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut iov, &mut control, flags) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            // The other end closed with messages of ours unread.
            Err(Errno::CONNRESET) => return Ok(Received::Closed),
            Err(err) => return Err(err.into()),
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            descriptors.extend(fds);
        }
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Received::Malformed(Malformed::TooLarge));
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Received::Malformed(Malformed::Descriptors));
    }
    if message.bytes == 0 && descriptors.is_empty() {
        return Ok(Received::Closed);
    }
    Ok(Received::Message(message.bytes, descriptors))
}

/// Borrows all of them.
pub(super) fn borrow(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn descriptors_travel_with_their_message_and_close_on_exec() {
        let (a, b) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        send(a.as_fd(), b"one", &[null.as_fd(), zero.as_fd()]).unwrap();
        send(a.as_fd(), b"two", &[]).unwrap();
        let mut buffer = buffer();
        let Received::Message(3, fds) = receive(b.as_fd(), &mut buffer).unwrap() else {
            panic!("no message")
        };
        assert_eq!(&buffer[..3], b"one");
        assert_eq!(fds.len(), 2);
        let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let inode = |file: std::fs::File| file.metadata().unwrap().ino();
        let mut fds = fds.into_iter().map(std::fs::File::from);
        assert_eq!(inode(fds.next().unwrap()), inode(null));
        assert_eq!(inode(fds.next().unwrap()), inode(zero));
        assert!(
            matches!(receive(b.as_fd(), &mut buffer).unwrap(), Received::Message(3, fds) if fds.is_empty())
        );
        assert!(matches!(
            receive(b.as_fd(), &mut buffer).unwrap(),
            Received::Nothing
        ));
        drop(a);
        assert!(matches!(
            receive(b.as_fd(), &mut buffer).unwrap(),
            Received::Closed
        ));
    }

    #[test]
    fn a_datagram_beyond_the_limit_is_recognised() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), &vec![b' '; MAX_MESSAGE + 1], &[]).unwrap();
        let received = receive(b.as_fd(), &mut buffer()).unwrap();
        assert!(matches!(received, Received::Malformed(Malformed::TooLarge)));
    }

    #[test]
    fn more_descriptors_than_allowed_are_recognised_and_not_kept() {
        let (a, b) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let many = [null.as_fd(); 9];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        let iov = [IoSlice::new(b"x")];
        rustix::net::sendmsg(&a, &iov, &mut control, SendFlags::empty()).unwrap();
        let received = receive(b.as_fd(), &mut buffer()).unwrap();
        assert!(
            matches!(received, Received::Malformed(Malformed::Descriptors)),
            "{received:?}"
        );
    }

    #[test]
    fn a_full_socket_does_not_block_the_sender() {
        let (a, _b) = pair().unwrap();
        let refused = loop {
            if let Err(err) = send(a.as_fd(), &[b'x'; 1000], &[]) {
                break err;
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
