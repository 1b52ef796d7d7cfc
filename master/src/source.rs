//! Where a worker gets the bytes of a file from: its own blocks, other workers' (with a token for each), the under store.
//!
//! Called by whatever submits tasks.

use crate::core::Core;
use crate::namespace::{self, block_runs};
use crate::store::Reader;
use crate::worker::WorkerView;
use forebay_common::token::{self, Claims, UfsSource};
use forebay_common::{BlockId, InodeId, Result, WorkerId, clock};
use forebay_proto::store::Inode;
use forebay_proto::{BlockSource, CopyBlock, FileBytes, LoadBlock};
use std::ops::Range;

/// Live workers that have a block whole, those that stay first.
pub fn whole_on(core: &Core, live: &[WorkerView], block: BlockId, length: u64) -> Vec<WorkerId> {
    let mut whole: Vec<(bool, WorkerId)> = core
        .soft
        .blocks
        .holders(block)
        .iter()
        .filter(|h| h.cached_bytes >= length)
        .filter_map(|h| live.iter().find(|w| w.id == h.worker).map(|w| (w.leaving, w.id)))
        .collect();
    whole.sort_unstable();
    whole.into_iter().map(|(_, id)| id).collect()
}

/// What a token to read a file says; for which worker, and from which store, is the caller's to add.
pub fn read_claims(core: &Core, inode: &Inode, principal: String) -> Claims {
    Claims {
        file_id: inode.id,
        blocks: block_runs(inode),
        block_size_bytes: inode.block_size_bytes,
        short_blocks: inode.short_blocks.clone(),
        length_bytes: inode.length,
        page_size_bytes: inode.page_size_bytes,
        rights: token::READ,
        principal,
        expires_at_ms: clock::now_ms() + core.config.token_ttl_ms,
        ..Claims::default()
    }
}

/// A block at a worker, with a token to read it there.
pub fn block_source(core: &Core, inode: &Inode, block: BlockId, holder: &WorkerView) -> Result<BlockSource> {
    let claims = Claims { worker_id: holder.id.get(), ..read_claims(core, inode, core.own_identity().user) };
    Ok(BlockSource { block_id: block.get(), worker: Some(holder.address.clone()), token: core.keys.sign(&claims)?.into() })
}

/// The order to copy a block from a worker that has it whole.
pub fn copy_order(core: &Core, inode: &Inode, block: BlockId, length: u64, holder: &WorkerView) -> Result<CopyBlock> {
    let view = core.store.view();
    let path = view.path_of(InodeId(inode.id))?;
    // Whose share of the worker it counts in.
    let mount_id = namespace::walk(&view, &path)?.mount.map_or(0, |(id, _)| id.get());
    let source = block_source(core, inode, block, holder)?;
    Ok(CopyBlock {
        block_id: block.get(),
        file_id: inode.id,
        length,
        page_size_bytes: inode.page_size_bytes,
        source: source.worker,
        token: source.token,
        only_copy: !inode.persisted,
        mount_id,
    })
}

/// A file for a worker that is to read all of it. What `reader` has whole itself is not named.
pub fn file_bytes(core: &Core, inode: &Inode, ufs: Option<UfsSource>, reader: WorkerId) -> Result<FileBytes> {
    range_bytes(core, inode, ufs, reader, &(0..inode.length))
}

/// The same for a worker that is to read a range.
pub fn range_bytes(core: &Core, inode: &Inode, ufs: Option<UfsSource>, reader: WorkerId, range: &Range<u64>) -> Result<FileBytes> {
    let live = core.soft.workers.live();
    let mut sources = Vec::new();
    let within = namespace::blocks(inode).filter(|(_, (start, length))| *start < range.end && start + length > range.start);
    for (block, (_, length)) in within {
        let whole = whole_on(core, &live, block, length);
        if !whole.contains(&reader)
            && let Some(holder) = whole.first().and_then(|id| live.iter().find(|w| w.id == *id))
        {
            sources.push(block_source(core, inode, block, holder)?);
        }
    }
    Ok(FileBytes { sources, ..described(inode, ufs.unwrap_or_default()) })
}

/// The order to fetch a block from where it is in its under store.
pub fn load_order(inode: &Inode, ufs: UfsSource, block: BlockId) -> LoadBlock {
    LoadBlock { file: Some(described(inode, ufs)), block_id: block.get(), tier: String::new() }
}

fn described(inode: &Inode, ufs: UfsSource) -> FileBytes {
    FileBytes {
        file_id: inode.id,
        length: inode.length,
        block_size_bytes: inode.block_size_bytes,
        short_blocks: inode.short_blocks.clone(),
        page_size_bytes: inode.page_size_bytes,
        runs: inode.block_runs.clone(),
        mount_id: ufs.mount_id,
        key: ufs.key.into(),
        previous_key: ufs.previous_key.into(),
        fingerprint: ufs.fingerprint,
        sources: Vec::new(),
    }
}

/// The live worker that has most of a file's blocks whole, and the fewest copies that any block has.
pub fn holder_of_most(core: &Core, inode: &Inode) -> (Option<WorkerView>, usize) {
    let live = core.soft.workers.live();
    let mut counts: Vec<(usize, WorkerId)> = live.iter().map(|w| (0, w.id)).collect();
    let mut fewest = usize::MAX;
    for (block, (_, length)) in namespace::blocks(inode) {
        let whole = whole_on(core, &live, block, length);
        fewest = fewest.min(whole.len());
        counts.iter_mut().filter(|(_, id)| whole.contains(id)).for_each(|(n, _)| *n += 1);
    }
    if inode.length == 0 {
        fewest = 1;
    }
    let best = counts.into_iter().max().and_then(|(_, id)| live.into_iter().find(|w| w.id == id));
    (best, fewest)
}
