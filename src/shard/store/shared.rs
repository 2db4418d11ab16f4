//! What the clones of a store share: the lock, and the hands that act once it is released.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use tokio::sync::oneshot;

use super::Config;
use super::spilling::Spiller;
use super::state::{Answer, Effects, State};
use super::wait::WaiterId;
use crate::shard::ids::InstanceId;
use crate::shard::memory::Segment;
use crate::shard::spill::Removal;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) instance: InstanceId,
    pub(super) segment: Segment,
    pub(super) spiller: Option<Spiller>,
    pub(super) guarded: Mutex<Guarded>,
    /// Pages have been given back; for creations that found no room meanwhile.
    pub(super) trimmed: Condvar,
    /// Bytes of pages from which on those without a blob are given back.
    pub(super) enough: AtomicU64,
    /// Per cent of memory at which writers of streams wait.
    pub(super) stream_threshold: AtomicU32,
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) state: State,
    pub(super) parked: HashMap<WaiterId, oneshot::Sender<Answer>>,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(|_| {
            // A change was left half-done. What is in shared memory is worth more than this
            // process: the next one starts from a state that is whole.
            tracing::error!("the store broke off in the middle of a change; giving up");
            std::process::abort()
        })
    }

    /// Changes the state, then does what that entails.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> (T, Effects)) -> T {
        self.change_guarded(|guarded| change(&mut guarded.state))
    }

    /// As [`Self::change`], for changes after which a request is parked.
    pub(super) fn change_guarded<T>(&self, change: impl FnOnce(&mut Guarded) -> (T, Effects)) -> T {
        let mut guarded = self.lock();
        let (value, effects) = change(&mut guarded);
        let answers: Vec<_> = effects
            .wake
            .into_iter()
            .filter_map(|(waiter, answer)| Some((guarded.parked.remove(&waiter)?, answer)))
            .collect();
        drop(guarded);
        for (sender, answer) in answers {
            // An error means that nobody waits any longer.
            _ = sender.send(answer);
        }
        if !effects.trim.is_empty() {
            self.trim(effects.trim);
        }
        if let Some(spiller) = &self.spiller {
            for id in effects.discard {
                spiller.remove(id, Removal::Erase);
            }
        }
        value
    }

    /// As [`Self::change`], for changes that may be refused.
    pub(super) fn try_change<T, E>(
        &self,
        change: impl FnOnce(&mut State) -> Result<(T, Effects), E>,
    ) -> Result<T, E> {
        self.change(|state| match change(state) {
            Ok((value, effects)) => (Ok(value), effects),
            Err(err) => (Err(err), Effects::default()),
        })
    }

    /// Deleted blobs leave their pages for later ones, which is faster; but fragmentation places
    /// some of those elsewhere, and so all pages together may come to be twice the limit.
    /// Before that, pages without a blob are given back.
    pub(super) fn bound_pages(&self) {
        let pages = || self.segment.resident().unwrap_or(0);
        if self.config.reserve_memory || pages() <= self.enough.load(Ordering::Relaxed) {
            return;
        }
        self.change(|state| ((), state.reclaim()));
        // Where that does not help, as with many tiny blobs, it is not tried again at once.
        let limit = self.config.memory_limit;
        let again = pages().saturating_add(limit / 16);
        self.enough
            .store(enough(limit).max(again), Ordering::Relaxed);
    }

    fn trim(&self, mut ranges: Vec<Range<u64>>) {
        if !self.config.reserve_memory {
            // Neighbours together: pages that they share are given back as well.
            ranges.sort_by_key(|range| range.start);
            let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
            for range in &ranges {
                match merged.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    Some(_) | None => merged.push(range.clone()),
                }
            }
            for range in merged {
                if let Err(err) = self.segment.punch(range.clone()) {
                    tracing::warn!(?range, %err, "pages are not given back");
                }
            }
        }
        self.lock().state.trimmed(ranges);
        self.trimmed.notify_all();
    }
}

/// A parked request; it ends with the future that owns this.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) shared: Arc<Shared>,
    pub(super) waiter: WaiterId,
}

impl Drop for Parked {
    fn drop(&mut self) {
        let mut guarded = self.shared.lock();
        guarded.parked.remove(&self.waiter);
        guarded.state.cancel(self.waiter);
    }
}

/// Bytes of pages that a store of this limit may well have: what its blobs take, and what
/// fragmentation and unused pages add.
pub(super) fn enough(limit: u64) -> u64 {
    limit.saturating_add(limit / 8).saturating_add(1 << 20)
}
