//! Starting, ready, failing, draining: what the rooms may know of each other.

use std::fmt;

/// How far something has come, with the reason where a person would ask for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet; the text says what is being waited for.
    Starting(String),
    /// Serving.
    Ready,
    /// Cannot serve without somebody's help; the text says why.
    Failing(String),
    /// On its way out: what runs may end, nothing new begins.
    Draining,
}

impl Readiness {
    /// Whether requests may be sent there.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting(why) => write!(f, "starting: {why}"),
            Self::Ready => f.write_str("ready"),
            Self::Failing(why) => write!(f, "failing: {why}"),
            Self::Draining => f.write_str("draining"),
        }
    }
}
