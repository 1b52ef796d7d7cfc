//! What holds for a path and all below it, until a deeper one says otherwise: kept with the inode, moved with it.

use super::context::Context;
use crate::mount::PathConfig;
use crate::namespace::check_owner;
use forebay_common::Result;
use forebay_proto::Setting;
use forebay_proto::journal::SetPathConfig;

pub fn set(c: &mut Context<'_, '_>, op: &SetPathConfig) -> Result<()> {
    let (path, walk) = c.walk(&op.path)?;
    let found = walk.found(&path)?.clone();
    check_owner(&c.who, &found.inode, &path)?;
    let mut inode = found.inode;
    inode.config.retain(|s| !op.unset.contains(&s.name) && !op.set.iter().any(|new| new.name == s.name));
    inode.config.extend(op.set.iter().cloned());
    inode.config.sort_by(|a: &Setting, b| a.name.cmp(&b.name));
    PathConfig::parse(&inode.config)?;
    let key = crate::store::id_key(inode.id);
    if inode.config.is_empty() {
        c.txn.delete(crate::store::Cf::PathConfig, &key);
    } else {
        c.txn.put_raw(crate::store::Cf::PathConfig, &key, Vec::new());
    }
    c.update(found.parent, &found.name, &inode);
    c.reply.file_id = inode.id;
    Ok(())
}
