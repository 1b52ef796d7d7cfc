//! Section `[master]`.

use crate::limits::{BLOCK_SIZE_RANGE_BYTES, PAGE_SIZE_RANGE_BYTES};
use crate::{Result, err};
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Longest id of a cluster.
const CLUSTER_ID_MAX_BYTES: usize = 64;

/// The master's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MasterConfig {
    /// Journal, namespace and keys live here; made when missing.
    pub data_dir: PathBuf,
    /// The cluster's id where its data have none yet; drawn when empty. For data of a version that knew none, put back beside workers that know it.
    pub cluster_id: String,
    /// Address the ports are bound to; other than loopback needs `security.allow_insecure_bind`.
    pub bind: String,
    /// Clients and workers call this port (tonic). 0 takes any free one.
    pub rpc_port: u16,
    /// `/metrics`, `/healthz`. 0 takes any free one.
    pub web_port: u16,
    /// Whether Hadoop's clients are served: off on a machine that runs a NameNode of its own, or with another `hadoop_port`.
    pub hadoop: bool,
    /// Hadoop's clients call this port (`hdfs://HOST:8020`). 0 takes any free one.
    pub hadoop_port: u16,
    /// Connections of Hadoop's clients served at once; a further one is refused.
    pub hadoop_connections_max: usize,
    /// Calls of one such connection under way at once; further ones wait.
    pub hadoop_calls_max: usize,
    /// Bytes of one such call.
    pub hadoop_frame_max: ByteSize,
    /// Smallest block size that Hadoop's clients may ask for, as `dfs.namenode.fs-limits.min-block-size` there.
    pub hadoop_min_block_size: ByteSize,
    /// Racks of machines, as Hadoop's `net.topology.table.file.name`: a machine and its rack a line.
    pub topology_file: Option<PathBuf>,
    /// A script that names the racks of the machines it is given, as Hadoop's `net.topology.script.file.name`.
    pub topology_script: Option<PathBuf>,
    /// Block size of new and newly seen files.
    pub block_size: ByteSize,
    /// Page size: how much a read of a cold file fetches at least.
    pub page_size: ByteSize,
    /// How long what is known of an under store is trusted before the next open asks it again; a mount may say otherwise.
    pub sync_interval_ms: u64,
    /// A worker that was silent for this long is lost.
    pub worker_timeout_ms: u64,
    /// A writer that was silent for this long has lost its lease; its file is removed.
    pub lease_ttl_ms: u64,
    /// After so long without a word of a mount the locks of its files are given to others, in milliseconds.
    pub lock_ttl_ms: u64,
    /// How long a block token is good for.
    pub token_ttl_ms: u64,
    /// A new token key is made this often.
    pub token_key_rotation_ms: u64,
    /// Commands in one entry of the journal, hence per fsync.
    pub journal_batch_max_commands: usize,
    /// Commands that may wait for the journal; a further one is answered `LimitExceeded`.
    pub journal_queue_max_commands: usize,
    /// A checkpoint of the namespace is made, and the log before it dropped, after this many entries.
    pub checkpoint_every_entries: u64,
    /// Answers remembered per client, so that a repeated call is answered and not done twice.
    pub reply_window_per_client: u64,
    /// Clients whose answers are remembered.
    pub reply_clients_max: u64,
    /// Memory for blocks of RocksDB files.
    pub store_cache: ByteSize,
}

impl Default for MasterConfig {
    fn default() -> Self {
        MasterConfig {
            data_dir: super::default_data_dir().join("master"),
            cluster_id: String::new(),
            bind: "127.0.0.1".into(),
            rpc_port: 19998,
            web_port: 19999,
            hadoop: true,
            hadoop_port: 8020,
            hadoop_connections_max: 4_096,
            hadoop_calls_max: 256,
            hadoop_frame_max: ByteSize::mib(4),
            hadoop_min_block_size: ByteSize::mib(1),
            topology_file: None,
            topology_script: None,
            block_size: ByteSize::mib(128),
            page_size: ByteSize::mib(1),
            sync_interval_ms: 60_000,
            worker_timeout_ms: 10_000,
            lease_ttl_ms: 60_000,
            lock_ttl_ms: 30_000,
            token_ttl_ms: 3_600_000,
            token_key_rotation_ms: 12 * 3_600_000,
            journal_batch_max_commands: 256,
            journal_queue_max_commands: 16_384,
            checkpoint_every_entries: 200_000,
            reply_window_per_client: 64,
            reply_clients_max: 16_384,
            store_cache: ByteSize::mib(256),
        }
    }
}

impl MasterConfig {
    pub(super) fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.cluster_id.len() > CLUSTER_ID_MAX_BYTES || !self.cluster_id.chars().all(plain) {
            return Err(err!(InvalidArgument, "master.cluster_id: at most {CLUSTER_ID_MAX_BYTES} letters, digits, dots, dashes and underscores"));
        }
        let (block, page) = (self.block_size.as_u64(), self.page_size.as_u64());
        if !BLOCK_SIZE_RANGE_BYTES.contains(&block) {
            return Err(err!(InvalidArgument, "master.block_size = {block}: must be between 64 KiB and 4 GiB"));
        }
        if !PAGE_SIZE_RANGE_BYTES.contains(&page) || !page.is_power_of_two() {
            return Err(err!(InvalidArgument, "master.page_size = {page}: must be a power of two between 64 KiB and 64 MiB"));
        }
        if self.hadoop_connections_max == 0 || self.hadoop_calls_max == 0 {
            return Err(err!(InvalidArgument, "master.hadoop_connections_max and hadoop_calls_max must be at least 1"));
        }
        if self.journal_batch_max_commands == 0 || self.journal_queue_max_commands == 0 {
            return Err(err!(InvalidArgument, "master.journal_*_max_commands must be at least 1"));
        }
        Ok(())
    }
}
