//! Links libgcc's unwinder statically, so that glibc stays the only shared dependency of the binary: rustc asks for
//! `-lgcc_s`, and a linker script of that name, found first, answers with the static halves.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") {
        let dir = std::env::var("OUT_DIR").map_err(std::io::Error::other)?;
        std::fs::write(format!("{dir}/libgcc_s.so"), "GROUP ( libgcc_eh.a libgcc.a )\n")?;
        println!("cargo:rustc-link-arg-bins=-L{dir}");
    }
    Ok(())
}
