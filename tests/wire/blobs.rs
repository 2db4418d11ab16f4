//! Descriptors beside the replies, and bytes behind them.

use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::server::{Client, Server};

fn create(client: &mut Client, size: u64) -> Value {
    client.ask(&json!({"type": "create_buffer_request", "size": size}))
}

fn usage(client: &mut Client) -> Value {
    client.ask(&json!({"type": "instance_status_request"}))["meta"]["memory_usage"].clone()
}

#[test]
fn a_region_is_passed_once_per_connection_and_never_for_the_empty_blob() {
    let server = Server::start();
    let mut client = server.registered();
    let empty = create(&mut client, 0);
    assert_eq!(
        (&empty["fd"], &empty["created"]["store_fd"]),
        (&json!(-1), &json!(-1))
    );

    let first = create(&mut client, 10);
    let arena = client.receive_descriptor();
    assert_eq!(first["fd"], first["created"]["store_fd"]);
    // The next reply follows at once: nothing lies between.
    assert_eq!(create(&mut client, 10)["fd"], -1);
    let many = client.ask(&json!({"type": "create_buffers_request", "sizes": [1, 0, 2]}));
    assert_eq!((&many["fds"], &many["num"]), (&json!([]), &json!(3)));

    let mut other = server.registered();
    let ids = json!([first["id"], empty["id"]]);
    let got = other.ask(&json!({"type": "get_buffers_request", "ids": ids, "unsafe": true}));
    assert_eq!(got["fds"], json!([first["fd"]]));
    assert_eq!(
        other.receive_descriptor().metadata().unwrap().ino(),
        arena.metadata().unwrap().ino()
    );
    let again = other.ask(&json!({"type": "get_buffers_request", "ids": ids, "unsafe": true}));
    assert_eq!(again["fds"], json!([]));

    let mut third = server.registered();
    let empty_only = json!({"type": "get_buffers_request", "ids": [empty["id"]]});
    assert_eq!(third.ask(&empty_only)["fds"], json!([]));
    let many = third.ask(&json!({"type": "create_buffers_request", "sizes": [0, 1, 2]}));
    assert_eq!(many["fds"], json!([first["fd"]]));
    third.receive_descriptor();
    assert!(third.rest().is_empty());
}

#[test]
fn the_descriptor_follows_its_reply_and_precedes_the_next() {
    let server = Server::start();
    let mut client = server.registered();
    // Both requests at once: the byte has to stand between the replies.
    let request = br#"{"type":"create_buffer_request","size":64}"#;
    let mut both = crate::server::frame(request);
    both.extend_from_slice(&crate::server::frame(request));
    client.send_raw(&both);
    let first: Value = serde_json::from_str(&client.receive()).unwrap();
    assert_ne!(first["fd"], -1);
    client.receive_descriptor();
    let second: Value = serde_json::from_str(&client.receive()).unwrap();
    assert_eq!(second["fd"], -1);
}

#[test]
fn what_one_client_writes_another_reads_from_the_same_memory() {
    let server = Server::start();
    let mut writer = server.registered();
    let blob = create(&mut writer, 4096);
    let arena = writer.receive_descriptor();
    let offset = blob["created"]["data_offset"].as_u64().unwrap();
    let content: Vec<u8> = (0..=255).cycle().take(4096).collect();
    arena.write_all_at(&content, offset).unwrap();
    let id = &blob["id"];
    let unsealed = writer.ask(&json!({"type": "get_buffers_request", "ids": [id]}));
    assert_eq!(unsealed["code"], 14);
    assert_eq!(
        writer.ask(&json!({"type": "seal_request", "object_id": id}))["type"],
        "seal_reply"
    );

    // Over the UNIX socket, and over TCP.
    let mut reader = server.registered();
    let got = reader.ask(&json!({"type": "get_buffers_request", "ids": [id]}));
    let mut read = vec![0; 4096];
    let at = got["payloads"][0]["data_offset"].as_u64().unwrap();
    reader
        .receive_descriptor()
        .read_exact_at(&mut read, at)
        .unwrap();
    assert_eq!(read, content);

    let mut remote = server.registered_rpc();
    let got = remote.ask(&json!({"type": "get_remote_buffers_request", "num": 1, "0": id}));
    assert_eq!((&got["fds"], &got["num"]), (&json!([]), &json!(1)));
    remote.receive_raw(&mut read);
    assert_eq!(read, content);
}

#[test]
fn over_tcp_no_descriptor_is_announced_or_sent() {
    let server = Server::start();
    let mut client = server.registered_rpc();
    assert_eq!(create(&mut client, 64)["fd"], -1);
    let many = client.ask(&json!({"type": "create_buffers_request", "sizes": [1]}));
    assert_eq!(many["fds"], json!([]));
    let id = &many["ids"][0];
    let got = client.ask(&json!({"type": "get_buffers_request", "ids": [id], "unsafe": true}));
    assert_eq!((&got["fds"], &got["num"]), (&json!([]), &json!(1)));
    assert!(client.rest().is_empty());
}

#[test]
fn bytes_travel_in_any_portions() {
    let server = Server::start();
    let mut client = server.registered_rpc();
    let content: Vec<u8> = (0..3_000_001_u32).map(|at| (at % 251) as u8).collect();
    client.send(
        json!({"type": "create_remote_buffer_request", "size": content.len()})
            .to_string()
            .as_bytes(),
    );
    let go_ahead = client.receive();
    for portion in content.chunks(100_003) {
        client.send_raw(portion);
    }
    let done = client.receive();
    assert_eq!(go_ahead, done);
    let created: Value = serde_json::from_str(&done).unwrap();
    assert_eq!(created["created"]["is_sealed"], true);

    let id = &created["id"];
    client.send(
        json!({"type": "get_remote_buffers_request", "ids": [id, id]})
            .to_string()
            .as_bytes(),
    );
    let reply: Value = serde_json::from_str(&client.receive()).unwrap();
    assert_eq!(reply["num"], 2);
    let mut received = vec![0; content.len()];
    for _ in 0..2 {
        client.receive_raw(&mut received);
        assert!(received == content);
    }
    // Neither of the two made the connection a holder for good.
    let held = client.ask(&json!({"type": "release_request", "object_id": id}));
    assert_eq!(
        held,
        json!({"code": 2, "message": "DependencyTracker: connection not exist."})
    );
}

#[test]
fn an_upload_and_the_request_after_it_may_arrive_together() {
    let server = Server::start();
    let mut client = server.registered_rpc();
    let request = json!({"type": "create_remote_buffers_request", "sizes": [3, 0, 4]}).to_string();
    let mut bytes = crate::server::frame(request.as_bytes());
    bytes.extend_from_slice(b"onefour");
    bytes.extend_from_slice(&crate::server::frame(br#"{"type":"debug_command"}"#));
    client.send_raw(&bytes);
    assert_eq!(client.receive(), client.receive());
    assert_eq!(client.receive(), r#"{"result":null,"type":"debug_reply"}"#);
}

#[test]
fn an_upload_broken_off_gives_its_memory_back() {
    let server = Server::start();
    let mut health = server.registered();
    let mut client = server.registered_rpc();
    client.ask(&json!({"type": "create_remote_buffer_request", "size": 1_000_000}));
    assert_eq!(usage(&mut health), 1_000_000);
    client.send_raw(&[1; 1000]);
    assert!(client.rest().is_empty());
    assert_eq!(usage(&mut health), 0);
}

#[test]
fn a_blob_dropped_during_its_upload_is_an_error_and_not_a_wrong_turn() {
    let server = Server::start();
    let mut client = server.registered_rpc();
    let created = client.ask(&json!({"type": "create_remote_buffer_request", "size": 8}));
    let mut other = server.registered();
    let dropped = other.ask(&json!({"type": "drop_buffer_request", "id": created["id"]}));
    assert_eq!(dropped["type"], "drop_buffer_reply");
    client.send_raw(&[7; 8]);
    let reply: Value = serde_json::from_str(&client.receive()).unwrap();
    assert_eq!(reply["code"], 12, "{reply}");
    assert_eq!(
        client.ask(&json!({"type": "debug_command"}))["type"],
        "debug_reply"
    );
    assert_eq!(usage(&mut other), 0);
}

#[test]
fn an_upload_that_does_not_fit_is_refused_before_its_bytes() {
    let server = Server::with_limit(1 << 20);
    let mut client = server.registered_rpc();
    let refused = client.ask(&json!({"type": "create_remote_buffer_request", "size": 2 << 20}));
    assert_eq!(refused["code"], 41);
    assert_eq!(
        client.ask(&json!({"type": "debug_command"}))["type"],
        "debug_reply"
    );
    let unsealed = create(&mut client, 10);
    let refused =
        client.ask(&json!({"type": "get_remote_buffers_request", "ids": [unsealed["id"]]}));
    assert_eq!(
        refused,
        json!({"code": 2, "message": "Failed to get objects"})
    );
}

#[test]
fn what_a_dead_client_had_not_sealed_is_given_back() {
    let server = Server::start();
    let mut health = server.registered();
    let mut client = server.registered();
    let sealed = create(&mut client, 1000);
    client.receive_descriptor();
    client.ask(&json!({"type": "seal_request", "object_id": sealed["id"]}));
    create(&mut client, 5000);
    assert_eq!(usage(&mut health), 6000);
    assert!(client.rest().is_empty());
    assert_eq!(usage(&mut health), 1000);
}
