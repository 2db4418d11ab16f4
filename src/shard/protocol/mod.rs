//! The vineyard wire; no sockets.
//!
//! A conversation is a strict exchange on one connection: a request, then its reply, then the
//! next request. Either is a frame ([`frame`]): eight bytes of length, little endian, and that
//! many bytes of JSON, an object with a string `type`. Only errors have no `type`, but a `code`
//! ([`code`]) and a `message`. Here is one, frame headers left out:
//!
//! ```text
//! client  {"session_id":0,"store_type":1,"type":"register_request","version":"0.24.2"}
//! server  {"instance_id":0,"ipc_socket":"/run/vineyard.sock","rpc_endpoint":"node:9600","session_id":0,
//!          "store_match":true,"support_rpc_compression":false,"type":"register_reply","version":"0.24.2"}
//! client  {"size":48,"type":"create_buffer_request"}
//! server  {"created":{"data_offset":64,"data_size":48,…,"object_id":16753566656474644514,"store_fd":1},
//!          "fd":1,"id":16753566656474644514,"type":"create_buffer_reply"}
//! server  one byte, with the descriptor of region 1 (UNIX socket, and only the first time)
//! client  {"object_id":16753566656474644514,"type":"seal_request"}
//! server  {"type":"seal_reply"}
//! client  {"id":5,"type":"persist_request"}
//! server  {"code":27,"message":"get subtree failed: o0000000000000005"}
//! client  {"type":"exit_request"}                               and the server closes
//! ```
//!
//! [`message`] tells what a frame's body is, [`request`] and [`reply`] are what can be said, and
//! [`payload`] is how a blob is described to a client. Bytes of blobs on the stream stand between
//! frames, as they are or compressed ([`zstd`]).

pub mod code;
pub mod frame;
pub mod message;
pub mod payload;
pub mod reply;
pub mod request;
pub mod zstd;

/// What we tell clients our version is. They warn below their own minor version.
pub const VERSION: &str = "0.24.2";
