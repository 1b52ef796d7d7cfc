//! Time to live: set with the attributes, kept in an index by when it is over, and carried out by the leader's driver.
//!
//! Invariant: an entry of the index without an inode that names it is dropped when its time comes; an inode with a time has
//! its entry.

use super::context::Context;
use super::{delete, names};
use crate::namespace::{self, Walk};
use crate::store::{Cf, Reader, ttl_key};
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{Delete, ExpireTtl};
use forebay_proto::store::Inode;

/// Sets the time of an inode, or takes it away with 0. Errors: what is to be deleted then could not be deleted now.
pub fn set(c: &mut Context<'_, '_>, walk: &Walk, path: &AbsPath, inode: &mut Inode, ttl_ms: u64, frees: bool) -> Result<()> {
    forget(c, inode);
    if ttl_ms == 0 {
        return Ok(());
    }
    if path.is_root() {
        return Err(err!(InvalidArgument, "/ has no time to live: set it for what is below"));
    }
    if !frees {
        if inode.mount_id > 0 {
            return Err(err!(InvalidArgument, "{path} is a mount, which is not deleted: set the time of what is below it, or have it freed"));
        }
        delete::check_no_mount_below(c, path)?;
        c.check_writable(walk, path)?;
        namespace::check_folder_of(&c.who, &walk.chain[walk.chain.len() - 2].inode, path)?;
    }
    (inode.ttl_ms, inode.ttl_frees) = (ttl_ms, frees);
    inode.ttl_expires_at_ms = c.now_ms().saturating_add(ttl_ms);
    c.txn.put_raw(Cf::Ttl, &ttl_key(inode.ttl_expires_at_ms, inode.id), Vec::new());
    Ok(())
}

/// Takes the time of an inode away.
pub fn forget(c: &mut Context<'_, '_>, inode: &mut Inode) {
    if inode.ttl_expires_at_ms > 0 {
        c.txn.delete(Cf::Ttl, &ttl_key(inode.ttl_expires_at_ms, inode.id));
    }
    (inode.ttl_ms, inode.ttl_expires_at_ms, inode.ttl_frees) = (0, 0, false);
}

/// The time is over. What is freed has been freed by whoever proposes this; what is to be deleted is deleted here.
pub fn expire(c: &mut Context<'_, '_>, op: &ExpireTtl) -> Result<()> {
    let found = c.txn.inode(InodeId(op.inode_id))?.filter(|(_, inode)| inode.ttl_expires_at_ms == op.expires_at_ms);
    let Some((link, mut inode)) = found else {
        c.txn.delete(Cf::Ttl, &ttl_key(op.expires_at_ms, op.inode_id));
        return Ok(());
    };
    if inode.ttl_frees || op.give_up {
        forget(c, &mut inode);
        c.update(InodeId(link.parent_id), &link.name, &inode);
        return Ok(());
    }
    if !inode.other_names.is_empty() {
        names::drop_others(c, &mut inode)?;
        c.update(InodeId(link.parent_id), &link.name, &inode);
    }
    let path = c.txn.path_of(InodeId(op.inode_id))?;
    delete::delete(c, &Delete { path: path.as_bytes().to_vec().into(), recursive: true })
}
