//! Taking over what an earlier process left: names at once, headers when a block is asked for or in the background.
//!
//! Reading a million headers takes a while, reading as many names a second or two: a worker serves as soon as it knows the
//! names. A file without its pair is what a crash left of a block under construction, and is removed.

use super::block_file::paths;
use super::dir::Dir;
use forebay_common::error::at;
use forebay_common::{BlockId, Result, err};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What the folder holds, and in which version. Beside it, each block's header has a version of its own.
const FORMAT: &str = "forebay blocks 1\n";

/// Threads that read the names in a folder: a disk answers many questions at once.
const SCANNERS: usize = 8;

/// How the names of files end that were set aside.
const DAMAGED: &str = "damaged";

/// Blocks of which only names and sizes are known yet. What their files occupy is in their folder's accounting already.
#[derive(Default)]
pub struct Unread {
    blocks: Mutex<Blocks>,
    left: AtomicUsize,
}

#[derive(Default)]
struct Blocks {
    places: HashMap<BlockId, Place>,
    /// In the order in which they are read: the fastest tier first.
    order: VecDeque<BlockId>,
}

/// Where a block is, and what was charged for it.
#[derive(Clone)]
pub struct Place {
    pub dir: Arc<Dir>,
    pub charged_bytes: u64,
}

impl Unread {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Where a block is that nobody has read yet; whoever gets the answer reads it, and releases what was charged.
    pub fn take(&self, id: BlockId) -> Option<Place> {
        if self.left.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut blocks = self.blocks();
        let place = blocks.places.remove(&id);
        self.left.store(blocks.places.len(), Ordering::Release);
        place
    }

    /// It could not be read this time.
    pub fn put_back(&self, id: BlockId, place: Place) {
        let mut blocks = self.blocks();
        blocks.places.insert(id, place);
        self.left.store(blocks.places.len(), Ordering::Release);
    }

    /// The next ones to be read. Each is named once: one that cannot be read waits until it is asked for.
    pub fn next(&self, count: usize) -> Vec<BlockId> {
        let mut blocks = self.blocks();
        let count = count.min(blocks.order.len());
        blocks.order.drain(..count).collect()
    }

    /// Reads the names in a folder. Errors: another version of Forebay wrote it.
    pub fn scan(&self, dir: &Arc<Dir>) -> Result<()> {
        check_format(dir.path())?;
        let shards: Vec<PathBuf> = std::fs::read_dir(dir.path()).map_err(at(dir.path().display()))?.flatten().map(|shard| shard.path()).collect();
        let per_thread = shards.len().div_ceil(SCANNERS).max(1);
        let (found, half): (Vec<Vec<(BlockId, u64)>>, Vec<u64>) = std::thread::scope(|scope| {
            let scanners: Vec<_> = shards.chunks(per_thread).map(|shards| scope.spawn(|| scan_shards(dir.path(), shards))).collect();
            scanners.into_iter().map(|scanner| scanner.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).unzip()
        });
        let mut removed: u64 = half.iter().sum();
        let mut blocks = self.blocks();
        for (id, charged_bytes) in found.into_iter().flatten() {
            if blocks.places.contains_key(&id) {
                // It was being moved when the worker stopped: the copy in the faster tier stays.
                removed += 1;
                let (data, head) = paths(dir.path(), id);
                let _ = (std::fs::remove_file(data), std::fs::remove_file(head));
                continue;
            }
            dir.charge(charged_bytes);
            blocks.places.insert(id, Place { dir: dir.clone(), charged_bytes });
            blocks.order.push_back(id);
        }
        self.left.store(blocks.places.len(), Ordering::Release);
        tracing::info!(dir = %dir.path().display(), blocks = blocks.places.len(), removed, "names of an earlier start's blocks are read");
        Ok(())
    }
}

/// The blocks in some folders of a tier's folder with what their files occupy; and how many files without their pair were removed.
fn scan_shards(dir: &Path, shards: &[PathBuf]) -> (Vec<(BlockId, u64)>, u64) {
    let (mut found, mut removed) = (Vec::new(), 0);
    for shard in shards {
        let Ok(files) = std::fs::read_dir(shard) else { continue };
        let names: HashSet<String> = files.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect();
        for name in &names {
            let Some((stem, extension)) = name.split_once('.').filter(|(_, e)| !e.ends_with(DAMAGED)) else { continue };
            let Some(id) = u64::from_str_radix(stem, 16).ok().map(BlockId) else { continue };
            let whole = names.contains(&format!("{stem}.data")) && names.contains(&format!("{stem}.head"));
            if !whole {
                removed += 1;
                let _ = std::fs::remove_file(shard.join(name));
            } else if extension == "head" {
                let (data, head) = paths(dir, id);
                found.push((id, [data, head].iter().map(|f| f.metadata().map_or(0, |m| m.blocks() * 512)).sum()));
            }
        }
    }
    (found, removed)
}

/// Sets the files of a block aside that cannot be read and may be the only ones: for a person to look at.
pub fn set_aside(dir: &Dir, id: BlockId) {
    let (data, head) = paths(dir.path(), id);
    for path in [data, head] {
        let mut aside = path.clone().into_os_string();
        aside.push(format!(".{DAMAGED}"));
        let _ = std::fs::rename(&path, aside);
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
        // Whole or not there, whatever happens: a part of it would be another version's.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let temporary = dir.join("FORMAT.tmp");
            let write = || {
                std::fs::write(&temporary, FORMAT)?;
                File::open(&temporary)?.sync_all()?;
                std::fs::rename(&temporary, &path)?;
                File::open(dir)?.sync_all()
            };
            write().map_err(at(path.display()))
        }
        Err(e) => Err(forebay_common::Error::io(path.display(), &e)),
    }
}
