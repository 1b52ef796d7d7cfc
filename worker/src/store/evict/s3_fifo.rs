//! S3-FIFO (Yang, Zhang, Qiu, Yue, Vinayak: "FIFO queues are all you need for cache eviction", SOSP 2023).
//!
//! A new block enters a small queue of a tenth of the bytes. At its end it moves to the main queue if it was used again
//! more than once, else it leaves and its id is remembered in a ghost queue; who comes back while remembered enters the
//! main queue at once. The main queue gives those used since another round. A scan passes through the small queue.
//!
//! Removed blocks stay in the queues as stale numbers until they come to the front; a queue that is mostly stale is swept.

use super::{Evictable, Eviction, Victim};
use forebay_common::BlockId;
use std::collections::{HashMap, HashSet, VecDeque};

/// The small queue's share of the bytes is one in this many.
const SMALL_SHARE: u64 = 10;
/// Uses that are counted.
const FREQUENCY_MAX: u8 = 3;
/// Uses after which a block of the small queue is kept.
const KEPT_FROM: u8 = 2;
/// Stale numbers a queue may hold beside as many live ones.
const STALE_MAX: usize = 64;

struct Entry {
    generation: u64,
    weight: u64,
    frequency: u8,
    used: bool,
    main: bool,
}

/// Ids with the generation of their entry: an older one is stale.
#[derive(Default)]
struct Queue {
    order: VecDeque<(BlockId, u64)>,
    live: usize,
    weight: u64,
}

#[derive(Default)]
pub struct S3Fifo {
    entries: HashMap<BlockId, Entry>,
    small: Queue,
    main: Queue,
    ghosts: HashSet<BlockId>,
    ghost_order: VecDeque<BlockId>,
    generation: u64,
}

impl S3Fifo {
    fn queue(&mut self, main: bool) -> &mut Queue {
        if main { &mut self.main } else { &mut self.small }
    }

    fn push(&mut self, id: BlockId, mut entry: Entry) {
        self.generation += 1;
        entry.generation = self.generation;
        let (generation, weight) = (entry.generation, entry.weight);
        let queue = self.queue(entry.main);
        queue.order.push_back((id, generation));
        queue.live += 1;
        queue.weight += weight;
        self.entries.insert(id, entry);
    }

    fn forget(&mut self, entry: &Entry) {
        let queue = self.queue(entry.main);
        queue.live -= 1;
        queue.weight -= entry.weight;
    }

    /// The entry at the front of a queue, taken out.
    fn pop(&mut self, main: bool) -> Option<(BlockId, Entry)> {
        loop {
            let (id, generation) = self.queue(main).order.pop_front()?;
            if self.entries.get(&id).is_some_and(|e| e.generation == generation) {
                let entry = self.entries.remove(&id)?;
                self.forget(&entry);
                return Some((id, entry));
            }
        }
    }

    fn remember(&mut self, id: BlockId) {
        if self.ghosts.insert(id) {
            self.ghost_order.push_back(id);
        }
        // As many as there are blocks; stale ones (that came back) go with the order.
        while self.ghost_order.len() > self.entries.len().max(16) {
            if let Some(oldest) = self.ghost_order.pop_front() {
                self.ghosts.remove(&oldest);
            }
        }
    }

    fn sweep(&mut self, main: bool) {
        let queue = if main { &mut self.main } else { &mut self.small };
        if queue.order.len() > 2 * queue.live + STALE_MAX {
            let entries = &self.entries;
            queue.order.retain(|(id, generation)| entries.get(id).is_some_and(|e| e.generation == *generation));
        }
    }
}

impl Eviction for S3Fifo {
    fn insert(&mut self, block: Evictable) {
        if self.entries.contains_key(&block.id) {
            return self.access(block.id);
        }
        let main = self.ghosts.remove(&block.id);
        self.push(block.id, Entry { generation: 0, weight: block.weight_bytes, frequency: 0, used: main, main });
    }

    fn access(&mut self, id: BlockId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.frequency = (entry.frequency + 1).min(FREQUENCY_MAX);
            entry.used = true;
        }
    }

    fn remove(&mut self, id: BlockId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.forget(&entry);
            self.sweep(entry.main);
        }
    }

    fn victim(&mut self) -> Option<Victim> {
        loop {
            let total = self.small.weight + self.main.weight;
            if self.small.live > 0 && (self.small.weight * SMALL_SHARE >= total || self.main.live == 0) {
                let (id, mut entry) = self.pop(false)?;
                if entry.frequency >= KEPT_FROM {
                    (entry.main, entry.frequency) = (true, 0);
                    self.push(id, entry);
                    continue;
                }
                self.remember(id);
                return Some(Victim { id, warm: entry.used });
            }
            let (id, mut entry) = self.pop(true)?;
            if entry.frequency > 0 {
                entry.frequency -= 1;
                self.push(id, entry);
                continue;
            }
            return Some(Victim { id, warm: entry.used });
        }
    }

    fn len(&self) -> usize {
        self.entries.len()
    }
}
