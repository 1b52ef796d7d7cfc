//! Dropping cached bytes: of what an under store holds as well, and nobody pinned.
//!
//! Called by `fs free` and by the driver for what has outlived its time.

use crate::core::Core;
use crate::namespace::{self, Found, READ, Who};
use crate::store::Reader;
use forebay_common::limits::LIST_BATCH_ENTRIES;
use forebay_common::{AbsPath, BlockId, InodeId, Result};
use forebay_proto::FreeResponse;
use forebay_proto::store::Inode;

/// Blocks of one call that every worker is told to drop; of further ones only those that are known to hold them.
const FREED_EVERYWHERE_MAX: u64 = 10_000;

/// Frees a file, or all files below a folder that the caller may write.
pub async fn below(core: &Core, who: &Who, path: &AbsPath, found: &Found) -> Result<FreeResponse> {
    let (mut out, mut ordered) = (FreeResponse::default(), 0);
    if !found.inode.folder {
        namespace::check(who, &found.inode, namespace::WRITE, path)?;
        file(core, &found.inode, &mut out, &mut ordered);
        return Ok(out);
    }
    let mut folders = vec![(found.id(), found.inode.clone())];
    while let Some((id, folder)) = folders.pop() {
        if namespace::check(who, &folder, READ | namespace::EXECUTE, path).is_err() {
            out.refused += 1;
            continue;
        }
        let mut after: Option<Vec<u8>> = None;
        loop {
            let batch = core.store.view().children(id, after.as_deref(), LIST_BATCH_ENTRIES)?;
            for (_, child) in &batch {
                if child.folder {
                    folders.push((InodeId(child.id), child.clone()));
                } else if namespace::check(who, child, namespace::WRITE, path).is_err() {
                    out.refused += 1;
                } else {
                    file(core, child, &mut out, &mut ordered);
                }
            }
            match batch.last() {
                Some((name, _)) if batch.len() == LIST_BATCH_ENTRIES => after = Some(name.clone()),
                _ => break,
            }
            tokio::task::yield_now().await;
        }
    }
    Ok(out)
}

fn file(core: &Core, inode: &Inode, out: &mut FreeResponse, ordered: &mut u64) {
    if !inode.persisted || !inode.completed || inode.pinned || core.soft.held.is_held(InodeId(inode.id)) {
        out.kept += 1;
        return;
    }
    out.files += 1;
    let soft = &core.soft;
    for run in namespace::block_runs(inode) {
        let held = soft.blocks.remove_run(BlockId(run.first), run.count);
        // What was read a moment ago is not reported yet: the order goes to every worker, as long as that is not too many.
        *ordered = ordered.saturating_add(run.count);
        if *ordered <= FREED_EVERYWHERE_MAX {
            for worker in soft.workers.live() {
                (run.first..run.first + run.count).for_each(|id| soft.workers.queue_delete(worker.id, BlockId(id)));
            }
        } else {
            held.iter().for_each(|(block, worker)| soft.workers.queue_delete(*worker, *block));
        }
        out.blocks += held.len() as u64;
    }
}
