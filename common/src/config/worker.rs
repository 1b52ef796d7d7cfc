//! Section `[worker]`.

use crate::{Result, err};
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Whether the worker mounts a tmpfs of its own for the MEM tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemMount {
    /// Where it may; otherwise `mem_dir` is used as it is, and start-up and `doctor` say so.
    Auto,
    /// Or not start.
    Always,
    /// Use `mem_dir` as it is.
    Never,
}

/// The worker's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// The worker's id lives here; made when missing.
    pub data_dir: PathBuf,
    /// Address the ports are bound to; other than loopback needs `security.allow_insecure_bind`.
    pub bind: String,
    /// Host name or address that others reach this worker by; `bind` when empty.
    pub advertise_host: String,
    /// Block bytes over TCP. 0 takes any free port.
    pub data_port: u16,
    /// `/metrics`, `/healthz`. 0 takes any free port.
    pub web_port: u16,
    /// Folder of the Unix sockets; the worker's own is `worker-<id>.sock` in it.
    pub socket_dir: PathBuf,
    /// Folder of the MEM tier.
    pub mem_dir: PathBuf,
    /// Bytes the MEM tier may use.
    pub mem_quota: ByteSize,
    /// Whether to mount a tmpfs with huge pages on `mem_dir`.
    pub mem_mount: MemMount,
    /// Blocks kept open at once: each takes two descriptors and a mapping. The one used longest ago is evicted above it.
    /// 0: as many as the limits of the process allow.
    pub blocks_max: usize,
    /// Heartbeats to the master; changes of blocks are reported sooner.
    pub heartbeat_interval_ms: u64,
    /// Largest single read of an under store.
    pub fetch_range: ByteSize,
    /// Reads of under stores that may be under way at once.
    pub fetch_concurrency: usize,
    /// Bytes fetched ahead of a sequential reader.
    pub fetch_readahead: ByteSize,
    /// Sessions (connections) served at once; a further one is refused.
    pub sessions_max: usize,
    /// Bytes one session may hold granted; above it reads are streamed.
    pub session_pinned_max: ByteSize,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let data = super::default_data_dir().join("worker");
        WorkerConfig {
            mem_dir: data.join("mem"),
            data_dir: data,
            bind: "127.0.0.1".into(),
            advertise_host: String::new(),
            data_port: 29998,
            web_port: 30000,
            socket_dir: super::client::default_socket_dir(),
            mem_quota: ByteSize::gib(1),
            mem_mount: MemMount::Auto,
            blocks_max: 0,
            heartbeat_interval_ms: 1_000,
            fetch_range: ByteSize::mib(4),
            fetch_concurrency: 16,
            fetch_readahead: ByteSize::mib(16),
            sessions_max: 1_024,
            session_pinned_max: ByteSize::gib(64),
        }
    }
}

impl WorkerConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.mem_quota.as_u64() < 4 << 20 {
            return Err(err!(InvalidArgument, "worker.mem_quota = {}: must be at least 4 MiB", self.mem_quota));
        }
        if self.fetch_concurrency == 0 || self.sessions_max == 0 || self.fetch_range.as_u64() == 0 {
            return Err(err!(InvalidArgument, "worker.fetch_concurrency, fetch_range and sessions_max must be at least 1"));
        }
        Ok(())
    }

    /// The host that others reach this worker by.
    pub fn host(&self) -> &str {
        if self.advertise_host.is_empty() { &self.bind } else { &self.advertise_host }
    }
}
