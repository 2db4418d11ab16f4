//! One agent per state directory: a lock that ends with its holder.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Why this agent may not run.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The directory or the file cannot be made.
    #[error("making {}", path.display())]
    Open {
        /// What cannot be made.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another agent runs.
    #[error("another agent, {holder}, runs on {}: it holds agent.lock", state_dir.display())]
    Held {
        /// The directory both were given.
        state_dir: PathBuf,
        /// What the holder wrote of itself.
        holder: String,
    },
    /// The kernel refuses to lock.
    #[error("locking {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A held `<state-dir>/agent.lock`, until it is dropped. Children do not inherit it.
#[derive(Debug)]
pub(super) struct Lock {
    _held: Flock<File>,
}

impl Lock {
    /// Makes the directory where it is missing, and takes the lock or says who holds it.
    pub(super) fn take(state_dir: &Path) -> Result<Self, LockError> {
        let open = |path: &Path, source| LockError::Open {
            path: path.to_path_buf(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(state_dir)
            .map_err(|source| open(state_dir, source))?;
        let path = state_dir.join("agent.lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| open(&path, source))?;
        let lock = |source| LockError::Lock {
            path: path.clone(),
            source,
        };
        let mut held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => held,
            Err((file, Errno::EWOULDBLOCK)) => {
                return Err(LockError::Held {
                    state_dir: state_dir.to_path_buf(),
                    holder: holder(file),
                });
            }
            Err((_, errno)) => return Err(lock(errno.into())),
        };
        // In a container the number alone says little: every agent is pid 1 there.
        let host = nix::unistd::gethostname().unwrap_or_default();
        let text = format!("pid {} on {}\n", std::process::id(), host.to_string_lossy());
        held.set_len(0).map_err(lock)?;
        held.write_all(text.as_bytes()).map_err(lock)?;
        Ok(Self { _held: held })
    }
}

/// What the holder wrote; it may be about to.
fn holder(file: File) -> String {
    let mut text = String::new();
    match file.take(512).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        Ok(_) | Err(_) => "just started".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_who_runs_and_may_run_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("run/vinelet");
        let first = Lock::take(&state_dir).unwrap();
        let refused = Lock::take(&state_dir).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("pid {} on ", std::process::id())),
            "{refused}"
        );
        assert!(
            refused.contains(&state_dir.display().to_string()),
            "{refused}"
        );
        drop(first);
        Lock::take(&state_dir).unwrap();
    }
}
