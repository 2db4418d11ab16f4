//! `vinelet dev`: everything on this machine in a scratch directory, and how to connect.
//!
//! An agent, one runtime `default/vineyard`, a small kubelet that registers the plugin and
//! publishes one volume. Without root it enters a user and mount namespace of its own first;
//! the sockets lie on the real disk and can be used from outside, the published volume is seen
//! only inside.

use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::fail;
use super::kubelet::{self, Volume};
use crate::mounts;
use crate::runtimes::{RuntimeId, quantity};

const DRIVER: &str = "vinelet.csi.v6d.io";

/// How long everything together may take to come up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Flags of `vinelet dev`.
#[derive(Args, Clone, Debug)]
pub struct DevArgs {
    /// Directory for everything [default: a fresh one, removed at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Memory for objects, as Kubernetes writes quantities
    #[arg(long, value_name = "QUANTITY", default_value = "256Mi", value_parser = size)]
    size: String,
    /// Port for RPC clients on 127.0.0.1 [default: a free one]
    #[arg(long, value_name = "PORT")]
    rpc_port: Option<u16>,
    /// Also print the agent's log lines of this level
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = ["error", "warn", "info", "debug", "trace"])]
    log: String,
}

/// A quantity of at least one byte, as it was typed.
fn size(text: &str) -> Result<String, String> {
    match quantity::bytes(text) {
        Ok(0) => Err("a store of no bytes holds nothing".to_owned()),
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs until Ctrl-C, then leaves no mount and no process behind.
pub fn run(args: DevArgs) -> ExitCode {
    match dev(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn dev(args: &DevArgs) -> anyhow::Result<()> {
    let is_private = enter_namespaces_unless_root()?;
    let scratch = Scratch::prepare(args)?;
    let agent = Agent::start(&scratch, &args.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting tokio")?;
    let outcome = runtime.block_on(session(&scratch, agent, is_private));
    let swept = scratch.sweep();
    outcome.and(swept)
}

/// From the first call to Ctrl-C.
async fn session(scratch: &Scratch, mut agent: Agent, is_private: bool) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut death = signal(SignalKind::child()).context("SIGCHLD")?;
    let volume = scratch.volume()?;
    let up = async {
        let endpoint = kubelet::register(&scratch.registry(), DRIVER).await?;
        kubelet::publish(&endpoint, &volume).await?;
        scratch.announce(&endpoint, &volume, is_private)?;
        anyhow::Ok(endpoint)
    };
    let endpoint = tokio::select! {
        up = tokio::time::timeout(PATIENCE, up) => match up {
            Ok(Ok(endpoint)) => endpoint,
            Ok(Err(error)) => {
                agent.stop(&mut death).await;
                return Err(error);
            }
            Err(_) => {
                agent.stop(&mut death).await;
                bail!("the agent was not up within {} s; --log info tells more", PATIENCE.as_secs());
            }
        },
        ended = agent.ended(&mut death) => bail!("the agent ended while starting: {ended}"),
        _ = interrupt.recv() => {
            agent.stop(&mut death).await;
            return Ok(());
        }
        _ = terminate.recv() => {
            agent.stop(&mut death).await;
            return Ok(());
        }
    };
    let ended = tokio::select! {
        ended = agent.ended(&mut death) => Some(ended),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    if let Some(ended) = ended {
        bail!("the agent ended: {ended}");
    }
    let unpublished = kubelet::unpublish(&endpoint, &volume).await;
    agent.stop(&mut death).await;
    unpublished
}

/// Returns whether this process is now alone with its mounts.
///
/// Must run while the process has one thread: unshare(2), CLONE_NEWUSER.
fn enter_namespaces_unless_root() -> anyhow::Result<bool> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if uid.is_root() {
        return Ok(false);
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).context(
        "entering a user namespace of our own (this kernel may forbid it to users; run as root then)",
    )?;
    fs::write("/proc/self/setgroups", "deny").context("/proc/self/setgroups")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("/proc/self/uid_map")?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).context("/proc/self/gid_map")?;
    Ok(true)
}

/// The directory and what is in it.
struct Scratch {
    dir: PathBuf,
    is_fresh: bool,
    rpc_port: u16,
}

impl Scratch {
    fn prepare(args: &DevArgs) -> anyhow::Result<Self> {
        let (dir, is_fresh) = match &args.dir {
            Some(dir) => {
                fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
                let dir = dir.canonicalize();
                (dir.with_context(|| "finding --dir".to_owned())?, false)
            }
            None => (fresh_dir()?, true),
        };
        let rpc_port = match args.rpc_port {
            Some(port) => port,
            None => free_port()?,
        };
        let scratch = Self {
            dir,
            is_fresh,
            rpc_port,
        };
        // Whoever waits for it shall not read what an earlier one wrote.
        let _ = fs::remove_file(scratch.dir.join("dev.json"));
        for made in [
            scratch.runtimes_dir(),
            scratch.registry(),
            scratch.runtime_root(),
        ] {
            fs::create_dir_all(&made).with_context(|| format!("making {}", made.display()))?;
        }
        let yaml = scratch.runtime_yaml(&args.size);
        crate::runtimes::parse(yaml.as_bytes())
            .context("--size and --rpc-port do not make a runtime")?;
        let file = scratch.runtimes_dir().join("vineyard.yaml");
        fs::write(&file, yaml).with_context(|| format!("writing {}", file.display()))?;
        Ok(scratch)
    }

    fn runtime_yaml(&self, size: &str) -> String {
        format!(
            "apiVersion: data.fluid.io/v1alpha1\n\
             kind: VineyardRuntime\n\
             metadata:\n  name: vineyard\n  namespace: default\n\
             spec:\n  worker:\n    ports:\n      rpc: {}\n  \
             tieredstore:\n    levels:\n    - mediumtype: MEM\n      quota: {}\n",
            self.rpc_port,
            json!(size),
        )
    }

    fn runtimes_dir(&self) -> PathBuf {
        self.dir.join("runtimes")
    }

    fn runtime_root(&self) -> PathBuf {
        self.dir.join("runtime-mnt/vineyard")
    }

    fn kubelet_dir(&self) -> PathBuf {
        self.dir.join("kubelet")
    }

    fn registry(&self) -> PathBuf {
        self.kubelet_dir().join("plugins_registry")
    }

    /// The volume, named so shortly that its sockets can be connected to from outside a pod:
    /// an address of unix(7) holds 107 bytes.
    fn volume(&self) -> anyhow::Result<Volume> {
        let fluid_path = self.fluid_path();
        let context = [
            (
                "fluid_path",
                fluid_path.to_str().context("--dir is not UTF-8")?,
            ),
            ("mount_type", "vineyard-fuse"),
            ("runtime_namespace", "default"),
            ("runtime_name", "vineyard"),
        ];
        let owned = |(k, v): (&str, &str)| (k.to_owned(), v.to_owned());
        Ok(Volume {
            id: "default-vineyard".to_owned(),
            target: self
                .kubelet_dir()
                .join("pods/dev/volumes/kubernetes.io~csi/v/mount"),
            context: HashMap::from(context.map(owned)),
        })
    }

    fn runtime_dir(&self) -> PathBuf {
        self.runtime_root().join("default/vineyard")
    }

    fn fluid_path(&self) -> PathBuf {
        self.runtime_dir().join("vineyard-fuse")
    }

    /// Writes `dev.json` and prints what is where.
    fn announce(&self, csi: &Path, volume: &Volume, is_private: bool) -> anyhow::Result<()> {
        let ipc = self.runtime_dir().join("vineyard.sock");
        let rpc = format!("127.0.0.1:{}", self.rpc_port);
        let facts = json!({
            "volume": volume.target,
            "ipc_socket": ipc,
            "rpc_endpoint": rpc,
            "csi_socket": csi,
            "fluid_path": self.fluid_path(),
            "pid": std::process::id(),
        });
        let file = self.dir.join("dev.json");
        let half = self.dir.join(".dev.json.new");
        fs::write(&half, format!("{facts:#}\n"))
            .and_then(|()| fs::rename(&half, &file))
            .with_context(|| format!("writing {}", file.display()))?;
        println!(
            "vineyard runtime {} is up.\n",
            RuntimeId::new("default", "vineyard")?
        );
        println!("  IPC socket      {}", ipc.display());
        println!("  RPC endpoint    {rpc}");
        println!("  volume          {}", volume.target.display());
        println!("  fluid path      {}", self.fluid_path().display());
        println!("  CSI socket      {}", csi.display());
        println!("  the same        {}\n", file.display());
        if is_private {
            println!(
                "The mounts are in a namespace of their own (not root); look at them with\n  nsenter -t {} -U -m --preserve-credentials ls {}\n",
                std::process::id(),
                volume.target.display()
            );
        }
        println!("Put and get an object (pip install vineyard 'setuptools<81' 'numpy<2'):\n");
        println!(
            "  python3 -c 'import vineyard; c = vineyard.connect(\"{}\"); print(c.get(c.put([1, 2, 3])))'\n",
            ipc.display()
        );
        println!("Ctrl-C ends it.");
        Ok(())
    }

    /// Takes away every mount below the directory, and the directory if it was ours.
    fn sweep(&self) -> anyhow::Result<()> {
        let left = mounts::detach_all_beneath(&self.dir)
            .with_context(|| format!("detaching what is mounted below {}", self.dir.display()))?;
        if left > 0 {
            tracing::debug!(mounts = left, "detached");
        }
        if self.is_fresh {
            fs::remove_dir_all(&self.dir)
                .with_context(|| format!("removing {}", self.dir.display()))?;
        } else {
            let _ = fs::remove_file(self.dir.join("dev.json"));
        }
        Ok(())
    }
}

/// A new directory below the temporary one, with a short name: socket paths are made of it.
fn fresh_dir() -> anyhow::Result<PathBuf> {
    let template = std::env::temp_dir().join("vinelet-XXXXXX");
    let dir = nix::unistd::mkdtemp(&template)
        .with_context(|| format!("making a directory like {}", template.display()))?;
    // Other users connect through it; what they may do is decided at the sockets.
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .with_context(|| format!("opening {} to others", dir.display()))?;
    dir.canonicalize().context("finding the scratch directory")
}

/// A port that is free now; if another program takes it first, the shard says so.
fn free_port() -> anyhow::Result<u16> {
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
    Ok(probe.local_addr().context("finding a free port")?.port())
}

/// The agent as a child in a process group of its own, so that Ctrl-C reaches only us and the
/// volume can be unpublished before the agent goes.
struct Agent(Child);

impl Agent {
    /// Longer than the agent promises to need (10 s).
    const GRACE: Duration = Duration::from_secs(12);

    fn start(scratch: &Scratch, log: &str) -> anyhow::Result<Self> {
        let child = Command::new("/proc/self/exe")
            .arg0("vinelet")
            .arg("agent")
            .args([
                "--runtimes-dir".as_ref(),
                scratch.runtimes_dir().as_os_str(),
            ])
            .args([
                "--runtime-root".as_ref(),
                scratch.runtime_root().as_os_str(),
            ])
            .args(["--shm-dir".as_ref(), scratch.dir.join("shm").as_os_str()])
            .args([
                "--state-dir".as_ref(),
                scratch.dir.join("state").as_os_str(),
            ])
            .args(["--kubelet-dir".as_ref(), scratch.kubelet_dir().as_os_str()])
            .args(["--driver-name", DRIVER, "--http", "none"])
            .args(["--rpc-host", "127.0.0.1", "--log", log, "--die-with-parent"])
            .env_remove("CSI_ENDPOINT")
            .process_group(0)
            .spawn()
            .context("starting the agent")?;
        Ok(Self(child))
    }

    /// Returns how the agent ended, once it has.
    async fn ended(&mut self, death: &mut tokio::signal::unix::Signal) -> String {
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                Ok(None) => death.recv().await,
                Err(error) => return error.to_string(),
            };
        }
    }

    /// Ends the agent: SIGTERM, and SIGKILL if it does not keep its promise.
    async fn stop(&mut self, death: &mut tokio::signal::unix::Signal) {
        let pid = Pid::from_raw(self.0.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        if tokio::time::timeout(Self::GRACE, self.ended(death))
            .await
            .is_err()
        {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}
