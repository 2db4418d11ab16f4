//! What can go wrong with a volume; one variant per thing somebody would do about it.

use std::path::PathBuf;

use crate::mounts::{Error as MountError, Place};
use crate::runtimes::{NotReady, RuntimeId};

use super::{Claim, FiguresError, Occupied, Target};

/// Why a path cannot be a target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not from the root.
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// It would go up.
    #[error("{} contains '..'", .0.display())]
    Upwards(PathBuf),
    /// Not kubelet's.
    #[error("{} is not beneath kubelet's directory {}", path.display(), kubelet_dir.display())]
    Outside {
        /// What was asked for.
        path: PathBuf,
        /// Where it would have to be.
        kubelet_dir: PathBuf,
    },
}

/// Why a volume was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Another operation runs.
    #[error("an operation on {0} is already in flight")]
    InFlight(Claim),
    /// There is no such runtime.
    #[error(transparent)]
    UnknownRuntime(NotReady),
    /// The runtime is not to be used yet.
    #[error(transparent)]
    NotReady(NotReady),
    /// The runtime is ready, but has no directory.
    #[error("the directory {source_dir} of a runtime that is ready is missing")]
    NoSource {
        /// The runtime's directory.
        source_dir: Place,
    },
    /// The sub path is not there.
    #[error("fluid_sub_path: {source_dir} does not exist")]
    NoSubPath {
        /// The directory asked for.
        source_dir: Place,
    },
    /// The sub path is something that cannot be shown.
    #[error(
        "fluid_sub_path: {source_dir} is {found}, not a plain directory reached without symbolic links"
    )]
    BadSubPath {
        /// The directory asked for.
        source_dir: Place,
        /// What it is.
        found: &'static str,
    },
    /// The CO did not make the directory above the target.
    #[error("the directory above target_path {0} does not exist: the caller makes it")]
    NoParent(Target),
    /// The target is reached through a link.
    #[error("target_path {0} is reached through a symbolic link")]
    LinkedTarget(Target),
    /// Something else is at the target.
    #[error("target_path {target} is taken by {found}")]
    Occupied {
        /// The target.
        target: Target,
        /// What is there.
        found: Occupied,
    },
    /// The kernel refused.
    #[error("publishing at {target}")]
    Mount {
        /// The target.
        target: Target,
        /// What the kernel said.
        source: MountError,
    },
}

/// Why a volume is not gone.
#[derive(Debug, thiserror::Error)]
pub enum UnpublishError {
    /// Another operation runs.
    #[error("an operation on {0} is already in flight")]
    InFlight(Claim),
    /// The target is reached through a link.
    #[error("target_path {0} is reached through a symbolic link")]
    LinkedTarget(Target),
    /// The kernel refused.
    #[error("unpublishing at {target}")]
    Mount {
        /// The target.
        target: Target,
        /// What the kernel said.
        source: MountError,
    },
    /// The work itself broke down.
    #[error("unpublishing at {0} was interrupted")]
    Interrupted(Target),
}

/// Why there are no figures of a volume.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// No volume is published there.
    #[error("no volume of this driver is published at volume_path {}", .0.display())]
    NotPublished(PathBuf),
    /// The shard does not tell.
    #[error("runtime {id} tells no figures")]
    Figures {
        /// The runtime.
        id: RuntimeId,
        /// Why.
        source: FiguresError,
    },
    /// The kernel refused.
    #[error("looking at volume_path {}", path.display())]
    Mount {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: MountError,
    },
}

impl PublishError {
    /// An error met at the target, where a link is the caller's mistake.
    pub(super) fn at(target: &Target, error: MountError) -> Self {
        if matches!(&error, MountError::SymbolicLink { place } if *place == target.0) {
            return Self::LinkedTarget(target.clone());
        }
        Self::Mount {
            target: target.clone(),
            source: error,
        }
    }
}
