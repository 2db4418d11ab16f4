//! Kubelet's plugin registration over real sockets and directories.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};
use vinelet::csi::grpc::registration::registration_client::RegistrationClient;
use vinelet::csi::grpc::registration::{InfoRequest, RegistrationStatus};
use vinelet::csi::{Registered, Registration, RegistrationOptions};
use vinelet::sockets::listen_unix;

struct Plugin {
    socket: PathBuf,
    state: watch::Receiver<Registered>,
    made: Arc<AtomicUsize>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

fn options(directory: &Path) -> RegistrationOptions {
    RegistrationOptions {
        directory: directory.to_path_buf(),
        driver_name: "vinelet.csi.v6d.io".to_owned(),
        endpoint: PathBuf::from("/var/lib/kubelet/plugins/vinelet.csi.v6d.io/csi.sock"),
    }
}

impl Plugin {
    fn start(directory: &Path, inherited: Option<std::os::unix::net::UnixListener>) -> Self {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let registration =
            Registration::new(options(directory), inherited).on_new_listener(move |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        let (stop, stopped) = tokio::sync::oneshot::channel();
        Self {
            socket: registration.socket(),
            state: registration.state(),
            made,
            stop: Some(stop),
            task: tokio::spawn(registration.run(async {
                let _ = stopped.await;
            })),
        }
    }

    async fn connect(&self) -> Option<RegistrationClient<Channel>> {
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await.ok()?;
        Some(RegistrationClient::new(channel))
    }

    /// The socket's inode, once somebody answers there.
    async fn answers(&self) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(mut client) = self.connect().await
                && let Ok(info) = client.get_info(InfoRequest {}).await
            {
                let info = info.into_inner();
                assert_eq!(info.r#type, "CSIPlugin");
                assert_eq!(info.name, "vinelet.csi.v6d.io");
                assert_eq!(
                    info.endpoint,
                    "/var/lib/kubelet/plugins/vinelet.csi.v6d.io/csi.sock"
                );
                assert_eq!(info.supported_versions, ["1.0.0"]);
                return std::fs::metadata(&self.socket).unwrap().ino();
            }
            assert!(
                Instant::now() < deadline,
                "nobody answers at {}",
                self.socket.display()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn notify(&self, plugin_registered: bool, error: &str) {
        let status = RegistrationStatus {
            plugin_registered,
            error: error.to_owned(),
        };
        let mut client = self.connect().await.unwrap();
        client.notify_registration_status(status).await.unwrap();
    }

    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(8), &mut self.task)
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test]
async fn the_socket_is_for_root_alone_and_goes_on_a_clean_stop() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(directory.path(), None);
    plugin.answers().await;
    let mode = std::fs::metadata(&plugin.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(*plugin.state.borrow(), Registered::Waiting(_)));
    plugin.notify(true, "").await;
    assert_eq!(*plugin.state.borrow(), Registered::Yes);
    assert_eq!(plugin.made.load(Ordering::Relaxed), 1);
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
    plugin.stop().await;
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn kubelets_malformed_authority_is_served() {
    // The bytes that grpcio sends with kubelet's authority, for two calls of GetInfo.
    const CLIENT: &[u8] = include_bytes!("data/authority/grpcio.client");
    let directory = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(directory.path(), None);
    plugin.answers().await;
    let mut stream = UnixStream::connect(&plugin.socket).await.unwrap();
    // Without what grpcio sent after its calls had run into their deadline: resets.
    let calls = CLIENT.len() - 2 * 13;
    stream.write_all(&CLIENT[..calls]).await.unwrap();
    let mut answer = Vec::new();
    let name = b"vinelet.csi.v6d.io\x1a";
    let read = async {
        while answer.windows(name.len()).filter(|w| w == name).count() < 2 {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{answer:?}");
        }
    };
    tokio::time::timeout(Duration::from_secs(5), read)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_socket_that_somebody_removes_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let plugins = directory.path().join("plugins_registry");
    let plugin = Plugin::start(&plugins, None);
    plugin.answers().await;
    plugin.notify(true, "").await;
    std::fs::remove_file(&plugin.socket).unwrap();
    plugin.answers().await;
    assert!(matches!(*plugin.state.borrow(), Registered::Waiting(_)));
    // With its directory, once and again.
    for _ in 0..3 {
        std::fs::remove_dir_all(&plugins).unwrap();
        plugin.answers().await;
    }
    // By another socket of the same name.
    let other = listen_unix(&plugin.socket, 0o600).unwrap();
    let theirs = std::fs::metadata(&plugin.socket).unwrap().ino();
    drop(other);
    assert_ne!(plugin.answers().await, theirs);
    plugin.stop().await;
}

#[tokio::test]
async fn where_the_directory_cannot_be_made_it_is_made_once_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let obstacle = directory.path().join("kubelet");
    std::fs::write(&obstacle, "a file").unwrap();
    let plugin = Plugin::start(&obstacle.join("plugins_registry"), None);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let Registered::Waiting(why) = plugin.state.borrow().clone() else {
        panic!("registered");
    };
    assert!(
        why.contains("Not a directory") || why.contains("File exists"),
        "{why}"
    );
    std::fs::remove_file(&obstacle).unwrap();
    plugin.answers().await;
}

#[tokio::test]
async fn a_refusal_makes_the_socket_anew_and_meanwhile_the_old_one_answers() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(directory.path(), None);
    let first = plugin.answers().await;
    plugin.notify(false, "no such node").await;
    assert_eq!(
        *plugin.state.borrow(),
        Registered::Refused("no such node".to_owned())
    );
    assert_eq!(plugin.answers().await, first);
    let deadline = Instant::now() + Duration::from_secs(5);
    while plugin.made.load(Ordering::Relaxed) < 2 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    plugin.answers().await;
    assert_eq!(
        *plugin.state.borrow(),
        Registered::Refused("no such node".to_owned())
    );
    plugin.notify(true, "").await;
    assert_eq!(*plugin.state.borrow(), Registered::Yes);
}

#[tokio::test]
async fn an_inherited_listener_goes_on_on_the_same_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = Registration::new(options(directory.path()), None).socket();
    let listener = listen_unix(&socket, 0o600).unwrap();
    let inode = std::fs::metadata(&socket).unwrap().ino();
    let plugin = Plugin::start(directory.path(), Some(listener));
    assert_eq!(plugin.answers().await, inode);
    assert_eq!(plugin.made.load(Ordering::Relaxed), 0);
    // It is kept in its place like any other.
    std::fs::remove_file(&socket).unwrap();
    plugin.answers().await;
    assert_eq!(plugin.made.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_inherited_listener_whose_socket_is_gone_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let socket = Registration::new(options(directory.path()), None).socket();
    let listener = listen_unix(&socket, 0o600).unwrap();
    std::fs::remove_file(&socket).unwrap();
    let plugin = Plugin::start(directory.path(), Some(listener));
    plugin.answers().await;
    assert_eq!(plugin.made.load(Ordering::Relaxed), 1);
}
