//! Requests that are answered later, clients that do not wait for it, and servers that stop.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vinelet::shard::client::Client as OurClient;

use crate::server::{Client, Server};

fn status(client: &mut Client) -> Value {
    client.ask(&json!({"type": "instance_status_request"}))["meta"].clone()
}

/// Until the server has noticed what another connection did.
#[track_caller]
fn eventually(client: &mut Client, field: &str, expected: u64) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while status(client)[field] != expected {
        assert!(Instant::now() < deadline, "{}", status(client));
        std::thread::sleep(Duration::from_millis(1));
    }
}

const WAIT: &str = r#"{"type":"get_name_request","name":"later","wait":true}"#;

fn name_an_object(client: &mut Client) -> Value {
    let content =
        json!({"typename": "t", "instance_id": 0, "transient": true, "global": false, "nbytes": 0});
    let id = client.ask(&json!({"type": "create_data_request", "content": content}))["id"].clone();
    client.ask(&json!({"type": "persist_request", "id": id}));
    let named = client.ask(&json!({"type": "put_name_request", "object_id": id, "name": "later"}));
    assert_eq!(named["type"], "put_name_reply");
    id
}

#[test]
fn a_request_waits_until_what_it_waits_for_is_there() {
    let server = Server::start();
    let mut other = server.registered();
    let mut waiting = server.registered();
    waiting.send(WAIT.as_bytes());
    eventually(&mut other, "deferred_requests", 1);
    let id = name_an_object(&mut other);
    assert_eq!(
        waiting.receive(),
        json!({"object_id": id, "type": "get_name_reply"}).to_string()
    );
    assert_eq!(status(&mut other)["deferred_requests"], 0);

    let found = waiting.ask(&json!({"type": "get_data_request", "id": [id], "wait": true}));
    assert!(found["content"].is_object());
}

#[test]
fn a_client_that_goes_while_it_waits_is_forgotten() {
    let server = Server::start();
    let mut other = server.registered();
    let mut waiting = server.registered();
    waiting.send(WAIT.as_bytes());
    let mut remote = server.registered_rpc();
    remote.send(br#"{"type":"get_data_request","id":[5],"wait":true}"#);
    eventually(&mut other, "deferred_requests", 2);
    // What it has sent ahead does not hide that it has gone.
    waiting.send(br#"{"type":"clear_request"}"#);
    drop(waiting);
    drop(remote);
    eventually(&mut other, "deferred_requests", 0);
    eventually(&mut other, "ipc_connections", 1);
    eventually(&mut other, "rpc_connections", 0);
}

#[test]
fn requests_sent_ahead_are_answered_in_their_order() {
    let server = Server::start();
    let mut other = server.registered();
    let mut waiting = server.registered();
    waiting.send(WAIT.as_bytes());
    for _ in 0..3 {
        waiting.send(br#"{"type":"debug_command"}"#);
    }
    eventually(&mut other, "deferred_requests", 1);
    name_an_object(&mut other);
    assert!(waiting.receive().contains("get_name_reply"));
    for _ in 0..3 {
        assert!(waiting.receive().contains("debug_reply"));
    }
}

#[test]
fn a_stopping_server_ends_idle_and_waiting_connections_at_once() {
    let mut server = Server::start();
    let mut idle = server.registered();
    let mut waiting = server.registered_rpc();
    waiting.send(WAIT.as_bytes());
    eventually(&mut idle, "deferred_requests", 1);
    let begin = Instant::now();
    server.ask_to_stop();
    assert!(idle.is_closed_by_server());
    assert!(waiting.is_closed_by_server());
    server.stop().unwrap();
    assert!(
        begin.elapsed() < Duration::from_millis(900),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_stopping_server_lets_a_request_in_hand_finish_but_not_for_long() {
    let mut server = Server::start();
    let mut half = server.registered();
    let mut never = server.registered();
    let request = crate::server::frame(br#"{"type":"debug_command"}"#);
    half.send_raw(&request[..12]);
    never.send_raw(&request[..12]);
    // Both halves have been read when another client, later, is answered.
    std::thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    server.ask_to_stop();
    std::thread::sleep(Duration::from_millis(100));
    half.send_raw(&request[12..]);
    assert_eq!(half.receive(), r#"{"result":null,"type":"debug_reply"}"#);
    assert!(half.is_closed_by_server());
    server.stop().unwrap();
    let elapsed = begin.elapsed();
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
    assert!(never.is_closed_by_server());
}

#[test]
fn our_client_asks_for_the_figures_through_the_real_socket() {
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut client = OurClient::connect_ipc(&server.socket).await.unwrap();
        assert_eq!(client.registered().version, "0.24.2");
        assert_eq!(
            client.registered().ipc_socket,
            server.socket.to_string_lossy()
        );
        let status = client.status().await.unwrap();
        assert_eq!(
            (status.memory_limit, status.memory_usage),
            (crate::server::LIMIT, 0)
        );
        assert_eq!((status.ipc_connections, status.rpc_connections), (1, 0));
        let nobody = OurClient::connect_ipc(&server.socket.with_extension("no")).await;
        assert!(
            nobody
                .unwrap_err()
                .to_string()
                .starts_with("connecting to ")
        );
    });
}
