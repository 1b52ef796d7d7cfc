use super::*;
use forebay_common::config::{MemMount, WorkerConfig};
use forebay_common::{InodeId, checksum};
use std::os::unix::fs::FileExt;

const PAGE: u64 = 64 << 10;

fn open(dir: &std::path::Path, quota: u64) -> BlockStore {
    let config = WorkerConfig { mem_dir: dir.join("mem"), mem_quota: bytesize(quota), mem_mount: MemMount::Never, ..WorkerConfig::default() };
    BlockStore::open(Tier::prepare(&config).unwrap(), 1_000).unwrap()
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
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..PAGE as usize * 2 + 100).map(|i| (i * 7) as u8).collect();
    {
        let store = open(dir.path(), 8 << 20);
        let block = store.get_or_create(header(5, bytes.len() as u64)).unwrap();
        store.fill_page(&block, 0, &bytes[..PAGE as usize]).unwrap();
        store.fill_page(&block, 2, &bytes[2 * PAGE as usize..]).unwrap();
        assert_eq!(block.cached_bytes(), PAGE + 100);
        assert!(!block.has_page(1) && !block.is_full());
    }
    let store = open(dir.path(), 8 << 20);
    let block = store.get(BlockId(5)).unwrap();
    assert_eq!(block.cached_bytes(), PAGE + 100);
    assert_eq!(block.chunk_crc(2), checksum::crc32c(&bytes[2 * PAGE as usize..]));
    block.verify_all().unwrap();
    assert_eq!(&block.slice(2 * PAGE + 10, 5)[..], &bytes[2 * PAGE as usize + 10..][..5]);
    drop((block, store));
    let (data, _) = paths(&dir.path().join("mem/blocks"), BlockId(5));
    let file = std::fs::File::options().read(true).write(true).open(data).unwrap();
    file.write_all_at(&[bytes[3] ^ 4], 3).unwrap();
    let store = open(dir.path(), 8 << 20);
    let block = store.get(BlockId(5)).unwrap();
    assert!(block.verify_chunk(2).is_ok());
    assert_eq!(block.verify_chunk(0).unwrap_err().kind(), ErrorKind::Corrupt);
    store.quarantine(BlockId(5));
    assert!(store.get(BlockId(5)).is_none());
}

/// (S-17) Eviction unlinks; held bytes count on.
#[test]
fn the_oldest_is_evicted_and_held_bytes_count_until_let_go() {
    let dir = tempfile::tempdir().unwrap();
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
    store.reap();
    let usage = store.usage();
    assert!(usage.zombie_bytes >= PAGE, "held bytes count: {usage:?}");
    assert!(usage.used_bytes <= 4 << 20);
    let mut kept = vec![0; PAGE as usize];
    std::fs::File::from(data).read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(kept, page, "a holder of an evicted block still reads its bytes");
    drop(head);
    store.reap();
    assert_eq!(store.usage().zombie_bytes, 0);
}

/// (S-17) An only copy is never evicted.
#[test]
fn an_only_copy_is_never_evicted() {
    let dir = tempfile::tempdir().unwrap();
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

/// A block is evicted before descriptors run out; where none may be, the next one is refused.
#[test]
fn blocks_are_bounded_in_number() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        WorkerConfig { mem_dir: dir.path().join("mem"), mem_quota: bytesize(64 << 20), mem_mount: MemMount::Never, ..WorkerConfig::default() };
    let store = BlockStore::open(Tier::prepare(&config).unwrap(), 3).unwrap();
    (1..=5).for_each(|id| drop(store.get_or_create(header(id, PAGE)).unwrap()));
    assert_eq!((1..=5).filter(|id| store.get(BlockId(*id)).is_some()).collect::<Vec<_>>(), [3, 4, 5]);
    for id in 6..=8 {
        store.get_or_create(Header { flags: FLAG_ONLY_COPY, ..header(id, PAGE) }).unwrap();
    }
    assert_eq!(store.get_or_create(header(9, PAGE)).err().unwrap().kind(), ErrorKind::NoSpace);
    assert!((6..=8).all(|id| store.get(BlockId(id)).is_some()));
}

/// Files whose header is damaged are removed at start; those that are merely of a newer version are left, and start fails.
#[test]
fn only_damaged_files_are_removed_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let page = vec![1u8; PAGE as usize];
    {
        let store = open(dir.path(), 8 << 20);
        for id in [1, 2] {
            let block = store.get_or_create(header(id, PAGE)).unwrap();
            store.fill_page(&block, 0, &page).unwrap();
        }
    }
    let tier = dir.path().join("mem/blocks");
    let (_, head) = paths(&tier, BlockId(1));
    let good = std::fs::read(&head).unwrap();
    std::fs::write(&head, [&[0xff], &good[1..]].concat()).unwrap();
    let store = open(dir.path(), 8 << 20);
    assert!(store.get(BlockId(1)).is_none() && !head.exists() && store.get(BlockId(2)).is_some());
    drop(store);
    let (_, head) = paths(&tier, BlockId(2));
    let mut newer = std::fs::read(&head).unwrap();
    newer[8] += 1;
    let crc = checksum::crc32c(&newer[..60]).to_le_bytes();
    newer[60..64].copy_from_slice(&crc);
    std::fs::write(&head, newer).unwrap();
    let config =
        WorkerConfig { mem_dir: dir.path().join("mem"), mem_quota: bytesize(8 << 20), mem_mount: MemMount::Never, ..WorkerConfig::default() };
    let refused = BlockStore::open(Tier::prepare(&config).unwrap(), 10).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    assert!(head.exists());
}
