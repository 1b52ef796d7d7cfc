//! What was seen in an under store becomes part of the namespace.
//!
//! The look was taken at state `base_index`; rows about anything that changed here since are skipped (and counted in the
//! reply): a listing that started before a file was created must not remove it, one that started before a deletion
//! must not bring it back, and where a rename is on its way to the store nothing is compared until it has arrived.

use super::context::Context;
use super::{block, delete, names};
use crate::namespace::{self, blocks_for};
use crate::store::{Cf, Reader, dentry_key};
use forebay_common::limits::BLOCKS_PER_FILE_MAX;
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{Seen, SyncChildren};
use forebay_proto::store::Inode;

pub fn children(c: &mut Context<'_, '_>, op: &SyncChildren) -> Result<()> {
    let parent_id = InodeId(op.parent_id);
    let (place, parent) = if parent_id == InodeId::ROOT {
        ((InodeId(0), Vec::new()), c.txn.root()?)
    } else {
        let (link, inode) = c.txn.inode(parent_id)?.ok_or_else(|| err!(NotFound, "the folder is gone"))?;
        ((InodeId(link.parent_id), link.name.to_vec()), inode)
    };
    if !parent.folder {
        return Err(err!(NotADirectory, "inode {parent_id} is a file"));
    }
    if moved_since(c, parent_id, op.base_index)? {
        c.reply.skipped += (op.seen.len() + op.gone.len()) as u64;
        return Ok(());
    }
    let moving = moving_targets(c)?;
    if !moving.is_empty() {
        let path = c.txn.path_of(parent_id)?;
        if moving.iter().any(|(target, ..)| path.starts_with(target)) {
            c.reply.skipped += (op.seen.len() + op.gone.len()) as u64;
            return Ok(());
        }
    }
    let is_moving = |name: &[u8]| moving.iter().any(|(_, parent, target)| *parent == op.parent_id && target == name);
    for seen in &op.seen {
        if is_moving(&seen.name) { c.reply.skipped += 1 } else { one(c, op, &parent, seen)? }
    }
    if !op.seen.is_empty() && parent.mount_id == 0 && parent_id != InodeId::ROOT {
        super::folder::note_persisted(c, parent_id)?;
    }
    for name in &op.gone {
        let full = if moving.is_empty() { None } else { Some(c.txn.path_of(parent_id)?.join(name)?) };
        let above_moving = full.is_some_and(|full| moving.iter().any(|(target, ..)| target.starts_with(&full)));
        if is_moving(name) || above_moving { c.reply.skipped += 1 } else { gone(c, op, parent_id, name)? }
    }
    if op.all_seen && !parent.children_known && c.reply.skipped == 0 {
        // Read again: rows above may have written it.
        let mut now = c.txn.entry(place.0, &place.1)?.ok_or_else(|| err!(NotFound, "the folder is gone"))?;
        now.children_known = true;
        c.update(place.0, &place.1, &now);
    }
    Ok(())
}

/// Whether this folder or one above it was renamed (or its rename arrived in the store) after the look began: then the look
/// was at another place.
fn moved_since(c: &Context<'_, '_>, mut folder: InodeId, base_index: u64) -> Result<bool> {
    while folder != InodeId::ROOT {
        let Some((link, inode)) = c.txn.inode(folder)? else { return Ok(true) };
        // A mount's folder is not moved: its number is of the mounting itself.
        if inode.mount_id > 0 {
            return Ok(false);
        }
        if inode.changed_index > base_index {
            return Ok(true);
        }
        folder = InodeId(link.parent_id);
    }
    Ok(false)
}

/// Where renames lead, and new folders are, that under stores have not done yet: what lies there is not to be compared with them. Path, parent
/// and name of each target.
fn moving_targets(c: &Context<'_, '_>) -> Result<Vec<(AbsPath, u64, Vec<u8>)>> {
    let pending = c.txn.pending()?;
    let renames = pending.into_iter().filter(|p| p.kind != "delete");
    renames.map(|p| Ok((AbsPath::parse(&p.target_path)?, p.target_parent_id, p.target_name.to_vec()))).collect()
}

fn one(c: &mut Context<'_, '_>, op: &SyncChildren, parent: &Inode, seen: &Seen) -> Result<()> {
    let parent_id = InodeId(parent.id);
    forebay_common::path::check_name(&seen.name)?;
    if blocks_for(seen.length, op.block_size_bytes) > BLOCKS_PER_FILE_MAX {
        // Too large for this mount's blocks: not shown, and not in the way of the others.
        return Ok(());
    }
    match c.txn.entry(parent_id, &seen.name)? {
        None => {
            let tombstone = c.txn.get(Cf::Tombstone, &dentry_key(parent_id, &seen.name))?;
            if tombstone.is_some() || parent.removal_index > op.base_index {
                c.reply.skipped += 1;
                return Ok(());
            }
            let inode = fresh(c, op, parent, seen)?;
            c.insert(parent_id, &seen.name, &inode);
        }
        Some(mut old) => {
            if old.changed_index > op.base_index || !old.completed || old.mount_id > 0 || old.lease_id > 0 {
                c.reply.skipped += 1;
                return Ok(());
            }
            if old.folder && seen.folder {
                return Ok(());
            }
            if !old.folder && !seen.folder && !old.persisted {
                return Ok(());
            }
            if !old.folder && !seen.folder {
                if old.fingerprint == seen.fingerprint {
                    return Ok(());
                }
                block::free_all(c, &mut old);
                let count = blocks_for(seen.length, old.block_size_bytes);
                let first = block::allocate(c, InodeId(old.id), count)?;
                block::append_run(&mut old, first, count);
                old.short_blocks = Vec::new();
                old.length = seen.length;
                old.fingerprint = seen.fingerprint.clone();
                old.modified_ms = seen.modified_ms;
                old.content_version = c.next_version(old.content_version);
                old.changed_index = c.change;
                c.update(parent_id, &seen.name, &old);
                return Ok(());
            }
            // A file became a folder or the other way round.
            if remove(c, op, parent_id, &seen.name, old)? {
                let inode = fresh(c, op, parent, seen)?;
                c.insert(parent_id, &seen.name, &inode);
            }
        }
    }
    Ok(())
}

fn gone(c: &mut Context<'_, '_>, op: &SyncChildren, parent_id: InodeId, name: &[u8]) -> Result<()> {
    let Some(old) = c.txn.entry(parent_id, name)? else { return Ok(()) };
    // Being given other bytes: looked at again when that is over.
    if old.lease_id > 0 && old.completed {
        return Ok(());
    }
    if old.changed_index > op.base_index || !old.completed || !old.persisted {
        c.reply.skipped += 1;
        return Ok(());
    }
    remove(c, op, parent_id, name, old).map(drop)
}

/// Removes what the under store no longer has, unless something mounted, open or not persisted would go with it.
fn remove(c: &mut Context<'_, '_>, op: &SyncChildren, parent_id: InodeId, name: &[u8], mut old: Inode) -> Result<bool> {
    if old.mount_id > 0 || old.alias_of > 0 {
        return Ok(false);
    }
    let mut shared = Vec::new();
    if old.folder {
        let mut folders = vec![InodeId(old.id)];
        while let Some(folder) = folders.pop() {
            for (name, child) in c.txn.entries(folder, None, delete::RECURSION_MAX_ENTRIES)? {
                // Done here since the look began.
                if child.changed_index > op.base_index {
                    c.reply.skipped += 1;
                    return Ok(false);
                }
                // What only this cluster has keeps its folder.
                if child.mount_id > 0 || child.lease_id > 0 || (!child.folder && !child.persisted) {
                    return Ok(false);
                }
                if child.folder {
                    folders.push(InodeId(child.id));
                } else if !child.other_names.is_empty() {
                    shared.push((folder, name, child));
                }
            }
        }
    }
    // With its bytes all names of a file go.
    names::drop_others(c, &mut old)?;
    for (folder, name, mut child) in shared {
        names::drop_others(c, &mut child)?;
        c.update(folder, &name, &child);
    }
    let path = c.txn.path_of(parent_id)?;
    let walk = namespace::walk(&*c.txn, &path)?;
    delete::remove_tree(c, &walk, parent_id, name, old)?;
    Ok(true)
}

fn fresh(c: &mut Context<'_, '_>, op: &SyncChildren, parent: &Inode, seen: &Seen) -> Result<Inode> {
    let mode = match (seen.mode, seen.folder) {
        (0, true) => 0o755,
        (0, false) => 0o644,
        (mode, _) => mode,
    };
    let id = c.draw_inode_id();
    let mut inode = Inode {
        id,
        folder: seen.folder,
        length: seen.length,
        completed: true,
        persisted: true,
        to_ufs: !seen.folder,
        cached: !seen.folder,
        owner: if seen.owner.is_empty() { parent.owner.clone() } else { seen.owner.clone() },
        group: if seen.group.is_empty() { parent.group.clone() } else { seen.group.clone() },
        mode,
        content_version: 1,
        created_ms: c.now_ms(),
        modified_ms: if seen.modified_ms > 0 { seen.modified_ms } else { c.now_ms() },
        fingerprint: seen.fingerprint.clone(),
        changed_index: c.change,
        ..Inode::default()
    };
    if !seen.folder {
        inode.block_size_bytes = op.block_size_bytes;
        inode.page_size_bytes = op.page_size_bytes;
        let count = blocks_for(seen.length, op.block_size_bytes);
        let first = block::allocate(c, InodeId(id), count)?;
        block::append_run(&mut inode, first, count);
    }
    Ok(inode)
}
