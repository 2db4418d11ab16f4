//! What the dummy filesystem says of a runtime while it is being read.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::json;
use tokio::runtime::Handle;

use super::metrics;
use super::shards::Shards;
use crate::fuse::Live;
use crate::readiness::Readiness;
use crate::runtimes::{Board, RuntimeId};
use crate::shard::client::InstanceStatus;

/// Answers on the thread that serves the filesystem, so it never waits long.
pub(super) struct LiveStatus {
    pub(super) id: RuntimeId,
    pub(super) board: Board,
    pub(super) shards: Arc<Shards>,
    pub(super) handle: Handle,
}

impl LiveStatus {
    /// How long a reader of `status` waits for the shard.
    const PATIENCE: Duration = Duration::from_millis(250);

    /// The shard's figures, if it gives them soon.
    fn figures(&self) -> Option<InstanceStatus> {
        let (answer, figures) = mpsc::sync_channel(1);
        let (id, shards) = (self.id.clone(), Arc::clone(&self.shards));
        self.handle.spawn(async move {
            let _ = answer.send(shards.status(&id).await.ok());
        });
        figures.recv_timeout(Self::PATIENCE).ok().flatten()
    }
}

impl Live for LiveStatus {
    fn status(&self) -> String {
        let readiness = self.board.get(&self.id);
        let mut status = json!({
            "runtime": self.id.to_string(),
            "ready": readiness.as_ref().is_some_and(Readiness::is_ready),
            "state": readiness.map_or_else(|| "unknown".to_owned(), |r| r.to_string()),
        });
        if let Some(figures) = self.figures() {
            status["instance_id"] = json!(figures.instance_id);
            status["memory_usage"] = json!(figures.memory_usage);
            status["memory_limit"] = json!(figures.memory_limit);
            status["ipc_connections"] = json!(figures.ipc_connections);
            status["rpc_connections"] = json!(figures.rpc_connections);
            status["deferred_requests"] = json!(figures.deferred_requests);
        }
        format!("{status:#}\n")
    }

    fn metrics(&self) -> String {
        let readiness = self.board.get(&self.id);
        let fares = [(
            &self.id,
            readiness.is_some_and(|r| r.is_ready()),
            self.figures(),
        )];
        metrics::runtimes(&fares)
    }
}
