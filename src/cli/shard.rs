//! `vinelet shard`: one vineyard instance; takes vineyardd's flags and behaves as vineyardd.
//!
//! Alone, it binds its sockets, serves until SIGTERM or SIGINT and removes its socket file at the
//! end. Whoever has sockets already hands them to [`serve`].

use std::ffi::OsString;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::gflags;
use super::supervised;
pub(crate) use super::vineyardd::Options;
use super::vineyardd::{Command, FLAGS, FlagsError, Surroundings, understand};
use crate::errors::chain;
use crate::shard::protocol::VERSION;
use crate::shard::spill::{self, Directory};
use crate::shard::store::{Config, OpenError, Spilling, Store};
use crate::shard::{self, BindError, Listeners};
use crate::supervisor::{ChildChannel, InheritError, SendError};
use crate::telemetry;

/// Requests that may wait for the disk at once; one of them moves blobs, and the others wait for
/// it or read.
const DISK_THREADS: usize = 4;

/// Why a shard cannot be, or came to an end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShardError {
    #[error("an argument is not UTF-8: {0:?}")]
    NotUtf8(OsString),
    #[error(transparent)]
    Flags(#[from] FlagsError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("reading the address of the RPC socket")]
    Address(#[source] io::Error),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Spill(#[from] spill::Error),
    #[error("starting the event loop")]
    Runtime(#[source] io::Error),
    #[error("watching for signals")]
    Signals(#[source] io::Error),
    #[error("serving")]
    Serve(#[source] io::Error),
    #[error("taking over from the supervisor")]
    Inherit(#[from] InheritError),
    #[error("leaving a socket in custody")]
    Custody(#[from] SendError),
    #[error("--socket names no path")]
    NoSocket,
}

/// Runs a shard with `args`, program's name and subcommand left out.
pub fn run(args: Vec<OsString>) -> ExitCode {
    match run_to_end(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ERROR: {}", chain(&error));
            ExitCode::from(1)
        }
    }
}

fn run_to_end(args: Vec<OsString>) -> Result<(), ShardError> {
    let args = args
        .into_iter()
        .map(|arg| arg.into_string().map_err(ShardError::NotUtf8))
        .collect::<Result<Vec<_>, _>>()?;
    let options = match understand(args.iter().map(String::as_str), &surroundings())? {
        Command::Help => {
            print!(
                "vineyardd's flags; where it would default to --meta etcd, this is --meta local:\n{}",
                gflags::help(FLAGS)
            );
            return Ok(());
        }
        Command::Version => {
            println!("{}", version());
            return Ok(());
        }
        Command::Serve(options) => options,
    };
    start_log();
    let inherited = ChildChannel::inherited()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(DISK_THREADS)
        .build()
        .map_err(ShardError::Runtime)?;
    runtime.block_on(async {
        if let Some(inherited) = inherited {
            return supervised::serve(&options, inherited).await;
        }
        let stop = termination().map_err(ShardError::Signals)?;
        serve(&options, None, || {}, stop).await
    })
}

/// Logs as the environment says; `VINELET_LOG`, `VINELET_LOG_FORMAT` and `VINELET_ROLE` stand in
/// for flags that vineyardd does not have.
fn start_log() {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let level = variable("VINELET_LOG");
    let level = if level.is_empty() { "info" } else { &level };
    let format = variable("VINELET_LOG_FORMAT").parse().unwrap_or_default();
    let role = variable("VINELET_ROLE");
    let role = if role.is_empty() { "shard" } else { &role };
    if let Err(error) = telemetry::init(level, format, role) {
        eprintln!("WARNING: no log: {}", chain(&error));
    }
}

/// What the original prints when the binary has its name.
fn version() -> String {
    let program = std::env::args_os().next().map(PathBuf::from);
    if program.is_some_and(|program| program.file_name() == Some("vineyardd".as_ref())) {
        format!("vineyardd version {VERSION}")
    } else {
        format!(
            "vinelet version {}, as vineyardd version {VERSION}",
            env!("CARGO_PKG_VERSION")
        )
    }
}

/// Opens the store and serves it until `stop`; `ready` is called when clients are served.
///
/// With `listeners` given, nothing is bound and no socket file is removed at the end: they belong
/// to somebody else.
pub(crate) async fn serve(
    options: &Options,
    listeners: Option<Listeners>,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), ShardError> {
    if !options.coredump {
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        if let Err(error) = setrlimit(Resource::Core, none) {
            tracing::warn!(%error, "core dumps cannot be switched off");
        }
    }
    let (listeners, socket_file) = match listeners {
        Some(listeners) => (listeners, None),
        None => {
            let (listeners, path) = bind(options)?;
            (listeners, SocketFile::of(path))
        }
    };
    let rpc_endpoint = match &listeners.rpc {
        None => "0.0.0.0:0".to_owned(),
        Some(rpc) => {
            let address = rpc.local_addr().map_err(ShardError::Address)?;
            format!("{}:{}", options.hostname, address.port())
        }
    };
    let ipc_socket = match &socket_file {
        Some(file) => file.path.clone(),
        None => options.sockets.first().cloned().unwrap_or_default(),
    };
    let spilling = options.spill.as_ref().map(|spill| {
        Ok::<_, spill::Error>(Spilling {
            disk: Box::new(Directory::open(&spill.path, spill.quota)?),
            watermarks: spill.watermarks,
        })
    });
    let config = Config {
        memory_limit: options.size,
        arena_dir: options.arena_dir.clone(),
        reserve_memory: options.reserve_memory,
        deployment: options.deployment.clone(),
        hostname: options.hostname.clone(),
        nodename: options.nodename.clone(),
        ipc_socket: ipc_socket.to_string_lossy().into_owned(),
        rpc_endpoint: rpc_endpoint.clone(),
    };
    let store = Store::open_with(config, spilling.transpose()?)?;
    store.set_stream_threshold(options.stream_threshold);
    tracing::info!(ipc_socket = %ipc_socket.display(), rpc_endpoint, size = options.size, "serving");
    ready();
    shard::serve(store, listeners, stop)
        .await
        .map_err(ShardError::Serve)
}

/// Binds the sockets that the flags ask for, and tells which of the possible paths it became.
pub(crate) fn bind(options: &Options) -> Result<(Listeners, PathBuf), BindError> {
    let mut refused = None;
    for path in &options.sockets {
        match shard::bind_ipc(path) {
            Ok(ipc) => {
                let rpc = options.rpc.map(shard::bind_rpc).transpose();
                let rpc = rpc.inspect_err(|_| drop(fs::remove_file(path)))?;
                return Ok((Listeners { ipc, rpc }, path.clone()));
            }
            // What is wrong with the first path is the answer; the others are a fallback.
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| BindError::NoPath(PathBuf::new())))
}

/// Our socket's file; removed in the end, unless another server's took its place.
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: PathBuf) -> Option<Self> {
        let identity = identity(&path)?;
        Some(Self { path, identity })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.identity) {
            drop(fs::remove_file(&self.path));
        }
    }
}

pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Done at the first SIGTERM or SIGINT.
fn termination() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn surroundings() -> Surroundings {
    let variable = |name| std::env::var(name).ok();
    Surroundings {
        hostname: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        my_host_name: variable("MY_HOST_NAME"),
        my_node_name: variable("MY_NODE_NAME"),
        memory: memory(),
        home: std::env::home_dir(),
    }
}

/// The container's limit where it has one, and never more than the machine has.
fn memory() -> Option<u64> {
    let info = rustix::system::sysinfo();
    let machine = (info.totalram as u64).checked_mul(info.mem_unit.into());
    let limits = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    limits
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .chain(machine)
        .min()
}
