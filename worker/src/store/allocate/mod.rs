//! Which folder of a tier takes a new block: one policy per file behind one trait. Which worker does is the master's to say.

mod most_free;
mod round_robin;

use forebay_common::config::AllocatePolicy;

/// A folder that could take the block.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Its place in the tier.
    pub dir: usize,
    /// Bytes below its quota.
    pub free_bytes: u64,
    /// Its quota.
    pub quota_bytes: u64,
}

/// A policy.
pub trait Allocate: Send + Sync {
    /// One of `candidates`, which are never empty.
    fn choose(&self, candidates: &[Candidate]) -> usize;
}

/// A new one.
pub fn new(policy: AllocatePolicy) -> Box<dyn Allocate> {
    match policy {
        AllocatePolicy::MostFree => Box::new(most_free::MostFree),
        AllocatePolicy::RoundRobin => Box::new(round_robin::RoundRobin::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choose_by_room_or_in_turn() {
        let candidates = [(0, 5, 10), (1, 90, 1000), (2, 3, 100)].map(|(dir, free_bytes, quota_bytes)| Candidate { dir, free_bytes, quota_bytes });
        assert_eq!(new(AllocatePolicy::MostFree).choose(&candidates), 0, "by the share that is free");
        let turns = new(AllocatePolicy::RoundRobin);
        assert_eq!((0..6).map(|_| turns.choose(&candidates)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
        assert_eq!((0..2).map(|_| turns.choose(&candidates[1..])).collect::<Vec<_>>(), [1, 2]);
    }
}
