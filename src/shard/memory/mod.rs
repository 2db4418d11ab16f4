//! Shared memory: how much of it is taken and where ([`Pool`]), and the file that it is
//! ([`Segment`]).
//!
//! Nothing here knows what a blob is. The pool decides and touches nothing; the segment acts.

mod allocator;
mod pool;
mod segment;

pub use pool::{Full, Pool};
pub use segment::{Error, Segment};
