//! Streams over real sockets: who waits, who vanishes, and what that leaves to the others.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Client, Server};

fn usage(client: &mut Client) -> u64 {
    let status = client.ask(&json!({"type": "instance_status_request"}));
    status["meta"]["memory_usage"].as_u64().unwrap()
}

/// Until the server has noticed what another connection did; 100 ms are the promise.
#[track_caller]
fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(2), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn create(client: &mut Client, id: u64) {
    let reply = client.ask(&json!({"type": "create_stream_request", "object_id": id}));
    assert_eq!(reply, json!({"type": "create_stream_reply"}));
}

fn pull(id: u64) -> Value {
    json!({"type": "pull_next_stream_chunk_request", "id": id})
}

fn push(id: u64, chunk: u64) -> Value {
    json!({"type": "push_next_stream_chunk_request", "id": id, "chunk": chunk})
}

fn get(id: u64, size: u64) -> Value {
    json!({"type": "get_next_stream_chunk_request", "id": id, "size": size})
}

fn stop(id: u64) -> Value {
    json!({"type": "stop_stream_request", "id": id, "failed": false})
}

/// Asks for a chunk to write; its id.
fn write(client: &mut Client, id: u64, size: u64, with_arena: bool) -> u64 {
    let reply = client.ask(&get(id, size));
    assert_eq!(reply["type"], "get_next_stream_chunk_reply", "{reply}");
    assert_eq!(reply["fd"] != -1, with_arena);
    if with_arena {
        drop(client.receive_descriptor());
    }
    assert_eq!(reply["buffer"]["data_size"], size);
    reply["buffer"]["object_id"].as_u64().unwrap()
}

/// Whether the client is still waiting for its answer.
fn parked(server: &Server, client: &mut Client, request: &Value) {
    client.send(request.to_string().as_bytes());
    // Another conversation has come and gone meanwhile.
    for _ in 0..3 {
        server.registered().ask(&json!({"type": "debug_command"}));
    }
}

#[test]
fn a_chunk_goes_from_writer_to_reader_and_is_deleted_behind_it() {
    let server = Server::start();
    let (mut writer, mut reader) = (server.registered(), server.registered_rpc());
    create(&mut writer, 5);
    parked(&server, &mut reader, &pull(5));
    let first = write(&mut writer, 5, 100, true);
    let second = write(&mut writer, 5, 50, false);
    let got: Value = serde_json::from_str(&reader.receive()).unwrap();
    assert_eq!(got["chunk"], first);
    assert_eq!(usage(&mut writer), 150);
    assert_eq!(writer.ask(&stop(5))["type"], "stop_stream_reply");
    assert_eq!(reader.ask(&pull(5))["chunk"], second);
    assert_eq!(usage(&mut writer), 50);
    assert_eq!(
        reader.ask(&pull(5)),
        json!({"code": 42, "message": "Stream drained: no more chunks"})
    );
    assert_eq!(usage(&mut writer), 0);
}

#[test]
fn a_writer_waits_for_room_until_a_reader_makes_some() {
    let server = Server::with_limit(1000);
    let (mut writer, mut reader) = (server.registered(), server.registered());
    create(&mut writer, 5);
    let first = write(&mut writer, 5, 400, true);
    let second = write(&mut writer, 5, 399, false);
    parked(&server, &mut writer, &get(5, 100));
    assert_eq!(reader.ask(&stop(5))["code"], 44);
    let mut other = server.registered();
    assert_eq!(other.ask(&get(5, 1))["code"], 44);
    assert_eq!(reader.ask(&pull(5))["chunk"], first);
    assert_eq!(usage(&mut reader), 799);
    assert_eq!(reader.ask(&pull(5))["chunk"], second);
    let granted: Value = serde_json::from_str(&writer.receive()).unwrap();
    assert_eq!(granted["buffer"]["data_size"], 100);
    // What could never fit is not waited for.
    assert_eq!(writer.ask(&get(5, 800))["code"], 41);
}

#[test]
fn memory_that_others_free_is_room_for_a_waiting_writer() {
    let server = Server::with_limit(1000);
    let (mut writer, mut other) = (server.registered(), server.registered());
    let held = other.ask(&json!({"type": "create_buffer_request", "size": 750}));
    drop(other.receive_descriptor());
    create(&mut writer, 5);
    parked(&server, &mut writer, &get(5, 100));
    drop(other);
    let granted: Value = serde_json::from_str(&writer.receive()).unwrap();
    assert_eq!(granted["buffer"]["data_size"], 100);
    assert_ne!(granted["buffer"]["object_id"], held["id"]);
}

#[test]
fn a_reader_that_vanishes_while_it_waits_takes_no_chunk_with_it() {
    for is_remote in [false, true] {
        let server = Server::start();
        let (mut writer, mut reader) = (
            server.registered(),
            match is_remote {
                false => server.registered(),
                true => server.registered_rpc(),
            },
        );
        create(&mut writer, 5);
        let chunk = writer.ask(&json!({"type": "create_remote_buffer_request", "size": 0}));
        assert_eq!(chunk["type"], "create_buffer_reply");
        drop(writer.receive());
        parked(&server, &mut reader, &pull(5));
        drop(reader);
        // The stream goes with its reader, so the writer knows that nobody got the chunk.
        soon("the reader is forgotten", || {
            writer.ask(&json!({"type": "open_stream_request", "object_id": 5, "mode": 4}))["code"]
                == 12
        });
        assert_eq!(writer.ask(&push(5, 7))["code"], 12);
        assert_eq!(writer.ask(&stop(5))["code"], 12);
        create(&mut writer, 5);
        assert_eq!(
            writer.ask(&push(5, 7))["type"],
            "push_next_stream_chunk_reply"
        );
        assert_eq!(server.registered().ask(&pull(5))["chunk"], 7);
    }
}

#[test]
fn what_a_reader_and_its_stream_had_is_given_back_when_it_vanishes() {
    let server = Server::start();
    let (mut writer, mut reader) = (server.registered(), server.registered());
    create(&mut writer, 5);
    for size in [100, 200, 300] {
        write(&mut writer, 5, size, size == 100);
    }
    assert!(reader.ask(&pull(5))["chunk"].is_u64());
    assert_eq!(usage(&mut writer), 600);
    drop(reader);
    soon("its chunks are deleted", || usage(&mut writer) == 0);
}

#[test]
fn a_writer_that_vanishes_gives_its_half_written_chunk_back_and_no_more() {
    let server = Server::with_limit(1000);
    let (mut writer, mut reader) = (server.registered(), server.registered());
    create(&mut writer, 5);
    let first = write(&mut writer, 5, 100, true);
    write(&mut writer, 5, 200, false);
    drop(writer);
    soon("the chunk is given back", || usage(&mut reader) == 100);
    let mut next = server.registered();
    let third = write(&mut next, 5, 30, true);
    assert_eq!(reader.ask(&pull(5))["chunk"], first);
    assert_eq!(next.ask(&stop(5))["type"], "stop_stream_reply");
    assert_eq!(reader.ask(&pull(5))["chunk"], third);
    assert_eq!(reader.ask(&pull(5))["code"], 42);
    // One that vanishes while it waits leaves its place to the next.
    create(&mut next, 6);
    write(&mut next, 6, 700, false);
    let mut waiting = server.registered();
    parked(&server, &mut waiting, &get(6, 200));
    assert_eq!(next.ask(&get(6, 1))["code"], 44);
    drop(waiting);
    soon("the waiting writer is forgotten", || {
        next.ask(&get(6, 1)).get("code").is_none()
    });
}

#[test]
fn those_who_wait_are_told_when_a_stream_is_dropped() {
    let server = Server::with_limit(1000);
    let mut other = server.registered();
    let (mut writer, mut reader) = (server.registered(), server.registered());
    create(&mut other, 5);
    create(&mut other, 6);
    write(&mut writer, 5, 790, true);
    parked(&server, &mut writer, &get(5, 20));
    parked(&server, &mut reader, &pull(6));
    let drop_stream = |id| json!({"type": "drop_stream_request", "id": id});
    for id in [5, 6] {
        assert_eq!(
            other.ask(&drop_stream(id)),
            json!({"type": "drop_stream_reply"})
        );
        assert_eq!(other.ask(&drop_stream(id))["code"], 12);
    }
    for client in [&mut writer, &mut reader] {
        let told: Value = serde_json::from_str(&client.receive()).unwrap();
        assert_eq!(told, json!({"code": 43, "message": "Stream source failed"}));
    }
    assert_eq!(usage(&mut other), 0);
}
