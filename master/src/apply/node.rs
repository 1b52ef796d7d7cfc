//! Names that are neither files nor folders: symbolic links, pipes, sockets, devices. Of the namespace alone; no under store hears of them.

use super::context::Context;
use crate::namespace;
use forebay_common::limits::PATH_MAX_BYTES;
use forebay_common::{Result, err};
use forebay_proto::journal::MakeNode;
use forebay_proto::store::Inode;

/// The upper bits of a POSIX mode (`S_IFMT >> 12`).
pub const LINK: u32 = 0o12;
const PIPE: u32 = 0o1;
const CHARACTER_DEVICE: u32 = 0o2;
const BLOCK_DEVICE: u32 = 0o6;
const SOCKET: u32 = 0o14;

pub fn make(c: &mut Context<'_, '_>, op: &MakeNode) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let name = path.name().ok_or_else(|| err!(AlreadyExists, "/ exists already"))?.to_vec();
    if ![LINK, PIPE, CHARACTER_DEVICE, BLOCK_DEVICE, SOCKET].contains(&op.kind) {
        return Err(err!(InvalidArgument, "{:o} is no kind of name", op.kind));
    }
    if matches!(op.kind, CHARACTER_DEVICE | BLOCK_DEVICE) && !c.who.superuser {
        return Err(err!(PermissionDenied, "only a superuser makes devices"));
    }
    if op.kind == LINK && (op.target.is_empty() || op.target.len() > PATH_MAX_BYTES || op.target.contains(&0)) {
        return Err(err!(InvalidArgument, "a link leads to a path of 1 to {PATH_MAX_BYTES} bytes"));
    }
    if walk.is_complete() {
        return Err(err!(AlreadyExists, "{path} exists already"));
    }
    if walk.missing.len() > 1 {
        return Err(err!(NotFound, "the folder of {path} does not exist"));
    }
    c.check_writable(&walk, &path)?;
    let parent = walk.deepest().clone();
    namespace::check_folder_of(&c.who, &parent.inode, &path)?;
    c.check_no_tombstone(parent.id(), &name, &path)?;
    let inode = Inode {
        kind: op.kind,
        target: if op.kind == LINK { op.target.clone() } else { Default::default() },
        device: if matches!(op.kind, CHARACTER_DEVICE | BLOCK_DEVICE) { op.device } else { 0 },
        completed: true,
        content_version: 1,
        ..c.new_inode(&parent.inode, false, op.mode & 0o7777)
    };
    c.insert(parent.id(), &name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}
