//! How a blob is described to a client.

use serde::{Deserialize, Serialize};

use crate::shard::ids::ObjectId;

/// `store_fd` of the arena; files of spilled blobs have higher ones. A client keys its mappings by
/// this number, so it never stands for other memory while the process lives. Not a descriptor.
pub const ARENA: i32 = 1;

/// `map_size` is longer than the region by this; clients map `map_size - 8` bytes. The real
/// server's allocator reserves as much for alignment, and clients have it built in.
pub const MAP_SLACK: u64 = 8;

/// Mappings are made of pages of this many bytes.
const PAGE: u64 = 4096;

/// A blob's place. Fields stand in the order of their names, as the real server writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// Start within the region's file.
    pub data_offset: u64,
    /// Length in bytes.
    pub data_size: u64,
    /// Whether it lies in GPU memory: never.
    pub is_gpu: bool,
    /// Always true.
    pub is_owner: bool,
    /// Whether others may see it.
    pub is_sealed: bool,
    /// Length of the region and [`MAP_SLACK`].
    pub map_size: u64,
    /// The blob.
    pub object_id: ObjectId,
    /// The blob's address in the server, used by RDMA only; we say 0.
    pub pointer: u64,
    /// The region's key; -1 for none.
    pub store_fd: i32,
}

impl Payload {
    /// A blob in the arena. The empty blob lies nowhere, whatever offset it came with.
    pub fn in_arena(
        object_id: ObjectId,
        offset: u64,
        size: u64,
        is_sealed: bool,
        arena_size: u64,
    ) -> Self {
        if object_id == ObjectId::EMPTY_BLOB {
            return Self {
                data_offset: 0,
                data_size: 0,
                is_gpu: false,
                is_owner: true,
                is_sealed: false,
                map_size: 0,
                object_id,
                pointer: 0,
                store_fd: -1,
            };
        }
        Self {
            data_offset: offset,
            data_size: size,
            is_gpu: false,
            is_owner: true,
            is_sealed,
            map_size: arena_size + MAP_SLACK,
            object_id,
            pointer: 0,
            store_fd: ARENA,
        }
    }

    /// This blob in a file of its own, which is `length` bytes long. What clients map is whole
    /// pages, the end of the file included.
    #[must_use]
    pub fn in_file(self, store_fd: i32, length: u64) -> Self {
        Self {
            map_size: length.next_multiple_of(PAGE) + MAP_SLACK,
            store_fd,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_blob_is_described_as_the_real_server_does() {
        let empty = Payload::in_arena(ObjectId::EMPTY_BLOB, 64, 0, true, 4096);
        assert_eq!(
            serde_json::to_string(&empty).unwrap(),
            r#"{"data_offset":0,"data_size":0,"is_gpu":false,"is_owner":true,"is_sealed":false,"map_size":0,"object_id":9223372036854775808,"pointer":0,"store_fd":-1}"#
        );
    }

    #[test]
    fn clients_map_the_arena_and_nothing_beyond_it() {
        let payload = Payload::in_arena(ObjectId(1 << 63 | 5), 64, 48, false, 268_435_456);
        assert_eq!(payload.map_size - 8, 268_435_456);
        assert_eq!((payload.data_offset, payload.data_size), (64, 48));
    }
}
