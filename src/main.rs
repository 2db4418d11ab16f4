//! `vinelet`: flags → one role → exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    vinelet::cli::run(std::env::args_os())
}
