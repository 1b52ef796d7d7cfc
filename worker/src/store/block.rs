//! `Block`: what the worker always knows of a block it has: its header, its folder, what it occupies, who uses it.
//!
//! A million of these fit in memory; the files behind them are open (`BlockFile`) only while somebody uses them or they
//! were used lately. There is at most one `BlockFile` of a block at a time, so that its page map has one writer.

use super::block_file::BlockFile;
use super::dir::Dir;
use super::evict::Evictable;
use super::shares::Share;
use forebay_common::block_header::{FLAG_ONLY_COPY, Header};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// What times of use are counted from.
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn now_ms() -> u64 {
    u64::try_from(BEGAN.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// How long orders may be under way that were given before a block was held.
const HELD_FOR: Duration = Duration::from_secs(20);

/// What `Block::is_in_use` compares with, for uses within `window`.
pub fn used_since(window: Duration) -> u64 {
    now_ms().saturating_sub(u64::try_from(window.as_millis()).unwrap_or(u64::MAX))
}

/// A block of this worker.
pub struct Block {
    /// The fixed part of its header.
    pub header: Header,
    /// Where its files are.
    pub dir: Arc<Dir>,
    open: Mutex<Weak<BlockFile>>,
    cached_bytes: AtomicU64,
    charged_bytes: AtomicU64,
    grants: AtomicU32,
    pinned: AtomicBool,
    /// Its bytes are nowhere else.
    only_copy: AtomicBool,
    /// When it became so by order of the master.
    held: Mutex<Option<Instant>>,
    heat: Mutex<(Instant, u32)>,
    /// Since `BEGAN`; 0: never by this process.
    used_ms: AtomicU64,
    share: Mutex<Option<Arc<Share>>>,
}

impl Block {
    /// One without pages, in a folder, used now.
    pub fn new(header: Header, dir: Arc<Dir>) -> Arc<Block> {
        let only_copy = header.flags & FLAG_ONLY_COPY != 0;
        Arc::new(Block {
            header,
            dir,
            open: Mutex::default(),
            cached_bytes: AtomicU64::new(0),
            charged_bytes: AtomicU64::new(0),
            grants: AtomicU32::new(0),
            pinned: AtomicBool::new(false),
            only_copy: AtomicBool::new(only_copy),
            held: Mutex::default(),
            heat: Mutex::new((Instant::now(), 0)),
            used_ms: AtomicU64::new(now_ms()),
            share: Mutex::default(),
        })
    }

    /// Whether its bytes are nowhere else.
    pub fn is_only_copy(&self) -> bool {
        self.only_copy.load(Ordering::Acquire)
    }

    /// Its bytes are in an under store. Returns whether that is news. Not believed for a while after `hold`: it may have been said before that.
    pub fn settle(&self) -> bool {
        !self.is_held() && self.only_copy.swap(false, Ordering::AcqRel)
    }

    /// Whether orders may still be under way that were given before `hold`.
    pub fn is_held(&self) -> bool {
        self.held.lock().unwrap_or_else(|e| e.into_inner()).is_some_and(|at| at.elapsed() < HELD_FOR)
    }

    /// Its bytes are about to be nowhere else.
    pub fn hold(&self) {
        *self.held.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
        self.only_copy.store(true, Ordering::Release);
    }

    /// Its header as its files have it by now.
    pub fn header_on_disk(&self) -> Header {
        let flags = if self.is_only_copy() { self.header.flags | FLAG_ONLY_COPY } else { self.header.flags & !FLAG_ONLY_COPY };
        Header { flags, ..self.header.clone() }
    }

    /// Its entry in an eviction policy; `None` for what must stay.
    pub fn evictable(&self) -> Option<Evictable> {
        let stays = self.is_only_copy() || self.pinned.load(Ordering::Acquire);
        (!stays).then(|| Evictable::new(self.header.block, self.header.length_bytes))
    }

    /// Pins it, or lets it go. Returns what it was.
    pub fn set_pinned(&self, pinned: bool) -> bool {
        self.pinned.swap(pinned, Ordering::AcqRel)
    }

    /// Whether it is pinned.
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Acquire)
    }

    /// Its open files, locked: whoever opens them does it once.
    pub fn open_files(&self) -> MutexGuard<'_, Weak<BlockFile>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes of the pages that are here.
    pub fn cached_bytes(&self) -> u64 {
        self.cached_bytes.load(Ordering::Acquire)
    }

    /// Notes what its page map says.
    pub fn set_cached_bytes(&self, bytes: u64) {
        self.cached_bytes.store(bytes, Ordering::Release);
    }

    /// What the accounting holds for its files; swapped for a new figure, in its mount's share as well. Under its shard's lock.
    pub fn swap_charged(&self, bytes: u64) -> u64 {
        let before = self.charged_bytes.swap(bytes, Ordering::AcqRel);
        if let Some(share) = self.share() {
            share.recharge(before, bytes);
        }
        before
    }

    /// Its mount's share, if that has one.
    pub fn share(&self) -> Option<Arc<Share>> {
        self.share.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Counts from now on in another share. Under its shard's lock.
    pub fn set_share(&self, share: Option<Arc<Share>>) {
        let mut own = self.share.lock().unwrap_or_else(|e| e.into_inner());
        let same = match (&*own, &share) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        if let Some(left) = own.take() {
            left.recharge(self.charged_bytes(), 0);
            left.remove(self.header.block);
        }
        if let Some(joined) = &share {
            joined.recharge(0, self.charged_bytes());
            if let Some(evictable) = self.evictable() {
                joined.insert(evictable);
            }
        }
        *own = share;
    }

    /// What the accounting holds for its files.
    pub fn charged_bytes(&self) -> u64 {
        self.charged_bytes.load(Ordering::Acquire)
    }

    /// A client was granted it.
    pub fn granted(&self) {
        self.grants.fetch_add(1, Ordering::AcqRel);
    }

    /// A client let it go.
    pub fn let_go(&self) {
        let before = self.grants.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a grant ends once");
    }

    /// Grants that clients hold: evicting it frees nothing before they let go.
    pub fn grants(&self) -> u32 {
        self.grants.load(Ordering::Acquire)
    }

    /// It is used now.
    pub fn used(&self) {
        self.used_ms.store(now_ms(), Ordering::Relaxed);
    }

    /// It was used when another one was; `None`: not by this process.
    pub fn used_as(&self, other: Option<&Block>) {
        self.used_ms.store(other.map_or(0, |other| other.used_ms.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    /// Whether it was used since then (`used_since`), or a client has it now, who may read it without being seen.
    pub fn is_in_use(&self, since: u64) -> bool {
        let used = self.used_ms.load(Ordering::Relaxed);
        self.grants() > 0 || (used > 0 && used >= since)
    }

    /// Counts a use and returns how many there were within `window`.
    pub fn use_within(&self, window: Duration) -> u32 {
        let mut heat = self.heat.lock().unwrap_or_else(|e| e.into_inner());
        if heat.0.elapsed() > window {
            *heat = (Instant::now(), 0);
        }
        heat.1 += 1;
        heat.1
    }
}
