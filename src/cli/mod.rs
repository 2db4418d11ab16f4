//! What a person types: one file per subcommand, each parses, calls a room, prints.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod agent;
pub mod csi;
pub mod dev;
mod gflags;
mod kubelet;
pub mod shard;
mod supervised;
mod vineyardd;

/// Vineyard, the shared-memory object store, on every Kubernetes node.
#[derive(Debug, Parser)]
#[command(name = "vinelet", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything on this machine in a scratch directory, and say how to connect
    Dev(dev::DevArgs),
    /// Run the node agent: the DaemonSet's entry point
    Agent(agent::AgentArgs),
    /// Serve kubelet and fluid; started by the agent
    #[command(hide = true)]
    Node(agent::AgentArgs),
    /// Run one store alone, with vineyardd's flags (see `vinelet shard --help`)
    #[command(disable_help_flag = true)]
    Shard {
        /// vineyardd's flags
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<OsString>,
    },
    /// Speak CSI by hand, one call on a fresh connection
    Csi(csi::CsiArgs),
}

/// Runs what `args` (with the program's name first) ask for.
///
/// Started under the name `vineyardd`, the binary behaves as one.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let program = args.first().map(Path::new).and_then(Path::file_name);
    if program.is_some_and(|name| name == "vineyardd") {
        return shard::run(args.into_iter().skip(1).collect());
    }
    // The flags of a shard are gflags, not ours: they reach it as they were typed.
    if args.get(1).is_some_and(|command| command == "shard") {
        return shard::run(args.into_iter().skip(2).collect());
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match cli.command {
        Command::Dev(dev) => dev::run(dev),
        Command::Agent(agent) => agent::run(agent, args.into_iter().skip(2).collect()),
        Command::Node(node) => agent::run_node(node),
        Command::Shard { flags } => shard::run(flags),
        Command::Csi(csi) => csi::run(csi),
    }
}

/// Prints what went wrong with its causes, as one line, and chooses the exit code.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("vinelet: {error:#}");
    ExitCode::FAILURE
}
