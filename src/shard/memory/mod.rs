//! Shared memory: an allocator of offsets and the arena they are offsets of.
