//! The sockets themselves.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vinelet::shard::{BindError, bind_ipc, bind_rpc};
use vinelet::sockets::ListenError;

fn only_entry(directory: &Path) -> String {
    let names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
    names.into_iter().next().unwrap()
}

#[test]
fn a_socket_is_there_for_everybody_with_its_directories() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/vineyard.sock");
    let listener = bind_ipc(&path).unwrap();
    let metadata = fs::symlink_metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o777);
    assert_eq!(only_entry(path.parent().unwrap()), "vineyard.sock");
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_path_of_107_bytes_is_the_longest() {
    let directory = tempfile::tempdir().unwrap();
    let length = |name: &str| directory.path().join(name).as_os_str().len();
    let name = "s".repeat(107 - length(""));
    let path = directory.path().join(&name);
    assert_eq!(path.as_os_str().len(), 107);
    let _listener = bind_ipc(&path).unwrap();
    UnixStream::connect(&path).unwrap();

    let path = directory.path().join(format!("{name}s"));
    let error = bind_ipc(&path).unwrap_err();
    assert!(matches!(
        error,
        BindError::Listen(ListenError::TooLong { .. })
    ));
    assert!(
        error
            .to_string()
            .contains("is 108 bytes long; a UNIX socket address holds 107"),
        "{error}"
    );
}

#[test]
fn a_socket_that_is_served_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let first = bind_ipc(&path).unwrap();
    let inode = fs::symlink_metadata(&path).unwrap().ino();
    let error = bind_ipc(&path).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)), "{error}");
    assert_eq!(
        error.to_string(),
        format!("another server is listening on {}", path.display())
    );
    assert_eq!(fs::symlink_metadata(&path).unwrap().ino(), inode);
    drop(first);
}

#[test]
fn a_socket_with_a_full_backlog_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut waiting = Vec::new();
    loop {
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        if rustix::net::connect(&socket, &address).is_err() {
            break;
        }
        waiting.push(socket);
    }
    assert!(matches!(bind_ipc(&path), Err(BindError::InUse(_))));
}

#[test]
fn a_socket_that_nobody_serves_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let listener = bind_ipc(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
    assert_eq!(only_entry(directory.path()), "s");
}

#[test]
fn the_path_is_never_without_a_socket_while_one_replaces_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let (path, done) = (path.clone(), Arc::clone(&done));
        move || {
            while !done.load(Ordering::Relaxed) {
                assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
            }
        }
    });
    for _ in 0..200 {
        drop(bind_ipc(&path).unwrap());
    }
    done.store(true, Ordering::Relaxed);
    watcher.join().unwrap();
}

#[test]
fn what_is_no_socket_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    fs::write(&path, "precious").unwrap();
    let error = bind_ipc(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} exists and is not a socket", path.display())
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    assert!(matches!(
        bind_ipc(directory.path()),
        Err(BindError::NotASocket(_))
    ));
    assert!(matches!(
        bind_ipc(&path.join("s")),
        Err(BindError::Directory { .. })
    ));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let first = bind_rpc("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = first.local_addr().unwrap();
    let error = bind_rpc(address).unwrap_err();
    assert_eq!(error.to_string(), format!("listening on {address}"));
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("in use"), "{source}");
}
