//! What one mount may have of a worker: at most a quota, and at least a reserved share while others want room.
//!
//! Set from the master's heartbeat answers. Blocks know their mount by their header, so a restart changes nothing. Invariants: a
//! share's `used` is the sum of what is charged for the blocks that point to it, and changes, like that pointer, under the lock of
//! the block's shard; its policy holds those of them that may be evicted. Blocks of mounts without a share point to none.

use super::evict::{self, Evictable, Eviction};
use forebay_common::config::EvictPolicy;
use forebay_common::{BlockId, MountId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

/// The limits of a mount on this worker, over all its tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareLimits {
    /// Bytes it may have; 0: no limit.
    pub quota_bytes: u64,
    /// Bytes that others do not push out.
    pub reserved_bytes: u64,
}

/// One mount's share.
pub struct Share {
    limits: ShareLimits,
    used_bytes: AtomicU64,
    policy: Mutex<Box<dyn Eviction>>,
}

impl Share {
    fn policy(&self) -> MutexGuard<'_, Box<dyn Eviction>> {
        self.policy.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes that its blocks occupy.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Acquire)
    }

    /// What is charged for one of its blocks has changed.
    pub fn recharge(&self, before: u64, now: u64) {
        if now >= before {
            self.used_bytes.fetch_add(now - before, Ordering::AcqRel);
        } else {
            self.used_bytes.fetch_sub(before - now, Ordering::AcqRel);
        }
    }

    /// A block that may be evicted came, or may be evicted again.
    pub fn insert(&self, block: Evictable) {
        self.policy().insert(block);
    }

    /// A block went, or may not be evicted any more.
    pub fn remove(&self, id: BlockId) {
        self.policy().remove(id);
    }

    /// A block was used.
    pub fn access(&self, id: BlockId) {
        self.policy().access(id);
    }

    /// The block that should leave when this mount has too much.
    pub fn victim(&self) -> Option<BlockId> {
        self.policy().victim().map(|v| v.id)
    }

    /// Whether it has no block that may be evicted.
    pub fn is_empty(&self) -> bool {
        self.policy().is_empty()
    }

    /// Whether `bytes` more are within its quota.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.limits.quota_bytes == 0 || self.used_bytes() + bytes <= self.limits.quota_bytes
    }

    /// Its quota; 0: none.
    pub fn quota_bytes(&self) -> u64 {
        self.limits.quota_bytes
    }

    /// Whether others must leave it what it has.
    pub fn is_within_reserve(&self) -> bool {
        self.limits.reserved_bytes > 0 && self.used_bytes() <= self.limits.reserved_bytes
    }
}

/// All shares, by mount.
pub struct Shares {
    policy: EvictPolicy,
    of: RwLock<HashMap<MountId, Arc<Share>>>,
}

impl Shares {
    pub fn new(policy: EvictPolicy) -> Shares {
        Shares { policy, of: RwLock::default() }
    }

    /// The share of a mount, if it has one.
    pub fn get(&self, mount: MountId) -> Option<Arc<Share>> {
        self.of.read().unwrap_or_else(|e| e.into_inner()).get(&mount).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<(MountId, Arc<Share>)> {
        self.of.read().unwrap_or_else(|e| e.into_inner()).iter().map(|(mount, share)| (*mount, share.clone())).collect()
    }

    /// Takes new limits; those that stay as they are keep their share. `true` when blocks have to look for theirs again.
    pub fn set(&self, limits: HashMap<MountId, ShareLimits>) -> bool {
        let mut of = self.of.write().unwrap_or_else(|e| e.into_inner());
        if of.len() == limits.len() && limits.iter().all(|(mount, wanted)| of.get(mount).is_some_and(|share| share.limits == *wanted)) {
            return false;
        }
        let made = |limits| {
            let policy = Mutex::new(evict::new(self.policy));
            Arc::new(Share { limits, used_bytes: AtomicU64::new(0), policy })
        };
        *of = limits
            .into_iter()
            .map(|(mount, limits)| (mount, of.get(&mount).filter(|share| share.limits == limits).cloned().unwrap_or_else(|| made(limits))))
            .collect();
        true
    }
}
