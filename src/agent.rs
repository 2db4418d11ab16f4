//! Composition, written last.
