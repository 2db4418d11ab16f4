//! CSI messages → validated requests. Each refusal says what to write.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::volumes::{ContextError, Publish, Roots, Source, Target, TargetError, VolumeId};

use super::grpc::csi::volume_capability::access_mode::Mode;
use super::grpc::csi::volume_capability::{AccessType, MountVolume};
use super::grpc::csi::{
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest,
    VolumeCapability,
};

/// CSI spec, "Size Limits": a string field may have so many bytes.
const MAX_STRING: usize = 128;
/// `PATH_MAX` without its NUL; for paths the spec leaves the limit to the system.
const MAX_PATH: usize = 4095;
/// What every bind has anyway, and what does not contradict it: `rw` asks for no less than a
/// read-only volume gives, because nothing in it is written by pods.
const MOUNT_FLAGS: [&str; 5] = ["ro", "rw", "nosuid", "nodev", "noexec"];
/// Disk filesystems that a CO or a provisioner fills in when nobody said anything.
const DEFAULT_FS_TYPES: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "btrfs"];

/// Why a request is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A required field is empty.
    #[error("{0} is required")]
    Missing(&'static str),
    /// A field is longer than allowed.
    #[error("{field} has {bytes} bytes, at most {limit} are allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A path or id that no file can have.
    #[error("{0} contains a NUL byte")]
    Nul(&'static str),
    /// A target that is none.
    #[error("target_path: {0}")]
    Target(#[from] TargetError),
    /// A raw block device is asked for.
    #[error(
        "volume_capability asks for a block device: vinelet volumes are directories, write volumeMode: Filesystem"
    )]
    Block,
    /// Not a mode of the CSI spec.
    #[error("volume_capability.access_mode {0} is not one of the CSI specification")]
    AccessMode(i32),
    /// A filesystem type that somebody meant.
    #[error(
        "volume_capability.mount.fs_type {0:?} means nothing for a directory of sockets: leave fsType out"
    )]
    FsType(String),
    /// An option that would not be obeyed.
    #[error(
        "volume_capability.mount.mount_flags: {0:?} is not supported, volumes are bound ro,nosuid,nodev,noexec: remove it from mountOptions"
    )]
    MountFlag(String),
    /// A group that would not be given.
    #[error(
        "volume_capability.mount.volume_mount_group {0:?} is not supported, sockets are open to every user: remove it"
    )]
    MountGroup(String),
    /// The context says nothing valid.
    #[error(transparent)]
    Context(#[from] ContextError),
}

/// What NodePublishVolume asks for.
///
/// `readonly` does not matter: a volume is read-only inside whatever it says. `secrets`,
/// `publish_context` and `staging_target_path` are not used.
pub fn publish(request: &NodePublishVolumeRequest, roots: &Roots) -> Result<Publish, RequestError> {
    let volume_id = volume_id(&request.volume_id)?;
    let target = target(&request.target_path, roots)?;
    capability(request.volume_capability.as_ref())?;
    let source = Source::from_context(&volume_id, &request.volume_context, &roots.runtime_root)?;
    Ok(Publish {
        volume_id,
        target,
        source,
    })
}

/// What NodeUnpublishVolume asks for.
pub fn unpublish(
    request: &NodeUnpublishVolumeRequest,
    roots: &Roots,
) -> Result<Target, RequestError> {
    volume_id(&request.volume_id)?;
    target(&request.target_path, roots)
}

/// What NodeGetVolumeStats asks for. Any path will do: one where no volume of ours can be is
/// one where none is.
pub fn stats(request: &NodeGetVolumeStatsRequest) -> Result<PathBuf, RequestError> {
    volume_id(&request.volume_id)?;
    path("volume_path", &request.volume_path).map(Path::to_path_buf)
}

/// How long the caller waits, by the `grpc-timeout` header: up to 8 digits and a unit
/// (gRPC over HTTP/2, "Requests"). Anything else is as no header.
pub fn timeout(header: &str) -> Option<Duration> {
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// How long a runtime may be waited for, so that the answer still arrives in time.
pub fn patience(timeout: Option<Duration>) -> Duration {
    // As long as fluid's plugin waits.
    let timeout = timeout.unwrap_or(Duration::from_secs(30));
    let margin = (timeout / 10).clamp(Duration::from_millis(20), Duration::from_secs(1));
    timeout.saturating_sub(margin)
}

fn text<'a>(field: &'static str, value: &'a str, limit: usize) -> Result<&'a str, RequestError> {
    match value.len() {
        0 => Err(RequestError::Missing(field)),
        bytes if bytes > limit => Err(RequestError::TooLong {
            field,
            bytes,
            limit,
        }),
        _ if value.contains('\0') => Err(RequestError::Nul(field)),
        _ => Ok(value),
    }
}

fn volume_id(value: &str) -> Result<VolumeId, RequestError> {
    text("volume_id", value, MAX_STRING).map(VolumeId::new)
}

fn path<'a>(field: &'static str, value: &'a str) -> Result<&'a Path, RequestError> {
    text(field, value, MAX_PATH).map(Path::new)
}

fn target(value: &str, roots: &Roots) -> Result<Target, RequestError> {
    Ok(roots.target(path("target_path", value)?)?)
}

fn capability(capability: Option<&VolumeCapability>) -> Result<(), RequestError> {
    let capability = capability.ok_or(RequestError::Missing("volume_capability"))?;
    match &capability.access_type {
        None => return Err(RequestError::Missing("volume_capability.access_type")),
        Some(AccessType::Block(_)) => return Err(RequestError::Block),
        Some(AccessType::Mount(mount)) => mounted(mount)?,
    }
    let mode = capability
        .access_mode
        .ok_or(RequestError::Missing("volume_capability.access_mode"))?
        .mode;
    match Mode::try_from(mode) {
        Ok(Mode::Unknown) => Err(RequestError::Missing("volume_capability.access_mode.mode")),
        // Every pod reads the same directory and none writes it, so every mode is satisfied.
        Ok(
            Mode::SingleNodeWriter
            | Mode::SingleNodeReaderOnly
            | Mode::MultiNodeReaderOnly
            | Mode::MultiNodeSingleWriter
            | Mode::MultiNodeMultiWriter
            | Mode::SingleNodeSingleWriter
            | Mode::SingleNodeMultiWriter,
        ) => Ok(()),
        Err(_) => Err(RequestError::AccessMode(mode)),
    }
}

fn mounted(mount: &MountVolume) -> Result<(), RequestError> {
    let fs_type = mount.fs_type.as_str();
    if !fs_type.is_empty() && !DEFAULT_FS_TYPES.contains(&fs_type) {
        return Err(RequestError::FsType(fs_type.to_owned()));
    }
    let mut flags = mount.mount_flags.iter();
    if let Some(flag) = flags.find(|flag| !MOUNT_FLAGS.contains(&flag.as_str())) {
        return Err(RequestError::MountFlag(flag.clone()));
    }
    if !mount.volume_mount_group.is_empty() {
        return Err(RequestError::MountGroup(mount.volume_mount_group.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_is_read_in_every_unit() {
        for (header, expected) in [
            ("2M", Some(Duration::from_secs(120))),
            ("119995m", Some(Duration::from_millis(119_995))),
            ("1S", Some(Duration::from_secs(1))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("5u", Some(Duration::from_micros(5))),
            ("", None),
            ("S", None),
            ("123456789S", None),
            ("-1S", None),
            ("1s", None),
            ("1é", None),
        ] {
            assert_eq!(timeout(header), expected, "{header:?}");
        }
    }

    #[test]
    fn the_answer_comes_before_the_caller_gives_up() {
        let seconds = Duration::from_secs_f64;
        for (timeout, expected) in [
            (Some(seconds(120.0)), seconds(119.0)),
            (Some(seconds(2.0)), seconds(1.8)),
            (Some(seconds(0.1)), seconds(0.08)),
            (Some(seconds(0.01)), seconds(0.0)),
            (None, seconds(29.0)),
        ] {
            assert_eq!(patience(timeout), expected);
        }
    }
}
