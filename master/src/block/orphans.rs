//! Orphans: only copies on workers that this master's data know nothing of, because they are older than the blocks.
//!
//! `service/worker` notes what workers report: a block that no file has, whose number this master never gave out (`cluster::never_numbered`), and whose bytes are nowhere else. It is of a
//! later state of this cluster than the one that was put back, so it is not ordered dropped: once the newer data are put back a file has it again. An administrator is told, and may
//! give them up (`fsadmin dropOrphans`). Soft state: a worker that registers tells all it has.

use forebay_common::{BlockId, WorkerId, gauge};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

gauge!(ORPHANS, "forebay_master_orphan_blocks", "blocks on workers that only newer data of this master know, and that are kept");

/// Those that are remembered, of all workers; more are kept as well, and told when the worker registers again.
const ORPHANS_MAX: usize = 1 << 20;

/// What becomes of a block that was reported.
#[derive(Debug, PartialEq, Eq)]
pub enum Noted {
    /// It is kept; the first that is known at all.
    First,
    /// It is kept.
    Kept,
    /// Somebody has given it up.
    GivenUp,
}

#[derive(Default)]
struct Inner {
    kept: HashMap<(WorkerId, BlockId), u64>,
    /// Until the worker says that it has dropped them: an order may be lost.
    given_up: HashSet<(WorkerId, BlockId)>,
}

#[derive(Default)]
pub struct Orphans(Mutex<Inner>);

impl Orphans {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A worker has so many bytes of one.
    pub fn note(&self, worker: WorkerId, block: BlockId, bytes: u64) -> Noted {
        let mut all = self.lock();
        if all.given_up.contains(&(worker, block)) {
            return Noted::GivenUp;
        }
        let first = all.kept.is_empty();
        if all.kept.len() < ORPHANS_MAX || all.kept.contains_key(&(worker, block)) {
            all.kept.insert((worker, block), bytes);
        }
        ORPHANS.set(all.kept.len() as i64);
        if first { Noted::First } else { Noted::Kept }
    }

    /// A worker has it no more.
    pub fn gone(&self, worker: WorkerId, block: BlockId) {
        let mut all = self.lock();
        all.given_up.remove(&(worker, block));
        all.kept.remove(&(worker, block));
        ORPHANS.set(all.kept.len() as i64);
    }

    /// A worker tells all it has from here on, or nothing any more.
    pub fn forget_worker(&self, worker: WorkerId) {
        let mut all = self.lock();
        all.kept.retain(|(of, _), _| *of != worker);
        ORPHANS.set(all.kept.len() as i64);
    }

    /// How many a worker has.
    pub fn of_worker(&self, worker: WorkerId) -> u64 {
        self.lock().kept.keys().filter(|(of, _)| *of == worker).count() as u64
    }

    /// How many there are, and their bytes.
    pub fn count(&self) -> (u64, u64) {
        let all = self.lock();
        (all.kept.len() as u64, all.kept.values().sum())
    }

    /// Gives all up that are known: all of them, with their bytes.
    pub fn give_up(&self) -> Vec<(WorkerId, BlockId, u64)> {
        let mut all = self.lock();
        let kept = std::mem::take(&mut all.kept);
        all.given_up.extend(kept.keys().copied());
        ORPHANS.set(0);
        kept.into_iter().map(|((worker, block), bytes)| (worker, block, bytes)).collect()
    }
}
