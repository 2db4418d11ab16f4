//! Bits of a compressed block, forwards and backwards (RFC 8878, sections 4.1 and 4.2).

use super::ZstdError;

/// Up to 56 bits at bit `at` of `data`; what lies outside is 0.
fn bits_at(data: &[u8], at: usize, count: u32) -> u64 {
    let mut bytes = [0; 8];
    let from = data.get(at / 8..).unwrap_or_default();
    for (to, from) in bytes.iter_mut().zip(from) {
        *to = *from;
    }
    (u64::from_le_bytes(bytes) >> (at % 8)) & ((1 << count) - 1)
}

/// Reads from the lowest bit of the first byte on.
pub(super) struct Forward<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Forward<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0 }
    }

    pub(super) fn peek(&self, count: u32) -> u64 {
        bits_at(self.data, self.at, count)
    }

    pub(super) fn skip(&mut self, count: u32) -> Result<(), ZstdError> {
        self.at += count as usize;
        if self.at > self.data.len() * 8 {
            return Err(ZstdError::Corrupt("a table ends too early"));
        }
        Ok(())
    }

    pub(super) fn read(&mut self, count: u32) -> Result<u64, ZstdError> {
        let value = self.peek(count);
        self.skip(count)?;
        Ok(value)
    }

    /// Bytes begun so far.
    pub(super) fn bytes(&self) -> usize {
        self.at.div_ceil(8)
    }
}

/// Reads from below the highest set bit of the last byte down. Beyond the beginning there are
/// zeros; who reads them is [overdrawn](Self::is_overdrawn).
pub(super) struct Backward<'a> {
    data: &'a [u8],
    /// Bits left; negative: bits read that there never were.
    left: i64,
}

impl<'a> Backward<'a> {
    pub(super) fn new(data: &'a [u8]) -> Result<Self, ZstdError> {
        let last = data.last().copied().unwrap_or_default();
        if last == 0 {
            return Err(ZstdError::Corrupt("a bit stream has no end mark"));
        }
        let length = i64::try_from(data.len()).map_err(|_| ZstdError::Corrupt("too long"))?;
        let left = length * 8 - i64::from(last.leading_zeros()) - 1;
        Ok(Self { data, left })
    }

    /// Up to 56 bits, without taking them.
    pub(super) fn peek(&self, count: u32) -> u64 {
        let from = self.left - i64::from(count);
        if let Ok(from) = usize::try_from(from) {
            return bits_at(self.data, from, count);
        }
        match u32::try_from(self.left) {
            // What is there stands above the zeros.
            Ok(left) => bits_at(self.data, 0, left) << (count - left),
            Err(_) => 0,
        }
    }

    pub(super) fn skip(&mut self, count: u32) {
        self.left -= i64::from(count);
    }

    pub(super) fn read(&mut self, count: u32) -> u64 {
        let value = self.peek(count);
        self.skip(count);
        value
    }

    pub(super) fn is_overdrawn(&self) -> bool {
        self.left < 0
    }

    /// Whether all bits have been read, and no more.
    pub(super) fn is_used_up(&self) -> bool {
        self.left == 0
    }
}
