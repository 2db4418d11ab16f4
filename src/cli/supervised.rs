//! A shard under a supervisor: its listening sockets are in custody, so that its successor goes
//! on with the same ones.

use std::future::Future;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use tokio::signal::unix::{SignalKind, signal};

use super::shard::{self, Options, ShardError};
use crate::errors::chain;
use crate::readiness::Readiness;
use crate::shard::Listeners;
use crate::supervisor::{ChildChannel, Deposit, FromSupervisor, Inherited};

const IPC: &str = "ipc";
const RPC: &str = "rpc";

/// Serves until the supervisor says stop, or is gone. Why it cannot is told to the supervisor.
pub(super) async fn serve(options: &Options, inherited: Inherited) -> Result<(), ShardError> {
    let Inherited { channel, deposits } = inherited;
    let outcome = match listeners(options, &channel, deposits) {
        Ok(listeners) => {
            let stop = stop(channel.clone()).map_err(ShardError::Signals)?;
            let ready = || tell(&channel, &Readiness::Ready);
            shard::serve(options, Some(listeners), ready, stop).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        tell(&channel, &Readiness::Failing(chain(error)));
    }
    outcome
}

fn tell(channel: &ChildChannel, readiness: &Readiness) {
    if let Err(error) = channel.state(readiness) {
        tracing::error!(%error, "the supervisor does not know how this shard fares");
    }
}

/// The sockets from custody where they are still the right ones; else new ones, deposited.
fn listeners(
    options: &Options,
    channel: &ChildChannel,
    deposits: Vec<Deposit>,
) -> Result<Listeners, ShardError> {
    let (mut kept_ipc, mut kept_rpc) = (None, None);
    for deposit in deposits {
        match deposit.name.as_str() {
            IPC => kept_ipc = Some(deposit),
            RPC => kept_rpc = Some(deposit),
            _ => {}
        }
    }
    let path = options.sockets.first().ok_or(ShardError::NoSocket)?;
    let ipc = match kept(kept_ipc, &file_identity(path)) {
        Some(fd) => UnixListener::from(fd),
        None => {
            let listener = crate::shard::bind_ipc(path)?;
            channel.deposit(IPC, &file_identity(path), &[listener.as_fd()])?;
            listener
        }
    };
    let rpc_context = options.rpc.map(|address| address.to_string().into_bytes());
    let had_rpc = kept_rpc.is_some();
    let rpc = match (
        kept(kept_rpc, &rpc_context.clone().unwrap_or_default()),
        options.rpc,
    ) {
        (Some(fd), _) => Some(TcpListener::from(fd)),
        (None, wanted) => {
            // The old port is free before the new one is asked for: two shards may swap theirs.
            if had_rpc {
                channel.withdraw(RPC)?;
            }
            let listener = wanted.map(crate::shard::bind_rpc).transpose()?;
            if let (Some(listener), Some(context)) = (&listener, &rpc_context) {
                channel.deposit(RPC, context, &[listener.as_fd()])?;
            }
            listener
        }
    };
    Ok(Listeners { ipc, rpc })
}

/// The descriptor of a deposit that was made in these circumstances.
fn kept(deposit: Option<Deposit>, context: &[u8]) -> Option<OwnedFd> {
    let deposit = deposit.filter(|deposit| !context.is_empty() && deposit.context == context)?;
    deposit.fds.into_iter().next()
}

/// Device and inode of the socket's file: another file at its path is another socket.
fn file_identity(path: &Path) -> Vec<u8> {
    let identity = shard::identity(path).map(|(device, inode)| format!("{device}:{inode}"));
    identity.unwrap_or_default().into_bytes()
}

/// Done when the supervisor says stop or is gone, or at SIGTERM.
fn stop(channel: ChildChannel) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        let told = async { while let Some(FromSupervisor::Report(_)) = channel.next().await {} };
        tokio::select! {
            () = told => {}
            _ = terminate.recv() => {}
        }
    })
}
