//! Blocks by id, in shards: no lock is held by all.

use super::block::Block;
use forebay_common::BlockId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

const SHARDS: usize = 64;

pub type Shard = HashMap<BlockId, Arc<Block>>;

pub struct Index {
    shards: Vec<Mutex<Shard>>,
}

impl Default for Index {
    fn default() -> Self {
        Index { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Index {
    /// The shard of an id, locked: what must not happen twice to a block happens under it.
    pub fn shard(&self, id: BlockId) -> MutexGuard<'_, Shard> {
        self.shards[id.get() as usize % SHARDS].lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn get(&self, id: BlockId) -> Option<Arc<Block>> {
        self.shard(id).get(&id).cloned()
    }

    /// Whether this very block (not another of its id) is here.
    pub fn contains(&self, block: &Arc<Block>) -> bool {
        self.shard(block.header.block).get(&block.header.block).is_some_and(|b| Arc::ptr_eq(b, block))
    }

    /// Adds up something of all blocks.
    pub fn sum(&self, of: impl Fn(&Block) -> u64) -> u64 {
        self.shards.iter().map(|s| s.lock().unwrap_or_else(|e| e.into_inner()).values().map(|block| of(block)).sum::<u64>()).sum()
    }

    pub fn ids(&self) -> Vec<BlockId> {
        self.shards.iter().flat_map(|s| s.lock().unwrap_or_else(|e| e.into_inner()).keys().copied().collect::<Vec<_>>()).collect()
    }
}
