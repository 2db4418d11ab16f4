//! Keeps this node's runtimes as their files ask: carries out the steps that `reconcile` decides.
//!
//! One loop, no locks. What takes time (asking a shard) happens in tasks that report back here.
//! What fails for reasons outside (no rights, a read-only disk, no `/dev/fuse`) is said on the
//! board and tried again with growing pauses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::local::{Local, Means, Stage};
use super::memory;
use crate::readiness::Readiness;
use crate::runtimes::{Difference, Present, RuntimeId, RuntimeSpec, RuntimesDir, Step, reconcile};
use crate::supervisor::{ChildPlan, ChildReport, Deposit, FromSupervisor};

/// What a task found out about a shard.
struct Probed {
    id: RuntimeId,
    /// The process that was asked; an answer about an earlier one counts for nothing.
    pid: Option<u32>,
    answer: anyhow::Result<()>,
}

/// Everything the node role knows of its runtimes.
pub(super) struct Keeper {
    means: Means,
    reports: watch::Sender<Vec<ChildReport>>,
    /// Runtimes whose figures are exported.
    exported: watch::Sender<Vec<RuntimeId>>,
    locals: BTreeMap<RuntimeId, Local>,
    present: Present,
    /// What was complained about at the last reading: each is logged once.
    complaints: BTreeSet<String>,
    /// Runtimes to start once what runs under their name has gone.
    next: BTreeMap<RuntimeId, RuntimeSpec>,
    /// Marks of an earlier node role that no runtime has claimed yet.
    marks: BTreeMap<String, Deposit>,
    probes: (mpsc::Sender<Probed>, mpsc::Receiver<Probed>),
    /// Runtimes whose mark somebody unmounted.
    ended: (mpsc::Sender<RuntimeId>, mpsc::Receiver<RuntimeId>),
}

impl Keeper {
    pub(super) fn new(
        means: Means,
        mut marks: BTreeMap<String, Deposit>,
        reports: watch::Sender<Vec<ChildReport>>,
        exported: watch::Sender<Vec<RuntimeId>>,
    ) -> Self {
        let present = marks.remove(memory::PRESENT).map(memory::recall);
        let present = present.unwrap_or_default();
        Self {
            means,
            reports,
            exported,
            ended: mpsc::channel(64),
            locals: BTreeMap::new(),
            present,
            complaints: BTreeSet::new(),
            next: BTreeMap::new(),
            marks,
            probes: mpsc::channel(64),
        }
    }

    pub(super) fn csi_socket(&self) -> &Path {
        &self.means.options.csi_socket
    }

    /// Runs until the supervisor says stop, or is gone.
    pub(super) async fn run(&mut self, mut directory: RuntimesDir) -> anyhow::Result<()> {
        for running in self.present.clone().into_values() {
            self.start(running.spec);
        }
        self.read(&directory);
        self.drop_unclaimed_marks();
        self.means.board.complete();
        if let Err(error) = self.means.channel.state(&Readiness::Ready) {
            tracing::error!(%error, "the supervisor does not know that the node role is ready");
        }
        loop {
            let retry = self.locals.values().filter_map(Local::retry_at).min();
            tokio::select! {
                message = self.means.channel.next() => match message {
                    Some(FromSupervisor::Report(children)) => self.reported(children),
                    Some(FromSupervisor::Stop) | None => return Ok(()),
                },
                changed = directory.changed() => {
                    changed?;
                    self.read(&directory);
                }
                Some(probed) = self.probes.1.recv() => self.probed(probed),
                Some(id) = self.ended.1.recv() => self.mark_ended(&id),
                () = until(retry) => self.retry(),
            }
        }
    }

    /// Takes every mark away; published volumes stay.
    pub(super) fn drain(&mut self) {
        for (id, local) in &mut self.locals {
            self.means.board.set(id, Readiness::Draining);
            local.withdraw_mark(&self.means);
        }
    }

    fn read(&mut self, directory: &RuntimesDir) {
        let wanted = match directory.read() {
            Ok(wanted) => wanted,
            Err(error) => {
                let path = directory.path().display();
                tracing::error!(%error, %path, "the runtimes directory cannot be read");
                return;
            }
        };
        let decision = reconcile(&wanted, &self.present);
        if decision.present != self.present {
            self.present = decision.present;
            memory::keep(&self.present, &self.means.channel);
        }
        let mut complaints = BTreeSet::new();
        for step in decision.steps {
            match step {
                Step::Complain(complaint) => {
                    if !self.complaints.contains(&complaint.why) {
                        tracing::warn!(files = ?complaint.files, why = complaint.why, "runtime refused");
                    }
                    complaints.insert(complaint.why.clone());
                    if let Some(id) = complaint.runtime
                        && !self.present.contains_key(&id)
                    {
                        self.means.board.set(&id, Readiness::Failing(complaint.why));
                    }
                }
                Step::Stop(id) => self.stop(&id),
                Step::Change { from, to, what } => self.change(&from, to, what),
                Step::Start(spec) => self.start(spec),
            }
        }
        self.complaints = complaints;
        self.forget_complaints(&wanted);
        let exported = self.present.values().filter(|running| running.spec.metrics);
        let exported = exported.map(|running| running.spec.id.clone()).collect();
        self.exported.send_replace(exported);
        self.want();
    }

    /// Takes runtimes off the board that were refused before and that nobody names any more.
    fn forget_complaints(&self, wanted: &crate::runtimes::Wanted) {
        for id in self.means.board.all().into_keys() {
            let is_named = wanted
                .values()
                .flatten()
                .flatten()
                .any(|spec| spec.id == id);
            if !is_named && !self.locals.contains_key(&id) {
                self.means.board.remove(&id);
            }
        }
    }

    fn start(&mut self, spec: RuntimeSpec) {
        let id = spec.id.clone();
        if self.locals.contains_key(&id) {
            self.next.insert(id, spec);
            return;
        }
        tracing::info!(runtime = %id, memory = spec.memory, rpc_port = spec.rpc_port, "runtime starts");
        let mut local = Local::new(spec, &self.means.options);
        self.means.board.set(&id, local.readiness());
        if let Some(mark) = self.marks.remove(&local.deposit_name()) {
            local.take_over_mark(mark, &self.means);
        }
        self.locals.insert(id.clone(), local);
        self.watch_mark(&id);
        self.prepare(&id);
    }

    /// Hears of it when the mark is unmounted by somebody else.
    fn watch_mark(&mut self, id: &RuntimeId) {
        let Some(mark) = self.locals.get_mut(id).and_then(Local::unwatched_mark) else {
            return;
        };
        let (id, ended) = (id.clone(), self.ended.0.clone());
        tokio::spawn(async move {
            let why = mark.ended().await;
            tracing::debug!(runtime = %id, why, "mark ended");
            let _ = ended.send(id).await;
        });
    }

    fn change(&mut self, from: &RuntimeSpec, to: RuntimeSpec, what: Difference) {
        if what.memory || what.rpc_port {
            tracing::warn!(
                runtime = %to.id,
                memory = to.memory,
                rpc_port = to.rpc_port,
                "runtime changes: its shard starts anew, without the objects it has"
            );
        }
        if let Some(next) = self.next.get_mut(&from.id) {
            *next = to;
        } else if let Some(local) = self.locals.get_mut(&from.id) {
            let id = to.id.clone();
            local.change(to);
            if what.memory || what.rpc_port {
                self.prepare(&id);
            }
        }
    }

    fn stop(&mut self, id: &RuntimeId) {
        tracing::info!(runtime = %id, "runtime stops");
        self.means.board.remove(id);
        self.next.remove(id);
        if let Some(local) = self.locals.get_mut(id) {
            local.withdraw_mark(&self.means);
            local.stage = Stage::Leaving;
        }
        // One that never got as far as a shard has nothing to wait for.
        let reports = self.reports.borrow().clone();
        self.finish_leaving(&reports);
    }

    /// Makes ready what a shard needs, or says on the board why it cannot.
    fn prepare(&mut self, id: &RuntimeId) {
        let Some(local) = self.locals.get_mut(id) else {
            return;
        };
        local.prepare(&self.means);
        let readiness = local.readiness();
        self.means.show(id, readiness);
    }

    fn retry(&mut self) {
        let now = Instant::now();
        let due = |local: &Local| local.retry_at().is_some_and(|at| at <= now);
        let ids: Vec<_> = self
            .locals
            .iter()
            .filter(|(_, local)| due(local))
            .map(|(id, _)| id.clone())
            .collect();
        for id in ids {
            self.prepare(&id);
        }
        self.want();
        let reports = self.reports.borrow().clone();
        self.look_at(&reports);
    }

    /// Tells the supervisor which shards shall run.
    fn want(&self) {
        let plans: Vec<ChildPlan> = self
            .locals
            .values()
            .filter_map(|local| local.plan(&self.means.options))
            .collect();
        if let Err(error) = self.means.channel.want(plans) {
            tracing::error!(%error, "the supervisor does not know which shards shall run");
        }
    }

    fn reported(&mut self, children: Vec<ChildReport>) {
        self.reports.send_replace(children.clone());
        self.finish_leaving(&children);
        self.look_at(&children);
    }

    /// Compares what the supervisor says of each shard with what is known here.
    fn look_at(&mut self, children: &[ChildReport]) {
        for (id, local) in &mut self.locals {
            let child_name = local.child_name();
            let Some(child) = children.iter().find(|child| child.name == child_name) else {
                continue;
            };
            let was = local.readiness();
            let Some(pid) = local.hear(child) else {
                let now = local.readiness();
                if now != was && matches!(now, Readiness::Failing(_)) {
                    local.withdraw_mark(&self.means);
                }
                self.means.show(id, now);
                continue;
            };
            let (id, shards, found) = (
                id.clone(),
                Arc::clone(&self.means.shards),
                self.probes.0.clone(),
            );
            tokio::spawn(async move {
                let answer = shards.status(&id).await.map(|_| ());
                let pid = Some(pid);
                // The receiver lives as long as the role.
                let _ = found.send(Probed { id, pid, answer }).await;
            });
        }
    }

    fn probed(&mut self, probed: Probed) {
        let Some(local) = self.locals.get_mut(&probed.id) else {
            return;
        };
        if !local.is_probing(probed.pid) {
            return;
        }
        match probed.answer {
            Ok(()) => {
                local.bring_up(&self.means);
                self.watch_mark(&probed.id);
            }
            Err(error) => local.fail(format!("{error:#}")),
        }
        let Some(local) = self.locals.get(&probed.id) else {
            return;
        };
        let readiness = local.readiness();
        self.means.show(&probed.id, readiness);
    }

    /// Somebody unmounted a mark that is still wanted: sets it again.
    fn mark_ended(&mut self, id: &RuntimeId) {
        let Some(local) = self.locals.get_mut(id) else {
            return;
        };
        if local.lose_mark(&self.means.channel) {
            tracing::warn!(runtime = %id, "the mark was unmounted; it is set again");
            let reports = self.reports.borrow().clone();
            self.look_at(&reports);
        }
    }

    /// Cleans up after runtimes whose shard is gone, and starts what waited for that.
    fn finish_leaving(&mut self, children: &[ChildReport]) {
        let gone: Vec<RuntimeId> = self
            .locals
            .iter()
            .filter(|(_, local)| matches!(local.stage, Stage::Leaving))
            .filter(|(_, local)| {
                let name = local.child_name();
                !children.iter().any(|child| child.name == name)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some(local) = self.locals.remove(&id) {
                local.clean_up(&self.means);
            }
            if let Some(spec) = self.next.remove(&id) {
                self.start(spec);
                self.want();
            }
        }
    }

    /// Takes away marks whose runtime no file asks for any more.
    fn drop_unclaimed_marks(&mut self) {
        for (name, deposit) in std::mem::take(&mut self.marks) {
            let Some(id) = name
                .strip_prefix(super::local::MARK)
                .and_then(|id| id.parse().ok())
            else {
                continue;
            };
            drop(deposit);
            super::local::detach_marks(&id, &self.means);
            if let Err(error) = self.means.channel.withdraw(&name) {
                tracing::warn!(%error, name, "custody keeps a descriptor nobody needs");
            }
        }
    }
}

/// Ends at `at`, or never.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How long to wait before the `attempt`-th repetition (from 0).
pub(super) fn pause(attempt: u32) -> Duration {
    Duration::from_millis(200)
        .saturating_mul(1 << attempt.min(8))
        .min(Duration::from_secs(30))
}
