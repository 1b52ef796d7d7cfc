//! Mounts that a worker makes, or finds, for the folders of its tiers: a tmpfs with huge pages, and read-only views through which files are opened for clients.
//!
//! Called by `dir` when a folder is prepared. Invariant: a view that is returned is of the same files, and nobody can write through it.

use forebay_common::error::at;
use forebay_common::{Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

const FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

fn is_mount_point(dir: &Path) -> bool {
    let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).ok();
    let parent = dir.parent().unwrap_or(Path::new("/"));
    device(dir).is_some() && device(dir) != device(parent)
}

pub fn is_tmpfs(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
}

/// Whether the tmpfs mounted on `dir` hands out huge pages, by its mount options.
pub fn has_huge_pages(dir: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let dir = dir.to_string_lossy();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, at, _, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (dir == at || dir.starts_with(&format!("{}/", at.trim_end_matches('/'))))
                .then_some((at.len(), options.contains("huge=within_size") || options.contains("huge=always")))
        })
        .max_by_key(|(length, _)| *length)
        .is_some_and(|(_, huge)| huge)
}

/// A tmpfs that holds the quota, with huge pages where they fit; one that is there already is given the size.
pub fn mount_tmpfs(dir: &Path, quota_bytes: u64) -> nix::Result<()> {
    // Huge pages are counted whole, and a page is being stored while its predecessor is being evicted.
    let size = quota_bytes + quota_bytes / 50 + (64 << 20);
    let inodes = (quota_bytes / (16 << 10)).max(100_000);
    let again = is_mount_point(dir) && is_tmpfs(dir);
    for swap in [",noswap", ""] {
        let options = format!("size={size},nr_inodes={inodes},mode=0700,huge=within_size{swap}");
        let flags = if again { FLAGS | MsFlags::MS_REMOUNT } else { FLAGS };
        match mount(Some("forebay-mem"), dir, Some("tmpfs"), flags, Some(options.as_str())) {
            Ok(()) => return Ok(()),
            // A remount cannot turn noswap on; what is mounted already is good.
            Err(nix::errno::Errno::EINVAL) if swap.is_empty() && again => return Ok(()),
            Err(nix::errno::Errno::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Err(nix::errno::Errno::EINVAL)
}

/// A read-only mount of the folder above `blocks_dir`, where somebody has made one.
pub fn given_read_only(blocks_dir: &Path, to: &Path) -> Option<PathBuf> {
    let there = to.join("blocks");
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let is_same = same(std::fs::metadata(blocks_dir).ok()?, std::fs::metadata(&there).ok()?);
    let read_only = nix::sys::statvfs::statvfs(&there).is_ok_and(|s| s.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
    (is_same && read_only).then_some(there)
}

/// Mounts a folder read-only on another one, in place of what an earlier process left there.
pub fn mount_read_only(from: &Path, to: &Path) -> Result<PathBuf> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(to).map_err(at(to.display()))?;
    while is_mount_point(to) && umount2(to, MntFlags::MNT_DETACH).is_ok() {}
    let os = |e: nix::errno::Errno| Error::io("mounting", &e.into());
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(os)?;
    let read_only = FLAGS | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(e) = mount(None::<&str>, to, None::<&str>, read_only, None::<&str>) {
        let _ = umount2(to, MntFlags::MNT_DETACH);
        return Err(os(e));
    }
    Ok(to.to_owned())
}
