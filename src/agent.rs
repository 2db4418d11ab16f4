//! Composition of `vinelet agent`: the supervisor, and how its children are launched.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use crate::supervisor::{Config, Supervisor};

/// Flags of the agent, understood.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the agent keeps of its own.
    pub state_dir: PathBuf,
    /// The agent's flags as typed: the node role takes the same.
    pub node_flags: Vec<OsString>,
    /// End as by SIGTERM when the parent ends.
    pub die_with_parent: bool,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(options: Options) -> anyhow::Result<()> {
    if options.die_with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)
            .context("tying this process to its parent")?;
        if nix::unistd::getppid().as_raw() == 1 {
            bail!("the process that started the agent is gone");
        }
    }
    let mut node = vec!["node".to_owned()];
    for flag in options.node_flags {
        match flag.into_string() {
            Ok(flag) => node.push(flag),
            Err(flag) => bail!("{flag:?} is not UTF-8"),
        }
    }
    Supervisor::new(Config::new(options.state_dir, node))
        .context("starting the supervisor")?
        .run()
        .context("supervising")
}
