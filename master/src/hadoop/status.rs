//! Inodes as `HdfsFileStatusProto`.

use bytes::Bytes;
use forebay_hdfs::hadoop::hdfs::{FsPermissionProto, HdfsFileStatusProto, LocatedBlocksProto, hdfs_file_status_proto::FileType};
use forebay_proto::store::Inode;

/// What stands for "no quota".
pub const NO_QUOTA: u64 = u64::MAX;
/// A new file of another front has as many replicas, as Hadoop's shell shows them.
const REPLICATION_SHOWN: u32 = 1;
/// Shown where nobody is known.
const NOBODY: &str = "nobody";

/// The permission bits as a message.
pub fn permission(inode: &Inode) -> FsPermissionProto {
    FsPermissionProto { perm: inode.mode & 0o1777 }
}

/// How many replicas a file is shown with; a folder has none.
pub fn replication(inode: &Inode) -> u32 {
    if inode.folder {
        return 0;
    }
    inode.hadoop_replication.max(inode.replication_min).max(REPLICATION_SHOWN)
}

/// `HdfsFileStatusProto.Flags.HAS_ACL`: the shell shows a `+`.
const HAS_ACL: u32 = 1;

/// Owner and group, never empty.
pub fn owner_and_group(inode: &Inode) -> (String, String) {
    let named = |name: &str| if name.is_empty() { NOBODY.to_owned() } else { name.to_owned() };
    (named(&inode.owner), named(&inode.group))
}

/// The status of an entry: `name` is its last component, empty where the path was named by the caller.
pub fn encode(name: &[u8], inode: &Inode, locations: Option<LocatedBlocksProto>) -> HdfsFileStatusProto {
    let (owner, group) = owner_and_group(inode);
    HdfsFileStatusProto {
        file_type: if inode.folder { FileType::IsDir } else { FileType::IsFile } as i32,
        path: Bytes::copy_from_slice(name),
        length: inode.length,
        permission: permission(inode),
        owner,
        group,
        modification_time: inode.modified_ms,
        access_time: if inode.folder {
            0
        } else if inode.accessed_ms > 0 {
            inode.accessed_ms
        } else {
            inode.modified_ms
        },
        symlink: None,
        block_replication: Some(replication(inode)),
        blocksize: Some(if inode.folder { 0 } else { inode.block_size_bytes }),
        locations,
        file_id: Some(inode.id),
        // Not counted.
        children_num: Some(-1),
        file_encryption_info: None,
        storage_policy: Some(0),
        ec_policy: None,
        flags: Some(if inode.acl.is_empty() { 0 } else { HAS_ACL }),
        namespace: None,
    }
}
