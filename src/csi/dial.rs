//! The way to a CSI socket, for those of us who call one: the liveness probe, `vinelet csi`,
//! `vinelet dev`.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Why a socket cannot be called.
#[derive(Debug, thiserror::Error)]
#[error("connecting to {}", path.display())]
pub struct ConnectError {
    path: PathBuf,
    source: tonic::transport::Error,
}

/// A new connection to the socket at `path`. Its `:authority` is the one kubelet sends.
pub async fn connect(path: &Path) -> Result<Channel, ConnectError> {
    let socket = path.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError {
            path: path.to_path_buf(),
            source,
        })
}
