//! `Neighbours`: folders that are read through. Who opens the files of a folder in their order finds the next ones cached, or on their way.
//!
//! Told by `mount` what a listing shows and by `opening` what is opened for reading. Only small files are fetched ahead, only of folders that were listed lately, and not where what was fetched
//! ahead was cached already. Invariants: what is remembered and what is under way is bounded; an open waits for nothing here; what fails is met again by whoever opens the file.

use forebay_client::FileSystem;
use forebay_common::{AbsPath, Result, counter};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use tokio::sync::Semaphore;

counter!(FETCHED, "forebay_fuse_neighbours_fetched_total", "files that were fetched because those before them in their folder were read");

/// Folders that are remembered.
const FOLDERS_MAX: usize = 64;
/// Names of one of them; what comes later is not fetched ahead.
const NAMES_MAX: usize = 16_384;
/// Larger files have their bytes fetched ahead by themselves.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Opens in order after which it is believed that they go on.
const IN_ORDER: u32 = 3;
/// Names between two that still are in order: others may have been left out.
const GAP_MAX: usize = 4;
/// Files on their way at once.
const UNDER_WAY_MAX: usize = 8;
/// Files in a row that were cached already, after which none are fetched ahead.
const WARM: u32 = 4;

struct Listed {
    /// As the namespace lists them: in order.
    names: Vec<Box<[u8]>>,
    used: Instant,
    /// Which was opened last, and how many before it in order.
    last: usize,
    in_order: u32,
    /// Up to which they were fetched ahead.
    ahead: usize,
    /// How many in a row were cached already.
    warm: u32,
}

pub struct Neighbours {
    folders: Mutex<HashMap<u64, Listed>>,
    under_way: Arc<Semaphore>,
}

impl Default for Neighbours {
    fn default() -> Self {
        Neighbours { folders: Mutex::default(), under_way: Arc::new(Semaphore::new(UNDER_WAY_MAX)) }
    }
}

impl Neighbours {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Listed>> {
        self.folders.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A listing of a folder begins.
    pub fn begun(&self, folder: u64) {
        let mut folders = self.lock();
        if folders.len() >= FOLDERS_MAX
            && !folders.contains_key(&folder)
            && let Some(oldest) = folders.iter().min_by_key(|(_, listed)| listed.used).map(|(id, _)| *id)
        {
            folders.remove(&oldest);
        }
        folders.insert(folder, Listed { names: Vec::new(), used: Instant::now(), last: 0, in_order: 0, ahead: 0, warm: 0 });
    }

    /// It shows files of these lengths.
    pub fn listed<'a>(&self, folder: u64, files: impl Iterator<Item = (&'a [u8], u64)>) {
        let mut folders = self.lock();
        let Some(listed) = folders.get_mut(&folder) else { return };
        let small = files.filter(|(_, length)| (1..=FILE_MAX_BYTES).contains(length)).map(|(name, _)| name);
        for name in small {
            // Told again, or more than is remembered.
            if listed.names.len() >= NAMES_MAX || listed.names.last().is_some_and(|last| **last >= *name) {
                continue;
            }
            listed.names.push(name.into());
        }
    }

    /// A file is opened for reading. Returns the names of those that are to be fetched, at most `ahead` files before it.
    fn opened(&self, folder: u64, name: &[u8], ahead: usize) -> Vec<Box<[u8]>> {
        let mut folders = self.lock();
        let Some(listed) = folders.get_mut(&folder) else { return Vec::new() };
        let Ok(at) = listed.names.binary_search_by(|other| (**other).cmp(name)) else { return Vec::new() };
        listed.used = Instant::now();
        let follows = at == 0 || (listed.last < at && at <= listed.last + GAP_MAX);
        listed.in_order = if follows { listed.in_order + 1 } else { 0 };
        listed.last = at;
        if !follows {
            (listed.ahead, listed.warm) = (0, 0);
        }
        if listed.in_order < IN_ORDER || listed.warm >= WARM {
            return Vec::new();
        }
        let from = listed.ahead.max(at + 1);
        let to = (at + 1 + ahead).min(listed.names.len());
        listed.ahead = listed.ahead.max(to);
        listed.names.get(from..to).unwrap_or_default().to_vec()
    }

    fn note(&self, folder: u64, was_cached: bool) {
        if let Some(listed) = self.lock().get_mut(&folder) {
            listed.warm = if was_cached { listed.warm + 1 } else { 0 };
        }
    }

    /// A file is opened for reading: those behind it are fetched where their folder is being read through.
    pub fn read(self: &Arc<Self>, fs: &FileSystem, folder: u64, path: &AbsPath, ahead: usize) {
        let (Some(name), Some(above)) = (path.name(), path.parent()) else { return };
        for next in self.opened(folder, name, ahead) {
            // As many as there is room for: who reads faster than that fetches by itself.
            let Ok(permit) = self.under_way.clone().try_acquire_owned() else { return };
            let (neighbours, fs, path) = (self.clone(), fs.clone(), above.join(&next));
            tokio::spawn(async move {
                let done: Result<bool> = async {
                    let reader = fs.open(&path?).await?;
                    let cached = reader.is_cached();
                    if !cached {
                        reader.load(|_| ()).await?;
                        FETCHED.inc();
                    }
                    Ok(cached)
                }
                .await;
                match done {
                    Ok(cached) => neighbours.note(folder, cached),
                    Err(e) => tracing::debug!(error = %e, "a neighbour was not fetched"),
                }
                drop(permit);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(of: &[Box<[u8]>]) -> Vec<String> {
        of.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }

    #[test]
    fn those_that_come_next_in_order() {
        let neighbours = Neighbours::default();
        neighbours.begun(1);
        let all: Vec<String> = (0..20).map(|i| format!("f{i:02}")).collect();
        neighbours.listed(1, all.iter().map(|name| (name.as_bytes(), 10)));
        neighbours.listed(1, [(&b"g-empty"[..], 0), (b"h-large", FILE_MAX_BYTES + 1)].into_iter());
        let opened = |name: &str| names(&neighbours.opened(1, name.as_bytes(), 4));
        assert!(opened("f00").is_empty() && opened("f01").is_empty());
        assert_eq!(opened("f02"), ["f03", "f04", "f05", "f06"]);
        assert_eq!(opened("f03"), ["f07"], "each is fetched once");
        assert_eq!(opened("f05"), ["f08", "f09"], "one may be left out");
        assert!(opened("f18").is_empty() && opened("f07").is_empty(), "not in order");
        assert!(opened("unknown").is_empty() && names(&neighbours.opened(2, b"f00", 4)).is_empty());
        // What is cached is not asked for on and on.
        (0..WARM).for_each(|_| neighbours.note(1, true));
        assert!(opened("f08").is_empty() && opened("f09").is_empty() && opened("f10").is_empty() && opened("f11").is_empty());
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let neighbours = Neighbours::default();
        for folder in 0..FOLDERS_MAX as u64 + 5 {
            neighbours.begun(folder);
        }
        assert_eq!(neighbours.lock().len(), FOLDERS_MAX);
        let last = FOLDERS_MAX as u64 + 4;
        let many: Vec<String> = (0..NAMES_MAX + 100).map(|i| format!("{i:08}")).collect();
        neighbours.listed(last, many.iter().map(|name| (name.as_bytes(), 1)));
        assert_eq!(neighbours.lock()[&last].names.len(), NAMES_MAX);
    }
}
