//! A VineyardRuntime on this node: what its YAML asks for, where its files lie, how it fares.

mod board;
mod id;

pub use board::{Board, NotReady};
pub use id::{RuntimeId, RuntimeIdError};
