//! The working set: bytes that somebody used lately, for whoever decides how many workers there should be.
//!
//! Called by the heartbeat loop. Added up over all workers it says what the cluster's users need, however many workers there are: an autoscaler that compares the sum with what a worker holds
//! does not go up and down, as it would by a share of what is used (a cache is always full) or by hits (which depend on what was added last). Where the sum reaches the capacity the set may be larger
//! than what is here: what was evicted is not counted.

use super::BlockStore;
use super::joined::is_joined;
use forebay_common::gauge;
use std::time::Duration;

gauge!(WORKING_SET, "forebay_worker_working_set_bytes", "bytes of blocks that were used within worker.working_set_window_ms, or that clients hold");

impl BlockStore {
    /// Bytes of blocks that were used within `window`; one that was joined is counted by its blocks.
    pub fn working_set(&self, window: Duration) -> u64 {
        let bytes = self.index.sum(|block| if !is_joined(block.header.block) && block.is_in_use(window) { block.cached_bytes() } else { 0 });
        WORKING_SET.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        bytes
    }
}
