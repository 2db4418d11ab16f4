//! Speaks to an instance through its UNIX socket: a probe, and its figures.
//!
//! Nothing here limits time; whoever asks knows how long the answer is worth waiting for:
//!
//! ```no_run
//! # async fn probe() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{path::Path, time::Duration};
//! use vinelet::shard::client::Client;
//!
//! let socket = Path::new("/run/vineyard.sock");
//! let status = tokio::time::timeout(Duration::from_secs(1), async {
//!     Client::connect_ipc(socket).await?.status().await
//! })
//! .await??;
//! # drop(status); Ok(()) }
//! ```

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::ids::{InstanceId, SessionId};
use super::protocol::VERSION;
use super::protocol::frame::{self, Decoder, FrameError};
pub use super::protocol::reply::InstanceStatus;

/// Why an instance did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error("connecting to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Broken in between.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// Closed in between.
    #[error("the instance closed the connection before it answered")]
    Closed,
    /// A reply that cannot be received.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// An error reply.
    #[error("the instance refused {request}: {message} (code {code})")]
    Refused {
        /// The request's `type`.
        request: &'static str,
        /// Vineyard's number.
        code: i64,
        /// The instance's words.
        message: String,
    },
    /// No vineyard instance, or one of another kind.
    #[error("the reply to {request} is not understood")]
    Reply {
        /// The request's `type`.
        request: &'static str,
        /// Why.
        source: serde_json::Error,
    },
}

/// What an instance says of itself when a client registers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Registered {
    /// This instance.
    pub instance_id: InstanceId,
    /// This session.
    pub session_id: SessionId,
    /// The socket, as configured.
    pub ipc_socket: String,
    /// `host:port`.
    pub rpc_endpoint: String,
    /// Its version.
    pub version: String,
}

/// A registered client.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    decoder: Decoder,
    registered: Registered,
}

impl Client {
    /// Connects and registers.
    pub async fn connect_ipc(path: &Path) -> Result<Self, ClientError> {
        const REGISTER: &str = "register_request";
        let mut stream =
            UnixStream::connect(path)
                .await
                .map_err(|source| ClientError::Connect {
                    path: path.to_owned(),
                    source,
                })?;
        let mut decoder = Decoder::new();
        let request = serde_json::json!({
            "session_id": 0,
            "store_type": 1,
            "type": REGISTER,
            "version": VERSION,
        });
        let registered = ask(&mut stream, &mut decoder, REGISTER, &request).await?;
        Ok(Self {
            stream,
            decoder,
            registered,
        })
    }

    /// What the instance said when we registered.
    pub fn registered(&self) -> &Registered {
        &self.registered
    }

    /// The instance's figures. This connection is counted among them.
    pub async fn status(&mut self) -> Result<InstanceStatus, ClientError> {
        #[derive(Deserialize)]
        struct Reply {
            meta: InstanceStatus,
        }
        const STATUS: &str = "instance_status_request";
        let request = serde_json::json!({ "type": STATUS });
        let reply: Reply = ask(&mut self.stream, &mut self.decoder, STATUS, &request).await?;
        Ok(reply.meta)
    }
}

/// One request, and its reply.
async fn ask<R: DeserializeOwned>(
    stream: &mut UnixStream,
    decoder: &mut Decoder,
    request: &'static str,
    body: &serde_json::Value,
) -> Result<R, ClientError> {
    let mut out = Vec::new();
    frame::encode_with(&mut out, |out| {
        out.extend_from_slice(body.to_string().as_bytes())
    });
    stream.write_all(&out).await?;
    loop {
        if let Some(body) = decoder.next_body()? {
            return understand(request, body);
        }
        if stream.read_buf(decoder.incoming()).await? == 0 {
            return Err(ClientError::Closed);
        }
    }
}

fn understand<R: DeserializeOwned>(request: &'static str, body: &[u8]) -> Result<R, ClientError> {
    #[derive(Deserialize)]
    struct Refusal {
        code: i64,
        #[serde(default)]
        message: String,
    }
    serde_json::from_slice(body).map_err(|source| match serde_json::from_slice(body) {
        Ok(Refusal { code, message }) => ClientError::Refused {
            request,
            code,
            message,
        },
        Err(_) => ClientError::Reply { request, source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_the_instances_words() {
        let refused =
            understand::<Registered>("register_request", br#"{"code":34,"message":"IOError: x"}"#);
        assert_eq!(
            refused.unwrap_err().to_string(),
            "the instance refused register_request: IOError: x (code 34)"
        );
    }

    #[test]
    fn what_is_no_vineyard_is_not_understood() {
        for body in [&b"HTTP/1.1 400"[..], b"{}", b"null", b""] {
            let error = understand::<Registered>("register_request", body).unwrap_err();
            assert!(matches!(error, ClientError::Reply { .. }), "{error}");
        }
    }
}
