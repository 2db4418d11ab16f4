//! What the CSI socket and the registration socket have in common: accepting, the authority, a
//! bound on connections, and finding a call's service.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::authority::Rewritten;

/// Connections at a time. Kubelet opens one per call, and calls of all pods of a node may wait
/// for their runtimes at once.
const CONNECTIONS: usize = 1024;
/// How long calls that run may go on after the door was closed.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after an accept that failed for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Removes a file; absent is fine.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A client's connection, one of a bounded number.
pub(super) struct Connection {
    io: Rewritten<UnixStream>,
    /// Ends when the server has: what runs on the connection is then given up.
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    _permit: OwnedSemaphorePermit,
}

/// Accepted connections, for [`answer`].
pub(super) struct Incoming {
    connections: ReceiverStream<io::Result<Connection>>,
    /// Dropped when the server ends.
    cut: watch::Sender<()>,
}

/// Hands accepted connections to a server.
#[derive(Clone)]
pub(super) struct Acceptor {
    free: Arc<Semaphore>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    cut: watch::Receiver<()>,
}

impl Acceptor {
    /// An acceptor, and what it accepts.
    pub(super) fn new() -> (Self, Incoming) {
        let (accepted, incoming) = mpsc::channel(1);
        let (cut, is_cut) = watch::channel(());
        let acceptor = Self {
            free: Arc::new(Semaphore::new(CONNECTIONS)),
            accepted,
            cut: is_cut,
        };
        let incoming = Incoming {
            connections: ReceiverStream::new(incoming),
            cut,
        };
        (acceptor, incoming)
    }

    /// Accepts until the server is gone. May be dropped at any time: nothing accepted is lost,
    /// because there is a place for it before it is.
    pub(super) async fn accept(&self, listener: &UnixListener) {
        loop {
            let Ok(permit) = self.free.clone().acquire_owned().await else {
                return;
            };
            let Ok(place) = self.accepted.reserve().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let mut cut = self.cut.clone();
                    let connection = Connection {
                        io: Rewritten::new(stream),
                        // Nothing is ever sent: it ends with the sender.
                        cut: Box::pin(async move {
                            let _ = cut.changed().await;
                        }),
                        _permit: permit,
                    };
                    place.send(Ok(connection));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Answers calls on the connections until `stop`, then lets those that run end.
pub(super) async fn answer<S>(
    incoming: Incoming,
    service: S,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error>
where
    S: Call,
{
    let (stopped, mut is_stopped) = watch::channel(false);
    let stop = async move {
        stop.await;
        let _ = stopped.send(true);
    };
    let Incoming { connections, cut } = incoming;
    let serve = Server::builder().serve_with_incoming_shutdown(Routes(service), connections, stop);
    let drained = async {
        // The sender also goes where the server ends by itself.
        if is_stopped.wait_for(|stopped| *stopped).await.is_ok() {
            tokio::time::sleep(DRAIN).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    let outcome = tokio::select! {
        outcome = serve => outcome,
        () = drained => Ok(()),
    };
    drop(cut);
    outcome
}

/// The future of a call.
pub(super) type CallFuture =
    Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// One or more gRPC services.
pub(super) trait Call: Clone + Send + Sync + 'static {
    /// Whether a call with this path is for one of them.
    fn knows(&self, path: &str) -> bool;

    /// Answers a call that is.
    fn call(&mut self, request: Request<Body>) -> CallFuture;
}

/// A single generated service.
#[derive(Clone)]
pub(super) struct One<S>(pub(super) S);

impl<S> Call for One<S>
where
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    fn knows(&self, path: &str) -> bool {
        path.strip_prefix('/')
            .and_then(|path| path.strip_prefix(S::NAME))
            .is_some_and(|method| method.starts_with('/'))
    }

    fn call(&mut self, request: Request<Body>) -> CallFuture {
        // Generated services are always ready.
        Box::pin(self.0.call(request))
    }
}

/// Two of them.
#[derive(Clone)]
pub(super) struct Either<A, B>(pub(super) A, pub(super) B);

impl<A: Call, B: Call> Call for Either<A, B> {
    fn knows(&self, path: &str) -> bool {
        self.0.knows(path) || self.1.knows(path)
    }

    fn call(&mut self, request: Request<Body>) -> CallFuture {
        if self.0.knows(request.uri().path()) {
            self.0.call(request)
        } else {
            self.1.call(request)
        }
    }
}

#[derive(Clone)]
struct Routes<S>(S);

impl<S: Call> tower::Service<Request<Body>> for Routes<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = CallFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> CallFuture {
        let path = request.uri().path();
        if self.0.knows(path) {
            return self.0.call(request);
        }
        let status = tonic::Status::unimplemented(format!("there is no call {path} here"));
        Box::pin(std::future::ready(Ok(status.into_http())))
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
