//! Owner, group, mode, access control lists, extended attributes, times, pin, time to live: of the namespace; under stores keep their own.

use super::context::Context;
use super::ttl;
use crate::namespace::{WRITE, acl, check, check_owner};
use forebay_common::{Result, err};
use forebay_proto::XAttr;
use forebay_proto::journal::set_acl::Change;
use forebay_proto::journal::{SetAcl, SetAttributes, SetXAttr};

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
        (inode.modified_ms, inode.modified_ns) = (ms, op.modified_ns);
    }
    if let Some(ms) = op.accessed_ms {
        (inode.accessed_ms, inode.accessed_ns) = (ms, op.accessed_ns);
    }
    inode.changed_ms = c.now_ms();
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

pub fn set_acl(c: &mut Context<'_, '_>, op: &SetAcl) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    check_owner(&c.who, &found.inode, &path)?;
    c.check_writable(&walk, &path)?;
    let mut inode = found.inode;
    let all = acl::of(&inode);
    match op.change() {
        Change::Replace => acl::set(&mut inode, acl::replace(&all, &op.entries)?)?,
        Change::Merge => acl::set(&mut inode, acl::merge(&all, &op.entries)?)?,
        Change::Remove => acl::set(&mut inode, acl::without(&all, &op.entries)?)?,
        Change::RemoveDefault => inode.acl.retain(|e| e.scope == acl::ACCESS),
        Change::RemoveAll => acl::remove(&mut inode),
    }
    c.update(found.parent, &found.name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}

/// Extended attributes of one inode, and bytes of the name and value of one, by which HDFS limits them.
const X_ATTRS_MAX: usize = 32;
const X_ATTR_MAX_BYTES: usize = 16_384;
/// `XAttr.namespace` of those that everybody may use, and of those that are a superuser's.
const OF_USERS: u32 = 0;
const TRUSTED: u32 = 1;

/// Errors: an attribute of a namespace that is not the caller's to use.
pub fn check_x_attr(who: &crate::namespace::Who, namespace: u32, name: &str) -> Result<()> {
    if namespace == OF_USERS || (namespace == TRUSTED && who.superuser) {
        return Ok(());
    }
    Err(err!(PermissionDenied, "User doesn't have permission for xattr: {name}"))
}

pub fn set_x_attr(c: &mut Context<'_, '_>, op: &SetXAttr) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    check_x_attr(&c.who, op.namespace, &op.name)?;
    // In a sticky folder they are its owner's alone.
    if found.inode.folder && found.inode.mode & 0o1000 != 0 {
        check_owner(&c.who, &found.inode, &path)?;
    } else {
        check(&c.who, &found.inode, WRITE, &path)?;
    }
    c.check_writable(&walk, &path)?;
    let mut inode = found.inode;
    let at = inode.x_attrs.iter().position(|x| x.namespace == op.namespace && x.name == op.name);
    match (&op.value, at) {
        (None, None) => return Err(err!(InvalidArgument, "No matching attributes found for remove operation")),
        (None, Some(at)) => drop(inode.x_attrs.remove(at)),
        (Some(_), Some(_)) if !op.may_replace => {
            return Err(err!(InvalidArgument, "XAttr: {} already exists. The REPLACE flag must be specified.", op.name));
        }
        (Some(_), None) if !op.may_create => {
            return Err(err!(InvalidArgument, "XAttr: {} does not exist. The CREATE flag must be specified.", op.name));
        }
        (Some(value), at) => {
            let size = op.name.len() + value.len();
            if size > X_ATTR_MAX_BYTES {
                let message = "The XAttr is too big. The maximum combined size of the name and value is";
                return Err(err!(InvalidArgument, "{message} {X_ATTR_MAX_BYTES}, but the total size is {size}"));
            }
            let fresh = XAttr { namespace: op.namespace, name: op.name.clone(), value: value.clone() };
            match at {
                Some(at) => inode.x_attrs[at] = fresh,
                None if inode.x_attrs.len() >= X_ATTRS_MAX => {
                    return Err(err!(InvalidArgument, "Cannot add additional XAttr to inode, would exceed limit of {X_ATTRS_MAX}"));
                }
                None => inode.x_attrs.push(fresh),
            }
        }
    }
    c.update(found.parent, &found.name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}
