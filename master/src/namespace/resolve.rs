//! From a path to inodes: one get per name.

use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, MountId, Result, err};
use forebay_proto::store::Inode;

/// An inode and where its entry is.
#[derive(Clone, Debug)]
pub struct Found {
    /// The folder it is in.
    pub parent: InodeId,
    /// Its name there.
    pub name: Vec<u8>,
    /// Its attributes.
    pub inode: Inode,
}

impl Found {
    /// Its id.
    pub fn id(&self) -> InodeId {
        InodeId(self.inode.id)
    }
}

/// How far a path leads.
#[derive(Debug)]
pub struct Walk {
    /// From `/` down to the last name that exists.
    pub chain: Vec<Found>,
    /// Names that do not exist, from the top.
    pub missing: Vec<Vec<u8>>,
    /// The innermost mount the path lies in, and its depth in `chain`.
    pub mount: Option<(MountId, usize)>,
}

impl Walk {
    /// Whether the whole path exists.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// The deepest inode that exists.
    pub fn deepest(&self) -> &Found {
        match self.chain.last() {
            Some(found) => found,
            None => unreachable!("a walk starts at the root"),
        }
    }

    /// The inode of the whole path. Errors: `NotFound`.
    pub fn found(&self, path: &AbsPath) -> Result<&Found> {
        if self.is_complete() { Ok(self.deepest()) } else { Err(err!(NotFound, "{path} does not exist")) }
    }

    /// The key below the mount's root of the whole path.
    pub fn ufs_key(&self, path: &AbsPath) -> Vec<u8> {
        let depth = self.mount.map_or(0, |(_, depth)| depth);
        path.components().skip(depth).collect::<Vec<_>>().join(&b'/')
    }
}

/// Errors: `NotADirectory` when a name above the last is a file.
pub fn walk<R: Reader>(reader: &R, path: &AbsPath) -> Result<Walk> {
    let root = reader.root()?;
    let mut mount = (root.mount_id > 0).then_some((MountId(root.mount_id), 0));
    let mut chain = vec![Found { parent: InodeId(0), name: Vec::new(), inode: root }];
    let mut names = path.components();
    for name in names.by_ref() {
        let Some(above) = chain.last() else { break };
        if !above.inode.folder {
            return Err(err!(NotADirectory, "{path}: {} is a file", String::from_utf8_lossy(&above.name)));
        }
        let parent = above.id();
        match reader.child(parent, name)? {
            Some(inode) => {
                if inode.mount_id > 0 {
                    mount = Some((MountId(inode.mount_id), chain.len()));
                }
                chain.push(Found { parent, name: name.to_vec(), inode });
            }
            None => {
                let missing = std::iter::once(name).chain(names).map(<[u8]>::to_vec).collect();
                return Ok(Walk { chain, missing, mount });
            }
        }
    }
    Ok(Walk { chain, missing: Vec::new(), mount })
}
