//! Who we are, what we can do, and whether it works.

use std::time::Duration;

use tonic::{Request, Response, Status};

use crate::volumes::Mounter;

use super::Driver;
use super::grpc::csi::identity_server::Identity;
use super::grpc::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, ProbeRequest, ProbeResponse,
};

/// How long a shard may take to answer a probe. Kubelet's livenessprobe gives us 3 s or less.
const BOUND: Duration = Duration::from_secs(1);

#[tonic::async_trait]
impl<M: Mounter> Identity for Driver<M> {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.name().to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: std::collections::HashMap::new(),
        }))
    }

    /// None: there is no controller, and volumes are not bound to a topology.
    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: Vec::new(),
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let readiness = self.volumes().probe(BOUND).await;
        let is_ready = readiness.is_ready();
        if is_ready {
            tracing::debug!("probe");
        } else {
            tracing::warn!(%readiness, "probe");
        }
        Ok(Response::new(ProbeResponse {
            ready: Some(is_ready),
        }))
    }
}
