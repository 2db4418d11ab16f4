//! FSE and Huffman tables (RFC 8878, sections 4.1 and 4.2).

use super::ZstdError;
use super::bits::{Backward, Forward};

/// Huffman codes are no longer, in bits.
const MAX_CODE: u32 = 11;

/// FSE tables of Huffman weights are no larger, in bits.
const MAX_WEIGHTS_LOG: u32 = 6;

fn corrupt<T>(what: &'static str) -> Result<T, ZstdError> {
    Err(ZstdError::Corrupt(what))
}

/// One state of an FSE decoder.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    symbol: u8,
    bits: u8,
    base: u16,
}

/// An FSE decoding table.
#[derive(Clone, Debug)]
pub(super) struct Fse {
    log: u32,
    states: Vec<State>,
}

/// A decoder's state: an index into its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor(usize);

impl Fse {
    /// From a table's description: the table, and the bytes of the description. At most
    /// `symbols` symbols, and `most` bits.
    pub(super) fn read(data: &[u8], symbols: usize, most: u32) -> Result<(Self, usize), ZstdError> {
        let mut bits = Forward::new(data);
        let log = u32::try_from(bits.read(4)?).unwrap_or(0) + 5;
        if log > most {
            return corrupt("a table is too large");
        }
        let mut left: i32 = 1 << log;
        let mut counts = Vec::new();
        while left > 0 {
            if counts.len() >= symbols {
                return corrupt("a table has too many symbols");
            }
            // What is possible is written with `width` bits, or, if it is small, one less.
            let width = 32 - (left + 1).leading_zeros();
            let mut value = i32::try_from(bits.peek(width)).unwrap_or(0);
            let low = (1 << (width - 1)) - 1;
            let short = (1 << width) - 1 - (left + 1);
            if value & low < short {
                value &= low;
                bits.skip(width - 1)?;
            } else {
                if value > low {
                    value -= short;
                }
                bits.skip(width)?;
            }
            let count = value - 1;
            left -= count.abs();
            counts.push(count);
            if count == 0 {
                loop {
                    let zeros = bits.read(2)?;
                    counts.extend((0..zeros).map(|_| 0));
                    if counts.len() > symbols {
                        return corrupt("a table has too many symbols");
                    }
                    if zeros != 3 {
                        break;
                    }
                }
            }
        }
        if left != 0 {
            return corrupt("a table's counts do not add up");
        }
        Ok((Self::new(&counts, log)?, bits.bytes()))
    }

    /// From the count of each symbol; -1 is less than one. They add up to 2^`log`.
    pub(super) fn new(counts: &[i32], log: u32) -> Result<Self, ZstdError> {
        let size = 1_usize << log;
        let total: u64 = counts.iter().map(|n| u64::from(n.unsigned_abs())).sum();
        if total != size as u64 {
            return corrupt("a table's counts do not add up");
        }
        let mut states = vec![State::default(); size];
        let mut high = size;
        let mut next: Vec<u32> = Vec::with_capacity(counts.len());
        let numbered = || counts.iter().zip(0_u8..=u8::MAX);
        for (&count, symbol) in numbered() {
            next.push(count.unsigned_abs());
            if count < 0 {
                high -= 1;
                states[high].symbol = symbol;
            }
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut at = 0;
        for (&count, symbol) in numbered() {
            for _ in 0..count.max(0) {
                states[at].symbol = symbol;
                // Places at the high end are taken. Ends, as the step is odd and 0 is below.
                loop {
                    at = (at + step) & (size - 1);
                    if at < high || high == 0 {
                        break;
                    }
                }
            }
        }
        for state in &mut states {
            let Some(next) = next.get_mut(usize::from(state.symbol)) else {
                return corrupt("a table has a symbol without a count");
            };
            let bits = log - next.ilog2();
            let base = (*next << bits) - (1 << log);
            *next += 1;
            state.bits = u8::try_from(bits).unwrap_or(0);
            state.base = u16::try_from(base).unwrap_or(0);
        }
        Ok(Self { log, states })
    }

    /// A table of one symbol, that takes no bits.
    pub(super) fn single(symbol: u8) -> Self {
        let state = State {
            symbol,
            ..State::default()
        };
        Self {
            log: 0,
            states: vec![state],
        }
    }

    pub(super) fn begin(&self, bits: &mut Backward<'_>) -> Cursor {
        Cursor(usize::try_from(bits.read(self.log)).unwrap_or(0))
    }

    fn state(&self, cursor: Cursor) -> State {
        self.states.get(cursor.0).copied().unwrap_or_default()
    }

    pub(super) fn symbol(&self, cursor: Cursor) -> u8 {
        self.state(cursor).symbol
    }

    pub(super) fn advance(&self, cursor: &mut Cursor, bits: &mut Backward<'_>) {
        let State {
            bits: count, base, ..
        } = self.state(*cursor);
        let low = bits.read(u32::from(count));
        cursor.0 = usize::from(base) + usize::try_from(low).unwrap_or(0);
    }
}

/// A Huffman decoding table.
#[derive(Clone, Debug)]
pub(super) struct Huffman {
    log: u32,
    /// Symbol and length of the code that each value begins with.
    codes: Vec<(u8, u8)>,
}

impl Huffman {
    /// From a tree's description: the table, and the bytes of the description.
    pub(super) fn read(data: &[u8]) -> Result<(Self, usize), ZstdError> {
        let Some((&header, rest)) = data.split_first() else {
            return corrupt("a tree is missing");
        };
        let header = usize::from(header);
        let (weights, length) = if header < 128 {
            let Some(packed) = rest.get(..header) else {
                return corrupt("a tree ends too early");
            };
            (Self::unpack_weights(packed)?, header)
        } else {
            let count = header - 127;
            let length = count.div_ceil(2);
            let Some(packed) = rest.get(..length) else {
                return corrupt("a tree ends too early");
            };
            let halves = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
            (halves.take(count).collect(), length)
        };
        Ok((Self::new(weights)?, 1 + length))
    }

    fn unpack_weights(packed: &[u8]) -> Result<Vec<u8>, ZstdError> {
        let (table, length) = Fse::read(packed, 16, MAX_WEIGHTS_LOG)?;
        let mut bits = Backward::new(packed.get(length..).unwrap_or_default())?;
        let (mut one, mut other) = (table.begin(&mut bits), table.begin(&mut bits));
        let mut weights = Vec::new();
        // Two decoders take turns. When the bits are used up, the other has one more.
        while weights.len() < 255 {
            weights.push(table.symbol(one));
            table.advance(&mut one, &mut bits);
            if bits.is_overdrawn() {
                weights.push(table.symbol(other));
                return Ok(weights);
            }
            std::mem::swap(&mut one, &mut other);
        }
        corrupt("a tree has too many weights")
    }

    /// From the weights of all symbols but the last, whose weight is what the others leave.
    fn new(mut weights: Vec<u8>) -> Result<Self, ZstdError> {
        let mut total = 0_u32;
        for &weight in &weights {
            if u32::from(weight) > MAX_CODE {
                return corrupt("a code is too long");
            }
            total += (1 << weight) >> 1;
        }
        if total == 0 || weights.len() > 255 {
            return corrupt("a tree has no codes, or too many");
        }
        let log = total.ilog2() + 1;
        let left = (1 << log) - total;
        if log > MAX_CODE || !left.is_power_of_two() {
            return corrupt("a tree's codes do not add up");
        }
        weights.push(u8::try_from(left.ilog2() + 1).unwrap_or(0));
        let mut codes = Vec::with_capacity(1 << log);
        for weight in 1..=u8::try_from(log).unwrap_or(0) {
            let symbols = weights.iter().zip(0_u8..=u8::MAX);
            for (_, symbol) in symbols.filter(|(other, _)| **other == weight) {
                let length = u8::try_from(log).unwrap_or(0) + 1 - weight;
                codes.extend((0..1_u32 << (weight - 1)).map(|_| (symbol, length)));
            }
        }
        if codes.len() != 1 << log {
            return corrupt("a tree's codes do not add up");
        }
        Ok(Self { log, codes })
    }

    /// Appends `count` symbols of one stream, which ends with them.
    pub(super) fn decode(
        &self,
        stream: &[u8],
        count: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ZstdError> {
        let mut bits = Backward::new(stream)?;
        for _ in 0..count {
            let at = usize::try_from(bits.peek(self.log)).unwrap_or(0);
            let (symbol, length) = self.codes.get(at).copied().unwrap_or_default();
            bits.skip(u32::from(length));
            out.push(symbol);
        }
        match bits.is_used_up() {
            true => Ok(()),
            false => corrupt("literals do not end where they should"),
        }
    }
}
