//! A block store of the bench's own, in folders that go with it.

use forebay_common::Result;
use forebay_common::config::{EvictPolicy, TierConfig, WorkerConfig};
use forebay_common::error::at;
use forebay_worker::store::BlockStore;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Folders that are unmounted and removed with it.
pub struct Folder {
    path: PathBuf,
    others: Mutex<Vec<PathBuf>>,
}

impl Folder {
    /// Below the folder for temporary files.
    pub fn new(name: &str) -> Result<Folder> {
        Folder::below(&std::env::temp_dir(), name)
    }

    /// Below `parent`.
    pub fn below(parent: &Path, name: &str) -> Result<Folder> {
        let path = parent.join(format!("forebay-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(at(path.display()))?;
        Ok(Folder { path, others: Mutex::default() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder of its own elsewhere.
    pub fn beside(&self, parent: &Path, name: &str) -> PathBuf {
        let outer = parent.join(format!("forebay-bench-{}", std::process::id()));
        let mut others = self.others.lock().unwrap_or_else(|e| e.into_inner());
        if !others.contains(&outer) {
            others.push(outer.clone());
        }
        outer.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let others = std::mem::take(&mut *self.others.lock().unwrap_or_else(|e| e.into_inner()));
        for folder in others.iter().chain([&self.path]) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                while nix::mount::umount2(&entry.path(), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
            }
            // The evictor of a store that was just dropped may be at its last move.
            let mut removed = std::fs::remove_dir_all(folder);
            for _ in 0..100 {
                if removed.as_ref().is_ok_and(|()| !folder.exists()) || removed.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
                removed = std::fs::remove_dir_all(folder);
            }
            if folder.exists() {
                eprintln!("forebay: {} stays behind: {removed:?}", folder.display());
            }
        }
    }
}

/// A store with these tiers.
pub fn store_of(folder: &Folder, tiers: Vec<TierConfig>, evict_policy: EvictPolicy, promote_after: u32) -> Result<Arc<BlockStore>> {
    for dir in tiers.iter().flat_map(|t| &t.dirs) {
        std::fs::create_dir_all(&dir.path).map_err(at(dir.path.display()))?;
    }
    let config = WorkerConfig { tiers, evict_policy, promote_after, data_dir: folder.path().join("data"), ..WorkerConfig::default() };
    let mut tries = 0;
    loop {
        match BlockStore::open(&config) {
            // A store that was just dropped may still be let go by its evictor.
            Err(e) if e.kind() == forebay_common::ErrorKind::Busy && tries < 100 => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            other => return other.inspect(|store| store.join_unnamed()),
        }
    }
}
