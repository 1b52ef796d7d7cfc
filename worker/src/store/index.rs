//! Blocks by id, and in the order of their last use (LRU). A use is an open, a fill or a streamed read, not a byte read.

use super::block_file::BlockFile;
use forebay_common::BlockId;
use forebay_common::block_header::FLAG_ONLY_COPY;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

#[derive(Default)]
pub struct Index {
    blocks: HashMap<BlockId, (Arc<BlockFile>, u64)>,
    order: BTreeMap<u64, BlockId>,
    tick: u64,
}

impl Index {
    /// The block, which becomes the one used last.
    pub fn touch(&mut self, id: BlockId) -> Option<Arc<BlockFile>> {
        let (block, used) = self.blocks.get_mut(&id)?;
        self.tick += 1;
        if self.order.remove(used).is_some() {
            self.order.insert(self.tick, id);
        }
        *used = self.tick;
        Some(block.clone())
    }

    /// The block, its place in the order unchanged.
    pub fn peek(&self, id: BlockId) -> Option<&Arc<BlockFile>> {
        self.blocks.get(&id).map(|(block, _)| block)
    }

    /// Whether this very block (not another of its id) is here.
    pub fn contains(&self, block: &Arc<BlockFile>) -> bool {
        self.peek(block.header.block).is_some_and(|b| Arc::ptr_eq(b, block))
    }

    /// A block whose bytes are nowhere else has no place in the order: eviction cannot find it. `false`: a block of this
    /// id is here, and nothing was changed.
    pub fn insert(&mut self, block: Arc<BlockFile>) -> bool {
        let id = block.header.block;
        if self.blocks.contains_key(&id) {
            return false;
        }
        self.tick += 1;
        if block.header.flags & FLAG_ONLY_COPY == 0 {
            self.order.insert(self.tick, id);
        }
        self.blocks.insert(id, (block, self.tick));
        true
    }

    pub fn remove(&mut self, id: BlockId) -> Option<Arc<BlockFile>> {
        let (block, used) = self.blocks.remove(&id)?;
        self.order.remove(&used);
        Some(block)
    }

    /// Takes out the block that was used longest ago.
    pub fn evict_oldest(&mut self) -> Option<Arc<BlockFile>> {
        let (_, id) = self.order.pop_first()?;
        self.blocks.remove(&id).map(|(block, _)| block)
    }

    pub fn all(&self) -> Vec<Arc<BlockFile>> {
        self.blocks.values().map(|(block, _)| block.clone()).collect()
    }

    pub fn ids(&self) -> Vec<BlockId> {
        self.blocks.keys().copied().collect()
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}
