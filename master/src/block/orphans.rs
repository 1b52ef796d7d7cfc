//! Orphans: only copies on workers that this master's data know nothing of, because they are older than the blocks.
//!
//! `service/worker` notes what workers report: a block that no file has, whose number this master never gave out (`cluster::never_numbered`), and whose bytes are nowhere else. It is of a
//! later state of this cluster than the one that was put back, so it is not ordered dropped: once the newer data are put back a file has it again. An administrator is told, and may
//! give them up (`fsadmin dropOrphans`). Soft state: a worker that registers tells all it has.

use forebay_common::{BlockId, WorkerId, gauge};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

gauge!(ORPHANS, "forebay_master_orphan_blocks", "blocks on workers that only newer data of this master know, and that are kept");

/// Those that are remembered, of all workers; more are kept as well, and told when the worker registers again.
const ORPHANS_MAX: usize = 1 << 20;

#[derive(Default)]
pub struct Orphans(Mutex<HashMap<(WorkerId, BlockId), u64>>);

impl Orphans {
    fn lock(&self) -> MutexGuard<'_, HashMap<(WorkerId, BlockId), u64>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A worker has so many bytes of one. Whether that is the first one that is known at all.
    pub fn note(&self, worker: WorkerId, block: BlockId, bytes: u64) -> bool {
        let mut all = self.lock();
        let first = all.is_empty();
        if all.len() < ORPHANS_MAX || all.contains_key(&(worker, block)) {
            all.insert((worker, block), bytes);
        }
        ORPHANS.set(all.len() as i64);
        first
    }

    /// A worker has it no more.
    pub fn gone(&self, worker: WorkerId, block: BlockId) {
        let mut all = self.lock();
        all.remove(&(worker, block));
        ORPHANS.set(all.len() as i64);
    }

    /// A worker tells all it has from here on, or nothing any more.
    pub fn forget_worker(&self, worker: WorkerId) {
        let mut all = self.lock();
        all.retain(|(of, _), _| *of != worker);
        ORPHANS.set(all.len() as i64);
    }

    /// How many there are, and their bytes.
    pub fn count(&self) -> (u64, u64) {
        let all = self.lock();
        (all.len() as u64, all.values().sum())
    }

    /// All of them, with their bytes; none is known after that.
    pub fn take(&self) -> Vec<(WorkerId, BlockId, u64)> {
        let all = std::mem::take(&mut *self.lock());
        ORPHANS.set(0);
        all.into_iter().map(|((worker, block), bytes)| (worker, block, bytes)).collect()
    }
}
