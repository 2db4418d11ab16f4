//! Listening sockets that are never seen half made.
//!
//! A UNIX socket is bound under a temporary name beside its place, listened on, given its mode,
//! and only then renamed into place: whoever sees it can connect.

use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The longest path an address holds: unix(7), `sun_path` less its closing NUL.
pub const LONGEST_PATH: usize = 107;

/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into an address.
    #[error("socket path {} is {} bytes long; a UNIX socket address holds {LONGEST_PATH} (unix(7))", path.display(), path.as_os_str().len())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// A file or a directory could not be made.
    #[error("making the socket {}", path.display())]
    Make {
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

/// Listens at `path` with permission bits `mode`, in place of whatever socket was there.
/// Missing parent directories are made.
pub fn listen_unix(path: &Path, mode: u32) -> Result<UnixListener, ListenError> {
    let too_long = |path: &Path| path.as_os_str().as_bytes().len() > LONGEST_PATH;
    let make = |source: io::Error| ListenError::Make {
        path: path.to_path_buf(),
        source,
    };
    // Short, because it too has to fit into an address, and one per process.
    let temporary = path.with_file_name(format!(".{:x}", std::process::id()));
    if too_long(path) || too_long(&temporary) {
        return Err(ListenError::TooLong {
            path: path.to_path_buf(),
        });
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(make)?;
    }
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(make(error)),
        Ok(()) | Err(_) => {}
    }
    let place = || {
        let listener = UnixListener::bind(&temporary)?;
        rustix::net::listen(&listener, BACKLOG)?;
        fs::set_permissions(&temporary, Permissions::from_mode(mode))?;
        fs::rename(&temporary, path)?;
        Ok(listener)
    };
    place().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        make(error)
    })
}

/// Listens on a TCP address that nobody else listens on.
pub fn listen_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).map_err(|source| ListenError::Tcp { address, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_new_listener_takes_the_place_of_an_old_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.sock");
        drop(listen_unix(&path, 0o600).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let _listener = listen_unix(&path, 0o600).unwrap();
        UnixStream::connect(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let names = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(names, 1, "nothing but the socket is left");
    }

    #[test]
    fn a_path_that_does_not_fit_is_named_with_its_length() {
        let path = Path::new("/tmp").join("x".repeat(104));
        let text = listen_unix(&path, 0o600).unwrap_err().to_string();
        assert!(text.contains("is 109 bytes long"), "{text}");
    }

    #[test]
    fn a_taken_port_is_an_error_that_names_it() {
        let first = listen_tcp(([127, 0, 0, 1], 0).into()).unwrap();
        let address = first.local_addr().unwrap();
        let text = listen_tcp(address).unwrap_err().to_string();
        assert_eq!(text, format!("listening on {address}"));
    }
}
