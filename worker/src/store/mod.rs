//! The block store: blocks as files of a tier, found by id, evicted when room is needed.
//!
//! Called by sessions (lookups, grants), `ufs_read` (fill) and `write` (seal). Invariants: the accounting covers every
//! byte the tier's files occupy, unlinked but still held ones ("zombies") included; a block whose bytes are nowhere else
//! is never evicted; eviction is `unlink`, never truncation.

mod block_file;
mod index;
mod lease_probe;
mod tier;

pub use block_file::{BlockFile, paths};
pub use forebay_common::block_header::{FLAG_ONLY_COPY, Header};
pub use tier::{MemPages, Tier};

use forebay_common::error::at;
use forebay_common::{BlockId, ErrorKind, Result, counter, err, gauge};
use forebay_proto::TierUsage;
use index::Index;
use lease_probe::{Probe, Zombie};
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, broadcast};

counter!(pub EVICTED, "forebay_worker_evicted_blocks_total", "blocks evicted to make room");
counter!(pub QUARANTINED, "forebay_worker_quarantined_blocks_total", "blocks dropped because a checksum was wrong");
counter!(COUNT_LIMITED, "forebay_worker_blocks_limited_total", "blocks evicted because worker.blocks_max were open");
counter!(NO_ROOM, "forebay_worker_no_room_total", "allocations refused because nothing could be evicted");
gauge!(USED, "forebay_worker_tier_used_bytes", "bytes the tier's files occupy, zombies included");
gauge!(ZOMBIES, "forebay_worker_tier_zombie_bytes", "bytes of unlinked files that somebody still holds");

/// Evictions a session may lag behind before it looks at all its grants.
const EVICTION_BACKLOG: usize = 4096;

/// Descriptors that are neither blocks' nor connections'.
const OTHER_DESCRIPTORS: u64 = 512;

/// What one allocation may evict, in multiples of itself, before it gives up because readers hold it all.
const EVICTED_PER_NEED: u64 = 4;
/// How long a writer waits for readers to let evicted bytes go.
const RELEASE_WAIT: Duration = Duration::from_secs(2);

/// The store of one worker.
pub struct BlockStore {
    tier: Tier,
    blocks_max: usize,
    index: Mutex<Index>,
    zombies: Mutex<Vec<Zombie>>,
    used_bytes: AtomicU64,
    zombie_bytes: AtomicU64,
    changed: Mutex<HashSet<BlockId>>,
    /// Wakes the reporter.
    pub changed_notify: Notify,
    evictions: broadcast::Sender<BlockId>,
}

/// How many blocks this process may keep open: two descriptors and a mapping each, beside `sessions` connections.
pub fn blocks_allowed(sessions: usize) -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1_024, |(soft, _)| soft);
    let mappings = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(65_530);
    // An eighth of the mappings is left to slices that outlive their block, and to the allocator.
    let by_files = files.saturating_sub(OTHER_DESCRIPTORS + 2 * sessions as u64) / 2;
    usize::try_from(by_files.min(mappings / 8 * 7)).unwrap_or(usize::MAX).max(64)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl BlockStore {
    /// Takes over what an earlier process left in the tier; files that are no whole block are removed.
    pub fn open(tier: Tier, blocks_max: usize) -> Result<BlockStore> {
        let (evictions, _) = broadcast::channel(EVICTION_BACKLOG);
        let store = BlockStore {
            tier,
            blocks_max: blocks_max.max(1),
            index: Mutex::default(),
            zombies: Mutex::default(),
            used_bytes: AtomicU64::new(0),
            zombie_bytes: AtomicU64::new(0),
            changed: Mutex::default(),
            changed_notify: Notify::new(),
            evictions,
        };
        store.adopt_all()?;
        Ok(store)
    }

    fn adopt_all(&self) -> Result<()> {
        let (mut adopted, mut removed) = (0u64, 0u64);
        for shard in std::fs::read_dir(self.tier.dir()).map_err(at(self.tier.dir().display()))?.flatten() {
            let Ok(files) = std::fs::read_dir(shard.path()) else { continue };
            let names: HashSet<String> = files.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect();
            for name in &names {
                let Some((stem, extension)) = name.split_once('.') else { continue };
                let id = u64::from_str_radix(stem, 16).ok().map(BlockId);
                let whole = names.contains(&format!("{stem}.data")) && names.contains(&format!("{stem}.head"));
                let block = match (id, whole) {
                    (Some(id), true) if extension == "head" => BlockFile::adopt(self.tier.dir(), id),
                    (Some(_), true) => continue,
                    _ => Err(err!(Corrupt, "half of a block")),
                };
                match block {
                    Ok(block) => match self.insert(Arc::new(block)) {
                        Ok(()) => adopted += 1,
                        Err(e) => {
                            removed += 1;
                            tracing::warn!(file = name, error = %e, "a block of an earlier start finds no place");
                        }
                    },
                    // Out of descriptors, unreadable, or of a newer version: not damaged, so not ours to remove.
                    Err(e) if e.kind() != ErrorKind::Corrupt => return Err(e.context(format!("taking over {}", shard.path().join(name).display()))),
                    Err(e) => {
                        removed += 1;
                        tracing::warn!(file = name, error = %e, "a file of the tier is no whole block and is removed");
                        let _ = std::fs::remove_file(shard.path().join(name));
                        if whole {
                            let _ = std::fs::remove_file(shard.path().join(format!("{stem}.data")));
                        }
                    }
                }
            }
        }
        if adopted + removed > 0 {
            tracing::info!(adopted, removed, used_bytes = self.used_bytes.load(Ordering::Relaxed), "blocks of an earlier start taken over");
        }
        Ok(())
    }

    /// The tier.
    pub fn tier(&self) -> &Tier {
        &self.tier
    }

    /// A block, marked as used now.
    pub fn get(&self, id: BlockId) -> Option<Arc<BlockFile>> {
        lock(&self.index).touch(id)
    }

    /// All blocks, for the background verifier.
    pub fn all(&self) -> Vec<Arc<BlockFile>> {
        lock(&self.index).all()
    }

    /// The block, made empty when it is not here. Errors: `NoSpace`.
    pub fn get_or_create(&self, header: Header) -> Result<Arc<BlockFile>> {
        if let Some(block) = self.get(header.block) {
            return Ok(block);
        }
        let head_bytes = header.file_bytes() as u64;
        self.reserve(head_bytes)?;
        let mut index = lock(&self.index);
        if let Some(block) = index.touch(header.block) {
            drop(index);
            self.release(head_bytes);
            return Ok(block);
        }
        if let Err(e) = self.make_place(&mut index) {
            drop(index);
            self.release(head_bytes);
            return Err(e);
        }
        let made = match BlockFile::create(self.tier.dir(), header.clone()) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                let (data, head) = paths(self.tier.dir(), header.block);
                let _ = (std::fs::remove_file(data), std::fs::remove_file(head));
                BlockFile::create(self.tier.dir(), header)
            }
            other => other,
        };
        let block = match made {
            Ok(block) => Arc::new(block),
            Err(e) => {
                drop(index);
                self.release(head_bytes);
                return Err(e);
            }
        };
        let inserted = index.insert(block.clone());
        assert!(inserted, "looked for under the same lock");
        self.recharge(&block);
        drop(index);
        self.release(head_bytes);
        Ok(block)
    }

    /// Evicts what was used longest ago until one more block may be open. Errors: `NoSpace` when all that is here must stay.
    fn make_place(&self, index: &mut Index) -> Result<()> {
        while index.len() >= self.blocks_max {
            let Some(block) = index.evict_oldest() else {
                NO_ROOM.inc();
                return Err(err!(
                    NoSpace,
                    "{} blocks are here, none of which can be evicted: raise the limit of open files (ulimit -n) or worker.blocks_max",
                    index.len()
                ));
            };
            EVICTED.inc();
            COUNT_LIMITED.inc();
            self.bury(&block);
        }
        Ok(())
    }

    /// Takes a sealed block in. Errors: `AlreadyExists`; the block that is there stays as it is.
    pub fn insert(&self, block: Arc<BlockFile>) -> Result<()> {
        let id = block.header.block;
        let mut index = lock(&self.index);
        // What is nowhere else stays, whatever the limit.
        if index.peek(id).is_none()
            && let Err(e) = self.make_place(&mut index)
            && block.header.flags & FLAG_ONLY_COPY == 0
        {
            let (data, head) = paths(self.tier.dir(), id);
            let _ = (std::fs::remove_file(data), std::fs::remove_file(head));
            return Err(e);
        }
        if !index.insert(block.clone()) {
            return Err(err!(AlreadyExists, "block {id} is on this worker already"));
        }
        self.recharge(&block);
        drop(index);
        self.note_changed(id);
        Ok(())
    }

    /// Stores a page, room made first. Errors: `NoSpace`.
    pub fn fill_page(&self, block: &Arc<BlockFile>, page: usize, bytes: &[u8]) -> Result<()> {
        self.reserve(bytes.len() as u64)?;
        let result = block.fill_page(page, bytes);
        self.release(bytes.len() as u64);
        // An evicted block is not charged: its files are zombies already.
        let index = lock(&self.index);
        if index.contains(block) {
            self.recharge(block);
            drop(index);
            self.note_changed(block.header.block);
        }
        result
    }

    /// `reserve`, waiting a while for readers that were told to let evicted bytes go. Blocks the thread.
    pub fn reserve_waiting(&self, bytes: u64) -> Result<()> {
        let deadline = Instant::now() + RELEASE_WAIT;
        loop {
            match self.reserve(bytes) {
                Err(e) if e.kind() == ErrorKind::NoSpace && self.zombie_bytes.load(Ordering::Relaxed) >= bytes && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// Makes `bytes` of room, evicting what was used longest ago, and counts them as used. Errors: `NoSpace`.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut buried = 0;
        loop {
            let used = self.used_bytes.load(Ordering::Acquire);
            if used + bytes <= self.tier.quota_bytes() {
                if self.used_bytes.compare_exchange(used, used + bytes, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    USED.set(self.used_bytes.load(Ordering::Relaxed) as i64);
                    return Ok(());
                }
                continue;
            }
            if self.zombie_bytes.load(Ordering::Relaxed) > 0 && self.reap() > 0 {
                continue;
            }
            // One call evicts a few times what it needs and no more: where readers hold everything, evicting all of it at
            // once would empty the cache before any of them could let go.
            let evicted = if buried >= EVICTED_PER_NEED * bytes { None } else { self.evict_one() };
            buried += evicted.unwrap_or(0);
            if evicted.is_none() {
                NO_ROOM.inc();
                return Err(err!(
                    NoSpace,
                    "the MEM tier is full ({used} of {} bytes) and nothing more can be evicted ({} bytes are still held by readers): raise worker.mem_quota",
                    self.tier.quota_bytes(),
                    self.zombie_bytes.load(Ordering::Relaxed)
                ));
            }
        }
    }

    /// Evicts the block that was used longest ago and returns what it occupied. Its files go while the index is locked, so that nobody can make new
    /// ones of the same names in between.
    fn evict_one(&self) -> Option<u64> {
        let mut index = lock(&self.index);
        let block = index.evict_oldest()?;
        EVICTED.inc();
        Some(self.bury(&block).max(1))
    }

    /// Gives reserved bytes back.
    pub fn release(&self, bytes: u64) {
        let before = self.used_bytes.fetch_sub(bytes, Ordering::AcqRel);
        assert!(before >= bytes, "no more is released than was reserved");
        USED.set((before - bytes) as i64);
    }

    /// Charges a block with what its files occupy now.
    fn recharge(&self, block: &BlockFile) {
        let now = block.occupied_bytes();
        let before = block.swap_charged(now);
        if now >= before {
            self.used_bytes.fetch_add(now - before, Ordering::AcqRel);
        } else {
            self.release(before - now);
        }
    }

    /// Removes a block by order of the master, or because it is bad.
    pub fn remove(&self, id: BlockId) -> bool {
        let mut index = lock(&self.index);
        match index.remove(id) {
            Some(block) => {
                self.bury(&block);
                true
            }
            None => false,
        }
    }

    /// Drops a block with a wrong checksum, so that its bytes are fetched again. One whose bytes are nowhere else stays,
    /// and reading its bad chunk stays an error.
    pub fn quarantine(&self, id: BlockId) {
        let only_copy = lock(&self.index).touch(id).is_some_and(|b| b.header.flags & FLAG_ONLY_COPY != 0);
        if !only_copy && self.remove(id) {
            QUARANTINED.inc();
            tracing::error!(block = %id, "a block had a wrong checksum and is dropped");
        }
    }

    /// Unlinks both files; their bytes count on until nobody holds them.
    fn bury(&self, block: &Arc<BlockFile>) -> u64 {
        let id = block.header.block;
        let (data, head) = paths(self.tier.dir(), id);
        let probes = [Probe::open(&data), Probe::open(&head)];
        for path in [&data, &head] {
            if let Err(e) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %e, "a block file could not be unlinked");
            }
        }
        let bytes = block.swap_charged(0);
        self.zombie_bytes.fetch_add(bytes, Ordering::AcqRel);
        lock(&self.zombies).push(Zombie::new(probes, bytes, Arc::downgrade(block)));
        self.note_changed(id);
        let _ = self.evictions.send(id);
        // The caller's own reference is among those that hold it; the reaper frees it when all are gone.
        bytes
    }

    /// Frees the zombies that nobody holds any more; returns their bytes.
    pub fn reap(&self) -> u64 {
        let mut freed = 0;
        lock(&self.zombies).retain(|zombie| {
            let free = zombie.is_free();
            if free {
                freed += zombie.bytes;
            }
            !free
        });
        if freed > 0 {
            self.zombie_bytes.fetch_sub(freed, Ordering::AcqRel);
            self.release(freed);
        }
        ZOMBIES.set(self.zombie_bytes.load(Ordering::Relaxed) as i64);
        freed
    }

    /// Fresh read-only descriptors of a block's files, for a client: never the worker's own.
    pub fn open_for_grant(&self, block: &BlockFile) -> Result<(OwnedFd, OwnedFd)> {
        let (data, head) = paths(self.tier.grant_dir(), block.header.block);
        let open = |path: &std::path::Path| File::open(path).map(OwnedFd::from).map_err(at("opening a block for a client"));
        let opened = (open(&data)?, open(&head)?);
        // Opened by name: they are this block's files only if it was not evicted in between.
        let still = lock(&self.index).peek(block.header.block).is_some_and(|b| std::ptr::eq(Arc::as_ptr(b), block));
        if still { Ok(opened) } else { Err(err!(Unavailable, "block {} was evicted a moment ago", block.header.block)) }
    }

    /// Ids of blocks as they leave.
    pub fn evictions(&self) -> broadcast::Receiver<BlockId> {
        self.evictions.subscribe()
    }

    fn note_changed(&self, id: BlockId) {
        lock(&self.changed).insert(id);
        self.changed_notify.notify_one();
    }

    /// Marks every block for reporting.
    pub fn note_all_changed(&self) {
        let all = lock(&self.index).ids();
        lock(&self.changed).extend(all);
        self.changed_notify.notify_one();
    }

    /// At most `limit` blocks whose state changed, with their cached bytes now; 0 for those that are gone.
    pub fn take_changed(&self, limit: usize) -> Vec<(BlockId, u64)> {
        let taken: Vec<BlockId> = {
            let mut changed = lock(&self.changed);
            let taken: Vec<BlockId> = changed.iter().take(limit).copied().collect();
            for id in &taken {
                changed.remove(id);
            }
            taken
        };
        let index = lock(&self.index);
        taken.into_iter().map(|id| (id, index.peek(id).map_or(0, |b| b.cached_bytes()))).collect()
    }

    /// Puts blocks back whose report did not arrive.
    pub fn put_changed_back(&self, ids: impl Iterator<Item = BlockId>) {
        lock(&self.changed).extend(ids);
    }

    /// Whether reports are waiting.
    pub fn has_changes(&self) -> bool {
        !lock(&self.changed).is_empty()
    }

    /// Used and total bytes.
    pub fn usage(&self) -> TierUsage {
        TierUsage {
            tier: "MEM".into(),
            total_bytes: self.tier.quota_bytes(),
            used_bytes: self.used_bytes.load(Ordering::Relaxed),
            zombie_bytes: self.zombie_bytes.load(Ordering::Relaxed),
            blocks: lock(&self.index).len() as u64,
        }
    }
}

#[cfg(test)]
mod tests;
