//! `/healthz`, `/readyz` and `/metrics` over HTTP/1.1; what they say is the caller's business.
//!
//! Nothing here grows without a bound: so many connections, so much header, so much time. Each
//! connection carries one request; who asks every few seconds loses nothing by it.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections served at a time; others wait in the listener's backlog.
const CONNECTIONS: usize = 32;
/// The most a request's head may take, in bytes; hyper's smallest.
const HEAD: usize = 8 * 1024;
/// The most fields in it.
const FIELDS: usize = 64;
/// How long a client may take to send it.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may last, the answer's making and sending included.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(30);
/// The pause after accept(2) fails: most likely this process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Status and body, as plain text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status code: 200, 503.
    pub status: u16,
    /// What a person, a probe's log or Prometheus reads.
    pub body: String,
}

/// What there is to say.
pub trait Routes: Send + Sync + 'static {
    /// Whether this process should go on living; kubelet restarts the container otherwise.
    fn healthz(&self) -> impl Future<Output = Answer> + Send;
    /// Whether it should be sent work.
    fn readyz(&self) -> impl Future<Output = Answer> + Send;
    /// Figures in Prometheus' text format, version 0.0.4.
    fn metrics(&self) -> impl Future<Output = Answer> + Send;
}

/// Serves until `stop` ends. Requests that are being answered then may finish.
pub async fn serve(listener: TcpListener, routes: impl Routes, stop: impl Future<Output = ()>) {
    let routes = Arc::new(routes);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let accept = async {
        loop {
            // Never closed, so there is always a permit to wait for.
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let routes = Arc::clone(&routes);
                    tokio::spawn(async move {
                        converse(stream, routes).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "HTTP connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = stop => {}
        () = accept => {}
    }
}

async fn converse(stream: TcpStream, routes: Arc<impl Routes>) {
    let service = service_fn(move |request| {
        let routes = Arc::clone(&routes);
        async move { Ok::<_, Infallible>(respond(request, &*routes).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .max_buf_size(HEAD)
        .max_headers(FIELDS)
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "HTTP connection ended"),
        Err(_) => tracing::debug!("HTTP connection lasted too long"),
    }
}

async fn respond(request: Request<Incoming>, routes: &impl Routes) -> Response<Full<Bytes>> {
    let mut content_type = "text/plain; charset=utf-8";
    let is_get = request.method() == Method::GET;
    let answer = match request.uri().path() {
        "/healthz" | "/readyz" | "/metrics" if !is_get => Answer {
            status: StatusCode::METHOD_NOT_ALLOWED.as_u16(),
            body: "only GET is answered here\n".to_owned(),
        },
        "/healthz" => routes.healthz().await,
        "/readyz" => routes.readyz().await,
        "/metrics" => {
            content_type = "text/plain; version=0.0.4; charset=utf-8";
            routes.metrics().await
        }
        _ => Answer {
            status: StatusCode::NOT_FOUND.as_u16(),
            body: "there are /healthz, /readyz and /metrics\n".to_owned(),
        },
    };
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        // RFC 9110, 15.5.6: a 405 says what is allowed.
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Fixed;

    impl Routes for Fixed {
        async fn healthz(&self) -> Answer {
            Answer {
                status: 200,
                body: "ok\n".to_owned(),
            }
        }
        async fn readyz(&self) -> Answer {
            Answer {
                status: 503,
                body: "runtime default/vineyard is starting\n".to_owned(),
            }
        }
        async fn metrics(&self) -> Answer {
            Answer {
                status: 200,
                body: "vinelet_up 1\n".to_owned(),
            }
        }
    }

    async fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Fixed, std::future::pending()));
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A server that refuses early may reset what it has not read.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    async fn check(request: &str, status: &str, parts: &[&str]) {
        let answer = ask(
            server().await,
            &format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n"),
        )
        .await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request}: {answer}"
        );
        for part in parts {
            assert!(
                answer.contains(part),
                "{request}: {part} is not in {answer}"
            );
        }
    }

    #[tokio::test]
    async fn each_path_says_what_its_route_says() {
        check("GET /healthz", "200", &["\r\n\r\nok\n"]).await;
        check("GET /healthz?verbose", "200", &["ok\n"]).await;
        check(
            "GET /readyz",
            "503",
            &["runtime default/vineyard is starting"],
        )
        .await;
        check("GET /metrics", "200", &["version=0.0.4", "vinelet_up 1"]).await;
    }

    #[tokio::test]
    async fn anything_else_is_refused() {
        check("GET /", "404", &["/readyz"]).await;
        check("GET /healthz/", "404", &[]).await;
        check("POST /healthz", "405", &["allow: GET"]).await;
        check("HEAD /metrics", "405", &[]).await;
        assert!(
            ask(server().await, "nonsense\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 400")
        );
        let huge = format!("GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000));
        assert!(ask(server().await, &huge).await.starts_with("HTTP/1.1 431"));
    }

    #[tokio::test(start_paused = true)]
    async fn silent_clients_do_not_keep_others_out() {
        let address = server().await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = ask(address, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[tokio::test]
    async fn serving_ends_when_it_is_told_to() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, Fixed, std::future::ready(())).await;
        assert!(TcpStream::connect(address).await.is_err());
    }
}
