//! Tiers of a worker: an ordered list, fastest first, each of one or more folders.

use crate::{Error, Result, err};
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// What a tier's folders are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Medium {
    /// tmpfs: read through mappings, gone with the machine.
    #[serde(rename = "MEM")]
    Mem,
    /// A file system on flash: read with `pread`, so that a disk's error is an error and not a signal.
    #[serde(rename = "SSD")]
    Ssd,
    /// A file system on disks: as `SSD`.
    #[serde(rename = "HDD")]
    Hdd,
}

impl Medium {
    /// The name in reports and on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Medium::Mem => "MEM",
            Medium::Ssd => "SSD",
            Medium::Hdd => "HDD",
        }
    }
}

impl FromStr for Medium {
    type Err = Error;

    fn from_str(raw: &str) -> Result<Self> {
        [Medium::Mem, Medium::Ssd, Medium::Hdd]
            .into_iter()
            .find(|m| m.name().eq_ignore_ascii_case(raw))
            .ok_or_else(|| err!(InvalidArgument, "{raw:?} is not a medium: MEM, SSD or HDD"))
    }
}

/// One folder of a tier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierDir {
    /// The folder; made when missing.
    pub path: PathBuf,
    /// Bytes its blocks may occupy.
    pub quota: ByteSize,
    /// Bytes of its file system that are left free for others.
    #[serde(default)]
    pub reserve: ByteSize,
}

/// One tier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// What it is on.
    pub medium: Medium,
    /// Its folders, which share load.
    pub dirs: Vec<TierDir>,
}

/// Which block leaves a full folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EvictPolicy {
    /// Three FIFO queues (Yang et al., SOSP 2023): a scan passes through the small one and leaves the rest alone.
    #[serde(rename = "s3-fifo")]
    S3Fifo,
    /// The one used longest ago.
    #[serde(rename = "lru")]
    Lru,
    /// The one used least often, older uses counting ever less.
    #[serde(rename = "lfu")]
    Lfu,
}

/// Which folder of a tier takes a new block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllocatePolicy {
    /// The one with most room.
    MostFree,
    /// One after the other.
    RoundRobin,
}
