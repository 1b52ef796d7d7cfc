//! The harness: real `forebay` processes in folders of their own, real S3 servers, a real HDFS, a proxy that misbehaves.
//!
//! Everything started here is killed by its id and unmounted when its handle is dropped. A seed is printed by each
//! randomised test and taken back from `FOREBAY_TEST_SEED`.

pub mod capture;
pub mod cluster;
pub mod disk;
pub mod fuse;
pub mod hadoop;
pub mod hdfs;
pub mod kube;
pub mod proxy;
pub mod raw;
pub mod s3;
pub mod suite;

pub use cluster::{Cluster, Worker};

use rand::SeedableRng;
use rand::rngs::StdRng;
use std::path::PathBuf;

/// The folder that cargo built into, from the test's own place in it.
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("own path");
    exe.ancestors().find(|p| p.join("forebay").is_file()).expect("run `cargo build --release -p forebay` first").to_owned()
}

/// The binary under test.
pub fn forebay() -> PathBuf {
    target_dir().join("forebay")
}

/// A generator whose seed is printed, with the command that replays it.
pub fn rng(test: &str) -> StdRng {
    let seed = std::env::var("FOREBAY_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random::<u64>);
    eprintln!("replay with: FOREBAY_TEST_SEED={seed} cargo test --release -p forebay-tests {test} -- --nocapture");
    StdRng::seed_from_u64(seed)
}

/// Bytes that tell their own place: each 8 bytes are a mix of `tag` and their offset.
pub fn pattern(tag: u64, offset: u64, length: usize) -> Vec<u8> {
    let first = offset / 8;
    let words = (offset + length as u64).div_ceil(8) - first;
    let mut out = Vec::with_capacity(words as usize * 8);
    for i in first..first + words {
        out.extend_from_slice(&(tag ^ i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes());
    }
    out[(offset % 8) as usize..][..length].to_vec()
}

/// Waits until `check` holds, at most `seconds`.
pub async fn eventually<F: AsyncFnMut() -> bool>(what: &str, seconds: u64, mut check: F) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while !check().await {
        assert!(std::time::Instant::now() < deadline, "not within {seconds} s: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
