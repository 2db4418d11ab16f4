//! Compiles the published `.proto` files with protox, in this process: no protoc on the machine.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "proto/csi/v1/csi.proto",
        "proto/pluginregistration/v1/api.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto/csi/v1", "proto/pluginregistration/v1"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
