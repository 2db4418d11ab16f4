//! Compressed bytes of remote blobs: what arrives is what was sent, and who breaks the rules
//! breaks off alone.

use serde_json::{Value, json};
use vinelet::shard::protocol::zstd::{MAX_CHUNK, Packer, Unpacker};

use crate::server::{Client, LIMIT, Server, frame};

const FRAME: &[u8] = b"\x28\xb5\x2f\xfd\x00\x58";

fn usage(client: &mut Client) -> u64 {
    let status = client.ask(&json!({"type": "instance_status_request"}));
    status["meta"]["memory_usage"].as_u64().unwrap()
}

/// Announces blobs of these sizes; their ids.
fn announce(client: &mut Client, sizes: &[u64]) -> Vec<u64> {
    let request =
        json!({"type": "create_remote_buffers_request", "sizes": sizes, "compress": true});
    let reply = client.ask(&request);
    serde_json::from_value(reply["ids"].clone()).unwrap()
}

fn download(client: &mut Client, ids: &[u64], sizes: &[usize]) -> Vec<Vec<u8>> {
    let request = json!({"type": "get_remote_buffers_request", "ids": ids, "compress": true});
    let reply = client.ask(&request);
    assert_eq!(
        (&reply["compress"], &reply["num"]),
        (&true.into(), &ids.len().into())
    );
    let mut unpacker = Unpacker::default();
    let mut blob_of = |&size: &usize| {
        let mut blob = Vec::new();
        while blob.len() < size {
            let mut length = [0; 8];
            client.receive_raw(&mut length);
            assert!(u64::from_le_bytes(length) <= MAX_CHUNK);
            let mut chunk = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap()];
            client.receive_raw(&mut chunk);
            unpacker.feed(&chunk);
            while let Some(block) = unpacker.next_block().unwrap() {
                blob.extend_from_slice(block);
            }
        }
        blob
    };
    sizes.iter().map(&mut blob_of).collect()
}

#[test]
fn compressed_bytes_arrive_as_they_were_sent() {
    arrive_as_they_were_sent(&Server::start());
}

#[test]
fn compressed_bytes_go_to_disk_and_come_from_there() {
    let server = Server::spilling();
    // Memory is full of what is held: whatever else there is has to be on disk.
    let mut other = server.registered();
    let reply = other.ask(&json!({"type": "create_buffer_request", "size": LIMIT}));
    assert_eq!(reply["type"], "create_buffer_reply", "{reply}");
    drop(other.receive_descriptor());
    arrive_as_they_were_sent(&server);
}

fn arrive_as_they_were_sent(server: &Server) {
    let mut client = server.registered_rpc();
    let before = usage(&mut client);
    let blobs: Vec<Vec<u8>> = [1, 0, 131_072, 131_073, 1_000_000]
        .into_iter()
        .map(|size: usize| (0..size).map(|at| (at * at % 253) as u8).collect())
        .collect();
    let sizes: Vec<u64> = blobs.iter().map(|blob| blob.len() as u64).collect();
    let ids = announce(&mut client, &sizes);
    let (mut packer, mut out) = (Packer::default(), Vec::new());
    for piece in blobs.iter().flat_map(|blob| blob.chunks(Packer::MOST)) {
        packer.chunk(piece, &mut out);
    }
    client.send_raw(&out);
    assert!(client.receive().contains("create_buffers_reply"));
    let lengths: Vec<usize> = blobs.iter().map(Vec::len).collect();
    assert!(download(&mut client, &ids, &lengths) == blobs);
    let is_full = before == LIMIT;
    let in_memory = if is_full { 0 } else { sizes.iter().sum() };
    assert_eq!(usage(&mut client), before + in_memory);
}

#[test]
fn whoever_sends_garbage_loses_its_connection_and_its_blobs() {
    let server = Server::start();
    let mut other = server.registered();
    let chunk = |bytes: &[u8]| frame(&[FRAME, bytes].concat());
    for bytes in [
        // Lengths of chunks.
        0_u64.to_le_bytes().to_vec(),
        (MAX_CHUNK + 1).to_le_bytes().to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        // No frame, and frames that ask for too much.
        frame(b"garbage"),
        frame(&[0xff; 1000]),
        frame(b"\x28\xb5\x2f\xfd\x00\xff"),
        frame(b"\x28\xb5\x2f\xfd\x03\x58\x01\x02\x03\x04\x05"),
        // Blocks: too long for anybody, and for the blob; of no kind; cut at the blob's end.
        chunk(b"\xff\xff\xff"),
        chunk(b"\x5a\x00\x00x"),
        chunk(b"\x06\x00\x00"),
        chunk(b"\x52\x00\x00x\x50\x00"),
        // A gigabyte from a few bytes.
        chunk(&b"\x02\x00\x10x".repeat(8192)),
        // Compressed blocks that are none.
        chunk(b"\x24\x00\x00\xff\xff\xff\xff"),
        chunk(b"\x44\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"),
    ] {
        let mut client = server.registered_rpc();
        announce(&mut client, &[10]);
        client.send_raw(&bytes);
        assert!(
            client.is_closed_by_server(),
            "{:?}",
            &bytes[..bytes.len().min(40)]
        );
        assert!(other.ask(&json!({"type": "debug_command"}))["code"] == Value::Null);
    }
    // One that says nothing of use for ever takes nobody's time but its own.
    let mut client = server.registered_rpc();
    announce(&mut client, &[10]);
    client.send_raw(&chunk(&[0; 3 * 40_000]));
    client.send_raw(&frame(&[0; 3 * 40_000]));
    assert_eq!(usage(&mut other), 10);
    drop(client);
    let begin = std::time::Instant::now();
    while usage(&mut other) > 0 {
        assert!(begin.elapsed().as_secs() < 5, "half an upload stays");
    }
}
