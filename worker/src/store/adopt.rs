//! Taking over what an earlier process left: names at once, headers when a block is asked for or in the background.
//!
//! Reading a million headers takes a while, reading as many names a second or two: a worker serves as soon as it knows the
//! names. A file without its pair is what a crash left of a block under construction, and is removed; data with a log beside them are a block that somebody
//! may go on with.

use super::block_file::{BlockFile, open_path, paths};
use super::cluster;
use super::dir::Dir;
use forebay_common::error::at;
use forebay_common::{BlockId, ErrorKind, Result, err};
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
    /// Those that were being written.
    open: HashMap<BlockId, Place>,
    /// Of another cluster than a block of the same number that is here as well: left as they are.
    others: Vec<(BlockId, Place)>,
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

    /// The same of one that was being written.
    pub fn take_open(&self, id: BlockId) -> Option<Place> {
        self.blocks().open.remove(&id)
    }

    /// It could not be taken over this time.
    pub fn put_open_back(&self, id: BlockId, place: Place) {
        self.blocks().open.insert(id, place);
    }

    /// Those that were being written.
    pub fn open(&self) -> Vec<BlockId> {
        self.blocks().open.keys().copied().collect()
    }

    /// It could not be read this time.
    pub fn put_back(&self, id: BlockId, place: Place) {
        let mut blocks = self.blocks();
        blocks.places.insert(id, place);
        self.left.store(blocks.places.len(), Ordering::Release);
    }

    /// Those in a folder whose headers nobody has read.
    pub fn whole_in(&self, dir: &Arc<Dir>) -> Vec<BlockId> {
        self.blocks().places.iter().filter(|(_, place)| Arc::ptr_eq(&place.dir, dir)).map(|(id, _)| *id).collect()
    }

    /// How many are in a folder.
    pub fn count_in(&self, dir: &Arc<Dir>) -> usize {
        let blocks = self.blocks();
        let here = |place: &&Place| Arc::ptr_eq(&place.dir, dir);
        blocks.places.values().chain(blocks.open.values()).chain(blocks.others.iter().map(|(_, place)| place)).filter(here).count()
    }

    /// Takes all of a folder out; whoever gets the answer removes them, and releases what was charged.
    pub fn take_all_in(&self, dir: &Arc<Dir>) -> Vec<(BlockId, Place)> {
        let mut blocks = self.blocks();
        let blocks = &mut *blocks;
        let here = |place: &Place| Arc::ptr_eq(&place.dir, dir);
        let mut taken: Vec<(BlockId, Place)> = blocks.places.extract_if(|_, place| here(place)).collect();
        taken.extend(blocks.open.extract_if(|_, place| here(place)));
        taken.extend(blocks.others.extract_if(.., |(_, place)| here(place)));
        self.left.store(blocks.places.len(), Ordering::Release);
        taken
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
        dir.set_cluster(cluster::read(dir.path())?);
        let shards: Vec<PathBuf> = std::fs::read_dir(dir.path()).map_err(at(dir.path().display()))?.flatten().map(|shard| shard.path()).collect();
        let per_thread = shards.len().div_ceil(SCANNERS).max(1);
        let found: Vec<Scanned> = std::thread::scope(|scope| {
            let scanners: Vec<_> = shards.chunks(per_thread).map(|shards| scope.spawn(|| scan_shards(dir, shards))).collect();
            scanners.into_iter().map(|scanner| scanner.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let mut removed: u64 = found.iter().map(|scanned| scanned.removed).sum();
        let mut blocks = self.blocks();
        for (id, charged_bytes, open) in found.into_iter().flat_map(|scanned| scanned.blocks) {
            let known = blocks.places.get(&id).or_else(|| blocks.open.get(&id));
            if known.is_some_and(|known| known.dir.cluster() != dir.cluster()) {
                dir.charge(charged_bytes);
                blocks.others.push((id, Place { dir: dir.clone(), charged_bytes }));
                continue;
            }
            let remove = |dir: &Dir| {
                let (data, head) = paths(dir.path(), id);
                for path in [open_path(dir.path(), id), data, head] {
                    let _ = std::fs::remove_file(path);
                }
            };
            // It was being moved when the worker stopped: the copy in the faster tier stays; but one that was ended is newer than one that was not.
            if blocks.places.contains_key(&id) || (open && blocks.open.contains_key(&id)) {
                removed += 1;
                remove(dir);
                continue;
            }
            if let Some(older) = blocks.open.remove(&id) {
                removed += 1;
                older.dir.release(older.charged_bytes);
                remove(&older.dir);
            }
            dir.charge(charged_bytes);
            let place = Place { dir: dir.clone(), charged_bytes };
            if open {
                blocks.open.insert(id, place);
            } else {
                blocks.places.insert(id, place);
                blocks.order.push_back(id);
            }
        }
        self.left.store(blocks.places.len(), Ordering::Release);
        let (whole, open) = (blocks.places.len(), blocks.open.len());
        tracing::info!(dir = %dir.path().display(), blocks = whole, open, removed, "names of an earlier start's blocks are read");
        Ok(())
    }
}

/// What is in some folders of a tier's folder.
#[derive(Default)]
struct Scanned {
    /// Ids, what their files occupy, and whether they were being written.
    blocks: Vec<(BlockId, u64, bool)>,
    /// Files without their pair, which were removed.
    removed: u64,
}

fn scan_shards(dir: &Arc<Dir>, shards: &[PathBuf]) -> Scanned {
    let mut scanned = Scanned::default();
    for shard in shards {
        let Ok(files) = std::fs::read_dir(shard) else { continue };
        let names: HashSet<String> = files.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect();
        for name in &names {
            let Some((stem, extension)) = name.split_once('.').filter(|(_, e)| !e.ends_with(DAMAGED)) else { continue };
            let Some(id) = u64::from_str_radix(stem, 16).ok().map(BlockId) else { continue };
            if super::is_joined(id) {
                scanned.removed += 1;
                let _ = std::fs::remove_file(shard.join(name));
                continue;
            }
            let has = |extension: &str| names.contains(&format!("{stem}.{extension}"));
            let (whole, open) = (has("data") && has("head"), has("data") && has("open"));
            let occupied = |files: [PathBuf; 2]| files.iter().map(|f| f.metadata().map_or(0, |m| m.blocks() * 512)).sum();
            let (data, head) = paths(dir.path(), id);
            match extension {
                "open" if open && !(whole && is_sealed(dir, id)) => {
                    scanned.blocks.push((id, occupied([data, shard.join(name)]), true));
                }
                // Looked at beside its log.
                "head" if whole && open => {}
                "head" if whole => scanned.blocks.push((id, occupied([data, head]), false)),
                "open" if open => scanned.blocks.push((id, occupied([data, head]), false)),
                "data" if whole || open => {}
                _ => {
                    scanned.removed += 1;
                    let _ = std::fs::remove_file(shard.join(name));
                }
            }
        }
    }
    scanned
}

/// Whether a block with a header and a log was ended: then the log is in the way, else the header.
fn is_sealed(dir: &Arc<Dir>, id: BlockId) -> bool {
    let sealed = BlockFile::adopt(dir, id, None).and_then(|file| if file.is_full() { file.verify_all() } else { Err(err!(Corrupt, "in part")) });
    match sealed {
        Ok(()) => drop(std::fs::remove_file(open_path(dir.path(), id))),
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            let (_, head) = paths(dir.path(), id);
            let _ = std::fs::remove_file(head);
            return false;
        }
        // Not to be read now, or by this version: it stays as it is, for later.
        Err(e) => tracing::warn!(block = %id, error = %e, "whether a block was ended is not known yet"),
    }
    true
}

/// Sets the files of a block aside that cannot be read and may be the only ones: for a person to look at.
pub fn set_aside(dir: &Dir, id: BlockId) {
    let (data, head) = paths(dir.path(), id);
    for path in [data, head, open_path(dir.path(), id)] {
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
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => write_whole(dir, "FORMAT", FORMAT),
        Err(e) => Err(forebay_common::Error::io(path.display(), &e)),
    }
}

/// Writes a file of a folder that is whole or not there, whatever happens: a part of it would be something else.
pub fn write_whole(dir: &Path, name: &str, text: &str) -> Result<()> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}.tmp")));
    let write = || {
        std::fs::write(&temporary, text)?;
        File::open(&temporary)?.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(at(path.display()))
}
