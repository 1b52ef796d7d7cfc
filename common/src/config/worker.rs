//! Section `[worker]`.

use super::tier::{AllocatePolicy, EvictPolicy, Medium, TierConfig, TierDir};
use crate::limits::CHUNK_SIZE_BYTES;
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

/// Blocks that name no cluster: a version wrote them that knew none.
pub const UNNAMED_CLUSTER: &str = "unnamed";
/// Blocks of whichever cluster.
const ANY_CLUSTER: &str = "any";

/// Which blocks of another cluster a worker may drop to be let into its master's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// None.
    Nothing,
    /// All, if the bytes of each are in an under store as well.
    Cached,
    /// All.
    All,
}

/// Tiers of one worker.
const TIERS_MAX: usize = 3;
/// Folders of one tier.
const TIER_DIRS_MAX: usize = 64;

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
    /// The Kubernetes node it is on; empty outside of one.
    #[serde(deserialize_with = "super::scalar::text")]
    pub node_name: String,
    /// Block bytes over TCP. 0 takes any free port.
    pub data_port: u16,
    /// `/metrics`, `/healthz`. 0 takes any free port.
    pub web_port: u16,
    /// Whether Hadoop's clients are served: off on a machine that runs a DataNode of its own, or with other `hadoop_*port`s.
    pub hadoop: bool,
    /// Block bytes for Hadoop's clients over TCP (DataTransferProtocol). 0 takes any free port.
    pub hadoop_port: u16,
    /// Where Hadoop's clients ask how much of a block that is being written can be read. 0 takes any free port.
    pub hadoop_ipc_port: u16,
    /// What Hadoop's schedulers call this machine; `advertise_host` when empty.
    pub hadoop_host: String,
    /// Connections of Hadoop's clients served at once; a further one is refused.
    pub hadoop_connections_max: usize,
    /// Whether what they read carries checksums (CRC32C): without, a bit that flips on the way is not noticed.
    pub hadoop_checksums: bool,
    /// Bytes per checksum of what they read: a small read ships up to twice as many.
    pub hadoop_chunk: ByteSize,
    /// Folder of the Unix sockets; the worker's own is `worker-<id>.sock` in it.
    pub socket_dir: PathBuf,
    /// Folder of the MEM tier; used where `tiers` is empty.
    pub mem_dir: PathBuf,
    /// Bytes the MEM tier may use; used where `tiers` is empty.
    pub mem_quota: ByteSize,
    /// Whether to mount a tmpfs with huge pages on folders of a MEM tier.
    pub mem_mount: MemMount,
    /// The tiers, fastest first. Empty: one MEM tier of `mem_dir` and `mem_quota`.
    pub tiers: Vec<TierConfig>,
    /// Clusters whose blocks this worker drops when its master is of another one: the clusters' ids, `"unnamed"` for blocks that name none, `"any"` for those of all
    /// clusters as long as no bytes among them are the only ones. Empty: it is not let in, and waits.
    pub discard_blocks_of: Vec<String>,
    /// Which block leaves a full folder.
    pub evict_policy: EvictPolicy,
    /// Which folder of a tier takes a new block.
    pub allocate_policy: AllocatePolicy,
    /// Eviction of a folder begins when this much of its quota is used, percent.
    pub watermark_high_percent: u64,
    /// And ends when no more than this is used, percent.
    pub watermark_low_percent: u64,
    /// Uses of a block in a lower tier, within `promote_window_ms`, after which it is moved up. 0: never.
    pub promote_after: u32,
    /// A file of several blocks that mounts of this machine open so often within ten minutes is kept once more in one piece, for their kernels to read; 0: never.
    pub join_after: u32,
    /// See `promote_after`.
    pub promote_window_ms: u64,
    /// Blocks used within this time are the working set (the metric `forebay_worker_working_set_bytes`).
    pub working_set_window_ms: u64,
    /// Blocks kept open at once: each takes two descriptors and a mapping. The one used longest ago is evicted above it.
    /// 0: as many as the limits of the process allow.
    pub blocks_max: usize,
    /// Bytes per second that the scrubber reads.
    pub scrub_rate: ByteSize,
    /// Between two rounds of the scrubber.
    pub scrub_interval_ms: u64,
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
    /// How long a client may keep a block that was taken back; then its connection is closed.
    pub revoke_deadline_ms: u64,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let data = super::default_data_dir().join("worker");
        WorkerConfig {
            mem_dir: data.join("mem"),
            data_dir: data,
            bind: "127.0.0.1".into(),
            advertise_host: String::new(),
            node_name: String::new(),
            data_port: 29998,
            web_port: 30000,
            hadoop: true,
            hadoop_port: 9866,
            hadoop_ipc_port: 9867,
            hadoop_host: String::new(),
            hadoop_connections_max: 4_096,
            hadoop_checksums: true,
            hadoop_chunk: ByteSize::kib(64),
            socket_dir: super::client::default_socket_dir(),
            mem_quota: ByteSize::gib(1),
            mem_mount: MemMount::Auto,
            tiers: Vec::new(),
            discard_blocks_of: Vec::new(),
            evict_policy: EvictPolicy::S3Fifo,
            allocate_policy: AllocatePolicy::MostFree,
            watermark_high_percent: 95,
            watermark_low_percent: 90,
            promote_after: 2,
            join_after: 2,
            promote_window_ms: 60_000,
            working_set_window_ms: 3_600_000,
            blocks_max: 0,
            scrub_rate: ByteSize::mib(256),
            scrub_interval_ms: 24 * 3_600_000,
            heartbeat_interval_ms: 1_000,
            fetch_range: ByteSize::mib(4),
            fetch_concurrency: 16,
            fetch_readahead: ByteSize::mib(16),
            sessions_max: 1_024,
            session_pinned_max: ByteSize::gib(64),
            revoke_deadline_ms: 10_000,
        }
    }
}

impl WorkerConfig {
    pub(super) fn check(&self) -> Result<()> {
        let tiers = self.tiers();
        for (i, tier) in tiers.iter().enumerate() {
            if tier.dirs.is_empty() || i >= TIERS_MAX || tier.dirs.len() > TIER_DIRS_MAX {
                return Err(err!(InvalidArgument, "worker.tiers: at most {TIERS_MAX} tiers, each with 1 to {TIER_DIRS_MAX} folders"));
            }
            if tiers[..i].iter().any(|above| above.medium >= tier.medium) {
                return Err(err!(InvalidArgument, "worker.tiers: each medium once, in the order MEM, SSD, HDD"));
            }
            for dir in &tier.dirs {
                if dir.quota.as_u64() < 4 << 20 {
                    return Err(err!(
                        InvalidArgument,
                        "the quota of {} tier {} is {}: must be at least 4 MiB",
                        tier.medium.name(),
                        dir.path.display(),
                        dir.quota
                    ));
                }
                let same = tiers.iter().flat_map(|t| &t.dirs).filter(|d| d.path == dir.path).count();
                if same > 1 {
                    return Err(err!(InvalidArgument, "worker.tiers: {} is named {same} times", dir.path.display()));
                }
            }
        }
        if !(1..=100).contains(&self.watermark_high_percent) || self.watermark_low_percent > self.watermark_high_percent {
            return Err(err!(InvalidArgument, "worker.watermark_low_percent must be at most watermark_high_percent, and that 1 to 100"));
        }
        let chunk = self.hadoop_chunk.as_u64();
        if !(512..=CHUNK_SIZE_BYTES as u64).contains(&chunk) || !chunk.is_power_of_two() {
            return Err(err!(InvalidArgument, "worker.hadoop_chunk = {chunk}: must be a power of two from 512 to {CHUNK_SIZE_BYTES}"));
        }
        if self.hadoop_connections_max == 0 {
            return Err(err!(InvalidArgument, "worker.hadoop_connections_max must be at least 1"));
        }
        if self.fetch_concurrency == 0 || self.sessions_max == 0 || self.fetch_range.as_u64() == 0 {
            return Err(err!(InvalidArgument, "worker.fetch_concurrency, fetch_range and sessions_max must be at least 1"));
        }
        Ok(())
    }

    /// The tiers, fastest first.
    pub fn tiers(&self) -> Vec<TierConfig> {
        if !self.tiers.is_empty() {
            return self.tiers.clone();
        }
        let dir = TierDir { path: self.mem_dir.clone(), quota: self.mem_quota, reserve: ByteSize::b(0) };
        vec![TierConfig { medium: Medium::Mem, dirs: vec![dir] }]
    }

    /// What may be dropped of a cluster's blocks; empty: of those that name none.
    pub fn discards(&self, cluster: &str) -> Discard {
        let named = |name: &str| self.discard_blocks_of.iter().any(|of| of == name);
        match if cluster.is_empty() { UNNAMED_CLUSTER } else { cluster } {
            of if named(of) => Discard::All,
            _ if named(ANY_CLUSTER) => Discard::Cached,
            _ => Discard::Nothing,
        }
    }

    /// The host that others reach this worker by.
    pub fn host(&self) -> &str {
        if self.advertise_host.is_empty() { &self.bind } else { &self.advertise_host }
    }
}
