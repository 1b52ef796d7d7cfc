//! The folder with the largest share of its quota free: all fill evenly, whatever their sizes.

use super::{Allocate, Candidate};

pub struct MostFree;

impl Allocate for MostFree {
    fn choose(&self, candidates: &[Candidate]) -> usize {
        let share = |c: &&Candidate| u128::from(c.free_bytes) * 1_000_000 / u128::from(c.quota_bytes.max(1));
        candidates.iter().max_by_key(share).map_or(0, |c| c.dir)
    }
}
