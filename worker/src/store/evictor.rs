//! The evictor: a thread that keeps room in every folder, ahead of need.
//!
//! Woken when a folder passes its high watermark or a writer waits for room, it takes victims from the folder's policy until
//! the low watermark is reached. A victim moves down where the next tier has a place for it: a warm one may push colder
//! blocks out there, one that was used once takes free room only, and nothing moves down while writers wait (fills of pages
//! that their readers have already got may wait for a disk). Between passes it
//! moves up what has become hot below. Writers never evict: they wait for this thread, and are told when it can do no more.

use super::block::Block;
use super::block_file::BlockFile;
use super::dir::Dir;
use super::{BlockStore, EVICTED};
use forebay_common::{BlockId, Result, counter};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

counter!(PROMOTIONS_DROPPED, "forebay_worker_promotions_dropped_total", "blocks not moved up because too many were waiting for it");

counter!(PANICS, "forebay_worker_evictor_panics_total", "passes of the evictor that failed by a mistake of ours");

/// Without being woken: zombies are looked at this often.
const IDLE: Duration = Duration::from_millis(200);
/// One pass over a folder evicts a few times what it needs and no more: where readers hold everything, evicting all of it at
/// once would empty the cache before any of them could let go.
const EVICTED_PER_NEED: u64 = 4;
/// Blocks that clients hold are passed over, this many in a row: evicting them frees nothing before they let go.
const HELD_PASSED_MAX: usize = 64;
/// Blocks that are within their mount's reserved share are passed over, this many in a row.
const RESERVED_PASSED_MAX: usize = 100_000;
/// Of a mount's quota one in this many is made free when it is full.
const QUOTA_AHEAD_SHARE: u64 = 16;
/// Blocks waiting to be moved up.
const PROMOTIONS_MAX: usize = 256;

#[derive(Default)]
struct State {
    kicked: bool,
    begun: u64,
    /// The most that somebody waits for within a mount's quota.
    share_room: u64,
    promotions: VecDeque<BlockId>,
}

/// How writers and the evictor talk.
#[derive(Default)]
pub struct Signal {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

impl Signal {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Has a pass begin soon; returns how many have begun.
    pub fn kick(&self) -> u64 {
        let mut state = self.state();
        state.kicked = true;
        self.work.notify_one();
        state.begun
    }

    /// Has a pass make room within the quotas of mounts.
    pub fn want_share_room(&self, bytes: u64) {
        let mut state = self.state();
        state.share_room = state.share_room.max(bytes);
        state.kicked = true;
        self.work.notify_one();
    }

    /// Waits until a pass has ended, `limit` at most.
    pub fn wait(&self, limit: Duration) {
        let state = self.state();
        drop(self.done.wait_timeout(state, limit).unwrap_or_else(|e| e.into_inner()));
    }

    /// Has a block moved up when there is time.
    pub fn promote(&self, id: BlockId) {
        let mut state = self.state();
        if state.promotions.len() >= PROMOTIONS_MAX {
            PROMOTIONS_DROPPED.inc();
        } else if !state.promotions.contains(&id) {
            state.promotions.push_back(id);
            self.work.notify_one();
        }
    }
}

/// The thread's loop; ends when the store is gone.
pub fn run(store: &Weak<BlockStore>, signal: &Arc<Signal>) {
    loop {
        let (begun, share_room, promotion) = {
            let mut state = signal.state();
            if !state.kicked && state.promotions.is_empty() {
                state = signal.work.wait_timeout(state, IDLE).unwrap_or_else(|e| e.into_inner()).0;
            }
            state.kicked = false;
            state.begun += 1;
            (state.begun, std::mem::take(&mut state.share_room), state.promotions.pop_front())
        };
        let Some(store) = store.upgrade() else { return };
        let pass = || {
            store.keep_quotas(share_room);
            // The slowest first, so that what is moved down finds room.
            for (i, tier) in store.tiers.iter().enumerate().rev() {
                tier.dirs.iter().for_each(|dir| store.relieve(i, dir, begun));
            }
            signal.done.notify_all();
            if let Some(id) = promotion
                && let Err(e) = store.promote(id)
            {
                tracing::warn!(block = %id, error = %e, "a hot block was not moved up");
            }
        };
        // Without this thread nobody finds room any more.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(pass)).is_err() {
            PANICS.inc();
            tracing::error!("a pass of the evictor failed; it goes on with the next");
            *super::lock(&store.moving) = None;
        }
        drop(store);
        signal.done.notify_all();
    }
}

impl BlockStore {
    /// Drops blocks of mounts that have more than their quota, `room` bytes more included.
    fn keep_quotas(&self, room: u64) {
        for (_, share) in self.shares.all() {
            // Ahead of need, as folders are: not one page at a time.
            let ahead = if room > 0 { room.max(share.quota_bytes() / QUOTA_AHEAD_SHARE) } else { 0 };
            let mut passed = 0;
            while !share.has_room(ahead.min(share.quota_bytes())) {
                let Some(id) = share.victim() else { break };
                let Some(block) = self.index.get(id) else { continue };
                let Some(evictable) = block.evictable() else { continue };
                // What clients hold frees its quota at once: its bytes count in the folder until they let go.
                if !self.remove_if(&block, |b| b.evictable().is_some()) {
                    share.insert(evictable);
                    passed += 1;
                    if passed > HELD_PASSED_MAX {
                        break;
                    }
                    continue;
                }
                EVICTED.inc();
                self.counters_of(&block.dir).evicted.inc();
            }
        }
    }

    /// Brings a folder below its watermark, or makes the room that writers wait for.
    fn relieve(&self, tier: usize, dir: &Arc<Dir>, pass: u64) {
        dir.reap();
        dir.check_reserve();
        let quota = dir.quota_bytes();
        let part = |percent: u64| quota / 100 * percent;
        let wanted = dir.wanted();
        let low = part(self.options.watermark_low_percent).min(quota.saturating_sub(wanted));
        let above = if wanted > 0 { dir.free_bytes() < wanted } else { dir.used_bytes() > part(self.options.watermark_high_percent) };
        if !above {
            return;
        }
        let need = dir.used_bytes().saturating_sub(low);
        let mut buried = 0;
        while dir.used_bytes() > low && buried < need.saturating_mul(EVICTED_PER_NEED) {
            match self.evict_one(tier, dir) {
                Some(bytes) => buried += bytes.max(1),
                // Blocks of an earlier start, not read yet, are in no policy: read some, and look again.
                None if self.adopt_some() > 0 => {}
                None => break,
            }
            dir.reap_some();
        }
        dir.reap();
        if dir.free_bytes() < dir.wanted() {
            dir.note_stuck(pass);
        }
    }

    /// Has the block leave that should; returns what it occupied. `None`: none can.
    fn evict_one(&self, tier: usize, dir: &Arc<Dir>) -> Option<u64> {
        let began = Instant::now();
        let (mut passed, mut reserved) = (0, 0);
        loop {
            let victim = dir.policy().victim()?;
            let Some(block) = self.index.get(victim.id).filter(|b| Arc::ptr_eq(&b.dir, dir)) else { continue };
            let Some(evictable) = block.evictable() else { continue };
            if block.grants() > 0 && passed < HELD_PASSED_MAX && passed < dir.policy().len() {
                passed += 1;
                dir.policy().insert(evictable);
                continue;
            }
            // What a mount has reserved is for others only when there is nothing else.
            if block.share().is_some_and(|share| share.is_within_reserve()) && reserved < dir.policy().len().min(RESERVED_PASSED_MAX) {
                reserved += 1;
                dir.policy().insert(evictable);
                continue;
            }
            let bytes = block.charged_bytes();
            if !dir.is_urgent() && !super::is_joined(victim.id) && self.demote(tier, &block, victim.warm) {
                self.tiers[tier + 1].counters.demoted.inc();
            } else if !self.remove_if(&block, |b| b.evictable().is_some()) {
                continue;
            }
            EVICTED.inc();
            let counters = &self.tiers[tier].counters;
            counters.evicted.inc();
            counters.evict_micros.inc_by(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
            return Some(bytes);
        }
    }

    /// Moves a block one tier down. `false`: there is none, or no room in it, or it could not be copied.
    fn demote(&self, tier: usize, block: &Arc<Block>, warm: bool) -> bool {
        let Some(lower) = self.tiers.get(tier + 1) else { return false };
        let bytes = block.charged_bytes();
        let Some(to) = lower.choose(block.header.length_bytes) else { return false };
        if block.cached_bytes() == 0 {
            return false;
        }
        let mut evicted = 0;
        while !to.try_reserve(bytes) {
            if !warm || evicted >= bytes.saturating_mul(EVICTED_PER_NEED) {
                return false;
            }
            match self.evict_one(tier + 1, to) {
                Some(gone) => evicted += gone.max(1),
                None => return false,
            }
            to.reap_some();
        }
        let moved = self.move_block(block, to);
        to.release(bytes);
        moved.unwrap_or_else(|e| {
            tracing::warn!(block = %block.header.block, error = %e, "a block could not be moved down, and is dropped");
            false
        })
    }

    /// Moves a block to the first tier, where there is, or can be made, room for it.
    fn promote(&self, id: BlockId) -> Result<bool> {
        let Some(block) = self.index.get(id).filter(|b| b.evictable().is_some()) else { return Ok(false) };
        let Some(tier) = self.tiers.iter().position(|t| t.dirs.iter().any(|d| Arc::ptr_eq(d, &block.dir))).filter(|t| *t > 0) else {
            return Ok(false);
        };
        let upper = tier - 1;
        let Some(to) = self.tiers[upper].choose(block.header.length_bytes) else { return Ok(false) };
        let bytes = block.charged_bytes();
        let mut evicted = 0;
        while !to.try_reserve(bytes) {
            match self.evict_one(upper, to) {
                Some(gone) if evicted < bytes.saturating_mul(EVICTED_PER_NEED) => evicted += gone.max(1),
                _ => return Ok(false),
            }
            to.reap();
        }
        let moved = self.move_block(&block, to);
        to.release(bytes);
        if matches!(moved, Ok(true)) {
            self.tiers[upper].counters.promoted.inc();
        }
        moved
    }

    /// Copies the pages of a block into a new pair of files in another folder, each chunk compared with its checksum, and
    /// swaps the index's entry. Whoever holds the old pair reads on in it. `false`: the block went, or changed, meanwhile.
    fn move_block(&self, block: &Arc<Block>, to: &Arc<Dir>) -> Result<bool> {
        let id = block.header.block;
        {
            // Under the lock of its shard: from now on nobody makes new files of this name.
            let shard = self.index.shard(id);
            if !shard.get(&id).is_some_and(|b| Arc::ptr_eq(b, block)) {
                return Ok(false);
            }
            *super::lock(&self.moving) = Some(id);
        }
        let moved = self.copy_and_swap(block, to);
        *super::lock(&self.moving) = None;
        moved
    }

    fn copy_and_swap(&self, block: &Arc<Block>, to: &Arc<Dir>) -> Result<bool> {
        let id = block.header.block;
        let Some(from) = self.opened(block) else { return Ok(false) };
        super::remove_files(to, id);
        let copy = BlockFile::create(to, block.header_on_disk()).inspect_err(|e| to.note_error(e))?;
        copy.block.used_as(Some(block));
        for page in (0..block.header.pages()).filter(|p| from.has_page(*p)) {
            let (offset, length) = block.header.page_span(page);
            let read = from.verify_range(offset, length).and_then(|()| from.bytes(offset, length));
            // What the old files say is theirs to answer for; and writers do not wait for a disk.
            let bytes = match read {
                Ok(bytes) if !self.dirs().any(|dir| dir.is_urgent()) => bytes,
                Ok(_) => {
                    super::remove_files(to, id);
                    return Ok(false);
                }
                Err(e) => {
                    super::remove_files(to, id);
                    self.note_read_error(&from, &e);
                    return Ok(false);
                }
            };
            if let Err(e) = copy.fill_page(page, &bytes) {
                super::remove_files(to, id);
                to.note_error(&e);
                return Err(e);
            }
        }
        drop(from);
        let swapped = {
            let mut shard = self.index.shard(id);
            match shard.get(&id) {
                // One that was pinned meanwhile stays where it is.
                Some(there) if Arc::ptr_eq(there, block) && block.evictable().is_some() => {
                    shard.remove(&id);
                    self.bury(block);
                    self.enter(&mut shard, &Arc::new(copy));
                    true
                }
                _ => false,
            }
        };
        if !swapped {
            super::remove_files(to, id);
        }
        self.note_changed(id);
        Ok(swapped)
    }
}
