//! Who waits for objects that do not exist yet.
//!
//! A waiter is blocked on one missing id at a time. When that appears, everything it waits for
//! is looked at again; so it is woken at the first moment at which all of it exists.

use std::collections::BTreeMap;

use crate::shard::ids::ObjectId;

/// One request that is parked.
pub(super) type WaiterId = u64;

/// What it is parked for.
#[derive(Debug)]
pub(super) enum Wait {
    Objects {
        ids: Vec<ObjectId>,
        blocked_on: ObjectId,
    },
    Name(String),
}

/// All parked requests.
#[derive(Debug, Default)]
pub(super) struct Waits {
    last: WaiterId,
    waits: BTreeMap<WaiterId, Wait>,
    by_object: BTreeMap<ObjectId, Vec<WaiterId>>,
}

impl Waits {
    pub(super) fn len(&self) -> u64 {
        self.waits.len() as u64
    }

    pub(super) fn insert(&mut self, wait: Wait) -> WaiterId {
        self.last += 1;
        self.restore(self.last, wait);
        self.last
    }

    /// A request that is parked elsewhere.
    pub(super) fn fresh(&mut self) -> WaiterId {
        self.last += 1;
        self.last
    }

    /// Parks a waiter again that [`Self::blocked_on`] has given out.
    pub(super) fn restore(&mut self, id: WaiterId, wait: Wait) {
        if let Wait::Objects { blocked_on, .. } = &wait {
            self.by_object.entry(*blocked_on).or_default().push(id);
        }
        self.waits.insert(id, wait);
    }

    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Wait> {
        let wait = self.waits.remove(&id)?;
        if let Wait::Objects { blocked_on, .. } = &wait
            && let Some(waiters) = self.by_object.get_mut(blocked_on)
        {
            waiters.retain(|&other| other != id);
            if waiters.is_empty() {
                self.by_object.remove(blocked_on);
            }
        }
        Some(wait)
    }

    /// Takes out the waiters that are blocked on an object, and what they wait for.
    pub(super) fn blocked_on(&mut self, id: ObjectId) -> Vec<(WaiterId, Vec<ObjectId>)> {
        let waiters = self.by_object.remove(&id).unwrap_or_default();
        let take = |waiter| match self.waits.remove(&waiter) {
            Some(Wait::Objects { ids, .. }) => Some((waiter, ids)),
            Some(Wait::Name(_)) | None => None,
        };
        waiters.into_iter().filter_map(take).collect()
    }
}
