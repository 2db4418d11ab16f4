//! Composition of `vinelet node`: CSI, volumes, mounts, FUSE, runtimes, HTTP. Alone in naming
//! concrete backends.
//!
//! The node role holds nothing that its death would lose: listening sockets and FUSE devices are
//! in the supervisor's custody, what is published is asked of the kernel, and runtimes are read
//! from their files.

mod doors;
mod keeper;
mod live;
mod local;
mod memory;
mod metrics;
mod routes;
mod shards;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::csi::{Driver, Registration, RegistrationOptions};
use crate::mounts::{self, Linux};
use crate::runtimes::{Board, RuntimesDir};
use crate::supervisor::{ChildChannel, Inherited};
use crate::telemetry::Format;
use crate::volumes::{Roots, ShardFigures, Volumes};
use crate::{csi, http};
use doors::Doors;
use keeper::Keeper;
use local::Means;
use routes::Routes;
use shards::Shards;

/// In custody while kubelet knows the driver.
const REGISTERED: &str = "registered";

/// Flags of the node role, understood.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of VineyardRuntime files.
    pub runtimes_dir: PathBuf,
    /// Where runtimes have their directories.
    pub runtime_root: PathBuf,
    /// Where arenas lie.
    pub shm_dir: PathBuf,
    /// Kubelet's root directory.
    pub kubelet_dir: PathBuf,
    /// Name of the CSI driver.
    pub driver_name: String,
    /// CSI socket.
    pub csi_socket: PathBuf,
    /// Where kubelet looks for plugins; none: no registration.
    pub registration_dir: Option<PathBuf>,
    /// This node's name for kubelet.
    pub node_id: String,
    /// Address of the HTTP door; none: no door.
    pub http: Option<SocketAddr>,
    /// Address that shards listen on for RPC clients.
    pub rpc_host: IpAddr,
    /// Least severe log lines, for the shards too.
    pub log: String,
    /// Form of log lines, for the shards too.
    pub log_format: Format,
}

impl Options {
    /// The host under which RPC clients elsewhere reach this node: the address that was asked
    /// for, or where that is every address `MY_HOST_NAME`, or the hostname.
    fn advertised_host(&self) -> String {
        if !self.rpc_host.is_unspecified() {
            return self.rpc_host.to_string();
        }
        match std::env::var("MY_HOST_NAME") {
            Ok(name) if !name.is_empty() => name,
            Ok(_) | Err(_) => hostname().unwrap_or_else(|_| "localhost".to_owned()),
        }
    }
}

/// This machine's name: gethostname(2).
pub fn hostname() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("asking for the hostname")?;
    name.into_string()
        .map_err(|name| anyhow::anyhow!("the hostname {name:?} is not UTF-8; give --node-id"))
}

/// Runs until the supervisor says stop, or is gone.
pub fn run(options: Options) -> anyhow::Result<()> {
    let Some(inherited) = ChildChannel::inherited().context("taking over from the supervisor")?
    else {
        bail!("the node role is started by `vinelet agent`");
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting tokio")?
        .block_on(node(Arc::new(options), inherited))
}

async fn node(options: Arc<Options>, inherited: Inherited) -> anyhow::Result<()> {
    let Inherited { channel, deposits } = inherited;
    let mut doors = Doors::new(channel.clone(), deposits);
    let mounter = Arc::new(Linux::new());
    let board = Board::default();
    let shards = Arc::new(Shards::new(&options));
    let (stop, stopping) = watch::channel(false);

    let roots = Roots {
        kubelet_dir: options.kubelet_dir.clone(),
        runtime_root: options.runtime_root.clone(),
    };
    let volumes = Volumes::new(
        roots,
        mounts::selinux_enforcing(),
        Arc::clone(&mounter),
        board.clone(),
        Arc::clone(&shards) as Arc<dyn ShardFigures>,
    );
    let driver = Driver::new(&options.driver_name, &options.node_id, volumes)?;
    let mut tasks: JoinSet<anyhow::Result<&'static str>> = JoinSet::new();
    let listener = doors.unix("csi", &options.csi_socket)?;
    let serve = csi::serve(listener, driver, told(stopping.clone()));
    tasks.spawn(async {
        serve.await.context("serving CSI")?;
        Ok("the CSI server")
    });

    let registration = match &options.registration_dir {
        None => None,
        Some(directory) => {
            let registration = Registration::new(
                RegistrationOptions {
                    directory: directory.clone(),
                    driver_name: options.driver_name.clone(),
                    endpoint: options.csi_socket.clone(),
                },
                doors.inherited_unix("registration"),
            )
            .was_registered(doors.recall(REGISTERED))
            .on_new_listener(doors.keeping("registration"));
            let state = registration.state();
            tokio::spawn(doors.remembering(REGISTERED, state.clone()));
            let run = registration.run(told(stopping.clone()));
            tasks.spawn(async {
                run.await;
                Ok("plugin registration")
            });
            Some(state)
        }
    };
    let reports = watch::Sender::new(Vec::new());
    let exported = watch::Sender::new(Vec::new());
    if let Some(address) = options.http {
        let routes = Routes {
            csi_socket: options.csi_socket.clone(),
            board: board.clone(),
            registration,
            reports: reports.subscribe(),
            exported: exported.subscribe(),
            shards: Arc::clone(&shards),
        };
        let door = doors.tcp("http", address);
        let stopped = told(stopping.clone());
        tasks.spawn(async {
            tokio::select! {
                () = async {
                    let listener = door.open().await;
                    http::serve(listener, routes, std::future::pending()).await;
                } => {}
                () = stopped => {}
            }
            Ok("the HTTP server")
        });
    }

    let directory = RuntimesDir::open(&options.runtimes_dir)
        .with_context(|| format!("watching {}", options.runtimes_dir.display()))?;
    let means = Means {
        options,
        mounter,
        board,
        shards,
        channel,
    };
    let mut keeper = Keeper::new(means, doors.rest(), reports, exported);
    let outcome = tokio::select! {
        outcome = keeper.run(directory) => outcome,
        Some(ended) = tasks.join_next() => match ended {
            Ok(Ok(what)) => Err(anyhow::anyhow!("{what} ended by itself")),
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(panic.into()),
        },
    };
    // Last words: what runs may end, the mark goes, published volumes stay.
    keeper.drain();
    stop.send_replace(true);
    let grace = tokio::time::sleep(std::time::Duration::from_secs(2));
    tokio::pin!(grace);
    loop {
        tokio::select! {
            next = tasks.join_next() => if next.is_none() { break },
            () = &mut grace => break,
        }
    }
    if outcome.is_ok() {
        let _ = std::fs::remove_file(keeper.csi_socket());
    }
    outcome
}

/// Ends when `stopping` says so.
async fn told(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|&stop| stop).await;
}
