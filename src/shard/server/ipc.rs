//! The UNIX socket: passes descriptors.

use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg, socket_with,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

use super::BindError;
use super::connection::Link;
use crate::shard::store::Transport;

/// The byte a descriptor travels with; clients ignore its value.
const DESCRIPTOR_BYTE: u8 = 0x14;

/// The socket, accepting.
pub(super) struct Door(UnixListener);

impl Door {
    pub(super) fn open(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(Self)
    }

    pub(super) async fn accept(&self) -> io::Result<IpcLink> {
        let (stream, _) = self.0.accept().await?;
        Ok(IpcLink(stream))
    }
}

/// A connection on the UNIX socket.
pub(super) struct IpcLink(UnixStream);

impl Link for IpcLink {
    const TRANSPORT: Transport = Transport::Ipc;

    async fn read(&mut self, into: &mut Vec<u8>) -> io::Result<usize> {
        self.0.read_buf(into).await
    }

    async fn read_slice(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into).await
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    async fn send_descriptor(&mut self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let stream = &self.0;
        stream
            .async_io(Interest::WRITABLE, || {
                let descriptors = [descriptor];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
                let byte = [IoSlice::new(&[DESCRIPTOR_BYTE])];
                sendmsg(stream, &byte, &mut control, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await
    }
}

/// See [`super::bind_ipc`].
pub(super) fn bind(path: &Path) -> Result<std::os::unix::net::UnixListener, BindError> {
    crate::sockets::check_path(path)?;
    let (Some(_), Some(directory)) = (path.file_name(), path.parent()) else {
        return Err(BindError::NoPath(path.to_owned()));
    };
    if !directory.as_os_str().is_empty() {
        fs::create_dir_all(directory).map_err(|source| BindError::Directory {
            path: directory.to_owned(),
            source,
        })?;
    }
    let failed = |source: io::Error| BindError::Ipc {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) if is_served(path).map_err(failed)? => {
            return Err(BindError::InUse(path.to_owned()));
        }
        Ok(_) => {}
    }
    Ok(crate::sockets::listen_unix(path, 0o777)?)
}

/// Whether somebody accepts, or could: a full backlog is somebody too.
fn is_served(path: &Path) -> io::Result<bool> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
