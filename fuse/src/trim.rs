//! A limit of what this process keeps of files and folders that the kernel knows: the kernel is asked to forget those that were not used for longest, and gives their
//! nodes back.
//!
//! A thread of its own, begun by `session`. Asked by FUSE_NOTIFY_PRUNE (Linux 6.18): the kernel drops what nobody refers to, and nothing else; what is open, mapped,
//! mounted on, or somebody's folder stays as it is, and no lock is waited for. (FUSE_NOTIFY_INVAL_ENTRY, which older kernels have, takes the folder's lock, and hangs for
//! good with a process that is killed meanwhile; and it takes names away under those who use them without having opened them. Nothing is forgotten there.)
//! Where a control group of this process has little left, whoever takes it, the limit goes down for as long.

use crate::device;
use crate::mount::{Gate, Mount};
use forebay_common::config::FuseConfig;
use forebay_common::{Error, Result, counter, gauge, memory};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

counter!(
    ASKED,
    "forebay_fuse_nodes_trimmed_total",
    "files and folders that the kernel was asked to forget, so that what is known of them keeps to its limit"
);
gauge!(LIMIT, "forebay_fuse_nodes_limit", "files and folders that the kernel may know before it is asked to forget some");

/// What a node takes with its name, measured (200,000 files with names of 20 bytes).
const NODE_BYTES: u64 = 1_400;
/// The part of what the process may use that nodes may take, where the configuration does not say, and the most that this comes to.
const SHARE: u64 = 8;
const SHARE_MAX_BYTES: u64 = 1 << 30;
/// As many are always kept.
const LEAST: usize = 1_000;
/// Between two looks at how many there are: as many times as long as the last one took, and within these. What stays, being somebody's, is looked at again and again.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOK_EVERY_MAX: Duration = Duration::from_secs(10);
const REST: u32 = 9;
/// Nodes looked at under one lock.
const BATCH: usize = 4_096;
/// Between two looks at the control groups.
const PRESSURE_EVERY: Duration = Duration::from_secs(1);
/// What is taken of a group's limit when this mount begins to keep less, and when it goes back to more, percent.
const PRESSED_PERCENT: u64 = 85;
const EASED_PERCENT: u64 = 75;

/// How many nodes there may be.
struct Limit {
    most: usize,
    now: usize,
    groups: Vec<memory::Group>,
    looked: Instant,
}

impl Limit {
    fn new(config: &FuseConfig) -> Limit {
        let bytes = match config.nodes_memory.as_u64() {
            0 => (memory::available_bytes() / SHARE).min(SHARE_MAX_BYTES),
            bytes => bytes,
        };
        let most = usize::try_from(bytes / NODE_BYTES).unwrap_or(usize::MAX).max(LEAST);
        Limit { most, now: most, groups: memory::Group::own(), looked: Instant::now() }
    }

    /// As of now.
    fn get(&mut self) -> usize {
        if !self.groups.is_empty() && self.looked.elapsed() >= PRESSURE_EVERY {
            self.looked = Instant::now();
            self.now = self.after(self.groups.iter().filter_map(memory::Group::taken_percent).max().unwrap_or(0));
        }
        LIMIT.set(i64::try_from(self.now).unwrap_or(i64::MAX));
        self.now
    }

    /// A second later, with so much taken of a group. Never below an eighth: others may hold what is missing.
    fn after(&self, taken_percent: u64) -> usize {
        match taken_percent {
            PRESSED_PERCENT.. => (self.now - self.now / 4).max(self.most / 8).max(LEAST),
            EASED_PERCENT.. => self.now,
            _ => (self.now + self.most / 8).min(self.most),
        }
    }
}

/// Begins for a mount, and ends with it, or when it goes to other hands. Errors: no thread can be had.
pub fn start(mount: &Arc<Mount>) -> Result<()> {
    let hands = mount.hands.load(Ordering::SeqCst);
    let (mut limit, mount) = (Limit::new(&mount.config), Arc::downgrade(mount));
    let thread = std::thread::Builder::new().name("trim".into()).spawn(move || {
        let mut wait = LOOK_EVERY;
        loop {
            std::thread::sleep(wait);
            let begun = Instant::now();
            if !look(&mount, &mut limit, hands) {
                return;
            }
            wait = (begun.elapsed() * REST).clamp(LOOK_EVERY, LOOK_EVERY_MAX);
        }
    });
    thread.map(drop).map_err(|e| Error::io("a thread for the mount", &e))
}

/// Has forgotten what is above the limit. `false`: it is not this process's mount any more, or the kernel does not do this.
fn look(mount: &Weak<Mount>, limit: &mut Limit, hands: u64) -> bool {
    let Some(mount) = mount.upgrade().filter(|mount| mount.hands.load(Ordering::SeqCst) == hands) else { return false };
    let mut looks = mount.nodes.count();
    let mut over = looks.saturating_sub(limit.get());
    while over > 0 && looks > 0 {
        match *mount.gate.read().unwrap_or_else(|e| e.into_inner()) {
            Gate::Open => {}
            // It may be on its way to other hands, or not.
            Gate::Shut | Gate::Moved => return true,
        }
        let Some(kernel) = mount.device.get() else { return false };
        let nodes = mount.nodes.idle(over, looks.min(BATCH));
        (over, looks) = (over.saturating_sub(nodes.len()), looks.saturating_sub(BATCH));
        if nodes.is_empty() {
            continue;
        }
        match device::prune(kernel.as_fd(), &nodes) {
            Ok(()) => ASKED.inc_by(nodes.len() as u64),
            Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
                tracing::warn!(
                    "this kernel forgets no files when it is asked to (Linux 6.18 does): what is known of them is not limited by fuse.nodes_memory"
                );
                return false;
            }
            Err(e) => {
                tracing::debug!(error = %e, "the kernel was not asked to forget files");
                break;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: &str) -> Limit {
        Limit::new(&FuseConfig { nodes_memory: bytes.parse().unwrap(), ..FuseConfig::default() })
    }

    #[test]
    fn the_limit_is_of_bytes() {
        assert_eq!((limit("14MB").most, limit("1B").most), (10_000, LEAST));
        assert!((LEAST + 1..=800_000).contains(&limit("0").most));
    }

    #[test]
    fn it_follows_what_is_left_in_the_group() {
        let mut limit = limit("14MB");
        let mut after = |percent, seconds| {
            for _ in 0..seconds {
                limit.now = limit.after(percent);
            }
            limit.now
        };
        assert_eq!((after(84, 1), after(85, 1), after(80, 9), after(99, 100)), (10_000, 7_500, 7_500, 1_250));
        assert_eq!((after(10, 1), after(10, 100)), (2_500, 10_000));
    }
}
