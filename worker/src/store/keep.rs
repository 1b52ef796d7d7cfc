//! What may not be evicted: pinned blocks, and the only copies of their bytes, among them those that were being written when an earlier process ended.
//!
//! Called by `report` (orders of the master), `task` (holding) and `hadoop` (unfinished blocks). Invariant: a block that must stay is in no eviction policy, from
//! before anybody counts on it.

use super::adopt::set_aside;
use super::{BlockFile, BlockStore, DAMAGED, LeftOpen, open_path, remove_files};
use forebay_common::{BlockId, Error, ErrorKind, Result, err};
use std::sync::Arc;

impl BlockStore {
    /// Pins blocks, or lets them go, by order of the master.
    pub fn set_pinned(&self, id: BlockId, pinned: bool) {
        if self.find(id).is_none() {
            return;
        }
        let shard = self.index.shard(id);
        let Some(block) = shard.get(&id) else { return };
        if block.set_pinned(pinned) == pinned {
            return;
        }
        self.note_changed(id);
        let share = block.share();
        match block.evictable() {
            Some(evictable) => {
                block.dir.policy().insert(evictable);
                share.iter().for_each(|share| share.insert(evictable));
            }
            None => {
                block.dir.policy().remove(id);
                share.iter().for_each(|share| share.remove(id));
            }
        }
    }

    /// Lets blocks be evicted whose bytes are in an under store by now.
    pub fn settle(&self, id: BlockId) {
        if self.find(id).is_none() {
            return;
        }
        let shard = self.index.shard(id);
        let Some(block) = shard.get(&id) else { return };
        if !block.settle() {
            // Where it is too early to believe that, the next report asks again.
            if block.is_only_copy() {
                self.note_changed(id);
            }
            return;
        }
        if let Err(e) = BlockFile::write_flags(&block.dir, &block.header_on_disk()) {
            tracing::warn!(block = %id, error = %e, "a header still says that its block is the only copy");
        }
        self.note_changed(id);
        if let Some(evictable) = block.evictable() {
            block.dir.policy().insert(evictable);
            block.share().iter().for_each(|share| share.insert(evictable));
        }
    }

    /// Keeps a block that is here whole as the only copy of its bytes from now on, also after a restart. Errors: `NotFound` when it is not here whole.
    pub fn hold(&self, id: BlockId) -> Result<()> {
        let missing = || err!(NotFound, "block {id} is not here whole");
        let file = self.peek_read(id).filter(|file| file.is_full()).ok_or_else(missing)?;
        {
            let shard = self.index.shard(id);
            let block = shard.get(&id).filter(|block| Arc::ptr_eq(block, &file.block)).ok_or_else(missing)?;
            block.hold();
            block.dir.policy().remove(id);
            block.share().iter().for_each(|share| share.remove(id));
            BlockFile::write_flags(&block.dir, &block.header_on_disk())?;
        }
        self.note_changed(id);
        file.verify_all()?;
        file.sync()
    }

    /// Takes over where a block is that an earlier process was writing. Whoever does releases what was charged for it, once it is charged anew.
    pub fn take_left_open(&self, id: BlockId) -> Option<LeftOpen> {
        self.unread.take_open(id)
    }

    /// It could not be taken over this time. One whose bytes cannot be believed is set aside for a person to look at.
    pub fn give_up_left_open(&self, id: BlockId, left: LeftOpen, e: &Error) {
        tracing::error!(block = %id, error = %e, "a block that was being written cannot be taken over");
        if e.kind() == ErrorKind::Corrupt {
            DAMAGED.inc();
            set_aside(&left.dir, id);
            left.dir.release(left.charged_bytes);
        } else {
            left.dir.note_error(e);
            self.unread.put_open_back(id, left);
        }
    }

    /// Drops a block that an earlier process was writing, unread.
    pub fn drop_left_open(&self, id: BlockId) {
        if let Some(left) = self.take_left_open(id) {
            remove_files(&left.dir, id);
            let _ = std::fs::remove_file(open_path(left.dir.path(), id));
            left.dir.release(left.charged_bytes);
        }
    }

    /// Blocks that an earlier process was writing, and nobody has asked for since.
    pub fn left_open(&self) -> Vec<BlockId> {
        self.unread.open()
    }
}
