//! Our errors → gRPC codes: CSI spec, "Error Scheme" and the tables of each call.
//!
//! Kubelet calls again after every error. After CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE,
//! RESOURCE_EXHAUSTED and ABORTED it takes the volume for possibly mounted; after any other it
//! removes the target directory. So what passes by itself is one of the former, and after the
//! latter nothing of ours is left.

use tonic::{Code, Status};

use crate::volumes::{ContextError, PublishError, StatsError, UnpublishError};

use super::request::RequestError;

/// An invalid request.
pub(super) fn request(error: &RequestError) -> Status {
    let code = match error {
        RequestError::Context(ContextError::NoPodInfo) => Code::FailedPrecondition,
        RequestError::Context(
            ContextError::NoRuntime
            | ContextError::NoName
            | ContextError::FluidPath { .. }
            | ContextError::Id { .. }
            | ContextError::MountType(_)
            | ContextError::Contradiction { .. }
            | ContextError::SubPath(_)
            | ContextError::UnknownKey(_)
            | ContextError::Ephemeral(_)
            | ContextError::ForeignNamespace { .. },
        )
        | RequestError::Missing(_)
        | RequestError::TooLong { .. }
        | RequestError::Nul(_)
        | RequestError::Target(_)
        | RequestError::Block
        | RequestError::AccessMode(_)
        | RequestError::FsType(_)
        | RequestError::MountFlag(_)
        | RequestError::MountGroup(_) => Code::InvalidArgument,
    };
    status(code, error)
}

/// A volume that was not published.
pub(super) fn publish(error: &PublishError) -> Status {
    let code = match error {
        PublishError::InFlight(_) => Code::Aborted,
        // An unknown runtime is an unknown volume; one that is known comes up by itself.
        PublishError::UnknownRuntime(_) => Code::NotFound,
        PublishError::NotReady(_) | PublishError::NoSource { .. } => Code::Unavailable,
        PublishError::NoSubPath { .. } => Code::NotFound,
        PublishError::BadSubPath { .. } | PublishError::LinkedTarget(_) => Code::InvalidArgument,
        PublishError::NoParent(_) => Code::FailedPrecondition,
        // ALREADY_EXISTS speaks of volumes; what merely lies about has to be cleared away first.
        PublishError::Occupied { found, .. } if found.is_mount() => Code::AlreadyExists,
        PublishError::Occupied { .. } => Code::FailedPrecondition,
        PublishError::Mount { .. } => Code::Internal,
    };
    status(code, error)
}

/// A volume that is not gone.
pub(super) fn unpublish(error: &UnpublishError) -> Status {
    let code = match error {
        UnpublishError::InFlight(_) => Code::Aborted,
        UnpublishError::LinkedTarget(_) => Code::InvalidArgument,
        UnpublishError::Mount { .. } | UnpublishError::Interrupted(_) => Code::Internal,
    };
    status(code, error)
}

/// A volume without figures.
pub(super) fn stats(error: &StatsError) -> Status {
    let code = match error {
        StatsError::NotPublished(_) => Code::NotFound,
        StatsError::Figures { .. } => Code::Unavailable,
        StatsError::Mount { .. } => Code::Internal,
    };
    status(code, error)
}

/// The error with all its causes, in one line. `details` stay empty, as the spec demands.
fn status(code: Code, error: &dyn std::error::Error) -> Status {
    Status::new(code, crate::errors::chain(error))
}
