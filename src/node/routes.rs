//! What the HTTP door says of this node.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

use super::metrics;
use super::shards::Shards;
use crate::csi;
use crate::csi::grpc::csi::ProbeRequest;
use crate::csi::grpc::csi::identity_client::IdentityClient;
use crate::http::{self, Answer};
use crate::readiness::Readiness;
use crate::runtimes::{Board, RuntimeId};
use crate::supervisor::ChildReport;

/// What the answers are made of.
pub(super) struct Routes {
    pub(super) csi_socket: PathBuf,
    pub(super) board: Board,
    /// None where registration is turned off.
    pub(super) registration: Option<watch::Receiver<csi::Registered>>,
    pub(super) reports: watch::Receiver<Vec<ChildReport>>,
    /// Runtimes whose figures are exported.
    pub(super) exported: watch::Receiver<Vec<RuntimeId>>,
    pub(super) shards: Arc<Shards>,
}

impl Routes {
    /// As the liveness probe of Kubernetes' sidecars.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// Probe through the real socket: otherwise an accept loop that hangs would not be seen.
    async fn probe(&self) -> anyhow::Result<bool> {
        let ask = async {
            let channel = csi::connect(&self.csi_socket).await?;
            let reply = IdentityClient::new(channel).probe(ProbeRequest {}).await;
            let reply = reply.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            anyhow::Ok(reply.into_inner().ready.unwrap_or(true))
        };
        tokio::time::timeout(Self::PATIENCE, ask)
            .await
            .with_context(|| format!("no answer within {} s", Self::PATIENCE.as_secs()))?
    }
}

impl http::Routes for Routes {
    async fn healthz(&self) -> Answer {
        match self.probe().await {
            Ok(true) => answer(200, "ok\n"),
            Ok(false) => answer(500, "the driver answers, but is not ready\n"),
            Err(error) => answer(
                500,
                format!("Probe on {}: {error:#}\n", self.csi_socket.display()),
            ),
        }
    }

    async fn readyz(&self) -> Answer {
        let mut is_ready = self.board.is_complete();
        let mut body = String::new();
        for (id, readiness) in self.board.all() {
            is_ready &= readiness.is_ready();
            body.push_str(&format!("runtime {id}: {readiness}\n"));
        }
        if let Some(registration) = &self.registration {
            let state = registration.borrow().clone();
            let (registered, state) = match state {
                csi::Registered::Yes => (true, "registered".to_owned()),
                csi::Registered::Waiting(why) => (false, format!("waiting: {why}")),
                csi::Registered::Refused(why) => (false, format!("refused by kubelet: {why}")),
            };
            is_ready &= registered;
            body.push_str(&format!("registration: {state}\n"));
        }
        for child in self.reports.borrow().iter() {
            let (name, restarts) = (&child.name, child.restarts);
            body.push_str(&format!("{name}: {} (restarts: {restarts})\n", child.state));
        }
        if !self.board.is_complete() {
            body.push_str("the runtimes directory has not been read yet\n");
        }
        answer(if is_ready { 200 } else { 503 }, body)
    }

    async fn metrics(&self) -> Answer {
        let exported = self.exported.borrow().clone();
        let mut fares = Vec::new();
        for id in &exported {
            let is_ready = self.board.get(id).as_ref().is_some_and(Readiness::is_ready);
            let figures = match is_ready {
                true => self.shards.status(id).await.ok(),
                false => None,
            };
            fares.push((id, is_ready, figures));
        }
        let mut body = metrics::runtimes(&fares);
        body.push_str(&metrics::children(&self.reports.borrow()));
        answer(200, body)
    }
}

fn answer(status: u16, body: impl Into<String>) -> Answer {
    Answer {
        status,
        body: body.into(),
    }
}
