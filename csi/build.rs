//! Compiles what we speak of CSI and of kubelet's plugin registration, without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let set = protox::compile(["proto/csi.proto", "proto/registration.proto"], ["proto"])?;
    tonic_prost_build::configure().build_client(true).compile_fds(set)?;
    Ok(())
}
