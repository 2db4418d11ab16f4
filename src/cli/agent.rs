//! `vinelet agent` and, with the same flags, `vinelet node`.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use super::fail;
use crate::telemetry::{self, Format};
use crate::{agent, node};

/// Flags of the agent, as typed.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// Directory of VineyardRuntime YAML files (a mounted ConfigMap); watched
    #[arg(long, value_name = "DIR", default_value = "/etc/vinelet/runtimes")]
    pub runtimes_dir: PathBuf,
    /// Where runtimes have their directories, as <ROOT>/<namespace>/<name>
    #[arg(long, value_name = "ROOT", default_value = "/runtime-mnt/vineyard")]
    pub runtime_root: PathBuf,
    /// Where shared memory lies; one tmpfs per runtime is mounted below
    #[arg(long, value_name = "DIR", default_value = "/run/vinelet/shm")]
    pub shm_dir: PathBuf,
    /// What the agent keeps of its own
    #[arg(long, value_name = "DIR", default_value = "/run/vinelet")]
    pub state_dir: PathBuf,
    /// Kubelet's root directory; volumes are published only beneath its pods/
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    pub kubelet_dir: PathBuf,
    /// Name of the CSI driver
    #[arg(long, value_name = "NAME", default_value = "vinelet.csi.v6d.io")]
    pub driver_name: String,
    /// CSI socket, a path or unix:// URL [default: <kubelet-dir>/plugins/<driver-name>/csi.sock]
    #[arg(long, value_name = "PATH", env = "CSI_ENDPOINT")]
    pub csi_socket: Option<String>,
    /// Where kubelet looks for plugins, or `none` [default: <kubelet-dir>/plugins_registry]
    #[arg(long, value_name = "DIR")]
    pub registration_dir: Option<PathBuf>,
    /// This node's name for kubelet [default: the hostname]
    #[arg(long, value_name = "NAME", env = "NODE_ID")]
    pub node_id: Option<String>,
    /// Address of /healthz, /readyz and /metrics, or `none`
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:9808")]
    pub http: String,
    /// Address that shards listen on for RPC clients
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0")]
    pub rpc_host: IpAddr,
    /// Least severe log lines to print
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub log: String,
    /// Form of the log lines
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// End when the process that started us ends
    #[arg(long, hide = true)]
    pub die_with_parent: bool,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl AgentArgs {
    /// The form `telemetry` knows.
    fn format(&self) -> Format {
        match self.log_format {
            LogFormat::Text => Format::Text,
            LogFormat::Json => Format::Json,
        }
    }

    /// The flags as the node role understands them, with every default filled in.
    fn understood(&self) -> anyhow::Result<node::Options> {
        for (flag, path) in [
            ("--runtimes-dir", &self.runtimes_dir),
            ("--runtime-root", &self.runtime_root),
            ("--shm-dir", &self.shm_dir),
            ("--state-dir", &self.state_dir),
            ("--kubelet-dir", &self.kubelet_dir),
        ] {
            absolute(flag, path)?;
        }
        check_driver_name(&self.driver_name)?;
        let csi_socket = match &self.csi_socket {
            Some(text) => {
                let path = PathBuf::from(text.strip_prefix("unix://").unwrap_or(text));
                absolute("--csi-socket", &path)?;
                path
            }
            None => self
                .kubelet_dir
                .join("plugins")
                .join(&self.driver_name)
                .join("csi.sock"),
        };
        let registration_dir = match &self.registration_dir {
            Some(none) if none.as_os_str() == "none" => None,
            Some(dir) => {
                absolute("--registration-dir", dir)?;
                Some(dir.clone())
            }
            None => Some(self.kubelet_dir.join("plugins_registry")),
        };
        let node_id = match &self.node_id {
            Some(name) => name.clone(),
            None => node::hostname()?,
        };
        if node_id.is_empty() || node_id.len() > 128 {
            bail!(
                "--node-id {node_id:?} has {} bytes; 1 to 128 are allowed",
                node_id.len()
            );
        }
        let http = match self.http.as_str() {
            "none" => None,
            address => Some(
                address
                    .parse::<SocketAddr>()
                    .with_context(|| format!("--http {address:?} is not ADDR:PORT or `none`"))?,
            ),
        };
        Ok(node::Options {
            runtimes_dir: self.runtimes_dir.clone(),
            runtime_root: self.runtime_root.clone(),
            shm_dir: self.shm_dir.clone(),
            kubelet_dir: self.kubelet_dir.clone(),
            driver_name: self.driver_name.clone(),
            csi_socket,
            registration_dir,
            node_id,
            http,
            rpc_host: self.rpc_host,
            log: self.log.clone(),
            log_format: self.format(),
        })
    }
}

/// CSI spec, GetPluginInfo: at most 63 characters, domain name notation; csi-sanity insists on a
/// letter at both ends.
fn check_driver_name(name: &str) -> anyhow::Result<()> {
    let bytes = name.as_bytes();
    let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    let ends = bytes.first().into_iter().chain(bytes.last());
    if bytes.is_empty()
        || bytes.len() > 63
        || !bytes.iter().all(inner)
        || !ends.into_iter().all(u8::is_ascii_alphabetic)
    {
        bail!(
            "--driver-name {name:?} is not a CSI driver name: at most 63 letters, digits, '-' and '.', a letter at both ends"
        );
    }
    Ok(())
}

fn absolute(flag: &str, path: &Path) -> anyhow::Result<()> {
    if !path.is_absolute() {
        bail!("{flag} {} is not an absolute path", path.display());
    }
    Ok(())
}

/// Runs the supervisor; `raw` are the flags as typed, for the node role.
pub fn run(args: AgentArgs, raw: Vec<OsString>) -> ExitCode {
    if let Err(error) = args.understood() {
        eprintln!("vinelet: {error:#}");
        return ExitCode::from(2);
    }
    if let Err(error) = telemetry::init(&args.log, args.format(), "agent") {
        return fail(&error.into());
    }
    let options = agent::Options {
        state_dir: args.state_dir,
        node_flags: raw,
        die_with_parent: args.die_with_parent,
    };
    match agent::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Runs the node role.
pub fn run_node(args: AgentArgs) -> ExitCode {
    let options = match args.understood() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("vinelet: {error:#}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = telemetry::init(&args.log, args.format(), "node") {
        return fail(&error.into());
    }
    match node::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn check(flags: &[&str], expected: Result<&str, &str>) {
        let args = Only::try_parse_from([&["vinelet"], flags].concat())
            .unwrap()
            .agent;
        let answer = args
            .understood()
            .map(|options| options.csi_socket.display().to_string());
        let answer = answer.map_err(|error| format!("{error:#}"));
        match expected {
            Ok(socket) => assert_eq!(answer.unwrap(), socket),
            Err(text) => assert!(answer.as_ref().unwrap_err().contains(text), "{answer:?}"),
        }
    }

    #[test]
    fn the_csi_socket_follows_the_kubelet_directory_and_the_driver_name() {
        check(
            &[],
            Ok("/var/lib/kubelet/plugins/vinelet.csi.v6d.io/csi.sock"),
        );
        check(
            &["--kubelet-dir", "/k", "--driver-name", "a.b"],
            Ok("/k/plugins/a.b/csi.sock"),
        );
        check(&["--csi-socket", "unix:///x/csi.sock"], Ok("/x/csi.sock"));
    }

    #[test]
    fn a_flag_that_makes_no_sense_is_named() {
        check(
            &["--runtime-root", "here"],
            Err("--runtime-root here is not an absolute path"),
        );
        check(&["--driver-name", "9a"], Err("is not a CSI driver name"));
        check(
            &["--http", "nowhere"],
            Err("--http \"nowhere\" is not ADDR:PORT or `none`"),
        );
        check(&["--node-id", ""], Err("--node-id \"\" has 0 bytes"));
    }
}
