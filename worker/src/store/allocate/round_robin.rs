//! One folder after the other: disks of the same kind share load.

use super::{Allocate, Candidate};
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Default)]
pub struct RoundRobin(AtomicUsize);

impl Allocate for RoundRobin {
    fn choose(&self, candidates: &[Candidate]) -> usize {
        let turn = self.0.fetch_add(1, Ordering::Relaxed);
        candidates[turn % candidates.len()].dir
    }
}
