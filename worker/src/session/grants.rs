//! The grants of one session, bounded in number and in bytes.

use crate::store::Block;
use forebay_common::limits::SESSION_GRANTS_MAX;
use forebay_common::{BlockId, Result, counter, err, gauge};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

gauge!(HELD, "forebay_worker_grants_held", "grants that sessions hold");
counter!(LIMITED, "forebay_worker_grants_limited_total", "grants refused because a session held too many; its reads are streamed");

pub struct Grants {
    held: HashMap<u64, (Arc<Block>, u64)>,
    next: u64,
    pinned_bytes: u64,
    pinned_max_bytes: u64,
    /// Grants taken back, and until when they are to be let go.
    revoked: HashMap<u64, Instant>,
}

impl Grants {
    pub fn new(pinned_max_bytes: u64) -> Self {
        Grants { held: HashMap::new(), next: 1, pinned_bytes: 0, pinned_max_bytes, revoked: HashMap::new() }
    }

    /// Errors: `LimitExceeded`; the client streams then.
    pub fn add(&mut self, block: &Arc<Block>) -> Result<u64> {
        let bytes = block.header.length_bytes;
        if self.held.len() >= SESSION_GRANTS_MAX || self.pinned_bytes + bytes > self.pinned_max_bytes {
            LIMITED.inc();
            return Err(err!(
                LimitExceeded,
                "this session holds {} grants of {} bytes (worker.session_pinned_max): close some, or read by stream",
                self.held.len(),
                self.pinned_bytes
            ));
        }
        let id = self.next;
        self.next += 1;
        self.pinned_bytes += bytes;
        block.granted();
        self.held.insert(id, (block.clone(), bytes));
        HELD.inc();
        Ok(id)
    }

    pub fn close(&mut self, id: u64) {
        if let Some((block, bytes)) = self.held.remove(&id) {
            block.let_go();
            self.pinned_bytes -= bytes;
            HELD.dec();
            self.revoked.remove(&id);
        }
    }

    /// Takes back the grants of blocks for which `back` holds, and returns their blocks, each once.
    pub fn revoke(&mut self, limit: Duration, back: impl Fn(&Arc<Block>) -> bool) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        for (id, (block, _)) in &self.held {
            if !self.revoked.contains_key(id) && back(block) {
                self.revoked.insert(*id, Instant::now() + limit);
                blocks.push(block.header.block);
            }
        }
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// A block that should have been let go by now.
    pub fn overdue(&self) -> Option<BlockId> {
        let late = self.revoked.iter().find(|(_, by)| Instant::now() > **by)?.0;
        self.held.get(late).map(|(block, _)| block.header.block)
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        HELD.sub(self.held.len() as i64);
        self.held.values().for_each(|(block, _)| block.let_go());
    }
}
