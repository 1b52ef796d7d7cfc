//! Compiles our `.proto` files without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["types", "file_system", "worker", "admin", "data", "journal", "store", "mount"].map(|n| format!("proto/{n}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let set = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    Ok(())
}
