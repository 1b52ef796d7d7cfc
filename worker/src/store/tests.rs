use super::*;
use forebay_common::block_header::FLAG_ONLY_COPY;
use forebay_common::config::{Medium, MemMount, TierConfig, TierDir, WorkerConfig};
use forebay_common::{InodeId, MountId, checksum};
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// A folder whose read-only mounts go with it.
struct TestDir(tempfile::TempDir);

impl TestDir {
    fn new() -> TestDir {
        TestDir(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.path()).into_iter().flatten().flatten() {
            while nix::mount::umount2(&entry.path(), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        }
    }
}

const PAGE: u64 = 64 << 10;

fn config(dir: &std::path::Path, quota: u64) -> WorkerConfig {
    WorkerConfig { mem_dir: dir.join("mem"), mem_quota: bytesize(quota), mem_mount: MemMount::Never, ..WorkerConfig::default() }
}

fn open(dir: &std::path::Path, quota: u64) -> Arc<BlockStore> {
    admitted(BlockStore::open(&config(dir, quota)).unwrap())
}

/// As after a registration.
fn admitted(store: Arc<BlockStore>) -> Arc<BlockStore> {
    store.join_cluster("CID-1").unwrap();
    store
}

fn bytesize(bytes: u64) -> bytesize::ByteSize {
    bytesize::ByteSize::b(bytes)
}

fn header(id: u64, length: u64) -> Header {
    Header { block: BlockId(id), file: InodeId(1), length_bytes: length, page_size_bytes: PAGE, flags: 0 }
}

/// (S-18) What a restart finds is believed by its checksums.
#[test]
fn a_page_is_there_after_a_restart_and_a_flipped_bit_is_noticed() {
    let dir = TestDir::new();
    let bytes: Vec<u8> = (0..PAGE as usize * 2 + 100).map(|i| (i * 7) as u8).collect();
    {
        let store = open(dir.path(), 8 << 20);
        let block = store.get_or_create(header(5, bytes.len() as u64)).unwrap();
        store.fill_page(&block, 0, &bytes[..PAGE as usize]).unwrap();
        store.fill_page(&block, 2, &bytes[2 * PAGE as usize..]).unwrap();
        assert_eq!(block.cached_bytes(), PAGE + 100);
        assert!(!block.has_page(1) && !block.is_full());
    }
    let store = eventually_open(&config(dir.path(), 8 << 20)).unwrap();
    let block = store.get(BlockId(5)).unwrap();
    assert_eq!(block.cached_bytes(), PAGE + 100);
    assert_eq!(block.chunk_crc(2), checksum::crc32c(&bytes[2 * PAGE as usize..]));
    block.verify_all().unwrap();
    assert_eq!(&block.bytes(2 * PAGE + 10, 5).unwrap()[..], &bytes[2 * PAGE as usize + 10..][..5]);
    drop((block, store));
    let (data, _) = paths(&dir.path().join("mem/blocks"), BlockId(5));
    let file = std::fs::File::options().read(true).write(true).open(data).unwrap();
    file.write_all_at(&[bytes[3] ^ 4], 3).unwrap();
    let store = eventually_open(&config(dir.path(), 8 << 20)).unwrap();
    let block = store.get(BlockId(5)).unwrap();
    assert!(block.verify_chunk(2).is_ok());
    assert_eq!(block.verify_chunk(0).unwrap_err().kind(), ErrorKind::Corrupt);
    store.quarantine(BlockId(5));
    assert!(store.get(BlockId(5)).is_none());
}

#[test]
fn the_working_set_is_what_was_used_lately() {
    const HOUR: Duration = Duration::from_secs(3_600);
    let dir = TestDir::new();
    let page = vec![1u8; PAGE as usize];
    {
        let store = open(dir.path(), 8 << 20);
        for id in 1..=3 {
            let block = store.get_or_create(header(id, PAGE)).unwrap();
            store.fill_page(&block, 0, &page).unwrap();
        }
        assert_eq!(store.working_set(HOUR), 3 * PAGE);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(store.working_set(Duration::from_millis(5)), 0);
        let held = store.get(BlockId(2)).unwrap();
        held.block.granted();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(store.working_set(Duration::from_millis(5)), PAGE, "a client may read it unseen");
        held.block.let_go();
    }
    let store = eventually_open(&config(dir.path(), 8 << 20)).unwrap();
    while store.adopt_some() > 0 {}
    assert_eq!(store.working_set(HOUR), 0, "nobody has used what a restart finds");
    store.get(BlockId(3)).unwrap();
    assert_eq!(store.working_set(HOUR), PAGE);
}

/// (S-17) Eviction unlinks; held bytes count on.
#[test]
fn the_oldest_is_evicted_and_held_bytes_count_until_let_go() {
    let dir = TestDir::new();
    let store = open(dir.path(), 4 << 20);
    let page = vec![1u8; PAGE as usize];
    let put = |id| {
        let block = store.get_or_create(header(id, PAGE))?;
        store.fill_page(&block, 0, &page)
    };
    for id in 0..40 {
        put(id + 1).unwrap();
    }
    let held = store.get(BlockId(1)).unwrap();
    let (data, head) = store.open_for_grant(&held).unwrap();
    drop(held);
    // Touched last, so it outlives the others for a while; then everything is pushed out.
    for id in 100..220 {
        put(id).unwrap();
    }
    assert!(store.get(BlockId(1)).is_none() && store.get(BlockId(2)).is_none() && store.get(BlockId(219)).is_some());
    let mem = || store.usage().remove(0);
    assert!(mem().zombie_bytes >= PAGE, "held bytes count: {:?}", mem());
    assert!(mem().used_bytes <= 4 << 20);
    let mut kept = vec![0; PAGE as usize];
    std::fs::File::from(data).read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(kept, page, "a holder of an evicted block still reads its bytes");
    drop(head);
    store.reap();
    assert_eq!(mem().zombie_bytes, 0);
}

/// (S-17) An only copy is never evicted.
#[test]
fn an_only_copy_is_never_evicted() {
    let dir = TestDir::new();
    let store = open(dir.path(), 4 << 20);
    let page = vec![1u8; PAGE as usize];
    for id in 1..1000 {
        let block = store.get_or_create(Header { flags: FLAG_ONLY_COPY, ..header(id, PAGE) });
        if let Err(e) = block.and_then(|b| store.fill_page(&b, 0, &page)) {
            assert_eq!(e.kind(), ErrorKind::NoSpace);
            assert!(id > 40);
            return assert!((1..id - 1).all(|i| store.get(BlockId(i)).is_some_and(|b| b.is_full())));
        }
    }
    panic!("a tier of 4 MiB took 1000 blocks of 64 KiB that must not be evicted");
}

/// What another version wrote is refused at start with both named, and left as it is.
#[test]
fn another_version_is_refused() {
    let dir = TestDir::new();
    drop(open(dir.path(), 8 << 20));
    let format = dir.path().join("mem/blocks/FORMAT");
    std::fs::write(&format, "forebay blocks 2\n").unwrap();
    let refused = eventually_open(&config(dir.path(), 8 << 20)).err().unwrap();
    assert!(
        refused.kind() == ErrorKind::Unsupported && refused.message().contains("blocks 2") && refused.message().contains("blocks 1"),
        "{refused}"
    );
}

/// Damaged files are removed when they are read; half of a block at once.
#[test]
fn only_damaged_files_are_removed() {
    let dir = TestDir::new();
    {
        let store = open(dir.path(), 8 << 20);
        for id in [1, 2, 3] {
            let block = store.get_or_create(header(id, PAGE)).unwrap();
            store.fill_page(&block, 0, &vec![1u8; PAGE as usize]).unwrap();
        }
    }
    let tier = dir.path().join("mem/blocks");
    let (_, head) = paths(&tier, BlockId(1));
    let good = std::fs::read(&head).unwrap();
    std::fs::write(&head, [&[0xff], &good[1..]].concat()).unwrap();
    let (data, _) = paths(&tier, BlockId(3));
    std::fs::remove_file(&data).unwrap();
    let store = eventually_open(&config(dir.path(), 8 << 20)).unwrap();
    assert!(store.get(BlockId(1)).is_none() && store.get(BlockId(2)).is_some() && store.get(BlockId(3)).is_none());
    assert!(!head.exists() && !paths(&tier, BlockId(3)).1.exists());
    assert!(head.with_extension("head.damaged").exists(), "a header that says nothing may have been of an only copy");
    while store.adopt_some() > 0 {}
    assert_eq!(store.usage()[0].blocks, 1);
}

/// The evictor lets go of a store that is dropped within a moment, and only then its folders are free.
fn eventually_open(config: &WorkerConfig) -> Result<Arc<BlockStore>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match BlockStore::open(config) {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            other => return other.map(admitted),
        }
    }
}

/// MEM, SSD and HDD, the latter two on the same kind of folder: what counts here is how blocks move.
fn three_tiers(dir: &std::path::Path, quotas: [u64; 3]) -> WorkerConfig {
    let tiers = [Medium::Mem, Medium::Ssd, Medium::Hdd]
        .into_iter()
        .zip(quotas)
        .map(|(medium, quota)| TierConfig {
            medium,
            dirs: vec![TierDir { path: dir.join(medium.name()), quota: bytesize(quota), reserve: bytesize(0) }],
        })
        .collect();
    WorkerConfig { tiers, mem_mount: MemMount::Never, ..WorkerConfig::default() }
}

fn filled(store: &BlockStore, id: u64, flags: u32) -> Result<Arc<BlockFile>> {
    let block = store.get_or_create(Header { flags, ..header(id, PAGE) })?;
    store.fill_page(&block, 0, &vec![id as u8; PAGE as usize])?;
    Ok(block)
}

fn tier_of(store: &BlockStore, id: u64) -> Option<Medium> {
    store.index.get(BlockId(id)).map(|b| b.dir.medium())
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Blocks that leave memory go down while there is room, come back up when they are used, and keep their bytes on the way.
#[test]
fn blocks_move_down_and_up() {
    let dir = TestDir::new();
    let store = eventually_open(&three_tiers(dir.path(), [4 << 20, 8 << 20, 32 << 20])).unwrap();
    for id in 1..=150 {
        drop(filled(&store, id, 0).unwrap());
        // A writer that outruns the evictor has it drop instead of moving down.
        until("room ahead of need", || store.tiers[0].dirs[0].used_bytes() <= (4 << 20) / 100 * 95);
    }
    let here = |medium| (1..=150).filter(|id| tier_of(&store, *id) == Some(medium)).count();
    assert!(here(Medium::Ssd) >= 80, "{} blocks on SSD", here(Medium::Ssd));
    assert_eq!(here(Medium::Mem) + here(Medium::Ssd) + here(Medium::Hdd), 150, "nothing is dropped while a lower tier has room");
    let down = (1..=150).find(|id| tier_of(&store, *id) == Some(Medium::Ssd)).unwrap();
    for _ in 0..2 {
        let block = store.get(BlockId(down)).unwrap();
        assert!(block.bytes(0, PAGE as usize).unwrap().iter().all(|b| *b == down as u8));
    }
    until("a hot block is moved up", || tier_of(&store, down) == Some(Medium::Mem));
    let block = store.get(BlockId(down)).unwrap();
    block.verify_all().unwrap();
    assert!(block.bytes(0, PAGE as usize).unwrap().iter().all(|b| *b == down as u8));
    for id in 1..=150 {
        let block = store.get(BlockId(id)).unwrap();
        assert!(block.bytes(0, PAGE as usize).unwrap().iter().all(|b| *b == id as u8), "block {id}");
    }
}

/// What is pinned stays where it is until it is let go; an only copy that finds no room above is written below.
#[test]
fn pinned_blocks_stay() {
    let dir = TestDir::new();
    let store = eventually_open(&three_tiers(dir.path(), [4 << 20, 4 << 20, 4 << 20])).unwrap();
    for id in 1..=30 {
        drop(filled(&store, id, 0).unwrap());
        store.set_pinned(BlockId(id), true);
    }
    for id in 100..400 {
        drop(filled(&store, id, 0).unwrap());
    }
    assert!((1..=30).all(|id| tier_of(&store, id) == Some(Medium::Mem)));
    (1..=30).for_each(|id| store.set_pinned(BlockId(id), false));
    for id in 500..800 {
        drop(filled(&store, id, 0).unwrap());
    }
    until("let go, they leave", || (1..=30).all(|id| tier_of(&store, id) != Some(Medium::Mem)));
}

/// A folder that fails takes no new blocks, says why, and gives what it holds.
#[test]
fn a_failing_folder_is_taken_out() {
    let dir = TestDir::new();
    let mut config = three_tiers(dir.path(), [4 << 20, 8 << 20, 8 << 20]);
    config.tiers.remove(0);
    config.tiers[0].dirs.push(TierDir { path: dir.path().join("other"), quota: bytesize(8 << 20), reserve: bytesize(0) });
    config.allocate_policy = forebay_common::config::AllocatePolicy::RoundRobin;
    let store = eventually_open(&config).unwrap();
    (1..=4).for_each(|id| drop(filled(&store, id, 0).unwrap()));
    let blocks = |i: usize| store.usage()[0].dirs[i].blocks;
    assert_eq!((blocks(0), blocks(1)), (2, 2), "folders share load");
    store.tiers[0].dirs[0].note_error(&err!(ReadOnly, "the file system turned read-only"));
    (5..=8).for_each(|id| drop(filled(&store, id, 0).unwrap()));
    assert_eq!((blocks(0), blocks(1)), (2, 6));
    assert!(store.usage()[0].dirs[0].trouble.contains("read-only"));
    assert!((1..=8).all(|id| store.get(BlockId(id)).unwrap().bytes(0, PAGE as usize).unwrap().iter().all(|b| *b == id as u8)));
}

/// Files are closed when many are open, and opened again when they are used: what was held stays whole.
#[test]
fn files_are_closed_and_opened_again() {
    let dir = TestDir::new();
    let store = eventually_open(&WorkerConfig { blocks_max: 16, ..config(dir.path(), 64 << 20) }).unwrap();
    for id in 1..=200 {
        drop(filled(&store, id, 0).unwrap());
    }
    let open = (1..=200).filter(|id| store.index.get(BlockId(*id)).unwrap().open_files().strong_count() > 0).count();
    assert!(open <= 16, "{open} are open");
    let held = store.get(BlockId(1)).unwrap();
    for id in 1..=200 {
        let block = store.get(BlockId(id)).unwrap();
        block.verify_all().unwrap();
        assert!(block.is_full() && block.bytes(0, PAGE as usize).unwrap().iter().all(|b| *b == id as u8));
    }
    assert!(Arc::ptr_eq(&held, &store.get(BlockId(1)).unwrap()), "one open file per block at a time");
}

/// (S-22) A mount stays within its quota, what it has reserved is not pushed out by others, and what its share says is what its
/// blocks occupy, also after limits changed and after a restart.
#[test]
fn mounts_have_shares() {
    let dir = TestDir::new();
    let limits = |quota_bytes, reserved_bytes| ShareLimits { quota_bytes, reserved_bytes };
    let shares = |list: &[(u64, ShareLimits)]| list.iter().map(|(id, l)| (MountId(*id), *l)).collect::<std::collections::HashMap<_, _>>();
    let page = vec![1u8; PAGE as usize];
    let of_mount = |store: &BlockStore, mount| -> u64 {
        let blocks = store.ids().into_iter().filter_map(|id| store.index.get(id));
        blocks.filter(|b| b.header.mount() == MountId(mount)).map(|b| b.charged_bytes()).sum()
    };
    let agrees = |store: &BlockStore| {
        for (mount, share) in store.shares.all() {
            assert_eq!(share.used_bytes(), of_mount(store, mount.get()), "mount {mount}");
        }
    };
    let put = |store: &BlockStore, id: u64, mount| {
        let flags = forebay_common::block_header::flags_of(false, MountId(mount));
        let block = store.get_or_create(Header { flags, ..header(id, PAGE) })?;
        store.fill_page(&block, 0, &page)
    };
    let store = open(dir.path(), 8 << 20);
    store.set_shares(shares(&[(1, limits(2 << 20, 0)), (2, limits(0, 2 << 20))]));
    for id in 1..=20 {
        put(&store, 2_000 + id, 2).unwrap();
    }
    for id in 1..=200 {
        put(&store, 1_000 + id, 1).unwrap();
        assert!(of_mount(&store, 1) <= 2 << 20, "a quota is a limit");
        put(&store, 3_000 + id, 3).unwrap();
    }
    agrees(&store);
    assert!(of_mount(&store, 1) > 1 << 20, "and is used");
    assert!((1..=20).all(|id| store.has(BlockId(2_000 + id))), "what is reserved stays");
    assert!(!store.has(BlockId(3_001)), "what is not goes");
    // Less is allowed: what is too much goes.
    store.set_shares(shares(&[(1, limits(1 << 20, 0))]));
    for id in 201..=400 {
        put(&store, 3_000 + id, 3).unwrap();
    }
    agrees(&store);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while of_mount(&store, 1) > 1 << 20 {
        assert!(std::time::Instant::now() < deadline, "a smaller quota is not kept");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    agrees(&store);
    drop(store);
    let store = eventually_open(&config(dir.path(), 8 << 20)).unwrap();
    while store.adopt_some() > 0 {}
    store.set_shares(shares(&[(1, limits(1 << 20, 0))]));
    agrees(&store);
    for id in 500..=600 {
        put(&store, 1_000 + id, 1).unwrap();
        assert!(of_mount(&store, 1) <= 1 << 20, "a restart changes nothing");
    }
    // What must stay fills the quota: an error that names it.
    let flags = forebay_common::block_header::flags_of(true, MountId(1));
    let full = (700..800).find_map(|id| {
        let block = store.get_or_create(Header { flags, ..header(id, PAGE) }).ok()?;
        store.fill_page(&block, 0, &page).err()
    });
    assert!(full.is_some_and(|e| e.kind() == ErrorKind::NoSpace && e.message().contains("quota")));
    agrees(&store);
}

/// (S-42) What is joined are the bytes of the blocks in their order, short ones among them; it goes with any of them, and does not outlive the process.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_file_are_joined() {
    use forebay_common::token::{BlockRun, Claims};
    let dir = TestDir::new();
    let store = open(dir.path(), 64 << 20);
    // 128 KiB but for the second one, and the last.
    let lengths = [131_072, 70_000, 131_072, 131_072, 999];
    let whole: Vec<u8> = (0..lengths.iter().sum::<u64>()).map(|i| ((i * 31) >> 3) as u8).collect();
    let ids = [10, 11, 12, 40, 41];
    let mut at = 0;
    for (id, length) in ids.iter().zip(lengths) {
        let block = store.get_or_create(header(*id, length)).unwrap();
        for page in 0..block.header.pages() {
            let (offset, size) = block.header.page_span(page);
            store.fill_page(&block, page, &whole[at + offset as usize..][..size]).unwrap();
        }
        at += length as usize;
    }
    let claims = Claims {
        file_id: 1,
        blocks: vec![BlockRun { first: 10, count: 3 }, BlockRun { first: 40, count: 2 }],
        block_size_bytes: 131_072,
        length_bytes: whole.len() as u64,
        short_blocks: vec![1, 70_000],
        ..Claims::default()
    };
    assert!(store.joined(&claims, 0).is_none(), "never");
    assert!(store.joined(&claims, 2).is_none(), "asked for once");
    let until = Instant::now() + Duration::from_secs(20);
    let joined = loop {
        match store.joined(&claims, 2) {
            Some(joined) => break joined,
            None => assert!(Instant::now() < until),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(joined.bytes(0, whole.len()).unwrap()[..] == whole[..]);
    joined.verify_again().unwrap();
    // Others are told of the blocks alone.
    store.note_all_changed();
    let told = store.take_changed(100);
    assert!(told.len() == ids.len() && told.iter().all(|changed| ids.contains(&changed.id.get())));
    // Another order of them is another file.
    let other = Claims { blocks: vec![BlockRun { first: 40, count: 2 }, BlockRun { first: 10, count: 3 }], ..claims.clone() };
    assert!(store.joined(&other, 100).is_none());
    // The next process knows nothing of it, and removes what is left.
    let used = store.usage()[0].used_bytes;
    drop(joined);
    drop(store);
    let store = eventually_open(&config(dir.path(), 64 << 20)).unwrap();
    while store.adopt_some() > 0 {}
    assert_eq!(store.usage()[0].blocks, ids.len() as u64);
    assert!(store.usage()[0].used_bytes < used / 3 * 2);
    // A block is removed by order: the joined file with it.
    store.joined(&claims, 1);
    while store.joined(&claims, 1).is_none() {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(store.usage()[0].blocks, ids.len() as u64 + 1);
    store.remove_by_order(BlockId(40));
    assert!(store.joined(&claims, 1).is_none());
    assert_eq!(store.usage()[0].blocks, ids.len() as u64 - 1);
    // What is not whole is not joined, and leaves nothing.
    for _ in 0..20 {
        assert!(store.joined(&claims, 1).is_none());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(store.usage()[0].blocks, ids.len() as u64 - 1);
}

/// Folders of two clusters, which have a block of the same number each: nothing is dropped for it, and each can be given up by itself.
#[test]
fn folders_of_two_clusters_keep_their_blocks() {
    let dir = TestDir::new();
    let two = three_tiers(dir.path(), [4 << 20; 3]);
    let only = |medium| WorkerConfig { tiers: two.tiers.iter().filter(|t| t.medium == medium).cloned().collect(), ..two.clone() };
    for (medium, cluster) in [(Medium::Ssd, "CID-1"), (Medium::Hdd, "CID-2")] {
        let store = BlockStore::open(&only(medium)).unwrap();
        assert!(store.get_or_create(header(5, PAGE)).is_err(), "no block comes to a folder that does not say whose it is");
        store.join_cluster(cluster).unwrap();
        filled(&store, 5, FLAG_ONLY_COPY).unwrap();
        filled(&store, 6, 0).unwrap();
    }
    let open = || loop {
        match BlockStore::open(&two) {
            Err(e) if e.kind() == ErrorKind::Busy => std::thread::sleep(Duration::from_millis(5)),
            other => return other.unwrap(),
        }
    };
    let store = open();
    let of = |store: &BlockStore, cluster: &str| store.dirs_with_blocks().into_iter().find(|dir| dir.cluster() == cluster);
    assert_eq!(store.dirs_with_blocks().len(), 2, "memory is empty");
    for cluster in ["CID-1", "CID-2", "CID-3"] {
        assert!(store.is_unnamed(cluster));
        assert_eq!(store.join_cluster(cluster).unwrap_err().kind(), ErrorKind::Unavailable);
    }
    let first = of(&store, "CID-1").unwrap();
    assert_eq!(store.only_copies_in(&first), 1);
    assert_eq!(store.only_copies_in(&of(&store, "CID-2").unwrap()), 2, "what cannot be looked at may be one");
    // What is only cached goes, the rest stays.
    assert_eq!(store.empty_dir(&first, true), 1);
    assert!(store.get(BlockId(5)).unwrap().verify_all().is_ok());
    assert_eq!(store.empty_dir(&first, false), 1);
    assert_eq!((store.dirs_with_blocks().len(), first.used_bytes()), (1, 0));
    drop((store, first));
    let store = open();
    store.join_cluster("CID-2").unwrap();
    for id in [5, 6] {
        let block = store.get(BlockId(id)).unwrap();
        assert!(block.verify_all().is_ok() && tier_of(&store, id) == Some(Medium::Hdd), "block {id} of the other cluster is there");
    }
    let second = of(&store, "CID-2").unwrap();
    assert_eq!((store.empty_dir(&second, false), second.used_bytes()), (2, 0));
    store.join_cluster("CID-3").unwrap();
    assert!(!store.is_unnamed("CID-3"));
}
