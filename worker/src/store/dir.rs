//! `Dir`: one folder of a tier, prepared for blocks, with its accounting, its eviction policy and its health.
//!
//! A MEM folder is a tmpfs of our own with huge pages where we may mount, else the folder as given. Beside every folder is a
//! read-only bind mount of it, through which files are opened for clients: such a descriptor cannot be re-opened for
//! writing, truncated or chmod-ed by anybody, root included (EROFS). The mounts stay when the worker stops, so that blocks
//! survive its restart; stale read-only mounts are replaced at start. Where somebody else has mounted the folder read-only beside it (in a pod, the
//! same volume), that is used.
//!
//! Invariant: `used` covers what the folder's files occupy, unlinked but still held ones ("zombies") and reservations of
//! writes under way included.

use super::block_file::{BlockFile, paths};
use super::evict::{self, Eviction};
use super::lease_probe::{self, Zombie};
use super::mounting::{given_read_only, has_huge_pages, is_tmpfs, mount_read_only, mount_tmpfs};
use forebay_common::config::{Medium, MemMount, TierDir, WorkerConfig};
use forebay_common::error::at;
use forebay_common::{BlockId, Error, ErrorKind, Result, counter, err, memory};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::statfs;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

counter!(FAILED, "forebay_worker_tier_dirs_failed_total", "folders of tiers taken out because of an error");

/// How long a folder whose file system is full below its quota takes no new blocks.
const FULL_FOR: Duration = Duration::from_secs(10);

/// How long a folder in which nothing could be evicted is passed over.
const STUFFED_FOR: Duration = Duration::from_secs(2);
/// Zombies whose probing takes less than a block's eviction.
const ZOMBIES_QUICK: usize = 64;

/// What a folder's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemPages {
    /// tmpfs with huge pages.
    Huge,
    /// tmpfs on 4 KiB pages: a warm 1 MiB read takes 3 to 6 times as long.
    Small,
    /// Not memory at all: a file system on a disk.
    Disk,
}

/// Why a folder takes no new blocks.
#[derive(Clone, Debug, Default)]
enum Health {
    #[default]
    Good,
    /// Its file system is full below the quota: until then.
    Full(Instant),
    /// An error of its file system; what is in it is still read.
    Failed(String),
}

/// A usable folder.
pub struct Dir {
    path: PathBuf,
    grant_dir: Option<PathBuf>,
    medium: Medium,
    quota_bytes: u64,
    reserve_bytes: u64,
    pages: MemPages,
    warnings: Vec<String>,
    health: Mutex<Health>,
    cluster: Mutex<String>,
    /// It is known whose the blocks are that it gets.
    admitted: AtomicBool,
    used_bytes: AtomicU64,
    zombie_bytes: AtomicU64,
    zombies: Mutex<Vec<Zombie>>,
    policy: Mutex<Box<dyn Eviction>>,
    /// Bytes waited for: by writers, and by fills, which can wait longer.
    wanted_bytes: [AtomicU64; 2],
    stuck_pass: AtomicU64,
    stuck_at: Mutex<Option<Instant>>,
    /// Blocks in it.
    pub blocks: AtomicU64,
    _locks: [Flock<File>; 2],
}

/// Somebody who waits for room.
pub struct Wanting<'a> {
    wanted: &'a AtomicU64,
    bytes: u64,
}

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.wanted.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Dir {
    /// Prepares the folder. Errors: another worker has it, it cannot hold the quota, `mem_mount = "always"` is impossible.
    pub fn prepare(config: &WorkerConfig, medium: Medium, dir: &TierDir) -> Result<Dir> {
        let (path, quota_bytes, reserve_bytes) = (dir.path.clone(), dir.quota.as_u64(), dir.reserve.as_u64());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(at(format!("{} tier {}", medium.name(), path.display())))?;
        let path = path.canonicalize().map_err(at(path.display()))?;
        let lock = lock_beside(&path)?;
        let mut warnings = Vec::new();
        if medium == Medium::Mem && config.mem_mount != MemMount::Never {
            match mount_tmpfs(&path, quota_bytes) {
                Ok(()) => {}
                Err(e) if config.mem_mount == MemMount::Always => {
                    return Err(err!(
                        Unsupported,
                        "a tmpfs cannot be mounted on {}: {e}: needs CAP_SYS_ADMIN, or set worker.mem_mount = \"auto\"",
                        path.display()
                    ));
                }
                Err(e) => warnings.push(format!("no tmpfs of our own on {} ({e}): the folder is used as it is", path.display())),
            }
        }
        let pages = match (is_tmpfs(&path), has_huge_pages(&path)) {
            (true, true) => MemPages::Huge,
            (true, false) => MemPages::Small,
            (false, _) => MemPages::Disk,
        };
        match (medium, pages) {
            (Medium::Mem, MemPages::Small) => warnings.push(format!(
                "the MEM tier {} is on 4 KiB pages: mount it with huge=within_size, reads of warm blocks are 3 to 6 times faster",
                path.display()
            )),
            (Medium::Mem, MemPages::Disk) => {
                warnings.push(format!("the MEM tier {} is not on tmpfs: its bytes are on a disk", path.display()));
            }
            (Medium::Ssd | Medium::Hdd, MemPages::Huge | MemPages::Small) => {
                warnings.push(format!("the {} tier {} is on tmpfs: its bytes are memory, and gone with the machine", medium.name(), path.display()));
            }
            _ => {}
        }
        // Only now: what was mounted above would hide it. In a pod the folder is a volume that others may have as well, and what is beside it is not.
        let within = lock_file(&path.join("lock"), &path)?;
        let blocks_dir = path.join("blocks");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&blocks_dir).map_err(at(blocks_dir.display()))?;
        if medium != Medium::Mem {
            sync_names(&blocks_dir);
            check_disk(&blocks_dir, quota_bytes, reserve_bytes)?;
        }
        let given = given_read_only(&blocks_dir, &beside(&path, "ro"));
        let grant_dir = match given.map_or_else(|| mount_read_only(&blocks_dir, &beside(&path, "ro")), Ok) {
            Ok(path) => Some(path),
            Err(e) => {
                warnings.push(format!(
                    "no read-only mount of the {} tier {} ({e}): clients of the worker's own user could re-open a passed descriptor for writing; run the worker with CAP_SYS_ADMIN or as another user than its clients",
                    medium.name(),
                    path.display()
                ));
                None
            }
        };
        if !lease_probe::supported(&blocks_dir) {
            warnings
                .push(format!("the file system of {} knows no leases: bytes that readers hold after an eviction are not counted", path.display()));
        }
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        tracing::info!(dir = %path.display(), medium = medium.name(), ?pages, quota_bytes, read_only_mount = grant_dir.is_some(), "tier folder is ready");
        Ok(Dir {
            path: blocks_dir,
            grant_dir,
            medium,
            quota_bytes,
            reserve_bytes,
            pages,
            warnings,
            health: Mutex::default(),
            cluster: Mutex::default(),
            admitted: AtomicBool::new(false),
            used_bytes: AtomicU64::new(0),
            zombie_bytes: AtomicU64::new(0),
            zombies: Mutex::default(),
            policy: Mutex::new(evict::new(config.evict_policy)),
            wanted_bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            stuck_pass: AtomicU64::new(0),
            stuck_at: Mutex::default(),
            blocks: AtomicU64::new(0),
            _locks: [lock, within],
        })
    }

    /// Where block files are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where they are opened for clients.
    pub fn grant_dir(&self) -> &Path {
        self.grant_dir.as_deref().unwrap_or(&self.path)
    }

    /// Whether `grant_dir` is a read-only mount.
    pub fn grants_are_read_only(&self) -> bool {
        self.grant_dir.is_some()
    }

    /// What it is on.
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// Bytes its files may occupy.
    pub fn quota_bytes(&self) -> u64 {
        self.quota_bytes
    }

    /// Bytes they do occupy, with zombies and reservations.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Acquire)
    }

    /// Of these, bytes of unlinked files that somebody holds.
    pub fn zombie_bytes(&self) -> u64 {
        self.zombie_bytes.load(Ordering::Relaxed)
    }

    /// Bytes below the quota.
    pub fn free_bytes(&self) -> u64 {
        self.quota_bytes.saturating_sub(self.used_bytes())
    }

    /// Its pages.
    pub fn pages(&self) -> MemPages {
        self.pages
    }

    /// What `doctor` should say.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The cluster whose blocks it has, as it says on the disk; empty: it says none.
    pub fn cluster(&self) -> String {
        lock(&self.cluster).clone()
    }

    /// It says so on the disk by now; or it cannot be made to, and gets no blocks.
    pub fn set_cluster(&self, cluster: String) {
        self.admitted.store(!cluster.is_empty(), Ordering::Release);
        *lock(&self.cluster) = cluster;
    }

    /// It gets blocks without saying whose they are: the master knows no clusters.
    pub fn admit_unnamed(&self) {
        self.admitted.store(true, Ordering::Release);
    }

    /// Has the names of a block's files on the disk.
    pub fn sync_names_of(&self, block: BlockId) -> Result<()> {
        let (data, _) = paths(&self.path, block);
        let shard = data.parent().unwrap_or(&self.path);
        let sync = |dir: &Path| File::open(dir).and_then(|d| d.sync_all()).map_err(at("fsync of a tier folder"));
        sync(shard).and_then(|()| sync(&self.path))
    }

    /// The policy, locked.
    pub fn policy(&self) -> MutexGuard<'_, Box<dyn Eviction>> {
        lock(&self.policy)
    }

    /// Counts bytes as used, where there is room for them.
    pub fn try_reserve(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|after| *after <= self.quota_bytes);
        self.used_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok()
    }

    /// Counts bytes as used that are there already.
    pub fn charge(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Gives counted bytes back.
    pub fn release(&self, bytes: u64) {
        let before = self.used_bytes.fetch_sub(bytes, Ordering::AcqRel);
        assert!(before >= bytes, "no more is released than was counted");
    }

    /// Keeps the bytes of unlinked files in the accounting until nobody holds them.
    pub fn bury(&self, zombie: Zombie) {
        self.zombie_bytes.fetch_add(zombie.bytes, Ordering::AcqRel);
        lock(&self.zombies).push(zombie);
    }

    /// Counts reserved bytes that were written to a block's files after these were unlinked with them. `false`: they are gone.
    pub fn add_to_zombie(&self, file: &Arc<BlockFile>, bytes: u64) -> bool {
        let mut zombies = lock(&self.zombies);
        let Some(zombie) = zombies.iter_mut().find(|zombie| zombie.is_of(file)) else { return false };
        zombie.bytes += bytes;
        self.zombie_bytes.fetch_add(bytes, Ordering::AcqRel);
        true
    }

    /// Frees the zombies that nobody holds any more; returns their bytes.
    pub fn reap(&self) -> u64 {
        if self.zombie_bytes() == 0 && lock(&self.zombies).is_empty() {
            return 0;
        }
        let mut freed = 0;
        lock(&self.zombies).retain(|zombie| {
            let free = zombie.is_free();
            if free {
                freed += zombie.bytes;
            }
            !free
        });
        if freed > 0 {
            // In this order: who sees no zombies any more sees the room as well.
            self.release(freed);
            self.zombie_bytes.fetch_sub(freed, Ordering::AcqRel);
        }
        freed
    }

    /// `reap`, where that is quick.
    pub fn reap_some(&self) {
        if lock(&self.zombies).len() <= ZOMBIES_QUICK {
            self.reap();
        }
    }

    /// Bytes that somebody waits for.
    pub fn wanted(&self) -> u64 {
        self.wanted_bytes.iter().map(|w| w.load(Ordering::Acquire)).sum()
    }

    /// Whether a writer waits, who should not wait for a disk.
    pub fn is_urgent(&self) -> bool {
        self.wanted_bytes[0].load(Ordering::Acquire) > 0
    }

    /// Somebody waits for room until the guard is dropped.
    pub fn want(&self, bytes: u64, patient: bool) -> Wanting<'_> {
        let wanted = &self.wanted_bytes[usize::from(patient)];
        wanted.fetch_add(bytes, Ordering::AcqRel);
        Wanting { wanted, bytes }
    }

    /// The evictor could not make the room that was wanted.
    pub fn note_stuck(&self, pass: u64) {
        *lock(&self.stuck_at) = Some(Instant::now());
        self.stuck_pass.store(pass, Ordering::Release);
    }

    /// Whether what is in it had to stay a moment ago, and leaves no room: a new block does better elsewhere.
    pub fn is_stuffed(&self) -> bool {
        lock(&self.stuck_at).is_some_and(|at| at.elapsed() < STUFFED_FOR) && self.free_bytes() < self.quota_bytes() / 100
    }

    /// Whether a pass that began after `pass` could not.
    pub fn is_stuck_since(&self, pass: u64) -> bool {
        self.stuck_pass.load(Ordering::Acquire) > pass
    }

    /// Whether new blocks may come: not before it says whose they are.
    pub fn is_open(&self) -> bool {
        self.admitted.load(Ordering::Acquire) && self.is_well()
    }

    /// Whether its file system works and has room, as far as is known.
    pub fn is_well(&self) -> bool {
        match &*lock(&self.health) {
            Health::Good => true,
            Health::Full(until) => Instant::now() >= *until,
            Health::Failed(_) => false,
        }
    }

    /// Why it takes no new blocks; empty when it does.
    pub fn trouble(&self) -> String {
        match &*lock(&self.health) {
            Health::Full(until) if Instant::now() < *until => {
                format!("the file system of {} is full below the quota of {} bytes", self.path.display(), self.quota_bytes)
            }
            Health::Failed(why) => why.clone(),
            _ => String::new(),
        }
    }

    /// An operation on its files failed: unless the error is of another kind, it takes no new blocks from now on. A MEM folder
    /// that is full is just full.
    pub fn note_error(&self, e: &Error) {
        let mut health = lock(&self.health);
        match e.kind() {
            ErrorKind::NoSpace if !matches!(*health, Health::Failed(_)) => *health = Health::Full(Instant::now() + FULL_FOR),
            ErrorKind::ReadOnly | ErrorKind::Internal | ErrorKind::PermissionDenied if !matches!(*health, Health::Failed(_)) => {
                FAILED.inc();
                tracing::error!(error = %e, dir = %self.path.display(), "a tier folder is taken out: it gets no new blocks until the worker is started again");
                *health = Health::Failed(e.message().to_owned());
            }
            _ => {}
        }
    }

    /// Notices a disk that fills up beside us, before a write does.
    pub fn check_reserve(&self) {
        if self.medium != Medium::Mem
            && self.reserve_bytes > 0
            && statfs(&self.path).is_ok_and(|s| s.blocks_available() * s.block_size() as u64 <= self.reserve_bytes)
        {
            self.note_error(&err!(NoSpace, "reserve"));
        }
    }
}

/// Makes a folder's name durable, and those of the folders above it that may be as new: what is fsynced in a folder that a power
/// cut takes away is gone as well. Where a folder above cannot be opened, it is not ours, and not new.
fn sync_names(dir: &Path) {
    for above in dir.ancestors().skip(1) {
        if let Err(e) = File::open(above).and_then(|folder| folder.sync_all()) {
            tracing::debug!(dir = %above.display(), error = %e, "a folder above a tier is not fsynced");
        }
    }
}

/// Errors: `NoSpace` when the file system can never hold the quota beside the reserve.
fn check_disk(path: &Path, quota_bytes: u64, reserve_bytes: u64) -> Result<()> {
    let s = statfs(path).map_err(|e| Error::io(path.display(), &e.into()))?;
    let size = s.blocks() * s.block_size() as u64;
    if quota_bytes.saturating_add(reserve_bytes) > size {
        return Err(err!(
            NoSpace,
            "{}: a quota of {quota_bytes} bytes with a reserve of {reserve_bytes} is more than its file system has ({size}): lower the quota",
            path.display()
        ));
    }
    Ok(())
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    dir.with_file_name(format!("{name}.{suffix}"))
}

/// A lock beside the folder is there before anything is mounted on it.
fn lock_beside(dir: &Path) -> Result<Flock<File>> {
    lock_file(&beside(dir, "lock"), dir)
}

fn lock_file(path: &Path, dir: &Path) -> Result<Flock<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(at(path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| err!(Busy, "{} belongs to a running worker: stop it first, or give this one another folder", dir.display()))
}

/// Errors: `NoSpace` when the machine or its cgroup cannot hold the quota.
pub fn check_memory(quota_bytes: u64) -> Result<()> {
    let room = memory::available_bytes();
    if quota_bytes > room {
        return Err(err!(NoSpace, "the MEM tier may use {quota_bytes} bytes, and this machine (or its cgroup) has {room}: lower worker.mem_quota"));
    }
    Ok(())
}
