//! Quotas of folders: how many names, and how many bytes with their replicas, may be below one.
//!
//! What is below is counted on the folders that have a quota, and nowhere else: with the first one set the tree below it is added up once, and from then on
//! every entry that comes, goes, grows or moves is charged to those above it. Invariant: `used_names` and `used_bytes` of such a folder are what a walk of its
//! tree would add up to (itself among the names). What is found in an under store counts, and is never refused; so does what a file has when it is completed:
//! asked is before a block is given out, as HDFS does. Source: `DirectoryWithQuotaFeature` and `FSDirAttrOp.unprotectedSetQuota` 3.4.1.

use super::context::Context;
use super::delete::RECURSION_MAX_ENTRIES;
use crate::namespace;
use crate::store::{Cf, Reader, dentry_key};
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{SetQuota, command::Op};
use forebay_proto::store::Inode;

/// What a tree has, or what it gets more or less of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    pub names: i64,
    pub bytes: i64,
}

/// Bytes of one inode with its replicas.
pub fn space(inode: &Inode) -> i64 {
    if inode.folder { 0 } else { i64::try_from(inode.length.saturating_mul(replicas(inode))).unwrap_or(i64::MAX) }
}

fn replicas(inode: &Inode) -> u64 {
    u64::from(inode.hadoop_replication.max(inode.replication_min).max(1))
}

/// A number of bytes as Hadoop writes it: `1 MB`, `1.50 GB`.
fn words(bytes: u64) -> String {
    let units = ["B", "KB", "MB", "GB", "TB", "PB", "EB"];
    let at = (0..units.len()).rev().find(|i| bytes >> (10 * i) > 0).unwrap_or(0);
    let whole = bytes >> (10 * at);
    if whole << (10 * at) == bytes {
        format!("{whole} {}", units[at])
    } else {
        format!("{:.2} {}", bytes as f64 / (1u64 << (10 * at)) as f64, units[at])
    }
}

/// Whether a change is somebody's, to be refused where there is no more: not what is found, nor what was acknowledged already.
fn is_asked_for(op: Option<&Op>) -> bool {
    matches!(op, Some(Op::Create(_) | Op::Mkdir(_) | Op::MakeNode(_) | Op::HardLink(_) | Op::Rename(_) | Op::AddBlocks(_)))
}

/// Charges a change of what is in `folder` to all that have a quota, it and those above. Errors: one of them is exceeded.
pub fn charge(c: &mut Context<'_, '_>, folder: InodeId, change: Use) -> Result<()> {
    if c.counters.quota_folders == 0 || change == Use::default() {
        return Ok(());
    }
    let asked = is_asked_for(c.command.op.as_ref());
    let mut at = folder;
    while at != InodeId(0) {
        let (parent, name, mut inode) = if at == InodeId::ROOT {
            (InodeId(0), Vec::new(), c.txn.root()?)
        } else {
            let Some((link, inode)) = c.txn.inode(at)? else { return Ok(()) };
            (InodeId(link.parent_id), link.name.to_vec(), inode)
        };
        if inode.quota_names > 0 || inode.quota_bytes > 0 {
            inode.used_names = inode.used_names.saturating_add_signed(change.names);
            inode.used_bytes = inode.used_bytes.saturating_add_signed(change.bytes);
            if asked {
                check(c, at, &inode, change)?;
            }
            c.txn.put(Cf::Dentry, &dentry_key(parent, &name), &inode);
        }
        at = parent;
    }
    Ok(())
}

fn check(c: &Context<'_, '_>, folder: InodeId, inode: &Inode, change: Use) -> Result<()> {
    let path = || c.txn.path_of(folder).map(|path| path.to_string()).unwrap_or_default();
    if change.names > 0 && inode.quota_names > 0 && inode.used_names > inode.quota_names {
        let (quota, used) = (inode.quota_names, inode.used_names);
        let message = format!("The NameSpace quota (directories and files) of directory {} is exceeded: quota={quota} file count={used}", path());
        return Err(err!(NoSpace, "{message}").with_retryable(false));
    }
    if change.bytes > 0 && inode.quota_bytes > 0 && inode.used_bytes > inode.quota_bytes {
        let (quota, used) = (inode.quota_bytes, inode.used_bytes);
        let (quota, used) = (format!("{quota} B = {}", words(quota)), format!("{used} B = {}", words(used)));
        let message = format!("The DiskSpace quota of {} is exceeded: quota = {quota} but diskspace consumed = {used}", path());
        return Err(err!(NoSpace, "{message}").with_retryable(false));
    }
    Ok(())
}

/// Errors: no room for one more block of a file, whole, below a folder above it. `replaces`: what goes when it is complete.
pub fn check_block(c: &Context<'_, '_>, folder: InodeId, file: &Inode, replaces: i64) -> Result<()> {
    if c.counters.quota_folders == 0 {
        return Ok(());
    }
    let block = i64::try_from(file.block_size_bytes.saturating_mul(replicas(file))).unwrap_or(i64::MAX).saturating_sub(replaces);
    let mut at = folder;
    while at != InodeId(0) {
        let Some(mut inode) = c.txn.inode_or_root(at)? else { return Ok(()) };
        inode.used_bytes = inode.used_bytes.saturating_add_signed(block);
        check(c, at, &inode, Use { names: 0, bytes: block })?;
        at = if at == InodeId::ROOT { InodeId(0) } else { c.txn.link(at)?.map_or(InodeId(0), |link| InodeId(link.parent_id)) };
    }
    Ok(())
}

/// What an entry and all below it have. Errors: `LimitExceeded` for more entries than one command looks at.
pub fn below(c: &Context<'_, '_>, top: &Inode) -> Result<Use> {
    let (mut sum, mut folders) = (Use { names: 1, bytes: space(top) }, Vec::new());
    if top.folder {
        folders.push(InodeId(top.id));
    }
    while let Some(folder) = folders.pop() {
        for (_, child) in c.txn.entries(folder, None, RECURSION_MAX_ENTRIES)? {
            sum.names += 1;
            sum.bytes = sum.bytes.saturating_add(space(&child));
            if child.folder {
                folders.push(InodeId(child.id));
            }
        }
        if sum.names as usize > RECURSION_MAX_ENTRIES {
            return Err(err!(LimitExceeded, "more than {RECURSION_MAX_ENTRIES} entries below this folder").with_retryable(false));
        }
    }
    Ok(sum)
}

pub fn set(c: &mut Context<'_, '_>, op: &SetQuota) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "Access denied for user {}. Superuser privilege is required", c.who.user));
    }
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    let mut inode = found.inode;
    if !inode.folder {
        return Err(err!(NotADirectory, "Directory does not exist: {path}"));
    }
    if path == AbsPath::root() && op.names == Some(0) {
        return Err(err!(InvalidArgument, "Cannot clear namespace quota on root."));
    }
    namespace::check_traverse(&c.who, &walk, &path)?;
    let before = inode.quota_names > 0 || inode.quota_bytes > 0;
    inode.quota_names = op.names.unwrap_or(inode.quota_names);
    inode.quota_bytes = op.bytes.unwrap_or(inode.quota_bytes);
    let after = inode.quota_names > 0 || inode.quota_bytes > 0;
    match (before, after) {
        (false, true) => {
            let used = below(c, &inode)?;
            (inode.used_names, inode.used_bytes) = (used.names.unsigned_abs(), used.bytes.unsigned_abs());
            c.counters.quota_folders += 1;
        }
        (true, false) => {
            (inode.used_names, inode.used_bytes) = (0, 0);
            c.counters.quota_folders = c.counters.quota_folders.saturating_sub(1);
        }
        _ => {}
    }
    c.txn.put(Cf::Dentry, &dentry_key(found.parent, &found.name), &inode);
    c.reply.file_id = inode.id;
    Ok(())
}
