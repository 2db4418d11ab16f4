//! Which runtimes there are, remembered by the supervisor: a file that happens to be bad when the
//! node role starts anew still finds its runtime running.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;

use rustix::fs::MemfdFlags;

use crate::runtimes::Present;
use crate::supervisor::{ChildChannel, Deposit};

/// Its name in custody.
pub(super) const PRESENT: &str = "present";

/// Leaves `present` in custody, as JSON in an anonymous file.
pub(super) fn keep(present: &Present, channel: &ChildChannel) {
    let kept = || -> anyhow::Result<()> {
        let fd = rustix::fs::memfd_create("present", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(fd);
        file.write_all(&serde_json::to_vec(present)?)?;
        channel.deposit(PRESENT, &[], &[file.as_fd()])?;
        Ok(())
    };
    if let Err(error) = kept() {
        tracing::warn!(%error, "the next node role has to rely on the files alone");
    }
}

/// What an earlier node role left; nothing where it cannot be read.
pub(super) fn recall(deposit: Deposit) -> Present {
    let recalled = || -> anyhow::Result<Present> {
        let mut text = String::new();
        for fd in deposit.fds {
            let mut file = File::from(fd);
            file.rewind()?;
            file.read_to_string(&mut text)?;
        }
        Ok(serde_json::from_str(&text)?)
    };
    recalled().unwrap_or_else(|error| {
        tracing::warn!(%error, "what the last node role ran cannot be read");
        Present::new()
    })
}
