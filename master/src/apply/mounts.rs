//! The mount table.

use super::context::Context;
use super::delete::{check_nothing_open, remove_tree};
use crate::mount::Appearance;
use crate::namespace::{Found, Walk};
use crate::store::{Cf, Reader, id_key};
use forebay_common::{AbsPath, InodeId, MountId, Result, err};
use forebay_proto::journal::{AddMount, RemoveMount, UpdateMount};
use forebay_proto::store::{Mount, Persist};

fn check_superuser(c: &Context<'_, '_>) -> Result<()> {
    if c.who.superuser { Ok(()) } else { Err(err!(PermissionDenied, "user {} is not a superuser: only those mount and unmount", c.who.user)) }
}

pub fn add(c: &mut Context<'_, '_>, op: &AddMount) -> Result<()> {
    check_superuser(c)?;
    let (path, walk) = c.walk(&op.path)?;
    for mount in c.txn.mounts()? {
        let at = AbsPath::parse(&mount.path)?;
        if at == path {
            return Err(err!(AlreadyExists, "{path} is a mount of {} already", mount.uri));
        }
    }
    let found = place(c, &path, &walk)?;
    let id = c.counters.next_mount_id;
    c.counters.next_mount_id += 1;
    let mut inode = found.inode.clone();
    inode.mount_id = id;
    Appearance::parse(&op.options)?.dress_folder(&mut inode);
    inode.children_known = false;
    inode.changed_index = c.change;
    c.update(found.parent, &found.name, &inode);
    let mount = Mount {
        id,
        path: path.as_bytes().to_vec().into(),
        uri: op.uri.clone(),
        read_only: op.read_only,
        options: op.options.clone(),
        inode_id: inode.id,
    };
    c.txn.put(Cf::Mount, &id_key(id), &mount);
    c.reply.mount_id = id;
    Ok(())
}

/// The folder to mount on: `/`, or a new one in a folder that exists.
fn place(c: &mut Context<'_, '_>, path: &AbsPath, walk: &Walk) -> Result<Found> {
    if walk.is_complete() {
        let found = walk.deepest().clone();
        if !path.is_root() {
            return Err(err!(AlreadyExists, "{path} exists already: mount on a name that does not"));
        }
        return Ok(found);
    }
    if walk.missing.len() > 1 {
        return Err(err!(NotFound, "the folder above {path} does not exist: make it first"));
    }
    let above = walk.deepest();
    if !above.inode.folder {
        return Err(err!(NotADirectory, "the folder above {path} is a file"));
    }
    let inode = c.new_inode(&above.inode, true, 0o755);
    let (parent, name) = (above.id(), walk.missing[0].clone());
    c.insert(parent, &name, &inode);
    Ok(Found { parent, name, inode, alias: None })
}

/// The same store under other options: what is cached stays.
pub fn update(c: &mut Context<'_, '_>, op: &UpdateMount) -> Result<()> {
    check_superuser(c)?;
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    let Some(mut mount) = c.txn.mount(MountId(found.inode.mount_id))? else {
        return Err(err!(InvalidArgument, "{path} is not a mount"));
    };
    let appearance = Appearance::parse(&op.options)?;
    // What somebody did to the folder meanwhile stays, unless this is about it.
    if appearance != Appearance::parse(&mount.options)? {
        let mut inode = found.inode.clone();
        appearance.dress_folder(&mut inode);
        c.update(found.parent, &found.name, &inode);
    }
    mount.read_only = op.read_only;
    mount.options = op.options.clone();
    c.txn.put(Cf::Mount, &id_key(mount.id), &mount);
    c.reply.mount_id = mount.id;
    Ok(())
}

pub fn remove(c: &mut Context<'_, '_>, op: &RemoveMount) -> Result<()> {
    check_superuser(c)?;
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    if found.inode.mount_id == 0 {
        return Err(err!(InvalidArgument, "{path} is not a mount"));
    }
    if path.is_root() {
        return Err(err!(InvalidArgument, "/ cannot be unmounted"));
    }
    for mount in c.txn.mounts()? {
        let at = AbsPath::parse(&mount.path)?;
        if at != path && at.starts_with(&path) {
            return Err(err!(InvalidArgument, "{path} holds the mount {at}: unmount it first"));
        }
    }
    check_nothing_open(c, &found, &path)?;
    if c.txn.pending()?.iter().any(|p| p.mount_id == found.inode.mount_id) {
        return Err(err!(Busy, "{path}: changes are still on their way to the under store"));
    }
    let mut waiting = 0;
    for record in c.txn.all::<Persist>(Cf::Persist)? {
        waiting += u64::from(c.txn.path_of(InodeId(record.inode_id))?.starts_with(&path));
    }
    if waiting > 0 {
        return Err(err!(
            Busy,
            "{path}: {waiting} files are not in the under store yet, though they were acknowledged: wait for them, or delete them"
        ));
    }
    c.txn.delete_id(Cf::Mount, found.inode.mount_id);
    remove_tree(c, &walk, found.parent, &found.name, found.inode)?;
    c.note_removal(InodeId(found.parent.get()))
}
