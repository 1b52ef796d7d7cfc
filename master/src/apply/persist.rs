//! Files that go to their under store after they were acknowledged: queued, published under a lease, done.
//!
//! Invariants: a file with `persist_id` has its record in the family `Persist`, and only such a file has one; from the moment a
//! publication may begin the file `shadows` its key, so that whatever arrives there late is deleted with it; while its lease
//! lasts the file is neither moved nor deleted.

use super::context::Context;
use super::folder;
use crate::namespace::{self, block_runs};
use crate::store::{Cf, Reader, id_key};
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{BeginPublish, FinishPersist, QueuePersist};
use forebay_proto::store::{Inode, Lease, Persist};

/// Queues a file. The caller writes the inode.
pub fn enqueue(c: &mut Context<'_, '_>, inode: &mut Inode) {
    let id = c.counters.next_persist_id.max(1);
    c.counters.next_persist_id = id + 1;
    c.counters.unpersisted_files += 1;
    c.counters.unpersisted_bytes += inode.length;
    inode.persist_id = id;
    let record = Persist { id, inode_id: inode.id, queued_ms: c.now_ms(), length: inode.length };
    c.txn.put(Cf::Persist, &id_key(id), &record);
}

/// Takes a file off the queue. The caller writes the inode, or removes it.
pub fn dequeue(c: &mut Context<'_, '_>, inode: &mut Inode) {
    if inode.persist_id == 0 {
        return;
    }
    c.txn.delete_id(Cf::Persist, inode.persist_id);
    c.counters.unpersisted_files = c.counters.unpersisted_files.saturating_sub(1);
    c.counters.unpersisted_bytes = c.counters.unpersisted_bytes.saturating_sub(inode.length);
    inode.persist_id = 0;
}

/// Files of the cache alone. Those that are in a store already, or that lie in no mount, are left as they are.
pub fn queue(c: &mut Context<'_, '_>, op: &QueuePersist) -> Result<()> {
    for id in &op.file_ids {
        let Some((link, mut inode)) = c.txn.inode(InodeId(*id))? else { continue };
        if inode.folder || inode.kind > 0 || !inode.completed || inode.persisted || inode.persist_id > 0 {
            continue;
        }
        let path = c.txn.path_of(InodeId(*id))?;
        let walk = namespace::walk(&*c.txn, &path)?;
        if walk.mount.is_none() {
            return Err(err!(InvalidArgument, "{path} lies in no mount, so there is no under store to persist it to"));
        }
        c.check_writable(&walk, &path)?;
        namespace::check_traverse(&c.who, &walk, &path)?;
        namespace::check(&c.who, &inode, namespace::WRITE, &path)?;
        (inode.asynchronous, inode.to_ufs) = (true, true);
        enqueue(c, &mut inode);
        c.update(InodeId(link.parent_id), &link.name, &inode);
    }
    Ok(())
}

/// Errors: `Expired` when the file is not what its worker wrote out any more, `Busy` while somebody else is at it.
pub fn begin(c: &mut Context<'_, '_>, op: &BeginPublish) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "only the master publishes"));
    }
    let gone = || err!(Expired, "file {} is not to be published there any more: it was moved, deleted or replaced", op.file_id);
    let (link, mut inode) = c.txn.inode(InodeId(op.file_id))?.ok_or_else(gone)?;
    if inode.persist_id == 0 || inode.content_version != op.content_version || !inode.completed {
        return Err(gone());
    }
    let path = c.txn.path_of(InodeId(op.file_id))?;
    let walk = namespace::walk(&*c.txn, &path)?;
    if walk.mount.map_or(0, |(id, _)| id.get()) != op.mount_id || walk.ufs_key(&path) != op.key {
        return Err(gone());
    }
    check_arrived(&*c.txn, &path)?;
    let parent = InodeId(link.parent_id);
    c.check_no_tombstone(parent, &link.name, &path)?;
    // After a publication that failed, or whose outcome was lost: once nobody can be at it any more.
    if let Some(lease) = c.txn.lease(inode.lease_id)?
        && (lease.expires_at_ms > c.now_ms() || lease.replacement.is_some())
    {
        return Err(err!(Busy, "an earlier publication of {path} may still be under way, or it is being given other bytes"));
    }
    if inode.lease_id > 0 {
        c.txn.delete_id(Cf::Lease, inode.lease_id);
    }
    let lease = Lease { file_id: op.file_id, ttl_ms: op.lease_ttl_ms, worker_id: op.worker_id, publishing: true, ..Lease::default() };
    inode.lease_id = c.grant_lease(lease);
    // From now on something may be there.
    inode.shadows = true;
    c.update(parent, &link.name, &inode);
    folder::note_persisted(c, parent)?;
    c.reply.file_id = op.file_id;
    Ok(())
}

/// Errors: `Busy` while a folder above is on its way to another place in the store: what is put there now would be missed.
pub fn check_arrived<R: Reader>(reader: &R, path: &AbsPath) -> Result<()> {
    for pending in reader.pending()? {
        if pending.kind == "rename" && path.starts_with(&AbsPath::parse(&pending.target_path)?) {
            return Err(err!(Busy, "a folder above {path} is on its way to its new place in the under store"));
        }
    }
    Ok(())
}

/// The object is there, whole.
pub fn finish(c: &mut Context<'_, '_>, op: &FinishPersist) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "only the master publishes"));
    }
    let over = || err!(Expired, "file {} is not being published under this lease any more", op.file_id);
    let (link, mut inode) = c.txn.inode(InodeId(op.file_id))?.ok_or_else(over)?;
    if inode.persist_id == 0 || op.lease_id == 0 || inode.lease_id != op.lease_id {
        return Err(over());
    }
    dequeue(c, &mut inode);
    c.txn.delete_id(Cf::Lease, op.lease_id);
    inode.lease_id = 0;
    inode.shadows = false;
    inode.persisted = true;
    inode.fingerprint = op.fingerprint.clone();
    inode.changed_index = c.change;
    c.reply.file_id = inode.id;
    c.reply.settled = block_runs(&inode).into_iter().flat_map(|run| [run.first, run.count]).collect();
    c.update(InodeId(link.parent_id), &link.name, &inode);
    folder::note_persisted(c, InodeId(link.parent_id))
}
