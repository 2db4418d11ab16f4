//! Compressed blocks (RFC 8878, section 3.1.1.3).

use super::bits::Backward;
use super::entropy::{Fse, Huffman};
use super::{MAX_BLOCK, ZstdError};

/// Least length and further bits of each code of a literals' length.
const LITERALS: [(u32, u32); 36] = with_steps(
    16,
    0,
    [
        (16, 1),
        (18, 1),
        (20, 1),
        (22, 1),
        (24, 2),
        (28, 2),
        (32, 3),
        (40, 3),
        (48, 4),
        (64, 6),
        (128, 7),
        (256, 8),
        (512, 9),
        (1024, 10),
        (2048, 11),
        (4096, 12),
        (8192, 13),
        (16384, 14),
        (32768, 15),
        (65536, 16),
        (0, 0),
    ],
);

/// The same of a match's length.
const MATCHES: [(u32, u32); 53] = with_steps(
    32,
    3,
    [
        (35, 1),
        (37, 1),
        (39, 1),
        (41, 1),
        (43, 2),
        (47, 2),
        (51, 3),
        (59, 3),
        (67, 4),
        (83, 4),
        (99, 5),
        (131, 7),
        (259, 8),
        (515, 9),
        (1027, 10),
        (2051, 11),
        (4099, 12),
        (8195, 13),
        (16387, 14),
        (32771, 15),
        (65539, 16),
    ],
);

/// `steps` codes of one length each, from `first` on, and then those of `rest`.
const fn with_steps<const N: usize>(
    steps: usize,
    first: u32,
    rest: [(u32, u32); 21],
) -> [(u32, u32); N] {
    let mut codes = [(0, 0); N];
    let mut at = 0;
    let mut length = first;
    while at < N {
        codes[at] = if at < steps {
            (length, 0)
        } else {
            rest[at - steps]
        };
        at += 1;
        length += 1;
    }
    codes
}

const LITERALS_COUNTS: [i32; 36] = [
    4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1,
    -1, -1, -1, -1,
];
const MATCHES_COUNTS: [i32; 53] = [
    1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
];
const OFFSETS_COUNTS: [i32; 29] = [
    1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1,
];

/// One of the three tables of a sequence: its rules.
struct Kind {
    counts: &'static [i32],
    log: u32,
    symbols: usize,
    most: u32,
}

const LITERALS_KIND: Kind = Kind {
    counts: &LITERALS_COUNTS,
    log: 6,
    symbols: 36,
    most: 9,
};
const OFFSETS_KIND: Kind = Kind {
    counts: &OFFSETS_COUNTS,
    log: 5,
    symbols: 32,
    most: 8,
};
const MATCHES_KIND: Kind = Kind {
    counts: &MATCHES_COUNTS,
    log: 6,
    symbols: 53,
    most: 9,
};

/// What a block takes over from those before it in its frame.
#[derive(Debug)]
pub(super) struct Tables {
    huffman: Option<Huffman>,
    literals: Option<Fse>,
    offsets: Option<Fse>,
    matches: Option<Fse>,
    recent: [usize; 3],
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            huffman: None,
            literals: None,
            offsets: None,
            matches: None,
            recent: [1, 4, 8],
        }
    }
}

fn corrupt<T>(what: &'static str) -> Result<T, ZstdError> {
    Err(ZstdError::Corrupt(what))
}

fn take<'a>(data: &mut &'a [u8], count: usize) -> Result<&'a [u8], ZstdError> {
    let (taken, rest) = data
        .split_at_checked(count)
        .ok_or(ZstdError::Corrupt("a block ends too early"))?;
    *data = rest;
    Ok(taken)
}

/// Up to 8 bytes as a number.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn small(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl Tables {
    /// Appends what a block says; matches reach no further back than `window` bytes.
    pub(super) fn decode(
        &mut self,
        mut block: &[u8],
        window: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ZstdError> {
        let start = out.len();
        let literals = self.literals(&mut block)?;
        let mut literals = &literals[..];
        let sequences = match take(&mut block, 1)?[0] {
            0 => {
                if !block.is_empty() {
                    return corrupt("a block goes on after its end");
                }
                out.extend_from_slice(literals);
                return Ok(());
            }
            few @ 1..=127 => usize::from(few),
            more @ 128..=254 => usize::from(more - 128) << 8 | usize::from(take(&mut block, 1)?[0]),
            255 => small(number(take(&mut block, 2)?)) + 0x7f00,
        };
        let modes = take(&mut block, 1)?[0];
        if modes & 3 != 0 {
            return corrupt("reserved bits are set");
        }
        read_table(&mut self.literals, &LITERALS_KIND, modes >> 6, &mut block)?;
        read_table(&mut self.offsets, &OFFSETS_KIND, modes >> 4 & 3, &mut block)?;
        read_table(&mut self.matches, &MATCHES_KIND, modes >> 2 & 3, &mut block)?;
        let (Some(by_literals), Some(by_offsets), Some(by_matches)) =
            (&self.literals, &self.offsets, &self.matches)
        else {
            return corrupt("a table is repeated that never was");
        };
        let mut bits = Backward::new(block)?;
        let mut literal = by_literals.begin(&mut bits);
        let mut offset = by_offsets.begin(&mut bits);
        let mut matched = by_matches.begin(&mut bits);
        for sequence in 1..=sequences {
            let code = u32::from(by_offsets.symbol(offset));
            let value = small((1 << code) + bits.read(code));
            let match_length = length(&MATCHES, by_matches.symbol(matched), &mut bits);
            let literals_length = length(&LITERALS, by_literals.symbol(literal), &mut bits);
            if sequence < sequences {
                by_literals.advance(&mut literal, &mut bits);
                by_matches.advance(&mut matched, &mut bits);
                by_offsets.advance(&mut offset, &mut bits);
            }
            if bits.is_overdrawn() {
                return corrupt("sequences end too early");
            }
            let distance = distance(&mut self.recent, value, literals_length)?;
            out.extend_from_slice(take(&mut literals, literals_length)?);
            if out.len() - start + match_length > MAX_BLOCK {
                return corrupt("a block is too long");
            }
            copy(out, distance, match_length, window)?;
        }
        if !bits.is_used_up() {
            return corrupt("sequences do not end where they should");
        }
        out.extend_from_slice(literals);
        match out.len() - start > MAX_BLOCK {
            true => corrupt("a block is too long"),
            false => Ok(()),
        }
    }

    fn literals(&mut self, block: &mut &[u8]) -> Result<Vec<u8>, ZstdError> {
        let first = block.first().copied().unwrap_or_default();
        let (kind, format) = (first & 3, first >> 2 & 3);
        if kind < 2 {
            let (bytes, shift) = match format {
                0 | 2 => (1, 3),
                1 => (2, 4),
                _ => (3, 4),
            };
            let length = small(number(take(block, bytes)?) >> shift);
            check_length(length)?;
            return match kind {
                0 => Ok(take(block, length)?.to_vec()),
                _ => Ok(vec![take(block, 1)?[0]; length]),
            };
        }
        let (bytes, bits) = match format {
            0 | 1 => (3, 10),
            2 => (4, 14),
            _ => (5, 18),
        };
        let header = number(take(block, bytes)?) >> 4;
        let length = small(header & ((1 << bits) - 1));
        check_length(length)?;
        let mut packed = take(block, small(header >> bits & ((1 << bits) - 1)))?;
        if kind == 2 {
            let (huffman, described) = Huffman::read(packed)?;
            take(&mut packed, described)?;
            self.huffman = Some(huffman);
        }
        let Some(huffman) = &self.huffman else {
            return corrupt("a tree is repeated that never was");
        };
        let mut literals = Vec::with_capacity(length);
        if format == 0 {
            huffman.decode(packed, length, &mut literals)?;
            return Ok(literals);
        }
        let jumps = take(&mut packed, 6)?;
        let each = length.div_ceil(4);
        for jump in jumps.chunks_exact(2) {
            let stream = take(&mut packed, small(number(jump)))?;
            huffman.decode(stream, each, &mut literals)?;
        }
        let Some(rest) = length.checked_sub(literals.len()) else {
            return corrupt("there are too few literals for four streams");
        };
        huffman.decode(packed, rest, &mut literals)?;
        Ok(literals)
    }
}

fn check_length(length: usize) -> Result<(), ZstdError> {
    match length > MAX_BLOCK {
        true => corrupt("a block has too many literals"),
        false => Ok(()),
    }
}

fn read_table(
    table: &mut Option<Fse>,
    kind: &Kind,
    mode: u8,
    block: &mut &[u8],
) -> Result<(), ZstdError> {
    *table = Some(match mode {
        0 => Fse::new(kind.counts, kind.log)?,
        1 => {
            let symbol = take(block, 1)?[0];
            if usize::from(symbol) >= kind.symbols {
                return corrupt("there is no such code");
            }
            Fse::single(symbol)
        }
        2 => {
            let (table, described) = Fse::read(block, kind.symbols, kind.most)?;
            take(block, described)?;
            table
        }
        _ => return Ok(()),
    });
    Ok(())
}

fn length(codes: &[(u32, u32)], code: u8, bits: &mut Backward<'_>) -> usize {
    let (least, more) = codes.get(usize::from(code)).copied().unwrap_or_default();
    small(u64::from(least) + bits.read(more))
}

/// How far back a match begins: a new distance, or one of the last three.
fn distance(recent: &mut [usize; 3], value: usize, literals: usize) -> Result<usize, ZstdError> {
    let [first, second, third] = *recent;
    if value > 3 {
        *recent = [value - 3, first, second];
        return Ok(value - 3);
    }
    let (distance, rotated) = match value - 1 + usize::from(literals == 0) {
        0 => return Ok(first),
        1 => (second, [second, first, third]),
        2 => (third, [third, first, second]),
        _ => (first - 1, [first - 1, first, second]),
    };
    if distance == 0 {
        return corrupt("a match begins nowhere");
    }
    *recent = rotated;
    Ok(distance)
}

fn copy(out: &mut Vec<u8>, distance: usize, length: usize, window: usize) -> Result<(), ZstdError> {
    let Some(mut from) = out.len().checked_sub(distance) else {
        return corrupt("a match begins before the beginning");
    };
    if distance > window {
        return corrupt("a match begins before the window");
    }
    // What is copied may be part of what is being copied.
    let mut left = length;
    while left > 0 {
        let piece = left.min(out.len() - from);
        out.extend_from_within(from..from + piece);
        from += piece;
        left -= piece;
    }
    Ok(())
}
