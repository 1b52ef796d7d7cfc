//! Keeping up the copies that files wish for: too few are copied (or fetched), too many dropped.
//!
//! Called by the driver each second; looks at all files with a wish when something changed that could matter (a worker lost or
//! new, a wish, a file written), and every `LOOK_EVERY` otherwise. Files that are in no under store come first in each round's
//! budget, because a lost worker's copies of them are the only ones that cannot be had again. Soft: what is under way is found out
//! anew by a new master.

use crate::core::Core;
use crate::namespace;
use crate::source;
use crate::store::{Cf, Reader};
use crate::worker::{WorkerView, fetch_order};
use forebay_common::layout::shorter_than;
use forebay_common::token::UfsSource;
use forebay_common::{BlockId, InodeId, Result, WorkerId, counter};
use forebay_proto::LoadBlock;
use forebay_proto::store::Inode;
use forebay_proto::task::What;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

counter!(
    COPIED,
    "forebay_master_replicas_made_total",
    "copies of blocks that were made because a file wished for them, or because they were read elsewhere"
);
counter!(DROPPED, "forebay_master_replicas_dropped_total", "copies of blocks that were one too many");

/// Copies on their way at once.
const UNDER_WAY_MAX: usize = 128;
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// After a master's start.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// Files looked at in one scan.
const BATCH: usize = 1_000;

/// What is under way, shared by all who have blocks copied.
pub type UnderWay = Arc<Mutex<HashSet<(u64, WorkerId)>>>;

/// The driver's part.
#[derive(Default)]
pub struct Replicate {
    under_way: UnderWay,
    looked: Option<Instant>,
    workers: Vec<WorkerId>,
}

impl Replicate {
    /// One round.
    pub fn round(&mut self, core: &Arc<Core>) {
        // Until workers have told what they have, everything looks lost.
        let age = Duration::from_millis(forebay_common::clock::now_ms().saturating_sub(core.started_ms));
        if age < SETTLED_AFTER {
            return;
        }
        let workers: Vec<WorkerId> = core.soft.workers.live().iter().filter(|w| !w.leaving).map(|w| w.id).collect();
        let dirty = core.soft.replicas_dirty.swap(false, Ordering::Relaxed);
        if !dirty && workers == self.workers && self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        match self.look(core) {
            Ok(done) => {
                self.workers = workers;
                self.looked = Some(Instant::now());
                if !done {
                    core.soft.replicas_dirty.store(true, Ordering::Relaxed);
                }
            }
            Err(e) => tracing::warn!(error = %e, "files that wish for copies were not looked at"),
        }
    }

    /// Looks at all; `false` when there is more to do than fits.
    fn look(&self, core: &Arc<Core>) -> Result<bool> {
        let mut all_done = true;
        for persisted in [false, true] {
            let mut after = 0;
            loop {
                let ids = core.store.view().indexed(Cf::Replicated, after, BATCH)?;
                let Some(last) = ids.last() else { break };
                after = last.get();
                for id in &ids {
                    let found = core.store.view().inode(*id)?;
                    let Some((_, inode)) = found.filter(|(_, inode)| inode.completed && inode.persisted == persisted) else { continue };
                    all_done &= self.file(core, *id, &inode)?;
                }
                if ids.len() < BATCH {
                    break;
                }
            }
        }
        Ok(all_done)
    }

    fn file(&self, core: &Arc<Core>, id: InodeId, inode: &Inode) -> Result<bool> {
        let live = core.soft.workers.live();
        let open: Vec<&WorkerView> = live.iter().filter(|w| !w.leaving).collect();
        let min = (inode.replication_min as usize).min(open.len());
        let mut done = true;
        for (block, (_, length)) in namespace::blocks(inode) {
            let whole = source::whole_on(core, &live, block, length);
            let staying = whole.iter().filter(|w| open.iter().any(|o| o.id == **w)).count();
            if staying < min {
                done = false;
                let mut room: Vec<&&WorkerView> = open.iter().filter(|w| !whole.contains(&w.id)).collect();
                room.sort_by_key(|w| std::cmp::Reverse(w.free_bytes));
                for target in room.into_iter().take(min - staying) {
                    let what = match whole.first().and_then(|id| live.iter().find(|w| w.id == *id)) {
                        Some(holder) => What::Copy(source::copy_order(core, inode, block, length, holder)?),
                        None if inode.persisted => What::Load(load_order(core, id, inode, block)?),
                        // On nobody: readers are told so, and the report names it.
                        None => continue,
                    };
                    if !submit(core, &self.under_way, block, target.id, what) {
                        return Ok(false);
                    }
                }
            }
            let max = inode.replication_max as usize;
            // Of what is in no under store none is dropped: a worker that seems to have one may be dying.
            if max > 0 && inode.persisted && !core.soft.held.is_held(id) && whole.len() > max.max(min).max(1) {
                for surplus in &whole[max.max(min).max(1)..] {
                    DROPPED.inc();
                    core.soft.workers.queue_delete(*surplus, block);
                }
            }
        }
        Ok(done)
    }
}

/// Has a worker do something about a block, unless it is at it, or too much is under way.
fn submit(core: &Arc<Core>, under_way: &UnderWay, block: BlockId, worker: WorkerId, what: What) -> bool {
    {
        let mut set = under_way.lock().unwrap_or_else(|e| e.into_inner());
        if set.contains(&(block.get(), worker)) {
            return true;
        }
        if set.len() >= UNDER_WAY_MAX {
            return false;
        }
        set.insert((block.get(), worker));
    }
    let submitted = core.soft.tasks.submit(worker, what);
    let (core, under_way) = (core.clone(), under_way.clone());
    tokio::spawn(async move {
        match submitted.outcome().await {
            Ok(_) => COPIED.inc(),
            Err(e) => tracing::warn!(%block, %worker, error = %e, "a copy was not made; it is tried again"),
        }
        under_way.lock().unwrap_or_else(|e| e.into_inner()).remove(&(block.get(), worker));
        core.soft.replicas_dirty.store(true, Ordering::Relaxed);
    });
    true
}

/// The order to fetch a block of a file that is in an under store.
pub fn load_order(core: &Core, id: InodeId, inode: &Inode, block: BlockId) -> Result<LoadBlock> {
    let view = core.store.view();
    let path = view.path_of(id)?;
    let walk = namespace::walk(&view, &path)?;
    let key = walk.ufs_key(&path);
    let ufs = UfsSource {
        mount_id: walk.mount.map_or(0, |(id, _)| id.get()),
        previous_key: crate::mount::previous_key(&view, walk.mount, &key)?,
        key,
        fingerprint: inode.fingerprint.clone(),
    };
    Ok(source::load_order(inode, ufs, block))
}

/// Copies of a file that is about to be acknowledged, before it is. `blocks` are its ids and lengths; all are on `first`, or each on some worker.
///
/// Errors: `Unavailable` when there are not that many workers that could take them.
pub async fn before_acknowledging(
    core: &Core,
    inode: &Inode,
    length: u64,
    blocks: &[(u64, u64)],
    first: Option<WorkerId>,
    copies: usize,
) -> Result<()> {
    let live = core.soft.workers.live();
    let mut sized = inode.clone();
    let lengths: Vec<u64> = blocks.iter().map(|(_, length)| *length).collect();
    (sized.length, sized.short_blocks) = (length, shorter_than(inode.block_size_bytes, &lengths).unwrap_or_default());
    for (block, block_length) in blocks {
        let id = BlockId(*block);
        let whole = source::whole_on(core, &live, id, *block_length);
        let Some(holder) = live.iter().find(|w| first.map_or_else(|| whole.first() == Some(&w.id), |first| first == w.id)) else {
            return Err(forebay_common::err!(Unavailable, "the worker that the file was written to is lost: write it again").with_retryable(false));
        };
        let others: Vec<WorkerView> = live.iter().filter(|w| !w.leaving && w.id != holder.id && !whole.contains(&w.id)).cloned().collect();
        let (mut made, mut last) = (whole.len().max(1), None);
        for target in fetch_order(&others, id) {
            if made >= copies {
                break;
            }
            let order = source::copy_order(core, &sized, id, *block_length, holder)?;
            match core.soft.tasks.submit(target, What::Copy(order)).outcome().await {
                Ok(_) => {
                    COPIED.inc();
                    core.soft.blocks.report(target, id, *block_length, "MEM");
                    made += 1;
                }
                Err(e) => last = Some(e),
            }
        }
        if made < copies {
            let why = last.map_or_else(|| "there are no more workers".to_owned(), |e| e.to_string());
            return Err(forebay_common::err!(Unavailable, "{made} of {copies} copies were made before the file was to be acknowledged: {why}"));
        }
    }
    Ok(())
}
