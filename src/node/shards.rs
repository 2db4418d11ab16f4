//! What the node role asks of shards, through their real sockets.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use super::Options;
use crate::runtimes::{Layout, RuntimeId};
use crate::shard::client::{Client, InstanceStatus};
use crate::volumes::{Figures, FiguresFuture, ShardFigures};

/// The way to the shards of this node.
#[derive(Debug)]
pub(super) struct Shards {
    runtime_root: PathBuf,
}

impl Shards {
    /// How long a shard may take for an answer.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(options: &Options) -> Self {
        Self {
            runtime_root: options.runtime_root.clone(),
        }
    }

    /// Connects, registers and asks for the status, within a second.
    pub(super) async fn status(&self, id: &RuntimeId) -> anyhow::Result<InstanceStatus> {
        let socket = Layout::new(&self.runtime_root, id)?.worker_socket();
        let ask = async {
            let mut client = Client::connect_ipc(&socket).await?;
            anyhow::Ok(client.status().await?)
        };
        tokio::time::timeout(Self::PATIENCE, ask)
            .await
            .with_context(|| format!("no answer within {} s", Self::PATIENCE.as_secs()))
            .and_then(|answer| answer)
            .with_context(|| format!("asking the shard at {}", socket.display()))
    }
}

impl ShardFigures for Shards {
    fn figures<'a>(&'a self, id: &'a RuntimeId) -> FiguresFuture<'a> {
        Box::pin(async move {
            let status = self.status(id).await?;
            Ok(Figures {
                total: status.memory_limit,
                used: status.memory_usage,
            })
        })
    }
}
