//! `Tier`: folders of one medium, how a new block is spread over them, and what is counted of them.

use super::allocate::{self, Allocate, Candidate};
use super::dir::Dir;
use forebay_common::Result;
use forebay_common::config::{Medium, WorkerConfig};
use forebay_proto::{DirUsage, TierUsage};
use prometheus::{IntCounter, IntCounterVec, Opts};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

/// Counters that carry the tier as their label.
pub struct TierCounters {
    /// Pages served from here.
    pub hits: IntCounter,
    /// Pages that had to be fetched into here.
    pub misses: IntCounter,
    /// Bytes stored here.
    pub bytes_in: IntCounter,
    /// Bytes served from here by stream.
    pub bytes_out: IntCounter,
    /// Blocks moved up into this tier.
    pub promoted: IntCounter,
    /// Blocks moved down into this tier.
    pub demoted: IntCounter,
    /// Blocks that left this tier to make room, dropped or moved down.
    pub evicted: IntCounter,
    /// Microseconds that these evictions took.
    pub evict_micros: IntCounter,
    /// Blocks dropped because a checksum was wrong.
    pub quarantined: IntCounter,
}

fn labelled(name: &str, help: &str, tier: &str) -> IntCounter {
    static FAMILIES: LazyLock<std::sync::Mutex<std::collections::HashMap<String, IntCounterVec>>> = LazyLock::new(Default::default);
    let mut families = FAMILIES.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(family) = families.get(name) {
        return family.with_label_values(&[tier]);
    }
    match IntCounterVec::new(Opts::new(name, help), &["tier"]) {
        Ok(family) => {
            if let Err(e) = prometheus::register(Box::new(family.clone())) {
                tracing::warn!(name, error = %e, "metric is not registered");
            }
            families.entry(name.to_owned()).or_insert(family).with_label_values(&[tier])
        }
        Err(e) => {
            tracing::error!(name, error = %e, "metric has an impossible name");
            forebay_common::metrics::register_counter(name, help)
        }
    }
}

impl TierCounters {
    fn new(medium: Medium) -> Self {
        let tier = medium.name();
        TierCounters {
            hits: labelled("forebay_worker_tier_hits_total", "pages served from a tier", tier),
            misses: labelled("forebay_worker_tier_misses_total", "pages fetched into a tier", tier),
            bytes_in: labelled("forebay_worker_tier_bytes_in_total", "bytes stored in a tier", tier),
            bytes_out: labelled("forebay_worker_tier_bytes_out_total", "bytes served from a tier by stream", tier),
            promoted: labelled("forebay_worker_tier_promoted_total", "blocks moved up into a tier", tier),
            demoted: labelled("forebay_worker_tier_demoted_total", "blocks moved down into a tier", tier),
            evicted: labelled("forebay_worker_tier_evicted_total", "blocks that left a tier to make room", tier),
            evict_micros: labelled("forebay_worker_tier_evict_microseconds_total", "time that evictions from a tier took", tier),
            quarantined: labelled("forebay_worker_tier_quarantined_total", "blocks of a tier dropped because a checksum was wrong", tier),
        }
    }
}

/// One tier.
pub struct Tier {
    /// What it is on.
    pub medium: Medium,
    /// Its folders.
    pub dirs: Vec<Arc<Dir>>,
    /// Its counters.
    pub counters: TierCounters,
    allocate: Box<dyn Allocate>,
}

impl Tier {
    /// Prepares all tiers of a worker, fastest first. Errors: a folder that cannot be used, named.
    pub fn prepare_all(config: &WorkerConfig) -> Result<Vec<Tier>> {
        let tiers = config.tiers();
        let memory = tiers.iter().filter(|t| t.medium == Medium::Mem).flat_map(|t| &t.dirs).map(|d| d.quota.as_u64()).sum();
        super::dir::check_memory(memory)?;
        tiers
            .iter()
            .map(|tier| {
                let dirs = tier.dirs.iter().map(|dir| Dir::prepare(config, tier.medium, dir).map(Arc::new)).collect::<Result<_>>()?;
                Ok(Tier { medium: tier.medium, dirs, counters: TierCounters::new(tier.medium), allocate: allocate::new(config.allocate_policy) })
            })
            .collect()
    }

    /// A folder for a block of `length` bytes; `None` where none takes new blocks, or none could ever hold it.
    pub fn choose(&self, length: u64) -> Option<&Arc<Dir>> {
        let candidates: Vec<Candidate> = self
            .dirs
            .iter()
            .enumerate()
            .filter(|(_, dir)| dir.is_open() && dir.quota_bytes() >= length && !dir.is_stuffed())
            .map(|(i, dir)| Candidate { dir: i, free_bytes: dir.free_bytes(), quota_bytes: dir.quota_bytes() })
            .collect();
        if candidates.is_empty() { None } else { self.dirs.get(self.allocate.choose(&candidates)) }
    }

    /// For reports.
    pub fn usage(&self) -> TierUsage {
        let dirs: Vec<DirUsage> = self
            .dirs
            .iter()
            .map(|dir| DirUsage {
                path: dir.path().to_string_lossy().into_owned(),
                total_bytes: dir.quota_bytes(),
                used_bytes: dir.used_bytes(),
                zombie_bytes: dir.zombie_bytes(),
                blocks: dir.blocks.load(Ordering::Relaxed),
                trouble: dir.trouble(),
            })
            .collect();
        TierUsage {
            tier: self.medium.name().into(),
            total_bytes: dirs.iter().map(|d| d.total_bytes).sum(),
            used_bytes: dirs.iter().map(|d| d.used_bytes).sum(),
            zombie_bytes: dirs.iter().map(|d| d.zombie_bytes).sum(),
            blocks: dirs.iter().map(|d| d.blocks).sum(),
            dirs,
        }
    }
}
