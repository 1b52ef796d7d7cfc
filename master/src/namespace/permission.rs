//! POSIX permission bits, and the access control list of what has one. The superuser passes everything.

use super::acl;
use super::resolve::Walk;
use forebay_common::{AbsPath, Result, err};
use forebay_proto::store::Inode;

/// Read.
pub const READ: u32 = 4;
/// Write.
pub const WRITE: u32 = 2;
/// Execute; of a folder: pass through.
pub const EXECUTE: u32 = 1;

/// Who is asking.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// The user's name.
    pub user: String,
    /// Names of the user's groups.
    pub groups: Vec<String>,
    /// Passes every check.
    pub superuser: bool,
}

/// Errors: `PermissionDenied` naming user, path and what is missing.
pub fn check(who: &Who, inode: &Inode, wanted: u32, path: &AbsPath) -> Result<()> {
    let shift = if who.user == inode.owner {
        6
    } else if who.groups.contains(&inode.group) {
        3
    } else {
        0
    };
    if who.superuser || acl::allows(who, inode, wanted).unwrap_or((inode.mode >> shift) & wanted == wanted) {
        return Ok(());
    }
    let letters: String = [(READ, 'r'), (WRITE, 'w'), (EXECUTE, 'x')].iter().filter(|(bit, _)| wanted & bit != 0).map(|(_, c)| *c).collect();
    let nobody = |name: &str| if name.is_empty() { "(nobody)".to_owned() } else { name.to_owned() };
    let (owner, group) = (nobody(&inode.owner), nobody(&inode.group));
    Err(err!(PermissionDenied, "user {} needs {letters} on {path}, which is {owner}:{group} {:04o}", who.user, inode.mode))
}

/// Whether `who` may make, remove or rename names in the folder of `child`.
pub fn check_folder_of(who: &Who, folder: &Inode, child: &AbsPath) -> Result<()> {
    let of = child.parent().unwrap_or_else(AbsPath::root);
    check(who, folder, WRITE | EXECUTE, &of).map_err(|e| e.context(format!("{child} cannot be made, moved or removed")))
}

/// In a folder with the sticky bit names are their owners', and the folder's owner's, to remove or to move. Errors: `PermissionDenied`.
pub fn check_sticky(who: &Who, folder: &Inode, child: &Inode, path: &AbsPath) -> Result<()> {
    if who.superuser || folder.mode & 0o1000 == 0 || who.user == folder.owner || who.user == child.owner {
        return Ok(());
    }
    Err(err!(PermissionDenied, "Permission denied by sticky bit: user={}, path={path}, which is {}'s", who.user, child.owner))
}

/// Whether `who` may pass through every folder above the last name.
pub fn check_traverse(who: &Who, walk: &Walk, path: &AbsPath) -> Result<()> {
    if who.superuser {
        return Ok(());
    }
    let folders = walk.chain.len().saturating_sub(usize::from(walk.is_complete()));
    walk.chain[..folders].iter().try_for_each(|found| check(who, &found.inode, EXECUTE, path).map_err(|e| e.context("a folder above it")))
}

/// Errors: `PermissionDenied` unless `who` owns the inode.
pub fn check_owner(who: &Who, inode: &Inode, path: &AbsPath) -> Result<()> {
    if who.superuser || who.user == inode.owner {
        return Ok(());
    }
    Err(err!(PermissionDenied, "user {} is not the owner ({}) of {path}", who.user, inode.owner))
}
