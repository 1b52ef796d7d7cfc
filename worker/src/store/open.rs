//! Files of blocks that are kept open: those used lately, bounded in number, because each takes two descriptors and (in
//! memory tiers) a mapping.

use super::block::Block;
use super::block_file::BlockFile;
use forebay_common::{BlockId, gauge};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

gauge!(OPEN, "forebay_worker_blocks_open", "blocks whose files are kept open");

const SHARDS: usize = 16;
/// Descriptors that are neither blocks' nor connections'.
const OTHER_DESCRIPTORS: u64 = 512;

#[derive(Default)]
struct Shard {
    files: HashMap<BlockId, (u64, Arc<BlockFile>)>,
    order: BTreeMap<u64, BlockId>,
    tick: u64,
}

pub struct OpenFiles {
    shards: Vec<Mutex<Shard>>,
    max_per_shard: usize,
}

impl OpenFiles {
    pub fn new(max: usize) -> Self {
        OpenFiles { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), max_per_shard: (max / SHARDS).max(1) }
    }

    fn shard(&self, id: BlockId) -> MutexGuard<'_, Shard> {
        self.shards[id.get() as usize % SHARDS].lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Keeps a file open as the one used last; the one used longest ago is let go above the limit.
    pub fn keep(&self, file: &Arc<BlockFile>) {
        let id = file.header.block;
        let closed = {
            let shard = &mut *self.shard(id);
            shard.tick += 1;
            match shard.files.insert(id, (shard.tick, file.clone())) {
                Some((before, _)) => {
                    shard.order.remove(&before);
                }
                None => OPEN.inc(),
            }
            shard.order.insert(shard.tick, id);
            if shard.files.len() > self.max_per_shard { shard.order.pop_first().and_then(|(_, oldest)| shard.files.remove(&oldest)) } else { None }
        };
        // Unmapped and closed outside the lock.
        if closed.is_some() {
            OPEN.dec();
        }
    }

    /// Lets the files of this very block go.
    pub fn forget(&self, block: &Arc<Block>) {
        let id = block.header.block;
        let gone = {
            let shard = &mut *self.shard(id);
            let gone = if shard.files.get(&id).is_some_and(|(_, file)| Arc::ptr_eq(&file.block, block)) { shard.files.remove(&id) } else { None };
            if let Some((at, _)) = &gone {
                shard.order.remove(at);
            }
            gone
        };
        if gone.is_some() {
            OPEN.dec();
        }
    }
}

/// How many blocks this process may keep open: two descriptors and a mapping each, beside `sessions` connections.
pub fn allowed(sessions: usize) -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1_024, |(soft, _)| soft);
    let mappings = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(65_530);
    // Half of each is left to files in use beyond those kept, and to slices that outlive their block.
    let by_files = files.saturating_sub(OTHER_DESCRIPTORS + 2 * sessions as u64) / 4;
    usize::try_from(by_files.min(mappings / 2)).unwrap_or(usize::MAX).max(64)
}
