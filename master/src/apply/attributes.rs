//! Owner, group, mode, times, pin, time to live: of the namespace; under stores keep their own.

use super::context::Context;
use super::ttl;
use crate::namespace::check_owner;
use forebay_common::{Result, err};
use forebay_proto::journal::SetAttributes;

pub fn set(c: &mut Context<'_, '_>, op: &SetAttributes) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    check_owner(&c.who, &found.inode, &path)?;
    // What is pinned, and for how long it stays, is the cache's own affair.
    if op.mode.is_some() || op.owner.is_some() || op.group.is_some() || op.modified_ms.is_some() {
        c.check_writable(&walk, &path)?;
    }
    let mut inode = found.inode;
    if let Some(mode) = op.mode {
        if mode > 0o7777 {
            return Err(err!(InvalidArgument, "mode {mode:o} is not a mode"));
        }
        inode.mode = mode;
    }
    if let Some(owner) = &op.owner {
        if !c.who.superuser && *owner != inode.owner {
            return Err(err!(PermissionDenied, "only a superuser gives {path} another owner"));
        }
        inode.owner = owner.clone();
    }
    if let Some(group) = &op.group {
        if !c.who.superuser && !c.who.groups.contains(group) {
            return Err(err!(PermissionDenied, "user {} is not in group {group}", c.who.user));
        }
        inode.group = group.clone();
    }
    if let Some(ms) = op.modified_ms {
        inode.modified_ms = ms;
    }
    if let Some(ms) = op.accessed_ms {
        inode.accessed_ms = ms;
    }
    if let Some(replication) = op.hadoop_replication {
        inode.hadoop_replication = replication;
    }
    if let Some(pinned) = op.pinned {
        if inode.folder {
            return Err(err!(IsADirectory, "{path} is a folder: the files in it are pinned one by one"));
        }
        if pinned != inode.pinned {
            let total = c.counters.pinned_files;
            c.counters.pinned_files = if pinned { total + 1 } else { total.saturating_sub(1) };
        }
        inode.pinned = pinned;
    }
    if let Some(ttl_ms) = op.ttl_ms {
        ttl::set(c, &walk, &path, &mut inode, ttl_ms, op.ttl_frees)?;
    }
    c.update(found.parent, &found.name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}
