//! A VineyardRuntime on this node: what its YAML asks for, where its files lie, how it fares.
//!
//! ```text
//! RuntimesDir::changed, read ─► Wanted ─┐
//!                 what was made so far ─┴► reconcile ─► steps, and what is made then
//! RuntimeSpec ─► Layout ─► Discovery::publish      Board: who waits for a runtime
//! ```

mod board;
mod discovery;
mod id;
mod layout;
pub mod quantity;
mod reconcile;
mod spec;
mod walk;
mod watch;

pub use board::{Board, NotReady};
pub use discovery::{Discovery, DiscoveryError};
pub use id::{RuntimeId, RuntimeIdError};
pub use layout::{
    CONFIG, FLUID_PATH, Layout, LayoutError, RPC_ENDPOINT, SOCKET, SOCKET_PATH_LIMIT, WORKER_SOCKET,
};
pub use reconcile::{Complaint, Decision, Difference, Present, Running, Step, Wanted, reconcile};
pub use spec::{DEFAULT_RPC_PORT, FILE_LIMIT, RuntimeSpec, SpecError, parse};
pub use walk::FieldError;
pub use watch::{RuntimesDir, WatchError};
