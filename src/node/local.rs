//! One runtime on this node, from its first directory to its mark.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::Options;
use super::keeper::pause;
use super::live::LiveStatus;
use super::shards::Shards;
use crate::fuse::{Files, Fixed, Mark};
use crate::mounts::{BindOptions, Found, Linux, Mounter, Place, TmpfsOptions};
use crate::readiness::Readiness;
use crate::runtimes::{Board, Discovery, Layout, RuntimeId, RuntimeSpec};
use crate::shard::memory::Pool;
use crate::supervisor::{ChildChannel, ChildPlan, ChildReport, Deposit};

/// Name of a mark in custody, before the runtime's id.
pub(super) const MARK: &str = "mark ";

/// How far a runtime has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Something a shard needs is missing; tried again then, or never.
    Unprepared { again: Option<Instant> },
    /// A shard is wanted, and has not said that it is ready.
    Launched,
    /// The shard of this process id is being asked.
    Probing(u32),
    /// The shard answers, but the mark could not be made; tried again then.
    Unmarked { again: Instant },
    /// Serving: the shard has this process id.
    Up(u32),
    /// No longer wanted; its shard may still be there.
    Leaving,
}

/// What runtimes are kept with.
pub(super) struct Means {
    pub(super) options: Arc<Options>,
    pub(super) mounter: Arc<Linux>,
    pub(super) board: Board,
    pub(super) shards: Arc<Shards>,
    pub(super) channel: ChildChannel,
}

impl Means {
    /// Puts up how a runtime fares; a change is a line in the log.
    pub(super) fn show(&self, id: &RuntimeId, readiness: Readiness) {
        if self.board.get(id).as_ref() != Some(&readiness) {
            match &readiness {
                Readiness::Failing(why) => tracing::error!(runtime = %id, why, "runtime fails"),
                Readiness::Ready => tracing::info!(runtime = %id, "runtime is ready"),
                Readiness::Starting(why) => tracing::debug!(runtime = %id, why, "runtime starts"),
                Readiness::Draining => tracing::debug!(runtime = %id, "runtime drains"),
            }
        }
        self.board.set(id, readiness);
    }
}

/// A mark that is set.
struct Marked {
    mark: Mark,
    files: Files,
    /// Whether somebody waits for its end.
    is_watched: bool,
}

/// A runtime of this node.
pub(super) struct Local {
    spec: RuntimeSpec,
    layout: Option<Layout>,
    endpoint: String,
    pub(super) stage: Stage,
    readiness: Readiness,
    mark: Option<Marked>,
    /// Failures in a row.
    attempts: u32,
}

impl Local {
    pub(super) fn new(spec: RuntimeSpec, options: &Options) -> Self {
        Self {
            endpoint: endpoint(&spec, options),
            spec,
            layout: None,
            stage: Stage::Unprepared {
                again: Some(Instant::now()),
            },
            readiness: Readiness::Starting("its directories are being made".to_owned()),
            mark: None,
            attempts: 0,
        }
    }

    pub(super) fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    pub(super) fn child_name(&self) -> String {
        format!("shard {}", self.spec.id)
    }

    pub(super) fn deposit_name(&self) -> String {
        format!("{MARK}{}", self.spec.id)
    }

    /// When to try again what failed.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        match self.stage {
            Stage::Unprepared { again } => again,
            Stage::Unmarked { again } => Some(again),
            Stage::Launched | Stage::Probing(_) | Stage::Up(_) | Stage::Leaving => None,
        }
    }

    /// Takes on what its file asks for now.
    pub(super) fn change(&mut self, spec: RuntimeSpec) {
        self.spec = spec;
    }

    /// Makes directories and the arena's tmpfs.
    pub(super) fn prepare(&mut self, means: &Means) {
        let Means {
            options, mounter, ..
        } = means;
        match self.stage {
            Stage::Leaving => return,
            Stage::Unmarked { .. } => {
                // The shard is there: hear of it again.
                self.stage = Stage::Launched;
                return;
            }
            Stage::Unprepared { .. } | Stage::Launched | Stage::Probing(_) | Stage::Up(_) => {}
        }
        self.endpoint = endpoint(&self.spec, options);
        let layout = match Layout::new(&options.runtime_root, &self.spec.id) {
            Ok(layout) => layout,
            Err(error) => {
                // No repetition makes a path shorter.
                self.stage = Stage::Unprepared { again: None };
                self.readiness = Readiness::Failing(error.to_string());
                return;
            }
        };
        match make_directories(&layout, mounter, options)
            .and_then(|()| make_arena(&layout, self.spec.memory, mounter, options))
        {
            Ok(()) => {
                self.layout = Some(layout);
                self.stage = Stage::Launched;
                self.readiness = Readiness::Starting("its shard is starting".to_owned());
            }
            Err(error) => self.fail(format!("{error:#}")),
        }
    }

    /// Says why it does not serve, and when to try again.
    pub(super) fn fail(&mut self, why: String) {
        let again = Instant::now() + pause(self.attempts);
        self.attempts = self.attempts.saturating_add(1);
        self.stage = match self.layout {
            Some(_) => Stage::Unmarked { again },
            None => Stage::Unprepared { again: Some(again) },
        };
        self.readiness = Readiness::Failing(why);
    }

    /// The shard it needs, once there is a place for it.
    pub(super) fn plan(&self, options: &Options) -> Option<ChildPlan> {
        let layout = self.layout.as_ref()?;
        if matches!(self.stage, Stage::Leaving | Stage::Unprepared { .. }) {
            return None;
        }
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let args = [
            "shard".to_owned(),
            "--meta=local".to_owned(),
            "--deployment=distributed".to_owned(),
            format!("--socket={}", text(&layout.worker_socket())),
            format!("--size={}", self.spec.memory),
            format!("--rpc_socket_port={}", self.spec.rpc_port),
            format!("--rpc_host={}", options.rpc_host),
            format!("--arena_dir={}", text(&layout.arena_dir(&options.shm_dir))),
        ];
        let env = [
            ("MY_HOST_NAME", options.advertised_host()),
            ("VINELET_LOG", options.log.clone()),
            ("VINELET_LOG_FORMAT", options.log_format.to_string()),
            ("VINELET_ROLE", self.child_name()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value));
        Some(ChildPlan {
            name: self.child_name(),
            args: args.to_vec(),
            env: BTreeMap::from(env),
        })
    }

    /// Takes in what the supervisor says of the shard; its process id if it should be asked now.
    pub(super) fn hear(&mut self, child: &ChildReport) -> Option<u32> {
        let serves = match self.stage {
            Stage::Up(pid) | Stage::Probing(pid) => Some(pid),
            Stage::Launched => None,
            Stage::Unprepared { .. } | Stage::Unmarked { .. } | Stage::Leaving => return None,
        };
        match (&child.state, child.pid) {
            (Readiness::Ready, Some(pid)) if serves != Some(pid) => {
                self.stage = Stage::Probing(pid);
                Some(pid)
            }
            (Readiness::Ready, _) => None,
            (Readiness::Starting(_) | Readiness::Failing(_) | Readiness::Draining, _) => {
                self.stage = Stage::Launched;
                self.readiness = match &child.state {
                    Readiness::Failing(why) => Readiness::Failing(why.clone()),
                    Readiness::Starting(why) => Readiness::Starting(format!("its shard: {why}")),
                    Readiness::Ready | Readiness::Draining => {
                        Readiness::Starting("its shard is being replaced".to_owned())
                    }
                };
                None
            }
        }
    }

    pub(super) fn is_probing(&self, pid: Option<u32>) -> bool {
        matches!((&self.stage, pid), (Stage::Probing(now), Some(then)) if *now == then)
    }

    /// The shard has answered: tells clients, and sets the mark.
    pub(super) fn bring_up(&mut self, means: &Means) {
        let Stage::Probing(pid) = self.stage else {
            return;
        };
        match self.set_mark(means) {
            Ok(()) => {
                self.attempts = 0;
                self.stage = Stage::Up(pid);
                self.readiness = Readiness::Ready;
            }
            Err(error) => self.fail(format!("{error:#}")),
        }
    }

    fn set_mark(&mut self, means: &Means) -> anyhow::Result<()> {
        let Means {
            options,
            mounter,
            channel,
            ..
        } = means;
        let Some(layout) = &self.layout else {
            return Ok(());
        };
        let discovery = Discovery {
            rpc_endpoint: self.endpoint.clone(),
        };
        discovery.publish(layout)?;
        show_directory(layout, mounter, options)?;
        if let Some(marked) = &self.mark {
            marked
                .files
                .update(fixed(layout, &discovery), SystemTime::now());
            return Ok(());
        }
        let files = files(layout, &discovery, means);
        let place = Place::beneath(&options.runtime_root, &layout.dummy_path())?;
        let (mark, custody) = Mark::establish(&**mounter, &place, files.clone())?;
        if custody.can_be_resumed() {
            let device = custody.device.as_fd();
            channel
                .deposit(&self.deposit_name(), &custody.context, &[device])
                .context("leaving /dev/fuse in custody")?;
        }
        self.mark = Some(Marked {
            mark,
            files,
            is_watched: false,
        });
        Ok(())
    }

    /// Serves on the mark that an earlier node role left.
    pub(super) fn take_over_mark(&mut self, deposit: Deposit, means: &Means) {
        let Means {
            options, channel, ..
        } = means;
        let Ok(layout) = Layout::new(&options.runtime_root, &self.spec.id) else {
            return;
        };
        let discovery = Discovery {
            rpc_endpoint: self.endpoint.clone(),
        };
        let files = files(&layout, &discovery, means);
        let device = deposit.fds.into_iter().next();
        let resumed = device.map(|device| Mark::resume(device, &deposit.context, files.clone()));
        match resumed {
            Some(Ok(mark)) => {
                self.mark = Some(Marked {
                    mark,
                    files,
                    is_watched: false,
                });
            }
            Some(Err(error)) => {
                // A new mark will replace the dead one from beneath.
                tracing::warn!(runtime = %self.spec.id, %error, "the mark cannot be taken over");
                let _ = channel.withdraw(&self.deposit_name());
            }
            None => {}
        }
    }

    /// The mark, once, for somebody who waits for its end.
    pub(super) fn unwatched_mark(&mut self) -> Option<Mark> {
        let marked = self.mark.as_mut().filter(|marked| !marked.is_watched)?;
        marked.is_watched = true;
        Some(marked.mark.clone())
    }

    /// The mark was unmounted by somebody else; whether it is to be set again.
    pub(super) fn lose_mark(&mut self, channel: &ChildChannel) -> bool {
        if self.mark.take().is_none() {
            return false;
        }
        // If custody keeps it, the next mark replaces it there.
        let _ = channel.withdraw(&self.deposit_name());
        if let Stage::Up(_) = self.stage {
            self.stage = Stage::Launched;
        }
        true
    }

    /// Takes the mark away, and what stands for it in custody.
    pub(super) fn withdraw_mark(&mut self, means: &Means) {
        let had_mark = self.mark.take().is_some();
        detach_marks(&self.spec.id, means);
        if had_mark && let Err(error) = means.channel.withdraw(&self.deposit_name()) {
            tracing::warn!(runtime = %self.spec.id, %error, "custody keeps a descriptor nobody needs");
        }
    }

    /// Removes what a runtime leaves behind once its shard is gone. Its directory stays: volumes
    /// may be bound from it.
    pub(super) fn clean_up(self, means: &Means) {
        let Means {
            options, mounter, ..
        } = means;
        let Some(layout) = self.layout else { return };
        if let Err(error) = Discovery::withdraw(&layout) {
            tracing::warn!(runtime = %self.spec.id, %error, "discovery files stay");
        }
        if let Err(error) = std::fs::remove_file(layout.worker_socket())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(runtime = %self.spec.id, %error, "the socket stays");
        }
        let arena = layout.arena_dir(&options.shm_dir);
        let removed = Place::beneath(&options.shm_dir, &arena)
            .and_then(|place| mounter.unmount(&place).and_then(|_| mounter.remove(&place)));
        if let Err(error) = removed {
            tracing::warn!(runtime = %self.spec.id, %error, "shared memory stays");
        }
    }
}

/// Detaches the dummy filesystem and the bind that carries it, whoever mounted them.
pub(super) fn detach_marks(id: &RuntimeId, means: &Means) {
    let Means {
        options, mounter, ..
    } = means;
    let Ok(layout) = Layout::new(&options.runtime_root, id) else {
        return;
    };
    for path in [layout.dummy_path(), layout.fuse_dir()] {
        let detached =
            Place::beneath(&options.runtime_root, &path).and_then(|place| mounter.unmount(&place));
        match detached {
            Ok(_) | Err(crate::mounts::Error::NotFound { .. }) => {}
            Err(error) => {
                tracing::error!(runtime = %id, path = %path.display(), %error, "the mark stays");
            }
        }
    }
}

/// The files of the dummy filesystem.
fn files(layout: &Layout, discovery: &Discovery, means: &Means) -> Files {
    let live = LiveStatus {
        id: layout.id().clone(),
        board: means.board.clone(),
        shards: Arc::clone(&means.shards),
        handle: Handle::current(),
    };
    Files::new(fixed(layout, discovery), SystemTime::now(), live)
}

fn fixed(layout: &Layout, discovery: &Discovery) -> Fixed {
    Fixed {
        ipc_socket: layout.socket().to_string_lossy().into_owned(),
        rpc_endpoint: discovery.rpc_endpoint.clone(),
        config: discovery.config(),
    }
}

/// `host:port` for clients elsewhere.
fn endpoint(spec: &RuntimeSpec, options: &Options) -> String {
    format!("{}:{}", options.advertised_host(), spec.rpc_port)
}

fn make_directories(layout: &Layout, mounter: &Linux, options: &Options) -> anyhow::Result<()> {
    let root = &options.runtime_root;
    std::fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    for path in [
        layout.dir().to_path_buf(),
        layout.rpc_conf_dir(),
        layout.dummy_dir(),
        layout.fuse_dir(),
    ] {
        mounter.create_dir(&Place::beneath(root, &path)?, 0o755)?;
    }
    Ok(())
}

/// Bytes of the file that a shard with so much memory makes.
fn arena_bytes(memory: u64) -> u64 {
    Pool::sparse(memory).map_or(memory, |pool| pool.region())
}

/// A tmpfs for the arena alone, so that its size is capped and its pages are huge.
fn make_arena(
    layout: &Layout,
    memory: u64,
    mounter: &Linux,
    options: &Options,
) -> anyhow::Result<()> {
    let root = &options.shm_dir;
    std::fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    let place = Place::beneath(root, &layout.arena_dir(&options.shm_dir))?;
    mounter.create_dir(&place, 0o700)?;
    let tmpfs = TmpfsOptions {
        // Room for the arena of a dead shard that clients still read, beside the new one.
        size: arena_bytes(memory)
            .saturating_mul(2)
            .saturating_add(1 << 24),
        mode: 0o700,
    };
    Ok(mounter.tmpfs(&place, tmpfs)?)
}

/// Binds the runtime's directory onto `vineyard-fuse` within it, unless it is shown there.
fn show_directory(layout: &Layout, mounter: &Linux, options: &Options) -> anyhow::Result<()> {
    let root = &options.runtime_root;
    let source = Place::beneath(root, layout.dir())?;
    let target = Place::beneath(root, &layout.fuse_dir())?;
    let wanted = mounter.shown(&source)?;
    match mounter.inspect(&target)? {
        Found::Mount(found) if found.alive && found.read_only && found.shown == wanted => {
            return Ok(());
        }
        Found::Mount(found) => {
            tracing::warn!(target = %target, ?found, "replacing a foreign mount");
            mounter.unmount(&target)?;
        }
        Found::Nothing | Found::Directory | Found::Symlink(_) | Found::Other => {}
    }
    Ok(mounter.bind(&source, &target, BindOptions { read_only: true })?)
}
