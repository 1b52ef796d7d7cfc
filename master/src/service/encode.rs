//! Inodes as clients see them.

use crate::core::Core;
use crate::mount::Mounted;
use crate::namespace;
use forebay_common::AbsPath;
use forebay_proto::store::Inode;
use forebay_proto::{BlockInfo, BlockLocation, FileStatus};

/// The status of an entry. `key` is its key below the mount's root.
pub fn status(path: &AbsPath, inode: &Inode, mount: Option<&Mounted>, key: &[u8]) -> FileStatus {
    FileStatus {
        file_id: inode.id,
        path: path.as_bytes().to_vec().into(),
        length: inode.length,
        block_size_bytes: inode.block_size_bytes,
        folder: inode.folder,
        completed: inode.completed,
        persisted: inode.persisted,
        pinned: inode.pinned,
        ttl_ms: if inode.ttl_expires_at_ms > 0 { i64::try_from(inode.ttl_ms).unwrap_or(i64::MAX) } else { -1 },
        ttl_expires_at_ms: inode.ttl_expires_at_ms,
        ttl_frees: inode.ttl_frees,
        owner: inode.owner.clone(),
        group: inode.group.clone(),
        mode: inode.mode,
        ufs_path: mount.map(|m| m.ufs.uri().join(key)).unwrap_or_default(),
        content_version: inode.content_version,
        modified_ms: inode.modified_ms,
        mount_id: mount.map_or(0, |m| m.id.get()),
        fingerprint: inode.fingerprint.clone(),
        page_size_bytes: inode.page_size_bytes,
        mount_point: inode.mount_id > 0,
        to_be_persisted: inode.persist_id > 0,
        replication_min: inode.replication_min,
        replication_max: inode.replication_max,
        config: inode.config.clone(),
        cached_bytes: 0,
        mem_bytes: 0,
        short_blocks: inode.short_blocks.clone(),
        kind: inode.kind,
        target: inode.target.clone(),
        device: inode.device,
        modified_ns: inode.modified_ns,
        accessed_ms: inode.accessed_ms,
        accessed_ns: inode.accessed_ns,
        changed_ms: inode.changed_ms,
        other_names: u32::try_from(inode.other_names.len()).unwrap_or(u32::MAX),
    }
}

/// The blocks of a file with who has bytes of them, and the totals written into its status.
pub fn blocks(core: &Core, inode: &Inode, status: &mut FileStatus) -> Vec<BlockInfo> {
    let mut out = Vec::new();
    for (id, (offset, length)) in namespace::blocks(inode) {
        let holders = core.soft.blocks.holders(id);
        status.cached_bytes += holders.iter().map(|h| h.cached_bytes).max().unwrap_or(0).min(length);
        status.mem_bytes += holders.iter().filter(|h| h.tier == "MEM").map(|h| h.cached_bytes).max().unwrap_or(0).min(length);
        let locations =
            holders.into_iter().map(|h| BlockLocation { worker_id: h.worker.get(), tier: h.tier.to_owned(), cached_bytes: h.cached_bytes }).collect();
        out.push(BlockInfo { id: id.get(), offset, length, locations });
    }
    out
}
