//! Kubelet's door: the CSI Identity and Node services, and kubelet's plugin registration.

pub mod grpc;
