//! Section `[fuse]`: mounts made by `forebay mount`. Its `-o NAME=VALUE` sets the same.

use crate::{Result, err};
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Settings of a FUSE mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FuseConfig {
    /// How long the kernel trusts attributes it was told. What is opened is looked at again whatever this is.
    pub attr_ttl_ms: u64,
    /// How long the kernel trusts names it was told.
    pub entry_ttl_ms: u64,
    /// Threads that take requests from the kernel.
    pub threads: usize,
    /// Cached files of one block are read by the kernel itself, where it and the process's capabilities allow it.
    pub passthrough: bool,
    /// Bytes that the kernel reads ahead, in KiB; 0 leaves what it chose. Needs root.
    pub read_ahead_kb: u64,
    /// Where files that are being written are kept until they are handed over.
    pub staging_dir: PathBuf,
    /// Where the process of a mount listens for one that takes it over; empty: /run/forebay-mount for root, else `staging_dir`.
    pub control_dir: PathBuf,
    /// Other users than the one who mounts may use it.
    pub allow_other: bool,
    /// Wait for a master that does not answer, however long; else a call fails after `client.call_timeout_ms`.
    pub hard: bool,
    /// Locks of files (flock, fcntl) hold between all mounts; else among the programs of each.
    pub shared_locks: bool,
    /// Files fetched ahead in a folder whose files are opened in their order; 0: none.
    pub prefetch_files: usize,
    /// Bytes of this process's memory for what the kernel knows of files; above it, the kernel is asked to forget what was not used for longest (Linux 6.18). 0: an eighth
    /// of what the process's control group, or the machine, has, 1 GiB at most. Less while the group has little left.
    pub nodes_memory: ByteSize,
}

impl Default for FuseConfig {
    fn default() -> Self {
        FuseConfig {
            attr_ttl_ms: 1_000,
            entry_ttl_ms: 1_000,
            threads: 4,
            passthrough: true,
            read_ahead_kb: 4_096,
            staging_dir: "/var/tmp".into(),
            control_dir: PathBuf::new(),
            allow_other: true,
            hard: false,
            shared_locks: true,
            prefetch_files: 16,
            nodes_memory: ByteSize::b(0),
        }
    }
}

impl FuseConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.prefetch_files > 1_024 {
            return Err(err!(InvalidArgument, "fuse.prefetch_files = {}: must be at most 1024", self.prefetch_files));
        }
        if !(1..=64).contains(&self.threads) {
            return Err(err!(InvalidArgument, "fuse.threads = {}: must be between 1 and 64", self.threads));
        }
        Ok(())
    }

    /// Takes an option of `mount -o`. Errors: one that is none, naming those there are.
    pub fn set(&mut self, option: &str) -> Result<()> {
        let (name, value) = option.split_once('=').unwrap_or((option, "true"));
        fn parsed<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
            value.parse().map_err(|_| err!(InvalidArgument, "-o {name}={value}: this is no value for {name}"))
        }
        match name {
            "attr_ttl_ms" => self.attr_ttl_ms = parsed(name, value)?,
            "entry_ttl_ms" => self.entry_ttl_ms = parsed(name, value)?,
            "threads" => self.threads = parsed(name, value)?,
            "passthrough" => self.passthrough = parsed(name, value)?,
            "read_ahead_kb" => self.read_ahead_kb = parsed(name, value)?,
            "staging_dir" => self.staging_dir = value.into(),
            "control_dir" => self.control_dir = value.into(),
            "allow_other" => self.allow_other = parsed(name, value)?,
            "hard" => self.hard = parsed(name, value)?,
            "prefetch_files" => self.prefetch_files = parsed(name, value)?,
            "nodes_memory" => self.nodes_memory = parsed(name, value)?,
            "shared_locks" => self.shared_locks = parsed(name, value)?,
            _ => {
                return Err(err!(
                    InvalidArgument,
                    "-o {name} is no option of a Forebay mount: there are ro, allow_other, attr_ttl_ms, entry_ttl_ms, threads, passthrough, read_ahead_kb, staging_dir, control_dir, hard, shared_locks, prefetch_files, nodes_memory"
                ));
            }
        }
        self.check()
    }
}
