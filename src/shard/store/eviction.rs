//! Which blobs go to disk, and when. Pure.
//!
//! Vineyard's rule: when an allocation fails or leaves as much in use as the upper watermark
//! says, the blobs released longest ago go, until the lower watermark is reached and the
//! allocation fits.

use std::collections::{BTreeMap, HashMap};

use crate::shard::ids::ObjectId;

/// When to begin to spill and when to stop, in bytes in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermarks {
    upper: u64,
    lower: u64,
}

impl Watermarks {
    /// Watermarks as parts of a limit. None unless 0 ≤ lower ≤ upper ≤ 1.
    pub fn of(limit: u64, lower_rate: f64, upper_rate: f64) -> Option<Self> {
        if !(0.0 <= lower_rate && lower_rate <= upper_rate && upper_rate <= 1.0) {
            return None;
        }
        // A float is exact enough for a watermark.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let part = |rate: f64| (limit as f64 * rate) as u64;
        Some(Self {
            upper: part(upper_rate),
            lower: part(lower_rate),
        })
    }

    /// Whether it is time to spill.
    pub(super) fn are_reached(self, used: u64) -> bool {
        used >= self.upper
    }

    /// Bytes to spill when `used` of `limit` are in use and `missing` could not be allocated.
    pub(super) fn excess(self, used: u64, limit: u64, missing: Option<u64>) -> u64 {
        if missing.is_none() && !self.are_reached(used) {
            return 0;
        }
        let free = limit.saturating_sub(used);
        let short = missing.map_or(0, |size| size.saturating_sub(free));
        short.max(used.saturating_sub(self.lower))
    }
}

/// Blobs that nobody holds, in the order in which they were released.
#[derive(Debug, Default)]
pub(super) struct Cold {
    last: u64,
    by_age: BTreeMap<u64, ObjectId>,
    ages: HashMap<ObjectId, u64>,
}

impl Cold {
    /// Has just been released.
    pub(super) fn insert(&mut self, id: ObjectId) {
        self.remove(id);
        self.last += 1;
        self.by_age.insert(self.last, id);
        self.ages.insert(id, self.last);
    }

    /// Is held, or gone.
    pub(super) fn remove(&mut self, id: ObjectId) {
        if let Some(age) = self.ages.remove(&id) {
            self.by_age.remove(&age);
        }
    }

    /// Coldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = ObjectId> {
        self.by_age.values().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watermarks_of_upstreams_tests() {
        let marks = Watermarks::of(8000, 0.5, 0.8).unwrap();
        assert_eq!(marks.excess(6000, 8000, None), 0);
        assert_eq!(marks.excess(6400, 8000, None), 2400);
        assert_eq!(marks.excess(8000, 8000, None), 4000);
        assert_eq!(marks.excess(8000, 8000, Some(2000)), 4000);
        assert_eq!(marks.excess(8000, 8000, Some(5000)), 5000);
        assert_eq!(marks.excess(3000, 8000, Some(5500)), 500);
        assert_eq!(marks.excess(3000, 8000, Some(5000)), 0);
    }

    #[test]
    fn impossible_watermarks_are_refused() {
        for (lower, upper) in [
            (0.9, 0.8),
            (-0.1, 0.8),
            (0.3, 1.1),
            (f64::NAN, 0.8),
            (0.3, f64::NAN),
        ] {
            assert_eq!(Watermarks::of(8000, lower, upper), None);
        }
        assert!(Watermarks::of(8000, 0.0, 1.0).is_some());
    }

    #[test]
    fn the_one_released_longest_ago_is_the_coldest() {
        let mut cold = Cold::default();
        for id in [1, 2, 3, 1] {
            cold.insert(ObjectId(id));
        }
        assert_eq!(cold.iter().collect::<Vec<_>>(), [2, 3, 1].map(ObjectId));
        cold.remove(ObjectId(3));
        cold.remove(ObjectId(9));
        assert_eq!(cold.iter().collect::<Vec<_>>(), [2, 1].map(ObjectId));
    }
}
