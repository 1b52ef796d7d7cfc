//! Rates of each under store through Forebay beside the store alone, in one run, printed and never asserted: another machine has others.

use forebay_client::{CreateOptions, FileSystem};
use forebay_tests::cluster::p;
use forebay_tests::hdfs::Hdfs;
use forebay_tests::s3::S3;
use forebay_tests::suite::write;
use forebay_tests::{Cluster, eventually, pattern};
use forebay_ufs::{UfsUri, UnderStore};
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Instant;

/// Bytes of one range when a store is read without Forebay: as workers do it.
const RANGE: u64 = 4 << 20;

/// Looks at every byte: pieces out of a mapping cost nothing before that.
fn look(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0, |sum, word| sum ^ u64::from_le_bytes(word.try_into().expect("8 bytes")))
}

async fn read_all(fs: &FileSystem, path: &str) -> u64 {
    let file = fs.open(&p(path)).await.expect("open");
    let (mut pieces, mut total) = (file.pieces(0..u64::MAX), 0);
    while let Some(piece) = pieces.next().await.expect("read") {
        std::hint::black_box(look(&piece));
        total += piece.len() as u64;
    }
    total
}

async fn table(name: &str, uri: &str, options: BTreeMap<String, String>, cluster: &Cluster) {
    let mib: u64 = std::env::var("FOREBAY_TEST_RATE_MIB").ok().and_then(|n| n.parse().ok()).unwrap_or(16);
    let length = mib << 20;
    let store = UnderStore::open(&UfsUri::parse(uri).unwrap(), &options).unwrap();
    let fs = cluster.client().await;
    fs.mount(&p("/m"), uri, false, options).await.unwrap();
    let bytes = bytes::Bytes::from(pattern(1, 0, length as usize));
    let rate = |began: Instant| (mib as f64 / began.elapsed().as_secs_f64()) as u64;
    let began = Instant::now();
    let mut writer = store.writer(b"alone").await.unwrap();
    for at in (0..length).step_by(1 << 20) {
        writer.write(bytes.slice(at as usize..(at + (1 << 20)) as usize)).await.unwrap();
    }
    writer.settle().await.unwrap();
    let entry = writer.close().await.unwrap();
    let alone_write = rate(began);
    let began = Instant::now();
    let ranges = futures::stream::iter((0..length).step_by(RANGE as usize));
    let read = ranges.map(|at| {
        let (store, fingerprint) = (store.clone(), entry.fingerprint.clone());
        async move {
            let bytes = store.read(b"alone", at, RANGE.min(length - at) as usize, &fingerprint).await.unwrap();
            std::hint::black_box(look(&bytes));
            bytes.len() as u64
        }
    });
    assert_eq!(read.buffer_unordered(4).fold(0, async |sum, n| sum + n).await, length);
    let alone_read = rate(began);
    let began = Instant::now();
    assert_eq!(read_all(&fs, "/m/alone").await, length);
    let cold = rate(began);
    let began = Instant::now();
    assert_eq!(read_all(&fs, "/m/alone").await, length);
    let warm = rate(began);
    let began = Instant::now();
    write(&fs, "/m/through", &bytes, CreateOptions { write_type: "through".into(), ..Default::default() }).await;
    let through = rate(began);
    let began = Instant::now();
    write(&fs, "/m/later", &bytes, CreateOptions { write_type: "async".into(), ..Default::default() }).await;
    let later = rate(began);
    eventually("persisted", 120, async || fs.get_status(&p("/m/later")).await.unwrap().persisted).await;
    fs.free(&p("/m/alone")).await.unwrap();
    cluster.counters_arrived().await;
    let began = Instant::now();
    cluster.ok(&["fs", "load", "/m/alone"]);
    let load = rate(began);
    eprintln!(
        "{name}, {mib} MiB, MiB/s: read alone {alone_read}, cold {cold}, warm {warm}, load {load}; write alone {alone_write}, through {through}, async {later}"
    );
    cluster.ok(&["fs", "unmount", "/m"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rates_of_each_store() {
    let cluster = Cluster::start(1, &[("worker.mem_quota", "\"2GiB\"")]).await;
    let folder = cluster.dir.path().join("folder");
    std::fs::create_dir_all(&folder).unwrap();
    table("file", &format!("file://{}", folder.display()), BTreeMap::new(), &cluster).await;
    let s3 = S3::start(cluster.dir.path()).await;
    table("s3", "s3://bucket", s3.options(None), &cluster).await;
    drop(s3);
    let hdfs = Hdfs::start(cluster.dir.path()).await;
    table("hdfs", &format!("{}/m", hdfs.uri), BTreeMap::new(), &cluster).await;
}
