//! Length-prefixed frames, whole from any cut.
//!
//! A frame is a length (8 bytes, little endian) and that many bytes of body. The decoder is fed
//! whatever a read returned and hands out bodies; it allocates for bytes that have arrived, never
//! for bytes that a length announces.

/// Bytes of the length before each body.
pub const HEADER: usize = 8;

/// The longest body a client may send; the real server has the same limit.
pub const MAX_BODY: u64 = 256 << 20;

/// Buffers are given back to the allocator beyond this, once they are empty: an idle connection
/// costs no more.
const KEPT_CAPACITY: usize = 16 << 10;

/// What a fresh buffer can take; most requests are shorter.
const FIRST_CAPACITY: usize = 2 << 10;

/// A read is worth its system call when it can take this much.
const WORTHWHILE: usize = 512;

/// A frame that cannot be received. Nothing after it on the connection has a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced length exceeds [`MAX_BODY`].
    #[error("a frame of {0} bytes is announced, more than the limit of {MAX_BODY}")]
    TooLong(u64),
}

/// Bytes in, bodies out.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes before this have been handed out.
    start: usize,
}

impl Decoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where a read shall append what has arrived; it has room for a worthwhile read.
    pub fn incoming(&mut self) -> &mut Vec<u8> {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            if self.buffer.capacity() > KEPT_CAPACITY {
                self.buffer = Vec::new();
            }
        } else if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        if self.buffer.capacity() - self.buffer.len() < WORTHWHILE {
            // Doubles what there is, so memory follows the bytes received.
            self.buffer.reserve(self.buffer.len().max(FIRST_CAPACITY));
        }
        &mut self.buffer
    }

    /// Bytes received and not handed out.
    pub fn buffered(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The next whole body, if it has arrived.
    pub fn next_body(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let pending = &self.buffer[self.start..];
        let Some((header, rest)) = pending.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u64::from_le_bytes(*header);
        if length > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        // At most MAX_BODY, which fits.
        let Some(body) = usize::try_from(length)
            .ok()
            .and_then(|length| rest.get(..length))
        else {
            return Ok(None);
        };
        self.start += HEADER + body.len();
        Ok(Some(body))
    }

    /// Up to `most` bytes that are not framed: a blob's bytes on their way in.
    pub fn take_raw(&mut self, most: u64) -> &[u8] {
        let available = self.buffered();
        let length = usize::try_from(most).map_or(available, |most| most.min(available));
        let raw = &self.buffer[self.start..self.start + length];
        self.start += length;
        raw
    }
}

/// Appends a frame whose body `write` appends to `out`.
pub fn encode_with(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    write(out);
    let length = (out.len() - start - HEADER) as u64;
    out[start..start + HEADER].copy_from_slice(&length.to_le_bytes());
}

/// Empties a buffer that frames were encoded into, and gives memory back that one long frame took.
pub fn reuse(out: &mut Vec<u8>) {
    out.clear();
    if out.capacity() > KEPT_CAPACITY {
        *out = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode_with(&mut out, |out| out.extend_from_slice(body));
        out
    }

    #[test]
    fn the_exit_message_is_encoded_as_clients_send_it() {
        let mut expected = vec![0x17, 0, 0, 0, 0, 0, 0, 0];
        expected.extend_from_slice(br#"{"type":"exit_request"}"#);
        assert_eq!(frame(br#"{"type":"exit_request"}"#), expected);
    }

    #[test]
    fn a_length_beyond_the_limit_is_an_error_as_soon_as_it_is_there() {
        for length in [MAX_BODY + 1, 1 << 60, u64::MAX] {
            let mut decoder = Decoder::new();
            decoder.incoming().extend_from_slice(&length.to_le_bytes());
            assert_eq!(decoder.next_body(), Err(FrameError::TooLong(length)));
        }
    }

    #[test]
    fn memory_follows_the_bytes_received_not_the_length_announced() {
        let mut decoder = Decoder::new();
        decoder
            .incoming()
            .extend_from_slice(&MAX_BODY.to_le_bytes());
        for _ in 0..100 {
            assert_eq!(decoder.next_body(), Ok(None));
            decoder.incoming().extend_from_slice(&[b'1'; 1000]);
        }
        assert_eq!(decoder.buffered(), HEADER + 100_000);
        assert!(decoder.buffer.capacity() <= 4 * 100_000);
    }

    #[test]
    fn a_long_frame_leaves_no_long_buffer_behind() {
        let mut decoder = Decoder::new();
        decoder
            .incoming()
            .extend_from_slice(&frame(&[b' '; 1 << 20]));
        assert_eq!(decoder.next_body().unwrap().map(<[u8]>::len), Some(1 << 20));
        decoder.incoming();
        assert!(decoder.buffer.capacity() <= KEPT_CAPACITY);
    }

    #[test]
    fn raw_bytes_between_frames_are_taken_as_they_are() {
        let mut decoder = Decoder::new();
        let mut stream = frame(b"{}");
        stream.extend_from_slice(b"payload");
        stream.extend_from_slice(&frame(b"[]"));
        decoder.incoming().extend_from_slice(&stream);
        assert_eq!(decoder.next_body().unwrap(), Some(&b"{}"[..]));
        assert_eq!(decoder.take_raw(3), b"pay");
        assert_eq!(decoder.take_raw(4), b"load");
        assert_eq!(decoder.take_raw(0), b"");
        assert_eq!(decoder.next_body().unwrap(), Some(&b"[]"[..]));
        assert_eq!(decoder.take_raw(10), b"");
    }

    proptest! {
        #[test]
        fn bodies_are_whole_from_any_cut(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cuts in prop::collection::vec(1_usize..200, 0..40),
        ) {
            let stream: Vec<u8> = bodies.iter().flat_map(|body| frame(body)).collect();
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            let mut rest = &stream[..];
            let mut cuts = cuts.into_iter();
            while !rest.is_empty() {
                let cut = cuts.next().unwrap_or(rest.len()).min(rest.len());
                let (now, later) = rest.split_at(cut);
                decoder.incoming().extend_from_slice(now);
                rest = later;
                while let Some(body) = decoder.next_body().unwrap() {
                    seen.push(body.to_vec());
                }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert_eq!(decoder.buffered(), 0);
        }
    }
}
