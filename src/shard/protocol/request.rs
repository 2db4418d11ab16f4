//! What a client can ask for.
//!
//! Every command of vineyard 0.24 is here, also those that are answered with an error. Fields are
//! named as on the wire. Clients are many and odd: ids and sizes come signed or unsigned, lists
//! of blobs as an array or as `"0"`, `"1"`, … beside `num`, fields nobody knows come along.
//! A field that is missing without a default, or of a wrong type, is a [`MessageError`].

use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IgnoredAny, IntoDeserializer, MapAccess,
    VariantAccess, Visitor,
};
use serde_json::{Map, Value};

use super::message::{Message, MessageError};
use crate::shard::ids::{ObjectId, SessionId, bits64};

/// One request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[allow(missing_docs)]
pub enum Request {
    /// The first of a connection; allowed again later.
    #[serde(rename = "register_request")]
    Register {
        #[serde(default = "unknown_version")]
        version: String,
        #[serde(default)]
        store_type: StoreType,
        #[serde(default = "root_session")]
        session_id: SessionId,
        #[serde(default)]
        username: String,
        #[serde(default)]
        password: String,
    },
    /// The last of a connection; there is no reply.
    #[serde(rename = "exit_request")]
    Exit,

    // Blobs over shared memory.
    #[serde(rename = "create_buffer_request")]
    CreateBuffer {
        #[serde(deserialize_with = "bits64")]
        size: u64,
    },
    #[serde(rename = "create_buffers_request")]
    CreateBuffers {
        #[serde(deserialize_with = "list64")]
        sizes: Vec<u64>,
    },
    #[serde(rename = "create_disk_buffer_request")]
    CreateDiskBuffer {
        #[serde(deserialize_with = "bits64")]
        size: u64,
        path: String,
    },
    #[serde(rename = "seal_request")]
    Seal { object_id: ObjectId },
    #[serde(rename = "get_buffers_request")]
    GetBuffers(BlobList),
    #[serde(rename = "drop_buffer_request")]
    DropBuffer { id: ObjectId },
    #[serde(rename = "shrink_buffer_request")]
    ShrinkBuffer {
        id: ObjectId,
        #[serde(deserialize_with = "bits64")]
        size: u64,
    },
    #[serde(rename = "increase_reference_count_request")]
    IncreaseReferenceCount { ids: Vec<ObjectId> },
    /// The Go client calls the field `id`.
    #[serde(rename = "release_request")]
    Release {
        #[serde(alias = "id")]
        object_id: ObjectId,
    },
    #[serde(rename = "is_in_use_request")]
    IsInUse { id: ObjectId },
    #[serde(rename = "is_spilled_request")]
    IsSpilled { id: ObjectId },
    #[serde(rename = "create_gpu_buffer_request")]
    CreateGpuBuffer,
    #[serde(rename = "get_gpu_buffers_request")]
    GetGpuBuffers,

    // Blobs over the stream.
    #[serde(rename = "create_remote_buffer_request")]
    CreateRemoteBuffer {
        #[serde(deserialize_with = "bits64")]
        size: u64,
        #[serde(default)]
        compress: bool,
        #[serde(default)]
        use_rdma: bool,
    },
    #[serde(rename = "create_remote_buffers_request")]
    CreateRemoteBuffers {
        #[serde(deserialize_with = "list64")]
        sizes: Vec<u64>,
        #[serde(default)]
        compress: bool,
        #[serde(default)]
        use_rdma: bool,
    },
    #[serde(rename = "get_remote_buffers_request")]
    GetRemoteBuffers(BlobList),
    #[serde(rename = "release_blobs_with_rdma_request")]
    ReleaseBlobsWithRdma,

    // Metadata.
    #[serde(rename = "create_data_request")]
    CreateData { content: Value },
    #[serde(rename = "create_datas_request")]
    CreateDatas { contents: Vec<Value> },
    #[serde(rename = "get_data_request")]
    GetData {
        id: Vec<ObjectId>,
        #[serde(default)]
        sync_remote: bool,
        #[serde(default)]
        wait: bool,
    },
    #[serde(rename = "list_data_request")]
    ListData {
        pattern: String,
        #[serde(default)]
        regex: bool,
        #[serde(deserialize_with = "bits64")]
        limit: u64,
    },
    #[serde(rename = "del_data_request")]
    DelData(Deletion),
    #[serde(rename = "del_data_with_feedbacks_request")]
    DelDataWithFeedbacks(Deletion),
    #[serde(rename = "exists_request")]
    Exists { id: ObjectId },
    #[serde(rename = "persist_request")]
    Persist { id: ObjectId },
    #[serde(rename = "if_persist_request")]
    IfPersist { id: ObjectId },
    #[serde(rename = "label_request")]
    Label {
        id: ObjectId,
        keys: Vec<String>,
        values: Vec<String>,
    },
    #[serde(rename = "clear_request")]
    Clear,
    #[serde(rename = "memory_trim_request")]
    MemoryTrim,
    #[serde(rename = "shallow_copy_request")]
    ShallowCopy {
        id: ObjectId,
        #[serde(default)]
        extra: Map<String, Value>,
    },

    // Names.
    #[serde(rename = "put_name_request")]
    PutName { object_id: ObjectId, name: String },
    #[serde(rename = "get_name_request")]
    GetName { name: String, wait: bool },
    #[serde(rename = "list_name_request")]
    ListName {
        pattern: String,
        #[serde(default)]
        regex: bool,
        #[serde(deserialize_with = "bits64")]
        limit: u64,
    },
    #[serde(rename = "drop_name_request")]
    DropName { name: String },

    // The instance and its peers.
    #[serde(rename = "cluster_meta")]
    ClusterMeta,
    #[serde(rename = "instance_status_request")]
    InstanceStatus,
    #[serde(rename = "migrate_object_request")]
    MigrateObject { object_id: ObjectId },
    #[serde(rename = "debug_command")]
    Debug,
    #[serde(rename = "acquire_lock_request")]
    AcquireLock { key: String },
    #[serde(rename = "release_lock_request")]
    ReleaseLock { key: String },

    // Spill control.
    #[serde(rename = "evict_request")]
    Evict { ids: Vec<ObjectId> },
    #[serde(rename = "load_request")]
    Load {
        ids: Vec<ObjectId>,
        #[serde(default)]
        pin: bool,
    },
    #[serde(rename = "unpin_request")]
    Unpin { ids: Vec<ObjectId> },

    // Streams.
    #[serde(rename = "create_stream_request")]
    CreateStream { object_id: ObjectId },
    #[serde(rename = "open_stream_request")]
    OpenStream { object_id: ObjectId, mode: i64 },
    #[serde(rename = "get_next_stream_chunk_request")]
    GetNextStreamChunk {
        id: ObjectId,
        #[serde(deserialize_with = "bits64")]
        size: u64,
    },
    #[serde(rename = "push_next_stream_chunk_request")]
    PushNextStreamChunk { id: ObjectId, chunk: ObjectId },
    #[serde(rename = "pull_next_stream_chunk_request")]
    PullNextStreamChunk { id: ObjectId },
    #[serde(rename = "stop_stream_request")]
    StopStream { id: ObjectId, failed: bool },
    #[serde(rename = "drop_stream_request")]
    DropStream { id: ObjectId },

    // Arenas.
    #[serde(rename = "make_arena_request")]
    MakeArena {
        #[serde(deserialize_with = "bits64")]
        size: u64,
    },
    #[serde(rename = "finalize_arena_request")]
    FinalizeArena {
        fd: i32,
        #[serde(deserialize_with = "list64")]
        offsets: Vec<u64>,
        #[serde(deserialize_with = "list64")]
        sizes: Vec<u64>,
    },

    // Sessions.
    #[serde(rename = "new_session_request")]
    NewSession {
        #[serde(default)]
        bulk_store_type: StoreType,
    },
    #[serde(rename = "delete_session_request")]
    DeleteSession,
    /// Its maps come as arrays of pairs or as objects.
    #[serde(rename = "move_buffers_ownership_request")]
    MoveBuffersOwnership {
        session_id: SessionId,
        #[serde(default)]
        id_to_id: Value,
        #[serde(default)]
        pid_to_id: Value,
        #[serde(default)]
        id_to_pid: Value,
        #[serde(default)]
        pid_to_pid: Value,
    },

    // Plasma.
    #[serde(rename = "create_buffer_by_plasma_request")]
    CreateBufferByPlasma {
        plasma_id: String,
        #[serde(deserialize_with = "bits64")]
        size: u64,
        #[serde(deserialize_with = "bits64")]
        plasma_size: u64,
    },
    #[serde(rename = "get_buffers_by_plasma_request")]
    GetBuffersByPlasma,
    #[serde(rename = "plasma_seal_request")]
    PlasmaSeal { plasma_id: String },
    #[serde(rename = "plasma_release_request")]
    PlasmaRelease { plasma_id: String },
    #[serde(rename = "plasma_delete_data_request")]
    PlasmaDeleteData { plasma_id: String },
}

/// Which kind of store a client wants to talk to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreType {
    /// Ids are numbers.
    #[default]
    Normal,
    /// Ids are strings.
    Plasma,
}

/// Blobs to get. `unsafe`: unsealed ones too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobList {
    /// In the order asked for.
    pub ids: Vec<ObjectId>,
    /// On the wire: `unsafe`.
    pub allow_unsealed: bool,
    /// Whether bytes on the stream shall be compressed.
    pub compress: bool,
    /// Whether the bytes shall go another way.
    pub use_rdma: bool,
}

/// Objects to delete, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub struct Deletion {
    pub id: Vec<ObjectId>,
    #[serde(default)]
    pub force: bool,
    #[serde(default)]
    pub deep: bool,
    #[serde(default)]
    pub memory_trim: bool,
    #[serde(default)]
    pub fastpath: bool,
}

fn unknown_version() -> String {
    "0.0.0".to_owned()
}

fn root_session() -> SessionId {
    SessionId::ROOT
}

fn list64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    #[derive(Deserialize)]
    struct Bits(#[serde(deserialize_with = "bits64")] u64);
    let list = Vec::<Bits>::deserialize(deserializer)?;
    Ok(list.into_iter().map(|bits| bits.0).collect())
}

impl<'de> Deserialize<'de> for StoreType {
    /// A number, 2 for plasma, or a string, `Plasma` for plasma; all else is normal.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Number(2.0) => Self::Plasma,
            Either::Text(text) if text == "Plasma" => Self::Plasma,
            Either::Number(_) | Either::Text(_) => Self::Normal,
        })
    }
}

impl<'de> Deserialize<'de> for BlobList {
    /// `ids`, or else `num` and the keys `"0"` to `num - 1`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BlobListVisitor)
    }
}

struct BlobListVisitor;

/// A number on its way through a list of key and value.
#[derive(Deserialize)]
struct Number(#[serde(deserialize_with = "bits64")] u64);

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum BlobListKey {
    Ids,
    Num,
    Unsafe,
    Compress,
    UseRdma,
    #[serde(untagged)]
    Other(Index),
}

/// A key that is a number, if it is one.
struct Index(Option<u64>);

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IndexVisitor;
        impl Visitor<'_> for IndexVisitor {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, key: &str) -> Result<Index, E> {
                Ok(Index(key.parse().ok()))
            }
        }
        deserializer.deserialize_identifier(IndexVisitor)
    }
}

impl<'de> Visitor<'de> for BlobListVisitor {
    type Value = BlobList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ids, or num and as many numbered ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<BlobList, A::Error> {
        let mut list = BlobList::default();
        let mut ids = None;
        let mut num = None;
        let mut numbered: Vec<(u64, ObjectId)> = Vec::new();
        while let Some(key) = map.next_key()? {
            match key {
                BlobListKey::Ids => ids = Some(map.next_value::<Vec<ObjectId>>()?),
                BlobListKey::Num => num = Some(map.next_value::<Number>()?.0),
                BlobListKey::Unsafe => list.allow_unsealed = map.next_value()?,
                BlobListKey::Compress => list.compress = map.next_value()?,
                BlobListKey::UseRdma => list.use_rdma = map.next_value()?,
                BlobListKey::Other(Index(Some(index))) => {
                    numbered.push((index, map.next_value()?));
                }
                BlobListKey::Other(Index(None)) => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        list.ids = match (ids, num) {
            (Some(ids), _) => ids,
            (None, Some(num)) => in_order(numbered, num).map_err(A::Error::custom)?,
            (None, None) => return Err(A::Error::missing_field("num")),
        };
        Ok(list)
    }
}

/// The ids under the keys 0 to `num - 1`. Keys arrive sorted as text: `"0"`, `"1"`, `"10"`, `"2"`.
fn in_order(mut numbered: Vec<(u64, ObjectId)>, num: u64) -> Result<Vec<ObjectId>, String> {
    numbered.sort_by_key(|&(index, _)| index);
    numbered.dedup_by_key(|&mut (index, _)| index);
    let complete = numbered
        .iter()
        .zip(0..num)
        .take_while(|((index, _), at)| index == at);
    let ids: Vec<ObjectId> = complete.map(|(&(_, id), _)| id).collect();
    let found = ids.len() as u64;
    if found < num {
        return Err(format!("missing field `{found}` of {num}"));
    }
    Ok(ids)
}

impl Request {
    /// Reads the fields that the message's command asks for.
    pub fn read(message: &Message<'_>) -> Result<Self, MessageError> {
        Self::deserialize(Tagged {
            command: &message.command,
            text: message.text,
        })
    }
}

/// Presents a message as an enum whose variant is the command and whose content is the whole
/// body. So the fields are read in one pass, although `type` may come last.
struct Tagged<'a> {
    command: &'a str,
    text: &'a str,
}

impl<'de> Deserializer<'de> for Tagged<'de> {
    type Error = MessageError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, MessageError> {
        visitor.visit_enum(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier
        ignored_any
    }
}

impl<'de> EnumAccess<'de> for Tagged<'de> {
    type Error = MessageError;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self), MessageError> {
        let command = self.command.into_deserializer();
        seed.deserialize(command).map(|variant| (variant, self))
    }
}

impl<'de> VariantAccess<'de> for Tagged<'de> {
    type Error = MessageError;

    fn unit_variant(self) -> Result<(), MessageError> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<S::Value, MessageError> {
        Ok(seed.deserialize(&mut serde_json::Deserializer::from_str(self.text))?)
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, MessageError> {
        Ok(serde_json::Deserializer::from_str(self.text).deserialize_seq(visitor)?)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, MessageError> {
        Ok(
            serde_json::Deserializer::from_str(self.text)
                .deserialize_struct("", fields, visitor)?,
        )
    }
}

impl serde::de::Error for MessageError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Json(message.to_string())
    }

    fn unknown_variant(command: &str, _: &'static [&'static str]) -> Self {
        Self::unexpected(command)
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
