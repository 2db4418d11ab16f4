//! What a spill file consists of: a header, and the blob's bytes right behind it. Pure.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `vnlspill` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | 1 once the blob is complete, else 0 |
//! | 16 | 8 | the blob's id |
//! | 24 | 8 | the blob's size in bytes |
//! | 32 | 4 | CRC-32 of the blob's bytes |
//! | 36 | 24 | zeros |
//! | 60 | 4 | CRC-32 of all before |
//!
//! Numbers are little-endian. CRC-32 as in ISO 3309.

use crate::shard::ids::ObjectId;

/// Where a blob's data begins in its file: a multiple of 64, so that what clients want aligned
/// in memory is aligned in a mapping of the file.
pub const DATA: u64 = 64;

/// Length of the header.
pub(super) const HEADER: usize = DATA as usize;

const MAGIC: &[u8; 8] = b"vnlspill";
const VERSION: u32 = 1;

const SUFFIX: &str = ".spill";
const UNFINISHED: &str = ".spill.new";

/// The header of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: ObjectId,
    pub(super) size: u64,
    /// Checksum of the data; none while the blob is not complete.
    pub(super) checksum: Option<u32>,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::from(self.checksum.is_some()).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.id.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.size.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.checksum.unwrap_or(0).to_le_bytes());
        let own = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// The header, or what is wrong with it.
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<Self, &'static str> {
        if !is_ours(bytes) {
            return Err("it does not begin as a spill file does");
        }
        if number(bytes, 60) != crc32fast::hash(&bytes[..60]) {
            return Err("its header has another checksum");
        }
        if number(bytes, 8) != VERSION {
            return Err("it is of another version");
        }
        Ok(Self {
            id: ObjectId(long(bytes, 16)),
            size: long(bytes, 24),
            checksum: (number(bytes, 12) == 1).then(|| number(bytes, 32)),
        })
    }
}

fn number(bytes: &[u8; HEADER], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn long(bytes: &[u8; HEADER], at: usize) -> u64 {
    u64::from(number(bytes, at)) | u64::from(number(bytes, at + 4)) << 32
}

/// Whether a file that begins like this is a spill file.
pub(super) fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Name of a complete blob's file.
pub(super) fn name(id: ObjectId) -> String {
    format!("{id}{SUFFIX}")
}

/// Name of the file until then.
pub(super) fn unfinished(id: ObjectId) -> String {
    format!("{id}{UNFINISHED}")
}

/// What a file of this name would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Complete,
    Unfinished,
    /// Not one of ours.
    Foreign,
}

/// Understands a name: `o`, 16 hex digits in lower case, and a suffix.
pub(super) fn named(name: &str) -> Named {
    let (id, kind) = if let Some(id) = name.strip_suffix(UNFINISHED) {
        (id, Named::Unfinished)
    } else if let Some(id) = name.strip_suffix(SUFFIX) {
        (id, Named::Complete)
    } else {
        return Named::Foreign;
    };
    let digits = id.strip_prefix('o').unwrap_or_default();
    let is_id = digits.len() == 16
        && digits
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if is_id { kind } else { Named::Foreign }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOB: ObjectId = ObjectId(0xe880_a01c_2000_0022);

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for checksum in [None, Some(0), Some(0xdead_beef)] {
            let header = Header {
                id: BLOB,
                size: 1 << 40,
                checksum,
            };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn every_wrong_bit_in_a_header_shows() {
        let header = Header {
            id: BLOB,
            size: 77,
            checksum: Some(1),
        };
        for bit in 0..8 * HEADER {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            Header::decode(&bytes).unwrap_err();
        }
    }

    #[test]
    fn only_names_we_give_are_ours() {
        assert_eq!(named(&name(BLOB)), Named::Complete);
        assert_eq!(named(&unfinished(BLOB)), Named::Unfinished);
        for name in [
            "",
            ".spill",
            "o.spill",
            "oe880a01c20000022",
            "oE880A01C20000022.spill",
            "oe880a01c2000002.spill",
            "oe880a01c200000222.spill",
            "e880a01c20000022.spill",
            "oe880a01c20000022.spill.old",
            "16753566656474644514",
        ] {
            assert_eq!(named(name), Named::Foreign, "{name}");
        }
    }
}
