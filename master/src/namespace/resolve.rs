//! From a path to inodes: one get per name.

use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, MountId, Result, err};
use forebay_proto::store::Inode;

/// An inode and where its record is.
#[derive(Clone, Debug)]
pub struct Found {
    /// The folder it is in.
    pub parent: InodeId,
    /// Its name there.
    pub name: Vec<u8>,
    /// Its attributes.
    pub inode: Inode,
    /// Of a file that was found under another one of its names: that one.
    pub alias: Option<(InodeId, Vec<u8>)>,
}

impl Found {
    /// Its id.
    pub fn id(&self) -> InodeId {
        InodeId(self.inode.id)
    }

    /// Where the name is that it was found under.
    pub fn entry(&self) -> (InodeId, &[u8]) {
        self.alias.as_ref().map_or((self.parent, &self.name), |(parent, name)| (*parent, name))
    }

    /// Whether it has other names than the one it was found under.
    pub fn is_shared(&self) -> bool {
        !self.inode.other_names.is_empty()
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
    /// Of a file with several names: the path that its under store has it under. All names are in one mount.
    stored_at: Option<AbsPath>,
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

    /// The key below the mount's root of what is at the whole path: of a file with several names that of its record's.
    pub fn ufs_key(&self, path: &AbsPath) -> Vec<u8> {
        self.name_key(self.stored_at.as_ref().unwrap_or(path))
    }

    /// The key below the mount's root of this very name, whatever is there.
    pub fn name_key(&self, path: &AbsPath) -> Vec<u8> {
        let depth = self.mount.map_or(0, |(_, depth)| depth);
        path.components().skip(depth).collect::<Vec<_>>().join(&b'/')
    }
}

/// Errors: `NotADirectory` when a name above the last is a file.
pub fn walk<R: Reader>(reader: &R, path: &AbsPath) -> Result<Walk> {
    let root = reader.root()?;
    let mut mount = (root.mount_id > 0).then_some((MountId(root.mount_id), 0));
    let mut chain = vec![Found { parent: InodeId(0), name: Vec::new(), inode: root, alias: None }];
    let mut stored_at = None;
    let mut names = path.components();
    for name in names.by_ref() {
        let Some(above) = chain.last() else { break };
        if !above.inode.folder {
            return Err(err!(NotADirectory, "{path}: {} is a file", String::from_utf8_lossy(&above.name)));
        }
        let parent = above.id();
        match reader.entry(parent, name)? {
            Some(entry) if entry.alias_of > 0 => {
                let id = InodeId(entry.alias_of);
                let (link, inode) = reader.inode(id)?.ok_or_else(|| err!(Corrupt, "{path} is a name of file {id}, which is not there"))?;
                stored_at = Some(reader.path_of(id)?);
                let alias = Some((parent, name.to_vec()));
                chain.push(Found { parent: InodeId(link.parent_id), name: link.name.to_vec(), inode, alias });
            }
            Some(inode) => {
                if inode.mount_id > 0 {
                    mount = Some((MountId(inode.mount_id), chain.len()));
                }
                chain.push(Found { parent, name: name.to_vec(), inode, alias: None });
            }
            None => {
                let missing = std::iter::once(name).chain(names).map(<[u8]>::to_vec).collect();
                return Ok(Walk { chain, missing, mount, stored_at });
            }
        }
    }
    Ok(Walk { chain, missing: Vec::new(), mount, stored_at })
}
