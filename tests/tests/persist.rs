//! (S-24) Files that are acknowledged before they are in their under store get there, whatever dies in between.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::proxy::{Fault, Proxy};
use forebay_tests::s3::S3;
use forebay_tests::suite::{get_behind, read_all, write};
use forebay_tests::{Cluster, eventually, pattern, rng};
use forebay_ufs::{UfsUri, UnderStore};
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn later(replicas: u32) -> CreateOptions {
    CreateOptions { write_type: "async".into(), recursive: true, overwrite: true, replicas, ..Default::default() }
}

fn at_risk(cluster: &Cluster) -> serde_json::Value {
    cluster.json(&["fsadmin", "report", "atRisk"])
}

/// What is not there yet is told, is not evicted, moves and goes with its name, and gets there when the store is back.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_store() {
    let cluster = Cluster::start(2, &[("worker.mem_quota", "\"16MiB\"")]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let proxy = Proxy::start(&s3.endpoint).await;
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").unwrap(), &s3.options(None)).unwrap();
    let fs = cluster.client().await;
    let mut mount = s3.options(Some(&proxy.endpoint));
    for (k, v) in [("retries", "0"), ("timeout_ms", "1000"), ("sync_interval_ms", "0"), ("write_type", "async")] {
        mount.insert(k.into(), v.into());
    }
    fs.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    write(&fs, "/s3/old", b"old", CreateOptions { write_type: "through".into(), ..Default::default() }).await;
    proxy.set(Fault::Unavailable, 1);
    let bytes = |i: u64| pattern(i, 0, 1_000_000);
    for i in 0..6 {
        write(&fs, &format!("/s3/d/f{i}"), &bytes(i), later(2)).await;
    }
    write(&fs, "/s3/old", b"new", later(0)).await;
    // Cached bytes that could leave do, those that are nowhere else stay.
    let folder = cluster.mount_folder("/m", &[]).await;
    for i in 0..40 {
        std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, 1_000_000)).unwrap();
        assert!(read_all(&fs, &format!("/m/f{i}")).await == pattern(i, 0, 1_000_000));
    }
    eventually("told, with the cause", 20, async || {
        let risk = at_risk(&cluster);
        risk["files"] == 7 && risk["bytes"] == 6_000_003 && risk["oldest"][0]["error"].as_str().is_some_and(|e| e.contains("s3://bucket"))
    })
    .await;
    assert_eq!(at_risk(&cluster)["oldest"][0]["copies"], 2, "as many as were asked for");
    // Moved, replaced and deleted on its way; the acknowledgement is the journal's.
    fs.rename(&p("/s3/d/f0"), &p("/s3/d/moved"), false).await.unwrap();
    fs.rename(&p("/s3/d"), &p("/s3/e"), false).await.unwrap();
    fs.mkdir(&p("/s3/made"), false, false).await.unwrap();
    fs.delete(&p("/s3/e/f1"), false).await.unwrap();
    write(&fs, "/s3/e/f2", b"replaced", later(0)).await;
    assert_eq!(read_all(&fs, "/s3/old").await, b"new");
    assert!(read_all(&fs, "/s3/e/moved").await == bytes(0));
    cluster.ok(&["fs", "loadMetadata", "/m"]);
    proxy.set(Fault::None, 1);
    eventually("all is there", 180, async || at_risk(&cluster)["files"] == 0).await;
    eventually("changes too", 180, async || cluster.json(&["fsadmin", "report", "summary"])["pending_changes"] == 0).await;
    let mut there: Vec<String> = Vec::new();
    for folder in ["", "d", "e"] {
        let listed = store.list(folder.as_bytes()).await.unwrap();
        there.extend(listed.entries.iter().filter(|e| !e.folder).map(|e| format!("{folder}/{}", String::from_utf8_lossy(&e.name))));
    }
    assert_eq!(there, ["/old", "e/f2", "e/f3", "e/f4", "e/f5", "e/moved"]);
    assert!(get_behind(&store, "e/moved").await.unwrap() == bytes(0) && get_behind(&store, "e/f2").await.unwrap() == "replaced");
    assert_eq!(get_behind(&store, "old").await.unwrap(), "new");
    cluster.ok(&["fs", "checkConsistency", "/s3"]);
    // Now they may leave the cache.
    cluster.counters_arrived().await;
    assert_eq!(fs.free(&p("/s3")).await.unwrap().kept, 0);
    assert!(read_all(&fs, "/s3/e/moved").await == bytes(0));
    // A mount does not go before what was acknowledged has got to its store.
    proxy.set(Fault::Unavailable, 1);
    write(&fs, "/s3/last", b"last", later(0)).await;
    let quick = FileSystem::connect(&forebay_common::config::ClientConfig { call_timeout_ms: 500, ..cluster.client_config() }).await.unwrap();
    let refused = quick.unmount(&p("/s3")).await.unwrap_err();
    // Whether it waits or is just being published.
    assert!(refused.kind() == ErrorKind::Busy && refused.message().contains("/s3"), "{refused}");
    proxy.set(Fault::None, 1);
    eventually("there", 120, async || at_risk(&cluster)["files"] == 0).await;
    // More copies than workers: said at once.
    let refused = fs.create(&p("/s3/three"), &later(3)).await.map(drop).unwrap_err();
    assert!(refused.message().contains("3 times") && refused.message().contains("2 workers"), "{refused}");
}

/// `kill -9` of a worker, the master or the store at random while files are written: each acknowledged one, with two copies, or
/// after its worker's restart, is in the store byte for byte in the end, and only under its own name.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random() {
    let rounds: u32 = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let mut rng = rng("killed_at_random");
    let mut cluster = Cluster::start(2, &[("master.worker_timeout_ms", "2000")]).await;
    let dir = cluster.dir.path().to_owned();
    let mut s3 = S3::start(&dir).await;
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").unwrap(), &s3.options(None)).unwrap();
    let mut mount = s3.options(None);
    mount.extend([("retries", "1"), ("timeout_ms", "2000"), ("write_type", "async")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    cluster.client().await.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Arc<std::sync::Mutex<BTreeMap<String, (u64, usize)>>> = Arc::default();
    let next = Arc::new(AtomicU64::new(1));
    let mut writers = Vec::new();
    for w in 0..3u32 {
        let client = cluster.client().await;
        let (stop, acknowledged, next) = (stop.clone(), acknowledged.clone(), next.clone());
        writers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let tag = next.fetch_add(1, Ordering::Relaxed);
                let length = [0, 1, 70_000, 400_000, 2_500_000][rand::random_range(0..5)];
                let (temporary, path) = (format!("/s3/w{w}/_tmp/f{tag}"), format!("/s3/w{w}/f{tag}"));
                let wrote = async {
                    let mut file = client.create(&p(&temporary), &later(1 + w % 2)).await?;
                    file.write(&pattern(tag, 0, length)).await?;
                    file.close().await
                };
                if wrote.await.is_err() {
                    continue;
                }
                // Committed as jobs do it: by a rename.
                acknowledged.lock().unwrap().insert(temporary.clone(), (tag, length));
                if client.rename(&p(&temporary), &p(&path), false).await.is_ok() {
                    let mut all = acknowledged.lock().unwrap();
                    all.remove(&temporary);
                    all.insert(path, (tag, length));
                }
            }
        }));
    }
    for round in 0..rounds {
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..900))).await;
        match rng.random_range(0..4) {
            0 => cluster.restart_master(),
            1 => s3 = s3.kill_and_start_again(&dir).await,
            i => {
                let i = i as usize - 2;
                cluster.kill_worker(i);
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..800))).await;
                cluster.start_worker(i);
            }
        }
        if round % 10 == 9 {
            eprintln!("{} rounds, {} files acknowledged", round + 1, acknowledged.lock().unwrap().len());
        }
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let fs = cluster.client().await;
    eventually("all acknowledged files are in the store", 180, async || at_risk(&cluster)["files"] == 0).await;
    eventually("all changes are", 60, async || cluster.json(&["fsadmin", "report", "summary"])["pending_changes"] == 0).await;
    let all = acknowledged.lock().unwrap().clone();
    for (path, (tag, length)) in &all {
        // A rename whose answer was lost may have been done.
        let moved = path.replace("/_tmp", "");
        let found = if fs.exists(&p(path)).await.unwrap() { path } else { &moved };
        let status = fs.get_status(&p(found)).await.unwrap_or_else(|e| panic!("{path} was acknowledged: {e}"));
        assert!(status.persisted && status.length == *length as u64, "{status:?}");
        let bytes = get_behind(&store, found.trim_start_matches("/s3/")).await.unwrap_or_else(|e| panic!("{found}: {e}"));
        assert!(bytes == pattern(*tag, 0, *length), "{found} is not in the store byte for byte");
    }
    // Nothing twice, nothing that was deleted or moved away. Folders that became empty are none on S3.
    let said = cluster.run(&["fs", "checkConsistency", "/s3", "--json"]);
    let said = serde_json::Deserializer::from_slice(&said.stdout).into_iter::<serde_json::Value>().next().unwrap().unwrap();
    let emptied = |d: &serde_json::Value| d["what"] == "gone" && d["path"].as_str().is_some_and(|path| path.ends_with("/_tmp"));
    assert!(said["differences"].as_array().unwrap().iter().all(emptied), "{said}");
    eprintln!("{rounds} kills, {} files acknowledged and there", all.len());
    assert!(all.len() > rounds as usize);
    drop(s3);
}

/// With one copy on a disk that is lost the file is named as missing, and reading it is an error, never emptiness.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_named() {
    let mut cluster = Cluster::start(2, &[("master.worker_timeout_ms", "1000")]).await;
    let dir = cluster.dir.path().to_owned();
    let s3 = S3::start(&dir).await;
    let proxy = Proxy::start(&s3.endpoint).await;
    let fs = cluster.client().await;
    let mut mount = s3.options(Some(&proxy.endpoint));
    mount.extend([("retries", "0"), ("timeout_ms", "500")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    fs.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    proxy.set(Fault::Unavailable, 1);
    write(&fs, "/s3/lost", &pattern(1, 0, 500_000), later(1)).await;
    write(&fs, "/s3/twice", &pattern(2, 0, 500_000), later(2)).await;
    let stat = cluster.json(&["fs", "stat", "/s3/lost"]);
    let holder = stat["blocks"][0]["locations"][0]["worker"].as_str().unwrap().to_owned();
    let lost = cluster.worker_of(&holder);
    cluster.kill_worker(lost);
    cluster.forget_disks(lost);
    eventually("named as missing", 30, async || {
        let risk = at_risk(&cluster);
        let missing: Vec<&str> =
            risk["oldest"].as_array().unwrap().iter().filter(|f| f["missing"] == true).map(|f| f["path"].as_str().unwrap()).collect();
        missing == ["/s3/lost"]
    })
    .await;
    assert!(cluster.ok(&["fsadmin", "report", "summary"]).contains("NO LIVE WORKER"));
    let quick = forebay_common::config::ClientConfig { call_timeout_ms: 1_000, ..cluster.client_config() };
    let quick = FileSystem::connect(&quick).await.unwrap();
    let read = async {
        let file = quick.open(&p("/s3/lost")).await?;
        file.read_at(0, &mut [0; 10]).await
    };
    let error = read.await.unwrap_err();
    assert!(error.kind() != ErrorKind::NotFound, "{error}");
    assert!(read_all(&fs, "/s3/twice").await == pattern(2, 0, 500_000));
    proxy.set(Fault::None, 1);
    eventually("the other one gets there", 120, async || fs.get_status(&p("/s3/twice")).await.unwrap().persisted).await;
    assert_eq!(at_risk(&cluster)["files"], 1, "it is not forgotten");
    fs.delete(&p("/s3/lost"), false).await.unwrap();
    assert_eq!(at_risk(&cluster)["files"], 0);
}

/// (S-13) The store is down while clients read and write: cached reads go on, others get a clear error that may be tried again, writes
/// as their type says, and everything recovers by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_down_for_a_while() {
    let seconds: u64 = std::env::var("FOREBAY_TEST_DOWN_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let cluster = Cluster::start(1, &[]).await;
    let dir = cluster.dir.path().to_owned();
    let s3 = S3::start(&dir).await;
    let fs = cluster.client().await;
    let mut mount = s3.options(None);
    mount.extend([("retries", "1"), ("timeout_ms", "2000"), ("sync_interval_ms", "1000")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    fs.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    let through = CreateOptions { write_type: "through".into(), overwrite: true, ..Default::default() };
    for name in ["cached", "cold"] {
        write(&fs, &format!("/s3/{name}"), &pattern(1, 0, 1_000_000), through.clone()).await;
    }
    fs.free(&p("/s3/cold")).await.unwrap();
    eventually("freed", 10, async || cluster.json(&["fs", "stat", "/s3/cold"])["cached_percent"] == 0).await;
    cluster.counters_arrived().await;
    let endpoint = s3.endpoint.clone();
    let stopped = s3.stop();
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let reader = {
        let (fs, stop, reads) = (cluster.client().await, stop.clone(), reads.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert!(read_all(&fs, "/s3/cached").await == pattern(1, 0, 1_000_000));
                reads.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let quick = forebay_common::config::ClientConfig { call_timeout_ms: 1_500, ..cluster.client_config() };
    let quick = FileSystem::connect(&quick).await.unwrap();
    let down = std::time::Instant::now();
    let (mut later_written, mut refused) = (0u64, 0);
    while down.elapsed() < Duration::from_secs(seconds) {
        let cold = async {
            let file = quick.open(&p("/s3/cold")).await?;
            file.read_at(0, &mut [0; 10]).await
        };
        let error = cold.await.unwrap_err();
        assert!(error.is_retryable() && error.message().contains("s3://bucket"), "{error}");
        let unknown = quick.open(&p("/s3/never-seen")).await.map(drop).unwrap_err();
        assert!(unknown.is_retryable() && unknown.kind() != ErrorKind::NotFound, "{unknown}");
        let wrote = async {
            let mut file = quick.create(&p(&format!("/s3/cached-{refused}")), &through).await?;
            file.write(b"x").await?;
            file.close().await
        };
        assert!(wrote.await.is_err(), "written through means through");
        refused += 1;
        let only = CreateOptions { write_type: "cache_only".into(), overwrite: true, ..Default::default() };
        // Names that are known need no look at the store.
        write(&fs, "/s3/cached-only", b"here", only).await;
        write(&fs, &format!("/later{later_written}"), b"there", later(1)).await;
        later_written += 1;
    }
    let s3 = stopped.start_again(&dir).await;
    assert_eq!(s3.endpoint, endpoint);
    assert!(read_all(&fs, "/s3/cold").await == pattern(1, 0, 1_000_000), "it recovers by itself");
    write(&fs, "/s3/after", b"after", through).await;
    stop.store(true, Ordering::Relaxed);
    reader.await.unwrap();
    eprintln!("{seconds} s down: {} cached reads, {refused} refused, {later_written} written for later", reads.load(Ordering::Relaxed));
    assert!(reads.load(Ordering::Relaxed) > seconds * 5);
}
