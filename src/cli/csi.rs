//! `vinelet csi`: each CSI call by hand, for people and tests.
//!
//! Requests are sent as they are written, wrong ones too. As kubelet does, every call opens a
//! connection of its own.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::csi::grpc::csi::identity_client::IdentityClient;
use crate::csi::grpc::csi::node_client::NodeClient;
use crate::csi::grpc::csi::node_service_capability::rpc::Type as RpcType;
use crate::csi::grpc::csi::node_service_capability::{Rpc, Type as NodeType};
use crate::csi::grpc::csi::plugin_capability::Type as PluginType;
use crate::csi::grpc::csi::plugin_capability::service::Type as ServiceType;
use crate::csi::grpc::csi::volume_capability::access_mode::Mode;
use crate::csi::grpc::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use crate::csi::grpc::csi::volume_usage::Unit;
use crate::csi::grpc::csi::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest,
    NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};

/// Speaks CSI by hand: one call, its reply as JSON.
#[derive(Args, Debug)]
pub struct CsiArgs {
    /// The driver's CSI socket, a path or unix:// URL.
    #[arg(
        long,
        global = true,
        env = "CSI_ENDPOINT",
        default_value = "/var/lib/kubelet/plugins/vinelet.csi.v6d.io/csi.sock"
    )]
    socket: String,
    /// How long to wait for the reply, in seconds; sent along as the call's deadline.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 120.0)]
    timeout: f64,
    #[command(subcommand)]
    call: Call,
}

#[derive(Subcommand, Debug)]
enum Call {
    /// GetPluginInfo: who the driver is.
    Info,
    /// GetPluginCapabilities: which services it has.
    Capabilities,
    /// Probe: whether it works.
    Probe,
    /// NodeGetInfo: how the node is called.
    NodeInfo,
    /// NodeGetCapabilities: which calls it knows.
    NodeCapabilities,
    /// NodePublishVolume: make a volume appear at a path.
    Publish(Publish),
    /// NodeUnpublishVolume: make it vanish.
    Unpublish {
        /// The volume's id.
        #[arg(long)]
        volume_id: String,
        /// Where it is published.
        #[arg(long)]
        target: String,
    },
    /// NodeGetVolumeStats: how full it is.
    Stats {
        /// The volume's id.
        #[arg(long)]
        volume_id: String,
        /// Where it is published.
        #[arg(long)]
        path: String,
    },
}

#[derive(Args, Debug)]
struct Publish {
    /// The volume's id.
    #[arg(long)]
    volume_id: String,
    /// Where it shall appear; the directory above must exist.
    #[arg(long)]
    target: String,
    /// An entry of volume_context; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    context: Vec<(String, String)>,
    /// Ask for a read-only volume.
    #[arg(long)]
    readonly: bool,
    /// The access mode, by name or number.
    #[arg(long, value_name = "MODE", value_parser = access_mode, default_value = "MULTI_NODE_READER_ONLY")]
    access_mode: i32,
    /// The filesystem type.
    #[arg(long, value_name = "TYPE", default_value = "")]
    fs_type: String,
    /// A mount flag; may be repeated.
    #[arg(long, value_name = "FLAG")]
    mount_flag: Vec<String>,
    /// Send no volume_capability.
    #[arg(long)]
    no_capability: bool,
    /// Ask for a block device.
    #[arg(long)]
    block: bool,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it is not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn access_mode(text: &str) -> Result<i32, String> {
    let by_name = Mode::from_str_name(text).map(i32::from);
    by_name.or_else(|| text.parse().ok()).ok_or_else(|| {
        "it is none of SINGLE_NODE_WRITER, SINGLE_NODE_READER_ONLY, MULTI_NODE_READER_ONLY, \
         MULTI_NODE_SINGLE_WRITER, MULTI_NODE_MULTI_WRITER, SINGLE_NODE_SINGLE_WRITER, \
         SINGLE_NODE_MULTI_WRITER, and no number"
            .to_owned()
    })
}

/// Runs the call; prints its reply, or the error's code and message.
pub fn run(args: CsiArgs) -> ExitCode {
    let Ok(timeout) = Duration::try_from_secs_f64(args.timeout) else {
        eprintln!("error: --timeout {} is no duration", args.timeout);
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(call(&args, timeout)),
        Err(error) => Err(Status::internal(format!(
            "starting the async runtime: {error}"
        ))),
    };
    match outcome {
        Ok(reply) => {
            println!("{reply:#}");
            ExitCode::SUCCESS
        }
        Err(status) => {
            eprintln!("{}: {}", code_name(status.code()), status.message());
            ExitCode::FAILURE
        }
    }
}

async fn call(args: &CsiArgs, timeout: Duration) -> Result<Value, Status> {
    let path = args.socket.strip_prefix("unix://").unwrap_or(&args.socket);
    let channel = connect(Path::new(path)).await?;
    let mut identity = IdentityClient::new(channel.clone());
    let mut node = NodeClient::new(channel);
    Ok(match &args.call {
        Call::Info => {
            let request = with(timeout, GetPluginInfoRequest {});
            let reply = identity.get_plugin_info(request).await?.into_inner();
            json!({
                "name": reply.name,
                "vendor_version": reply.vendor_version,
                "manifest": reply.manifest,
            })
        }
        Call::Capabilities => {
            let request = with(timeout, GetPluginCapabilitiesRequest {});
            let reply = identity
                .get_plugin_capabilities(request)
                .await?
                .into_inner();
            let names = reply.capabilities.iter().filter_map(|c| c.r#type.as_ref());
            let names: Vec<_> = names
                .map(|kind| match kind {
                    PluginType::Service(service) => ServiceType::try_from(service.r#type)
                        .map_or("UNKNOWN", |kind| kind.as_str_name()),
                    PluginType::VolumeExpansion(_) => "VOLUME_EXPANSION",
                })
                .collect();
            json!({ "capabilities": names })
        }
        Call::Probe => {
            let reply = identity
                .probe(with(timeout, ProbeRequest {}))
                .await?
                .into_inner();
            json!({ "ready": reply.ready })
        }
        Call::NodeInfo => {
            let request = with(timeout, NodeGetInfoRequest {});
            let reply = node.node_get_info(request).await?.into_inner();
            json!({
                "node_id": reply.node_id,
                "max_volumes_per_node": reply.max_volumes_per_node,
                "accessible_topology": reply.accessible_topology.map(|t| t.segments),
            })
        }
        Call::NodeCapabilities => {
            let request = with(timeout, NodeGetCapabilitiesRequest {});
            let reply = node.node_get_capabilities(request).await?.into_inner();
            let names = reply.capabilities.iter().filter_map(|c| c.r#type);
            let names: Vec<_> = names
                .map(|NodeType::Rpc(Rpc { r#type })| {
                    RpcType::try_from(r#type).map_or("UNKNOWN", |kind| kind.as_str_name())
                })
                .collect();
            json!({ "capabilities": names })
        }
        Call::Publish(publish) => {
            node.node_publish_volume(with(timeout, publish.request()))
                .await?;
            json!({})
        }
        Call::Unpublish { volume_id, target } => {
            let request = NodeUnpublishVolumeRequest {
                volume_id: volume_id.clone(),
                target_path: target.clone(),
            };
            node.node_unpublish_volume(with(timeout, request)).await?;
            json!({})
        }
        Call::Stats { volume_id, path } => {
            let request = NodeGetVolumeStatsRequest {
                volume_id: volume_id.clone(),
                volume_path: path.clone(),
                ..Default::default()
            };
            let reply = node
                .node_get_volume_stats(with(timeout, request))
                .await?
                .into_inner();
            let usage: Vec<_> = reply
                .usage
                .iter()
                .map(|usage| {
                    json!({
                        "unit": Unit::try_from(usage.unit).map_or("UNKNOWN", |u| u.as_str_name()),
                        "total": usage.total,
                        "used": usage.used,
                        "available": usage.available,
                    })
                })
                .collect();
            json!({ "usage": usage })
        }
    })
}

impl Publish {
    fn request(&self) -> NodePublishVolumeRequest {
        let access_type = if self.block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: self.fs_type.clone(),
                mount_flags: self.mount_flag.clone(),
                volume_mount_group: String::new(),
            })
        };
        let capability = VolumeCapability {
            access_mode: Some(AccessMode {
                mode: self.access_mode,
            }),
            access_type: Some(access_type),
        };
        NodePublishVolumeRequest {
            volume_id: self.volume_id.clone(),
            target_path: self.target.clone(),
            volume_capability: (!self.no_capability).then_some(capability),
            readonly: self.readonly,
            volume_context: self.context.iter().cloned().collect::<HashMap<_, _>>(),
            ..Default::default()
        }
    }
}

fn with<T>(timeout: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

async fn connect(path: &Path) -> Result<Channel, Status> {
    crate::csi::connect(path).await.map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            let why = error.to_string();
            // A wrapper that shows its cause's words does not say them twice.
            if !text.ends_with(&why) {
                text.push_str(": ");
                text.push_str(&why);
            }
            cause = error.source();
        }
        Status::unavailable(text)
    })
}

/// The code's name in the gRPC specification.
fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
