//! The code generated from `proto/`, alone here with its own lint allowances.

#![allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
#![allow(clippy::wildcard_enum_match_arm)]

/// Package `csi.v1`: the Container Storage Interface.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Package `pluginregistration`: how kubelet learns of a plugin.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
