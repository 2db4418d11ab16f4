//! The Node service: decode, call the volumes, encode.

use std::future::Future;
use std::time::Instant;

use tonic::{Code, Request, Response, Status};
use tracing::{Instrument, Span};

use crate::volumes::{Mounter, Published};

use super::Driver;
use super::grpc::csi::node_server::Node;
use super::grpc::csi::node_service_capability::rpc::Type as RpcType;
use super::grpc::csi::node_service_capability::{Rpc, Type};
use super::grpc::csi::volume_usage::Unit;
use super::grpc::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetStorageHealthRequest, NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest,
    NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, VolumeUsage,
};
use super::{request, status};

/// A call's one line in the log, written where it ends, also where the caller left.
struct Ending {
    span: Span,
    begin: Instant,
    is_written: bool,
}

impl Ending {
    fn milliseconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64() * 1e3
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.is_written {
            let milliseconds = self.milliseconds();
            self.span
                .in_scope(|| tracing::warn!(milliseconds, "the caller left"));
        }
    }
}

/// Whether a call changed something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    Change,
    Nothing,
}

/// Does the work within the span and logs how it ended.
async fn answered<T>(
    span: Span,
    work: impl Future<Output = Result<(T, Did), Status>>,
) -> Result<Response<T>, Status> {
    let mut ending = Ending {
        span: span.clone(),
        begin: Instant::now(),
        is_written: false,
    };
    let outcome = work.instrument(span.clone()).await;
    let milliseconds = ending.milliseconds();
    ending.is_written = true;
    span.in_scope(|| match &outcome {
        Ok((_, Did::Change)) => tracing::info!(milliseconds, "done"),
        Ok((_, Did::Nothing)) => tracing::debug!(milliseconds, "nothing to do"),
        Err(status) if status.code() == Code::Internal => {
            let error = status.message();
            tracing::error!(milliseconds, code = ?status.code(), error, "failed");
        }
        Err(status) => {
            let error = status.message();
            tracing::warn!(milliseconds, code = ?status.code(), error, "refused");
        }
    });
    outcome.map(|(reply, _)| Response::new(reply))
}

fn unimplemented<T>(call: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!(
        "{call} is not among this driver's node capabilities"
    )))
}

#[tonic::async_trait]
impl<M: Mounter> Node for Driver<M> {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let timeout = request.metadata().get("grpc-timeout");
        let timeout = timeout
            .and_then(|value| value.to_str().ok())
            .and_then(request::timeout);
        let request = request.into_inner();
        // The id and the target alone: the context may hold tokens, and secrets are secrets.
        let span = tracing::info_span!(
            "publish",
            volume_id = ?request.volume_id,
            target_path = ?request.target_path,
            runtime = tracing::field::Empty,
        );
        answered(span.clone(), async {
            let publish = request::publish(&request, self.volumes().roots())
                .map_err(|error| status::request(&error))?;
            span.record("runtime", tracing::field::display(&publish.source.runtime));
            let done = self
                .volumes()
                .publish(&publish, request::patience(timeout))
                .await;
            let done = done.map_err(|error| status::publish(&error))?;
            let did = match done {
                Published::Now => Did::Change,
                Published::Before => Did::Nothing,
            };
            Ok((NodePublishVolumeResponse {}, did))
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!(
            "unpublish",
            volume_id = ?request.volume_id,
            target_path = ?request.target_path,
            mounts = tracing::field::Empty,
        );
        answered(span.clone(), async {
            let target = request::unpublish(&request, self.volumes().roots())
                .map_err(|error| status::request(&error))?;
            let detached = self.volumes().unpublish(&target).await;
            let detached = detached.map_err(|error| status::unpublish(&error))?;
            span.record("mounts", detached);
            let did = if detached == 0 {
                Did::Nothing
            } else {
                Did::Change
            };
            Ok((NodeUnpublishVolumeResponse {}, did))
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!(
            "stats",
            volume_id = ?request.volume_id,
            volume_path = ?request.volume_path,
        );
        answered(span, async {
            let path = request::stats(&request).map_err(|error| status::request(&error))?;
            let figures = self.volumes().stats(&path).await;
            let figures = figures.map_err(|error| status::stats(&error))?;
            let bytes = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            let usage = VolumeUsage {
                available: bytes(figures.total.saturating_sub(figures.used)),
                total: bytes(figures.total),
                used: bytes(figures.used),
                unit: Unit::Bytes.into(),
            };
            let reply = NodeGetVolumeStatsResponse { usage: vec![usage] };
            Ok((reply, Did::Nothing))
        })
        .await
    }

    /// SINGLE_NODE_MULTI_WRITER is not among them: it promises to keep a second pod off a
    /// volume of mode SINGLE_NODE_SINGLE_WRITER, and here nobody writes. Without it kubelet
    /// sends the older modes, and all are accepted.
    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let stats = Rpc {
            r#type: RpcType::GetVolumeStats.into(),
        };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: vec![NodeServiceCapability {
                r#type: Some(Type::Rpc(stats)),
            }],
        }))
    }

    /// Cannot fail: kubelet would not try again.
    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.node_id().to_owned(),
            // Any number of volumes, everywhere.
            max_volumes_per_node: 0,
            accessible_topology: None,
        }))
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        unimplemented("NodeStageVolume")
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        unimplemented("NodeUnstageVolume")
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        unimplemented("NodeExpandVolume")
    }

    async fn node_get_volume_health(
        &self,
        _: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        unimplemented("NodeGetVolumeHealth")
    }

    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        unimplemented("NodeGetStorageHealth")
    }
}
