//! The TCP port: passes bytes.

use std::future::pending;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::connection::Link;
use crate::shard::store::Transport;

/// The port, accepting.
pub(super) struct Door(TcpListener);

impl Door {
    pub(super) fn open(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Self)
    }
}

/// The next connection; never where there is no door.
pub(super) async fn accept(door: Option<&Door>) -> io::Result<RpcLink> {
    let Some(Door(listener)) = door else {
        return pending().await;
    };
    let (stream, _) = listener.accept().await?;
    // What fails here fails because the client has gone again, which the first read tells.
    // Keepalive: a client whose host has vanished is noticed one day.
    drop(stream.set_nodelay(true));
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let link = RpcLink(stream);
    link.acknowledge();
    Ok(link)
}

/// A connection on the TCP port.
pub(super) struct RpcLink(TcpStream);

impl RpcLink {
    /// Clients send a header and a body by two writes, without TCP_NODELAY: the body leaves when
    /// the header is acknowledged. A delayed acknowledgement costs 44 ms a request, and the kernel
    /// goes back to delaying whenever data flows, so this follows every read (tcp(7)).
    fn acknowledge(&self) {
        let _ = sockopt::set_tcp_quickack(&self.0, true);
    }
}

impl Link for RpcLink {
    const TRANSPORT: Transport = Transport::Rpc;

    async fn read(&mut self, into: &mut Vec<u8>) -> io::Result<usize> {
        let count = self.0.read_buf(into).await?;
        self.acknowledge();
        Ok(count)
    }

    async fn read_slice(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(into).await?;
        self.acknowledge();
        Ok(count)
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    async fn send_descriptor(&mut self, _: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}
