//! The per-node store: one vineyard instance. Knows nothing of CSI, FUSE or Kubernetes.

pub mod ids;
pub mod memory;
pub mod protocol;
pub mod server;
pub mod store;
