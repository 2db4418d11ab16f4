//! What a person types: one file per subcommand.

mod gflags;
pub mod shard;
mod vineyardd;

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the subcommand that `args` (with the program's name first) ask for.
pub fn run(_args: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(2)
}
