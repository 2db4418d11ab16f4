//! The header kubelet gets wrong, put right below HTTP/2.
//!
//! grpc-go calls a UNIX socket by its path, so on the registration socket (and from old kubelets
//! on the CSI socket) the request's `:authority` is `%2Fvar%2Flib%2Fkubelet%2F…` or the bare
//! path. Neither is an authority (RFC 3986, section 3.2), and h2 resets the stream.
//!
//! Nobody here looks at the authority, so every `%` and `/` in its value becomes `-`. In HPACK's
//! Huffman code (RFC 7541, appendix B) the three are 010101, 011000 and 010110: all of 6 bits.
//! So nothing moves: no length changes, in the block, in the frame, or in the decoder's table.
//!
//! Values are rewritten where they are literal, with the name's index in the static table or
//! with a literal name: what is indexed later has been literal before, on the same connection.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// A header block that is held back until it is whole. h2 refuses lists above 16 KiB.
const MAX_BLOCK: usize = 64 * 1024;

/// A header block larger than any request's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a header block is larger than {MAX_BLOCK} bytes")]
pub struct BlockTooLarge;

/// Rewrites what a client sends. The bytes may be cut anywhere.
#[derive(Debug, Default)]
pub struct Rewriter {
    state: State,
    /// The HEADERS frame that is being collected, with its CONTINUATIONs, and where in it the
    /// block's fragments lie.
    held: Vec<u8>,
    fragments: Vec<Range<usize>>,
}

#[derive(Debug)]
enum State {
    /// So many bytes of the preface, or of a frame that is of no interest, pass by.
    Passing(usize),
    /// A frame's header is being collected.
    Header([u8; FRAME_HEADER], usize),
    /// So many bytes of a frame's payload are yet to be held.
    Holding { frame: Frame, missing: usize },
}

impl Default for State {
    fn default() -> Self {
        Self::Passing(PREFACE)
    }
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    /// Where its payload begins in what is held.
    payload: usize,
}

impl Rewriter {
    /// Takes what the client sent next; appends to `out` what may go on.
    pub fn push(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<(), BlockTooLarge> {
        while !input.is_empty() {
            match &mut self.state {
                State::Passing(left) => {
                    let (passing, rest) = input.split_at(input.len().min(*left));
                    out.extend_from_slice(passing);
                    *left -= passing.len();
                    input = rest;
                    if *left == 0 {
                        self.state = State::Header([0; FRAME_HEADER], 0);
                    }
                }
                State::Header(header, have) => {
                    let (part, rest) = input.split_at(input.len().min(FRAME_HEADER - *have));
                    header[*have..*have + part.len()].copy_from_slice(part);
                    *have += part.len();
                    input = rest;
                    if *have == FRAME_HEADER {
                        let header = *header;
                        self.begin(header, out)?;
                    }
                }
                State::Holding { frame, missing } => {
                    let (part, rest) = input.split_at(input.len().min(*missing));
                    self.held.extend_from_slice(part);
                    *missing -= part.len();
                    input = rest;
                    if *missing == 0 {
                        let frame = *frame;
                        self.end(frame, out);
                    }
                }
            }
        }
        Ok(())
    }

    /// A frame begins.
    fn begin(
        &mut self,
        header: [u8; FRAME_HEADER],
        out: &mut Vec<u8>,
    ) -> Result<(), BlockTooLarge> {
        let [a, b, c, kind, flags, ..] = header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        // A CONTINUATION without a HEADERS before it is h2's to refuse, as is any other frame
        // between the two (RFC 9113, section 6.10).
        let is_block = match kind {
            HEADERS => true,
            CONTINUATION => !self.held.is_empty(),
            _ => false,
        };
        if !is_block || (kind == HEADERS && !self.held.is_empty()) {
            self.release(out);
            out.extend_from_slice(&header);
            self.state = match length {
                0 => State::Header([0; FRAME_HEADER], 0),
                _ => State::Passing(length),
            };
            return Ok(());
        }
        if self.held.len() + FRAME_HEADER + length > MAX_BLOCK {
            return Err(BlockTooLarge);
        }
        self.held.extend_from_slice(&header);
        let frame = Frame {
            kind,
            flags,
            payload: self.held.len(),
        };
        if length == 0 {
            self.end(frame, out);
        } else {
            self.state = State::Holding {
                frame,
                missing: length,
            };
        }
        Ok(())
    }

    /// A frame of a header block is whole.
    fn end(&mut self, frame: Frame, out: &mut Vec<u8>) {
        let (mut from, mut to) = (frame.payload, self.held.len());
        if frame.kind == HEADERS {
            if frame.flags & PADDED != 0 {
                let padding = self.held.get(from).copied().unwrap_or(0);
                from += 1;
                to = to.saturating_sub(usize::from(padding));
            }
            if frame.flags & PRIORITY != 0 {
                from += 5;
            }
        }
        if from <= to {
            self.fragments.push(from..to);
        }
        self.state = State::Header([0; FRAME_HEADER], 0);
        if frame.flags & END_HEADERS != 0 {
            self.rewrite();
            self.release(out);
        }
    }

    /// What is held goes on.
    fn release(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
        self.fragments.clear();
    }

    fn rewrite(&mut self) {
        let mut block: Vec<u8> = self
            .fragments
            .iter()
            .flat_map(|range| &self.held[range.clone()])
            .copied()
            .collect();
        // A block that makes no sense goes on as it is: h2 says what is wrong with it.
        let _ = rewrite_block(&mut block);
        let mut rewritten = block.into_iter();
        for range in &self.fragments {
            for (to, from) in self.held[range.clone()].iter_mut().zip(&mut rewritten) {
                *to = from;
            }
        }
    }
}

/// Walks the representations of a header block (RFC 7541, section 6).
fn rewrite_block(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < block.len() {
        let first = block[at];
        let prefix = match first {
            // Indexed field; the size of the dynamic table.
            0x80.. => {
                (_, at) = integer(block, at, 7)?;
                continue;
            }
            0x20..0x40 => {
                (_, at) = integer(block, at, 5)?;
                continue;
            }
            // Literals: with indexing, without, never indexed.
            0x40..0x80 => 6,
            0x00..0x20 => 4,
        };
        let index;
        (index, at) = integer(block, at, prefix)?;
        let is_authority = match index {
            0 => {
                let name = string(block, at)?;
                at = name.range.end;
                name.is(block, b":authority", AUTHORITY_IN_HUFFMAN)
            }
            // Static table, entry 1.
            1 => true,
            _ => false,
        };
        let value = string(block, at)?;
        at = value.range.end;
        if is_authority {
            value.rewrite(block);
        }
    }
    Some(())
}

/// An integer with a prefix of so many bits (section 5.1), and where it ends.
fn integer(block: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    let mut end = at + 1;
    if value < mask {
        return Some((value, end));
    }
    // Three more bytes say 2 MiB, far beyond a block.
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(end)?);
        end += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, end));
        }
    }
    None
}

/// A string (section 5.2): its bytes in the block, coded or plain.
struct Text {
    is_huffman: bool,
    range: Range<usize>,
}

fn string(block: &[u8], at: usize) -> Option<Text> {
    let is_huffman = block.get(at)? & 0x80 != 0;
    let (length, from) = integer(block, at, 7)?;
    let range = from..from.checked_add(length)?;
    block.get(range.clone())?;
    Some(Text { is_huffman, range })
}

/// `:authority`, coded and filled up with ones.
const AUTHORITY_IN_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

impl Text {
    fn is(&self, block: &[u8], plain: &[u8], coded: &[u8]) -> bool {
        block[self.range.clone()] == *if self.is_huffman { coded } else { plain }
    }

    fn rewrite(&self, block: &mut [u8]) {
        let value = &mut block[self.range.clone()];
        if self.is_huffman {
            rewrite_huffman(value);
        } else {
            for byte in value.iter_mut().filter(|byte| matches!(byte, b'%' | b'/')) {
                *byte = b'-';
            }
        }
    }
}

/// How many symbols have a code of 1, 2, … 30 bits (RFC 7541, appendix B). The code is canonical:
/// with these counts alone one knows where each symbol begins.
const SYMBOLS: [u32; 30] = [
    0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29,
    0, 4,
];
const PERCENT: u32 = 0b01_0101;
const SLASH: u32 = 0b01_1000;
const HYPHEN: u32 = 0b01_0110;
/// Bits of each of the three.
const BITS: usize = 6;

fn rewrite_huffman(value: &mut [u8]) {
    let total = value.len() * 8;
    let mut at = 0;
    while at < total {
        // Canonical decoding: `first` is the first code of the length at hand.
        let (mut code, mut first, mut length) = (0, 0, 0);
        let is_symbol = SYMBOLS.iter().any(|&count| {
            if at + length == total {
                return false;
            }
            let bit = value[(at + length) / 8] >> (7 - (at + length) % 8) & 1;
            code = code << 1 | u32::from(bit);
            length += 1;
            let is_symbol = code < first + count;
            if !is_symbol {
                first = (first + count) << 1;
            }
            is_symbol
        });
        // Only the filling at the end is no symbol.
        if !is_symbol {
            return;
        }
        if length == BITS && (code == PERCENT || code == SLASH) {
            for (n, bit) in (at..at + BITS).enumerate() {
                let mask = 0x80 >> (bit % 8);
                let is_set = HYPHEN >> (BITS - 1 - n) & 1 == 1;
                value[bit / 8] = if is_set {
                    value[bit / 8] | mask
                } else {
                    value[bit / 8] & !mask
                };
            }
        }
        at += length;
    }
}

/// A connection whose client's authority is put right as it is read.
#[derive(Debug)]
pub struct Rewritten<S> {
    inner: S,
    rewriter: Rewriter,
    ready: Vec<u8>,
    taken: usize,
}

impl<S> Rewritten<S> {
    /// Wraps the server's end of a connection on which nothing was read yet.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            rewriter: Rewriter::default(),
            ready: Vec::new(),
            taken: 0,
        }
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewritten<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        while this.taken == this.ready.len() {
            this.ready.clear();
            this.taken = 0;
            let mut space = [0; 4096];
            let mut read = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.rewriter
                .push(read.filled(), &mut this.ready)
                .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?;
        }
        let part = &this.ready[this.taken..];
        let part = &part[..part.len().min(buf.remaining())];
        buf.put_slice(part);
        this.taken += part.len();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewritten<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What Python's grpcio 1.85 sends for two calls on one connection with the authority that
    /// kubelet uses: literal names, plain values, the second time an index.
    const GRPCIO: &[u8] = include_bytes!("../../tests/data/authority/grpcio.client");
    /// As grpc-go codes it: indexed names, Huffman values; then a block in three frames, padded
    /// and with priority, around a value of all 256 bytes; with data frames full of `%` between.
    /// Coded by the Python package hpack 4.1, once with the authority as it is and once as it
    /// shall be.
    const CODED: &[u8] = include_bytes!("../../tests/data/authority/coded.client");
    const REWRITTEN: &[u8] = include_bytes!("../../tests/data/authority/coded.rewritten");

    fn rewrite(pieces: &[&[u8]]) -> Vec<u8> {
        let mut rewriter = Rewriter::default();
        let mut out = Vec::new();
        for piece in pieces {
            rewriter.push(piece, &mut out).unwrap();
        }
        out
    }

    fn grpcio_rewritten() -> Vec<u8> {
        let authority = b"%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fvinelet.csi.v6d.io-reg.sock";
        let at = GRPCIO
            .windows(authority.len())
            .position(|w| w == authority)
            .unwrap();
        let mut expected = GRPCIO.to_vec();
        for byte in &mut expected[at..at + authority.len()] {
            if *byte == b'%' {
                *byte = b'-';
            }
        }
        expected
    }

    #[test]
    fn the_authority_and_nothing_else_changes() {
        assert_eq!(rewrite(&[GRPCIO]), grpcio_rewritten());
        assert_eq!(rewrite(&[CODED]), REWRITTEN);
    }

    #[test]
    fn a_good_authority_stays_as_it_is() {
        assert_eq!(rewrite(&[REWRITTEN]), REWRITTEN);
    }

    #[test]
    fn every_single_byte_may_come_alone() {
        for (bytes, expected) in [(GRPCIO, grpcio_rewritten()), (CODED, REWRITTEN.to_vec())] {
            let pieces: Vec<_> = bytes.chunks(1).collect();
            assert_eq!(rewrite(&pieces), expected);
        }
    }

    #[test]
    fn what_is_no_header_block_passes_at_once() {
        let mut rewriter = Rewriter::default();
        let mut out = Vec::new();
        // The preface, SETTINGS, and half of the next frame's header.
        rewriter.push(&CODED[..24 + 9 + 4], &mut out).unwrap();
        assert_eq!(out, &CODED[..24 + 9]);
    }

    #[test]
    fn an_endless_header_block_is_refused() {
        let mut rewriter = Rewriter::default();
        let mut out = Vec::new();
        rewriter.push(&CODED[..24], &mut out).unwrap();
        let mut kind = HEADERS;
        let outcome = (0..6).try_for_each(|_| {
            let frame = [&[0, 0x3f, 0, kind, 0, 0, 0, 0, 1][..], &[b'%'; 0x3f00]].concat();
            kind = CONTINUATION;
            rewriter.push(&frame, &mut out)
        });
        assert_eq!(outcome, Err(BlockTooLarge));
        assert_eq!(out.len(), 24);
    }

    #[test]
    fn a_block_that_is_interrupted_goes_on_to_whom_it_concerns() {
        let mut rewriter = Rewriter::default();
        let mut out = Vec::new();
        let frames = [
            &CODED[..24],
            &[0, 0, 2, HEADERS, 0, 0, 0, 0, 1, 0x41, 0x03],
            &[0, 0, 1, 0, 0, 0, 0, 0, 1, b'%'],
        ]
        .concat();
        rewriter.push(&frames, &mut out).unwrap();
        assert_eq!(out, frames);
    }

    proptest! {
        #[test]
        fn the_stream_may_be_cut_anywhere(
            mut cuts in proptest::collection::vec(0..CODED.len(), 0..20),
        ) {
            cuts.sort_unstable();
            let mut rest = CODED;
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut - from);
                pieces.push(piece);
                rest = tail;
                from = cut;
            }
            pieces.push(rest);
            prop_assert_eq!(rewrite(&pieces), REWRITTEN);
        }

        #[test]
        fn no_bytes_make_it_panic_or_change_length(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            flags in any::<u8>(),
        ) {
            let length = u8::try_from(bytes.len() % 256).unwrap();
            let header = [0, 0, length, HEADERS, flags | END_HEADERS, 0, 0, 0, 1];
            let input = [&CODED[..24], &header, &bytes[..usize::from(length)]].concat();
            prop_assert_eq!(rewrite(&[&input]).len(), input.len());
        }
    }
}
