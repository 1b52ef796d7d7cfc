//! Whose blocks these are: each folder of a tier says on the disk which cluster numbered the blocks in it.
//!
//! Called by `crate::cluster` and `report`. Invariants: a folder is named before its first block; its name changes only while it is empty, or from none where the
//! master has let the worker in with blocks that name none.

use super::adopt::write_whole;
use super::{Block, BlockStore, Dir, open_path, remove_files};
use forebay_common::{Result, err};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The file that says it.
const NAME: &str = "CLUSTER";

/// What a folder says; empty: nothing.
pub fn read(dir: &Path) -> Result<String> {
    let path = dir.join(NAME);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        Ok(_) => Err(err!(Corrupt, "{} is empty: write the cluster's id into it (`forebay fsadmin report`), or empty the folder", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(forebay_common::Error::io(path.display(), &e)),
    }
}

impl BlockStore {
    /// Folders that hold blocks, or get some just now.
    pub fn dirs_with_blocks(&self) -> Vec<Arc<Dir>> {
        self.dirs().filter(|dir| self.holds_blocks(dir)).cloned().collect()
    }

    fn holds_blocks(&self, dir: &Arc<Dir>) -> bool {
        dir.blocks.load(Ordering::Acquire) > 0 || self.unread.count_in(dir) > 0 || dir.used_bytes() > dir.zombie_bytes()
    }

    /// Whether a folder is to be named for the cluster, and can be as far as is known.
    pub fn is_unnamed(&self, cluster: &str) -> bool {
        self.dirs().any(|dir| dir.cluster() != cluster && dir.is_well())
    }

    /// The master has let this worker in, and knows no clusters.
    pub fn join_unnamed(&self) {
        self.dirs().for_each(|dir| dir.admit_unnamed());
    }

    /// The master has let this worker in: what is here is that cluster's. A folder that cannot be named gets no blocks until it can. Waits for disks.
    ///
    /// Errors: `Unavailable` where a folder has got blocks of another cluster since the master was asked.
    pub fn join_cluster(&self, cluster: &str) -> Result<()> {
        for dir in self.dirs().filter(|dir| dir.cluster() != cluster && dir.is_well()) {
            let of = dir.cluster();
            if !of.is_empty() && self.holds_blocks(dir) {
                return Err(err!(Unavailable, "{} has blocks of cluster {of}: this worker registers again", dir.path().display()));
            }
            match write_whole(dir.path(), NAME, &format!("{cluster}\n")) {
                Ok(()) => dir.set_cluster(cluster.to_owned()),
                Err(e) => {
                    tracing::error!(dir = %dir.path().display(), error = %e, "a folder cannot be named for its cluster; it gets no blocks until it can");
                    dir.note_error(&e);
                    dir.set_cluster(String::new());
                }
            }
        }
        Ok(())
    }

    /// Blocks of a folder whose bytes may be nowhere else: what cannot be read, or was being written, is taken for such. Reads headers.
    pub fn only_copies_in(&self, dir: &Arc<Dir>) -> usize {
        for id in self.unread.whole_in(dir) {
            self.find(id);
        }
        self.blocks_in(dir).iter().filter(|block| block.is_only_copy()).count() + self.unread.count_in(dir)
    }

    fn blocks_in(&self, dir: &Arc<Dir>) -> Vec<Arc<Block>> {
        self.index.ids().into_iter().filter_map(|id| self.index.get(id)).filter(|block| Arc::ptr_eq(&block.dir, dir)).collect()
    }

    /// Removes the blocks of a folder, or those that are only cached; returns how many.
    pub fn empty_dir(&self, dir: &Arc<Dir>, only_cached: bool) -> usize {
        let mut gone = 0;
        if !only_cached {
            for (id, place) in self.unread.take_all_in(dir) {
                remove_files(dir, id);
                let _ = std::fs::remove_file(open_path(dir.path(), id));
                dir.release(place.charged_bytes);
                gone += 1;
            }
        }
        gone + self.blocks_in(dir).iter().filter(|block| self.remove_if(block, |block| !only_cached || !block.is_only_copy())).count()
    }
}
