//! Where in a region a blob goes: offsets and lengths only, no memory is touched.
//!
//! Best fit with coalescing. Free ranges are kept twice, by offset (to merge neighbours) and by
//! length (to find the tightest), so every operation costs O(log n) in the number of free ranges.
//!
//! Small ranges are cut from the low end of the free range that fits best, ranges of
//! [`LARGE`] bytes and more from its high end. The two kinds meet in the middle, so short-lived
//! small ranges do not cut up the room that large ones need; and because a region ends at a
//! multiple of the huge page, large ranges whose lengths are such multiples begin at one.
//!
//! Invariant: free ranges are not empty, do not touch each other, and begin and end at multiples
//! of [`ALIGNMENT`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Arrow and numpy assume that a blob begins at such a multiple; clients do not re-align.
pub(super) const ALIGNMENT: u64 = 64;

/// From this length on, in bytes, a range is cut from the high end: a huge page of x86-64 and,
/// with 4 KiB base pages, of arm64.
pub(super) const LARGE: u64 = 2 << 20;

/// Hands out ranges of a region.
#[derive(Debug)]
pub(super) struct Allocator {
    by_offset: BTreeMap<u64, u64>,
    by_length: BTreeSet<(u64, u64)>,
}

/// The length that a range of `size` bytes really takes; none where that exceeds 64 bits.
fn rounded(size: u64) -> Option<u64> {
    size.max(1).checked_next_multiple_of(ALIGNMENT)
}

impl Allocator {
    /// An allocator of the whole multiples of [`ALIGNMENT`] within `region`.
    pub(super) fn new(region: Range<u64>) -> Self {
        let mut new = Self {
            by_offset: BTreeMap::new(),
            by_length: BTreeSet::new(),
        };
        let end = region.end - region.end % ALIGNMENT;
        if let Some(start) = region.start.checked_next_multiple_of(ALIGNMENT)
            && start < end
        {
            new.insert(start, end - start);
        }
        new
    }

    /// A range of at least `size` bytes that nobody else has: its offset.
    pub(super) fn allocate(&mut self, size: u64) -> Option<u64> {
        let length = rounded(size)?;
        let &(free, offset) = self.by_length.range((length, 0)..).next()?;
        self.remove(offset, free);
        let rest = free - length;
        if rest == 0 {
            return Some(offset);
        }
        if size >= LARGE {
            self.insert(offset, rest);
            Some(offset + rest)
        } else {
            self.insert(offset + length, rest);
            Some(offset)
        }
    }

    /// What `size` bytes at `offset` really take.
    pub(super) fn range(offset: u64, size: u64) -> Range<u64> {
        offset..offset.saturating_add(rounded(size).unwrap_or(0))
    }

    /// What can be given back when `size` bytes at `offset` shrink to `kept`; empty where both
    /// take the same.
    pub(super) fn tail(offset: u64, size: u64, kept: u64) -> Range<u64> {
        let end = Self::range(offset, size).end;
        Self::range(offset, kept).end.min(end)..end
    }

    /// Takes back a range, or a part of one, that is aligned at both ends.
    pub(super) fn free(&mut self, range: Range<u64>) {
        if range.start < range.end {
            self.give_back(range.start, range.end - range.start);
        }
    }

    /// Takes all free ranges of at least `length` bytes.
    pub(super) fn take_free(&mut self, length: u64) -> Vec<Range<u64>> {
        let taken: Vec<(u64, u64)> = self.by_length.range((length, 0)..).copied().collect();
        for &(length, offset) in &taken {
            self.remove(offset, length);
        }
        taken
            .into_iter()
            .map(|(length, offset)| offset..offset + length)
            .collect()
    }

    fn give_back(&mut self, mut offset: u64, mut length: u64) {
        debug_assert!(offset.is_multiple_of(ALIGNMENT) && length.is_multiple_of(ALIGNMENT));
        if let Some((&before, &free)) = self.by_offset.range(..offset).next_back() {
            debug_assert!(before + free <= offset, "{offset} is free already");
            if before + free == offset {
                self.remove(before, free);
                offset = before;
                length += free;
            }
        }
        if let Some((&after, &free)) = self.by_offset.range(offset..).next() {
            debug_assert!(offset + length <= after, "{offset} is free already");
            if offset + length == after {
                self.remove(after, free);
                length += free;
            }
        }
        self.insert(offset, length);
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.by_offset.insert(offset, length);
        self.by_length.insert((length, offset));
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.by_offset.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn free_bytes(allocator: &Allocator) -> u64 {
        allocator.by_offset.values().sum()
    }

    #[test]
    fn small_ranges_come_from_below_and_large_ones_from_above() {
        let mut allocator = Allocator::new(64..64 * MIB);
        assert_eq!(allocator.allocate(1), Some(64));
        assert_eq!(allocator.allocate(64), Some(128));
        assert_eq!(allocator.allocate(65), Some(192));
        assert_eq!(allocator.allocate(8 * MIB), Some(56 * MIB));
        assert_eq!(allocator.allocate(4 * MIB), Some(52 * MIB));
        assert_eq!(allocator.allocate(1), Some(320));
    }

    #[test]
    fn the_tightest_free_range_is_taken() {
        let mut allocator = Allocator::new(0..4096);
        let ranges: Vec<u64> = [256, 64, 128, 64, 512, 64]
            .map(|size| allocator.allocate(size).unwrap())
            .to_vec();
        allocator.free(Allocator::range(ranges[0], 256));
        allocator.free(Allocator::range(ranges[2], 128));
        allocator.free(Allocator::range(ranges[4], 512));
        assert_eq!(allocator.allocate(100), Some(ranges[2]));
        assert_eq!(allocator.allocate(300), Some(ranges[4]));
    }

    #[test]
    fn neighbours_merge_whatever_the_order_they_are_freed_in() {
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            let mut allocator = Allocator::new(0..300);
            let ranges = [64, 64, 128].map(|size| (allocator.allocate(size).unwrap(), size));
            assert_eq!(allocator.allocate(1), None);
            for index in order {
                allocator.free(Allocator::range(ranges[index].0, ranges[index].1));
            }
            assert_eq!(allocator.allocate(256), Some(0), "{order:?}");
        }
    }

    #[test]
    fn sizes_beyond_reason_are_refused() {
        let mut allocator = Allocator::new(0..4096);
        for size in [4097, u64::MAX - 63, u64::MAX] {
            assert_eq!(allocator.allocate(size), None);
        }
        assert_eq!(free_bytes(&allocator), 4096);
    }

    #[test]
    fn a_shrink_gives_back_whole_granules() {
        assert_eq!(Allocator::tail(64, 4096, 100), 192..4160);
        assert_eq!(Allocator::tail(64, 128, 65), 192..192);
        assert_eq!(Allocator::tail(64, 128, 0), 128..192);
        let mut allocator = Allocator::new(0..4096);
        let offset = allocator.allocate(4096).unwrap();
        allocator.free(Allocator::tail(offset, 4096, 100));
        assert_eq!(free_bytes(&allocator), 4096 - 128);
        allocator.free(Allocator::range(offset, 100));
        assert_eq!(allocator.allocate(4096), Some(0));
    }

    #[test]
    fn free_ranges_can_be_taken_and_come_back() {
        let mut allocator = Allocator::new(0..4096);
        let [first, _, third] = [64, 64, 640].map(|size| allocator.allocate(size).unwrap());
        allocator.free(Allocator::range(first, 64));
        allocator.free(Allocator::range(third, 640));
        let taken = allocator.take_free(128);
        assert_eq!((taken.len(), taken[0].clone()), (1, 128..4096));
        assert_eq!(allocator.allocate(65), None);
        for range in taken {
            allocator.free(range);
        }
        assert_eq!(allocator.allocate(65), Some(128));
    }

    /// Sizes as stores see them: mostly small, a few that are a good part of the limit.
    fn sizes() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => 64..4_096_u64,
            4 => 4_096..262_144_u64,
            2 => 262_144..(3 * MIB),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn ranges_never_overlap_and_everything_comes_back(
            steps in prop::collection::vec((any::<bool>(), 1..3_000_u64, any::<prop::sample::Index>()), 1..300),
        ) {
            let mut allocator = Allocator::new(64..65_536);
            let all = free_bytes(&allocator);
            let mut taken: BTreeMap<u64, u64> = BTreeMap::new();
            for (take, size, which) in steps {
                if take || taken.is_empty() {
                    let Some(offset) = allocator.allocate(size) else { continue };
                    prop_assert!(offset % ALIGNMENT == 0 && offset >= 64 && offset + size <= 65_536);
                    if let Some((&before, &length)) = taken.range(..=offset).next_back() {
                        prop_assert!(before + length <= offset);
                    }
                    if let Some((&after, _)) = taken.range(offset..).next() {
                        prop_assert!(offset + size <= after);
                    }
                    taken.insert(offset, size);
                } else {
                    let offset = *which.get(&taken.keys().copied().collect::<Vec<_>>());
                    let size = taken.remove(&offset).unwrap();
                    allocator.free(Allocator::range(offset, size));
                }
            }
            for (offset, size) in taken {
                allocator.free(Allocator::range(offset, size));
            }
            prop_assert_eq!(free_bytes(&allocator), all);
            prop_assert_eq!(allocator.by_offset.len(), 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// The region has the slack that `Pool` gives it; the count is kept at 95 % of a limit.
        #[test]
        fn a_nearly_full_store_does_not_fragment_to_death(
            steps in prop::collection::vec((sizes(), any::<prop::sample::Index>()), 3_000),
        ) {
            let limit = 64 * MIB;
            let full = limit / 100 * 95;
            let region = (limit + limit + MIB).next_multiple_of(LARGE);
            let mut allocator = Allocator::new(64..region);
            let mut taken = Vec::new();
            let mut used = 0;
            for (size, which) in steps {
                while used + size > full {
                    let (offset, size) = taken.swap_remove(which.index(taken.len()));
                    allocator.free(Allocator::range(offset, size));
                    used -= size;
                }
                let offset = allocator.allocate(size);
                prop_assert!(offset.is_some(), "{size} bytes do not fit beside {used} of {limit}");
                taken.push((offset.unwrap(), size));
                used += size;
            }
        }
    }
}
