//! The UNIX socket: passes descriptors.

use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind as bind_socket, listen, sendmsg, socket_with,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

use super::BindError;
use super::connection::Link;
use crate::shard::store::Transport;

/// The longest path: `sun_path` has 108 bytes, the last one ends it (unix(7)).
const MAX_PATH: usize = 107;

/// Connects that may wait; somaxconn may allow fewer.
const BACKLOG: i32 = 1024;

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
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_PATH {
        return Err(BindError::PathTooLong {
            path: path.to_owned(),
            length,
        });
    }
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
    listen_and_rename(directory, path).map_err(failed)
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

/// The socket gets its name when it listens and everybody may connect: before, the path is what
/// it was.
fn listen_and_rename(
    directory: &Path,
    path: &Path,
) -> io::Result<std::os::unix::net::UnixListener> {
    // One process may bind several sockets in a directory.
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = format!(".{}-{counter}.sock", std::process::id());
    let temporary = directory.join(&name);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The temporary path may be longer than a socket's can be, so it is spelled by way of its
    // directory's descriptor.
    let parent = if directory.as_os_str().is_empty() {
        Path::new(".")
    } else {
        directory
    };
    let opened = rustix::fs::open(
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let spelled = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
    bind_socket(&socket, &SocketAddrUnix::new(spelled)?)?;
    let named = (|| {
        listen(&socket, BACKLOG)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o777))?;
        fs::rename(&temporary, path)
    })();
    if let Err(error) = named {
        drop(fs::remove_file(&temporary));
        return Err(error);
    }
    Ok(socket.into())
}
