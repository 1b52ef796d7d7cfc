//! The grants of one session, bounded in number and in bytes.

use forebay_common::limits::SESSION_GRANTS_MAX;
use forebay_common::{BlockId, Result, counter, err, gauge};
use std::collections::HashMap;

gauge!(HELD, "forebay_worker_grants_held", "grants that sessions hold");
counter!(LIMITED, "forebay_worker_grants_limited_total", "grants refused because a session held too many; its reads are streamed");

pub struct Grants {
    held: HashMap<u64, (BlockId, u64)>,
    next: u64,
    pinned_bytes: u64,
    pinned_max_bytes: u64,
}

impl Grants {
    pub fn new(pinned_max_bytes: u64) -> Self {
        Grants { held: HashMap::new(), next: 1, pinned_bytes: 0, pinned_max_bytes }
    }

    /// Errors: `LimitExceeded`; the client streams then.
    pub fn add(&mut self, block: BlockId, bytes: u64) -> Result<u64> {
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
        self.held.insert(id, (block, bytes));
        HELD.inc();
        Ok(id)
    }

    pub fn close(&mut self, id: u64) {
        if let Some((_, bytes)) = self.held.remove(&id) {
            self.pinned_bytes -= bytes;
            HELD.dec();
        }
    }

    pub fn holds(&self, block: BlockId) -> bool {
        self.held.values().any(|(b, _)| *b == block)
    }

    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.held.values().map(|(b, _)| *b)
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        HELD.sub(self.held.len() as i64);
    }
}
