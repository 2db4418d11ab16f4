//! Kubelet's door: the CSI Identity and Node services, and kubelet's plugin registration.

pub mod authority;
mod dial;
mod door;
pub mod grpc;
mod identity;
mod node;
mod registration;
pub mod request;
mod status;

use std::future::Future;
use std::sync::Arc;

use tokio::net::UnixListener;

use crate::volumes::{Mounter, Volumes};

pub use dial::{ConnectError, connect};
pub use registration::{Registered, Registration, RegistrationOptions};

use door::{Acceptor, Either, One};
use grpc::csi::identity_server::IdentityServer;
use grpc::csi::node_server::NodeServer;

/// Largest message taken; kubelet's are of a few KiB, tokens included.
const MAX_MESSAGE: usize = 1 << 20;

/// The CSI driver of this node; clones are the same.
pub struct Driver<M>(Arc<Inner<M>>);

struct Inner<M> {
    name: String,
    node_id: String,
    volumes: Volumes<M>,
}

/// Why a driver cannot be called so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// Not a plugin name.
    #[error(
        "driver name {0:?} must have 1 to 63 letters, digits, '-', '.' and '_', and begin and end with a letter"
    )]
    Name(String),
    /// Not a node id.
    #[error("node id {0:?} must have 1 to 256 bytes")]
    NodeId(String),
}

impl<M> Clone for Driver<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: Mounter> Driver<M> {
    /// A driver with this name on the node that Kubernetes calls `node_id`.
    pub fn new(name: &str, node_id: &str, volumes: Volumes<M>) -> Result<Self, DriverError> {
        // CSI spec, "GetPluginInfo"; csi-sanity wants letters at both ends.
        let bytes = name.as_bytes();
        let is_letter = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphabetic);
        let is_inside = |b: &u8| b.is_ascii_alphanumeric() || b"-._".contains(b);
        let is_name = bytes.len() <= 63
            && is_letter(bytes.first())
            && is_letter(bytes.last())
            && bytes.iter().all(is_inside);
        if !is_name {
            return Err(DriverError::Name(name.to_owned()));
        }
        // CSI spec, "NodeGetInfo".
        if !(1..=256).contains(&node_id.len()) {
            return Err(DriverError::NodeId(node_id.to_owned()));
        }
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            node_id: node_id.to_owned(),
            volumes,
        })))
    }

    fn name(&self) -> &str {
        &self.0.name
    }

    fn node_id(&self) -> &str {
        &self.0.node_id
    }

    fn volumes(&self) -> &Volumes<M> {
        &self.0.volumes
    }
}

/// Serves Identity and Node on `listener` until `stop`; calls that run then may end.
pub async fn serve<M: Mounter>(
    listener: UnixListener,
    driver: Driver<M>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (acceptor, incoming) = Acceptor::new();
    let identity = IdentityServer::new(driver.clone()).max_decoding_message_size(MAX_MESSAGE);
    let node = NodeServer::new(driver).max_decoding_message_size(MAX_MESSAGE);
    let (stopped, is_stopped) = tokio::sync::oneshot::channel::<()>();
    let stop = async move {
        stop.await;
        // No connection is taken any more, and those in the backlog wait for the next server.
        drop(stopped);
    };
    let accept = async move {
        tokio::select! {
            () = acceptor.accept(&listener) => {}
            _ = is_stopped => {}
        }
        drop(acceptor);
        std::future::pending::<()>().await;
    };
    let services = Either(One(identity), One(node));
    tokio::select! {
        outcome = door::answer(incoming, services, stop) => outcome,
        () = accept => Ok(()),
    }
}
