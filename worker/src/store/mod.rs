//! The block store: blocks as files of tiers, found by id, evicted and moved when room is needed.
//!
//! Called by sessions (lookups, grants), `ufs_read` (fill) and `write` (seal). A new block goes to the first tier that can
//! hold it; `evictor` makes room ahead of need and moves blocks between tiers. Invariants: the accounting of a folder covers
//! every byte its files occupy, unlinked but still held ones ("zombies") included; a block whose bytes are nowhere else, or
//! that is pinned, is never evicted; eviction is `unlink`, never truncation; a block is in one tier at a time, and its
//! files, entry and accounting change under the lock of its shard.

mod adopt;
pub mod allocate;
mod block;
mod block_file;
mod cluster;
mod dir;
pub mod evict;
mod evictor;
mod index;
mod joined;
mod keep;
mod lease_probe;
mod mounting;
mod open;
mod room;
mod shares;
mod tier;
mod whole;
mod working_set;

pub use adopt::Place as LeftOpen;
pub use block::Block;
pub use block_file::{BlockFile, open_path, paths};
pub use dir::{Dir, MemPages};
pub use forebay_common::block_header::Header;
pub use shares::ShareLimits;
pub use tier::Tier;

use adopt::Unread;
use evictor::Signal;
use forebay_common::config::{Medium, WorkerConfig};
use forebay_common::error::at;
use forebay_common::{BlockId, Error, ErrorKind, Result, counter, err, gauge};
use forebay_proto::TierUsage;
use index::{Index, Shard};
use joined::{Joins, is_joined};
use lease_probe::{Probe, Zombie};
use open::OpenFiles;
use prometheus::IntGaugeVec;
use shares::Shares;
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, broadcast};

counter!(pub EVICTED, "forebay_worker_evicted_blocks_total", "blocks evicted to make room");
counter!(pub QUARANTINED, "forebay_worker_quarantined_blocks_total", "blocks dropped because a checksum was wrong");
counter!(DAMAGED, "forebay_worker_damaged_at_start_total", "blocks of an earlier start whose files could not be believed");
counter!(NO_ROOM, "forebay_worker_no_room_total", "allocations refused because nothing could be evicted");
gauge!(USED, "forebay_worker_tier_used_bytes", "bytes the tiers' files occupy, zombies included");
gauge!(CAPACITY, "forebay_worker_tier_capacity_bytes", "quotas of the tiers' folders");
gauge!(ZOMBIES, "forebay_worker_tier_zombie_bytes", "bytes of unlinked files that somebody still holds");

/// By mount, for those that have a quota or a reserved share.
static SHARES: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    let opts = prometheus::Opts::new("forebay_worker_mount_used_bytes", "bytes of mounts that have a quota or a reserved share");
    let family = IntGaugeVec::new(opts, &["mount"]).unwrap_or_else(|e| unreachable!("the name and the label are valid: {e}"));
    if let Err(e) = prometheus::register(Box::new(family.clone())) {
        tracing::warn!(error = %e, "a metric is not registered");
    }
    family
});

/// Evictions a session may lag behind before it looks at all its grants.
const EVICTION_BACKLOG: usize = 4096;
/// Blocks whose headers are read in one go in the background.
const ADOPT_BATCH: usize = 1_000;

struct Options {
    watermark_high_percent: u64,
    watermark_low_percent: u64,
    promote_after: u32,
    promote_window: Duration,
}

/// What is reported of a block.
pub struct Changed {
    /// Which.
    pub id: BlockId,
    /// Bytes of its pages that are here; 0 when it is gone.
    pub cached_bytes: u64,
    /// The name of its tier.
    pub tier: &'static str,
    /// Whether it is pinned here.
    pub pinned: bool,
    /// Whether its bytes are nowhere else, as far as is known here.
    pub only_copy: bool,
}

/// The store of one worker.
pub struct BlockStore {
    tiers: Vec<Tier>,
    options: Options,
    index: Index,
    open: OpenFiles,
    unread: Unread,
    signal: Arc<Signal>,
    /// The block whose files the evictor is copying: nobody makes new ones of its name meanwhile.
    moving: Mutex<Option<BlockId>>,
    shares: Shares,
    joins: Joins,
    /// Nothing new is cached: the worker is to leave.
    closed: AtomicBool,
    changed: Mutex<HashSet<BlockId>>,
    /// Wakes the reporter.
    pub changed_notify: Notify,
    evictions: broadcast::Sender<BlockId>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Unlinks both files of a block, where they are.
pub fn remove_files(dir: &Dir, id: BlockId) {
    let (data, head) = paths(dir.path(), id);
    let _ = (std::fs::remove_file(data), std::fs::remove_file(head));
}

impl BlockStore {
    /// Prepares the tiers and reads the names of what an earlier process left in them. Blocks are served from now on; their
    /// headers are read when they are asked for, or by `adopt_rest`.
    ///
    /// Errors: a folder that cannot be used, or that another version wrote.
    pub fn open(config: &WorkerConfig) -> Result<Arc<BlockStore>> {
        let (evictions, _) = broadcast::channel(EVICTION_BACKLOG);
        let blocks_open = if config.blocks_max > 0 { config.blocks_max } else { open::allowed(config.sessions_max) };
        let store = Arc::new(BlockStore {
            tiers: Tier::prepare_all(config)?,
            options: Options {
                watermark_high_percent: config.watermark_high_percent,
                watermark_low_percent: config.watermark_low_percent,
                promote_after: config.promote_after,
                promote_window: Duration::from_millis(config.promote_window_ms),
            },
            index: Index::default(),
            open: OpenFiles::new(blocks_open),
            unread: Unread::default(),
            signal: Arc::default(),
            moving: Mutex::default(),
            shares: Shares::new(config.evict_policy),
            joins: Joins::default(),
            closed: AtomicBool::new(false),
            changed: Mutex::default(),
            changed_notify: Notify::new(),
            evictions,
        });
        for dir in store.dirs() {
            store.unread.scan(dir)?;
        }
        let (weak, signal) = (Arc::downgrade(&store), store.signal.clone());
        std::thread::Builder::new().name("evictor".into()).spawn(move || evictor::run(&weak, &signal)).map_err(at("starting the evictor"))?;
        Ok(store)
    }

    /// Whether nothing new is to be cached. What is being written goes on.
    pub fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Ordering::Release);
    }

    /// The tiers, fastest first.
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    fn dirs(&self) -> impl Iterator<Item = &Arc<Dir>> {
        self.tiers.iter().flat_map(|t| &t.dirs)
    }

    /// Reads the headers of some blocks that nobody has asked for yet. Returns how many; called until there are none.
    pub fn adopt_some(&self) -> usize {
        let next = self.unread.next(ADOPT_BATCH);
        next.iter().for_each(|id| drop(self.find(*id)));
        next.len()
    }

    /// Whether the headers of all blocks of an earlier start are read.
    pub fn is_all_read(&self) -> bool {
        self.unread.is_empty()
    }

    /// The block, its header read now if it was not yet.
    fn find(&self, id: BlockId) -> Option<Arc<Block>> {
        if let Some(block) = self.index.get(id) {
            return Some(block);
        }
        // Under the shard's lock, so that nobody makes new files of this name in between.
        let mut shard = self.index.shard(id);
        if let Some(block) = shard.get(&id) {
            return Some(block.clone());
        }
        let place = self.unread.take(id)?;
        let dir = &place.dir;
        match BlockFile::adopt(dir, id, None) {
            Ok(file) => {
                let file = Arc::new(file);
                self.enter(&mut shard, &file);
                dir.release(place.charged_bytes);
                self.note_changed(id);
                Some(file.block.clone())
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                dir.release(place.charged_bytes);
                DAMAGED.inc();
                if BlockFile::may_be_only_copy(dir, id) {
                    tracing::error!(block = %id, error = %e, "a damaged block that may be the only copy of its bytes is set aside");
                    adopt::set_aside(dir, id);
                } else {
                    tracing::warn!(block = %id, error = %e, "files of a tier are no whole block and are removed");
                    remove_files(dir, id);
                }
                None
            }
            // Unreadable, or of a newer version: not damaged, so not ours to remove.
            Err(e) => {
                tracing::error!(block = %id, error = %e, "a block of an earlier start cannot be taken over");
                dir.note_error(&e);
                self.unread.put_back(id, place);
                None
            }
        }
    }

    /// The open files of a block. `None`: it is not here any more, or they cannot be opened (then it is dropped, where its bytes
    /// are elsewhere).
    fn opened(&self, block: &Arc<Block>) -> Option<Arc<BlockFile>> {
        let mut open = block.open_files();
        let file = match open.upgrade() {
            Some(file) => Ok(file),
            None => BlockFile::adopt(&block.dir, block.header.block, Some(block)).map(Arc::new).inspect(|file| *open = Arc::downgrade(file)),
        };
        drop(open);
        match file {
            Ok(file) => {
                self.open.keep(&file);
                // Evicted in between: the files of this name may be another block's by now.
                if !self.index.contains(block) {
                    self.open.forget(block);
                    return None;
                }
                Some(file)
            }
            Err(e) => {
                if self.index.contains(block) {
                    tracing::error!(block = %block.header.block, error = %e, "the files of a block cannot be opened");
                    if e.kind() != ErrorKind::LimitExceeded {
                        block.dir.note_error(&e);
                        self.quarantine_this(block);
                    }
                }
                None
            }
        }
    }

    /// A block, marked as used now.
    pub fn get(&self, id: BlockId) -> Option<Arc<BlockFile>> {
        let block = self.find(id)?;
        block.used();
        block.dir.policy().access(id);
        if let Some(share) = block.share() {
            share.access(id);
        }
        let promote_after = self.options.promote_after;
        if promote_after > 0
            && !is_joined(id)
            && block.dir.medium() != self.tiers[0].medium
            && block.use_within(self.options.promote_window) == promote_after
        {
            self.signal.promote(id);
        }
        self.opened(&block).or_else(|| {
            // Moved to another tier in between: it is there.
            let now = self.index.get(id).filter(|now| !Arc::ptr_eq(now, &block))?;
            self.opened(&now)
        })
    }

    /// Whether a block is here; not a use of it.
    pub fn has(&self, id: BlockId) -> bool {
        self.index.get(id).is_some()
    }

    /// Whether a block is here with all its bytes; not a use of it.
    pub fn has_bytes(&self, id: BlockId, length: u64) -> bool {
        self.index.get(id).is_some_and(|block| block.cached_bytes() == length)
    }

    /// Whether this very block is here, and not gone, or moved.
    pub fn is_current(&self, block: &Arc<Block>) -> bool {
        self.index.contains(block)
    }

    /// Whether what clients are granted is read-only for everybody, in all folders.
    pub fn grants_are_read_only(&self) -> bool {
        self.dirs().all(|dir| dir.grants_are_read_only())
    }

    /// Whether memory tiers have huge pages.
    pub fn memory_is_huge(&self) -> bool {
        self.tiers.iter().filter(|t| t.medium == Medium::Mem).flat_map(|t| &t.dirs).all(|dir| dir.pages() == MemPages::Huge)
    }

    /// What `doctor` should say of the folders.
    pub fn warnings(&self) -> Vec<String> {
        self.dirs().flat_map(|dir| dir.warnings().iter().cloned()).collect()
    }

    /// Ids of all blocks whose headers are read, for the scrubber.
    pub fn ids(&self) -> Vec<BlockId> {
        self.index.ids()
    }

    /// A block, its place in the order of eviction unchanged.
    pub fn peek(&self, id: BlockId) -> Option<Arc<BlockFile>> {
        let block = self.index.get(id)?;
        self.opened(&block).or_else(|| self.index.get(id).filter(|now| !Arc::ptr_eq(now, &block)).and_then(|now| self.opened(&now)))
    }

    /// `peek`, its header read now if it was not yet.
    pub fn peek_read(&self, id: BlockId) -> Option<Arc<BlockFile>> {
        self.find(id).and_then(|block| self.opened(&block))
    }

    /// A folder for a new block: in the first tier that can ever hold it. Errors: `NoSpace` when none takes blocks.
    pub fn choose(&self, length: u64) -> Result<Arc<Dir>> {
        let fitting = self.tiers.iter().find_map(|tier| tier.choose(length));
        // A block larger than any folder is cached in part.
        fitting.or_else(|| self.tiers.iter().find_map(|tier| tier.choose(0))).cloned().ok_or_else(|| {
            NO_ROOM.inc();
            err!(NoSpace, "no folder of this worker's tiers takes new blocks: `forebay fsadmin report capacity` says why")
        })
    }

    /// A folder in a tier below that of `dir`.
    pub fn choose_below(&self, dir: &Dir, length: u64) -> Option<Arc<Dir>> {
        let tier = self.tiers.iter().position(|t| t.medium == dir.medium())?;
        self.tiers[tier + 1..].iter().find_map(|tier| tier.choose(length)).cloned()
    }

    /// The block, made empty when it is not here. Errors: `NoSpace`; `Busy` while an older one of its id is on the move.
    pub fn get_or_create(&self, header: Header) -> Result<Arc<BlockFile>> {
        self.get_or_create_in(header, None)
    }

    /// `get_or_create` in a tier. One that is in another tier is dropped first, where its bytes are elsewhere.
    pub fn get_or_create_in(&self, header: Header, medium: Option<Medium>) -> Result<Arc<BlockFile>> {
        let id = header.block;
        let known = self.get(id);
        if let Some(file) = &known
            && (medium.is_none_or(|m| file.block.dir.medium() == m) || file.block.is_only_copy())
        {
            return Ok(file.clone());
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(err!(NoSpace, "this worker is to leave: it keeps nothing new"));
        }
        let dir = match medium {
            None => self.choose(header.length_bytes)?,
            Some(medium) => {
                let tier = self.tiers.iter().find(|t| t.medium == medium);
                let tier = tier.ok_or_else(|| err!(NoSpace, "this worker has no tier {}", medium.name()).with_retryable(false))?;
                let chosen = tier.choose(header.length_bytes).cloned();
                chosen.ok_or_else(|| err!(NoSpace, "no folder of tier {} takes a block of {} bytes", medium.name(), header.length_bytes))?
            }
        };
        // In another tier: only now that there is a place in the right one.
        if let Some(file) = known {
            self.remove_if(&file.block, |b| !b.is_only_copy() && !b.is_pinned());
        }
        let mut shard = self.index.shard(id);
        if let Some(block) = shard.get(&id).cloned() {
            drop(shard);
            return self.opened(&block).ok_or_else(|| err!(Unavailable, "block {id} is gone"));
        }
        if *lock(&self.moving) == Some(id) {
            return Err(err!(Busy, "block {id} is on the move"));
        }
        let made = match BlockFile::create(&dir, header.clone()) {
            // What a crash left, or a block that could not be opened; but not one that is being written.
            Err(e) if e.kind() == ErrorKind::AlreadyExists && !open_path(dir.path(), id).exists() => {
                remove_files(&dir, id);
                BlockFile::create(&dir, header)
            }
            other => other,
        };
        let file = Arc::new(made.inspect_err(|e| dir.note_error(e))?);
        self.enter(&mut shard, &file);
        Ok(file)
    }

    /// Takes a sealed block in. Errors: `AlreadyExists`; the block that is there stays as it is, the new files go.
    pub fn insert(&self, file: Arc<BlockFile>) -> Result<()> {
        let id = file.header.block;
        let mut shard = self.index.shard(id);
        if shard.contains_key(&id) {
            remove_files(&file.block.dir, id);
            return Err(err!(AlreadyExists, "block {id} is on this worker already"));
        }
        self.enter(&mut shard, &file);
        drop(shard);
        self.note_changed(id);
        Ok(())
    }

    /// Writes a block into the index, the policy and the accounting, and keeps its files open.
    fn enter(&self, shard: &mut Shard, file: &Arc<BlockFile>) {
        *file.block.open_files() = Arc::downgrade(file);
        self.enter_closed(shard, file);
        self.open.keep(file);
    }

    /// The same for one whose files are to be closed.
    fn enter_closed(&self, shard: &mut Shard, file: &BlockFile) {
        let block = &file.block;
        block.set_cached_bytes(file.cached_bytes());
        if let Some(evictable) = block.evictable() {
            block.dir.policy().insert(evictable);
        }
        block.dir.blocks.fetch_add(1, Ordering::Relaxed);
        let before = shard.insert(block.header.block, block.clone());
        assert!(before.is_none(), "a block is entered once");
        block.set_share(self.shares.get(block.header.mount()));
        Self::recharge(file);
        self.look_at_watermark(&block.dir);
    }

    /// The counters of a folder's tier.
    pub fn counters_of(&self, dir: &Dir) -> &tier::TierCounters {
        let tier = self.tiers.iter().find(|t| t.medium == dir.medium()).unwrap_or(&self.tiers[0]);
        &tier.counters
    }

    /// Removes a block by order of the master, or because it is bad.
    pub fn remove(&self, id: BlockId) -> bool {
        // One whose header nobody has read yet is read first, so that it is accounted for like any other. One that was moved in between is another one now.
        while let Some(block) = self.find(id) {
            if self.remove_this(&block) {
                return true;
            }
        }
        false
    }

    /// The same, unless it was held a moment ago: the order may be older than that. The next report has the master look again.
    pub fn remove_by_order(&self, id: BlockId) -> bool {
        if let Some(joined) = self.joins.take_part(id) {
            self.remove(joined);
        }
        let Some(block) = self.find(id) else { return false };
        if !self.remove_if(&block, |block| !block.is_held()) {
            self.note_changed(id);
        }
        true
    }

    fn remove_this(&self, block: &Arc<Block>) -> bool {
        self.remove_if(block, |_| true)
    }

    /// Removes this very block if, under its shard's lock, `may` still says so: it may have been pinned a moment ago.
    fn remove_if(&self, block: &Arc<Block>, may: impl Fn(&Block) -> bool) -> bool {
        let id = block.header.block;
        let mut shard = self.index.shard(id);
        if !shard.get(&id).is_some_and(|b| Arc::ptr_eq(b, block) && may(b)) {
            return false;
        }
        shard.remove(&id);
        self.bury(block);
        drop(shard);
        self.note_changed(id);
        true
    }

    /// Drops a block with a wrong checksum, so that its bytes are fetched again. One whose bytes are nowhere else stays,
    /// and reading its bad chunk stays an error.
    pub fn quarantine(&self, id: BlockId) {
        if let Some(block) = self.index.get(id) {
            self.quarantine_this(&block);
        }
    }

    fn quarantine_this(&self, block: &Arc<Block>) {
        if let Some(joined) = self.joins.take_part(block.header.block) {
            self.remove(joined);
        }
        if !block.is_only_copy() && self.remove_this(block) {
            QUARANTINED.inc();
            self.counters_of(&block.dir).quarantined.inc();
            tracing::error!(block = %block.header.block, "a block had a wrong checksum, or could not be read, and is dropped");
        }
    }

    /// A read of a block's files failed: the folder is looked at, and the block dropped where its bytes are elsewhere. The good
    /// pair that a moved block has by now is left alone.
    pub fn note_read_error(&self, file: &BlockFile, e: &Error) {
        if e.kind() != ErrorKind::Corrupt {
            file.block.dir.note_error(e);
        }
        self.quarantine_this(&file.block);
    }

    /// Unlinks both files; their bytes count on until nobody holds them. Under the lock of the block's shard, so that nobody
    /// can make new files of the same names in between.
    fn bury(&self, block: &Arc<Block>) {
        let (id, dir) = (block.header.block, &block.dir);
        dir.policy().remove(id);
        if let Some(share) = block.share() {
            share.remove(id);
        }
        dir.blocks.fetch_sub(1, Ordering::Relaxed);
        self.open.forget(block);
        let (data, head) = paths(dir.path(), id);
        let probes = [Probe::open(&data), Probe::open(&head)];
        for path in [&data, &head] {
            if let Err(e) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %e, "a block file could not be unlinked");
            }
        }
        let zombie = Zombie::new(probes, block.swap_charged(0), block.open_files().clone());
        if zombie.is_free() {
            let bytes = zombie.bytes;
            // Its last descriptors are closed before the room counts as free.
            drop(zombie);
            dir.release(bytes)
        } else {
            dir.bury(zombie)
        }
        let _ = self.evictions.send(id);
    }

    /// Frees the zombies that nobody holds any more; returns their bytes.
    pub fn reap(&self) -> u64 {
        let freed = self.dirs().map(|dir| dir.reap()).sum();
        USED.set(self.dirs().map(|dir| dir.used_bytes() as i64).sum());
        CAPACITY.set(self.dirs().map(|dir| dir.quota_bytes() as i64).sum());
        ZOMBIES.set(self.dirs().map(|dir| dir.zombie_bytes() as i64).sum());
        for (mount, share) in self.shares.all() {
            SHARES.with_label_values(&[&mount.to_string()]).set(share.used_bytes() as i64);
        }
        freed
    }

    /// Fresh read-only descriptors of a block's files, for a client: never the worker's own.
    pub fn open_for_grant(&self, file: &BlockFile) -> Result<(OwnedFd, OwnedFd)> {
        let (data, head) = paths(file.block.dir.grant_dir(), file.header.block);
        let open = |path: &std::path::Path| File::open(path).map(OwnedFd::from).map_err(at("opening a block for a client"));
        let opened = (open(&data)?, open(&head)?);
        // Opened by name: they are this block's files only if it was not evicted in between.
        if self.index.contains(&file.block) { Ok(opened) } else { Err(err!(Unavailable, "block {} was evicted a moment ago", file.header.block)) }
    }

    /// Ids of blocks as they leave.
    pub fn evictions(&self) -> broadcast::Receiver<BlockId> {
        self.evictions.subscribe()
    }

    /// Has a block reported again.
    pub fn note_changed(&self, id: BlockId) {
        if is_joined(id) {
            return;
        }
        lock(&self.changed).insert(id);
        self.changed_notify.notify_one();
    }

    /// Has every block reported again.
    pub fn note_all_changed(&self) {
        let all = self.index.ids();
        lock(&self.changed).extend(all.into_iter().filter(|id| !is_joined(*id)));
        self.changed_notify.notify_one();
    }

    /// At most `limit` blocks whose state changed, with what they are now; 0 bytes for those that are gone.
    pub fn take_changed(&self, limit: usize) -> Vec<Changed> {
        let taken: Vec<BlockId> = {
            let mut changed = lock(&self.changed);
            let taken: Vec<BlockId> = changed.iter().take(limit).copied().collect();
            for id in &taken {
                changed.remove(id);
            }
            taken
        };
        let state = |id| match self.index.get(id) {
            Some(b) => {
                Changed { id, cached_bytes: b.cached_bytes(), tier: b.dir.medium().name(), pinned: b.is_pinned(), only_copy: b.is_only_copy() }
            }
            None => Changed { id, cached_bytes: 0, tier: self.tiers[0].medium.name(), pinned: false, only_copy: false },
        };
        taken.into_iter().map(state).collect()
    }

    /// Puts blocks back whose report did not arrive.
    pub fn put_changed_back(&self, ids: impl Iterator<Item = BlockId>) {
        lock(&self.changed).extend(ids);
    }

    /// Whether reports are waiting.
    pub fn has_changes(&self) -> bool {
        !lock(&self.changed).is_empty()
    }

    /// Used and total bytes, per tier.
    pub fn usage(&self) -> Vec<TierUsage> {
        self.tiers.iter().map(Tier::usage).collect()
    }
}

#[cfg(test)]
mod tests;
