//! Small blocks stored in one go: both files made with all they hold, entered, and not kept open.
//!
//! Called by `ufs_read` for loads by the batch. Invariants: as of the store; room is counted before anything is written.

use super::{BlockFile, BlockStore, Header, lock, remove_files};
use forebay_common::{ErrorKind, Result, err};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl BlockStore {
    /// Stores a block that is all at hand, room made first; where its files are there already, what is missing of them. Blocks the
    /// thread. For blocks of one page. Errors: `NoSpace`, the disk's; `Busy` while an older one of its id is on the move.
    pub fn store_whole(&self, header: Header, bytes: &[u8]) -> Result<()> {
        let id = header.block;
        let fill = |file: Arc<BlockFile>| {
            if file.header.length_bytes != header.length_bytes {
                return Err(err!(Corrupt, "block {id} has another length than its file says"));
            }
            self.fill_page(&file, 0, bytes)
        };
        if let Some(file) = self.get(id) {
            return fill(file);
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(err!(NoSpace, "this worker is to leave: it keeps nothing new"));
        }
        let dir = self.choose(header.length_bytes)?;
        let room = header.length_bytes + header.file_bytes() as u64;
        self.make_share_room(header.mount(), room)?;
        self.reserve(&dir, room)?;
        let entered = {
            let mut shard = self.index.shard(id);
            if shard.contains_key(&id) {
                Ok(false)
            } else if *lock(&self.moving) == Some(id) {
                Err(err!(Busy, "block {id} is on the move"))
            } else {
                let make = || BlockFile::create_whole(&dir, header.clone(), bytes);
                let made = make().or_else(|e| {
                    if e.kind() != ErrorKind::AlreadyExists {
                        return Err(e);
                    }
                    // What a crash left, or a block that could not be opened.
                    remove_files(&dir, id);
                    make()
                });
                made.inspect_err(|e| dir.note_error(e)).map(|file| {
                    self.enter_closed(&mut shard, &file);
                    true
                })
            }
        };
        dir.release(room);
        if entered? {
            let counters = self.counters_of(&dir);
            counters.bytes_in.inc_by(bytes.len() as u64);
            counters.misses.inc();
            self.note_changed(id);
            return Ok(());
        }
        match self.get(id) {
            Some(file) => fill(file),
            None => Err(err!(Unavailable, "block {id} was evicted while it was stored")),
        }
    }
}
