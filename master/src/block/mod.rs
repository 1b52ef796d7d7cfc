//! `BlockMap`: which worker has how much of which block. Soft state, rebuilt from worker reports.

use forebay_common::{BlockId, WorkerId};
use std::collections::HashMap;
use std::sync::RwLock;

/// Shards, so that reports and reads rarely meet.
const SHARDS: usize = 16;

/// Bytes of a block on a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The worker.
    pub worker: WorkerId,
    /// Cached bytes, at least 1.
    pub cached_bytes: u64,
    /// The tier's name.
    pub tier: &'static str,
}

type Shard = RwLock<HashMap<u64, Vec<Holding>>>;

pub struct BlockMap {
    shards: Vec<Shard>,
}

impl Default for BlockMap {
    fn default() -> Self {
        BlockMap { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }
}

/// The interned name of a tier.
pub fn tier_name(raw: &str) -> &'static str {
    match raw {
        "SSD" => "SSD",
        "HDD" => "HDD",
        _ => "MEM",
    }
}

impl BlockMap {
    fn shard(&self, block: BlockId) -> &Shard {
        &self.shards[block.get() as usize % SHARDS]
    }

    /// A worker says how much it has; 0 is nothing.
    pub fn report(&self, worker: WorkerId, block: BlockId, cached_bytes: u64, tier: &'static str) {
        let mut shard = self.shard(block).write().unwrap_or_else(|e| e.into_inner());
        if cached_bytes == 0 {
            if let Some(holders) = shard.get_mut(&block.get()) {
                holders.retain(|h| h.worker != worker);
                if holders.is_empty() {
                    shard.remove(&block.get());
                }
            }
            return;
        }
        let holders = shard.entry(block.get()).or_default();
        match holders.iter_mut().find(|h| h.worker == worker) {
            Some(holding) => *holding = Holding { worker, cached_bytes, tier },
            None => holders.push(Holding { worker, cached_bytes, tier }),
        }
    }

    /// Who has bytes of a block.
    pub fn holders(&self, block: BlockId) -> Vec<Holding> {
        self.shard(block).read().unwrap_or_else(|e| e.into_inner()).get(&block.get()).cloned().unwrap_or_default()
    }

    /// Forgets a block and returns who had it.
    pub fn remove_block(&self, block: BlockId) -> Vec<WorkerId> {
        let mut shard = self.shard(block).write().unwrap_or_else(|e| e.into_inner());
        shard.remove(&block.get()).map(|holders| holders.into_iter().map(|h| h.worker).collect()).unwrap_or_default()
    }

    /// Forgets everything a worker has.
    pub fn remove_worker(&self, worker: WorkerId) {
        for shard in &self.shards {
            shard.write().unwrap_or_else(|e| e.into_inner()).retain(|_, holders| {
                holders.retain(|h| h.worker != worker);
                !holders.is_empty()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_reports() {
        let map = BlockMap::default();
        let (a, b) = (WorkerId(1), WorkerId(2));
        map.report(a, BlockId(5), 10, "MEM");
        map.report(b, BlockId(5), 20, "MEM");
        map.report(a, BlockId(5), 30, "MEM");
        assert_eq!(map.holders(BlockId(5)).iter().map(|h| h.cached_bytes).collect::<Vec<_>>(), [30, 20]);
        map.report(b, BlockId(5), 0, "MEM");
        assert_eq!(map.holders(BlockId(5)).len(), 1);
        map.remove_worker(a);
        assert!(map.holders(BlockId(5)).is_empty());
    }
}
