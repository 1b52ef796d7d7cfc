//! `BlockMap`: which worker has how much of which block. Soft state, rebuilt from worker reports.

mod orphans;

pub use orphans::{Noted, Orphans};

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

    /// The blocks of a worker.
    pub fn of_worker(&self, worker: WorkerId) -> Vec<BlockId> {
        let held = |shard: &Shard| -> Vec<BlockId> {
            let blocks = shard.read().unwrap_or_else(|e| e.into_inner());
            blocks.iter().filter(|(_, holders)| holders.iter().any(|h| h.worker == worker)).map(|(id, _)| BlockId(*id)).collect()
        };
        self.shards.iter().flat_map(held).collect()
    }

    /// Forgets a block and returns who had it.
    pub fn remove_block(&self, block: BlockId) -> Vec<WorkerId> {
        let mut shard = self.shard(block).write().unwrap_or_else(|e| e.into_inner());
        shard.remove(&block.get()).map(|holders| holders.into_iter().map(|h| h.worker).collect()).unwrap_or_default()
    }

    /// Forgets the blocks `first..first + count` and returns who had which. Work is bounded by what is known, not by `count`,
    /// which comes from a client.
    pub fn remove_run(&self, first: BlockId, count: u64) -> Vec<(BlockId, WorkerId)> {
        let end = first.get().saturating_add(count);
        let known: usize = self.shards.iter().map(|s| s.read().unwrap_or_else(|e| e.into_inner()).len()).sum();
        if count <= known as u64 {
            return (first.get()..end).flat_map(|id| self.remove_block(BlockId(id)).into_iter().map(move |w| (BlockId(id), w))).collect();
        }
        let mut removed = Vec::new();
        for shard in &self.shards {
            shard.write().unwrap_or_else(|e| e.into_inner()).retain(|id, holders| {
                let inside = (first.get()..end).contains(id);
                if inside {
                    removed.extend(holders.iter().map(|h| (BlockId(*id), h.worker)));
                }
                !inside
            });
        }
        removed
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

    #[test]
    fn a_run_goes_whatever_its_length() {
        for count in [3, u64::MAX] {
            let map = BlockMap::default();
            let a = WorkerId(1);
            (1..=20).for_each(|id| map.report(a, BlockId(id), 1, "MEM"));
            let mut gone: Vec<u64> = map.remove_run(BlockId(10), count).into_iter().map(|(b, _)| b.get()).collect();
            gone.sort_unstable();
            assert_eq!(gone, if count == 3 { (10..13).collect::<Vec<_>>() } else { (10..=20).collect() });
            assert!(gone.iter().all(|id| map.holders(BlockId(*id)).is_empty()) && map.holders(BlockId(9)).len() == 1);
        }
    }
}
