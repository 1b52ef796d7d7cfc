//! Several names of one file (hard links). Called by the operations that make, move and take away names.
//!
//! The file's record is at one of its names, and that name's path is its key in the under store; at each other name there is an entry that says
//! whose name it is, and the record lists those places. Invariants: every such entry is in the list of its file's record and the other way round, in
//! one mount; when the name with the record goes, the record moves to another name, and the under store follows by a rename; a file ends with its last name.

use super::context::Context;
use super::{delete, folder, quota};
use crate::namespace::{self, Found, Walk};
use crate::store::{Cf, Reader, dentry_key, id_key};
use forebay_common::limits::FILE_NAMES_MAX;
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::HardLink;
use forebay_proto::store::{Inode, Link, Pending};

pub fn link(c: &mut Context<'_, '_>, op: &HardLink) -> Result<()> {
    let (source, from) = c.walk(&op.source)?;
    let (target, to) = c.walk(&op.target)?;
    let found = from.found(&source)?.clone();
    if found.inode.folder {
        return Err(err!(PermissionDenied, "{source} is a folder: only files have several names"));
    }
    if to.is_complete() {
        return Err(err!(AlreadyExists, "{target} exists already"));
    }
    if to.missing.len() > 1 {
        return Err(err!(NotFound, "the folder of {target} does not exist"));
    }
    if delete::mount_of(&from) != delete::mount_of(&to) {
        return Err(err!(Unsupported, "{source} and {target} are in different mounts: copy the file"));
    }
    c.check_writable(&to, &target)?;
    let parent = to.deepest().clone();
    namespace::check_folder_of(&c.who, &parent.inode, &target)?;
    let name = to.missing[0].clone();
    c.check_no_tombstone(parent.id(), &name, &target)?;
    let mut inode = found.inode;
    if inode.other_names.len() + 1 >= FILE_NAMES_MAX {
        return Err(err!(LimitExceeded, "{source} has {FILE_NAMES_MAX} names, which is the most").with_retryable(false));
    }
    inode.other_names.push(place(parent.id(), &name));
    inode.changed_ms = c.now_ms();
    c.update(found.parent, &found.name, &inode);
    write_alias(c, parent.id(), &name, inode.id);
    c.charge(parent.id(), 1, 0);
    c.note_change(parent.id());
    c.reply.file_id = inode.id;
    Ok(())
}

/// One of several names is taken away; the caller has noted that on its folder.
pub fn unlink(c: &mut Context<'_, '_>, walk: &Walk, found: &Found) -> Result<()> {
    let mut inode = found.inode.clone();
    inode.changed_ms = c.now_ms();
    match &found.alias {
        Some((parent, name)) => {
            remove_alias(c, *parent, name, &mut inode);
            c.update(found.parent, &found.name, &inode);
            c.charge(*parent, -1, 0);
            Ok(())
        }
        None => {
            c.charge(found.parent, -1, 0);
            move_record(c, walk, found.parent, &found.name, inode, 0)
        }
    }
}

/// Another name of a file is at another place. The caller has seen to it that this place is free.
pub fn move_alias(c: &mut Context<'_, '_>, found: &Found, to: InodeId, new_name: &[u8]) {
    let (parent, name) = found.entry();
    let mut inode = found.inode.clone();
    remove_alias(c, parent, name, &mut inode);
    inode.other_names.push(place(to, new_name));
    inode.changed_ms = c.now_ms();
    c.update(found.parent, &found.name, &inode);
    write_alias(c, to, new_name, inode.id);
    c.charge(parent, -1, 0);
    c.charge(to, 1, 0);
}

/// What is known of a file that the under store has no more: all its names but the one with the record go. The caller writes, or removes, the inode.
pub fn drop_others(c: &mut Context<'_, '_>, inode: &mut Inode) -> Result<()> {
    for other in std::mem::take(&mut inode.other_names) {
        let parent = InodeId(other.parent_id);
        c.txn.delete(Cf::Dentry, &dentry_key(parent, &other.name));
        c.charge(parent, -1, 0);
        c.note_removal(parent)?;
    }
    Ok(())
}

/// A name in a tree that is removed. Returns what ends with it: the inode of a file whose last name outside is gone, as it stands.
pub fn leave_tree(c: &mut Context<'_, '_>, walk: &Walk, top: InodeId, folder: InodeId, name: &[u8], entry: Inode) -> Result<Option<Inode>> {
    if entry.alias_of > 0 {
        // Its record may have been removed with this tree before.
        match c.txn.inode(InodeId(entry.alias_of))? {
            Some((link, mut inode)) => {
                remove_alias(c, folder, name, &mut inode);
                inode.changed_ms = c.now_ms();
                c.update(InodeId(link.parent_id), &link.name, &inode);
            }
            None => c.txn.delete(Cf::Dentry, &dentry_key(folder, name)),
        }
        return Ok(None);
    }
    // Read again: names in this tree may have gone since it was listed.
    let Some(mut inode) = c.txn.entry(folder, name)? else { return Ok(None) };
    for index in 0..inode.other_names.len() {
        if !is_below(c, InodeId(inode.other_names[index].parent_id), top)? {
            inode.changed_ms = c.now_ms();
            move_record(c, walk, folder, name, inode, index)?;
            return Ok(None);
        }
    }
    Ok(Some(inode))
}

fn is_below(c: &Context<'_, '_>, mut at: InodeId, top: InodeId) -> Result<bool> {
    while at != InodeId::ROOT && at != InodeId(0) {
        if at == top {
            return Ok(true);
        }
        at = c.txn.link(at)?.map_or(InodeId(0), |link| InodeId(link.parent_id));
    }
    Ok(at == top)
}

/// The name that the record is at goes: it moves to the file's other name number `index`. The name itself is not charged.
fn move_record(c: &mut Context<'_, '_>, walk: &Walk, parent: InodeId, name: &[u8], mut inode: Inode, index: usize) -> Result<()> {
    let id = InodeId(inode.id);
    let old_path = c.txn.path_of(id)?;
    let next = inode.other_names.remove(index);
    let next_parent = InodeId(next.parent_id);
    let new_path = c.txn.path_of(next_parent)?.join(&next.name)?;
    let (persisted, shadows) = (inode.persisted, std::mem::take(&mut inode.shadows));
    inode.changed_index = c.change;
    let bytes = quota::space(&inode);
    c.charge(parent, 0, -bytes);
    c.charge(next_parent, 0, bytes);
    c.txn.delete(Cf::Dentry, &dentry_key(parent, name));
    c.txn.put(Cf::Dentry, &dentry_key(next_parent, &next.name), &inode);
    c.txn.put(Cf::Link, &id_key(inode.id), &next);
    let Some((mount_id, depth)) = walk.mount.filter(|_| persisted || shadows) else { return Ok(()) };
    let key = |path: &AbsPath| path.components().skip(depth).collect::<Vec<_>>().join(&b'/');
    let mut pending = Pending {
        mount_id: mount_id.get(),
        kind: "delete".into(),
        source_key: key(&old_path).into(),
        source_parent_id: parent.get(),
        source_name: name.to_vec().into(),
        ..Pending::default()
    };
    if persisted {
        folder::note_persisted(c, next_parent)?;
        pending = Pending {
            kind: "rename".into(),
            target_key: key(&new_path).into(),
            target_parent_id: next.parent_id,
            target_name: next.name,
            target_path: new_path.as_bytes().to_vec().into(),
            inode_id: inode.id,
            ..pending
        };
    }
    delete::add_pending(c, pending);
    Ok(())
}

fn place(parent: InodeId, name: &[u8]) -> Link {
    Link { parent_id: parent.get(), name: name.to_vec().into() }
}

fn write_alias(c: &mut Context<'_, '_>, parent: InodeId, name: &[u8], id: u64) {
    let entry = Inode { id, alias_of: id, completed: true, changed_index: c.change, ..Inode::default() };
    c.txn.put(Cf::Dentry, &dentry_key(parent, name), &entry);
}

/// The caller writes the inode.
fn remove_alias(c: &mut Context<'_, '_>, parent: InodeId, name: &[u8], inode: &mut Inode) {
    inode.other_names.retain(|other| other.parent_id != parent.get() || other.name != name);
    c.txn.delete(Cf::Dentry, &dentry_key(parent, name));
}
