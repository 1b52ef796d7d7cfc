//! Over a real S3 server that checks signatures and honours If-Match.

use forebay_client::FileSystem;
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::proxy::{Fault, Proxy};
use forebay_tests::s3::S3;
use forebay_tests::{Cluster, eventually, pattern};
use forebay_ufs::{UfsUri, UnderStore};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

async fn mounted(settings: &[(&'static str, &str)], options: &[(&str, &str)], proxied: bool) -> (Cluster, S3, Option<Proxy>, FileSystem) {
    let cluster = Cluster::start(1, settings).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let proxy = if proxied { Some(Proxy::start(&s3.endpoint).await) } else { None };
    let mut all = s3.options(proxy.as_ref().map(|p| p.endpoint.as_str()));
    all.extend(options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    let fs = cluster.client().await;
    fs.mount(&p("/s3"), "s3://bucket", false, all).await.expect("mount");
    (cluster, s3, proxy, fs)
}

/// Puts an object without the cache knowing.
async fn put_behind(s3: &S3, key: &str, bytes: Vec<u8>) {
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").expect("uri"), &s3.options(None)).expect("store");
    let mut writer = store.writer(key.as_bytes()).await.expect("writer");
    writer.write(bytes.into()).await.expect("write");
    writer.close().await.expect("close");
}

async fn read_all(fs: &FileSystem, path: &str) -> forebay_common::Result<Vec<u8>> {
    let file = fs.open(&p(path)).await?;
    let mut out = Vec::new();
    let mut pieces = file.pieces(0..u64::MAX);
    while let Some(piece) = pieces.next().await? {
        out.extend_from_slice(&piece);
    }
    Ok(out)
}

async fn settled(cluster: &Cluster) -> u64 {
    cluster.counters_arrived().await;
    cluster.metric("Cluster.BytesReadUfs").await
}

/// (S-10) The second read of a file moves nothing from its under store.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_read_is_from_memory() {
    let (cluster, s3, _, fs) = mounted(&[], &[], false).await;
    let bytes = pattern(1, 0, 20 << 20);
    put_behind(&s3, "dir/f", bytes.clone()).await;
    assert!(read_all(&fs, "/s3/dir/f").await.unwrap() == bytes);
    let cold = settled(&cluster).await;
    assert_eq!(cold, bytes.len() as u64, "each byte is fetched once");
    assert!(read_all(&fs, "/s3/dir/f").await.unwrap() == bytes);
    assert!(read_all(&cluster.network_client().await, "/s3/dir/f").await.unwrap() == bytes);
    assert_eq!(settled(&cluster).await, cold, "warm reads move nothing from S3");
    fs.free(&p("/s3/dir/f")).await.unwrap();
    eventually("freed", 10, async || cluster.json(&["fsadmin", "report", "capacity"])["tiers"]["MEM"]["blocks"] == 0).await;
    cluster.ok(&["fs", "load", "/s3/dir"]);
    assert_eq!(settled(&cluster).await, 2 * cold);
    // Credentials appear nowhere.
    let shown = cluster.ok(&["fs", "mount"]) + &cluster.ok(&["fs", "mount", "--json"]) + &cluster.ok(&["fsadmin", "report", "ufs"]);
    let logs = std::fs::read_to_string(cluster.dir.path().join("master.log")).unwrap()
        + &std::fs::read_to_string(cluster.dir.path().join("worker-0/worker.log")).unwrap();
    assert!(!shown.contains("testsecret") && !logs.contains("testsecret") && !shown.contains("testkey"));
    cluster.ok(&["fs", "rm", "-R", "/s3/dir"]);
    assert!(!s3.folder.join("dir/f").exists());
}

/// (S-11) A 4 KiB read of a cold 1 GiB object fetches one page.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_read_of_a_large_cold_object_fetches_a_page() {
    let (cluster, s3, _, fs) = mounted(&[], &[], false).await;
    let local = std::fs::File::create(s3.folder.join("huge")).unwrap();
    local.set_len(1 << 30).unwrap();
    let file = fs.open(&p("/s3/huge")).await.unwrap();
    assert_eq!(file.length(), 1 << 30);
    let mut out = [1; 4096];
    file.read_at((700 << 20) + 12_345, &mut out).await.unwrap();
    assert_eq!((out, settled(&cluster).await), ([0; 4096], 1 << 20));
    let network = cluster.network_client().await.open(&p("/s3/huge")).await.unwrap();
    network.read_at((300 << 20) + 12_345, &mut out).await.unwrap();
    assert_eq!(settled(&cluster).await, 2 << 20);
    // Through the commands: what is not asked for is not fetched, ahead neither.
    assert_eq!(cluster.run(&["fs", "cat", "/s3/huge", "--offset", "104857600", "--length", "10"]).stdout, [0; 10]);
    assert_eq!(settled(&cluster).await, 3 << 20);
    // Many at once for one page: one fetch.
    let file = Arc::new(file);
    let readers = (0..32).map(|i| {
        let file = file.clone();
        tokio::spawn(async move { file.read_at((500 << 20) + i * 100, &mut [0; 64]).await.map(drop) })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap().unwrap();
    }
    assert_eq!(settled(&cluster).await, 4 << 20);
}

/// (S-12) An object that is overwritten while it is cached and being read: no reader sees bytes of two versions, and the
/// next open after the sync interval sees the new one.
#[tokio::test(flavor = "multi_thread")]
async fn versions_never_mix() {
    let (cluster, s3, _, fs) = mounted(&[("worker.mem_quota", "\"8MiB\"")], &[("sync_interval_ms", "100"), ("block_size", "4MiB")], false).await;
    const LENGTH: usize = 24 << 20;
    put_behind(&s3, "f", pattern(1, 0, LENGTH)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let (whole, changed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut readers = Vec::new();
    for client in [fs.clone(), cluster.network_client().await, cluster.client().await] {
        let (stop, whole, changed) = (stop.clone(), whole.clone(), changed.clone());
        readers.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                match read_all(&client, "/s3/f").await {
                    Ok(bytes) => {
                        assert_eq!(bytes.len(), LENGTH);
                        // The tag of the version is in the first word; every other word must agree.
                        let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                        assert!(bytes == pattern(tag, 0, LENGTH), "bytes of two versions in one read");
                        whole.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(e) if matches!(e.kind(), ErrorKind::FileChanged | ErrorKind::NotFound) => drop(changed.fetch_add(1, Ordering::SeqCst)),
                    Err(e) => panic!("{e}"),
                }
            }
        }));
    }
    for version in 2..14u64 {
        put_behind(&s3, "f", pattern(version, 0, LENGTH)).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.unwrap();
    }
    eprintln!("{} whole reads, {} told that the file changed", whole.load(Ordering::SeqCst), changed.load(Ordering::SeqCst));
    assert!(whole.load(Ordering::SeqCst) > 0);
    eventually("an open after the sync interval sees the new version", 10, async || read_all(&fs, "/s3/f").await.unwrap() == pattern(13, 0, LENGTH))
        .await;
}

/// (S-13) A store that fails: retries are bounded and then the error names the store; a missing object alone is "not found";
/// what is cached is not affected.
#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_store() {
    let options = [("retries", "3"), ("timeout_ms", "1500"), ("io_timeout_ms", "1500"), ("sync_interval_ms", "0")];
    let (cluster, s3, proxy, fs) = mounted(&[], &options, true).await;
    let proxy = proxy.unwrap();
    let bytes = pattern(3, 0, 3_000_000);
    put_behind(&s3, "cached", bytes.clone()).await;
    put_behind(&s3, "cold", bytes.clone()).await;
    put_behind(&s3, "cold-too", bytes.clone()).await;
    assert!(fs.exists(&p("/s3/cold-too")).await.unwrap());
    assert!(read_all(&fs, "/s3/cached").await.unwrap() == bytes);
    let quick = FileSystem::connect(&forebay_common::config::ClientConfig { call_timeout_ms: 20_000, ..cluster.client_config() }).await.unwrap();
    // Now and then: retries get through.
    for fault in [Fault::Unavailable, Fault::Internal, Fault::Cut, Fault::Hang] {
        proxy.set(fault, 3);
        assert!(read_all(&quick, "/s3/cold").await.unwrap_or_else(|e| panic!("{fault:?}: {e}")) == bytes, "{fault:?}");
        proxy.set(Fault::None, 1);
        fs.free(&p("/s3/cold")).await.unwrap();
        eventually("freed", 10, async || cluster.json(&["fs", "stat", "/s3/cold"])["cached_percent"] == 0).await;
    }
    // Always: a clear error, in bounded time, never "not found"; cached bytes still come.
    for fault in [Fault::Unavailable, Fault::Internal, Fault::Hang] {
        proxy.set(fault, 1);
        let before = proxy.counts().0;
        for path in ["/s3/missing", "/s3/missing-too"] {
            let error = quick.open(&p(path)).await.map(drop).unwrap_err();
            assert!(!matches!(error.kind(), ErrorKind::NotFound), "{fault:?} on {path}: {error}");
            assert!(error.message().contains("s3://bucket"), "{error}");
        }
        let asked = proxy.counts().0 - before;
        assert!(asked <= 40, "{fault:?}: {asked} requests for two lookups: retries are bounded");
        // A file that is known and not cached: bounded as well, long before the client's own patience ends.
        let before = proxy.counts().0;
        let error = read_all(&fs, "/s3/cold-too").await.unwrap_err();
        assert!(!matches!(error.kind(), ErrorKind::NotFound) && error.message().contains("s3://bucket"), "{fault:?}: {error}");
        let asked = proxy.counts().0 - before;
        assert!(asked <= 120, "{fault:?}: {asked} requests for one read: retries are bounded");
        assert!(read_all(&quick, "/s3/cached").await.unwrap_or_else(|e| panic!("{fault:?}: {e}")) == bytes, "what is cached is served");
    }
    proxy.set(Fault::None, 1);
    assert_eq!(quick.open(&p("/s3/missing")).await.map(drop).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(read_all(&quick, "/s3/cold").await.unwrap() == bytes);
    // A mount with wrong credentials is refused, with the cause.
    let mut wrong = s3.options(None);
    wrong.insert("secret_access_key".into(), "nonsense".into());
    let error = fs.mount(&p("/wrong"), "s3://bucket/sub", false, wrong).await.unwrap_err();
    assert!(!error.message().contains("nonsense") && error.kind() != ErrorKind::NotFound, "{error}");
}
