//! `OpenBlocks`: the blocks that Hadoop's clients are writing just now, by id.
//!
//! `write` appends to them, `read` and `replica` serve what was acknowledged of them, and whoever recovers a lease has one sealed as it stands. Invariants:
//! a block is open once; it is sealed or dropped once, whoever does it, and no byte is appended or acknowledged after that; nothing beyond what was acknowledged is served.

use crate::core::Core;
use crate::write::BlockWriter;
use bytes::Bytes;
use forebay_common::{BlockId, Result, err, gauge};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

gauge!(OPEN, "forebay_worker_hadoop_blocks_open", "blocks that Hadoop clients are writing");

#[derive(Default)]
pub struct OpenBlocks(Mutex<HashMap<BlockId, Arc<OpenBlock>>>);

/// A block being written.
pub struct OpenBlock {
    id: BlockId,
    /// Taken by whoever seals it.
    writer: Mutex<Option<BlockWriter>>,
    acknowledged: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl OpenBlocks {
    /// Errors: `AlreadyExists` for one that is open.
    pub fn begin(&self, writer: BlockWriter) -> Result<Arc<OpenBlock>> {
        let id = writer.block();
        let block = Arc::new(OpenBlock { id, writer: Mutex::new(Some(writer)), acknowledged: AtomicU64::new(0) });
        let mut all = lock(&self.0);
        if all.contains_key(&id) {
            return Err(err!(AlreadyExists, "block {id} is being written by somebody else"));
        }
        all.insert(id, block.clone());
        OPEN.set(all.len() as i64);
        Ok(block)
    }

    /// One that is open.
    pub fn get(&self, id: BlockId) -> Option<Arc<OpenBlock>> {
        lock(&self.0).get(&id).cloned()
    }

    fn end(&self, id: BlockId) {
        let mut all = lock(&self.0);
        all.remove(&id);
        OPEN.set(all.len() as i64);
    }
}

impl OpenBlock {
    /// Appends. Errors: `Expired` once it was sealed; otherwise nothing was appended.
    pub fn append(&self, bytes: &[u8], sync: bool) -> Result<()> {
        let mut writer = lock(&self.writer);
        let writer = writer.as_mut().ok_or_else(|| err!(Expired, "block {} was sealed: its lease is over", self.id))?;
        if !bytes.is_empty() {
            writer.append(bytes)?;
        }
        if sync {
            writer.sync()?;
        }
        self.acknowledged.store(writer.length(), Ordering::Release);
        Ok(())
    }

    /// Bytes that were written, and are, or are about to be, acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Bytes of what was acknowledged. Errors: `Expired` once it was sealed: it is a block like others then.
    pub fn read(&self, range: Range<u64>) -> Result<Bytes> {
        if range.end > self.acknowledged() {
            return Err(err!(InvalidArgument, "block {} has {} bytes by now", self.id, self.acknowledged()));
        }
        let writer = lock(&self.writer);
        writer.as_ref().ok_or_else(|| err!(Expired, "block {} was sealed a moment ago", self.id))?.read(range)
    }

    /// Ends it, and with `keep` takes it in as it stands; returns its length, 0 for one that is not kept. Done once: of whoever comes later, `None`. Blocks
    /// the thread.
    pub fn end(&self, core: &Core, keep: bool) -> Result<Option<u64>> {
        let mut held = lock(&self.writer);
        let Some(writer) = held.take() else { return Ok(None) };
        let length = writer.length();
        let ended =
            if keep && length > 0 { writer.seal().and_then(|file| core.store.insert(Arc::new(file))).map(|()| Some(length)) } else { Ok(Some(0)) };
        // Found by its id in one place or the other at any time.
        core.open_blocks.end(self.id);
        drop(held);
        ended
    }
}
