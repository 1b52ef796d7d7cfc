//! Folders.

use super::context::Context;
use super::delete;
use crate::namespace::{self, Found, Walk, acl};
use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::Mkdir;
use forebay_proto::store::Pending;

pub fn mkdir(c: &mut Context<'_, '_>, op: &Mkdir) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    if walk.is_complete() {
        let found = walk.deepest();
        c.reply.file_id = found.inode.id;
        return match found.inode.folder {
            true if op.exist_ok => Ok(()),
            _ => Err(err!(AlreadyExists, "{path} exists already")),
        };
    }
    c.check_writable(&walk, &path)?;
    if walk.missing.len() > 1 && !op.recursive {
        return Err(err!(NotFound, "the folder above {path} does not exist: make it first, or use -p"));
    }
    namespace::check_folder_of(&c.who, &walk.deepest().inode, &path)?;
    let persisted = walk.mount.is_some();
    let made = make_missing(c, &walk, walk.missing.len(), persisted)?;
    if persisted {
        note_persisted(c, made.parent)?;
    }
    if let (true, Some((mount_id, _))) = (op.later, walk.mount) {
        delete::add_pending_only(
            c,
            Pending {
                mount_id: mount_id.get(),
                kind: "mkdir".into(),
                source_key: walk.ufs_key(&path).into(),
                folder: true,
                target_parent_id: made.parent.get(),
                target_name: made.name.clone().into(),
                // Nothing at or below the topmost new folder is compared with the store before it is there.
                target_path: top_of(&walk, &path)?.as_bytes().to_vec().into(),
                inode_id: made.inode.id,
                ..Pending::default()
            },
        );
    }
    let mut inode = made.inode.clone();
    (inode.mode, inode.acl) = (op.mode, Vec::new());
    let above = c.txn.inode_or_root(made.parent)?.ok_or_else(|| err!(NotFound, "the folder is gone"))?;
    acl::inherit(&above, &mut inode, if op.unmasked_mode > 0 { op.unmasked_mode } else { op.mode })?;
    c.update(made.parent, &made.name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}

/// The topmost name of a path that is missing.
fn top_of(walk: &Walk, path: &AbsPath) -> Result<AbsPath> {
    path.components().take(walk.chain.len()).try_fold(AbsPath::root(), |at, name| at.join(name))
}

/// Makes the first `count` missing folders and returns the last (or the deepest that exists).
pub fn make_missing(c: &mut Context<'_, '_>, walk: &Walk, count: usize, persisted: bool) -> Result<Found> {
    let mut above = walk.deepest().clone();
    if !above.inode.folder {
        return Err(err!(NotADirectory, "{} is a file", String::from_utf8_lossy(&above.name)));
    }
    if persisted && count > 0 {
        // What is in the store has its folders there.
        note_persisted(c, above.id())?;
        above = Found { inode: as_it_stands(c, &above)?, ..above };
    }
    for name in &walk.missing[..count] {
        let path = forebay_common::AbsPath::root().join(name)?;
        c.check_no_tombstone(above.id(), name, &path)?;
        let mut inode = c.new_inode(&above.inode, true, 0o755);
        acl::inherit(&above.inode, &mut inode, 0o777)?;
        inode.persisted = persisted;
        // Nothing of this name was in the under store, so nothing is below it that is not known here.
        inode.children_known = true;
        c.insert(above.id(), name, &inode);
        above = Found { parent: above.id(), name: name.clone(), inode, alias: None };
    }
    Ok(above)
}

/// A folder as it stands by now.
fn as_it_stands(c: &Context<'_, '_>, found: &Found) -> Result<forebay_proto::store::Inode> {
    c.txn.inode_or_root(found.id())?.ok_or_else(|| err!(NotFound, "the folder is gone"))
}

/// A file below is in the under store now, and so are the folders above it.
pub fn note_persisted(c: &mut Context<'_, '_>, mut folder: InodeId) -> Result<()> {
    while folder != InodeId::ROOT {
        let Some((link, mut inode)) = c.txn.inode(folder)? else { return Ok(()) };
        if inode.persisted || inode.mount_id > 0 {
            return Ok(());
        }
        inode.persisted = true;
        // A look at the store that began before must not count.
        inode.changed_index = c.change;
        folder = InodeId(link.parent_id);
        c.update(folder, &link.name, &inode);
    }
    Ok(())
}
