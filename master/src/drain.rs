//! Emptying workers that are to leave: what is only there is copied elsewhere first.
//!
//! Called by the driver each second. A worker has left when no file is being written to it and every block of a file that is
//! in no under store is whole on another worker; only what a worker has told wholly since it registered counts. Looked at again
//! each round, so that a worker that turns out to have more has not left. Soft but for the list of leaving workers: a new master
//! finds out again what is left to do.

use crate::core::Core;
use crate::namespace;
use crate::source;
use crate::store::Reader;
use forebay_common::{Result, WorkerId, counter};
use forebay_proto::task::What;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

counter!(ORDERED, "forebay_master_blocks_moved_total", "blocks that a worker was told to take over from one that leaves");

/// Blocks ordered to be copied in one round.
const ORDERS_PER_ROUND: usize = 256;
/// An order that led to nothing is given again after this time.
const ORDER_AGAIN: Duration = Duration::from_secs(10);

/// What was ordered when.
#[derive(Default)]
pub struct Drain {
    /// Per block: to whom, and when last.
    ordered: HashMap<u64, (WorkerId, Instant)>,
}

impl Drain {
    /// One round over all workers that are to leave.
    pub fn round(&mut self, core: &Arc<Core>) {
        if let Err(e) = core.follow_leaving() {
            tracing::error!(error = %e, "the list of workers that are to leave could not be read");
        }
        if core.soft.workers.to_drain().is_empty() {
            self.ordered.clear();
        }
        for worker in core.soft.workers.to_drain() {
            match self.worker(core, worker) {
                Ok(to_move) => {
                    if core.soft.workers.note_drained(worker, to_move) {
                        tracing::info!(%worker, "the worker has left: nothing is only there");
                    }
                }
                Err(e) => tracing::warn!(%worker, error = %e, "a worker that is to leave was not looked at"),
            }
        }
    }

    /// Orders copies of what is only on a worker; returns how much is.
    fn worker(&mut self, core: &Arc<Core>, worker: WorkerId) -> Result<u64> {
        let live = core.soft.workers.present();
        // One that is not there, or has not told all it has, cannot be judged.
        let Some(holder) = live.iter().find(|w| w.id == worker) else { return Ok(u64::MAX) };
        if !core.soft.workers.has_told(worker) {
            return Ok(u64::MAX);
        }
        let view = core.store.view();
        let mut to_move = view.leases()?.iter().filter(|l| l.worker_id == worker.get() || l.other_workers.contains(&worker.get())).count() as u64;
        // What no file has here, but newer data: nobody else takes it, so the worker stays until somebody has decided (`fsadmin dropOrphans`).
        to_move += core.soft.orphans.of_worker(worker);
        let mut ordered = 0;
        for id in core.soft.blocks.of_worker(worker) {
            let Some((_, inode)) = view.block_owner(id)?.map(|owner| view.inode(owner)).transpose()?.flatten() else { continue };
            // Bytes that a file is to have later are only here until then.
            if inode.completed && inode.lease_id > 0 && !namespace::has_block(&inode, id) {
                to_move += 1;
                continue;
            }
            if inode.persisted {
                continue;
            }
            // Of a file that a Hadoop client is still writing, to whichever worker by now.
            if !inode.completed {
                to_move += 1;
                continue;
            }
            let Some((_, (_, length))) = namespace::blocks(&inode).find(|(b, _)| *b == id) else { continue };
            let elsewhere =
                |h: &crate::block::Holding| h.worker != worker && h.cached_bytes >= length && live.iter().any(|w| w.id == h.worker && !w.leaving);
            if core.soft.blocks.holders(id).iter().any(elsewhere) {
                continue;
            }
            to_move += 1;
            let earlier = self.ordered.get(&id.get()).copied();
            if ordered >= ORDERS_PER_ROUND || earlier.is_some_and(|(_, at)| at.elapsed() < ORDER_AGAIN) {
                continue;
            }
            // The same one again, as long as it is there: it may be at it.
            let open = || live.iter().filter(|w| !w.leaving);
            let same = earlier.and_then(|(to, _)| open().find(|w| w.id == to));
            let Some(target) = same.or_else(|| open().max_by_key(|w| w.free_bytes)) else { continue };
            let copy = source::copy_order(core, &inode, id, length, holder)?;
            // Its outcome is seen in the worker's report.
            drop(core.soft.tasks.submit(target.id, What::Copy(copy)));
            self.ordered.insert(id.get(), (target.id, Instant::now()));
            ORDERED.inc();
            ordered += 1;
        }
        Ok(to_move)
    }
}
