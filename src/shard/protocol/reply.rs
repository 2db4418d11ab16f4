//! What the server can answer.
//!
//! Replies are compact JSON with keys in the order of their bytes, as the real server writes
//! them, so that recorded conversations can be compared byte for byte. Clients check `type` for
//! equality; an error has none, and only errors have a `code`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Map, Value};

use super::code::Code;
use super::frame;
use super::payload::Payload;
use crate::shard::ids::{InstanceId, ObjectId, SessionId, Signature};

/// One reply.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Reply {
    Error {
        code: Code,
        message: String,
    },
    Register {
        instance_id: InstanceId,
        ipc_socket: String,
        rpc_endpoint: String,
        session_id: SessionId,
        store_match: bool,
        support_rpc_compression: bool,
        version: &'static str,
    },

    // Blobs. `fd` and `fds` name the regions whose descriptors follow; -1 is none.
    CreateBuffer {
        created: Payload,
        fd: i32,
    },
    CreateBuffers {
        payloads: Vec<Payload>,
        fds: Vec<i32>,
    },
    CreateDiskBuffer {
        created: Payload,
        fd: i32,
    },
    GetBuffers {
        payloads: Vec<Payload>,
        fds: Vec<i32>,
        compress: bool,
    },
    Seal,
    DropBuffer,
    ShrinkBuffer,
    IncreaseReferenceCount,
    Release,
    IsInUse(bool),
    IsSpilled(bool),
    ReleaseBlobsWithRdma,

    // Metadata.
    CreateData {
        id: ObjectId,
        signature: Signature,
        instance_id: InstanceId,
    },
    CreateDatas {
        ids: Vec<ObjectId>,
        signatures: Vec<Signature>,
        instance_ids: Vec<InstanceId>,
    },
    /// Also the answer to `list_data_request`. Nothing found is `null`.
    GetData {
        content: Map<String, Value>,
    },
    DelData,
    DelDataWithFeedbacks {
        deleted_bids: Vec<ObjectId>,
    },
    Exists(bool),
    Persist,
    IfPersist(bool),
    Label,
    Clear,
    MemoryTrim,
    ShallowCopy {
        target_id: ObjectId,
    },

    // Names.
    PutName,
    GetName {
        object_id: ObjectId,
    },
    ListName {
        names: BTreeMap<String, ObjectId>,
    },
    DropName,

    // The instance and its peers.
    ClusterMeta {
        meta: Map<String, Value>,
    },
    InstanceStatus(InstanceStatus),
    MigrateObject {
        object_id: ObjectId,
    },
    Debug,
    AcquireLock {
        key: String,
        result: bool,
    },
    ReleaseLock {
        result: bool,
    },

    // Spill control.
    Evict,
    Load,
    Unpin,

    // Streams.
    CreateStream,
    OpenStream,
    GetNextStreamChunk {
        buffer: Payload,
        fd: i32,
    },
    PushNextStreamChunk,
    PullNextStreamChunk {
        chunk: ObjectId,
    },
    StopStream,
    DropStream,

    // Arenas.
    MakeArena {
        fd: i32,
        size: u64,
    },
    FinalizeArena,

    // Sessions.
    NewSession {
        socket_path: String,
    },
    DeleteSession,
    MoveBuffersOwnership,
}

/// Figures of an instance; fields in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct InstanceStatus {
    /// Requests that wait.
    pub deferred_requests: u64,
    /// `local` or `distributed`.
    pub deployment: String,
    /// This instance.
    pub instance_id: InstanceId,
    /// Clients on the UNIX socket.
    pub ipc_connections: u64,
    /// The most bytes there may be.
    pub memory_limit: u64,
    /// Bytes in blobs.
    pub memory_usage: u64,
    /// Clients on the TCP port.
    pub rpc_connections: u64,
}

impl Reply {
    /// A refusal.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self::Error {
            code,
            message: message.into(),
        }
    }

    /// Appends the reply's frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame::encode_with(out, |out| {
            let body = out.len();
            if let Err(error) = serde_json::to_writer(&mut *out, self) {
                // Strings are UTF-8 and keys are strings, so there is no such reply; but if there
                // were, the client shall have an answer.
                out.truncate(body);
                tracing::error!(%error, "a reply cannot be written as JSON");
                out.extend_from_slice(br#"{"code":255,"message":"the reply cannot be written"}"#);
            }
        });
    }
}

impl Serialize for Reply {
    #[allow(clippy::too_many_lines)]
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(None)?;
        // The `type` stands last but for `version`; no other key of a reply comes after it.
        let name = match self {
            Self::Error { code, message } => {
                object.serialize_entry("code", &code.number())?;
                object.serialize_entry("message", message)?;
                return object.end();
            }
            Self::Register {
                instance_id,
                ipc_socket,
                rpc_endpoint,
                session_id,
                store_match,
                support_rpc_compression,
                version,
            } => {
                object.serialize_entry("instance_id", instance_id)?;
                object.serialize_entry("ipc_socket", ipc_socket)?;
                object.serialize_entry("rpc_endpoint", rpc_endpoint)?;
                object.serialize_entry("session_id", session_id)?;
                object.serialize_entry("store_match", store_match)?;
                object.serialize_entry("support_rpc_compression", support_rpc_compression)?;
                object.serialize_entry("type", "register_reply")?;
                object.serialize_entry("version", version)?;
                return object.end();
            }
            Self::CreateBuffer { created, fd } => {
                created_buffer(&mut object, created, *fd)?;
                "create_buffer_reply"
            }
            Self::CreateDiskBuffer { created, fd } => {
                created_buffer(&mut object, created, *fd)?;
                "create_disk_buffer_reply"
            }
            Self::CreateBuffers { payloads, fds } => {
                numbered(&mut object, payloads)?;
                object.serialize_entry("fds", fds)?;
                object.serialize_entry("ids", &Ids(payloads))?;
                object.serialize_entry("num", &payloads.len())?;
                object.serialize_entry("payloads", payloads)?;
                "create_buffers_reply"
            }
            Self::GetBuffers {
                payloads,
                fds,
                compress,
            } => {
                numbered(&mut object, payloads)?;
                object.serialize_entry("compress", compress)?;
                object.serialize_entry("fds", fds)?;
                object.serialize_entry("num", &payloads.len())?;
                object.serialize_entry("payloads", payloads)?;
                "get_buffers_reply"
            }
            Self::Seal => "seal_reply",
            Self::DropBuffer => "drop_buffer_reply",
            Self::ShrinkBuffer => "shrink_buffer_reply",
            Self::IncreaseReferenceCount => "increase_reference_count_reply",
            Self::Release => "release_reply",
            Self::IsInUse(is_in_use) => {
                object.serialize_entry("is_in_use", is_in_use)?;
                "is_in_use_reply"
            }
            Self::IsSpilled(is_spilled) => {
                object.serialize_entry("is_spilled", is_spilled)?;
                "is_spilled_reply"
            }
            Self::ReleaseBlobsWithRdma => "release_blobs_with_rdma_reply",
            Self::CreateData {
                id,
                signature,
                instance_id,
            } => {
                object.serialize_entry("id", id)?;
                object.serialize_entry("instance_id", instance_id)?;
                object.serialize_entry("signature", signature)?;
                "create_data_reply"
            }
            Self::CreateDatas {
                ids,
                signatures,
                instance_ids,
            } => {
                object.serialize_entry("ids", ids)?;
                object.serialize_entry("instance_ids", instance_ids)?;
                object.serialize_entry("num", &ids.len())?;
                object.serialize_entry("signatures", signatures)?;
                "create_datas_reply"
            }
            Self::GetData { content } => {
                let found = (!content.is_empty()).then_some(content);
                object.serialize_entry("content", &found)?;
                "get_data_reply"
            }
            Self::DelData => "del_data_reply",
            Self::DelDataWithFeedbacks { deleted_bids } => {
                object.serialize_entry("deleted_bids", deleted_bids)?;
                "del_data_with_feedbacks_reply"
            }
            Self::Exists(exists) => {
                object.serialize_entry("exists", exists)?;
                "exists_reply"
            }
            Self::Persist => "persist_reply",
            Self::IfPersist(persist) => {
                object.serialize_entry("persist", persist)?;
                "if_persist_reply"
            }
            Self::Label => "label_reply",
            Self::Clear => "clear_reply",
            Self::MemoryTrim => {
                object.serialize_entry("trimmed", &false)?;
                "memory_trim_reply"
            }
            Self::ShallowCopy { target_id } => {
                object.serialize_entry("target_id", target_id)?;
                "shallow_copy_reply"
            }
            Self::PutName => "put_name_reply",
            Self::GetName { object_id } => {
                object.serialize_entry("object_id", object_id)?;
                "get_name_reply"
            }
            Self::ListName { names } => {
                object.serialize_entry("names", names)?;
                object.serialize_entry("size", &names.len())?;
                "list_name_reply"
            }
            Self::DropName => "drop_name_reply",
            Self::ClusterMeta { meta } => {
                object.serialize_entry("meta", meta)?;
                "cluster_meta"
            }
            Self::InstanceStatus(meta) => {
                object.serialize_entry("meta", meta)?;
                "instance_status_reply"
            }
            Self::MigrateObject { object_id } => {
                object.serialize_entry("object_id", object_id)?;
                "migrate_object_reply"
            }
            Self::Debug => {
                object.serialize_entry("result", &())?;
                "debug_reply"
            }
            Self::AcquireLock { key, result } => {
                object.serialize_entry("key", key)?;
                object.serialize_entry("result", result)?;
                "acquire_lock_reply"
            }
            Self::ReleaseLock { result } => {
                object.serialize_entry("result", result)?;
                "release_lock_reply"
            }
            Self::Evict => "evict_reply",
            Self::Load => "load_reply",
            Self::Unpin => "unpin_reply",
            Self::CreateStream => "create_stream_reply",
            Self::OpenStream => "open_stream_reply",
            Self::GetNextStreamChunk { buffer, fd } => {
                object.serialize_entry("buffer", buffer)?;
                object.serialize_entry("fd", fd)?;
                "get_next_stream_chunk_reply"
            }
            Self::PushNextStreamChunk => "push_next_stream_chunk_reply",
            Self::PullNextStreamChunk { chunk } => {
                object.serialize_entry("chunk", chunk)?;
                "pull_next_stream_chunk_reply"
            }
            Self::StopStream => "stop_stream_reply",
            Self::DropStream => "drop_stream_reply",
            Self::MakeArena { fd, size } => {
                object.serialize_entry("base", &0)?;
                object.serialize_entry("fd", fd)?;
                object.serialize_entry("size", size)?;
                "make_arena_reply"
            }
            Self::FinalizeArena => "finalize_arena_reply",
            Self::NewSession { socket_path } => {
                object.serialize_entry("socket_path", socket_path)?;
                "new_session_reply"
            }
            Self::DeleteSession => "delete_session_reply",
            Self::MoveBuffersOwnership => "move_buffers_ownership_reply",
        };
        object.serialize_entry("type", name)?;
        object.end()
    }
}

fn created_buffer<M: SerializeMap>(
    object: &mut M,
    created: &Payload,
    fd: i32,
) -> Result<(), M::Error> {
    object.serialize_entry("created", created)?;
    object.serialize_entry("fd", &fd)?;
    object.serialize_entry("id", &created.object_id)
}

/// The ids of payloads, as a list.
struct Ids<'a>(&'a [Payload]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|payload| payload.object_id))
    }
}

/// Payloads once more under the keys `"0"`, `"1"`, …, as old clients read them.
fn numbered<M: SerializeMap>(object: &mut M, payloads: &[Payload]) -> Result<(), M::Error> {
    let mut next = (!payloads.is_empty()).then_some(0);
    while let Some(index) = next {
        if let Some(payload) = payloads.get(index) {
            object.serialize_entry(&Key(index), payload)?;
        }
        next = following(index, payloads.len());
    }
    Ok(())
}

/// A number as a key.
struct Key(usize);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The number below `count` that follows `index` when numbers are sorted as text:
/// 0, 1, 10, 100, 101, 11, 2.
fn following(index: usize, count: usize) -> Option<usize> {
    if index > 0 && index.checked_mul(10).is_some_and(|child| child < count) {
        return Some(index * 10);
    }
    let mut last = index;
    // Up to where a right neighbour exists: 9 has none beside it, 19 continues at 2.
    while last % 10 == 9 || last + 1 >= count {
        last /= 10;
        if last == 0 {
            return None;
        }
    }
    Some(last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(reply: &Reply) -> String {
        let mut out = Vec::new();
        reply.encode(&mut out);
        let (header, body) = out.split_first_chunk::<8>().unwrap();
        assert_eq!(u64::from_le_bytes(*header), body.len() as u64);
        String::from_utf8(body.to_vec()).unwrap()
    }

    /// As written, and with sorted keys: a map of `serde_json` is sorted.
    #[track_caller]
    fn check(reply: &Reply, expected: &str) {
        let written = text(reply);
        assert_eq!(written, expected);
        assert_sorted(&written);
    }

    #[track_caller]
    fn assert_sorted(written: &str) {
        let value: Value = serde_json::from_str(written).unwrap();
        assert_eq!(written, value.to_string());
    }

    fn payload(id: u64) -> Payload {
        Payload::in_arena(ObjectId(id), 64 * id, 10, true, 4096)
    }

    #[test]
    fn numbers_as_keys_are_sorted_as_text() {
        for count in [
            0_usize, 1, 2, 9, 10, 11, 12, 19, 20, 21, 99, 100, 101, 110, 1001, 2345,
        ] {
            let mut sorted: Vec<String> = (0..count).map(|i| i.to_string()).collect();
            sorted.sort();
            let mut walked = Vec::new();
            let mut next = (count > 0).then_some(0);
            while let Some(index) = next {
                walked.push(index.to_string());
                next = following(index, count);
            }
            assert_eq!(walked, sorted, "{count}");
        }
    }

    #[test]
    fn replies_are_written_as_the_real_server_writes_them() {
        check(&Reply::Seal, r#"{"type":"seal_reply"}"#);
        check(
            &Reply::error(Code::NotImplemented, ""),
            r#"{"code":6,"message":""}"#,
        );
        check(
            &Reply::GetData {
                content: Map::new(),
            },
            r#"{"content":null,"type":"get_data_reply"}"#,
        );
        check(
            &Reply::ListName {
                names: BTreeMap::from([("n\"1".to_owned(), ObjectId(5))]),
            },
            r#"{"names":{"n\"1":5},"size":1,"type":"list_name_reply"}"#,
        );
        check(&Reply::Debug, r#"{"result":null,"type":"debug_reply"}"#);
        check(
            &Reply::MemoryTrim,
            r#"{"trimmed":false,"type":"memory_trim_reply"}"#,
        );
        check(
            &Reply::Register {
                instance_id: InstanceId(0),
                ipc_socket: "/run/vineyard.sock".into(),
                rpc_endpoint: "vm:56409".into(),
                session_id: SessionId::ROOT,
                store_match: true,
                support_rpc_compression: true,
                version: "0.24.2",
            },
            r#"{"instance_id":0,"ipc_socket":"/run/vineyard.sock","rpc_endpoint":"vm:56409","session_id":0,"store_match":true,"support_rpc_compression":true,"type":"register_reply","version":"0.24.2"}"#,
        );
        check(
            &Reply::GetBuffers {
                payloads: vec![],
                fds: vec![],
                compress: false,
            },
            r#"{"compress":false,"fds":[],"num":0,"payloads":[],"type":"get_buffers_reply"}"#,
        );
    }

    #[test]
    fn keys_of_every_shape_are_sorted() {
        let payloads: Vec<Payload> = (1..=25).map(payload).collect();
        let id = ObjectId(1);
        for reply in [
            Reply::CreateBuffer {
                created: payload(3),
                fd: 1,
            },
            Reply::CreateDiskBuffer {
                created: payload(3),
                fd: 1,
            },
            Reply::CreateBuffers {
                payloads: payloads.clone(),
                fds: vec![1],
            },
            Reply::GetBuffers {
                payloads,
                fds: vec![1],
                compress: false,
            },
            Reply::CreateData {
                id,
                signature: Signature(2),
                instance_id: InstanceId(0),
            },
            Reply::CreateDatas {
                ids: vec![id],
                signatures: vec![Signature(2)],
                instance_ids: vec![InstanceId::UNSPECIFIED],
            },
            Reply::DelDataWithFeedbacks {
                deleted_bids: vec![id],
            },
            Reply::Exists(true),
            Reply::IfPersist(false),
            Reply::IsInUse(true),
            Reply::IsSpilled(false),
            Reply::ShallowCopy { target_id: id },
            Reply::GetName { object_id: id },
            Reply::ClusterMeta { meta: Map::new() },
            Reply::InstanceStatus(InstanceStatus {
                deferred_requests: 0,
                deployment: "local".into(),
                instance_id: InstanceId(0),
                ipc_connections: 1,
                memory_limit: 2,
                memory_usage: 3,
                rpc_connections: 4,
            }),
            Reply::MigrateObject { object_id: id },
            Reply::AcquireLock {
                key: "k".into(),
                result: true,
            },
            Reply::ReleaseLock { result: true },
            Reply::GetNextStreamChunk {
                buffer: payload(1),
                fd: -1,
            },
            Reply::PullNextStreamChunk { chunk: id },
            Reply::MakeArena { fd: 2, size: 5 },
            Reply::NewSession {
                socket_path: "/s".into(),
            },
        ] {
            assert_sorted(&text(&reply));
        }
    }
}
