//! The block store against a simple model: random writes, reads, pins, removals, restarts, flipped bits and full disks.
//!
//! In a process of its own, because it counts descriptors and mappings.

use forebay_common::block_header::{FLAG_ONLY_COPY, Header};
use forebay_common::config::{EvictPolicy, Medium, MemMount, TierConfig, TierDir, WorkerConfig};
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{BlockId, ErrorKind, InodeId, checksum};
use forebay_tests::{pattern, rng};
use forebay_worker::store::{BlockFile, BlockStore, paths};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: u64 = 64 << 10;
const BLOCKS: u64 = 300;
const ONLY_COPIES_MAX: usize = 24;
const FIRST_ONLY_COPY: u64 = 1_000_000;

/// A small file system of its own for the SSD tier, so that it can be full; the plain folder where that is not possible.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path) -> SmallDisk {
        std::fs::create_dir_all(path).unwrap();
        let flags = nix::mount::MsFlags::empty();
        if let Err(e) = nix::mount::mount(Some("small"), path, Some("tmpfs"), flags, Some("size=24m")) {
            eprintln!("no small disk here ({e}): full disks are left out of this run");
        }
        SmallDisk(path.to_owned())
    }

    /// Takes what is free, or gives it back.
    fn set_full(&self, full: bool) {
        let ballast = self.0.join("ballast");
        let _ = std::fs::remove_file(&ballast);
        if full && let Ok(file) = File::create(&ballast) {
            let piece = vec![1; 64 << 10];
            let mut at = 0;
            while at < 64 << 20 && file.write_all_at(&piece, at).is_ok() {
                at += piece.len() as u64;
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        for path in [self.0.join("tier.ro"), self.0.clone()] {
            while nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        }
    }
}

struct Model {
    config: WorkerConfig,
    store: Option<Arc<BlockStore>>,
    rng: StdRng,
    /// Blocks whose bytes are nowhere else: they must be there, whole.
    only_copies: BTreeMap<u64, u64>,
    /// Pinned blocks with the pages they had then.
    pinned: BTreeMap<u64, BTreeSet<usize>>,
    /// Only copies with a flipped bit: an error is as good as their bytes.
    damaged: BTreeSet<u64>,
    next_only_copy: u64,
}

fn header(id: u64, flags: u32) -> Header {
    let length_bytes = 1 + (id * 48_611) % (5 * PAGE);
    Header { block: BlockId(id), file: InodeId(1), length_bytes, page_size_bytes: PAGE, flags }
}

fn page_bytes(header: &Header, page: usize) -> Vec<u8> {
    let (offset, length) = header.page_span(page);
    pattern(header.block.get(), offset, length)
}

impl Model {
    fn store(&self) -> &Arc<BlockStore> {
        self.store.as_ref().expect("open")
    }

    fn open(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        self.store = loop {
            match BlockStore::open(&self.config) {
                Ok(store) => {
                    store.join_cluster("CID-1").expect("a name");
                    break Some(store);
                }
                Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("{e}"),
            }
        };
    }

    fn fill(&mut self) {
        let header = header(self.rng.random_range(1..=BLOCKS), 0);
        let block = match self.store().get_or_create(header.clone()) {
            Ok(block) => block,
            Err(e) => return assert!(matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Busy | ErrorKind::Unavailable), "{e}"),
        };
        let page = self.rng.random_range(0..header.pages());
        match self.store().fill_page(&block, page, &page_bytes(&header, page)) {
            Ok(()) => assert!(block.has_page(page)),
            // No room, or evicted to make room.
            Err(e) => assert!(matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Unavailable), "{e}"),
        }
    }

    /// A whole small block at once, over whatever of it is there.
    fn store_whole(&mut self) {
        let header = header(self.rng.random_range(1..=BLOCKS), 0);
        if header.pages() > 1 {
            return;
        }
        match self.store().store_whole(header.clone(), &page_bytes(&header, 0)) {
            Ok(()) => {}
            Err(e) => assert!(matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Busy | ErrorKind::Unavailable), "{e}"),
        }
    }

    fn read(&mut self) {
        let id = match self.only_copies.len() {
            n if n > 0 && self.rng.random_bool(0.2) => *self.only_copies.keys().nth(self.rng.random_range(0..n)).unwrap(),
            _ => self.rng.random_range(1..=BLOCKS),
        };
        let Some(block) = self.store().get(BlockId(id)) else {
            assert!(!self.only_copies.contains_key(&id) || self.damaged.contains(&id), "only copy {id} is lost");
            return assert!(self.pinned.remove(&id).is_none() || self.damaged.contains(&id), "pinned block {id} is gone");
        };
        if self.only_copies.contains_key(&id) {
            assert!(block.is_full() || self.damaged.contains(&id), "only copy {id} has lost pages");
        }
        if let Some(pages) = self.pinned.get(&id) {
            assert!(pages.iter().all(|p| block.has_page(*p)), "pinned block {id} has lost pages");
        }
        for page in (0..block.header.pages()).filter(|p| block.has_page(*p)) {
            let (offset, length) = block.header.page_span(page);
            let chunks = offset as usize / CHUNK_SIZE_BYTES..(offset as usize + length).div_ceil(CHUNK_SIZE_BYTES);
            let read = chunks.into_iter().try_for_each(|c| block.verify_chunk(c)).and_then(|()| block.bytes(offset, length));
            match read {
                Ok(bytes) => assert!(bytes == page_bytes(&block.header, page), "wrong bytes in page {page} of block {id}"),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
                    assert!(self.damaged.contains(&id), "block {id} has a wrong checksum, and nobody damaged it: {e}");
                    self.pinned.remove(&id);
                    self.store().note_read_error(&block, &e);
                    assert!(self.store().has(BlockId(id)) == self.only_copies.contains_key(&id), "a bad block goes, an only copy stays");
                    return;
                }
            }
        }
    }

    fn seal(&mut self) {
        if self.only_copies.len() >= ONLY_COPIES_MAX {
            let id = *self.only_copies.keys().nth(self.rng.random_range(0..ONLY_COPIES_MAX)).unwrap();
            self.store().remove(BlockId(id));
            self.only_copies.remove(&id);
            self.damaged.remove(&id);
            return assert!(!self.store().has(BlockId(id)));
        }
        self.next_only_copy += 1;
        let header = header(self.next_only_copy, FLAG_ONLY_COPY);
        let Ok(dir) = self.store().choose(header.length_bytes) else { return };
        if self.store().reserve(&dir, header.length_bytes).is_err() {
            return;
        }
        let bytes = pattern(header.block.get(), 0, header.length_bytes as usize);
        let (data, _) = paths(dir.path(), header.block);
        std::fs::create_dir_all(data.parent().unwrap()).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(&data).unwrap();
        let crcs: Vec<u32> = checksum::chunk_crcs(&bytes).collect();
        let sealed = file.write_all_at(&bytes, 0).map_err(|_| ()).and_then(|()| BlockFile::seal(&dir, header.clone(), file, &crcs).map_err(|_| ()));
        dir.release(header.length_bytes);
        match sealed {
            Ok(sealed) => {
                self.store().insert(Arc::new(sealed)).unwrap();
                self.only_copies.insert(header.block.get(), header.length_bytes);
            }
            // The disk was full: whoever writes a block removes what it left.
            Err(()) => forebay_worker::store::remove_files(&dir, header.block),
        }
    }

    fn pin(&mut self) {
        let id = self.rng.random_range(1..=BLOCKS);
        if self.pinned.remove(&id).is_some() {
            return self.store().set_pinned(BlockId(id), false);
        }
        if self.pinned.len() < 10
            && let Some(block) = self.store().get(BlockId(id))
        {
            self.store().set_pinned(BlockId(id), true);
            // It may have been evicted, or moved, in between: then the next look decides.
            let now = self.store().get(BlockId(id));
            if now.is_some_and(|now| Arc::ptr_eq(&now, &block)) {
                self.pinned.insert(id, (0..block.header.pages()).filter(|p| block.has_page(*p)).collect());
            } else {
                self.store().set_pinned(BlockId(id), false);
            }
        }
    }

    fn remove(&mut self) {
        let id = self.rng.random_range(1..=BLOCKS);
        self.pinned.remove(&id);
        self.store().remove(BlockId(id));
        assert!(!self.store().has(BlockId(id)));
    }

    fn files(&self) -> Vec<PathBuf> {
        let dirs = self.config.tiers.iter().flat_map(|t| &t.dirs).map(|d| d.path.join("blocks"));
        dirs.flat_map(|d| std::fs::read_dir(d).unwrap().flatten().collect::<Vec<_>>())
            .filter_map(|shard| std::fs::read_dir(shard.path()).ok())
            .flat_map(|files| files.flatten().map(|f| f.path()).collect::<Vec<_>>())
            .filter(|f| f.extension().is_some_and(|e| e != "damaged"))
            .collect()
    }

    /// As after a crash: nothing is said goodbye to, bits may have flipped, half a block may lie about.
    fn restart(&mut self) {
        self.store = None;
        self.pinned.clear();
        let files = self.files();
        for _ in 0..self.rng.random_range(0..4) {
            // Before anything was stored there is nothing to be damaged.
            let Some(path) = files.choose(&mut self.rng) else { break };
            let Ok(file) = File::options().read(true).write(true).open(path) else { continue };
            let bit = self.rng.random_range(0..file.metadata().unwrap().len().max(1) * 8);
            let mut byte = [0];
            // In a hole of a file on a full disk no bit can flip.
            if file.read_exact_at(&mut byte, bit / 8).is_ok() && file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).is_ok() {
                let name = path.file_stem().unwrap().to_string_lossy().into_owned();
                self.damaged.insert(u64::from_str_radix(&name, 16).unwrap());
            }
        }
        let (data, _) = paths(&self.config.tiers[0].dirs[0].path.join("blocks"), BlockId(77_000_000));
        std::fs::create_dir_all(data.parent().unwrap()).unwrap();
        std::fs::write(data, "half of a block").unwrap();
        self.open();
        if self.rng.random_bool(0.5) {
            while self.store().adopt_some() > 0 {}
        }
    }

    /// Once the evictor is at rest the accounting is what `du` finds.
    fn check_accounting(&self) {
        while self.store().adopt_some() > 0 {}
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            self.store().reap();
            let found: Vec<u64> = self
                .config
                .tiers
                .iter()
                .flat_map(|t| &t.dirs)
                .map(|d| {
                    let below = d.path.join("blocks");
                    self.files().iter().filter(|f| f.starts_with(&below)).filter_map(|f| f.metadata().ok()).map(|m| m.blocks() * 512).sum()
                })
                .collect();
            let counted: Vec<u64> = self.store().usage().iter().flat_map(|t| t.dirs.iter().map(|d| d.used_bytes).collect::<Vec<_>>()).collect();
            if found == counted {
                let quotas = self.config.tiers.iter().flat_map(|t| &t.dirs).map(|d| d.quota.as_u64());
                return assert!(counted.iter().zip(quotas).all(|(used, quota)| *used <= quota + (2 << 20)), "{counted:?}");
            }
            assert!(Instant::now() < deadline, "du finds {found:?}, the accounting says {counted:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// (S-17, S-18) Same bytes as the model, nothing lost that must stay, accounting as `du` finds it, no file, descriptor or mapping
/// left behind.
#[test]
fn follows_the_model() {
    let operations: u64 = std::env::var("FOREBAY_TEST_OPERATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let mut rng = rng("follows_the_model");
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&dir.path().join("ssd"));
    let before = descriptors();
    for policy in [EvictPolicy::S3Fifo, EvictPolicy::Lru, EvictPolicy::Lfu] {
        let tier = |medium: Medium, path: PathBuf, quota: u64| TierConfig {
            medium,
            dirs: vec![TierDir { path, quota: bytesize::ByteSize::b(quota), reserve: bytesize::ByteSize::b(0) }],
        };
        let config = WorkerConfig {
            tiers: vec![
                tier(Medium::Mem, dir.path().join("mem"), 8 << 20),
                tier(Medium::Ssd, dir.path().join("ssd/tier"), 12 << 20),
                tier(Medium::Hdd, dir.path().join("hdd"), 10 << 20),
            ],
            mem_mount: MemMount::Never,
            evict_policy: policy,
            blocks_max: 64,
            ..WorkerConfig::default()
        };
        let mut model = Model {
            config,
            store: None,
            rng: rand::SeedableRng::seed_from_u64(rng.random()),
            only_copies: BTreeMap::new(),
            pinned: BTreeMap::new(),
            damaged: BTreeSet::new(),
            next_only_copy: FIRST_ONLY_COPY,
        };
        model.open();
        let (mut full, mut restarts) = (false, 0);
        for n in 0..operations / 3 {
            match model.rng.random_range(0..10_000) {
                0..3_000 => model.fill(),
                3_000..3_500 => model.store_whole(),
                3_500..8_500 => model.read(),
                8_500..8_900 => model.seal(),
                8_900..9_400 => model.pin(),
                9_400..9_900 => model.remove(),
                9_900..9_910 => {
                    full = !full;
                    disk.set_full(full);
                }
                9_910..9_930 => {
                    model.restart();
                    restarts += 1;
                }
                9_930..9_950 => model.check_accounting(),
                _ => drop(model.store().take_changed(50)),
            }
            if n % 1_000 == 0 {
                model.store().reap();
            }
        }
        disk.set_full(false);
        model.check_accounting();
        let usage: Vec<String> = model.store().usage().iter().map(|t| format!("{} {} blocks", t.tier, t.blocks)).collect();
        eprintln!("{policy:?}: {} operations, {restarts} restarts, {} only copies, {}", operations / 3, model.only_copies.len(), usage.join(", "));
        model.store = None;
        let deadline = Instant::now() + Duration::from_secs(20);
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|l| l.contains(&*dir.path().to_string_lossy())).count();
        while descriptors() > before || maps() > 0 {
            assert!(Instant::now() < deadline, "{} descriptors instead of {before}, {} mappings", descriptors(), maps());
            std::thread::sleep(Duration::from_millis(5));
        }
        for name in ["mem", "ssd/tier", "hdd"] {
            let path = dir.path().join(name);
            while nix::mount::umount2(
                &path.with_file_name(format!("{}.ro", path.file_name().unwrap().to_string_lossy())),
                nix::mount::MntFlags::MNT_DETACH,
            )
            .is_ok()
            {}
            std::fs::remove_dir_all(&path).unwrap();
        }
    }
}
