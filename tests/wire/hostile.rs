//! Clients that mean harm, or are broken. Each costs itself its connection at most: after every
//! one of them another client is served, at once.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Client, Server, frame};

const ALIVE: &str = r#"{"type":"instance_status_request"}"#;

/// Another client is served, and fast.
#[track_caller]
fn healthy(server: &Server) {
    let begin = Instant::now();
    let mut client = server.registered();
    assert!(client.ask_text(ALIVE).contains("instance_status_reply"));
    let elapsed = begin.elapsed();
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
}

/// `body` is answered with an error of code `code`, and the connection stays.
#[track_caller]
fn refused(server: &Server, client: &mut Client, body: &[u8], code: u64) {
    client.send(body);
    let reply: Value = serde_json::from_str(&client.receive()).unwrap();
    let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
    assert_eq!(reply["code"], code, "{shown}: {reply}");
    assert!(reply["message"].is_string() && reply.get("type").is_none());
    assert!(reply["message"].as_str().unwrap().len() < 1000);
    healthy(server);
}

#[test]
fn bodies_that_are_no_requests_are_answered_and_forgotten() {
    let server = Server::start();
    for mut client in [
        server.ipc(),
        server.rpc(),
        server.registered(),
        server.registered_rpc(),
    ] {
        for body in [
            &b""[..],
            b"not json",
            b"null",
            b"5",
            b"[]",
            b"\"x\"",
            br#"{"type":5}"#,
            br#"{"type":null}"#,
            br#"{"type":{}}"#,
            br#"{"type":["register_request"]}"#,
            b"{\"type\":\"\xff\xfe\"}",
            b"\x00\x01\x02\x80\xff",
            br#"{"type":"\ud800"}"#,
            br#"{"type":"no_such_request"}"#,
            br#"{"type":"register_request","session_id":"x"}"#,
            br#"{"type":"register_request","version":null}"#,
        ] {
            refused(&server, &mut client, body, 1);
        }
        let deep = [vec![b'['; 200_000], vec![b']'; 200_000]].concat();
        refused(&server, &mut client, &deep, 1);
        refused(&server, &mut client, &vec![b'{'; 200_000], 1);
        refused(&server, &mut client, &br#"{"type":"#.repeat(100_000), 1);
        refused(&server, &mut client, &vec![b'1'; 4 << 20], 1);
        client.register();
    }
}

#[test]
fn requests_with_wrong_fields_are_answered_and_forgotten() {
    let server = Server::start();
    let mut client = server.registered();
    for (body, code) in [
        (r#"{"type":"create_buffer_request"}"#, 1),
        (r#"{"type":"create_buffer_request","size":"5"}"#, 1),
        (
            r#"{"type":"create_buffer_request","size":9223372036854775813}"#,
            41,
        ),
        (r#"{"type":"create_buffer_request","size":-1}"#, 41),
        (
            r#"{"type":"create_buffers_request","sizes":[18446744073709551615,1]}"#,
            41,
        ),
        (
            r#"{"type":"create_buffers_request","sizes":[9223372036854775807,9223372036854775807,9223372036854775807]}"#,
            41,
        ),
        (r#"{"type":"create_remote_buffer_request","size":-1}"#, 41),
        (
            r#"{"type":"get_buffers_request","num":18446744073709551615,"0":1}"#,
            1,
        ),
        (r#"{"type":"create_data_request"}"#, 1),
        (r#"{"type":"create_data_request","content":5}"#, 21),
        (r#"{"type":"create_data_request","content":null}"#, 21),
        (
            r#"{"type":"create_data_request","content":{"typename":5,"instance_id":0}}"#,
            21,
        ),
        (
            r#"{"type":"create_data_request","content":{"typename":"t","instance_id":0,"signature":"x"}}"#,
            21,
        ),
        (r#"{"type":"create_datas_request","contents":{}}"#, 1),
        (
            r#"{"type":"label_request","id":5,"keys":["a"],"values":[]}"#,
            1,
        ),
        (r#"{"type":"shallow_copy_request","id":5,"extra":null}"#, 1),
        (r#"{"type":"plasma_seal_request","plasma_id":"x"}"#, 6),
        (r#"{"type":"plasma_release_request","plasma_id":"x"}"#, 6),
        (
            r#"{"type":"plasma_delete_data_request","plasma_id":"x"}"#,
            6,
        ),
        (
            r#"{"type":"create_buffer_by_plasma_request","plasma_id":"x","size":8,"plasma_size":8}"#,
            6,
        ),
        (r#"{"type":"get_buffers_by_plasma_request","num":0}"#, 6),
        (r#"{"type":"delete_session_request"}"#, 6),
        (r#"{"type":"create_stream_request"}"#, 1),
        (r#"{"type":"create_stream_request","object_id":"x"}"#, 1),
        (r#"{"type":"create_stream_request","object_id":1e300}"#, 1),
        (r#"{"type":"open_stream_request","object_id":5}"#, 1),
        (
            r#"{"type":"open_stream_request","object_id":5,"mode":"r"}"#,
            1,
        ),
        (
            r#"{"type":"open_stream_request","object_id":-1,"mode":-1}"#,
            12,
        ),
        (r#"{"type":"get_next_stream_chunk_request","id":5}"#, 1),
        (
            r#"{"type":"get_next_stream_chunk_request","id":5,"size":-1}"#,
            12,
        ),
        (
            r#"{"type":"push_next_stream_chunk_request","id":5,"chunk":null}"#,
            1,
        ),
        (
            r#"{"type":"push_next_stream_chunk_request","id":5,"chunk":-1}"#,
            12,
        ),
        (r#"{"type":"pull_next_stream_chunk_request","id":[]}"#, 1),
        (r#"{"type":"pull_next_stream_chunk_request","id":-1}"#, 12),
        (r#"{"type":"stop_stream_request","id":5}"#, 1),
        (r#"{"type":"stop_stream_request","id":5,"failed":1}"#, 1),
        (r#"{"type":"stop_stream_request","id":5,"failed":true}"#, 12),
        (r#"{"type":"drop_stream_request","id":5}"#, 12),
        (
            r#"{"type":"create_remote_buffer_request","size":5,"compress":1}"#,
            1,
        ),
        (
            r#"{"type":"create_remote_buffer_request","size":-1,"compress":true}"#,
            41,
        ),
        (
            r#"{"type":"get_remote_buffers_request","ids":5,"compress":true}"#,
            1,
        ),
        (
            r#"{"type":"create_remote_buffer_request","size":5,"use_rdma":true}"#,
            6,
        ),
        (r#"{"type":"release_lock_request","key":"k"}"#, 6),
        (r#"{"type":"request_fd_request"}"#, 1),
        (r#"{"type":"create_gpu_buffer_request","size":10}"#, 1),
        (r#"{"type":"get_gpu_buffers_request","num":0}"#, 1),
    ] {
        refused(&server, &mut client, body.as_bytes(), code);
    }
    let deep = format!(
        r#"{{"type":"create_data_request","content":{}1{}}}"#,
        r#"{"m":"#.repeat(50_000),
        "}".repeat(50_000)
    );
    refused(&server, &mut client, deep.as_bytes(), 1);
}

#[test]
fn streams_of_any_id_and_size_are_only_streams() {
    let server = Server::start();
    let mut client = server.registered();
    for id in ["0", "-1", "18446744073709551615", "9223372036854775808"] {
        let ask = |client: &mut Client, command: &str, rest: &str| {
            let body = format!(r#"{{"type":"{command}",{rest}}}"#);
            serde_json::from_str::<Value>(&client.ask_text(&body)).unwrap()["code"].clone()
        };
        let (named, of) = (format!(r#""object_id":{id}"#), format!(r#""id":{id}"#));
        assert!(ask(&mut client, "create_stream_request", &named).is_null());
        assert_eq!(ask(&mut client, "create_stream_request", &named), 11);
        let huge = format!(r#"{of},"size":-1"#);
        assert_eq!(ask(&mut client, "get_next_stream_chunk_request", &huge), 41);
        let itself = format!(r#"{of},"chunk":{id}"#);
        for _ in 0..3 {
            assert!(ask(&mut client, "push_next_stream_chunk_request", &itself).is_null());
        }
        for _ in 0..3 {
            assert!(ask(&mut client, "pull_next_stream_chunk_request", &of).is_null());
        }
        assert!(ask(&mut client, "drop_stream_request", &of).is_null());
        healthy(&server);
    }
}

#[test]
fn before_it_registers_a_client_is_told_to() {
    let server = Server::start();
    let mut client = server.ipc();
    for command in ["exit_request", "create_buffer_request", "bogus"] {
        let reply = client.ask(&json!({"type": command}));
        let text = format!("The connection is not registered yet, command is: {command}");
        assert_eq!(reply, json!({"code": 1, "message": text}));
    }
    client.register();
    client.register();
    client.send(br#"{"type":"exit_request"}"#);
    assert!(client.is_closed_by_server());
}

#[test]
fn a_session_that_is_not_there_is_refused_where_it_is_asked_for() {
    let server = Server::start();
    let request = json!({"type": "register_request", "session_id": 5});
    let mut remote = server.rpc();
    let refused = remote.ask(&request);
    assert_eq!(
        refused,
        json!({"code": 1, "message": "Session (sid = S0000000000000005) not exit"})
    );
    assert_eq!(remote.ask(&json!({"type": "debug_command"}))["code"], 1);
    assert_eq!(server.ipc().ask(&request)["session_id"], 0);
}

#[test]
fn a_length_beyond_the_limit_ends_the_connection_without_a_word() {
    let server = Server::start();
    for length in [(256 << 20) + 1, 1 << 60, i64::MAX as u64, u64::MAX] {
        for mut client in [server.ipc(), server.registered_rpc()] {
            client.send_raw(&length.to_le_bytes());
            assert!(client.is_closed_by_server());
            healthy(&server);
        }
    }
    // What upstream's test runner throws at the port.
    for garbage in [vec![1], vec![b'1'; 100_000], vec![0xff; 100_000]] {
        let mut client = server.rpc();
        drop(client.try_send_raw(&garbage));
        drop(client);
        healthy(&server);
    }
}

#[test]
fn frames_that_never_end_cost_what_they_have_sent() {
    let server = Server::start();
    let mut clients = Vec::new();
    for _ in 0..64 {
        let mut client = server.ipc();
        client.send_raw(&(256_u64 << 20).to_le_bytes());
        client.send_raw(&[b'1'; 1000]);
        clients.push(client);
    }
    healthy(&server);
    drop(clients);
    healthy(&server);
}

#[test]
fn a_client_that_does_not_read_waits_alone() {
    let server = Server::start();
    let mut deaf = server.registered();
    let request = frame(br#"{"type":"cluster_meta"}"#);
    let many = request.repeat(2000);
    // Replies fill its socket, then requests do, then it cannot send any more.
    let sender = std::thread::spawn(move || {
        for _ in 0..20 {
            deaf.send_raw(&many);
        }
        deaf
    });
    std::thread::sleep(Duration::from_millis(200));
    assert!(!sender.is_finished(), "the server reads on without end");
    for _ in 0..10 {
        healthy(&server);
    }
    // It is let go of when the server stops.
    drop(server);
    assert!(sender.join().is_err());
}

#[test]
fn frames_cut_anywhere_are_whole() {
    let server = Server::start();
    let mut client = server.rpc();
    client.register();
    let request = frame(br#"{"type":"debug_command"}"#);
    for byte in request.iter().copied() {
        client.send_raw(&[byte]);
    }
    assert!(client.receive().contains("debug_reply"));
    client.send_raw(&request.repeat(100));
    for _ in 0..100 {
        assert!(client.receive().contains("debug_reply"));
    }
}

#[test]
fn hundreds_of_clients_come_and_go() {
    let server = Server::start();
    for _ in 0..3 {
        let clients: Vec<Client> = (0..200)
            .map(|at| {
                if at % 2 == 0 {
                    server.registered()
                } else {
                    server.registered_rpc()
                }
            })
            .collect();
        healthy(&server);
        drop(clients);
    }
    let mut last = server.registered();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let status = last.ask(&serde_json::from_str(ALIVE).unwrap());
        if status["meta"]["ipc_connections"] == 1 && status["meta"]["rpc_connections"] == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
    }
}
