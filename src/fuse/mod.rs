//! Fluid's door: the dummy filesystem by which fluid sees that a runtime is mounted.
//!
//! A mount outlives its server. Whoever makes it answers the kernel's INIT request once and hands
//! the device with the handshake to custody; each later server takes them over, lets the kernel
//! repeat what the dead one was asked (FUSE_NOTIFY_RESEND, Linux 6.9) and serves. Clients wait
//! meanwhile and notice nothing.
//!
//! ```text
//! let (mark, custody) = Mark::establish(&mounter, &target, files)?;  // deposit custody elsewhere
//! let mark = Mark::resume(device, &context, files)?;                 // in the next process
//! mark.withdraw(&mounter, &target)?;
//! ```
//!
//! Invariants:
//! - No process that holds a device opens anything on its mount: at its death the kernel would
//!   wait for an answer from the dead.
//! - A device is served through one file description only, never through FUSE_DEV_IOC_CLONE: what
//!   a clone has read is lost with it.

mod adapter;
mod content;
mod context;
mod session;
mod tree;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::mounts::{self, DetachedFuse, FuseOptions, Mounter, Place};
pub use content::{Files, Fixed, Live};
use context::Context;
pub use context::ContextError;
use session::{Greeted, Outcome};

/// The type that fluid looks for: `fuse.` and this.
pub const SUBTYPE: &str = "vineyard-fuse";

/// The `source` column of the mount.
const SOURCE: &str = "vineyard";

/// How long the kernel may take to send INIT, which it does while it makes the filesystem.
const PATIENCE_MILLIS: u16 = 5_000;

/// `FUSE_NOTIFY_RESEND` of `linux/fuse.h`.
const NOTIFY_RESEND: i32 = 7;

/// The served filesystem that marks a runtime as mounted.
///
/// A handle: clones are the same mark. Dropping it changes nothing: the filesystem is served until
/// its mount is gone or the process ends.
#[derive(Clone, Debug)]
pub struct Mark {
    outcome: Outcome,
}

/// What has to be kept where it outlives this process, for [`Mark::resume`].
#[derive(Debug)]
pub struct Custody {
    /// The device; as long as any process holds it, the mount lives.
    pub device: OwnedFd,
    /// The handshake, with a version of its format.
    pub context: Vec<u8>,
}

/// Why there is no new mark.
#[derive(Debug, thiserror::Error)]
pub enum EstablishError {
    /// The filesystem could not be made or shown.
    #[error("mounting the dummy filesystem at {target}")]
    Mount {
        /// Where it was to be.
        target: Place,
        /// What the kernel refused.
        source: mounts::Error,
    },
    /// The kernel did not begin to speak FUSE as it should.
    #[error("agreeing with the kernel on the dummy filesystem at {target}")]
    Init {
        /// Where it was to be.
        target: Place,
        /// What was wrong with its INIT request.
        source: io::Error,
    },
    /// The server could not start.
    #[error("serving the dummy filesystem at {target}")]
    Serve {
        /// Where it was to be.
        target: Place,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Why a mark cannot be taken over; a new one can be established in its place.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The bytes from custody are not a handshake.
    #[error("the handshake of the dummy filesystem cannot be read: {0}")]
    Context(#[from] ContextError),
    /// Linux before 6.9.
    #[error(
        "this kernel cannot repeat what it had asked the last server of the dummy filesystem (FUSE_NOTIFY_RESEND, Linux 6.9)"
    )]
    CannotResend,
    /// The mount is gone, or was aborted.
    #[error("the dummy filesystem of this device is not mounted any more")]
    Gone,
    /// This program would have answered the kernel's INIT otherwise.
    #[error(
        "the last server of the dummy filesystem promised the kernel what this one cannot keep"
    )]
    Disagreement,
    /// The server could not start.
    #[error("serving the dummy filesystem")]
    Serve(#[source] io::Error),
}

impl Mark {
    /// Mounts the filesystem at `target` and serves it.
    ///
    /// It is served before it is shown, and what is mounted at `target` now, dead or alive, is
    /// replaced from beneath: whoever looks finds a filesystem there, once there was one, and
    /// afterwards exactly this.
    pub fn establish(
        mounter: &dyn Mounter,
        target: &Place,
        files: Files,
    ) -> Result<(Self, Custody), EstablishError> {
        let target = || target.clone();
        let mount = |source| EstablishError::Mount {
            target: target(),
            source,
        };
        let init = |source| EstablishError::Init {
            target: target(),
            source,
        };
        let serve = |source| EstablishError::Serve {
            target: target(),
            source,
        };

        let options = FuseOptions {
            source: SOURCE.to_owned(),
            subtype: SUBTYPE.to_owned(),
        };
        let DetachedFuse {
            device,
            mount: detached,
        } = mounter.fuse(&options).map_err(mount)?;
        let request = read_init(&device).map_err(init)?;
        let greeted = Greeted::with(&request, files).map_err(init)?;
        let handshake = Context::new(&request, greeted.reply())
            .map_err(|error| init(io::Error::other(error)))?;
        rustix::io::write(&device, greeted.reply()).map_err(|errno| init(errno.into()))?;
        let custody = Custody {
            device: device.try_clone().map_err(serve)?,
            context: handshake.encode(),
        };
        let outcome = greeted.serve(device).map_err(serve)?;
        mounter.attach(detached, &target()).map_err(mount)?;
        Ok((Self { outcome }, custody))
    }

    /// Serves a mount that another process made and no process serves now.
    ///
    /// The device must not be served by anybody else: each request would be answered twice.
    pub fn resume(device: OwnedFd, context: &[u8], files: Files) -> Result<Self, ResumeError> {
        let context = Context::decode(context)?;
        if !context.can_resend() {
            return Err(ResumeError::CannotResend);
        }
        if is_gone(&device) {
            return Err(ResumeError::Gone);
        }
        let greeted = Greeted::with(context.init(), files).map_err(ResumeError::Serve)?;
        if !context.agrees_with(greeted.reply()) {
            return Err(ResumeError::Disagreement);
        }
        rustix::io::write(&device, &notification(NOTIFY_RESEND))
            .map_err(|errno| ResumeError::Serve(errno.into()))?;
        let outcome = greeted.serve(device).map_err(ResumeError::Serve)?;
        Ok(Self { outcome })
    }

    /// Unmounts it, with everything else that is mounted at `target`; how many mounts that were.
    ///
    /// Who has a file open on it keeps it, and is served, until it closes the file.
    pub fn withdraw(self, mounter: &dyn Mounter, target: &Place) -> Result<usize, mounts::Error> {
        mounter.unmount(target)
    }

    /// Returns when the filesystem is no longer served, with the reason: somebody unmounted or
    /// aborted it.
    pub async fn ended(&self) -> String {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await;
        let reason = ended.ok().and_then(|ended| ended.clone());
        reason.unwrap_or_else(|| "its thread is gone".to_owned())
    }
}

impl Custody {
    /// Whether a later process can go on serving this mount: the kernel must be able to repeat
    /// what it asked a server that died. If not, nobody should keep the device: only when the last
    /// one is closed do waiting clients get an answer, and a new mark can be established.
    pub fn can_be_resumed(&self) -> bool {
        Context::decode(&self.context).is_ok_and(|context| context.can_resend())
    }
}

fn read_init(device: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PATIENCE_MILLIS)? == 0 {
        let what = format!("it did not come within {PATIENCE_MILLIS} ms");
        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
    }
    // FUSE_MIN_READ_BUFFER: a smaller buffer is refused.
    let mut request = vec![0; 8192];
    let length = rustix::io::read(device, &mut request)?;
    request.truncate(length);
    Ok(request)
}

/// Whether no mount is behind the device any more: poll(2) then says POLLERR.
fn is_gone(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    let found = poll(&mut fds, PollTimeout::ZERO);
    let revents = fds[0].revents();
    found.is_err() || revents.is_none_or(|flags| flags.contains(PollFlags::POLLERR))
}

/// `fuse_out_header` of a message nobody asked for: `unique` is 0, `error` says what it is.
fn notification(code: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&16_u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&code.to_ne_bytes());
    bytes
}
