//! How each runtime of this node fares, for everyone who has to wait for one.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;

use super::RuntimeId;
use crate::readiness::Readiness;

/// A handle on the board; clones show the same board.
///
/// The node role writes it, publish waits on it, `/readyz` and the dummy filesystem print it.
#[derive(Clone, Debug)]
pub struct Board(watch::Sender<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// Set once the runtimes directory has been read for the first time.
    is_complete: bool,
    runtimes: BTreeMap<RuntimeId, Readiness>,
}

/// Why a runtime cannot be used now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// No such runtime on this node, and all of them are known.
    #[error("no runtime {id} on this node (known here: {known})")]
    Unknown {
        /// The runtime asked for.
        id: RuntimeId,
        /// The runtimes there are, joined by commas, or `none`.
        known: String,
    },
    /// It did not become ready in time.
    #[error("runtime {id} is not ready: {readiness}")]
    NotYet {
        /// The runtime asked for.
        id: RuntimeId,
        /// How it fares.
        readiness: Readiness,
    },
}

impl Default for Board {
    fn default() -> Self {
        Self(watch::Sender::new(State::default()))
    }
}

impl Board {
    /// Says that every runtime of this node is on the board: from now on one that is not there
    /// does not exist.
    pub fn complete(&self) {
        self.0.send_modify(|state| state.is_complete = true);
    }

    /// Puts up how a runtime fares.
    pub fn set(&self, id: &RuntimeId, readiness: Readiness) {
        self.0.send_if_modified(|state| {
            let before = state.runtimes.insert(id.clone(), readiness.clone());
            before.as_ref() != Some(&readiness)
        });
    }

    /// Takes a runtime off.
    pub fn remove(&self, id: &RuntimeId) {
        self.0
            .send_if_modified(|state| state.runtimes.remove(id).is_some());
    }

    /// How a runtime fares, if it is known.
    pub fn get(&self, id: &RuntimeId) -> Option<Readiness> {
        self.0.borrow().runtimes.get(id).cloned()
    }

    /// Whether every runtime of this node is on the board.
    pub fn is_complete(&self) -> bool {
        self.0.borrow().is_complete
    }

    /// All runtimes, by name.
    pub fn all(&self) -> BTreeMap<RuntimeId, Readiness> {
        self.0.borrow().runtimes.clone()
    }

    /// Returns when the runtime is ready; after `patience`, why it is not.
    ///
    /// A runtime that is not on a complete board is waited for no longer than `grace`: its file
    /// may be on its way, but more likely the name is wrong.
    pub async fn ready(
        &self,
        id: &RuntimeId,
        patience: Duration,
        grace: Duration,
    ) -> Result<(), NotReady> {
        let mut watch = self.0.subscribe();
        let ready = |state: &State| state.runtimes.get(id).is_some_and(Readiness::is_ready);
        let known = |state: &State| !state.is_complete || state.runtimes.contains_key(id);
        let wait = async {
            if tokio::time::timeout(grace, watch.wait_for(known))
                .await
                .is_err()
            {
                return;
            }
            // The sender lives in `self`, so the wait ends only with success.
            let _ = watch.wait_for(ready).await;
        };
        let _ = tokio::time::timeout(patience, wait).await;
        let state = self.0.borrow();
        match state.runtimes.get(id) {
            Some(readiness) if readiness.is_ready() => Ok(()),
            Some(readiness) => Err(NotReady::NotYet {
                id: id.clone(),
                readiness: readiness.clone(),
            }),
            None if !state.is_complete => Err(NotReady::NotYet {
                id: id.clone(),
                readiness: Readiness::Starting("the runtimes directory is being read".to_owned()),
            }),
            None => Err(NotReady::Unknown {
                id: id.clone(),
                known: match state.runtimes.is_empty() {
                    true => "none".to_owned(),
                    false => {
                        let names: Vec<_> =
                            state.runtimes.keys().map(ToString::to_string).collect();
                        names.join(", ")
                    }
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> RuntimeId {
        RuntimeId::new("default", "vineyard").unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_the_runtime_becomes_ready() {
        let board = Board::default();
        let other = board.clone();
        tokio::spawn(async move {
            other.set(&id(), Readiness::Starting("socket".to_owned()));
            tokio::time::sleep(Duration::from_secs(3)).await;
            other.set(&id(), Readiness::Ready);
        });
        let outcome = board
            .ready(&id(), Duration::from_secs(60), Duration::from_secs(1))
            .await;
        assert_eq!(outcome, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_runtime_is_named_with_those_there_are() {
        let board = Board::default();
        board.set(&RuntimeId::new("ml", "features").unwrap(), Readiness::Ready);
        board.complete();
        let outcome = board
            .ready(&id(), Duration::from_secs(60), Duration::from_secs(1))
            .await;
        assert_eq!(
            outcome.unwrap_err().to_string(),
            "no runtime default/vineyard on this node (known here: ml/features)"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_runtime_says_why() {
        let board = Board::default();
        board.set(&id(), Readiness::Failing("port 9600 is taken".to_owned()));
        let outcome = board
            .ready(&id(), Duration::from_secs(2), Duration::from_secs(1))
            .await;
        assert_eq!(
            outcome.unwrap_err().to_string(),
            "runtime default/vineyard is not ready: failing: port 9600 is taken"
        );
    }
}
