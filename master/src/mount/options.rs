//! Options of a mount that are ours; the others belong to the under store.

use super::appearance::{self, Appearance};
use crate::namespace::Walk;
use bytes::Bytes;
use bytesize::ByteSize;
use forebay_common::config::{MasterConfig, OptionValue};
use forebay_common::limits::{BLOCK_SIZE_RANGE_BYTES, PAGE_SIZE_RANGE_BYTES, REPLICAS_MAX};
use forebay_common::{Result, err};
use forebay_proto::Setting;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Parsed options of one mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// How long what is known of the store is trusted; `None` for ever.
    pub sync_interval: Option<Duration>,
    /// Block size of new and newly seen files.
    pub block_size_bytes: u64,
    /// Page size of new and newly seen files.
    pub page_size_bytes: u64,
    /// Bytes of each worker that this mount may have; 0: no limit.
    pub quota_bytes: u64,
    /// Bytes of each worker that other mounts leave to it.
    pub reserved_bytes: u64,
    /// How files are written where neither the writer nor their path says so.
    pub write_type: WriteType,
    /// Copies in the cache before a file of the cache alone, or one that gets to its store later, is acknowledged.
    pub replicas: u32,
    /// How long a file waits before it goes to the under store: what is moved, or deleted, meanwhile costs nothing there.
    pub persist_delay: Duration,
    /// Copies of a block that reads elsewhere may make; 0 or 1: none.
    pub passive_replicas: u32,
    /// How what the store holds appears.
    pub appearance: Appearance,
    /// What the under store gets.
    pub ufs: BTreeMap<String, String>,
}

/// When a written file is acknowledged, and where its bytes are then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteType {
    /// In the under store, and in the cache where there is room.
    Through,
    /// In the cache; in the under store soon after.
    Async,
    /// In the cache alone.
    CacheOnly,
    /// In the under store alone.
    UfsOnly,
}

impl std::str::FromStr for WriteType {
    type Err = forebay_common::Error;

    fn from_str(raw: &str) -> Result<WriteType> {
        match raw {
            "through" => Ok(WriteType::Through),
            "async" => Ok(WriteType::Async),
            "cache_only" => Ok(WriteType::CacheOnly),
            "ufs_only" => Ok(WriteType::UfsOnly),
            other => Err(err!(InvalidArgument, "write type {other:?} is not through, async, cache_only or ufs_only")),
        }
    }
}

const OWN: &[&str] =
    &["sync_interval_ms", "block_size", "page_size", "quota", "reserved", "write_type", "replicas", "persist_delay_ms", "passive_replicas"];

/// `sync_interval_ms` as it is written: -1 never, 0 always.
fn interval(raw: &str) -> Result<Option<Duration>> {
    let ms: i64 = raw.parse().map_err(|_| err!(InvalidArgument, "option sync_interval_ms = {raw:?} is not a number (-1: never, 0: always)"))?;
    Ok(u64::try_from(ms).ok().map(Duration::from_millis))
}

fn replicas(raw: &str) -> Result<u32> {
    let bad = || err!(InvalidArgument, "replicas = {raw:?} is not a number from 1 to {REPLICAS_MAX}");
    raw.parse().ok().filter(|n| (1..=REPLICAS_MAX).contains(n)).ok_or_else(bad)
}

/// What is set on a path, for it and all below.
#[derive(Clone, Copy, Debug, Default)]
pub struct PathConfig {
    /// See `MountOptions`; the inner `None`: for ever.
    pub sync_interval: Option<Option<Duration>>,
    pub write_type: Option<WriteType>,
    pub replicas: Option<u32>,
}

impl PathConfig {
    /// Errors: `InvalidArgument` naming the setting.
    pub fn parse(settings: &[Setting]) -> Result<PathConfig> {
        let mut out = PathConfig::default();
        for Setting { name, value } in settings {
            match name.as_str() {
                "sync_interval_ms" => out.sync_interval = Some(interval(value)?),
                "write_type" => out.write_type = Some(value.parse()?),
                "replicas" => out.replicas = Some(replicas(value)?),
                other => return Err(err!(InvalidArgument, "a path has no setting {other:?}: there are sync_interval_ms, write_type and replicas")),
            }
        }
        Ok(out)
    }

    /// What holds at the end of a walk: the deepest folder that says something, each setting for itself.
    pub fn of(walk: &Walk) -> PathConfig {
        let mut out = PathConfig::default();
        for found in walk.chain.iter().filter(|f| !f.inode.config.is_empty()) {
            // What is kept was parsed when it was set.
            let own = PathConfig::parse(&found.inode.config).unwrap_or_default();
            out.sync_interval = own.sync_interval.or(out.sync_interval);
            out.write_type = own.write_type.or(out.write_type);
            out.replicas = own.replicas.or(out.replicas);
        }
        out
    }
}

impl MountOptions {
    /// Errors: `InvalidArgument` naming the option.
    pub fn parse(options: &HashMap<String, String>, config: &MasterConfig) -> Result<Self> {
        let bytes = |name: &str, default: u64| -> Result<u64> {
            let Some(raw) = options.get(name) else { return Ok(default) };
            raw.parse::<ByteSize>().map(|b| b.as_u64()).map_err(|_| err!(InvalidArgument, "option {name} = {raw:?} is not a size like 1MiB"))
        };
        let sync_interval = match options.get("sync_interval_ms") {
            None => Some(Duration::from_millis(config.sync_interval_ms)),
            Some(raw) => interval(raw)?,
        };
        let write_type = options.get("write_type").map_or(Ok(WriteType::Through), |raw| raw.parse())?;
        let copies = |name: &str| options.get(name).map_or(Ok(1), |raw| replicas(raw).map_err(|e| e.context(format!("option {name}"))));
        let persist_delay = match options.get("persist_delay_ms").map(|raw| (raw, raw.parse::<u64>())) {
            None => Duration::ZERO,
            Some((_, Ok(ms))) => Duration::from_millis(ms),
            Some((raw, Err(_))) => return Err(err!(InvalidArgument, "option persist_delay_ms = {raw:?} is not a number")),
        };
        let block_size_bytes = bytes("block_size", config.block_size.as_u64())?;
        let page_size_bytes = bytes("page_size", config.page_size.as_u64())?;
        if !BLOCK_SIZE_RANGE_BYTES.contains(&block_size_bytes)
            || !PAGE_SIZE_RANGE_BYTES.contains(&page_size_bytes)
            || !page_size_bytes.is_power_of_two()
        {
            return Err(err!(InvalidArgument, "block_size must be 64 KiB to 4 GiB, page_size a power of two from 64 KiB to 64 MiB"));
        }
        let (quota_bytes, reserved_bytes) = (bytes("quota", 0)?, bytes("reserved", 0)?);
        if quota_bytes > 0 && reserved_bytes > quota_bytes {
            return Err(err!(InvalidArgument, "option reserved = {reserved_bytes} is more than quota = {quota_bytes}"));
        }
        let ufs = options
            .iter()
            .filter(|(name, _)| !OWN.contains(&name.as_str()) && !appearance::OPTIONS.contains(&name.as_str()))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        Ok(MountOptions {
            sync_interval,
            block_size_bytes,
            page_size_bytes,
            quota_bytes,
            reserved_bytes,
            write_type,
            replicas: copies("replicas")?,
            persist_delay,
            passive_replicas: copies("passive_replicas")?,
            appearance: Appearance::parse(options)?,
            ufs,
        })
    }
}

/// The values of configured options, secrets read from where they are.
pub fn resolve(options: &BTreeMap<String, OptionValue>) -> Result<HashMap<String, String>> {
    options.iter().map(|(name, value)| Ok((name.clone(), value.resolve().map_err(|e| e.context(format!("option {name}")))?))).collect()
}

/// A path as it goes into a command.
pub fn raw(path: &forebay_common::AbsPath) -> Bytes {
    Bytes::copy_from_slice(path.as_bytes())
}
