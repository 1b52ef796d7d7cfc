//! LRU: the block used longest ago leaves.

use super::{Evictable, Eviction, Victim};
use forebay_common::BlockId;
use std::collections::{BTreeMap, HashMap};

#[derive(Default)]
pub struct Lru {
    order: BTreeMap<u64, BlockId>,
    /// Last use, and whether it was used since it came.
    used: HashMap<BlockId, (u64, bool)>,
    tick: u64,
}

impl Lru {
    fn touch(&mut self, id: BlockId, again: bool) {
        self.tick += 1;
        if let Some((before, _)) = self.used.insert(id, (self.tick, again)) {
            self.order.remove(&before);
        }
        self.order.insert(self.tick, id);
    }
}

impl Eviction for Lru {
    fn insert(&mut self, block: Evictable) {
        self.touch(block.id, false);
    }

    fn access(&mut self, id: BlockId) {
        if self.used.contains_key(&id) {
            self.touch(id, true);
        }
    }

    fn remove(&mut self, id: BlockId) {
        if let Some((used, _)) = self.used.remove(&id) {
            self.order.remove(&used);
        }
    }

    fn victim(&mut self) -> Option<Victim> {
        let (_, id) = self.order.pop_first()?;
        let warm = self.used.remove(&id).is_some_and(|(_, again)| again);
        Some(Victim { id, warm })
    }

    fn len(&self) -> usize {
        self.used.len()
    }
}
