//! Listening sockets that are never seen half made.
//!
//! A UNIX socket is bound under a hidden name beside its place, listened on, given its mode, and
//! only then renamed into place: whoever sees it can connect, and who has the old one keeps it.

use std::fs::{self, File, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path an address holds: unix(7), `sun_path` less its closing NUL.
pub const LONGEST_PATH: usize = 107;

/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into an address.
    #[error("the socket path {} is {} bytes long; a UNIX socket address holds {LONGEST_PATH} (unix(7))", path.display(), path.as_os_str().len())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("listening on {}", path.display())]
    Unix {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The TCP address cannot be had.
    #[error("listening on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer; a taken port is `AddrInUse`.
        source: io::Error,
    },
}

/// Listens at `path` with permission bits `mode`, in place of whatever was there. Its directory
/// must exist.
pub fn listen_unix(path: &Path, mode: u32) -> Result<UnixListener, ListenError> {
    check_path(path)?;
    listen_and_rename(path, mode).map_err(|source| ListenError::Unix {
        path: path.to_path_buf(),
        source,
    })
}

/// Refuses a path that no UNIX socket address holds.
pub fn check_path(path: &Path) -> Result<(), ListenError> {
    match path.as_os_str().as_bytes().len() > LONGEST_PATH {
        true => Err(ListenError::TooLong {
            path: path.to_path_buf(),
        }),
        false => Ok(()),
    }
}

fn listen_and_rename(path: &Path, mode: u32) -> io::Result<UnixListener> {
    // One process may make several sockets in a directory.
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    // Kubelet passes over names that begin with a dot.
    let name = format!(".{}-{counter}.sock", std::process::id());
    let hidden = directory.join(&name);
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The hidden path may be longer than an address, so it is spelled by its directory's
    // descriptor.
    let opened = File::open(directory)?;
    let spelled = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
    rustix::net::bind(&socket, &SocketAddrUnix::new(spelled)?)?;
    let place = || {
        rustix::net::listen(&socket, BACKLOG)?;
        fs::set_permissions(&hidden, Permissions::from_mode(mode))?;
        fs::rename(&hidden, path)
    };
    if let Err(error) = place() {
        let _ = fs::remove_file(&hidden);
        return Err(error);
    }
    Ok(UnixListener::from(socket))
}

/// Listens on a TCP address that nobody else listens on.
pub fn listen_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let listen = || {
        // Sets SO_REUSEADDR, and not SO_REUSEPORT, with which two servers would share the port.
        let listener = TcpListener::bind(address)?;
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(listener)
    };
    listen().map_err(|source| ListenError::Tcp { address, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_new_listener_takes_the_place_of_an_old_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.sock");
        drop(listen_unix(&path, 0o600).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let _listener = listen_unix(&path, 0o600).unwrap();
        UnixStream::connect(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 1, "nothing but the socket is left");
    }

    #[test]
    fn a_path_that_does_not_fit_is_named_with_its_length() {
        let path = Path::new("/tmp").join("x".repeat(104));
        let text = listen_unix(&path, 0o600).unwrap_err().to_string();
        assert!(text.contains("is 109 bytes long"), "{text}");
    }

    #[test]
    fn the_longest_path_can_be_listened_on() {
        let dir = tempfile::tempdir().unwrap();
        let rest = LONGEST_PATH - dir.path().as_os_str().len() - 1;
        let path = dir.path().join("x".repeat(rest));
        let _listener = listen_unix(&path, 0o600).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_taken_port_is_an_error_that_names_it() {
        let first = listen_tcp(([127, 0, 0, 1], 0).into()).unwrap();
        let address = first.local_addr().unwrap();
        let text = listen_tcp(address).unwrap_err().to_string();
        assert_eq!(text, format!("listening on {address}"));
    }
}
