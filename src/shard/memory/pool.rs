//! How much shared memory is taken, and where.
//!
//! The limit is kept by exact count of the bytes asked for, as clients see it. The region that
//! they are placed in is twice as large: with uniformly random lifetimes and sizes up to a
//! twentieth of the limit, an eighth more refuses what the count allows within a few hundred
//! steps, a quarter more does so sometimes, half more once in some hundred thousand, and twice
//! as much not once in two millions. The region is a sparse file, and what is never written
//! costs nothing.

use std::ops::Range;

use super::allocator::{ALIGNMENT, Allocator, LARGE};

/// A limited amount of memory in a region.
#[derive(Debug)]
pub struct Pool {
    allocator: Allocator,
    limit: u64,
    used: u64,
    region: u64,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The limit would be exceeded.
    Limit,
    /// No free range is long enough.
    Fragmented,
}

impl Pool {
    /// A pool of `limit` bytes in a sparse region; none where the region would exceed 63 bits,
    /// the most a file offset can be.
    pub fn sparse(limit: u64) -> Option<Self> {
        Self::new(limit, limit)
    }

    /// A pool of `limit` bytes in a region all of whose pages are paid for: an eighth must do.
    pub fn reserved(limit: u64) -> Option<Self> {
        Self::new(limit, limit / 8)
    }

    fn new(limit: u64, slack: u64) -> Option<Self> {
        let region = limit
            .checked_add(slack)
            .and_then(|bytes| bytes.checked_add(1 << 20))
            .and_then(|bytes| bytes.checked_next_multiple_of(LARGE))
            .filter(|&bytes| i64::try_from(bytes).is_ok())?;
        // Offset 0 stays free, so that no blob is mistaken for the empty one.
        let allocator = Allocator::new(ALIGNMENT..region);
        Some(Self {
            allocator,
            limit,
            used: 0,
            region,
        })
    }

    /// Bytes that may be taken together.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes taken, as they were asked for.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Length of the region in bytes, a multiple of 2 MiB.
    pub fn region(&self) -> u64 {
        self.region
    }

    /// Takes `size` bytes: their offset, a multiple of 64.
    pub fn allocate(&mut self, size: u64) -> Result<u64, Full> {
        let used = self
            .used
            .checked_add(size)
            .filter(|&used| used <= self.limit);
        let used = used.ok_or(Full::Limit)?;
        let offset = self.allocator.allocate(size).ok_or(Full::Fragmented)?;
        self.used = used;
        Ok(offset)
    }

    /// No longer counts `size` bytes. Their place stays taken until [`Self::place`].
    pub fn uncount(&mut self, size: u64) {
        self.used -= size;
    }

    /// The place of `size` bytes at `offset`.
    pub fn range(offset: u64, size: u64) -> Range<u64> {
        Allocator::range(offset, size)
    }

    /// The part of that place which its first `kept` bytes do not need; empty within a granule.
    pub fn tail(offset: u64, size: u64, kept: u64) -> Range<u64> {
        Allocator::tail(offset, size, kept)
    }

    /// Takes all free places of at least `length` bytes, until [`Self::place`].
    pub fn take_free(&mut self, length: u64) -> Vec<Range<u64>> {
        self.allocator.take_free(length)
    }

    /// Makes a place free for others.
    pub fn place(&mut self, range: Range<u64>) {
        self.allocator.free(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact_to_the_byte() {
        let mut pool = Pool::sparse(2048).unwrap();
        let first = pool.allocate(2047).unwrap();
        assert_eq!(pool.allocate(2), Err(Full::Limit));
        let second = pool.allocate(1).unwrap();
        assert_eq!(pool.used(), 2048);
        assert_eq!(pool.allocate(u64::MAX), Err(Full::Limit));
        for (offset, size) in [(first, 2047), (second, 1)] {
            pool.uncount(size);
            pool.place(Pool::range(offset, size));
        }
        assert_eq!(pool.used(), 0);
        pool.allocate(2048).unwrap();
    }

    #[test]
    fn equal_parts_fill_the_limit_entirely() {
        const MIB: u64 = 1 << 20;
        let mut pool = Pool::sparse(64 * MIB).unwrap();
        for _ in 0..8 {
            assert_eq!(pool.allocate(8 * MIB).unwrap() % (2 * MIB), 0);
        }
        assert_eq!(pool.allocate(1), Err(Full::Limit));
    }

    #[test]
    fn limits_beyond_a_file_are_refused() {
        assert!(Pool::sparse(u64::MAX).is_none());
        assert!(Pool::sparse(1 << 63).is_none());
        assert_eq!(Pool::sparse(0).unwrap().region(), 2 << 20);
        assert_eq!(Pool::sparse(1 << 30).unwrap().region() % (2 << 20), 0);
    }
}
