//! The CSI spec's error tables over a real socket, with the mount table in memory: one valid
//! request with one thing broken per row, with the exact code and message.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use vinelet::csi::grpc::csi::identity_client::IdentityClient;
use vinelet::csi::grpc::csi::node_client::NodeClient;
use vinelet::csi::grpc::csi::volume_capability::access_mode::Mode;
use vinelet::csi::grpc::csi::volume_capability::{
    AccessMode, AccessType, BlockVolume, MountVolume,
};
use vinelet::csi::grpc::csi::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest,
    NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, ProbeRequest,
    VolumeCapability,
};
use vinelet::csi::{Driver, serve};
use vinelet::mounts::{Device, Fake, Fault, Mounted, Shown};
use vinelet::readiness::Readiness;
use vinelet::runtimes::{Board, RuntimeId};
use vinelet::sockets::listen_unix;
use vinelet::volumes::{Figures, FiguresFuture, Roots, ShardFigures, Volumes};

const KUBELET: &str = "/var/lib/kubelet";
const ROOT: &str = "/runtime-mnt/vineyard";
const RUNTIME: &str = "/runtime-mnt/vineyard/default/vineyard";
const VOLUME: &str = "/var/lib/kubelet/pods/bbbbbbbb-0000-4000-8000-000000000002/volumes/kubernetes.io~csi/default-vineyard";

fn target() -> String {
    format!("{VOLUME}/mount")
}

/// A shard that says 100 of 1000 bytes, after a pause.
#[derive(Default)]
struct Shard {
    pause: AtomicU64,
}

impl ShardFigures for Shard {
    fn figures<'a>(&'a self, id: &'a RuntimeId) -> FiguresFuture<'a> {
        Box::pin(async move {
            let pause = self.pause.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if id.name() == "broken" {
                return Err("connection refused".into());
            }
            Ok(Figures {
                total: 1000,
                used: 100,
            })
        })
    }
}

/// A driver behind a socket.
struct Node {
    fake: Fake,
    board: Board,
    shard: Arc<Shard>,
    socket: PathBuf,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<()>,
    _directory: tempfile::TempDir,
}

fn default_runtime() -> RuntimeId {
    RuntimeId::new("default", "vineyard").unwrap()
}

impl Node {
    fn start() -> Self {
        Self::start_with(false)
    }

    fn start_with(selinux_enforcing: bool) -> Self {
        let fake = Fake::with_directories([VOLUME, RUNTIME]);
        let board = Board::default();
        board.set(&default_runtime(), Readiness::Ready);
        board.complete();
        let shard = Arc::new(Shard::default());
        let roots = Roots {
            kubelet_dir: PathBuf::from(KUBELET),
            runtime_root: PathBuf::from(ROOT),
        };
        let mounter = Arc::new(fake.clone());
        let volumes = Volumes::new(
            roots,
            selinux_enforcing,
            mounter,
            board.clone(),
            shard.clone(),
        );
        let driver = Driver::new("vinelet.csi.v6d.io", "node-1", volumes).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("csi.sock");
        let listener = UnixListener::from_std({
            let listener = listen_unix(&socket, 0o600).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        })
        .unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
            };
            serve(listener, driver, stop).await.unwrap();
        });
        Self {
            fake,
            board,
            shard,
            socket,
            stop: Some(stop),
            server,
            _directory: directory,
        }
    }

    /// A new connection, as kubelet opens for every call.
    async fn channel(&self) -> Channel {
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    async fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel().await)
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let outcome = self.node().await.node_publish_volume(request).await;
        outcome.map(|_| ())
    }

    async fn unpublish(&self, id: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
        };
        self.node()
            .await
            .node_unpublish_volume(request)
            .await
            .map(|_| ())
    }

    async fn stats(&self, id: &str, path: &str) -> Result<(i64, i64, i64), Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            ..Default::default()
        };
        let reply = self
            .node()
            .await
            .node_get_volume_stats(request)
            .await?
            .into_inner();
        assert_eq!(reply.usage.len(), 1);
        let usage = &reply.usage[0];
        Ok((usage.total, usage.used, usage.available))
    }

    async fn is_ready(&self) -> Option<bool> {
        let mut client = IdentityClient::new(self.channel().await);
        client
            .probe(ProbeRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready
    }

    /// Nothing was mounted or made.
    fn assert_untouched(&self, what: &str) {
        assert_eq!(self.fake.changes(), 0, "{what}");
        assert!(!self.fake.exists(Path::new(&target())), "{what}");
    }
}

fn mount_capability(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn fluid_context() -> HashMap<String, String> {
    context(&[
        (
            "fluid_path",
            "/runtime-mnt/vineyard/default/vineyard/vineyard-fuse",
        ),
        ("mount_type", "vineyard-fuse"),
        ("runtime_name", "vineyard"),
        ("runtime_namespace", "default"),
        ("mount_pod_node_selector_key", "fluid.io/f-default-vineyard"),
        ("node_publish_method", "symlink"),
        ("csi.storage.k8s.io/ephemeral", "false"),
        ("csi.storage.k8s.io/pod.namespace", "default"),
    ])
}

fn context(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries
        .iter()
        .map(|&(k, v)| (k.to_owned(), v.to_owned()))
        .collect()
}

fn valid() -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: "default-vineyard".to_owned(),
        target_path: target(),
        volume_capability: Some(mount_capability(Mode::MultiNodeReaderOnly)),
        volume_context: fluid_context(),
        ..Default::default()
    }
}

fn inline(entries: &[(&str, &str)]) -> NodePublishVolumeRequest {
    let mut request = valid();
    request.volume_id = format!("csi-{}", "0123456789abcdef".repeat(4));
    request.volume_capability = Some(mount_capability(Mode::SingleNodeWriter));
    request.volume_context = context(entries);
    request
}

#[track_caller]
fn refused(outcome: Result<(), Status>, code: Code, message: &str) {
    let status = outcome.expect_err(message);
    assert_eq!((status.code(), status.message()), (code, message));
    assert!(status.details().is_empty());
}

#[tokio::test]
async fn who_and_what_we_are() {
    let node = Node::start();
    let mut identity = IdentityClient::new(node.channel().await);
    let info = identity
        .get_plugin_info(GetPluginInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.name, "vinelet.csi.v6d.io");
    assert_eq!(info.vendor_version, env!("CARGO_PKG_VERSION"));
    let request = GetPluginCapabilitiesRequest {};
    let capabilities = identity.get_plugin_capabilities(request).await.unwrap();
    assert!(capabilities.into_inner().capabilities.is_empty());
    let mut client = node.node().await;
    let info = client
        .node_get_info(NodeGetInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.node_id, "node-1");
    assert_eq!(info.accessible_topology, None);
    let request = NodeGetCapabilitiesRequest {};
    let reply = client
        .node_get_capabilities(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(reply.capabilities.len(), 1);
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(&node.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_volume_appears_read_only_and_vanishes_with_its_directory() {
    let node = Node::start();
    node.publish(valid()).await.unwrap();
    assert_eq!(node.fake.depth(Path::new(&target())), 1);
    assert_eq!(
        node.stats("default-vineyard", &target()).await.unwrap(),
        (1000, 100, 900)
    );
    node.unpublish("default-vineyard", &target()).await.unwrap();
    assert_eq!(node.fake.depth(Path::new(&target())), 0);
    assert!(!node.fake.exists(Path::new(&target())));
    assert!(node.fake.exists(Path::new(VOLUME)));
}

#[tokio::test]
async fn a_second_publish_of_the_same_volume_changes_nothing() {
    let node = Node::start();
    node.publish(valid()).await.unwrap();
    let changes = node.fake.changes();
    for _ in 0..3 {
        let mut again = valid();
        again.readonly = !again.readonly;
        node.publish(again).await.unwrap();
    }
    // Nor does it need its runtime.
    node.board.set(
        &default_runtime(),
        Readiness::Failing("its shard is down".to_owned()),
    );
    node.publish(valid()).await.unwrap();
    assert_eq!(node.fake.changes(), changes);
}

#[tokio::test]
async fn every_access_mode_is_accepted() {
    for mode in [
        Mode::SingleNodeWriter,
        Mode::SingleNodeReaderOnly,
        Mode::SingleNodeSingleWriter,
        Mode::SingleNodeMultiWriter,
        Mode::MultiNodeReaderOnly,
        Mode::MultiNodeSingleWriter,
        Mode::MultiNodeMultiWriter,
    ] {
        let node = Node::start();
        let mut request = valid();
        request.volume_capability = Some(mount_capability(mode));
        node.publish(request).await.unwrap();
    }
}

type Break = fn(&mut NodePublishVolumeRequest);

fn mount_of(request: &mut NodePublishVolumeRequest) -> &mut MountVolume {
    match request
        .volume_capability
        .as_mut()
        .unwrap()
        .access_type
        .as_mut()
        .unwrap()
    {
        AccessType::Mount(mount) => mount,
        AccessType::Block(_) => panic!("block"),
    }
}

#[tokio::test]
async fn each_broken_field_of_a_publish_has_its_answer_and_touches_nothing() {
    let long = "x".repeat(129);
    let deep = format!("{KUBELET}/{}", "a/".repeat(2050));
    let length = deep.len();
    let rows: Vec<(Break, String)> = vec![
        (|r| r.volume_id.clear(), "volume_id is required".into()),
        (
            |r| r.volume_id = "x".repeat(129),
            format!("volume_id has {} bytes, at most 128 are allowed", long.len()),
        ),
        (|r| r.target_path.clear(), "target_path is required".into()),
        (
            |r| r.target_path = format!("{KUBELET}/{}", "a/".repeat(2050)),
            format!("target_path has {length} bytes, at most 4095 are allowed"),
        ),
        (|r| r.target_path = "pods/mount".into(), "target_path: pods/mount is not an absolute path".into()),
        (
            |r| r.target_path = format!("{KUBELET}/pods/../../etc"),
            format!("target_path: {KUBELET}/pods/../../etc contains '..'"),
        ),
        (
            |r| r.target_path = "/etc/mount".into(),
            format!("target_path: /etc/mount is not beneath kubelet's directory {KUBELET}"),
        ),
        (
            |r| r.target_path = KUBELET.into(),
            format!("target_path: {KUBELET} is not beneath kubelet's directory {KUBELET}"),
        ),
        (|r| r.target_path = format!("{VOLUME}/a\0b"), "target_path contains a NUL byte".into()),
        (|r| r.volume_capability = None, "volume_capability is required".into()),
        (
            |r| r.volume_capability.as_mut().unwrap().access_type = None,
            "volume_capability.access_type is required".into(),
        ),
        (
            |r| r.volume_capability.as_mut().unwrap().access_mode = None,
            "volume_capability.access_mode is required".into(),
        ),
        (
            |r| r.volume_capability = Some(mount_capability(Mode::Unknown)),
            "volume_capability.access_mode.mode is required".into(),
        ),
        (
            |r| r.volume_capability.as_mut().unwrap().access_mode = Some(AccessMode { mode: 99 }),
            "volume_capability.access_mode 99 is not one of the CSI specification".into(),
        ),
        (
            |r| {
                let block = AccessType::Block(BlockVolume {});
                r.volume_capability.as_mut().unwrap().access_type = Some(block);
            },
            "volume_capability asks for a block device: vinelet volumes are directories, write volumeMode: Filesystem".into(),
        ),
        (
            |r| mount_of(r).fs_type = "nfs4".into(),
            "volume_capability.mount.fs_type \"nfs4\" means nothing for a directory of sockets: leave fsType out".into(),
        ),
        (
            |r| mount_of(r).mount_flags = vec!["ro".into(), "sync".into()],
            "volume_capability.mount.mount_flags: \"sync\" is not supported, volumes are bound ro,nosuid,nodev,noexec: remove it from mountOptions".into(),
        ),
        (
            |r| mount_of(r).volume_mount_group = "2000".into(),
            "volume_capability.mount.volume_mount_group \"2000\" is not supported, sockets are open to every user: remove it".into(),
        ),
        (
            |r| r.volume_context.clear(),
            "volume_context names no runtime: write runtimeNamespace and runtimeName (or, as fluid does, fluid_path)".into(),
        ),
        (
            |r| {
                r.volume_context.insert("fluid_path".into(), "/etc".into());
            },
            "volume_context fluid_path \"/etc\" is not /runtime-mnt/vineyard/<namespace>/<name>/vineyard-fuse".into(),
        ),
        (
            |r| {
                r.volume_context.insert("runtimeName".into(), "other".into());
            },
            "volume_context fluid_path says \"/runtime-mnt/vineyard/default/vineyard/vineyard-fuse\" but runtimeName says \"other\": write one of them, or the same in both".into(),
        ),
        (
            |r| {
                r.volume_context.insert("fluid_sub_path".into(), "../x".into());
            },
            "volume_context fluid_sub_path \"../x\" is not a relative path without '..'".into(),
        ),
    ];
    for (break_it, message) in rows {
        let node = Node::start();
        let mut request = valid();
        break_it(&mut request);
        refused(node.publish(request).await, Code::InvalidArgument, &message);
        node.assert_untouched(&message);
    }
}

#[tokio::test]
async fn what_a_co_fills_in_by_default_is_no_mistake() {
    let node = Node::start();
    let mut request = valid();
    mount_of(&mut request).fs_type = "ext4".into();
    mount_of(&mut request).mount_flags = vec!["ro".into(), "rw".into(), "nosuid".into()];
    request.staging_target_path = "/anywhere".into();
    request.secrets = context(&[("password", "hidden")]);
    node.publish(request).await.unwrap();
}

#[tokio::test]
async fn an_inline_volume_reaches_its_own_namespace_only() {
    const POD: [(&str, &str); 2] = [
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.namespace", "default"),
    ];
    let node = Node::start();
    let with = |more: &[(&str, &str)]| inline(&[&POD, more].concat());
    refused(
        node.publish(with(&[
            ("runtimeName", "features"),
            ("runtimeNamespace", "ml"),
        ]))
        .await,
        Code::InvalidArgument,
        "an ephemeral inline volume of a pod in namespace \"default\" cannot use a runtime of namespace \"ml\": leave runtimeNamespace out, or use a PersistentVolume",
    );
    refused(
        node.publish(inline(&[
            ("runtimeName", "vineyard"),
            ("runtimeNamespace", "default"),
        ]))
        .await,
        Code::FailedPrecondition,
        "kubelet does not say of which pod this ephemeral inline volume is: set podInfoOnMount: true in the CSIDriver object",
    );
    refused(
        node.publish(with(&[("runtimeName", "vineyard"), ("tpyo", "x")]))
            .await,
        Code::InvalidArgument,
        "volumeAttributes have the key \"tpyo\", which is not understood: an ephemeral inline volume takes runtimeName and runtimeNamespace",
    );
    node.assert_untouched("refused inline volumes");
    node.publish(with(&[("runtimeName", "vineyard")]))
        .await
        .unwrap();
}

fn foreign(root: &str) -> Mounted {
    Mounted {
        shown: Shown {
            device: Device {
                major: 0,
                minor: 60,
            },
            root: PathBuf::from(root),
        },
        fstype: "nfs4".to_owned(),
        read_only: true,
        alive: true,
    }
}

#[tokio::test]
async fn what_stands_at_the_target_is_named_and_left_alone() {
    let path = PathBuf::from(target());
    let taken = |what: &str| format!("target_path {} is taken by {what}", path.display());

    let node = Node::start();
    node.fake.add_directory(&path);
    node.fake.add_mount(&path, foreign("/share"));
    refused(
        node.publish(valid()).await,
        Code::AlreadyExists,
        &taken("a mount of /share of the nfs4 filesystem on device 0:60"),
    );
    assert_eq!(node.fake.depth(&path), 1);

    let node = Node::start();
    node.fake
        .add_directory(Path::new("/runtime-mnt/vineyard/ml/features"));
    node.board
        .set(&RuntimeId::new("ml", "features").unwrap(), Readiness::Ready);
    let mut other = valid();
    other.volume_context = context(&[("runtimeNamespace", "ml"), ("runtimeName", "features")]);
    node.publish(other).await.unwrap();
    refused(
        node.publish(valid()).await,
        Code::AlreadyExists,
        &taken("a mount of /runtime-mnt/vineyard/ml/features of the ext4 filesystem on device 8:1"),
    );

    let node = Node::start();
    node.fake.add_directory(&path);
    let mut writable = foreign(RUNTIME);
    writable.shown.device = Device { major: 8, minor: 1 };
    writable.read_only = false;
    node.fake.add_mount(&path, writable);
    refused(
        node.publish(valid()).await,
        Code::AlreadyExists,
        &taken("this volume, but writable"),
    );

    let node = Node::start();
    node.fake.add_symlink(
        &path,
        Path::new("/runtime-mnt/vineyard/default/vineyard/vineyard-fuse"),
    );
    refused(
        node.publish(valid()).await,
        Code::FailedPrecondition,
        &taken("a symbolic link to /runtime-mnt/vineyard/default/vineyard/vineyard-fuse"),
    );
    node.unpublish("default-vineyard", &target()).await.unwrap();
    assert!(!node.fake.exists(&path));

    let node = Node::start();
    node.fake.add_directory(&path.join("data"));
    refused(
        node.publish(valid()).await,
        Code::FailedPrecondition,
        &taken("a directory with something in it"),
    );
    let kept = node
        .unpublish("default-vineyard", &target())
        .await
        .unwrap_err();
    assert_eq!(kept.code(), Code::Internal);
    assert!(node.fake.exists(&path.join("data")));

    let node = Node::start();
    node.fake.add_file(&path);
    refused(
        node.publish(valid()).await,
        Code::FailedPrecondition,
        &taken("a file that is no directory"),
    );

    let node = Node::start();
    node.fake.add_directory(&path);
    node.publish(valid()).await.unwrap();
}

#[tokio::test]
async fn a_target_behind_a_link_or_without_its_parent_is_refused() {
    let node = Node::start();
    node.fake
        .add_symlink(Path::new(&format!("{KUBELET}/link")), Path::new("/etc"));
    let linked = format!("{KUBELET}/link/mount");
    let message = format!("target_path {linked} is reached through a symbolic link");
    let mut request = valid();
    request.target_path.clone_from(&linked);
    refused(node.publish(request).await, Code::InvalidArgument, &message);
    refused(
        node.unpublish("v", &linked).await,
        Code::InvalidArgument,
        &message,
    );

    let orphan = format!("{KUBELET}/pods/gone/mount");
    let mut request = valid();
    request.target_path.clone_from(&orphan);
    refused(
        node.publish(request).await,
        Code::FailedPrecondition,
        &format!("the directory above target_path {orphan} does not exist: the caller makes it"),
    );
    assert!(!node.fake.exists(Path::new(&format!("{KUBELET}/pods/gone"))));
    node.assert_untouched("links and orphans");
}

#[tokio::test]
async fn a_sub_path_is_bound_if_it_is_a_plain_directory() {
    let sub = |path: &str| {
        let mut request = valid();
        request
            .volume_context
            .insert("fluid_sub_path".to_owned(), path.to_owned());
        request
    };
    let node = Node::start();
    node.fake
        .add_directory(Path::new(RUNTIME).join("rpc-conf").as_path());
    node.fake
        .add_file(Path::new(RUNTIME).join("file").as_path());
    node.fake
        .add_symlink(Path::new(RUNTIME).join("link").as_path(), Path::new("/etc"));
    refused(
        node.publish(sub("missing")).await,
        Code::NotFound,
        &format!("fluid_sub_path: {RUNTIME}/missing does not exist"),
    );
    for (name, what) in [
        ("file", "a file"),
        ("link", "a symbolic link"),
        ("link/x", "a symbolic link"),
    ] {
        refused(
            node.publish(sub(name)).await,
            Code::InvalidArgument,
            &format!(
                "fluid_sub_path: {RUNTIME}/{name} is {what}, not a plain directory reached without symbolic links"
            ),
        );
    }
    node.assert_untouched("bad sub paths");
    node.publish(sub("rpc-conf")).await.unwrap();
    // The figures are the runtime's all the same.
    assert_eq!(node.stats("v", &target()).await.unwrap().0, 1000);
}

#[tokio::test]
async fn a_runtime_that_is_not_ready_is_waited_for_within_the_deadline() {
    let node = Node::start();
    node.board.set(
        &default_runtime(),
        Readiness::Starting("its socket".to_owned()),
    );
    let mut request = Request::new(valid());
    request.set_timeout(Duration::from_millis(500));
    let begin = Instant::now();
    let outcome = node
        .node()
        .await
        .node_publish_volume(request)
        .await
        .map(|_| ());
    assert!(begin.elapsed() < Duration::from_millis(500));
    refused(
        outcome,
        Code::Unavailable,
        "runtime default/vineyard is not ready: starting: its socket",
    );
    node.assert_untouched("not ready");

    let board = node.board.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        board.set(&default_runtime(), Readiness::Ready);
    });
    let mut request = Request::new(valid());
    request.set_timeout(Duration::from_secs(20));
    let begin = Instant::now();
    node.node()
        .await
        .node_publish_volume(request)
        .await
        .unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn an_unknown_runtime_is_not_found() {
    let node = Node::start();
    let mut request = valid();
    request.volume_context = context(&[("runtimeNamespace", "ml"), ("runtimeName", "x")]);
    refused(
        node.publish(request).await,
        Code::NotFound,
        "no runtime ml/x on this node (known here: default/vineyard)",
    );
}

#[tokio::test]
async fn a_volume_or_target_with_a_call_in_flight_answers_aborted() {
    let node = Node::start();
    node.board.set(
        &default_runtime(),
        Readiness::Starting("its socket".to_owned()),
    );
    let mut client = node.node().await;
    let first = tokio::spawn(async move { client.node_publish_volume(valid()).await });
    // The first call is in flight once another one says so.
    let deadline = Instant::now() + Duration::from_secs(5);
    let busy = loop {
        let mut request = Request::new(valid());
        request.set_timeout(Duration::from_millis(50));
        let outcome = node.node().await.node_publish_volume(request).await;
        match outcome {
            Err(status) if status.code() == Code::Aborted => break status,
            _ => assert!(Instant::now() < deadline),
        }
    };
    assert_eq!(
        busy.message(),
        format!(
            "an operation on target_path {} is already in flight",
            target()
        )
    );
    let mut elsewhere = valid();
    elsewhere.target_path = format!("{VOLUME}/other");
    refused(
        node.publish(elsewhere).await,
        Code::Aborted,
        "an operation on volume default-vineyard is already in flight",
    );
    refused(
        node.unpublish("default-vineyard", &target()).await,
        Code::Aborted,
        &format!(
            "an operation on target_path {} is already in flight",
            target()
        ),
    );
    // Another target of the same volume may go at any time.
    node.unpublish("default-vineyard", &format!("{VOLUME}/other"))
        .await
        .unwrap();

    // The caller leaves: the claim goes with it and nothing was made.
    first.abort();
    let deadline = Instant::now() + Duration::from_secs(5);
    while node.unpublish("default-vineyard", &target()).await.is_err() {
        assert!(
            Instant::now() < deadline,
            "a claim is held after its caller left"
        );
    }
    node.assert_untouched("a cancelled publish");
    node.board.set(&default_runtime(), Readiness::Ready);
    node.publish(valid()).await.unwrap();
}

#[tokio::test]
async fn many_publishes_of_one_target_make_one_mount() {
    let node = Node::start();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let mut client = node.node().await;
        calls.spawn(async move { client.node_publish_volume(valid()).await.map(|_| ()) });
    }
    while let Some(outcome) = calls.join_next().await {
        if let Err(status) = outcome.unwrap() {
            assert_eq!(status.code(), Code::Aborted);
        }
    }
    node.publish(valid()).await.unwrap();
    assert_eq!(node.fake.depth(Path::new(&target())), 1);
}

#[tokio::test]
async fn a_publish_that_fails_leaves_nothing() {
    for (fault, number, message) in [
        (Fault::Bind, libc::EINVAL, "binding"),
        (Fault::CreateDir, libc::ENOSPC, "making the directory"),
        (Fault::Inspect, libc::EIO, "looking at"),
        (Fault::Bind, libc::EPERM, "CAP_SYS_ADMIN"),
    ] {
        let node = Node::start();
        node.fake.fail(fault, number);
        let status = node.publish(valid()).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert!(status.message().contains(message), "{status}");
        assert!(
            status
                .message()
                .starts_with(&format!("publishing at {}", target()))
        );
        node.assert_untouched(message);
        node.publish(valid()).await.unwrap();
    }
}

#[tokio::test]
async fn a_directory_that_was_there_before_stays_after_a_failure() {
    let node = Node::start();
    node.fake.add_directory(Path::new(&target()));
    node.fake.fail(Fault::Bind, libc::EINVAL);
    assert!(node.publish(valid()).await.is_err());
    assert!(node.fake.exists(Path::new(&target())));
}

#[tokio::test]
async fn each_broken_field_of_an_unpublish_has_its_answer() {
    let node = Node::start();
    for (id, path, message) in [
        ("", target().as_str(), "volume_id is required".to_owned()),
        ("v", "", "target_path is required".to_owned()),
        (
            "v",
            "mount",
            "target_path: mount is not an absolute path".to_owned(),
        ),
        (
            "v",
            "/etc/mount",
            format!("target_path: /etc/mount is not beneath kubelet's directory {KUBELET}"),
        ),
    ] {
        refused(
            node.unpublish(id, path).await,
            Code::InvalidArgument,
            &message,
        );
    }
}

#[tokio::test]
async fn unpublishing_depends_on_nothing_but_the_kernel() {
    let node = Node::start();
    node.publish(valid()).await.unwrap();
    // Stacked, unknown, absent; with the runtime gone.
    node.fake.add_mount(Path::new(&target()), foreign("/"));
    node.board.remove(&default_runtime());
    node.unpublish("some-other-volume", &target())
        .await
        .unwrap();
    assert!(!node.fake.exists(Path::new(&target())));
    node.unpublish("default-vineyard", &target()).await.unwrap();
    node.unpublish("v", &format!("{KUBELET}/pods/gone/volumes/mount"))
        .await
        .unwrap();
    node.fake.add_directory(Path::new(&target()));
    node.fake.fail(Fault::Unmount, libc::EBUSY);
    let status = node.unpublish("v", &target()).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    node.unpublish("v", &target()).await.unwrap();
}

#[tokio::test]
async fn figures_come_from_the_shard_or_say_why_not() {
    let node = Node::start();
    let stats = async |id: &str, path: &str| node.stats(id, path).await.map(|_| ());
    refused(
        stats("", &target()).await,
        Code::InvalidArgument,
        "volume_id is required",
    );
    refused(
        stats("v", "").await,
        Code::InvalidArgument,
        "volume_path is required",
    );
    for path in ["some/path", "/etc", &target(), VOLUME] {
        refused(
            stats("v", path).await,
            Code::NotFound,
            &format!("no volume of this driver is published at volume_path {path}"),
        );
    }
    let broken = RuntimeId::new("default", "broken").unwrap();
    node.fake
        .add_directory(Path::new("/runtime-mnt/vineyard/default/broken"));
    node.board.set(&broken, Readiness::Ready);
    let mut request = valid();
    request.volume_context = context(&[("runtimeNamespace", "default"), ("runtimeName", "broken")]);
    node.publish(request).await.unwrap();
    refused(
        stats("v", &target()).await,
        Code::Unavailable,
        "runtime default/broken tells no figures: connection refused",
    );
}

#[tokio::test]
async fn the_probe_asks_every_shard_that_is_said_to_be_ready() {
    let node = Node::start();
    assert_eq!(node.is_ready().await, Some(true));
    let broken = RuntimeId::new("default", "broken").unwrap();
    node.board
        .set(&broken, Readiness::Failing("port 9600 is taken".to_owned()));
    assert_eq!(node.is_ready().await, Some(true));
    node.board.set(&broken, Readiness::Ready);
    assert_eq!(node.is_ready().await, Some(false));
    node.board.remove(&broken);
    node.shard.pause.store(60_000, Ordering::Relaxed);
    let begin = Instant::now();
    assert_eq!(node.is_ready().await, Some(false));
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn where_selinux_enforces_the_hosts_side_is_writable() {
    let node = Node::start_with(true);
    node.publish(valid()).await.unwrap();
    node.publish(valid()).await.unwrap();
    assert_eq!(node.fake.depth(Path::new(&target())), 1);
}

#[tokio::test]
async fn calls_that_are_not_there_say_so() {
    let node = Node::start();
    let mut client = node.node().await;
    let stage = client
        .node_stage_volume(NodeStageVolumeRequest::default())
        .await;
    refused(
        stage.map(|_| ()),
        Code::Unimplemented,
        "NodeStageVolume is not among this driver's node capabilities",
    );
    let unstage = client
        .node_unstage_volume(NodeUnstageVolumeRequest::default())
        .await;
    assert_eq!(unstage.unwrap_err().code(), Code::Unimplemented);
    use vinelet::csi::grpc::csi::ControllerGetCapabilitiesRequest;
    use vinelet::csi::grpc::csi::controller_client::ControllerClient;
    let mut controller = ControllerClient::new(node.channel().await);
    let outcome = controller
        .controller_get_capabilities(ControllerGetCapabilitiesRequest {})
        .await;
    refused(
        outcome.map(|_| ()),
        Code::Unimplemented,
        "there is no call /csi.v1.Controller/ControllerGetCapabilities here",
    );
}

#[tokio::test]
async fn a_socket_path_as_authority_is_served() {
    // Old kubelets send the path of the CSI socket.
    let node = Node::start();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = UnixStream::connect(&node.socket).await.unwrap();
    let literal = |name: &str, value: &str| {
        let (n, v) = (
            u8::try_from(name.len()).unwrap(),
            u8::try_from(value.len()).unwrap(),
        );
        [&[0, n][..], name.as_bytes(), &[v], value.as_bytes()].concat()
    };
    let block = [
        vec![0x83, 0x86],
        literal(":path", "/csi.v1.Identity/GetPluginInfo"),
        literal(":authority", "/var/lib/kubelet/plugins/vinelet/csi.sock"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat();
    let length = u8::try_from(block.len()).unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    stream
        .write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    stream
        .write_all(&[0, 0, length, 1, 4, 0, 0, 0, 1])
        .await
        .unwrap();
    stream.write_all(&block).await.unwrap();
    stream
        .write_all(&[0, 0, 5, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    let mut answer = Vec::new();
    let name = b"vinelet.csi.v6d.io";
    let read = async {
        while !answer.windows(name.len()).any(|w| w == name) {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0);
        }
    };
    tokio::time::timeout(Duration::from_secs(5), read)
        .await
        .unwrap();
}

#[tokio::test]
async fn stopping_ends_within_seconds_though_a_call_waits() {
    let mut node = Node::start();
    node.board.set(
        &default_runtime(),
        Readiness::Starting("its socket".to_owned()),
    );
    let mut client = node.node().await;
    let waiting = tokio::spawn(async move { client.node_publish_volume(valid()).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    node.stop.take().unwrap().send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(8), &mut node.server)
        .await
        .unwrap()
        .unwrap();
    // The call ended with the server, and nothing is done for it later.
    let outcome = tokio::time::timeout(Duration::from_secs(1), waiting).await;
    assert!(outcome.unwrap().unwrap().is_err());
    node.assert_untouched("stopped");
}

/// What fluid's node plugin was asked, and what is answered here instead.
#[tokio::test]
async fn the_requests_recorded_with_fluid_are_answered_better() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/publish-requests.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let mut seen = 0;
    for line in text.lines() {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let id = case["id"].as_str().unwrap();
        let request = &case["request"];
        let word = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
        let expected = match id {
            "pub-symlink-repeat" | "pub-dangling-symlink" | "pub-nonempty-dir" => {
                Code::FailedPrecondition
            }
            "pub-while-locked" => Code::Aborted,
            "pub-deadline-ignored" | "pub-not-ready" => Code::Unavailable,
            "pub-subpath-missing" | "pub-skip-check-missing" => Code::NotFound,
            "pub-no-target" | "pub-no-fluid-path" | "pub-shell-char" | "pub-dotdot"
            | "unpub-no-target" => Code::InvalidArgument,
            _ if id.starts_with("stage") || id.starts_with("unstage") => Code::Unimplemented,
            _ => Code::Ok,
        };
        let node = Node::start();
        let there = PathBuf::from(target());
        match id {
            "pub-symlink-repeat"
            | "pub-dangling-symlink"
            | "unpub-symlink"
            | "unpub-dangling-symlink" => {
                let text = "/runtime-mnt/vineyard/default/vineyard/vineyard-fuse";
                node.fake.add_symlink(&there, Path::new(text));
            }
            "pub-nonempty-dir" => node.fake.add_directory(&there.join("x")),
            "pub-bind-repeat"
            | "unpub-bind-one-disk"
            | "unpub-bind-two-disks"
            | "unpub-bind-nested" => node.publish(valid()).await.unwrap(),
            "pub-while-locked" | "pub-deadline-ignored" | "pub-not-ready" => {
                let starting = Readiness::Starting("its socket".to_owned());
                node.board.set(&default_runtime(), starting);
            }
            _ => {}
        }
        let mut client = node.node().await;
        let code = match case["call"].as_str().unwrap() {
            "NodePublishVolume" => {
                let context = request["volume_context"]
                    .as_object()
                    .cloned()
                    .unwrap_or_default();
                let mode = request["volume_capability"]["access_mode"]
                    .as_str()
                    .unwrap();
                let message = NodePublishVolumeRequest {
                    volume_id: word("volume_id"),
                    target_path: word("target_path"),
                    staging_target_path: word("staging_target_path"),
                    volume_capability: Some(mount_capability(Mode::from_str_name(mode).unwrap())),
                    readonly: request["readonly"].as_bool().unwrap_or_default(),
                    volume_context: context
                        .into_iter()
                        .map(|(k, v)| (k, v.as_str().unwrap().to_owned()))
                        .collect(),
                    ..Default::default()
                };
                let first = (id == "pub-while-locked").then(|| {
                    let (mut client, message) = (client.clone(), message.clone());
                    tokio::spawn(async move { client.node_publish_volume(message).await })
                });
                if first.is_some() {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                let mut message = Request::new(message);
                message.set_timeout(Duration::from_millis(800));
                client.node_publish_volume(message).await.map(|_| ())
            }
            "NodeUnpublishVolume" => {
                let outcome = node
                    .unpublish(&word("volume_id"), &word("target_path"))
                    .await;
                if expected == Code::Ok {
                    assert!(!node.fake.exists(&there), "{id}");
                }
                outcome
            }
            "NodeStageVolume" => client
                .node_stage_volume(NodeStageVolumeRequest::default())
                .await
                .map(|_| ()),
            "NodeUnstageVolume" => client
                .node_unstage_volume(NodeUnstageVolumeRequest::default())
                .await
                .map(|_| ()),
            other => panic!("{other}"),
        };
        let code = code.map_or_else(|status| status.code(), |()| Code::Ok);
        assert_eq!(code, expected, "{id}");
        seen += 1;
    }
    assert_eq!(seen, 34);
}
