//! The grants of one session, bounded in number and in bytes.

use crate::store::Block;
use forebay_common::limits::SESSION_GRANTS_MAX;
use forebay_common::{BlockId, Result, counter, err, gauge};
use std::collections::HashMap;
use std::sync::Arc;

gauge!(HELD, "forebay_worker_grants_held", "grants that sessions hold");
counter!(LIMITED, "forebay_worker_grants_limited_total", "grants refused because a session held too many; its reads are streamed");

pub struct Grants {
    held: HashMap<u64, (Arc<Block>, u64)>,
    next: u64,
    pinned_bytes: u64,
    pinned_max_bytes: u64,
}

impl Grants {
    pub fn new(pinned_max_bytes: u64) -> Self {
        Grants { held: HashMap::new(), next: 1, pinned_bytes: 0, pinned_max_bytes }
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
        }
    }

    pub fn holds(&self, block: BlockId) -> bool {
        self.held.values().any(|(b, _)| b.header.block == block)
    }

    pub fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> {
        self.held.values().map(|(b, _)| b)
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        HELD.sub(self.held.len() as i64);
        self.held.values().for_each(|(block, _)| block.let_go());
    }
}
