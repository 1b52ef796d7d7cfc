//! Section `[client]`.

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The client's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// `host:port` of the master.
    pub master: String,
    /// Read blocks of a worker on this machine through a passed descriptor; off: over the network.
    pub short_circuit: bool,
    /// Folder in which workers on this machine keep their sockets.
    pub socket_dir: PathBuf,
    /// Who is asking; the operating system's user when empty.
    pub user: String,
    /// The Kubernetes node this runs on, for a master that may not look at pods; empty outside of one.
    #[serde(deserialize_with = "super::scalar::text")]
    pub node_name: String,
    /// Limit of one call to the master, retries included.
    pub call_timeout_ms: u64,
    /// Limit of connecting to a worker.
    pub connect_timeout_ms: u64,
    /// Limit of waiting for a worker's next frame.
    pub read_timeout_ms: u64,
    /// Bytes asked for ahead of a sequential reader.
    pub readahead: ByteSize,
    /// Grants (two descriptors each) kept for blocks read before.
    pub grants_max: usize,
    /// How files are written; empty: as their path or mount says. `through`: cache and under store, acknowledged when both hold it. `async`: cache, and under store soon after.
    /// `cache_only`. `ufs_only`.
    pub write_type: String,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            master: "127.0.0.1:19998".into(),
            short_circuit: true,
            socket_dir: default_socket_dir(),
            user: String::new(),
            node_name: String::new(),
            call_timeout_ms: 60_000,
            connect_timeout_ms: 2_000,
            read_timeout_ms: 60_000,
            readahead: ByteSize::mib(16),
            grants_max: 1_024,
            write_type: String::new(),
        }
    }
}

/// `/run/forebay` for root, else the user's runtime folder: the same on both sides, so that they meet by default.
pub(super) fn default_socket_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/run/forebay");
    }
    directories::BaseDirs::new()
        .and_then(|d| d.runtime_dir().map(|r| r.join("forebay")))
        .unwrap_or_else(|| PathBuf::from(format!("/tmp/forebay-{}", nix::unistd::geteuid())))
}
