//! Changes of a complete file by Hadoop's clients: gone on with at its end, cut, joined with others.
//!
//! Invariants: a block keeps what it holds for ever: one that is to hold other bytes is replaced by a new one, and the old one stays its file's (by the lease)
//! until the new one is whole; what was in the under store is changed there only by writing the file out again, so until then the file `shadows` the older
//! object. The caller sees to it that every block that stays is the only copy of its bytes by now.

use super::context::Context;
use super::{block, delete, persist};
use crate::namespace::{self, READ, WRITE, block_ids, block_runs, layout};
use forebay_common::layout::shorter_than;
use forebay_common::limits::{BLOCKS_PER_FILE_MAX, SHORT_BLOCKS_MAX};
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{Concat, Reopen};
use forebay_proto::store::{Inode, Lease, Pending};

/// Errors: `Busy` when anything of a file was changed since it was looked at: also when it got to its under store, for what is to be held depends on that.
fn same(path: &AbsPath, inode: &Inode, changed_index: u64) -> Result<()> {
    if inode.changed_index == changed_index {
        return Ok(());
    }
    Err(err!(Busy, "{path} was changed a moment ago: try again"))
}

/// A file that is to get other bytes is in no under store any more. The caller writes the inode.
fn take_back(c: &mut Context<'_, '_>, inode: &mut Inode) {
    persist::dequeue(c, inode);
    inode.shadows |= inode.persisted;
    inode.persisted = false;
    inode.fingerprint = String::new();
    inode.content_version = c.next_version(inode.content_version);
    inode.changed_index = c.change;
}

pub fn reopen(c: &mut Context<'_, '_>, op: &Reopen) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    let mut inode = found.inode.clone();
    if inode.folder {
        return Err(err!(IsADirectory, "{path} is a folder"));
    }
    c.check_writable(&walk, &path)?;
    namespace::check(&c.who, &inode, WRITE, &path)?;
    if !inode.completed || inode.lease_id > 0 {
        return Err(err!(Busy, "{path} is being written by somebody else, or is on its way to its under store"));
    }
    same(&path, &inode, op.changed_index)?;
    if op.length > inode.length {
        return Err(err!(InvalidArgument, "{path} has {} bytes, and {} are to stay", inode.length, op.length));
    }
    let (index, start) = if op.length == inode.length { (layout(&inode).count(), op.length) } else { layout(&inode).block_at(op.length) };
    // The last block is gone on with: it is the one that the last byte lies in.
    let (index, start) = if op.rewrite && op.length > 0 { layout(&inode).block_at(op.length - 1) } else { (index, start) };
    if !op.rewrite && start < op.length {
        return Err(err!(InvalidArgument, "{path} is to be cut within a block, which needs a new one"));
    }
    let ids: Vec<u64> = block_ids(&inode).map(|b| b.get()).collect();
    let keep = usize::try_from(index).unwrap_or(usize::MAX).min(ids.len());
    let mut lease = Lease { file_id: inode.id, ttl_ms: op.lease_ttl_ms, worker_id: op.worker_id, holder: op.holder.clone(), ..Lease::default() };
    take_back(c, &mut inode);
    let all = std::mem::take(&mut inode.block_runs);
    ids[..keep].iter().for_each(|id| block::append_run(&mut inode, *id, 1));
    let mut kept = inode.block_runs.clone();
    let rewritten = if op.rewrite && op.length > start { ids.get(keep) } else { None };
    if let Some(old) = rewritten {
        (lease.rewritten_block, lease.rewritten_length) = (*old, op.length - start);
        kept.extend([*old, 1]);
    }
    block::keep_only(c, InodeId(inode.id), &all, &kept);
    if rewritten.is_some() {
        let new = block::allocate(c, InodeId(inode.id), 1)?;
        block::append_run(&mut inode, new, 1);
        lease.rewritten_as = new;
        c.reply.block_ids = vec![new];
    }
    inode.short_blocks.truncate(inode.short_blocks.chunks_exact(2).take_while(|pair| pair[0] < index).count() * 2);
    // The block that was the last one may be followed by others now.
    let (_, last) = layout(&found.inode).span(index.saturating_sub(1));
    if index > 0 && last < inode.block_size_bytes && inode.short_blocks.chunks_exact(2).all(|pair| pair[0] + 1 != index) {
        inode.short_blocks.extend([index - 1, last]);
    }
    check_short(&inode)?;
    inode.length = op.length;
    inode.completed = false;
    (inode.to_ufs, inode.asynchronous, inode.cached) = (op.to_ufs, op.to_ufs, true);
    inode.lease_id = c.grant_lease(lease);
    c.reply.file_id = inode.id;
    c.update(found.parent, &found.name, &inode);
    Ok(())
}

pub fn concat(c: &mut Context<'_, '_>, op: &Concat) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    let mut inode = found.inode.clone();
    c.check_writable(&walk, &path)?;
    namespace::check(&c.who, &inode, WRITE, &path)?;
    if inode.folder {
        return Err(err!(IsADirectory, "{path} is a folder"));
    }
    if !inode.completed || inode.lease_id > 0 {
        return Err(err!(Busy, "{path} is being written, or is on its way to its under store"));
    }
    if op.sources.len() != op.changed_indexes.len() {
        return Err(err!(InvalidArgument, "one index for each source"));
    }
    same(&path, &inode, op.changed_index)?;
    take_back(c, &mut inode);
    let mut lengths: Vec<u64> = layout(&inode).spans().map(|(_, length)| length).collect();
    for (raw, changed_index) in op.sources.iter().zip(&op.changed_indexes) {
        let (source, from) = c.walk(raw)?;
        let old = from.found(&source)?.clone();
        namespace::check(&c.who, &old.inode, READ, &source)?;
        let above = &from.chain[from.chain.len() - 2].inode;
        namespace::check_folder_of(&c.who, above, &source)?;
        namespace::check_sticky(&c.who, above, &old.inode, &source)?;
        if old.inode.folder || old.inode.length == 0 || old.inode.id == inode.id {
            return Err(err!(InvalidArgument, "{source} is empty, a folder, or the target itself"));
        }
        if old.is_shared() {
            return Err(err!(InvalidArgument, "{source} has other names, under which its bytes are to stay: copy it"));
        }
        if !old.inode.completed || old.inode.lease_id > 0 {
            return Err(err!(Busy, "{source} is being written, or is on its way to its under store"));
        }
        same(&source, &old.inode, *changed_index)?;
        if old.parent != found.entry().0 || delete::mount_of(&from) != delete::mount_of(&walk) {
            return Err(err!(InvalidArgument, "{source} is not in the folder of {path}"));
        }
        if old.inode.block_size_bytes > inode.block_size_bytes || old.inode.page_size_bytes != inode.page_size_bytes {
            return Err(err!(InvalidArgument, "{source} has larger blocks, or other pages, than {path}"));
        }
        lengths.extend(layout(&old.inode).spans().map(|(_, length)| length));
        for run in block_runs(&old.inode) {
            block::give_run(c, run.first, run.count, InodeId(inode.id));
            block::append_run(&mut inode, run.first, run.count);
        }
        inode.length += old.inode.length;
        let in_store = old.inode.persisted || old.inode.shadows;
        delete::remove_entry(c, old.parent, &old.name, Inode { block_runs: Vec::new(), ..old.inode });
        if in_store && let Some((mount_id, _)) = from.mount {
            let pending = Pending {
                mount_id: mount_id.get(),
                kind: "delete".into(),
                source_key: from.ufs_key(&source).into(),
                source_parent_id: old.parent.get(),
                source_name: old.name.clone().into(),
                // Until then its bytes are what the store has of them.
                after_inode: inode.id,
                ..Pending::default()
            };
            delete::add_pending(c, pending);
        }
    }
    if lengths.len() as u64 > BLOCKS_PER_FILE_MAX {
        return Err(err!(LimitExceeded, "a file has at most {BLOCKS_PER_FILE_MAX} blocks").with_retryable(false));
    }
    inode.short_blocks = shorter_than(inode.block_size_bytes, &lengths).ok_or_else(|| err!(Internal, "{path}: a block without bytes"))?;
    check_short(&inode)?;
    c.note_removal(found.entry().0)?;
    (inode.to_ufs, inode.asynchronous, inode.cached) = (op.to_ufs, op.to_ufs, true);
    inode.modified_ms = c.now_ms();
    if inode.asynchronous {
        persist::enqueue(c, &mut inode);
    }
    c.reply.file_id = inode.id;
    c.update(found.parent, &found.name, &inode);
    Ok(())
}

/// Errors: `LimitExceeded` for too many blocks of other sizes: each makes finding a place in the file a little slower.
pub fn check_short(inode: &Inode) -> Result<()> {
    if inode.short_blocks.len() / 2 > SHORT_BLOCKS_MAX {
        return Err(err!(
            LimitExceeded,
            "a file has at most {SHORT_BLOCKS_MAX} blocks that are shorter than the others: copy it into one of full blocks"
        )
        .with_retryable(false));
    }
    Ok(())
}

/// The block that a lease's last block replaces is of no use any more.
pub fn forget_rewritten(c: &mut Context<'_, '_>, lease: &Lease) {
    if lease.rewritten_block > 0 {
        block::free_run(c, lease.rewritten_block, 1);
    }
}
