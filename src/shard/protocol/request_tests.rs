//! Requests as clients in the wild send them.

use super::*;

fn read(text: &str) -> Result<Request, MessageError> {
    Request::read(&Message::read(text.as_bytes())?)
}

#[track_caller]
fn check(text: &str, expected: Request) {
    assert_eq!(read(text), Ok(expected), "{text}");
}

#[track_caller]
fn refused(text: &str, begins: &str) {
    let error = read(text).unwrap_err().to_string();
    assert!(error.starts_with(begins), "{text}: {error}");
}

const JSON: &str = "Failed to parse the JSON message: json error: ";
const BLOB: ObjectId = ObjectId(16_753_568_090_129_694_720);

fn registered(store_type: StoreType) -> Request {
    Request::Register {
        version: "0.24.2".into(),
        store_type,
        session_id: SessionId::ROOT,
        username: String::new(),
        password: String::new(),
    }
}

#[test]
fn every_client_registers_in_its_own_way() {
    // C++ and Python.
    check(
        r#"{"password":"","session_id":0,"store_type":1,"type":"register_request","username":"","version":"0.24.2"}"#,
        registered(StoreType::Normal),
    );
    // Rust, with a field of its own.
    check(
        r#"{"type":"register_request","version":"0.24.2","store_type":"Normal","support_rpc_compression":false}"#,
        registered(StoreType::Normal),
    );
    // Plasma, both spellings.
    for plasma in ["2", "\"Plasma\""] {
        check(
            &format!(r#"{{"type":"register_request","version":"0.24.2","store_type":{plasma}}}"#),
            registered(StoreType::Plasma),
        );
    }
    // Nothing but the command.
    let Ok(Request::Register {
        version,
        store_type,
        ..
    }) = read(r#"{"type":"register_request"}"#)
    else {
        panic!("not read");
    };
    assert_eq!((version.as_str(), store_type), ("0.0.0", StoreType::Normal));
    refused(r#"{"type":"register_request","version":5}"#, JSON);
    refused(r#"{"type":"register_request","store_type":{}}"#, JSON);
}

#[test]
fn blobs_are_asked_for_as_a_list_or_by_number() {
    let list = |ids: &[u64]| BlobList {
        ids: ids.iter().copied().map(ObjectId).collect(),
        ..BlobList::default()
    };
    check(
        r#"{"0":16753568090129694720,"num":1,"type":"get_buffers_request","unsafe":false}"#,
        Request::GetBuffers(list(&[BLOB.0])),
    );
    check(
        r#"{"ids":[16753568090129694720,3],"type":"get_buffers_request"}"#,
        Request::GetBuffers(list(&[BLOB.0, 3])),
    );
    // Java: negative ids, and an empty set in the numbered form.
    check(
        r#"{"0":-1693175983579856896,"num":1,"type":"get_buffers_request"}"#,
        Request::GetBuffers(list(&[BLOB.0])),
    );
    check(
        r#"{"num":0,"type":"get_buffers_request"}"#,
        Request::GetBuffers(list(&[])),
    );
    // The Rust client, where the C++ server knows the numbered form only.
    check(
        r#"{"ids":[7],"unsafe":true,"compress":true,"use_rdma":false,"type":"get_remote_buffers_request"}"#,
        Request::GetRemoteBuffers(BlobList {
            allow_unsealed: true,
            compress: true,
            ..list(&[7])
        }),
    );
    // Keys sort as text; the order asked for is that of the numbers.
    let keys: Vec<String> = (0..12).map(|i| format!(r#""{i}":{}"#, 100 + i)).collect();
    let mut sorted = keys.clone();
    sorted.sort();
    let text = format!(
        r#"{{{},"num":12,"type":"get_buffers_request"}}"#,
        sorted.join(",")
    );
    check(
        &text,
        Request::GetBuffers(list(&(100..112).collect::<Vec<_>>())),
    );
    // More keys than num.
    check(
        r#"{"0":1,"1":2,"num":1,"type":"get_buffers_request"}"#,
        Request::GetBuffers(list(&[1])),
    );

    refused(r#"{"type":"get_buffers_request"}"#, JSON);
    refused(
        r#"{"0":1,"num":18446744073709551615,"type":"get_buffers_request"}"#,
        JSON,
    );
    refused(
        r#"{"0":1,"2":1,"num":2,"type":"get_buffers_request"}"#,
        JSON,
    );
    refused(r#"{"0":"1","num":1,"type":"get_buffers_request"}"#, JSON);
    refused(r#"{"ids":5,"type":"get_buffers_request"}"#, JSON);
    refused(
        r#"{"ids":[],"unsafe":1,"type":"get_buffers_request"}"#,
        JSON,
    );
}

#[test]
fn sizes_and_ids_are_64_bits_by_their_bits() {
    check(
        r#"{"type": "create_buffer_request", "size": -5}"#,
        Request::CreateBuffer {
            size: 18_446_744_073_709_551_611,
        },
    );
    check(
        r#"{"type": "create_buffer_request", "size": 5.0}"#,
        Request::CreateBuffer { size: 5 },
    );
    check(
        r#"{"num":2,"sizes":[10,-1],"type":"create_buffers_request"}"#,
        Request::CreateBuffers {
            sizes: vec![10, u64::MAX],
        },
    );
    check(
        r#"{"id":[18446744073709551615],"sync_remote":true,"type":"get_data_request","wait":false}"#,
        Request::GetData {
            id: vec![ObjectId::INVALID],
            sync_remote: true,
            wait: false,
        },
    );
    refused(r#"{"type": "create_buffer_request"}"#, JSON);
    refused(r#"{"type": "create_buffer_request", "size": "abc"}"#, JSON);
    refused(r#"{"type": "create_buffer_request", "size": null}"#, JSON);
    refused(
        r#"{"type": "create_buffer_request", "size": 99999999999999999999999}"#,
        JSON,
    );
    refused(r#"{"type": "create_buffers_request", "sizes": 5}"#, JSON);
}

#[test]
fn go_releases_under_another_name() {
    let release = Request::Release {
        object_id: ObjectId(5),
    };
    check(
        r#"{"type":"release_request","object_id":5}"#,
        release.clone(),
    );
    check(r#"{"type":"release_request","id":5}"#, release);
    refused(r#"{"type":"release_request"}"#, JSON);
}

#[test]
fn deletion_defaults_to_the_gentlest() {
    check(
        r#"{"deep":true,"fastpath":false,"force":false,"id":[5],"memory_trim":false,"type":"del_data_request"}"#,
        Request::DelData(Deletion {
            id: vec![ObjectId(5)],
            deep: true,
            ..Deletion::default()
        }),
    );
    // Rust misspells a key.
    check(
        r#"{"deep:":true,"id":[5],"type":"del_data_request"}"#,
        Request::DelData(Deletion {
            id: vec![ObjectId(5)],
            ..Deletion::default()
        }),
    );
    refused(r#"{"id":5,"type":"del_data_request"}"#, JSON);
}

#[test]
fn a_bare_id_is_no_list() {
    refused(r#"{"type":"get_data_request","id":5}"#, JSON);
    refused(
        r#"{"type":"get_data_request","id":"o0000000000003039"}"#,
        JSON,
    );
    refused(r#"{"type":"get_data_request"}"#, JSON);
}

#[test]
fn what_does_not_exist_is_named_in_the_refusal() {
    refused(
        r#"{"type":"no_such_request"}"#,
        "Got unexpected command: no_such_request",
    );
    // Declared by vineyard and handled by no server.
    refused(
        r#"{"type":"request_fd_request"}"#,
        "Got unexpected command: request_fd_request",
    );
    refused(r#"{"type":""}"#, "Got unexpected command: ");
}

#[test]
fn commands_without_fields_take_any() {
    check(r#"{"type":"exit_request"}"#, Request::Exit);
    check(r#"{"type":"cluster_meta"}"#, Request::ClusterMeta);
    check(
        r#"{"type":"debug_command","debug":{"a":[1]}}"#,
        Request::Debug,
    );
    check(r#"{"type":"clear_request","x":null}"#, Request::Clear);
    check(
        r#"{"type":"shallow_copy_request","id":5}"#,
        Request::ShallowCopy {
            id: ObjectId(5),
            extra: Map::new(),
        },
    );
}

#[test]
fn metadata_deeper_than_the_parser_goes_is_refused() {
    let deep = |depth: usize| {
        let open = r#"{"m":"#.repeat(depth);
        format!(
            r#"{{"type":"create_data_request","content":{open}1{}}}"#,
            "}".repeat(depth)
        )
    };
    assert!(matches!(read(&deep(100)), Ok(Request::CreateData { .. })));
    refused(&deep(100_000), JSON);
}
