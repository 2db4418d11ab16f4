//! Keeps processes and descriptors; knows nothing of CSI, FUSE or vineyard.
