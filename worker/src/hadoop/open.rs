//! `OpenBlocks`: the blocks that Hadoop's clients are writing, by id: those with a writer at work, those whose writer went away, those of an earlier start.
//!
//! `write` appends to them, `read` and `replica` serve what was acknowledged of them, and whoever recovers a lease has one sealed as it stands. Invariants:
//! a block is open once, and one writer at a time appends to it; it is sealed or dropped once, whoever does it, and no byte is appended or acknowledged after
//! that; what is acknowledged outlives this process; nothing beyond it is served.

use crate::core::Core;
use crate::store::{BlockStore, Dir};
use crate::write::BlockWriter;
use bytes::Bytes;
use forebay_common::{BlockId, Error, Result, counter, err, gauge};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

gauge!(OPEN, "forebay_worker_hadoop_blocks_open", "blocks that Hadoop clients are writing, or left unfinished");
counter!(RESUMED, "forebay_worker_hadoop_blocks_resumed_total", "blocks that were being written when an earlier process ended, taken over");
counter!(STALE, "forebay_worker_hadoop_blocks_stale_total", "unfinished blocks dropped because their pipeline went on without this worker");

pub struct OpenBlocks {
    store: Arc<BlockStore>,
    all: Mutex<HashMap<BlockId, Arc<OpenBlock>>>,
    /// Held while a block of an earlier start is read.
    resuming: Mutex<()>,
}

/// A block being written.
pub struct OpenBlock {
    id: BlockId,
    /// Taken before the list's lock, where both are.
    state: Mutex<State>,
    /// Somebody is at work.
    attached: AtomicBool,
    acknowledged: AtomicU64,
}

struct State {
    /// Taken by whoever seals it.
    writer: Option<BlockWriter>,
    /// Counts those that wrote it; the last one may go on.
    turn: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl OpenBlocks {
    pub fn new(store: Arc<BlockStore>) -> OpenBlocks {
        OpenBlocks { store, all: Mutex::default(), resuming: Mutex::default() }
    }

    /// A new one, and the turn of whoever writes it. Errors: `AlreadyExists` for one that is open; the writer comes back.
    pub fn begin(&self, writer: BlockWriter) -> Result<(Arc<OpenBlock>, u64), (BlockWriter, Error)> {
        let id = writer.block();
        // One that is being taken over is on no list.
        let _one = lock(&self.resuming);
        if self.store.left_open().contains(&id) {
            return Err((writer, err!(AlreadyExists, "block {id} was being written when this worker was stopped")));
        }
        let mut all = lock(&self.all);
        if all.contains_key(&id) {
            return Err((writer, err!(AlreadyExists, "block {id} is being written by somebody else")));
        }
        let block = OpenBlock::new(writer, true);
        all.insert(id, block.clone());
        OPEN.set(all.len() as i64);
        Ok((block, 1))
    }

    /// One that is open; one of an earlier start is taken over first, which reads it. Blocks the thread.
    ///
    /// Errors: it is there, and cannot be read.
    pub fn get(&self, id: BlockId) -> Result<Option<Arc<OpenBlock>>> {
        let known = || lock(&self.all).get(&id).cloned();
        if let Some(block) = known() {
            return Ok(Some(block));
        }
        let _one = lock(&self.resuming);
        if let Some(block) = known() {
            return Ok(Some(block));
        }
        let Some(left) = self.store.take_left_open(id) else { return Ok(None) };
        match BlockWriter::resume(self.store.clone(), &left, id) {
            Ok(writer) => {
                left.dir.release(left.charged_bytes);
                RESUMED.inc();
                tracing::info!(block = %id, length = writer.length(), "a block that was being written is taken over");
                let block = OpenBlock::new(writer, false);
                let mut all = lock(&self.all);
                all.insert(id, block.clone());
                OPEN.set(all.len() as i64);
                Ok(Some(block))
            }
            Err(e) => {
                self.store.give_up_left_open(id, left, &e);
                Err(e)
            }
        }
    }

    /// Blocks that nobody is writing, and that were not ended.
    pub fn abandoned(&self) -> Vec<BlockId> {
        // A block's own lock may be held while a disk is waited for, and by somebody who takes it off this list.
        let idle = |block: &OpenBlock| !block.attached.load(Ordering::Acquire);
        let mut out: Vec<BlockId> = lock(&self.all).values().filter(|block| idle(block)).map(|block| block.id).collect();
        out.extend(self.store.left_open());
        out
    }

    /// Those that are open in a folder.
    pub fn in_dir(&self, dir: &Arc<Dir>) -> Vec<BlockId> {
        let all: Vec<Arc<OpenBlock>> = lock(&self.all).values().cloned().collect();
        let here = |block: &Arc<OpenBlock>| lock(&block.state).writer.as_ref().is_some_and(|writer| writer.is_in(dir));
        all.iter().filter(|block| here(block)).map(|block| block.id).collect()
    }

    /// Drops one that no file wants. Blocks the thread.
    pub fn discard(&self, id: BlockId) {
        let _one = lock(&self.resuming);
        let known = lock(&self.all).get(&id).cloned();
        match known {
            Some(block) => {
                let writer = lock(&block.state).writer.take();
                self.end(&block);
                writer.into_iter().for_each(BlockWriter::discard);
            }
            // What nobody wants need not be read.
            None => self.store.drop_left_open(id),
        }
    }

    /// Takes this very one off the list.
    fn end(&self, block: &OpenBlock) {
        let mut all = lock(&self.all);
        if all.get(&block.id).is_some_and(|known| std::ptr::eq(&**known, block)) {
            all.remove(&block.id);
        }
        OPEN.set(all.len() as i64);
    }
}

impl OpenBlock {
    fn new(writer: BlockWriter, attached: bool) -> Arc<OpenBlock> {
        let id = writer.block();
        let acknowledged = AtomicU64::new(writer.length());
        let state = Mutex::new(State { writer: Some(writer), turn: 1 });
        Arc::new(OpenBlock { id, state, attached: AtomicBool::new(attached), acknowledged })
    }

    fn sealed(&self) -> forebay_common::Error {
        err!(Expired, "block {} was sealed: its lease is over", self.id)
    }

    /// Goes on with it under a new stamp, at the end or before; whoever wrote it until now may not any more. Returns the turn.
    ///
    /// Errors: `InvalidArgument` when fewer bytes are here than its client was acknowledged, or for a stamp of the past; `Expired` once it was sealed.
    pub fn attach(&self, stamp: u64, least: u64) -> Result<u64> {
        let mut state = lock(&self.state);
        let writer = state.writer.as_mut().ok_or_else(|| self.sealed())?;
        if writer.length() < least {
            return Err(err!(InvalidArgument, "block {} has {} bytes here, and {least} were acknowledged", self.id, writer.length()));
        }
        if stamp < writer.stamp() {
            return Err(err!(InvalidArgument, "block {} was gone on with under stamp {} already", self.id, writer.stamp()));
        }
        writer.set_stamp(stamp);
        // By an older stamp than the master knows it would be dropped after a power cut, with what was synced before.
        writer.sync()?;
        state.turn += 1;
        self.attached.store(true, Ordering::Release);
        Ok(state.turn)
    }

    /// Whoever has this turn is gone. Returns how long the block is; `None`: somebody else has it, or it is sealed.
    pub fn detach(&self, turn: u64) -> Option<u64> {
        let state = lock(&self.state);
        if state.turn != turn {
            return None;
        }
        self.attached.store(false, Ordering::Release);
        state.writer.as_ref().map(BlockWriter::length)
    }

    /// Takes bytes in at `offset`; what of them is here already is passed over. Returns the length then.
    ///
    /// Errors: `Expired` once it was sealed, or gone on with by somebody else; `InvalidArgument` for a hole; otherwise nothing was appended.
    pub fn append(&self, turn: u64, offset: u64, bytes: &[u8], sync: bool) -> Result<u64> {
        let mut state = lock(&self.state);
        if state.turn != turn {
            return Err(err!(Expired, "block {} is gone on with by somebody else", self.id));
        }
        let writer = state.writer.as_mut().ok_or_else(|| self.sealed())?;
        let known = writer.length().checked_sub(offset);
        let known = known.ok_or_else(|| err!(InvalidArgument, "bytes at {offset} of block {}: {} are here", self.id, writer.length()))?;
        let fresh = bytes.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
        if !fresh.is_empty() {
            writer.append(fresh)?;
        }
        if sync {
            writer.sync()?;
        }
        Ok(writer.length())
    }

    /// What was appended outlives this process from now on.
    pub fn persist(&self) -> Result<()> {
        // Sealed in between: that is durable.
        lock(&self.state).writer.as_mut().map_or(Ok(()), BlockWriter::persist)
    }

    /// So much is with all workers of its pipeline.
    pub fn note_acknowledged(&self, length: u64) {
        self.acknowledged.fetch_max(length, Ordering::AcqRel);
    }

    /// Bytes that are, or are about to be, acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Bytes of what was acknowledged. Errors: `Expired` once it was sealed: it is a block like others then.
    pub fn read(&self, range: Range<u64>) -> Result<Bytes> {
        if range.end > self.acknowledged() {
            return Err(err!(InvalidArgument, "block {} has {} bytes by now", self.id, self.acknowledged()));
        }
        let state = lock(&self.state);
        state.writer.as_ref().ok_or_else(|| self.sealed())?.read(range)
    }

    /// Everything that was appended, acknowledged or not, from `from` on, `most` bytes of it; for the pipeline's own recovery.
    pub fn read_on(&self, from: u64, most: u64) -> Result<Bytes> {
        let state = lock(&self.state);
        let writer = state.writer.as_ref().ok_or_else(|| self.sealed())?;
        writer.read(from..writer.length().min(from.saturating_add(most)).max(from))
    }

    /// Ends it as it stands, or not at all without `keep`; returns its length, 0 for one that is not kept. Done once: of whoever comes later, `None`.
    /// Blocks the thread. Errors: it is as it was, and may be ended again.
    pub fn end(&self, core: &Core, keep: bool) -> Result<Option<u64>> {
        let mut state = lock(&self.state);
        let Some(mut writer) = state.writer.take() else { return Ok(None) };
        let length = writer.length();
        let ended = if keep && length > 0 {
            let sealed = writer.seal();
            match sealed {
                Ok(file) => core.store.insert(Arc::new(file)).map(|()| Some(length)),
                Err(e) => {
                    state.writer = Some(writer);
                    return Err(e);
                }
            }
        } else {
            writer.discard();
            Ok(Some(0))
        };
        // Found by its id in one place or the other at any time.
        core.open_blocks.end(self);
        drop(state);
        ended
    }

    /// Ends it by order of the master, who recovers its lease: as it stands, or with `length` bytes where other workers have so many of it. Returns its
    /// length; 0: it is dropped, because its pipeline went on without it, or it has less. `None`: somebody else ended it a moment ago.
    pub fn recover(&self, core: &Core, stamp: u64, length: Option<u64>) -> Result<Option<u64>> {
        {
            let mut state = lock(&self.state);
            let Some(writer) = state.writer.as_mut() else { return Ok(None) };
            let stale = writer.stamp() < stamp || length.is_some_and(|length| writer.length() < length);
            if stale {
                STALE.inc();
                tracing::info!(block = %self.id, stamp = writer.stamp(), length = writer.length(), "an unfinished block is dropped: its pipeline went on without it");
                let writer = state.writer.take();
                core.open_blocks.end(self);
                drop(state);
                writer.into_iter().for_each(BlockWriter::discard);
                return Ok(Some(0));
            }
            if let Some(length) = length {
                writer.cut(length)?;
            }
        }
        self.end(core, true)
    }
}
