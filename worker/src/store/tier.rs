//! The MEM tier's folder: a tmpfs of our own with huge pages where we may mount, else the folder as given.
//!
//! Beside it a read-only bind mount of the same folder, through which files are opened for clients: such a descriptor
//! cannot be re-opened for writing, truncated or chmod-ed by anybody, root included (EROFS). The mounts stay when the
//! worker stops, so that blocks survive its restart; stale read-only mounts are replaced at start.

use super::lease_probe;
use forebay_common::config::{MemMount, WorkerConfig};
use forebay_common::error::at;
use forebay_common::{Result, err};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What the tier's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemPages {
    /// tmpfs with huge pages.
    Huge,
    /// tmpfs on 4 KiB pages: a warm 1 MiB read takes 3 to 6 times as long.
    Small,
    /// Not memory at all: a file system on a disk.
    Disk,
}

/// A usable tier folder.
pub struct Tier {
    dir: PathBuf,
    grant_dir: Option<PathBuf>,
    quota_bytes: u64,
    pages: MemPages,
    warnings: Vec<String>,
    _lock: fd_lock::RwLockWriteGuard<'static, File>,
}

const FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

fn is_mount_point(dir: &Path) -> bool {
    let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).ok();
    let parent = dir.parent().unwrap_or(Path::new("/"));
    device(dir).is_some() && device(dir) != device(parent)
}

fn is_tmpfs(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
}

/// Whether the tmpfs mounted on `dir` hands out huge pages, by its mount options.
fn has_huge_pages(dir: &Path) -> bool {
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

impl Tier {
    /// Prepares the folder. Errors: another worker has it, it cannot hold the quota, `mem_mount = "always"` is impossible.
    pub fn prepare(config: &WorkerConfig) -> Result<Tier> {
        let dir = config.mem_dir.clone();
        let quota_bytes = config.mem_quota.as_u64();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(at(format!("worker.mem_dir {}", dir.display())))?;
        let dir = dir.canonicalize().map_err(at(dir.display()))?;
        let lock = lock_beside(&dir)?;
        let mut warnings = Vec::new();
        check_memory(quota_bytes)?;
        if config.mem_mount != MemMount::Never {
            match mount_tmpfs(&dir, quota_bytes) {
                Ok(()) => {}
                Err(e) if config.mem_mount == MemMount::Always => {
                    return Err(err!(
                        Unsupported,
                        "a tmpfs cannot be mounted on {}: {e}: needs CAP_SYS_ADMIN, or set worker.mem_mount = \"auto\"",
                        dir.display()
                    ));
                }
                Err(e) => warnings.push(format!("no tmpfs of our own on {} ({e}): the folder is used as it is", dir.display())),
            }
        }
        let pages = match (is_tmpfs(&dir), has_huge_pages(&dir)) {
            (true, true) => MemPages::Huge,
            (true, false) => MemPages::Small,
            (false, _) => MemPages::Disk,
        };
        match pages {
            MemPages::Huge => {}
            MemPages::Small => warnings.push(format!(
                "the MEM tier {} is on 4 KiB pages: mount it with huge=within_size, reads of warm blocks are 3 to 6 times faster",
                dir.display()
            )),
            MemPages::Disk => warnings.push(format!("the MEM tier {} is not on tmpfs: its bytes are on a disk", dir.display())),
        }
        let tier_dir = dir.join("blocks");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&tier_dir).map_err(at(tier_dir.display()))?;
        let grant_dir = match mount_read_only(&tier_dir, &beside(&dir, "ro")) {
            Ok(path) => Some(path),
            Err(e) => {
                warnings.push(format!(
                    "no read-only mount of the MEM tier ({e}): clients of the worker's own user could re-open a passed descriptor for writing; run the worker with CAP_SYS_ADMIN or as another user than its clients"
                ));
                None
            }
        };
        if !lease_probe::supported(&tier_dir) {
            warnings.push(format!("the file system of {} knows no leases: bytes that readers hold after an eviction are not counted", dir.display()));
        }
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        tracing::info!(dir = %dir.display(), ?pages, quota_bytes, read_only_mount = grant_dir.is_some(), "MEM tier is ready");
        Ok(Tier { dir: tier_dir, grant_dir, quota_bytes, pages, warnings, _lock: lock })
    }

    /// Where block files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where they are opened for clients.
    pub fn grant_dir(&self) -> &Path {
        self.grant_dir.as_deref().unwrap_or(&self.dir)
    }

    /// Whether `grant_dir` is a read-only mount.
    pub fn grants_are_read_only(&self) -> bool {
        self.grant_dir.is_some()
    }

    /// Bytes the files may occupy.
    pub fn quota_bytes(&self) -> u64 {
        self.quota_bytes
    }

    /// Its pages.
    pub fn pages(&self) -> MemPages {
        self.pages
    }

    /// What `doctor` should say.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    dir.with_file_name(format!("{name}.{suffix}"))
}

/// The lock is beside the folder: a tmpfs mounted on it would hide a lock inside.
fn lock_beside(dir: &Path) -> Result<fd_lock::RwLockWriteGuard<'static, File>> {
    let path = beside(dir, "lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at(path.display()))?;
    let lock: &'static mut fd_lock::RwLock<File> = Box::leak(Box::new(fd_lock::RwLock::new(file)));
    lock.try_write().map_err(|_| err!(Busy, "{} belongs to a running worker: stop it first, or give this one another worker.mem_dir", dir.display()))
}

/// Errors: `NoSpace` when the machine or its cgroup cannot hold the quota.
fn check_memory(quota_bytes: u64) -> Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).map(|kb| kb * 1024);
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|p| std::fs::read_to_string(p).ok()?.trim().parse::<u64>().ok());
    let room = total.into_iter().chain(limit).min().unwrap_or(u64::MAX);
    if quota_bytes > room {
        return Err(err!(NoSpace, "worker.mem_quota is {quota_bytes} bytes, and this machine (or its cgroup) has {room}: lower the quota"));
    }
    Ok(())
}

fn mount_tmpfs(dir: &Path, quota_bytes: u64) -> nix::Result<()> {
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

fn mount_read_only(from: &Path, to: &Path) -> Result<PathBuf> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(to).map_err(at(to.display()))?;
    while is_mount_point(to) && umount2(to, MntFlags::MNT_DETACH).is_ok() {}
    let os = |e: nix::errno::Errno| forebay_common::Error::io("mounting", &e.into());
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(os)?;
    let read_only = FLAGS | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(e) = mount(None::<&str>, to, None::<&str>, read_only, None::<&str>) {
        let _ = umount2(to, MntFlags::MNT_DETACH);
        return Err(os(e));
    }
    Ok(to.to_owned())
}
