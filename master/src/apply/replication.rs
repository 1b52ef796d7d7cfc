//! How many whole copies of a file the cache keeps. Files with a wish are in an index, so that the driver finds them.

use super::context::Context;
use crate::namespace;
use crate::store::{Cf, Reader, id_key};
use forebay_common::limits::REPLICAS_MAX;
use forebay_common::{InodeId, Result, err};
use forebay_proto::journal::SetReplication;
use forebay_proto::store::Inode;

/// Errors: `InvalidArgument` for numbers that cannot be.
pub fn check(min: u32, max: u32) -> Result<()> {
    if min > REPLICAS_MAX || max > REPLICAS_MAX || (max > 0 && min > max) {
        return Err(err!(InvalidArgument, "replication {min} to {max} cannot be: at most {REPLICAS_MAX}, and the least is not above the most"));
    }
    Ok(())
}

/// Notes what a file wishes. The caller writes the inode.
pub fn wish(c: &mut Context<'_, '_>, inode: &mut Inode, min: u32, max: u32) {
    (inode.replication_min, inode.replication_max) = (min, max);
    if min > 1 || max > 0 {
        c.txn.put_raw(Cf::Replicated, &id_key(inode.id), Vec::new());
    } else {
        c.txn.delete_id(Cf::Replicated, inode.id);
    }
}

/// A file goes.
pub fn forget(c: &mut Context<'_, '_>, inode: &Inode) {
    if inode.replication_min > 1 || inode.replication_max > 0 {
        c.txn.delete_id(Cf::Replicated, inode.id);
    }
}

pub fn set(c: &mut Context<'_, '_>, op: &SetReplication) -> Result<()> {
    check(op.min, op.max)?;
    for id in &op.file_ids {
        let Some((link, mut inode)) = c.txn.inode(InodeId(*id))?.filter(|(_, inode)| !inode.folder) else { continue };
        let path = c.txn.path_of(InodeId(*id))?;
        namespace::check(&c.who, &inode, namespace::WRITE, &path)?;
        wish(c, &mut inode, op.min, op.max);
        c.update(InodeId(link.parent_id), &link.name, &inode);
    }
    Ok(())
}
