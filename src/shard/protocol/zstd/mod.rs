//! Bytes of remote blobs, compressed (RFC 8878).
//!
//! All blobs of a request are one frame, in chunks: eight bytes of length, little endian, and as
//! many of the frame. At the end of a blob the frame is flushed and not ended, and there a chunk
//! ends too.
//!
//! [`Unpacker`] understands all that a client can send. [`Packer`] writes blocks as they are, or
//! as one repeated byte: whoever insists on a frame gets one, and the time of nobody is spent on
//! making it small.

mod bits;
mod block;
mod entropy;

use self::block::{Tables, number};

/// The longest chunk in bytes: clients' buffers are this large and no larger (`ZSTD_CStreamOutSize`).
pub const MAX_CHUNK: u64 = 131_591;

/// Bytes of a block at most.
const MAX_BLOCK: usize = 128 << 10;

/// The longest window in bytes that is kept for a client. Its library asks for 2 MiB; decoders
/// are expected to support 8 MiB (RFC 8878, section 3.1.1.1.2).
const MAX_WINDOW: u64 = 8 << 20;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A frame header: no checksum, no length, and a window of 128 KiB.
const HEADER: [u8; 2] = [0x00, 7 << 3];

/// Why compressed bytes cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZstdError {
    /// Not the beginning of a frame.
    #[error("the compressed bytes are no zstd frame")]
    NoFrame,
    /// A frame that is of no use here, or asks for too much memory.
    #[error("a zstd frame asks for a {0}")]
    Refused(&'static str),
    /// Against the rules.
    #[error("the compressed bytes are damaged: {0}")]
    Corrupt(&'static str),
}

#[derive(Debug)]
enum Expected {
    Frame,
    Block(Box<Tables>),
    Checksum,
}

/// Compressed bytes in, blocks out.
#[derive(Debug)]
pub struct Unpacker {
    input: Vec<u8>,
    /// Bytes of the input before this are understood.
    at: usize,
    expected: Expected,
    has_checksum: bool,
    window: usize,
    /// The window, and the block that was handed out last.
    output: Vec<u8>,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self {
            input: Vec::new(),
            at: 0,
            expected: Expected::Frame,
            has_checksum: false,
            window: 0,
            output: Vec::new(),
        }
    }
}

impl Unpacker {
    /// Takes bytes as they come; [`Self::next_block`] until there is none keeps memory bounded.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.at);
        self.at = 0;
        self.input.extend_from_slice(bytes);
    }

    fn left(&self) -> &[u8] {
        self.input.get(self.at..).unwrap_or_default()
    }

    /// Whether bytes wait for others that belong to them.
    pub fn is_in_midst(&self) -> bool {
        !self.left().is_empty()
    }

    /// What the next block says, at most 128 KiB, if all of it is there.
    pub fn next_block(&mut self) -> Result<Option<&[u8]>, ZstdError> {
        loop {
            match &mut self.expected {
                Expected::Frame => {
                    if !self.begin_frame()? {
                        return Ok(None);
                    }
                }
                Expected::Checksum => {
                    // The content is what its sender says it is: nothing is gained by checking.
                    if self.left().len() < 4 {
                        return Ok(None);
                    }
                    self.at += 4;
                    self.expected = Expected::Frame;
                }
                Expected::Block(_) => break,
            }
        }
        let Some((header, rest)) = self
            .input
            .get(self.at..)
            .and_then(|left| left.split_first_chunk::<3>())
        else {
            return Ok(None);
        };
        let header = number(header);
        let size = usize::try_from(header >> 3).unwrap_or(usize::MAX);
        if size > MAX_BLOCK {
            return Err(ZstdError::Corrupt("a block is too long"));
        }
        let stored = match header >> 1 & 3 {
            1 => 1,
            _ => size,
        };
        let Some(body) = rest.get(..stored) else {
            return Ok(None);
        };
        // A window and some: what is older is cut off seldom enough.
        let kept = self.output.len().min(self.window);
        if self.output.len() > 2 * self.window + MAX_BLOCK {
            self.output.drain(..self.output.len() - kept);
        }
        let start = self.output.len();
        match header >> 1 & 3 {
            0 => self.output.extend_from_slice(body),
            1 => self.output.resize(start + size, body[0]),
            2 => {
                if let Expected::Block(tables) = &mut self.expected {
                    tables.decode(body, self.window, &mut self.output)?;
                }
            }
            _ => return Err(ZstdError::Corrupt("a block is of no kind")),
        }
        self.at += 3 + stored;
        if header & 1 == 1 {
            self.expected = match self.has_checksum {
                true => Expected::Checksum,
                false => Expected::Frame,
            };
        }
        Ok(self.output.get(start..))
    }

    /// Reads a frame's header. False: it is not all there.
    fn begin_frame(&mut self) -> Result<bool, ZstdError> {
        let left = self.left();
        let begin = &left[..left.len().min(MAGIC.len())];
        if !MAGIC.starts_with(begin) {
            return Err(ZstdError::NoFrame);
        }
        let Some(&descriptor) = left.get(MAGIC.len()) else {
            return Ok(false);
        };
        let is_single = descriptor >> 5 & 1 == 1;
        let size_bytes = match descriptor >> 6 {
            0 => usize::from(is_single),
            flag => 1 << flag,
        };
        let fields = MAGIC.len() + 1;
        let end = fields + usize::from(!is_single) + size_bytes;
        if descriptor & 3 != 0 {
            return Err(ZstdError::Refused("dictionary"));
        }
        if descriptor & 8 != 0 {
            return Err(ZstdError::Corrupt("reserved bits are set"));
        }
        let Some(fields) = left.get(fields..end) else {
            return Ok(false);
        };
        let window = match (is_single, fields.first()) {
            (false, Some(&window)) => {
                let base = 1_u64 << (10 + (window >> 3));
                base + base / 8 * u64::from(window & 7)
            }
            // 16 bits count from 256 on.
            _ => number(fields) + if size_bytes == 2 { 256 } else { 0 },
        };
        if window > MAX_WINDOW {
            return Err(ZstdError::Refused("window beyond 8 MiB"));
        }
        self.window = usize::try_from(window).unwrap_or(0);
        self.has_checksum = descriptor & 4 != 0;
        self.expected = Expected::Block(Box::default());
        self.output.clear();
        self.at += end;
        Ok(true)
    }
}

/// Bytes in, chunks out.
#[derive(Debug, Default)]
pub struct Packer {
    has_begun: bool,
}

impl Packer {
    /// Bytes that [`Self::chunk`] takes at most.
    pub const MOST: usize = MAX_BLOCK;

    /// Appends a chunk with these bytes, at most [`Self::MOST`] of them and of one blob.
    pub fn chunk(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 8]);
        if !self.has_begun {
            self.has_begun = true;
            out.extend_from_slice(&MAGIC);
            out.extend_from_slice(&HEADER);
        }
        let (kind, stored) = match bytes.split_first() {
            Some((first, rest)) if rest.iter().all(|byte| byte == first) => (1, &bytes[..1]),
            Some(_) | None => (0, bytes),
        };
        let header = (bytes.len() as u64) << 3 | kind << 1;
        out.extend_from_slice(&header.to_le_bytes()[..3]);
        out.extend_from_slice(stored);
        let length = (out.len() - start - 8) as u64;
        out[start..start + 8].copy_from_slice(&length.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
