//! Which block leaves a full folder: one policy per file behind one trait.
//!
//! Called by `BlockStore` under the folder's lock, and by `bench trace`, which runs the same code as a simulation. A policy
//! knows ids and weights only. What must not be evicted is not in it: a block is entered with an [`Evictable`], which a
//! pinned block or an only copy cannot give.

mod lfu;
mod lru;
mod s3_fifo;

use forebay_common::BlockId;
use forebay_common::config::EvictPolicy;

/// A block that may leave. Made by `Block::evictable` alone.
#[derive(Clone, Copy, Debug)]
pub struct Evictable {
    id: BlockId,
    weight_bytes: u64,
}

impl Evictable {
    /// Of a block that is neither pinned nor the only copy of its bytes.
    pub(super) fn new(id: BlockId, weight_bytes: u64) -> Self {
        Evictable { id, weight_bytes: weight_bytes.max(1) }
    }

    /// For a simulation, where nothing is lost.
    pub fn simulated(id: u64, weight_bytes: u64) -> Self {
        Evictable::new(BlockId(id), weight_bytes)
    }
}

/// A block that leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Which.
    pub id: BlockId,
    /// It was used again after it came: worth the room of a colder block in the tier below.
    pub warm: bool,
}

/// A policy. Every id is in it at most once; `access` and `remove` of an unknown one do nothing.
pub trait Eviction: Send {
    /// A block came.
    fn insert(&mut self, block: Evictable);
    /// It was used: opened, filled or streamed.
    fn access(&mut self, id: BlockId);
    /// It went, for another reason than `victim`.
    fn remove(&mut self, id: BlockId);
    /// Takes out the block that should leave.
    fn victim(&mut self) -> Option<Victim>;
    /// How many are in it.
    fn len(&self) -> usize;
    /// Whether none is.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An empty one.
pub fn new(policy: EvictPolicy) -> Box<dyn Eviction> {
    match policy {
        EvictPolicy::S3Fifo => Box::new(s3_fifo::S3Fifo::default()),
        EvictPolicy::Lru => Box::new(lru::Lru::default()),
        EvictPolicy::Lfu => Box::new(lfu::Lfu::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const ALL: [EvictPolicy; 3] = [EvictPolicy::S3Fifo, EvictPolicy::Lru, EvictPolicy::Lfu];

    fn put(policy: &mut Box<dyn Eviction>, id: u64) {
        policy.insert(Evictable::simulated(id, 1));
    }

    proptest! {
        /// Whatever is done to it, a policy holds exactly what was put in and not taken out, each once.
        #[test]
        fn holds_what_was_put_in(steps in proptest::collection::vec((0u8..5, 1u64..40), 1..400)) {
            for kind in ALL {
                let mut policy = new(kind);
                let mut here = HashSet::new();
                for (what, id) in &steps {
                    match what {
                        0 | 1 => {
                            put(&mut policy, *id);
                            here.insert(*id);
                        }
                        2 => policy.access(BlockId(*id)),
                        3 => {
                            policy.remove(BlockId(*id));
                            here.remove(id);
                        }
                        _ => match policy.victim() {
                            Some(victim) => prop_assert!(here.remove(&victim.id.get()), "{kind:?} gave {victim:?}"),
                            None => prop_assert!(here.is_empty(), "{kind:?} gave nothing"),
                        },
                    }
                    prop_assert_eq!(policy.len(), here.len());
                }
                while let Some(victim) = policy.victim() {
                    prop_assert!(here.remove(&victim.id.get()));
                }
                prop_assert!(here.is_empty(), "{kind:?} lost {here:?}");
            }
        }
    }

    /// A cache of `room` blocks: whether an access is a hit.
    fn access(policy: &mut Box<dyn Eviction>, cached: &mut HashSet<u64>, room: usize, id: u64) -> bool {
        if cached.contains(&id) {
            policy.access(BlockId(id));
            return true;
        }
        while cached.len() >= room {
            cached.remove(&policy.victim().unwrap().id.get());
        }
        put(policy, id);
        cached.insert(id);
        false
    }

    /// One pass over twice as much as there is room for leaves the working set of S3-FIFO and LFU alone, and flushes LRU's.
    #[test]
    fn a_scan_passes_by() {
        let kept = |kind| {
            let (mut policy, mut cached) = (new(kind), HashSet::new());
            for id in (0..8).flat_map(|_| 0..70).chain(1000..1200) {
                access(&mut policy, &mut cached, 100, id);
            }
            (0..70).filter(|id| cached.contains(id)).count()
        };
        assert!(kept(EvictPolicy::S3Fifo) >= 65, "{}", kept(EvictPolicy::S3Fifo));
        assert!(kept(EvictPolicy::Lfu) >= 65, "{}", kept(EvictPolicy::Lfu));
        assert_eq!(kept(EvictPolicy::Lru), 0);
    }

    /// What was hot long ago leaves before what is hot now.
    #[test]
    fn old_heat_cools() {
        for kind in ALL {
            let (mut policy, mut cached) = (new(kind), HashSet::new());
            for id in (0..50).flat_map(|_| 0..50).chain((0..100).flat_map(|_| 500..590)) {
                access(&mut policy, &mut cached, 100, id);
            }
            let now = (500..590).filter(|id| cached.contains(id)).count();
            assert!(now >= 80, "{kind:?} keeps {now} of what is hot now");
        }
    }
}
