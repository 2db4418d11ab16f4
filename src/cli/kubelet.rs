//! A kubelet small enough for `vinelet dev`: registers the plugin, publishes one volume.
//!
//! It does what a kubelet does in the same order: GetInfo on the registration socket, NodeGetInfo
//! on the endpoint it was told, NotifyRegistrationStatus; then NodePublishVolume for a target
//! whose parent it has made. Every call is a connection of its own.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use notify::{RecursiveMode, Watcher};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tonic::transport::Channel;

use crate::csi::grpc::csi::node_client::NodeClient;
use crate::csi::grpc::csi::volume_capability::access_mode::Mode;
use crate::csi::grpc::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use crate::csi::grpc::csi::{
    NodeGetInfoRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use crate::csi::grpc::registration::registration_client::RegistrationClient;
use crate::csi::grpc::registration::{InfoRequest, RegistrationStatus};

/// One pod's volume, as kubelet would lay it out.
#[derive(Clone, Debug)]
pub(super) struct Volume {
    /// `spec.csi.volumeHandle` of the PersistentVolume.
    pub(super) id: String,
    /// Where it shall appear.
    pub(super) target: PathBuf,
    /// `spec.csi.volumeAttributes` and what kubelet adds of the pod.
    pub(super) context: HashMap<String, String>,
}

/// Waits until the plugin's registration socket is in `registry`, then registers it.
/// Returns the CSI endpoint that the plugin named.
pub(super) async fn register(registry: &Path, driver: &str) -> anyhow::Result<PathBuf> {
    let socket = registry.join(format!("{driver}-reg.sock"));
    listening(registry, &socket).await?;
    let channel = crate::csi::connect(&socket).await?;
    let mut plugin = RegistrationClient::new(channel);
    let info = plugin
        .get_info(InfoRequest {})
        .await
        .context("GetInfo on the registration socket")?
        .into_inner();
    if info.name != driver || info.r#type != "CSIPlugin" {
        bail!(
            "the plugin calls itself {:?} of type {:?}",
            info.name,
            info.r#type
        );
    }
    let endpoint = PathBuf::from(info.endpoint);
    let mut node = connect(&endpoint).await?;
    node.node_get_info(NodeGetInfoRequest {})
        .await
        .context("NodeGetInfo")?;
    let status = RegistrationStatus {
        plugin_registered: true,
        error: String::new(),
    };
    plugin
        .notify_registration_status(status)
        .await
        .context("NotifyRegistrationStatus")?;
    Ok(endpoint)
}

/// NodePublishVolume, with as much patience as kubelet has for it.
pub(super) async fn publish(endpoint: &Path, volume: &Volume) -> anyhow::Result<()> {
    if let Some(parent) = volume.target.parent() {
        // Kubelet makes the parent, 0750; the plugin makes the target.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .with_context(|| format!("making {}", parent.display()))?;
    }
    let mut request = tonic::Request::new(NodePublishVolumeRequest {
        volume_id: volume.id.clone(),
        target_path: text(&volume.target)?,
        volume_capability: Some(VolumeCapability {
            access_mode: Some(AccessMode {
                mode: Mode::MultiNodeReaderOnly.into(),
            }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        volume_context: volume.context.clone(),
        ..NodePublishVolumeRequest::default()
    });
    request.set_timeout(Duration::from_secs(30));
    connect(endpoint)
        .await?
        .node_publish_volume(request)
        .await
        .map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))
        .context("NodePublishVolume")?;
    Ok(())
}

/// NodeUnpublishVolume.
pub(super) async fn unpublish(endpoint: &Path, volume: &Volume) -> anyhow::Result<()> {
    let mut request = tonic::Request::new(NodeUnpublishVolumeRequest {
        volume_id: volume.id.clone(),
        target_path: text(&volume.target)?,
    });
    request.set_timeout(Duration::from_secs(5));
    connect(endpoint)
        .await?
        .node_unpublish_volume(request)
        .await
        .map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))
        .context("NodeUnpublishVolume")?;
    Ok(())
}

async fn connect(endpoint: &Path) -> anyhow::Result<NodeClient<Channel>> {
    Ok(NodeClient::new(crate::csi::connect(endpoint).await?))
}

fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str();
    text.map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Returns once somebody listens at `socket` in `directory`: there may be one that an agent left
/// when it was killed.
async fn listening(directory: &Path, socket: &Path) -> anyhow::Result<()> {
    let changed = std::sync::Arc::new(Notify::new());
    let signal = changed.clone();
    let mut watcher = notify::recommended_watcher(move |_: notify::Result<notify::Event>| {
        signal.notify_one();
    })
    .context("watching the registry")?;
    watcher
        .watch(directory, RecursiveMode::NonRecursive)
        .with_context(|| format!("watching {}", directory.display()))?;
    while UnixStream::connect(socket).await.is_err() {
        changed.notified().await;
    }
    Ok(())
}
