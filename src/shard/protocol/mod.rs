//! The vineyard wire; no sockets.
