//! The working set: bytes that somebody used lately, for whoever decides how many workers there should be.
//!
//! Called by the heartbeat loop. Added up over all workers it says what the cluster's users need, however many workers there are: an autoscaler that compares the sum with what a worker holds
//! does not go up and down, as it would by a share of what is used (a cache is always full) or by hits (which depend on what was added last). Where the sum reaches the capacity the set may be larger
//! than what is here: what was evicted is not counted.

use super::BlockStore;
use forebay_common::gauge;
use std::time::Duration;

gauge!(WORKING_SET, "forebay_worker_working_set_bytes", "bytes of blocks that were used within worker.working_set_window_ms, or that clients hold");

impl BlockStore {
    /// Bytes of blocks that were used within `window`. A file that was joined is read by that one alone: it is counted, and its blocks are as long as they were used themselves.
    pub fn working_set(&self, window: Duration) -> u64 {
        let since = super::block::used_since(window);
        let bytes = self.index.sum(|block| if block.is_in_use(since) { block.cached_bytes() } else { 0 });
        WORKING_SET.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        bytes
    }
}
