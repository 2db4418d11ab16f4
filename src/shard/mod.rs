//! The per-node store: one vineyard instance. Knows nothing of CSI, FUSE or Kubernetes.
//!
//! [`bind_ipc`] and [`bind_rpc`] make the sockets (a supervisor may also hand them in),
//! [`store::Store::open`] the store, and [`serve`] brings clients to it.

pub mod client;
pub mod ids;
pub mod memory;
pub mod protocol;
pub mod server;
pub mod spill;
pub mod store;

pub use server::{BindError, Listeners, bind_ipc, bind_rpc, serve};
