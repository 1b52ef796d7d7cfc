//! Rename: one entry moves, whatever hangs below it; the under store follows by a pending record.

use super::context::Context;
use super::delete::{add_pending, check_no_mount_below, check_nothing_open, mount_of, remove_entry};
use super::{folder, names, quota};
use crate::namespace;
use crate::store::{Cf, Reader, dentry_key, id_key};
use forebay_common::{Result, err};
use forebay_proto::journal::Rename;
use forebay_proto::store::{Link, Pending};

pub fn rename(c: &mut Context<'_, '_>, op: &Rename) -> Result<()> {
    let (source, from) = c.walk(&op.source)?;
    let (target, to) = c.walk(&op.target)?;
    let found = from.found(&source)?.clone();
    if source == target {
        return Ok(());
    }
    let Some(name) = target.name().map(<[u8]>::to_vec) else {
        return Err(err!(AlreadyExists, "/ exists already"));
    };
    if source.is_root() || found.inode.mount_id > 0 {
        return Err(err!(InvalidArgument, "{source} is a mount: unmount it and mount it elsewhere"));
    }
    if target.starts_with(&source) {
        return Err(err!(InvalidArgument, "{source} cannot be moved below itself"));
    }
    if to.missing.len() > 1 {
        return Err(err!(NotFound, "the folder of {target} does not exist"));
    }
    if mount_of(&from) != mount_of(&to) {
        return Err(err!(Unsupported, "{source} and {target} are in different mounts: copy, then delete"));
    }
    c.check_writable(&from, &source)?;
    check_nothing_open(c, &found, &source)?;
    if found.inode.folder {
        check_no_mount_below(c, &source)?;
    }
    let above = &from.chain[from.chain.len() - 2];
    let below = if to.is_complete() { &to.chain[to.chain.len() - 2] } else { to.deepest() };
    if !below.inode.folder {
        return Err(err!(NotADirectory, "the folder of {target} is a file"));
    }
    namespace::check_folder_of(&c.who, &above.inode, &source)?;
    namespace::check_folder_of(&c.who, &below.inode, &target)?;
    namespace::check_sticky(&c.who, &above.inode, &found.inode, &source)?;
    // What was in the store under the target's name stays there when a file of the cache alone takes the name.
    let (mut shadows, mut leaves_object) = (false, false);
    if to.is_complete() {
        let old = to.deepest().clone();
        if !op.overwrite {
            return Err(err!(AlreadyExists, "{target} exists already"));
        }
        if old.inode.folder != found.inode.folder {
            return Err(if old.inode.folder { err!(IsADirectory, "{target} is a folder") } else { err!(NotADirectory, "{target} is a file") });
        }
        // Two names of one file: both stay.
        if old.inode.id == found.inode.id {
            return Ok(());
        }
        if old.inode.folder && !c.txn.entries(old.id(), None, 1)?.is_empty() {
            return Err(err!(NotEmpty, "{target} is not empty"));
        }
        if old.inode.mount_id > 0 {
            return Err(err!(InvalidArgument, "{target} is a mount"));
        }
        namespace::check_sticky(&c.who, &below.inode, &old.inode, &target)?;
        check_nothing_open(c, &old, &target)?;
        c.check_no_tombstone(below.id(), &name, &target)?;
        if old.is_shared() {
            // What the store has of it moves away with its record.
            names::unlink(c, &to, &old)?;
        } else {
            let in_store = old.inode.persisted || old.inode.shadows;
            // One more name of a file is in no store: nothing takes the place of what is there.
            leaves_object = in_store && found.alias.is_some();
            shadows = in_store && !found.inode.persisted;
            remove_entry(c, old.parent, &old.name, old.inode);
        }
    } else {
        c.check_no_tombstone(below.id(), &name, &target)?;
    }
    c.reply.file_id = found.inode.id;
    if found.alias.is_some() {
        names::move_alias(c, &found, below.id(), &name);
        if let Some((mount_id, _)) = to.mount.filter(|_| leaves_object) {
            let pending = Pending {
                mount_id: mount_id.get(),
                kind: "delete".into(),
                source_key: to.name_key(&target).into(),
                source_parent_id: below.id().get(),
                source_name: name.into(),
                ..Pending::default()
            };
            add_pending(c, pending);
        }
        c.note_removal(found.entry().0)?;
        c.note_change(below.id());
        return Ok(());
    }
    let mut inode = found.inode.clone();
    inode.changed_index = c.change;
    inode.changed_ms = c.now_ms();
    inode.shadows = shadows;
    let persisted = inode.persisted;
    if c.counters.quota_folders > 0 {
        // First where it goes away: within one quota nothing changes.
        let moved = quota::below(c, &inode)?;
        c.charge(found.parent, -moved.names, -moved.bytes);
        c.charge(below.id(), moved.names, moved.bytes);
    }
    c.txn.delete(Cf::Dentry, &dentry_key(found.parent, &found.name));
    c.txn.put(Cf::Dentry, &dentry_key(below.id(), &name), &inode);
    c.txn.put(Cf::Link, &id_key(inode.id), &Link { parent_id: below.id().get(), name: name.clone().into() });
    c.note_removal(found.parent)?;
    c.note_change(below.id());
    if persisted {
        // What is in the store has its folders there.
        folder::note_persisted(c, below.id())?;
    }
    if persisted && let Some((mount_id, _)) = from.mount {
        let pending = Pending {
            mount_id: mount_id.get(),
            kind: "rename".into(),
            source_key: from.ufs_key(&source).into(),
            target_key: to.name_key(&target).into(),
            folder: inode.folder,
            source_parent_id: found.parent.get(),
            source_name: found.name.clone().into(),
            target_parent_id: below.id().get(),
            target_name: name.into(),
            target_path: target.as_bytes().to_vec().into(),
            inode_id: inode.id,
            ..Pending::default()
        };
        add_pending(c, pending);
    } else if found.inode.shadows
        && let Some((mount_id, _)) = from.mount
    {
        // The older object under the source's name would come back there.
        let pending = Pending {
            mount_id: mount_id.get(),
            kind: "delete".into(),
            source_key: from.ufs_key(&source).into(),
            folder: inode.folder,
            source_parent_id: found.parent.get(),
            source_name: found.name.clone().into(),
            ..Pending::default()
        };
        add_pending(c, pending);
    }
    Ok(())
}
