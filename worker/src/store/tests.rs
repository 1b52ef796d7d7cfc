use super::*;
use forebay_common::config::{MemMount, WorkerConfig};
use forebay_common::{InodeId, checksum};
use std::os::unix::fs::FileExt;

const PAGE: u64 = 64 << 10;

fn open(dir: &std::path::Path, quota: u64) -> BlockStore {
    let config = WorkerConfig { mem_dir: dir.join("mem"), mem_quota: bytesize(quota), mem_mount: MemMount::Never, ..WorkerConfig::default() };
    BlockStore::open(Tier::prepare(&config).unwrap()).unwrap()
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
