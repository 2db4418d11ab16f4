//! What a supervisor is told, and why it may not begin or not end well.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use super::lock::LockError;
use super::message::{ChildPlan, Malformed, NODE};
use super::policy::{Backoff, Patience};

/// What a supervisor is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where `agent.lock` lies; made where it is missing.
    pub state_dir: PathBuf,
    /// What children execute.
    pub program: PathBuf,
    /// The child that is always wanted; its name is given to it here.
    pub node: ChildPlan,
    /// How soon dead children are started again.
    pub backoff: Backoff,
    /// How long stopping may take.
    pub patience: Patience,
}

impl Config {
    /// A node started with `node_args`, from our own program: also if its file has been replaced
    /// or removed since.
    pub fn new(state_dir: PathBuf, node_args: Vec<String>) -> Self {
        Self {
            state_dir,
            program: PathBuf::from("/proc/self/exe"),
            node: ChildPlan {
                name: NODE.to_owned(),
                args: node_args,
                env: BTreeMap::new(),
            },
            backoff: Backoff::default(),
            patience: Patience::default(),
        }
    }
}

/// Why a supervisor cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The state directory is in use, or of no use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The node's plan cannot be carried out.
    #[error("starting the node")]
    Node(#[source] Malformed),
}

/// Why a supervisor did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The kernel refuses what everything else needs.
    #[error("{what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Processes that not even SIGKILL ended in time.
    #[error("still running although killed: {0}")]
    LeftBehind(String),
}

pub(super) fn kernel(what: &'static str, source: impl Into<io::Error>) -> RunError {
    RunError::Kernel {
        what,
        source: source.into(),
    }
}
