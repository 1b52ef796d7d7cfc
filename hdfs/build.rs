//! Compiles Hadoop's `.proto` files (vendored, see NOTICE) without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let names = ["RpcHeader", "IpcConnectionContext", "ProtobufRpcEngine2", "ClientNamenodeProtocol", "datatransfer"];
    let files = names.map(|n| format!("proto/{n}.proto"));
    let set = protox::compile(&files, ["proto"])?;
    prost_build::Config::new().bytes(["."]).disable_comments(["."]).compile_fds(set)?;
    Ok(())
}
