//! What it means for a volume to be published: a runtime's directory is bound, read-only, onto
//! the target that kubelet named.
//!
//! Nothing is remembered: what is published is what the kernel's mount table says, so an agent
//! that was killed goes on where it was. Every change is made in one step without a pause, so a
//! call that is cancelled has done all of it or nothing.

mod context;
mod error;
mod in_flight;
mod plan;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::{Component, Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::mounts::{BindOptions, Error as MountError, Found, Place, Shown};
use crate::readiness::Readiness;
use crate::runtimes::{Board, FLUID_PATH, NotReady, RuntimeId};

/// Whose hands change the mount table; named by this room's callers only as a parameter.
pub use crate::mounts::Mounter;
pub use context::{ContextError, Source};
pub use error::{PublishError, StatsError, TargetError, UnpublishError};
pub use in_flight::Claim;
pub use plan::{Occupied, Plan, plan};

use in_flight::InFlight;

/// How long a runtime that nobody has heard of is waited for: its file may be on its way.
const GRACE: Duration = Duration::from_secs(1);
/// How long a shard is waited for when its figures are asked.
const FIGURES: Duration = Duration::from_secs(5);
/// Permission bits of a target directory, as kubelet gives its own.
const TARGET_MODE: u32 = 0o750;

/// The CO's name for a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VolumeId(String);

impl VolumeId {
    /// The volume with this id.
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    /// Whether kubelet made it for an ephemeral inline volume: `csi-` and a SHA-256 in hex.
    pub fn is_inline(&self) -> bool {
        self.0.strip_prefix("csi-").is_some_and(|hash| {
            hash.len() == 64
                && hash
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The directories within which volumes come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Kubelet's directory: every target lies beneath it.
    pub kubelet_dir: PathBuf,
    /// Every runtime's directory is `<runtime_root>/<namespace>/<name>`.
    pub runtime_root: PathBuf,
}

impl Roots {
    /// The target at `path`, if it may be one.
    pub fn target(&self, path: &Path) -> Result<Target, TargetError> {
        if !path.is_absolute() {
            return Err(TargetError::Relative(path.to_path_buf()));
        }
        if path.components().any(|c| c == Component::ParentDir) {
            return Err(TargetError::Upwards(path.to_path_buf()));
        }
        Place::beneath(&self.kubelet_dir, path)
            .map(Target)
            .map_err(|_| TargetError::Outside {
                path: path.to_path_buf(),
                kubelet_dir: self.kubelet_dir.clone(),
            })
    }

    fn runtime(&self, id: &RuntimeId) -> Result<Place, MountError> {
        let path = self.runtime_root.join(id.namespace()).join(id.name());
        Place::beneath(&self.runtime_root, &path)
    }

    fn source(&self, source: &Source) -> Result<Place, MountError> {
        self.within(self.runtime(&source.runtime)?, source)
    }

    /// The same as [`Roots::source`] shows, seen through `fluid_path`.
    fn near_source(&self, source: &Source) -> Result<Place, MountError> {
        let fluid_path = self.runtime(&source.runtime)?.path().join(FLUID_PATH);
        self.within(Place::beneath(&self.runtime_root, &fluid_path)?, source)
    }

    fn within(&self, directory: Place, source: &Source) -> Result<Place, MountError> {
        match &source.sub_path {
            Some(sub_path) => Place::beneath(&self.runtime_root, &directory.path().join(sub_path)),
            None => Ok(directory),
        }
    }
}

/// Where a volume is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(Place);

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A volume to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Which volume.
    pub volume_id: VolumeId,
    /// Where.
    pub target: Target,
    /// What it shows.
    pub source: Source,
}

/// What publishing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The volume appeared.
    Now,
    /// It was there already; nothing was touched.
    Before,
}

/// How full a shard is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// What it can hold.
    pub total: u64,
    /// What it holds.
    pub used: u64,
}

/// Why a shard tells no figures.
pub type FiguresError = Box<dyn std::error::Error + Send + Sync>;

/// Figures, when the shard has told them.
pub type FiguresFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Figures, FiguresError>> + Send + 'a>>;

/// Asks a runtime's shard, through its socket, how full it is.
pub trait ShardFigures: Send + Sync + 'static {
    /// The figures of the runtime's shard. May take as long as it takes: callers set a bound.
    fn figures<'a>(&'a self, id: &'a RuntimeId) -> FiguresFuture<'a>;
}

/// A handle on the published volumes of this node; clones are the same.
pub struct Volumes<M>(Arc<Inner<M>>);

struct Inner<M> {
    roots: Roots,
    bind: BindOptions,
    mounter: Arc<M>,
    board: Board,
    figures: Arc<dyn ShardFigures>,
    in_flight: InFlight,
}

impl<M> Clone for Volumes<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: Mounter> Volumes<M> {
    /// The volumes below `roots`.
    ///
    /// `selinux_enforcing`: container runtimes relabel a volume's directory through the mount
    /// they are given, so on such a node the host's side of it must be writable.
    pub fn new(
        roots: Roots,
        selinux_enforcing: bool,
        mounter: Arc<M>,
        board: Board,
        figures: Arc<dyn ShardFigures>,
    ) -> Self {
        if selinux_enforcing {
            tracing::warn!(
                "SELinux is enforcing: volumes are bound writable, because container runtimes \
                 relabel them; set readOnly: true on the pods' volumes"
            );
        }
        Self(Arc::new(Inner {
            roots,
            bind: BindOptions {
                read_only: !selinux_enforcing,
            },
            mounter,
            board,
            figures,
            in_flight: InFlight::default(),
        }))
    }

    /// The directories within which volumes come and go.
    pub fn roots(&self) -> &Roots {
        &self.0.roots
    }

    /// Makes a volume appear, waiting for its runtime no longer than `patience`.
    pub async fn publish(
        &self,
        request: &Publish,
        patience: Duration,
    ) -> Result<Published, PublishError> {
        let inner = &*self.0;
        let claims = vec![
            Claim::Target(request.target.0.path()),
            Claim::Volume(request.volume_id.clone()),
        ];
        let _guard = inner
            .in_flight
            .claim(claims)
            .map_err(PublishError::InFlight)?;
        // What is published stays published while its shard restarts, and what is in the way is
        // in the way however long one waits.
        let occupied = |found| PublishError::Occupied {
            target: request.target.clone(),
            found,
        };
        match inner.decide(request)? {
            Some(Plan::AlreadyPublished) => return Ok(Published::Before),
            Some(Plan::Refuse(found)) => return Err(occupied(found)),
            Some(Plan::MakeAndBind | Plan::Bind) | None => {}
        }
        let id = &request.source.runtime;
        let ready = inner.board.ready(id, patience, GRACE.min(patience)).await;
        ready.map_err(|why| match why {
            NotReady::Unknown { .. } => PublishError::UnknownRuntime(why),
            NotReady::NotYet { .. } => PublishError::NotReady(why),
        })?;
        // From here on there is no pause: a cancelled call ends above.
        match inner.decide(request)? {
            Some(Plan::AlreadyPublished) => Ok(Published::Before),
            Some(Plan::MakeAndBind) => inner.bind(request, true).map(|()| Published::Now),
            Some(Plan::Bind) => inner.bind(request, false).map(|()| Published::Now),
            Some(Plan::Refuse(found)) => Err(occupied(found)),
            None => Err(inner.no_source(request)),
        }
    }

    /// Makes a volume vanish; how many mounts were detached. Asks the kernel alone.
    pub async fn unpublish(&self, target: &Target) -> Result<usize, UnpublishError> {
        let claims = vec![Claim::Target(target.0.path())];
        let guard = self
            .0
            .in_flight
            .claim(claims)
            .map_err(UnpublishError::InFlight)?;
        let mounter = self.0.mounter.clone();
        let place = target.0.clone();
        // Detaching the last mount of a filesystem may wait for its disk or server. The guard
        // goes along: if the caller leaves, the target is busy until this has ended.
        let work = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            let detached = mounter.unmount(&place)?;
            mounter.remove(&place)?;
            Ok(detached)
        });
        match work.await {
            Ok(Ok(detached)) => Ok(detached),
            Ok(Err(MountError::SymbolicLink { .. })) => {
                Err(UnpublishError::LinkedTarget(target.clone()))
            }
            Ok(Err(source)) => Err(UnpublishError::Mount {
                target: target.clone(),
                source,
            }),
            Err(_) => Err(UnpublishError::Interrupted(target.clone())),
        }
    }

    /// How full the shard is that the volume at `path` shows.
    pub async fn stats(&self, path: &Path) -> Result<Figures, StatsError> {
        let id = self.0.runtime_at(path)?;
        let told = tokio::time::timeout(FIGURES, self.0.figures.figures(&id)).await;
        let told = told.unwrap_or_else(|elapsed| Err(elapsed.into()));
        told.map_err(|source| StatsError::Figures { id, source })
    }

    /// Whether every shard that is said to be ready answers within `bound`.
    ///
    /// A runtime that is not ready does not count: restarting the agent would not help it.
    pub async fn probe(&self, bound: Duration) -> Readiness {
        if !self.0.board.is_complete() {
            return Readiness::Starting("the runtimes directory is being read".to_owned());
        }
        let ready = self
            .0
            .board
            .all()
            .into_iter()
            .filter(|(_, how)| how.is_ready());
        let mut asked = JoinSet::new();
        for (id, _) in ready {
            let figures = self.0.figures.clone();
            asked.spawn(async move {
                let told = tokio::time::timeout(bound, figures.figures(&id)).await;
                match told {
                    Ok(Ok(_)) => None,
                    Ok(Err(error)) => Some((id, error.to_string())),
                    Err(_) => Some((id, format!("no answer within {bound:?}"))),
                }
            });
        }
        let mut silent = BTreeMap::new();
        while let Some(told) = asked.join_next().await {
            // A question that broke down is no answer.
            if let Ok(Some((id, why))) = told {
                silent.insert(id, why);
            }
        }
        match silent.first_key_value() {
            Some((id, why)) => Readiness::Failing(format!("runtime {id}: {why}")),
            None => Readiness::Ready,
        }
    }
}

impl<M: Mounter> Inner<M> {
    /// What is to be done now; none while the source does not exist.
    fn decide(&self, request: &Publish) -> Result<Option<Plan>, PublishError> {
        let place = &request.target.0;
        let failed = |error| PublishError::at(&request.target, error);
        let found = self.mounter.inspect(place).map_err(failed)?;
        if found == Found::Nothing {
            self.require_parent(request)?;
        }
        let is_empty = found == Found::Directory && self.mounter.is_empty(place).map_err(failed)?;
        let wanted = self.wanted(request)?;
        Ok(wanted.map(|wanted| plan(&found, is_empty, &wanted, self.bind.read_only)))
    }

    fn require_parent(&self, request: &Publish) -> Result<(), PublishError> {
        let path = request.target.0.path();
        let base = request.target.0.base();
        let above = path.parent().unwrap_or(base);
        // Kubelet's own directory is there, or the place itself could not have been looked at.
        let Ok(above) = Place::beneath(base, above) else {
            return Ok(());
        };
        match self.mounter.inspect(&above) {
            Ok(Found::Directory | Found::Mount(_)) => Ok(()),
            Ok(Found::Nothing | Found::Other) => {
                Err(PublishError::NoParent(request.target.clone()))
            }
            Ok(Found::Symlink(_)) => Err(PublishError::LinkedTarget(request.target.clone())),
            Err(error) => Err(PublishError::at(&request.target, error)),
        }
    }

    /// What shall be seen at the target; none while it does not exist.
    fn wanted(&self, request: &Publish) -> Result<Option<Shown>, PublishError> {
        let failed = |source| PublishError::Mount {
            target: request.target.clone(),
            source,
        };
        let place = self.roots.source(&request.source).map_err(failed)?;
        if request.source.sub_path.is_some() {
            let bad = |found| PublishError::BadSubPath {
                source_dir: place.clone(),
                found,
            };
            // A mount below the runtime is the dummy filesystem or its directory: a pod that
            // held one of them would depend on a FUSE server.
            match self.mounter.inspect(&place) {
                Ok(Found::Directory) => {}
                Ok(Found::Nothing) => return Ok(None),
                Ok(Found::Mount(_)) => return Err(bad("a mount")),
                Ok(Found::Symlink(_)) | Err(MountError::SymbolicLink { .. }) => {
                    return Err(bad("a symbolic link"));
                }
                Ok(Found::Other) => return Err(bad("a file")),
                Err(error) => return Err(failed(error)),
            }
        }
        match self.mounter.shown(&place) {
            Ok(shown) => Ok(Some(shown)),
            Err(MountError::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    fn no_source(&self, request: &Publish) -> PublishError {
        match self.roots.source(&request.source) {
            Ok(source_dir) if request.source.sub_path.is_some() => {
                PublishError::NoSubPath { source_dir }
            }
            Ok(source_dir) => PublishError::NoSource { source_dir },
            Err(source) => PublishError::Mount {
                target: request.target.clone(),
                source,
            },
        }
    }

    fn bind(&self, request: &Publish, make: bool) -> Result<(), PublishError> {
        let target = &request.target.0;
        let failed = |error| PublishError::at(&request.target, error);
        let source = self.roots.source(&request.source).map_err(failed)?;
        let is_made = make
            && self
                .mounter
                .create_dir(target, TARGET_MODE)
                .map_err(failed)?;
        let source = self.nearest(&request.source, source);
        let Err(error) = self.mounter.bind(&source, target, self.bind) else {
            return Ok(());
        };
        if is_made && let Err(left) = self.mounter.remove(target) {
            tracing::warn!(target_path = %target, error = %left, "a directory is left behind");
        }
        Err(failed(error))
    }

    /// The same directory by way of the mount that shows nothing else, where there is one.
    ///
    /// The kernel looks through everything mounted on the mount that it clones from: kubelet's
    /// targets lie on the node's one big filesystem with the runtime's directory, by the
    /// thousand.
    fn nearest(&self, wanted: &Source, source: Place) -> Place {
        let Ok(near) = self.roots.near_source(wanted) else {
            return source;
        };
        match (self.mounter.shown(&near), self.mounter.shown(&source)) {
            (Ok(near_shown), Ok(shown)) if near_shown == shown => near,
            _ => source,
        }
    }

    fn runtime_at(&self, path: &Path) -> Result<RuntimeId, StatsError> {
        let not_published = || StatsError::NotPublished(path.to_path_buf());
        let target = self.roots.target(path).map_err(|_| not_published())?;
        let found = self
            .mounter
            .inspect(&target.0)
            .map_err(|source| StatsError::Mount {
                path: path.to_path_buf(),
                source,
            })?;
        let Found::Mount(mounted) = found else {
            return Err(not_published());
        };
        let shows = |id: &RuntimeId| {
            let directory = self
                .roots
                .runtime(id)
                .and_then(|place| self.mounter.shown(&place));
            directory.is_ok_and(|directory| {
                directory.device == mounted.shown.device
                    && mounted.shown.root.starts_with(&directory.root)
            })
        };
        let mut ids = self.board.all().into_keys();
        ids.find(shows).ok_or_else(not_published)
    }
}
