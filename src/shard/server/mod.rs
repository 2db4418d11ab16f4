//! Clients' doors: the UNIX socket ([`ipc`]) and the TCP port ([`rpc`]).
//!
//! Each connection is a task of its own and a strict exchange: while an answer is on its way,
//! nothing more is read than fits a small buffer. What the client held is let go of when the task
//! ends, however it ends.

mod connection;
mod dispatch;
mod ipc;
mod rpc;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::shard::store::Store;
use crate::sockets::ListenError;

/// How long connections may take for the request in hand when the server stops.
const DRAIN: Duration = Duration::from_secs(1);

/// Pause after a failed accept. At the limit of descriptors the next one would fail at once too;
/// clients wait in the backlog meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The sockets to accept clients from.
#[derive(Debug)]
pub struct Listeners {
    /// UNIX socket.
    pub ipc: UnixListener,
    /// TCP socket, if there shall be one.
    pub rpc: Option<std::net::TcpListener>,
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The kernel refuses the socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The path has no file name, or is of no directory.
    #[error("{0} is no path of a socket")]
    NoPath(PathBuf),
    /// Another server.
    #[error("another server is listening on {0}")]
    InUse(PathBuf),
    /// A file that is not ours to replace.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The directory of the socket.
    #[error("creating the directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is at the path cannot be looked at.
    #[error("looking at {path}")]
    Ipc {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on a UNIX socket at `path`, mode 0777. Missing directories are made, a socket that
/// nobody serves is replaced; the path is never without a socket once it had one.
pub fn bind_ipc(path: &Path) -> Result<UnixListener, BindError> {
    ipc::bind(path)
}

/// Listens on a TCP port that nobody else listens on.
pub fn bind_rpc(address: SocketAddr) -> Result<std::net::TcpListener, BindError> {
    Ok(crate::sockets::listen_tcp(address)?)
}

/// Serves clients until `stop` is done. Then nobody is accepted any more, and connections have a
/// second to finish the request in hand.
pub async fn serve(
    store: Store,
    listeners: Listeners,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let ipc = ipc::Door::open(listeners.ipc)?;
    let rpc = listeners.rpc.map(rpc::Door::open).transpose()?;
    let (drain, draining) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut ipc_pause = Pause::default();
    let mut rpc_pause = Pause::default();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            link = ipc_pause.accept("ipc", || ipc.accept()) => {
                connections.spawn(connection::converse(link, store.clone(), draining.clone()));
            }
            link = rpc_pause.accept("rpc", || rpc::accept(rpc.as_ref())) => {
                connections.spawn(connection::converse(link, store.clone(), draining.clone()));
            }
            Some(ended) = connections.join_next() => report(ended),
        }
    }
    drop((ipc, rpc));
    drain.send_replace(true);
    let all_ended = async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    };
    if timeout(DRAIN, all_ended).await.is_err() {
        tracing::info!(
            connections = connections.len(),
            "closing connections that are not done"
        );
        connections.shutdown().await;
    }
    Ok(())
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection ended by a defect");
    }
}

/// Accepts one after another, and not at once after a failure.
#[derive(Debug, Default)]
struct Pause {
    until: Option<Instant>,
}

impl Pause {
    /// The next link. Cancelling loses neither a link nor the pause.
    async fn accept<L, F>(&mut self, door: &'static str, mut next: impl FnMut() -> F) -> L
    where
        F: Future<Output = io::Result<L>>,
    {
        loop {
            if let Some(until) = self.until {
                sleep_until(until).await;
                self.until = None;
            }
            match next().await {
                Ok(link) => return link,
                // The client has gone before it was its turn.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, door, "accepting a connection failed");
                    self.until = Some(Instant::now() + ACCEPT_PAUSE);
                }
            }
        }
    }
}
