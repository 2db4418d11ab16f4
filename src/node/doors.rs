//! Listening sockets: taken back from custody, or made anew and deposited there.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Context;
use tokio::sync::watch;

use super::keeper::pause;
use crate::csi::Registered;
use crate::sockets;
use crate::supervisor::{ChildChannel, Deposit};

/// What earlier node roles left with the supervisor, by name.
pub(super) struct Doors {
    channel: ChildChannel,
    deposits: BTreeMap<String, Deposit>,
}

impl Doors {
    pub(super) fn new(channel: ChildChannel, deposits: Vec<Deposit>) -> Self {
        let named = |deposit: Deposit| (deposit.name.clone(), deposit);
        Self {
            channel,
            deposits: deposits.into_iter().map(named).collect(),
        }
    }

    /// The socket at `path`, mode 0600: the one in custody if its file is still there, so that
    /// those who connected meanwhile are served; else a new one.
    pub(super) fn unix(
        &mut self,
        name: &str,
        path: &Path,
    ) -> anyhow::Result<tokio::net::UnixListener> {
        let kept = self.deposits.remove(name).filter(|deposit| {
            file_identity(path).is_some_and(|identity| identity == deposit.context)
        });
        let listener = match kept.and_then(first_fd) {
            Some(fd) => UnixListener::from(fd),
            None => {
                if let Some(parent) = path.parent() {
                    std::fs::create_dir_all(parent)
                        .with_context(|| format!("making {}", parent.display()))?;
                }
                let listener = sockets::listen_unix(path, 0o600)?;
                let identity = file_identity(path).unwrap_or_default();
                self.channel
                    .deposit(name, &identity, &[listener.as_fd()])
                    .with_context(|| format!("leaving {} in custody", path.display()))?;
                listener
            }
        };
        into_tokio(listener, tokio::net::UnixListener::from_std)
    }

    /// The socket at `address`: the one in custody, or a new one, as soon as it can be had.
    pub(super) fn tcp(&mut self, name: &'static str, address: SocketAddr) -> TcpDoor {
        let kept = self
            .deposits
            .remove(name)
            .filter(|deposit| deposit.context == address.to_string().as_bytes());
        TcpDoor {
            name,
            address,
            kept: kept.and_then(first_fd).map(TcpListener::from),
            channel: self.channel.clone(),
        }
    }

    /// A listener from custody, whatever its state.
    pub(super) fn inherited_unix(&mut self, name: &str) -> Option<UnixListener> {
        let deposit = self.deposits.remove(name)?;
        first_fd(deposit).map(UnixListener::from)
    }

    /// Leaves each listener it is called with in custody under `name`.
    pub(super) fn keeping(&self, name: &'static str) -> impl FnMut(BorrowedFd<'_>) + Send + use<> {
        let channel = self.channel.clone();
        move |listener| {
            if let Err(error) = channel.deposit(name, &[], &[listener]) {
                tracing::error!(name, %error, "a listening socket is not in custody");
            }
        }
    }

    /// Whether an earlier node role left a note of this name.
    pub(super) fn recall(&mut self, name: &str) -> bool {
        self.deposits.remove(name).is_some()
    }

    /// Keeps a note in custody while kubelet knows the driver.
    pub(super) fn remembering(
        &self,
        name: &'static str,
        mut state: watch::Receiver<Registered>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let channel = self.channel.clone();
        async move {
            loop {
                let is_registered = *state.borrow_and_update() == Registered::Yes;
                let noted = match is_registered {
                    true => note(&channel, name),
                    false => channel.withdraw(name).map_err(anyhow::Error::from),
                };
                if let Err(error) = noted {
                    tracing::warn!(%error, name, "a note is not in custody");
                }
                if state.changed().await.is_err() {
                    return;
                }
            }
        }
    }

    /// What nobody has asked for yet.
    pub(super) fn rest(self) -> BTreeMap<String, Deposit> {
        self.deposits
    }
}

/// A TCP socket that others may still hold: what only watches this node must not keep it from
/// serving.
pub(super) struct TcpDoor {
    name: &'static str,
    address: SocketAddr,
    kept: Option<TcpListener>,
    channel: ChildChannel,
}

impl TcpDoor {
    /// Returns once the socket is there, trying with growing pauses.
    pub(super) async fn open(mut self) -> tokio::net::TcpListener {
        let mut attempt = 0;
        loop {
            let opened = match self.kept.take() {
                Some(listener) => Ok(listener),
                None => self.make(),
            };
            let opened = opened.and_then(|l| into_tokio(l, tokio::net::TcpListener::from_std));
            match opened {
                Ok(listener) => return listener,
                Err(error) => {
                    let (name, address) = (self.name, self.address);
                    tracing::error!(name, %address, error = format!("{error:#}"), "door closed");
                }
            }
            tokio::time::sleep(pause(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    fn make(&self) -> anyhow::Result<TcpListener> {
        let listener = sockets::listen_tcp(self.address)?;
        let context = self.address.to_string().into_bytes();
        self.channel
            .deposit(self.name, &context, &[listener.as_fd()])
            .with_context(|| format!("leaving {} in custody", self.address))?;
        Ok(listener)
    }
}

/// Custody keeps descriptors; a note has one that says nothing.
fn note(channel: &ChildChannel, name: &str) -> anyhow::Result<()> {
    let nothing = std::fs::File::open("/dev/null")?;
    channel.deposit(name, &[], &[nothing.as_fd()])?;
    Ok(())
}

fn first_fd(deposit: Deposit) -> Option<std::os::fd::OwnedFd> {
    deposit.fds.into_iter().next()
}

/// Device and inode of the file at `path`, as bytes.
fn file_identity(path: &Path) -> Option<Vec<u8>> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some(format!("{}:{}", metadata.dev(), metadata.ino()).into_bytes())
}

trait Nonblocking {
    fn set_nonblocking(&self) -> std::io::Result<()>;
}

impl Nonblocking for UnixListener {
    fn set_nonblocking(&self) -> std::io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Nonblocking for TcpListener {
    fn set_nonblocking(&self) -> std::io::Result<()> {
        self.set_nonblocking(true)
    }
}

fn into_tokio<L: Nonblocking, T>(
    listener: L,
    convert: impl Fn(L) -> std::io::Result<T>,
) -> anyhow::Result<T> {
    listener
        .set_nonblocking()
        .and_then(|()| convert(listener))
        .context("handing a listening socket to tokio")
}
