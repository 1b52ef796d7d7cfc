//! Options of a mount that are ours; the others belong to the under store.

use bytes::Bytes;
use bytesize::ByteSize;
use forebay_common::config::{MasterConfig, OptionValue};
use forebay_common::limits::{BLOCK_SIZE_RANGE_BYTES, PAGE_SIZE_RANGE_BYTES};
use forebay_common::{Result, err};
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
    /// What the under store gets.
    pub ufs: BTreeMap<String, String>,
}

const OWN: &[&str] = &["sync_interval_ms", "block_size", "page_size", "quota", "reserved"];

impl MountOptions {
    /// Errors: `InvalidArgument` naming the option.
    pub fn parse(options: &HashMap<String, String>, config: &MasterConfig) -> Result<Self> {
        let bytes = |name: &str, default: u64| -> Result<u64> {
            let Some(raw) = options.get(name) else { return Ok(default) };
            raw.parse::<ByteSize>().map(|b| b.as_u64()).map_err(|_| err!(InvalidArgument, "option {name} = {raw:?} is not a size like 1MiB"))
        };
        let sync_interval = match options.get("sync_interval_ms").map(|raw| (raw, raw.parse::<i64>())) {
            None => Some(Duration::from_millis(config.sync_interval_ms)),
            Some((_, Ok(ms))) => u64::try_from(ms).ok().map(Duration::from_millis),
            Some((raw, Err(_))) => return Err(err!(InvalidArgument, "option sync_interval_ms = {raw:?} is not a number (-1: never, 0: always)")),
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
        let ufs = options.iter().filter(|(name, _)| !OWN.contains(&name.as_str())).map(|(n, v)| (n.clone(), v.clone())).collect();
        Ok(MountOptions { sync_interval, block_size_bytes, page_size_bytes, quota_bytes, reserved_bytes, ufs })
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
