//! Fluid's door: the dummy filesystem by which fluid sees that a runtime is mounted.
