//! Frames of the original library, and frames that mean harm.

use proptest::prelude::*;

use super::*;

const DELETION: &[u8] = include_bytes!("../../../../tests/data/transcripts/deletion.jsonl");
const PANDAS: &[u8] = include_bytes!("../../../../tests/data/transcripts/pandas_frames.jsonl");

/// All that a frame says, fed in pieces of `piece` bytes.
fn unpack(frame: &[u8], piece: usize) -> Result<Vec<u8>, ZstdError> {
    let (mut unpacker, mut all) = (Unpacker::default(), Vec::new());
    for piece in frame.chunks(piece) {
        unpacker.feed(piece);
        while let Some(block) = unpacker.next_block()? {
            all.extend_from_slice(block);
        }
    }
    assert!(!unpacker.is_in_midst());
    Ok(all)
}

#[test]
fn frames_of_the_original_library_are_understood_from_any_cut() {
    // `zstd -1`, `-3`, `-19`, and `-5 --check`: all kinds of literals, tables and matches.
    for (frame, text) in [
        (
            &include_bytes!("../../../../tests/data/zstd/deletion.1.zst")[..],
            DELETION,
        ),
        (
            &include_bytes!("../../../../tests/data/zstd/deletion.3.zst")[..],
            DELETION,
        ),
        (
            &include_bytes!("../../../../tests/data/zstd/deletion.19.zst")[..],
            DELETION,
        ),
        (
            &include_bytes!("../../../../tests/data/zstd/pandas_frames.check.zst")[..],
            PANDAS,
        ),
    ] {
        for piece in [1, 1000, usize::MAX] {
            assert!(unpack(frame, piece).unwrap() == text);
        }
        // Two frames are what both say.
        assert!(unpack(&[frame, frame].concat(), 5000).unwrap() == [text, text].concat());
    }
}

#[test]
fn a_blob_of_one_byte_repeated_is_flushed_and_the_frame_goes_on() {
    // Recorded: three blobs of 10, 20 and 30 bytes, uploaded by the official client.
    let chunks: [&[u8]; 3] = [
        b"\x28\xb5\x2f\xfd\x00\x58\x50\x00\x00\n\n\n\n\n\n\n\n\n\n",
        b"\xa2\x00\x00\x14",
        b"\xf2\x00\x00\x1e",
    ];
    let mut unpacker = Unpacker::default();
    for (chunk, (byte, size)) in chunks.into_iter().zip([(10, 10), (20, 20), (30, 30)]) {
        unpacker.feed(chunk);
        assert_eq!(unpacker.next_block(), Ok(Some(&vec![byte; size][..])));
        assert_eq!(unpacker.next_block(), Ok(None));
    }
    // And 65536 bytes, recorded too.
    let packed = b"\x28\xb5\x2f\xfd\x00\x58\x54\x00\x00\x10\x00\x00\x01\x00\xfb\x7f\x1d\x60\x01";
    assert_eq!(unpack(packed, 7).unwrap(), [0; 65536]);
}

#[test]
fn what_asks_for_too_much_is_refused() {
    for (frame, error) in [
        (&b"\x1f\x8b"[..], ZstdError::NoFrame),
        (
            b"\x28\xb5\x2f\xfd\x00\xf8",
            ZstdError::Refused("window beyond 8 MiB"),
        ),
        (
            b"\x28\xb5\x2f\xfd\xe0\xff\xff\xff\xff\xff\xff\xff\xff",
            ZstdError::Refused("window beyond 8 MiB"),
        ),
        (
            b"\x28\xb5\x2f\xfd\x01\x58\x05",
            ZstdError::Refused("dictionary"),
        ),
        (
            b"\x28\xb5\x2f\xfd\x00\x58\xff\xff\xff",
            ZstdError::Corrupt("a block is too long"),
        ),
        (
            b"\x28\xb5\x2f\xfd\x00\x58\x06\x00\x00",
            ZstdError::Corrupt("a block is of no kind"),
        ),
    ] {
        assert_eq!(unpack(frame, usize::MAX), Err(error));
    }
}

#[test]
fn memory_follows_the_window_however_much_is_said() {
    let mut unpacker = Unpacker::default();
    unpacker.feed(b"\x28\xb5\x2f\xfd\x00\x58");
    let (mut total, block) = (0, [0x02, 0x00, 0x10, 7]);
    for _ in 0..2000 {
        unpacker.feed(&block);
        total += unpacker.next_block().unwrap().unwrap().len();
    }
    assert_eq!(total, 2000 * MAX_BLOCK);
    assert!(unpacker.output.capacity() < 16 << 20);
}

#[test]
fn packed_bytes_are_what_they_were() {
    let mut packer = Packer::default();
    let blobs: [&[u8]; 4] = [&[7; Packer::MOST], DELETION, b"x", b"abc"];
    let mut unpacker = Unpacker::default();
    for blob in blobs {
        let mut out = Vec::new();
        packer.chunk(blob, &mut out);
        let (length, chunk) = out.split_first_chunk().unwrap();
        assert_eq!(u64::from_le_bytes(*length), chunk.len() as u64);
        assert!(chunk.len() as u64 <= MAX_CHUNK);
        unpacker.feed(chunk);
        assert!(unpacker.next_block().unwrap() == Some(blob));
    }
}

proptest! {
    #[test]
    fn damaged_frames_end_in_an_error_or_in_other_bytes(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut frame = include_bytes!("../../../../tests/data/zstd/deletion.3.zst").to_vec();
        for (at, byte) in changes {
            *at.get_mut(&mut frame) = byte;
        }
        frame.truncate(cut.index(frame.len()) + 1);
        let mut unpacker = Unpacker::default();
        unpacker.feed(&frame);
        let mut blocks = 0;
        while let Ok(Some(_)) = unpacker.next_block() {
            blocks += 1;
            prop_assert!(blocks <= frame.len());
        }
    }
}
