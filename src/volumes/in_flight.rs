//! One operation at a time per volume and per target.
//!
//! The CO means to send no second call while one runs, but after its own crash it does (CSI
//! spec, "Concurrency"); the second is told to come back.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::VolumeId;

/// What an operation claims.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// A volume: claimed by publishing, at whichever target.
    Volume(VolumeId),
    /// A target: claimed by publishing and unpublishing. Unpublishing claims no volume: kubelet
    /// takes one volume away from many pods at the same time, and a publish that waits for its
    /// runtime must keep no other pod from ending.
    Target(PathBuf),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Target(path) => write!(f, "target_path {}", path.display()),
        }
    }
}

/// The claims that are held now. Clones hold the same ones.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Mutex<HashSet<Claim>>>);

/// Lets go of its claims on drop, so also where the caller's RPC was cancelled.
#[derive(Debug)]
pub(super) struct ClaimGuard {
    all: InFlight,
    claims: Vec<Claim>,
}

impl InFlight {
    /// Takes all of `claims` or none; the first one that is held elsewhere otherwise.
    pub(super) fn claim(&self, claims: Vec<Claim>) -> Result<ClaimGuard, Claim> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(busy) = claims.iter().find(|claim| held.contains(claim)) {
            return Err(busy.clone());
        }
        held.extend(claims.iter().cloned());
        drop(held);
        Ok(ClaimGuard {
            all: self.clone(),
            claims,
        })
    }
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        let mut held = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        for claim in &self.claims {
            held.remove(claim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(id: &str) -> Claim {
        Claim::Volume(VolumeId::new(id))
    }

    fn target(path: &str) -> Claim {
        Claim::Target(PathBuf::from(path))
    }

    #[test]
    fn a_second_claim_is_refused_until_the_first_is_dropped() {
        let all = InFlight::default();
        let guard = all.claim(vec![volume("v"), target("/t")]).unwrap();
        assert_eq!(
            all.claim(vec![volume("v"), target("/u")]).unwrap_err(),
            volume("v")
        );
        assert_eq!(all.claim(vec![target("/t")]).unwrap_err(), target("/t"));
        drop(guard);
        all.claim(vec![volume("v"), target("/t")]).unwrap();
    }

    #[test]
    fn a_refused_claim_takes_nothing() {
        let all = InFlight::default();
        let _guard = all.claim(vec![target("/t")]).unwrap();
        assert!(all.claim(vec![volume("v"), target("/t")]).is_err());
        assert!(all.claim(vec![volume("v")]).is_ok());
    }
}
