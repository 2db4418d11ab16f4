//! Bytes in, bytes out: the shard over real sockets, against recorded vineyard conversations and
//! against clients that mean harm.

// Where a test cannot go on it stops.
#![allow(clippy::unwrap_used)]

mod blobs;
mod doors;
mod hostile;
mod mapping;
mod packed;
mod replay;
mod server;
mod streams;
mod waiting;

use replay::{Conversation, Difference, replay};

/// What there is to compare in a conversation, so that a replay that loses its way is noticed.
#[track_caller]
fn check(conversation: &Conversation, replies: usize) {
    assert_eq!(replay(conversation), replies);
}

/// A conversation that is the same, byte for byte.
#[track_caller]
fn same(name: &'static str, replies: usize) {
    let conversation = Conversation {
        name,
        ..Conversation::default()
    };
    check(&conversation, replies);
}

#[test]
fn scalars_are_put_and_got_as_with_vineyardd() {
    same("scalars", 43);
}

#[test]
fn numpy_arrays_are_put_and_got_as_with_vineyardd() {
    same("numpy_arrays", 42);
}

#[test]
fn pandas_frames_are_put_and_got_as_with_vineyardd() {
    same("pandas_frames", 50);
}

#[test]
fn arrow_tables_are_put_and_got_as_with_vineyardd() {
    same("arrow", 41);
}

#[test]
fn blobs_live_as_with_vineyardd() {
    let conversation = Conversation {
        name: "blobs",
        held: 1_049_367,
        // The real one does not count the 3996 bytes back that a shrunk blob no longer has.
        usage_told: &[(1_054_599, 1_050_603)],
        ..Conversation::default()
    };
    check(&conversation, 31);
}

#[test]
fn metadata_is_created_and_read_as_with_vineyardd() {
    same("metadata", 32);
}

#[test]
fn names_are_given_and_waited_for_as_with_vineyardd() {
    same("names", 32);
}

#[test]
fn objects_are_listed_as_with_vineyardd() {
    same("listing", 27);
}

#[test]
fn objects_are_deleted_as_with_vineyardd() {
    same("deletion", 35);
}

#[test]
fn objects_are_persisted_as_with_vineyardd() {
    same("persist", 16);
}

#[test]
fn objects_are_copied_as_with_vineyardd() {
    same("shallow_copy", 15);
}

#[test]
fn numbers_come_back_digit_for_digit() {
    let server = server::Server::start();
    let mut client = server.registered();
    for number in [
        "0.1",
        "2.0",
        "-0.0",
        "1.2345000505447388",
        "123.45678901234568",
        "-9.671406556917033e-24",
        "6.02214076e-10",
        "5e-324",
        "1.7976931348623157e+308",
        "18446744073709551615",
        "-9223372036854775808",
    ] {
        let create = format!(
            r#"{{"type":"create_data_request","content":{{"typename":"t","instance_id":0,"v":{number}}}}}"#
        );
        let created: serde_json::Value = serde_json::from_str(&client.ask_text(&create)).unwrap();
        let get = format!(r#"{{"type":"get_data_request","id":[{}]}}"#, created["id"]);
        let got = client.ask_text(&get);
        assert!(
            got.contains(&format!(r#""v":{number}}}"#)),
            "{number}: {got}"
        );
    }
}

#[test]
fn clients_connect_as_with_vineyardd() {
    same("connect_ipc", 6);
}

#[test]
fn a_full_store_refuses_as_vineyardd_does_and_leaks_nothing() {
    let conversation = Conversation {
        name: "out_of_memory",
        held: 2_174_964,
        // Of two buffers that do not fit together the real one never gave the first back.
        usage: &[(2_175_988, 2_174_964)],
        ..Conversation::default()
    };
    check(&conversation, 7);
}

#[test]
fn the_raw_protocol_is_that_of_vineyardd() {
    let conversation = Conversation {
        name: "raw_protocol",
        differences: &[
            Difference {
                request: r#"{"type": "register_request"}"#,
                ours: r#"{"instance_id":0,"ipc_socket":"#,
                why: "without a store type the real one reads an uninitialised variable",
            },
            Difference {
                request: "is_in_use_request",
                ours: r#"{"is_in_use":true,"type":"is_in_use_reply"}"#,
                why: "since 0.24.4 only a spilled blob is not in use",
            },
            Difference {
                request: "acquire_lock_request",
                ours: r#"{"code":6,"message":"locks without etcd are not supported"}"#,
                why: "the real one says no more than the code",
            },
            Difference {
                request: "release_lock_request",
                ours: r#"{"code":6,"message":"locks without etcd are not supported"}"#,
                why: "the real one never answers",
            },
            Difference {
                request: "new_session_request",
                ours: r#"{"code":6,"message":"sessions are not supported"}"#,
                why: "sessions come later",
            },
            Difference {
                request: "move_buffers_ownership_request",
                ours: r#"{"code":6,"message":"sessions are not supported"}"#,
                why: "sessions come later",
            },
            Difference {
                request: "create_disk_buffer_request",
                ours: r#"{"code":6,"message":"disk buffers are not supported"}"#,
                why: "disk buffers come later",
            },
            Difference {
                request: "make_arena_request",
                ours: r#"{"code":6,"message":"arenas of clients are not supported"}"#,
                why: "arenas come later",
            },
            Difference {
                request: "finalize_arena_request",
                ours: r#"{"code":6,"message":"arenas of clients are not supported"}"#,
                why: "arenas come later",
            },
            Difference {
                request: "migrate_object_request",
                ours: r#"{"code":6,"message":"migration is not supported"}"#,
                why: "migration comes later",
            },
        ],
        ..Conversation::default()
    };
    check(&conversation, 53);
}

#[test]
fn streams_are_written_and_read_as_with_vineyardd() {
    same("streams", 90);
}

#[test]
fn spilling_is_done_where_vineyardd_never_answers() {
    let conversation = Conversation {
        name: "evict_load",
        spills: true,
        differences: &[
            Difference {
                request: "evict_request",
                ours: r#"{"type":"evict_reply"}"#,
                why: "the real one spills what clients hold, and does not answer",
            },
            Difference {
                request: "load_request",
                ours: r#"{"type":"load_reply"}"#,
                why: "the real one loads, and does not answer",
            },
            Difference {
                request: "unpin_request",
                ours: r#"{"type":"unpin_reply"}"#,
                why: "the real one unpins, and does not answer",
            },
        ],
        ..Conversation::default()
    };
    check(&conversation, 15);
}

#[test]
fn objects_are_put_and_got_over_tcp_as_with_vineyardd() {
    let conversation = Conversation {
        name: "rpc_basic",
        held: 12_028,
        differences: &[Difference {
            request: r#""type":"list_data_request""#,
            ours: r#"{"content":{"o"#,
            why: "the recorded server lists objects of other conversations too",
        }],
        ..Conversation::default()
    };
    check(&conversation, 39);
}

#[test]
fn blobs_travel_over_tcp_as_with_vineyardd() {
    same("rpc_blobs_uncompressed", 13);
}

#[test]
fn compressed_blobs_travel_over_tcp_as_with_vineyardd() {
    same("rpc_blobs_compressed", 17);
}
