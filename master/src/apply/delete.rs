//! Removal, here at once and in the under store by a pending record that sync and reads respect meanwhile.

use super::context::Context;
use super::{block, names, persist, quota, reopen, replication, replies, ttl};
use crate::namespace::{self, Found, Walk};
use crate::store::{Cf, Reader, dentry_key, id_key};
use forebay_common::{AbsPath, ErrorKind, InodeId, Result, err};
use forebay_proto::journal::{Delete, FinishPending};
use forebay_proto::store::{Inode, Pending};

/// Entries one command may remove.
pub const RECURSION_MAX_ENTRIES: usize = 1_000_000;

pub fn delete(c: &mut Context<'_, '_>, op: &Delete) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    if path.is_root() {
        return Err(err!(InvalidArgument, "/ cannot be deleted"));
    }
    if found.inode.mount_id > 0 {
        return Err(err!(InvalidArgument, "{path} is a mount: unmount it"));
    }
    c.check_writable(&walk, &path)?;
    let above = &walk.chain[walk.chain.len() - 2];
    namespace::check_folder_of(&c.who, &above.inode, &path)?;
    namespace::check_sticky(&c.who, &above.inode, &found.inode, &path)?;
    check_nothing_open(c, &found, &path)?;
    if found.is_shared() {
        names::unlink(c, &walk, &found)?;
        return c.note_removal(found.entry().0);
    }
    if found.inode.folder {
        check_no_mount_below(c, &path)?;
        if !op.recursive && !c.txn.entries(found.id(), None, 1)?.is_empty() {
            return Err(err!(NotEmpty, "{path} is not empty: use -R to delete it with all below it"));
        }
    }
    let in_store = found.inode.persisted || found.inode.shadows;
    remove_tree(c, &walk, found.parent, &found.name, found.inode.clone())?;
    c.note_removal(found.parent)?;
    if in_store && let Some((mount_id, _)) = walk.mount {
        let pending = Pending {
            mount_id: mount_id.get(),
            kind: "delete".into(),
            source_key: walk.ufs_key(&path).into(),
            folder: found.inode.folder,
            source_parent_id: found.parent.get(),
            source_name: found.name.clone().into(),
            ..Pending::default()
        };
        add_pending(c, pending);
    }
    Ok(())
}

/// Writes a pending record with the tombstone of its source.
pub fn add_pending(c: &mut Context<'_, '_>, pending: Pending) {
    let tombstone = dentry_key(InodeId(pending.source_parent_id), &pending.source_name);
    let id = add_pending_only(c, pending);
    c.txn.put_raw(Cf::Tombstone, &tombstone, id.to_be_bytes().to_vec());
}

/// Writes a pending record and returns its id.
pub fn add_pending_only(c: &mut Context<'_, '_>, mut pending: Pending) -> u64 {
    pending.id = c.counters.next_pending_id;
    c.counters.next_pending_id += 1;
    pending.created_ms = c.now_ms();
    (pending.client_id, pending.sequence) = (c.command.client_id, c.command.sequence);
    c.txn.put(Cf::Pending, &id_key(pending.id), &pending);
    c.reply.pending_id = pending.id;
    pending.id
}

/// The under store has followed, or can never: either way the names are free again and sync looks afresh.
pub fn finish_pending(c: &mut Context<'_, '_>, op: &FinishPending) -> Result<()> {
    let Some(pending) = c.txn.record::<Pending>(Cf::Pending, &id_key(op.pending_id))? else { return Ok(()) };
    c.txn.delete_id(Cf::Pending, pending.id);
    let parent = InodeId(pending.source_parent_id);
    c.txn.delete(Cf::Tombstone, &dentry_key(parent, &pending.source_name));
    c.note_removal(parent)?;
    if !op.error.is_empty() {
        replies::amend(c.txn, pending.client_id, pending.sequence, ErrorKind::from_code(op.error_kind), &op.error)?;
    }
    if pending.kind != "delete" {
        let target = InodeId(pending.target_parent_id);
        if let Some(mut inode) = c.txn.entry(target, &pending.target_name)?
            && inode.id == pending.inode_id
            && inode.alias_of == 0
        {
            // A look at the store that began before it had followed must not count.
            inode.changed_index = c.change;
            // Moving a file changes its change time, which is part of its fingerprint; its bytes are the same.
            if !op.fingerprint.is_empty() && op.error.is_empty() && inode.fingerprint == op.previous_fingerprint {
                inode.fingerprint = op.fingerprint.clone();
            }
            c.update(target, &pending.target_name, &inode);
        }
    }
    Ok(())
}

/// Removes an entry that has no children; its lease and blocks go with it.
pub fn remove_entry(c: &mut Context<'_, '_>, parent: InodeId, name: &[u8], inode: Inode) {
    let bytes = quota::space(&inode);
    take_away(c, parent, name, inode);
    c.charge(parent, -1, -bytes);
}

/// The same, charged to no quota.
fn take_away(c: &mut Context<'_, '_>, parent: InodeId, name: &[u8], mut inode: Inode) {
    if inode.quota_names > 0 || inode.quota_bytes > 0 {
        c.counters.quota_folders = c.counters.quota_folders.saturating_sub(1);
    }
    block::free_all(c, &mut inode);
    if inode.lease_id > 0 {
        if let Ok(Some(mut lease)) = c.txn.lease(inode.lease_id) {
            reopen::forget_rewritten(c, &lease);
            if let Some(next) = &mut lease.replacement {
                block::free_all(c, next);
            }
        }
        c.txn.delete_id(Cf::Lease, inode.lease_id);
    }
    ttl::forget(c, &mut inode);
    persist::dequeue(c, &mut inode);
    replication::forget(c, &inode);
    if !inode.config.is_empty() {
        c.txn.delete_id(Cf::PathConfig, inode.id);
    }
    if inode.pinned {
        c.counters.pinned_files = c.counters.pinned_files.saturating_sub(1);
    }
    c.txn.delete(Cf::Dentry, &dentry_key(parent, name));
    c.txn.delete_id(Cf::Link, inode.id);
    let total = if inode.folder { &mut c.counters.folders } else { &mut c.counters.files };
    *total = total.saturating_sub(1);
}

/// Removes an entry and all below it; files that have other names elsewhere, `walk`'s mount being theirs, stay under those. Errors: `LimitExceeded`
/// above `RECURSION_MAX_ENTRIES`.
pub fn remove_tree(c: &mut Context<'_, '_>, walk: &Walk, parent: InodeId, name: &[u8], inode: Inode) -> Result<()> {
    let top = InodeId(inode.id);
    let mut folders = if inode.folder { vec![top] } else { Vec::new() };
    let mut bytes = quota::space(&inode);
    // Folders go after what is in them: where that was is still asked for.
    let mut emptied = vec![(parent, name.to_vec(), inode)];
    let mut removed = 1;
    while let Some(folder) = folders.pop() {
        let children = c.txn.entries(folder, None, RECURSION_MAX_ENTRIES + 1)?;
        removed += children.len();
        if removed > RECURSION_MAX_ENTRIES {
            return Err(err!(LimitExceeded, "more than {RECURSION_MAX_ENTRIES} entries below this folder: delete its subfolders one by one")
                .with_retryable(false));
        }
        for (name, child) in children {
            if child.folder {
                folders.push(InodeId(child.id));
                emptied.push((folder, name, child));
                continue;
            }
            let child = if child.alias_of > 0 || !child.other_names.is_empty() {
                let Some(child) = names::leave_tree(c, walk, top, folder, &name, child)? else { continue };
                child
            } else {
                child
            };
            bytes = bytes.saturating_add(quota::space(&child));
            take_away(c, folder, &name, child);
        }
    }
    for (parent, name, inode) in emptied.into_iter().rev() {
        take_away(c, parent, &name, inode);
    }
    c.charge(parent, -i64::try_from(removed).unwrap_or(i64::MAX), -bytes);
    Ok(())
}

/// Whether a Hadoop client is writing a file: as in HDFS it may be moved (its writer finds it by its id), deleted or replaced (its writer is told so).
pub fn is_hadoops<R: Reader>(reader: &R, inode: &Inode) -> Result<bool> {
    Ok(!inode.completed && reader.lease(inode.lease_id)?.is_some_and(|lease| !lease.holder.is_empty() && !lease.publishing))
}

/// Errors: `Busy` when this file, or one below this folder, is being written: its bytes would arrive under a dead name.
pub fn check_nothing_open(c: &Context<'_, '_>, found: &Found, path: &AbsPath) -> Result<()> {
    if !found.inode.folder {
        return if found.inode.lease_id == 0 || found.alias.is_some() || is_hadoops(&*c.txn, &found.inode)? {
            Ok(())
        } else {
            Err(err!(Busy, "{path} cannot be moved or deleted while it is being written"))
        };
    }
    for lease in c.txn.leases()?.into_iter().filter(|lease| lease.holder.is_empty() || lease.publishing) {
        let mut at = InodeId(lease.file_id);
        while at != InodeId::ROOT && at != InodeId(0) {
            if at == found.id() {
                let open = c.txn.path_of(InodeId(lease.file_id))?;
                return Err(err!(Busy, "{path} cannot be moved or deleted while {open} is being written"));
            }
            at = c.txn.link(at)?.map_or(InodeId(0), |l| InodeId(l.parent_id));
        }
    }
    Ok(())
}

/// Errors: `InvalidArgument` when something is mounted below.
pub fn check_no_mount_below(c: &Context<'_, '_>, path: &AbsPath) -> Result<()> {
    for mount in c.txn.mounts()? {
        let at = AbsPath::parse(&mount.path)?;
        if at.starts_with(path) {
            return Err(err!(InvalidArgument, "{path} holds the mount {at}: unmount it first"));
        }
    }
    Ok(())
}

/// The mount a walk lies in, for comparing two paths.
pub fn mount_of(walk: &Walk) -> u64 {
    walk.mount.map_or(0, |(id, _)| id.get())
}
