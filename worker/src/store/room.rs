//! Room: what is stored waits for it, in a folder and in its mount's quota, and is counted once it is there.
//!
//! Called by `ufs_read` (pages), `write` (blocks under construction) and the store itself. Nobody here evicts: the evictor is woken
//! and waited for. Invariants: bytes are reserved before they are written, as many as the file system may take for them; what was
//! written to files that were unlinked meanwhile counts with those.

use super::{BlockFile, BlockStore, Dir, MemPages, NO_ROOM, ShareLimits};
use forebay_common::{MountId, Result, err};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a tmpfs of huge pages takes at once at most.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// How long a writer waits for room before it looks again.
const ROOM_WAIT: Duration = Duration::from_millis(20);
/// How long a writer waits for readers to let evicted bytes go.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// How long a writer waits for the evictor while that gets on.
const EVICT_WAIT: Duration = Duration::from_secs(20);
/// How long what is to be stored waits for its mount to come below its quota.
const SHARE_WAIT: Duration = Duration::from_secs(2);

impl BlockStore {
    /// Stores a page, room made first. Blocks the thread. Errors: `NoSpace`, the disk's.
    pub fn fill_page(&self, file: &Arc<BlockFile>, page: usize, bytes: &[u8]) -> Result<()> {
        let dir = &file.block.dir;
        let room = Self::occupied_by(file, page, bytes.len() as u64);
        self.make_share_room(file.header.mount(), room)?;
        self.make_room(dir, room, true)?;
        // Evicted meanwhile: nobody would find the page, and nobody would count it.
        if !self.index.contains(&file.block) {
            dir.release(room);
            return Err(err!(Unavailable, "block {} was evicted while it was filled", file.header.block));
        }
        let result = file.fill_page(page, bytes).inspect_err(|e| dir.note_error(e));
        self.counters_of(dir).bytes_in.inc_by(bytes.len() as u64);
        let id = file.header.block;
        let current = {
            let shard = self.index.shard(id);
            let current = shard.get(&id).is_some_and(|b| Arc::ptr_eq(b, &file.block));
            if current {
                Self::recharge(file);
                file.block.set_cached_bytes(file.cached_bytes());
            }
            current
        };
        if current {
            self.note_changed(id);
        }
        // The files of a block that was evicted in between are zombies, larger now than when they were counted.
        if current || result.is_err() || !dir.add_to_zombie(file, room) {
            dir.release(room);
        }
        result
    }

    /// The most that a file may grow by when a page is stored: a tmpfs of huge pages takes the largest that fits, the first time
    /// one of its bytes is written.
    fn occupied_by(file: &BlockFile, page: usize, bytes: u64) -> u64 {
        let start = file.header.page_span(page).0 / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        let length = HUGE_PAGE_BYTES.min(file.header.length_bytes.saturating_sub(start));
        if file.block.dir.pages() != MemPages::Huge || file.pages_of(start, length).any(|p| file.has_page(p)) {
            return bytes;
        }
        length.max(bytes)
    }

    pub(super) fn look_at_watermark(&self, dir: &Dir) {
        if dir.used_bytes() > dir.quota_bytes() / 100 * self.options.watermark_high_percent {
            self.signal.kick();
        }
    }

    /// Counts `bytes` as used in a folder, waiting for the evictor to make the room. Blocks the thread.
    ///
    /// Errors: `NoSpace` when it cannot: what is there must stay, or readers hold it and do not let go in time.
    pub fn reserve(&self, dir: &Arc<Dir>, bytes: u64) -> Result<()> {
        self.make_room(dir, bytes, false)
    }

    fn make_room(&self, dir: &Arc<Dir>, bytes: u64, patient: bool) -> Result<()> {
        if dir.try_reserve(bytes) {
            self.look_at_watermark(dir);
            return Ok(());
        }
        let (began, wanting) = (Instant::now(), dir.want(bytes, patient));
        let mut stuck_since = None;
        while bytes <= dir.quota_bytes() && began.elapsed() < EVICT_WAIT {
            let pass = self.signal.kick();
            self.signal.wait(ROOM_WAIT);
            if dir.try_reserve(bytes) {
                return Ok(());
            }
            if dir.is_stuck_since(pass) {
                // Nothing more to evict; what was evicted may be let go any moment.
                let since = *stuck_since.get_or_insert_with(Instant::now);
                if dir.zombie_bytes() == 0 || since.elapsed() > RELEASE_WAIT {
                    break;
                }
            }
        }
        drop(wanting);
        if dir.try_reserve(bytes) {
            return Ok(());
        }
        NO_ROOM.inc();
        Err(err!(
            NoSpace,
            "the {} tier's folder {} is full ({} of {} bytes) and nothing more can be evicted ({} bytes are still held by readers): raise its quota",
            dir.medium().name(),
            dir.path().display(),
            dir.used_bytes(),
            dir.quota_bytes(),
            dir.zombie_bytes()
        ))
    }

    /// Waits until a mount has room for `bytes` within its quota. Blocks the thread.
    ///
    /// Errors: `NoSpace` when what it has must stay, or is held.
    pub fn make_share_room(&self, mount: MountId, bytes: u64) -> Result<()> {
        let Some(share) = self.shares.get(mount) else { return Ok(()) };
        let (began, mut waited) = (Instant::now(), false);
        while !share.has_room(bytes) {
            // Nothing of it may leave: waiting would only delay who reads.
            let stuck = waited && share.is_empty();
            if stuck || began.elapsed() > SHARE_WAIT || bytes > share.quota_bytes() {
                NO_ROOM.inc();
                return Err(err!(
                    NoSpace,
                    "mount {mount} has used {} of its quota of {} bytes on this worker, and nothing of it can be evicted: raise the mount's option quota",
                    share.used_bytes(),
                    share.quota_bytes()
                ));
            }
            self.signal.want_share_room(bytes);
            self.signal.wait(ROOM_WAIT);
            waited = true;
        }
        Ok(())
    }

    /// Takes the limits of mounts. Blocks that are here count in them at once.
    pub fn set_shares(&self, limits: HashMap<MountId, ShareLimits>) {
        if !self.shares.set(limits) {
            return;
        }
        for id in self.index.ids() {
            let shard = self.index.shard(id);
            if let Some(block) = shard.get(&id) {
                block.set_share(self.shares.get(block.header.mount()));
            }
        }
        self.signal.kick();
    }

    /// Charges a block with what its files occupy now. Under its shard's lock.
    pub(super) fn recharge(file: &BlockFile) {
        let now = file.occupied_bytes();
        let before = file.block.swap_charged(now);
        if now >= before { file.block.dir.charge(now - before) } else { file.block.dir.release(before - now) }
    }
}
