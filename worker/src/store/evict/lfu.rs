//! LFU with exponential decay: an access counts half after `HALF_LIFE` further ones.
//!
//! The score of a block is the sum of 2^(-age/h) over its uses. Comparing scores at any one time is comparing
//! log2(sum of 2^(t_i/h)) over the times t_i of its uses, which does not change as time goes by: no sweep is needed.

use super::{Evictable, Eviction, Victim};
use forebay_common::BlockId;
use std::collections::{BTreeSet, HashMap};

/// Accesses to the folder after which an earlier one counts half.
const HALF_LIFE: f64 = 1_024.0;

#[derive(Default)]
pub struct Lfu {
    order: BTreeSet<(u64, BlockId)>,
    scores: HashMap<BlockId, (f64, bool)>,
    tick: u64,
}

/// Orders like the number itself; scores are never negative.
fn key(score: f64) -> u64 {
    score.to_bits()
}

impl Lfu {
    fn touch(&mut self, id: BlockId, again: bool) {
        self.tick += 1;
        let now = self.tick as f64 / HALF_LIFE;
        let score = match self.scores.get(&id) {
            Some((before, _)) => {
                self.order.remove(&(key(*before), id));
                let (high, low) = if *before > now { (*before, now) } else { (now, *before) };
                high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2
            }
            None => now,
        };
        self.scores.insert(id, (score, again));
        self.order.insert((key(score), id));
    }
}

impl Eviction for Lfu {
    fn insert(&mut self, block: Evictable) {
        self.touch(block.id, false);
    }

    fn access(&mut self, id: BlockId) {
        if self.scores.contains_key(&id) {
            self.touch(id, true);
        }
    }

    fn remove(&mut self, id: BlockId) {
        if let Some((score, _)) = self.scores.remove(&id) {
            self.order.remove(&(key(score), id));
        }
    }

    fn victim(&mut self) -> Option<Victim> {
        let (_, id) = self.order.pop_first()?;
        let warm = self.scores.remove(&id).is_some_and(|(_, again)| again);
        Some(Victim { id, warm })
    }

    fn len(&self) -> usize {
        self.scores.len()
    }
}
