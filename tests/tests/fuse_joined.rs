//! (S-42) A cached file of several blocks that is opened again and again is joined on its worker, and read by the kernel itself.

use forebay_client::CreateOptions;
use forebay_tests::fuse::{Mount, is_here};
use forebay_tests::suite::write;
use forebay_tests::{Cluster, eventually, pattern};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const LENGTH: usize = 13 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_opened_often_is_read_in_one_piece() {
    if !is_here("what_is_opened_often_is_read_in_one_piece") {
        return;
    }
    let mut cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "4MiB"), ("page_size", "1MiB")]).await;
    let client = cluster.client().await;
    let (bytes, others) = (pattern(1, 0, LENGTH), pattern(2, 0, LENGTH - 12_345));
    fs::write(folder.join("f"), &bytes).unwrap();
    // A fourth of the tier is the most that one of them may have.
    fs::write(folder.join("large"), pattern(3, 0, 70 << 20)).unwrap();
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m", "-o", "attr_ttl_ms=0,entry_ttl_ms=0"]);
    if !fs::read_to_string(cluster.dir.path().join("mnt.log")).unwrap().contains("passthrough=true") {
        return println!("SKIPPED what_is_opened_often_is_read_in_one_piece: this kernel has no FUSE passthrough, or the process may not use it");
    }
    cluster.ok(&["fs", "load", "/m"]);
    let passes = || mount.metric("forebay_fuse_passthrough_opens_total");
    let reads = || mount.metric("forebay_fuse_reads_total");
    let joined = async || {
        eventually("read by the kernel itself", 20, async || {
            let before = passes();
            assert!(fs::read(mount.path("f")).unwrap().len() > LENGTH / 2);
            passes() > before
        })
        .await;
    };
    joined().await;
    let own = {
        let before = reads();
        reads() - before
    };
    let before = reads();
    assert!(fs::read(mount.path("f")).unwrap() == bytes);
    let open = File::open(mount.path("f")).unwrap();
    let mapped = unsafe { memmap2::Mmap::map(&open).unwrap() };
    assert!(mapped[..] == bytes[..]);
    assert_eq!(reads() - before, own, "the process is not asked for a byte, across the blocks' borders either");
    for _ in 0..4 {
        fs::read(mount.path("large")).unwrap();
    }
    assert_eq!(cluster.worker_metric("forebay_worker_joined_files_total").await, 1);
    assert!(cluster.worker_metric("forebay_worker_joined_failures_total").await >= 1, "too large");

    // Replaced by another client: who has it open reads on, whoever opens it has the new bytes, in one piece after a while.
    write(&client, "/m/f", &others, CreateOptions { overwrite: true, ..CreateOptions::default() }).await;
    assert!(mapped[..] == bytes[..]);
    let mut out = vec![0; 5 << 20];
    open.read_exact_at(&mut out, 3 << 20).unwrap();
    assert!(out == bytes[3 << 20..8 << 20]);
    assert!(fs::read(mount.path("f")).unwrap() == others);
    drop((open, mapped));
    joined().await;
    assert!(fs::read(mount.path("f")).unwrap() == others);
    // Evicted while it is mapped, and the worker begins anew: what is left of it is not believed.
    let open = File::open(mount.path("f")).unwrap();
    let mapped = unsafe { memmap2::Mmap::map(&open).unwrap() };
    cluster.ok(&["fs", "free", "/m/f"]);
    assert!(mapped[..] == others[..]);
    cluster.kill_worker(0);
    assert!(mapped[..] == others[..], "without a worker");
    cluster.start_worker(0);
    assert!(fs::read(mount.path("f")).unwrap() == others);
    drop((open, mapped));
    cluster.ok(&["fs", "load", "/m/f"]);
    joined().await;
    assert!(fs::read(mount.path("f")).unwrap() == others);
}

/// (S-33) A folder that is read through, file by file in order, is fetched ahead; one that is read at random is not.
#[tokio::test(flavor = "multi_thread")]
async fn neighbours_are_fetched_ahead() {
    if !is_here("neighbours_are_fetched_ahead") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[]).await;
    for dir in ["in-order", "at-random"] {
        fs::create_dir(folder.join(dir)).unwrap();
        for i in 0..60u64 {
            fs::write(folder.join(format!("{dir}/f{i:02}")), pattern(i, 0, 30_000 + i as usize)).unwrap();
        }
    }
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let fetched = || mount.metric("forebay_fuse_neighbours_fetched_total");
    let read =
        |dir: &str, i: u64| assert!(fs::read(mount.path(&format!("{dir}/f{i:02}"))).unwrap() == pattern(i, 0, 30_000 + i as usize), "{dir} {i}");
    assert_eq!(fs::read_dir(mount.path("at-random")).unwrap().count(), 60);
    (0..60).for_each(|i| read("at-random", i * 37 % 60));
    assert_eq!(fetched(), 0);
    assert_eq!(fs::read_dir(mount.path("in-order")).unwrap().count(), 60);
    (0..4).for_each(|i| read("in-order", i));
    eventually("the next ones are cached", 20, async || fetched() >= 8).await;
    (4..60).for_each(|i| read("in-order", i));
    // Read through again: everything is cached, and hardly anything is asked for.
    let before = fetched();
    assert_eq!(fs::read_dir(mount.path("in-order")).unwrap().count(), 60);
    (0..60).for_each(|i| read("in-order", i));
    assert_eq!(fetched(), before);
}
