//! Files under construction: create, add blocks, complete, abandon, renew the lease.

use super::context::Context;
use super::{block, delete, folder, names, persist, quota, reopen, replication};
use crate::namespace::{self, Found, WRITE, acl, block_ids, blocks_for, layout};
use crate::store::{Cf, Reader, id_key, leaving_key};
use forebay_common::layout::shorter_than;
use forebay_common::limits::{BLOCK_SIZE_MIN_BYTES, BLOCK_SIZE_RANGE_BYTES, BLOCKS_PER_ALLOCATION_MAX, BLOCKS_PER_FILE_MAX};
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{Abandon, AbandonBlock, AddBlocks, Complete, Create, NoteFlushed, RenewLease, SetPipeline};
use forebay_proto::store::{Inode, Lease, Link};

/// The stamp of every block whose pipeline was not recovered.
pub const FIRST_STAMP: u64 = 1_001;

pub fn create(c: &mut Context<'_, '_>, op: &Create) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let name = path.name().ok_or_else(|| err!(IsADirectory, "/ is a folder"))?.to_vec();
    c.check_writable(&walk, &path)?;
    // Chosen before this was ordered: what is written there now would be forgotten with it.
    if c.txn.get(Cf::Meta, &leaving_key(op.worker_id))?.is_some() {
        return Err(err!(Unavailable, "worker {:016x} is to leave: another one is chosen at the next try", op.worker_id));
    }
    if !(BLOCK_SIZE_MIN_BYTES..=*BLOCK_SIZE_RANGE_BYTES.end()).contains(&op.block_size_bytes) {
        return Err(err!(InvalidArgument, "block size {} is not between {BLOCK_SIZE_MIN_BYTES} bytes and 4 GiB", op.block_size_bytes));
    }
    replication::check(op.replication_min, op.replication_max)?;
    if op.asynchronous && (walk.mount.is_none() || !op.cached || !op.to_ufs) {
        return Err(err!(InvalidArgument, "{path} lies in no mount: there is no under store that it could get to later"));
    }
    if op.replace && op.only_file > 0 && (!walk.is_complete() || walk.deepest().inode.id != op.only_file) {
        return Err(err!(FileChanged, "{path} is not the file any more that was to get other bytes: it was deleted, moved or replaced"));
    }
    if let Some(version) = op.only_content.filter(|version| op.only_file > 0 && walk.deepest().inode.content_version != *version) {
        return Err(err!(FileChanged, "{path} has other bytes than those of version {version}, over which alone these were to be written"));
    }
    // Under all of its names it gets the new bytes, as a local file does that is opened to be cut and written.
    let shared = walk.is_complete() && walk.deepest().is_shared();
    if shared && op.overwrite && !op.holder.is_empty() {
        return Err(err!(
            InvalidArgument,
            "{path} is one of several names of a file, which a Hadoop client does not overwrite: delete this name first"
        ));
    }
    if walk.is_complete() && (op.replace || (shared && op.overwrite)) {
        return begin_replacing(c, op, &path, walk.deepest().clone());
    }
    let mut shadows = false;
    let parent = if walk.is_complete() {
        let found = walk.deepest();
        shadows = found.inode.persisted || found.inode.shadows;
        if found.inode.folder {
            return Err(err!(IsADirectory, "{path} is a folder"));
        }
        if !op.overwrite {
            return Err(err!(AlreadyExists, "{path} exists already"));
        }
        if (!found.inode.completed || found.inode.lease_id > 0) && !delete::is_hadoops(&*c.txn, &found.inode)? {
            return Err(err!(Busy, "{path} is being written by somebody else"));
        }
        namespace::check(&c.who, &found.inode, WRITE, &path)?;
        let above = &walk.chain[walk.chain.len() - 2];
        delete::remove_entry(c, found.parent, &name, found.inode.clone());
        above.clone()
    } else {
        if walk.missing.len() > 1 && !op.recursive {
            return Err(err!(NotFound, "the folder of {path} does not exist: make it first, or ask for missing folders to be made"));
        }
        namespace::check_folder_of(&c.who, &walk.deepest().inode, &path)?;
        // Of a file that gets to its store later the folders do as well.
        folder::make_missing(c, &walk, walk.missing.len() - 1, op.to_ufs && !op.asynchronous)?
    };
    c.check_no_tombstone(parent.id(), &name, &path)?;
    // Published now it would be overwritten by what is still on its way here, or be in its way.
    if op.to_ufs && !op.asynchronous {
        persist::check_arrived(&*c.txn, &path)?;
    }
    let mut inode = c.new_inode(&parent.inode, false, op.mode);
    acl::inherit(&parent.inode, &mut inode, if op.unmasked_mode > 0 { op.unmasked_mode } else { op.mode })?;
    inode.block_size_bytes = op.block_size_bytes;
    inode.page_size_bytes = op.page_size_bytes;
    inode.to_ufs = op.to_ufs;
    inode.asynchronous = op.asynchronous;
    replication::wish(c, &mut inode, op.replication_min, op.replication_max);
    inode.shadows = shadows;
    inode.cached = op.cached;
    inode.content_version = 1;
    inode.hadoop_replication = op.hadoop_replication;
    let lease = Lease { file_id: inode.id, ttl_ms: op.lease_ttl_ms, worker_id: op.worker_id, holder: op.holder.clone(), ..Lease::default() };
    inode.lease_id = c.grant_lease(lease);
    let count = u64::from(op.block_count).min(BLOCKS_PER_ALLOCATION_MAX);
    if count > 0 {
        quota::check_block(c, parent.id(), &inode, 0)?;
    }
    let first = block::allocate(c, InodeId(inode.id), count)?;
    block::append_run(&mut inode, first, count);
    c.insert(parent.id(), &name, &inode);
    c.reply.file_id = inode.id;
    c.reply.block_ids = (first..first + count).collect();
    Ok(())
}

/// A complete file is to have other bytes: what there will be of them is kept with the lease, and the file is as it was until then.
fn begin_replacing(c: &mut Context<'_, '_>, op: &Create, path: &AbsPath, found: Found) -> Result<()> {
    let mut old = found.inode;
    if old.folder {
        return Err(err!(IsADirectory, "{path} is a folder"));
    }
    if !old.completed || old.lease_id > 0 {
        return Err(err!(Busy, "{path} is being written by somebody else"));
    }
    if old.kind > 0 {
        return Err(err!(InvalidArgument, "{path} is a link, pipe, socket or device, and holds no bytes"));
    }
    namespace::check(&c.who, &old, WRITE, path)?;
    c.check_no_tombstone(found.parent, &found.name, path)?;
    if op.to_ufs && !op.asynchronous {
        persist::check_arrived(&*c.txn, &c.txn.path_of(InodeId(old.id))?)?;
    }
    let lease = Lease { file_id: old.id, ttl_ms: op.lease_ttl_ms, worker_id: op.worker_id, holder: op.holder.clone(), ..Lease::default() };
    let lease_id = c.grant_lease(lease);
    let mut next = Inode {
        block_size_bytes: op.block_size_bytes,
        page_size_bytes: op.page_size_bytes,
        to_ufs: op.to_ufs,
        asynchronous: op.asynchronous,
        cached: op.cached,
        replication_min: op.replication_min,
        content_version: c.next_version(old.content_version),
        lease_id,
        length: 0,
        block_runs: Vec::new(),
        short_blocks: Vec::new(),
        completed: false,
        persisted: false,
        persist_id: 0,
        fingerprint: String::new(),
        ..old.clone()
    };
    let count = u64::from(op.block_count).min(BLOCKS_PER_ALLOCATION_MAX);
    if count > 0 {
        quota::check_block(c, found.parent, &next, quota::space(&old))?;
    }
    if op.to_ufs && !op.asynchronous && !old.persisted {
        // From now on something may be there.
        old.shadows = true;
        folder::note_persisted(c, found.parent)?;
    }
    let first = block::allocate(c, InodeId(old.id), count)?;
    block::append_run(&mut next, first, count);
    let lease = c.txn.lease(lease_id)?.ok_or_else(|| err!(Internal, "a lease that was just made is gone"))?;
    c.txn.put(Cf::Lease, &id_key(lease_id), &Lease { replacement: Some(next), ..lease });
    old.lease_id = lease_id;
    c.update(found.parent, &found.name, &old);
    c.reply.file_id = old.id;
    c.reply.block_ids = (first..first + count).collect();
    Ok(())
}

/// The new bytes are complete: the file has them from now on, and keeps all else that it is.
fn take_place(c: &mut Context<'_, '_>, link: &Link, next: Inode) -> Result<Inode> {
    let old = c.txn.child(InodeId(link.parent_id), &link.name)?.filter(|old| old.id == next.id);
    let mut old = old.ok_or_else(|| err!(Internal, "file {} is not where its link says", next.id))?;
    // Whoever asked for it to get to its store is still to be heard.
    let wished = old.persist_id > 0 && !next.to_ufs;
    persist::dequeue(c, &mut old);
    block::free_all(c, &mut old);
    let shadows = old.persisted || old.shadows;
    if next.replication_min > old.replication_min {
        let most = old.replication_max;
        replication::wish(c, &mut old, next.replication_min, most);
    }
    Ok(Inode {
        block_size_bytes: next.block_size_bytes,
        page_size_bytes: next.page_size_bytes,
        to_ufs: next.to_ufs || wished,
        asynchronous: next.asynchronous || wished,
        cached: next.cached,
        content_version: next.content_version,
        block_runs: next.block_runs,
        short_blocks: next.short_blocks,
        shadows,
        fingerprint: String::new(),
        ..old
    })
}

/// The file under construction under a lease. Errors: `Expired` when the lease is over.
fn leased(c: &Context<'_, '_>, file_id: u64, lease_id: u64) -> Result<(Link, Inode, Lease)> {
    let over = || err!(Expired, "the lease of file {file_id} is over: its writer was silent for too long, write it again");
    let lease = c.txn.lease(lease_id)?.filter(|l| l.file_id == file_id && !l.publishing).ok_or_else(over)?;
    let (link, inode) = c.txn.inode(InodeId(file_id))?.filter(|(_, inode)| inode.lease_id == lease_id).ok_or_else(over)?;
    let inode = lease.replacement.clone().or(Some(inode)).filter(|inode| !inode.completed).ok_or_else(over)?;
    if !c.who.superuser && c.who.user != lease.principal {
        return Err(err!(PermissionDenied, "user {} does not hold the lease of file {file_id}", c.who.user));
    }
    Ok((link, inode, lease))
}

pub fn add_blocks(c: &mut Context<'_, '_>, op: &AddBlocks) -> Result<()> {
    let (link, mut inode, mut lease) = leased(c, op.file_id, op.lease_id)?;
    let count = u64::from(op.count).clamp(1, BLOCKS_PER_ALLOCATION_MAX);
    if block_ids(&inode).count() as u64 + count > BLOCKS_PER_FILE_MAX {
        return Err(err!(LimitExceeded, "a file has at most {BLOCKS_PER_FILE_MAX} blocks: write it with larger ones").with_retryable(false));
    }
    let before = block_ids(&inode).count() as u64;
    if op.previous_block > 0 && block_ids(&inode).last().map(|b| b.get()) != Some(op.previous_block) {
        return Err(err!(InvalidArgument, "block {} is not the last one of file {}", op.previous_block, op.file_id));
    }
    // Said again after a block was given up. A client that goes on in a new block does not say it: it was written down then.
    forget_short(&mut inode, if op.previous_length > 0 { before.saturating_sub(1) } else { before });
    if op.previous_length > 0 && op.previous_length < inode.block_size_bytes && before > 0 {
        inode.short_blocks.extend([before - 1, op.previous_length]);
        reopen::check_short(&inode)?;
    }
    // What is known of its length by now: all blocks but the new one.
    if !lease.holder.is_empty() {
        inode.length = layout(&inode).offset(before);
    }
    let replaces = match &lease.replacement {
        Some(_) => c.txn.child(InodeId(link.parent_id), &link.name)?.map_or(0, |old| quota::space(&old)),
        None => 0,
    };
    quota::check_block(c, InodeId(link.parent_id), &inode, replaces)?;
    let first = block::allocate(c, InodeId(inode.id), count)?;
    block::append_run(&mut inode, first, count);
    write_down(c, &link, &inode, &mut lease);
    lease.expires_at_ms = c.now_ms() + lease.ttl_ms;
    if op.worker_id > 0 {
        (lease.worker_id, lease.other_workers) = (op.worker_id, op.other_workers.clone());
        lease.generation_stamp = 0;
    }
    c.txn.put(Cf::Lease, &id_key(lease.id), &lease);
    c.reply.file_id = inode.id;
    c.reply.lease_id = lease.id;
    c.reply.block_ids = (first..first + count).collect();
    Ok(())
}

/// Writes a file under construction to where it is kept.
fn write_down(c: &mut Context<'_, '_>, link: &Link, inode: &Inode, lease: &mut Lease) {
    if lease.replacement.is_none() {
        return c.update(InodeId(link.parent_id), &link.name, inode);
    }
    lease.replacement = Some(inode.clone());
    c.txn.put(Cf::Lease, &id_key(lease.id), &*lease);
}

/// What is known of the lengths of blocks from number `from` on is forgotten.
fn forget_short(inode: &mut Inode, from: u64) {
    let known = inode.short_blocks.chunks_exact(2).take_while(|pair| pair[0] < from).count();
    inode.short_blocks.truncate(known * 2);
}

pub fn abandon_block(c: &mut Context<'_, '_>, op: &AbandonBlock) -> Result<()> {
    let (link, mut inode, mut lease) = leased(c, op.file_id, op.lease_id)?;
    c.reply.file_id = inode.id;
    if lease.rewritten_as == op.block_id {
        return Err(err!(InvalidArgument, "block {} holds what was in file {} before: it cannot be given up", op.block_id, op.file_id));
    }
    // Asked for again, or never there: it is not in the file, and that was wanted.
    if block_ids(&inode).all(|block| block.get() != op.block_id) {
        return Ok(());
    }
    let [.., first, count] = inode.block_runs.as_mut_slice() else { return Ok(()) };
    if *first + *count - 1 != op.block_id {
        return Err(err!(InvalidArgument, "block {} is not the last one of file {}", op.block_id, op.file_id));
    }
    *count -= 1;
    let (first, left) = (*first, *count);
    if left == 0 {
        let runs = inode.block_runs.len() - 2;
        inode.block_runs.truncate(runs);
    }
    block::free_last(c, InodeId(inode.id), first, left);
    let count = block_ids(&inode).count() as u64;
    forget_short(&mut inode, count);
    write_down(c, &link, &inode, &mut lease);
    Ok(())
}

/// The file, and the lease whose last block is `block`.
fn leased_last(c: &Context<'_, '_>, file_id: u64, lease_id: u64, block: u64) -> Result<Lease> {
    let (_, inode, lease) = leased(c, file_id, lease_id)?;
    if block_ids(&inode).last().map(|b| b.get()) != Some(block) {
        return Err(err!(InvalidArgument, "block {block} is not the last one of file {file_id}"));
    }
    Ok(lease)
}

pub fn set_pipeline(c: &mut Context<'_, '_>, op: &SetPipeline) -> Result<()> {
    let mut lease = leased_last(c, op.file_id, op.lease_id, op.block_id)?;
    if op.generation_stamp == 0 {
        lease.drawn_stamp = lease.drawn_stamp.max(FIRST_STAMP) + 1;
        c.reply.generation_stamp = lease.drawn_stamp;
    } else {
        let [worker, others @ ..] = op.worker_ids.as_slice() else {
            return Err(err!(InvalidArgument, "a pipeline without a worker"));
        };
        if op.generation_stamp > lease.drawn_stamp || op.generation_stamp < lease.generation_stamp {
            return Err(err!(InvalidArgument, "stamp {} was not drawn for this pipeline, or is of the past", op.generation_stamp));
        }
        (lease.worker_id, lease.other_workers, lease.generation_stamp) = (*worker, others.to_vec(), op.generation_stamp);
    }
    lease.expires_at_ms = c.now_ms() + lease.ttl_ms;
    c.txn.put(Cf::Lease, &id_key(lease.id), &lease);
    c.reply.file_id = op.file_id;
    Ok(())
}

pub fn note_flushed(c: &mut Context<'_, '_>, op: &NoteFlushed) -> Result<()> {
    let mut lease = leased_last(c, op.file_id, op.lease_id, op.block_id)?;
    let before = if lease.flushed_block == op.block_id { lease.flushed_length } else { 0 };
    (lease.flushed_block, lease.flushed_length) = (op.block_id, before.max(op.length));
    c.txn.put(Cf::Lease, &id_key(lease.id), &lease);
    c.reply.file_id = op.file_id;
    Ok(())
}

pub fn complete(c: &mut Context<'_, '_>, op: &Complete) -> Result<()> {
    let (link, mut inode, lease) = leased(c, op.file_id, op.lease_id)?;
    if op.expired_only && lease.expires_at_ms > c.now_ms() {
        return Err(err!(Busy, "the lease was renewed in the meantime"));
    }
    // Of a file that was not cached, as many as its length needs; else those that were written.
    let keep = if inode.cached { op.block_ids.len() as u64 } else { blocks_for(op.length, inode.block_size_bytes) };
    if keep > BLOCKS_PER_FILE_MAX {
        return Err(err!(
            LimitExceeded,
            "{} bytes are more than {BLOCKS_PER_FILE_MAX} blocks of {}: write the file with larger blocks",
            op.length,
            inode.block_size_bytes
        )
        .with_retryable(false));
    }
    let ids: Vec<u64> = block_ids(&inode).map(|b| b.get()).collect();
    let in_order = ids.starts_with(&op.block_ids);
    // Numbers of a client: they may add up to anything, or to nothing a number holds.
    let sum = op.block_lengths.iter().try_fold(0u64, |sum, length| sum.checked_add(*length));
    let short = shorter_than(inode.block_size_bytes, &op.block_lengths);
    if inode.cached {
        let adds_up = in_order && op.block_lengths.len() == op.block_ids.len() && sum == Some(op.length);
        // Only a Hadoop client ends a block early: the others count on it that none is.
        let short = short.filter(|short| adds_up && (short.is_empty() || !lease.holder.is_empty()));
        inode.short_blocks = short
            .ok_or_else(|| err!(InvalidArgument, "the blocks of file {} do not add up to {} bytes in allocated order", op.file_id, op.length))?;
        reopen::check_short(&inode)?;
    }
    if inode.to_ufs && !inode.asynchronous && op.fingerprint.is_empty() {
        return Err(err!(InvalidArgument, "file {} is to be in the under store, and no fingerprint says that it is", op.file_id));
    }
    // Ids beyond those used are given back.
    let mut all = std::mem::take(&mut inode.block_runs);
    if (ids.len() as u64) < keep {
        let more = keep - ids.len() as u64;
        let first = block::allocate(c, InodeId(inode.id), more)?;
        all.extend([first, more]);
    }
    let mut left = keep;
    for run in all.chunks_exact(2) {
        let (first, count) = (run[0], run[1]);
        let kept = count.min(left);
        if kept < count {
            block::free_run(c, first, count);
            if kept > 0 {
                block::put_run(c, first, kept, InodeId(inode.id));
                c.reply.freed_first.pop();
                c.reply.freed_count.pop();
                c.reply.freed_first.push(first + kept);
                c.reply.freed_count.push(count - kept);
            }
        }
        block::append_run(&mut inode, first, kept);
        left -= kept;
    }
    if lease.replacement.is_some() {
        inode = take_place(c, &link, inode)?;
    }
    inode.length = op.length;
    inode.completed = true;
    inode.persisted = inode.to_ufs && !inode.asynchronous;
    inode.shadows &= !inode.persisted;
    if inode.asynchronous {
        persist::enqueue(c, &mut inode);
    } else {
        inode.fingerprint = op.fingerprint.clone();
    }
    let written_ms = if op.modified_ms > 0 { op.modified_ms } else { c.now_ms() };
    (inode.modified_ms, inode.modified_ns) = (written_ms, op.modified_ns);
    inode.changed_ms = inode.changed_ms.max(written_ms.min(c.now_ms()));
    inode.changed_index = c.change;
    inode.lease_id = 0;
    c.update(InodeId(link.parent_id), &link.name, &inode);
    c.txn.delete_id(Cf::Lease, lease.id);
    reopen::forget_rewritten(c, &lease);
    c.reply.file_id = inode.id;
    if inode.persisted { folder::note_persisted(c, InodeId(link.parent_id)) } else { Ok(()) }
}

/// A publication that was not heard of again: the file stays, and is written out anew.
fn give_up_publishing(c: &mut Context<'_, '_>, lease: &Lease) -> Result<()> {
    c.txn.delete_id(Cf::Lease, lease.id);
    if let Some((link, mut inode)) = c.txn.inode(InodeId(lease.file_id))?
        && inode.lease_id == lease.id
    {
        inode.lease_id = 0;
        c.update(InodeId(link.parent_id), &link.name, &inode);
    }
    Ok(())
}

pub fn abandon(c: &mut Context<'_, '_>, op: &Abandon) -> Result<()> {
    if let Some(lease) = c.txn.lease(op.lease_id)?
        && lease.publishing
    {
        if !c.who.superuser {
            return Err(err!(PermissionDenied, "only the master publishes"));
        }
        if op.expired_only && lease.expires_at_ms > c.now_ms() {
            return Err(err!(Busy, "the lease was renewed in the meantime"));
        }
        return give_up_publishing(c, &lease);
    }
    let (link, mut inode, lease) = match leased(c, op.file_id, op.lease_id) {
        Err(e) if e.kind() == forebay_common::ErrorKind::Expired => return Ok(()),
        other => other?,
    };
    if op.expired_only && lease.expires_at_ms > c.now_ms() {
        return Err(err!(Busy, "the lease was renewed in the meantime"));
    }
    if lease.replacement.is_some() {
        return give_up_replacing(c, &link, inode, &lease);
    }
    names::drop_others(c, &mut inode)?;
    delete::remove_entry(c, InodeId(link.parent_id), &link.name, inode);
    Ok(())
}

/// The file stays what it was.
fn give_up_replacing(c: &mut Context<'_, '_>, link: &Link, mut next: Inode, lease: &Lease) -> Result<()> {
    block::free_all(c, &mut next);
    c.txn.delete_id(Cf::Lease, lease.id);
    if let Some(mut inode) = c.txn.child(InodeId(link.parent_id), &link.name)?.filter(|inode| inode.id == lease.file_id) {
        inode.lease_id = 0;
        // A look at the store that began before this, or what arrived there of the new bytes, is not to be taken for what is known.
        inode.changed_index = c.change;
        c.update(InodeId(link.parent_id), &link.name, &inode);
    }
    Ok(())
}

pub fn renew(c: &mut Context<'_, '_>, op: &RenewLease) -> Result<()> {
    for id in &op.lease_ids {
        if let Some(mut lease) = c.txn.lease(*id)?
            && (c.who.superuser || lease.principal == c.who.user)
        {
            lease.expires_at_ms = c.now_ms() + lease.ttl_ms;
            c.txn.put(Cf::Lease, &id_key(*id), &lease);
        }
    }
    Ok(())
}
