//! Taking over what an earlier process left: names at once, headers when a block is asked for or in the background.
//!
//! Reading a million headers takes a while, reading as many names a second or two: a worker serves as soon as it knows the
//! names. A file without its pair is what a crash left of a block under construction, and is removed.

use super::block_file::paths;
use super::dir::Dir;
use forebay_common::error::at;
use forebay_common::{BlockId, Result, err};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What the folder holds, and in which version. Beside it, each block's header has a version of its own.
const FORMAT: &str = "forebay blocks 1\n";

/// Blocks whose names are known and nothing else yet.
#[derive(Default)]
pub struct Unread {
    blocks: Mutex<HashMap<BlockId, Arc<Dir>>>,
    left: AtomicUsize,
}

impl Unread {
    /// Where a block is that nobody has read yet; whoever gets the answer reads it.
    pub fn take(&self, id: BlockId) -> Option<Arc<Dir>> {
        if self.left.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut blocks = self.blocks.lock().unwrap_or_else(|e| e.into_inner());
        let dir = blocks.remove(&id);
        self.left.store(blocks.len(), Ordering::Release);
        dir
    }

    /// Some that are left.
    pub fn some(&self, count: usize) -> Vec<BlockId> {
        self.blocks.lock().unwrap_or_else(|e| e.into_inner()).keys().take(count).copied().collect()
    }

    /// How many are left.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }

    /// Reads the names in a folder. Errors: another version of Forebay wrote it.
    pub fn scan(&self, dir: &Arc<Dir>) -> Result<()> {
        check_format(dir.path())?;
        let mut blocks = self.blocks.lock().unwrap_or_else(|e| e.into_inner());
        let mut removed = 0u64;
        for shard in std::fs::read_dir(dir.path()).map_err(at(dir.path().display()))?.flatten() {
            let Ok(files) = std::fs::read_dir(shard.path()) else { continue };
            let names: HashSet<String> = files.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect();
            for name in &names {
                let Some((stem, extension)) = name.split_once('.') else { continue };
                let Some(id) = u64::from_str_radix(stem, 16).ok().map(BlockId) else { continue };
                let whole = names.contains(&format!("{stem}.data")) && names.contains(&format!("{stem}.head"));
                if !whole {
                    removed += 1;
                    let _ = std::fs::remove_file(shard.path().join(name));
                } else if extension == "head" && blocks.contains_key(&id) {
                    // It was being moved when the worker stopped: the copy in the faster tier stays.
                    removed += 1;
                    let (data, head) = paths(dir.path(), id);
                    let _ = (std::fs::remove_file(data), std::fs::remove_file(head));
                } else if extension == "head" {
                    blocks.insert(id, dir.clone());
                }
            }
        }
        self.left.store(blocks.len(), Ordering::Release);
        tracing::info!(dir = %dir.path().display(), blocks = blocks.len(), removed, "names of an earlier start's blocks are read");
        Ok(())
    }
}

fn check_format(dir: &Path) -> Result<()> {
    let path = dir.join("FORMAT");
    match std::fs::read_to_string(&path) {
        Ok(found) if found == FORMAT => Ok(()),
        Ok(found) => Err(err!(
            Unsupported,
            "{} says {:?}, this worker writes {:?}: start the version that wrote it, or empty the folder",
            path.display(),
            found.trim(),
            FORMAT.trim()
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => std::fs::write(&path, FORMAT).map_err(at(path.display())),
        Err(e) => Err(forebay_common::Error::io(path.display(), &e)),
    }
}
