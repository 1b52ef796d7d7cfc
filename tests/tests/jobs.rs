//! (S-25) Jobs: what they load, copy, persist and replicate, and what is left of them when the master or a worker dies.

use forebay_client::{CreateOptions, FileSystem};
use forebay_tests::cluster::p;
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, eventually, pattern};
use serde_json::Value;

/// Files of 16 KiB; `--full` takes 100,000.
fn small_files() -> usize {
    std::env::var("FOREBAY_TEST_FILES").ok().and_then(|n| n.parse().ok()).unwrap_or(5_000)
}

async fn copies(fs: &FileSystem, path: &str) -> Vec<usize> {
    let answer = fs.get_status_with_blocks(&p(path), true).await.unwrap();
    let whole = |b: &forebay_proto::BlockInfo| b.locations.iter().filter(|l| l.cached_bytes >= b.length).count();
    answer.blocks.iter().map(whole).collect()
}

/// Paths, globs and lists; to several workers and to a tier; failures by name; cancelled, and shown afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn load() {
    let mut cluster = Cluster::start(2, &[]).await;
    let tier = cluster.dir.path().join("SSD");
    let mem = cluster.dir.path().join("MEM");
    let tiers = format!(
        "[{{ medium = \"MEM\", dirs = [{{ path = {:?}, quota = \"64MiB\" }}] }}, {{ medium = \"SSD\", dirs = [{{ path = {:?}, quota = \"64MiB\" }}] }}]",
        mem.display().to_string(),
        tier.display().to_string()
    );
    let folder = cluster.mount_folder("/m", &[("block_size", "1MiB")]).await;
    std::fs::create_dir_all(folder.join("a/deep")).unwrap();
    std::fs::create_dir_all(folder.join("b")).unwrap();
    for name in ["a/1.csv", "a/2.csv", "a/deep/3.csv", "b/4.csv", "b/5.txt"] {
        std::fs::write(folder.join(name), pattern(1, 0, 2_500_000)).unwrap();
    }
    let fs = cluster.client().await;
    let said = cluster.json(&["fs", "load", "/m/*/?.csv"]);
    assert_eq!((&said["files"], &said["failed"], &said["state"]), (&3.into(), &0.into(), &"done".into()), "{said}");
    assert_eq!((copies(&fs, "/m/a/1.csv").await, copies(&fs, "/m/a/deep/3.csv").await), (vec![1; 3], vec![0; 3]));
    let before = cluster.json(&["fs", "load", "/m/a"]);
    assert_eq!((&before["files"], &before["files_skipped"]), (&3.into(), &2.into()), "{before}");
    let list = cluster.dir.path().join("list");
    std::fs::write(&list, "# to be loaded\n/m/b\n\n/m/none\n").unwrap();
    let partly = cluster.run(&["fs", "load", "--list", &list.to_string_lossy(), "--json"]);
    let said: Value = serde_json::Deserializer::from_slice(&partly.stdout).into_iter().next().unwrap().unwrap();
    assert!(partly.status.code() == Some(1) && said["files"] == 2 && said["failures"][0]["path"] == "/m/none", "{said}");
    cluster.ok(&["fs", "load", "/m/a/1.csv", "--replicas", "2"]);
    assert_eq!(copies(&fs, "/m/a/1.csv").await, [2; 3]);
    assert_eq!(cluster.run(&["fs", "load", "/m/a", "--replicas", "3"]).status.code(), Some(1), "there are two workers");
    assert!(read_all(&fs, "/m/a/1.csv").await == pattern(1, 0, 2_500_000));
    // One worker with two tiers: into the one that was asked for.
    cluster.add_worker(&[("worker.tiers", tiers.as_str())]);
    for i in 0..2 {
        cluster.kill_worker(i);
    }
    eventually("the others are lost", 40, async || cluster.json(&["fsadmin", "report", "summary"])["live_workers"] == 1).await;
    cluster.ok(&["fs", "load", "/m/b/4.csv", "--tier", "SSD"]);
    let located = cluster.json(&["fs", "location", "/m/b/4.csv"]);
    let tier_of = |b: &Value| b["locations"].as_array().unwrap().iter().any(|l| l["tier"] == "SSD");
    eventually("in that tier", 10, async || cluster.json(&["fs", "location", "/m/b/4.csv"]).as_array().unwrap().iter().all(tier_of)).await;
    assert!(located.as_array().is_some_and(|b| b.len() == 3));
    // Slowly, without waiting; cancelled.
    cluster.ok(&["fs", "free", "/m"]);
    let job = cluster.json(&["fs", "load", "/m", "--bandwidth", "64KiB", "--no-wait"])["job"].as_u64().unwrap().to_string();
    assert_eq!(cluster.json(&["job", "stat", &job])["state"], "running");
    cluster.ok(&["job", "cancel", &job]);
    assert_eq!(cluster.json(&["job", "stat", &job])["state"], "cancelled");
    assert_eq!(cluster.run(&["job", "cancel", &job]).status.code(), Some(2), "it is over");
    assert!(cluster.ok(&["job", "ls"]).contains("cancelled"));
    assert_eq!(cluster.run(&["job", "stat", "4711"]).status.code(), Some(1));
}

/// Between mounts, by the workers: files, folders, what is cached alone; over what is there only when asked; moved.
#[tokio::test(flavor = "multi_thread")]
async fn copy_between_mounts() {
    let cluster = Cluster::start(2, &[]).await;
    let s3 = forebay_tests::s3::S3::start(cluster.dir.path()).await;
    let fs = cluster.client().await;
    fs.mount(&p("/s3"), "s3://bucket", false, s3.options(None)).await.unwrap();
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    let cache_only = CreateOptions { write_type: "cache_only".into(), recursive: true, ..Default::default() };
    write(&fs, "/m/d/stored", &pattern(1, 0, 3_000_000), CreateOptions { recursive: true, ..Default::default() }).await;
    write(&fs, "/m/d/in/cached", &pattern(2, 0, 1_500_000), cache_only).await;
    fs.touch(&p("/m/d/empty"), &CreateOptions::default()).await.unwrap();
    fs.mkdir(&p("/m/d/nothing"), false, false).await.unwrap();
    let said = cluster.json(&["fs", "cp", "/m/d", "/s3/copy"]);
    assert_eq!((&said["files"], &said["bytes"]), (&3.into(), &4_500_000.into()), "{said}");
    assert!(std::fs::read(s3.folder.join("copy/stored")).unwrap() == pattern(1, 0, 3_000_000));
    assert!(std::fs::read(s3.folder.join("copy/in/cached")).unwrap() == pattern(2, 0, 1_500_000));
    assert!(read_all(&fs, "/s3/copy/in/cached").await == pattern(2, 0, 1_500_000));
    assert!(fs.exists(&p("/s3/copy/nothing")).await.unwrap() && fs.get_status(&p("/s3/copy/empty")).await.unwrap().length == 0);
    // By whom each byte is sent is the workers' affair, not this client's.
    write(&fs, "/m/d/stored", b"newer", CreateOptions { overwrite: true, ..Default::default() }).await;
    let again = cluster.run(&["fs", "cp", "/m/d/stored", "/s3/copy/stored", "--json"]);
    assert!(again.status.code() == Some(1) && String::from_utf8_lossy(&again.stdout).contains("exists already"));
    cluster.ok(&["fs", "cp", "--force", "/m/d/stored", "/s3/copy/stored"]);
    assert_eq!(read_all(&fs, "/s3/copy/stored").await, b"newer");
    cluster.ok(&["fs", "cp", "--move", "/m/d", "/s3/moved"]);
    assert!(!folder.join("d").exists() && !fs.exists(&p("/m/d")).await.unwrap());
    assert!(read_all(&fs, "/s3/moved/in/cached").await == pattern(2, 0, 1_500_000));
    cluster.ok(&["fs", "checkConsistency", "/s3"]);
    assert_eq!(cluster.run(&["fs", "cp", "/s3/moved", "/s3/moved/below"]).status.code(), Some(1));
    // `persist` for what was kept in the cache alone.
    write(&fs, "/m/kept", b"kept", CreateOptions { write_type: "cache_only".into(), ..Default::default() }).await;
    assert!(!folder.join("kept").exists());
    cluster.ok(&["fs", "persist", "/m"]);
    assert_eq!(std::fs::read(folder.join("kept")).unwrap(), b"kept");
}

/// Bytes of the file of `a_large_file_is_copied_by_all_workers`: ten pieces of 8 MiB.
const LARGE_BYTES: usize = (75 << 20) + 12_345;

/// (S-25) A large file is written by all workers at once, piece by piece, into each kind of store; by those that are left when one is
/// killed; and nothing of it stays when the job is cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_is_copied_by_all_workers() {
    let mut cluster = Cluster::start(3, &[("master.worker_timeout_ms", "1000")]).await;
    let s3 = forebay_tests::s3::S3::start(cluster.dir.path()).await;
    let hdfs = forebay_tests::hdfs::Hdfs::start(cluster.dir.path()).await;
    let fs = cluster.client().await;
    fs.mount(&p("/s3"), "s3://bucket/deep/er", false, s3.options(None)).await.unwrap();
    fs.mount(&p("/hdfs"), &format!("{}/w", hdfs.uri), false, Default::default()).await.unwrap();
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0"), ("block_size", "3MiB")]).await;
    let bytes = pattern(1, 0, LARGE_BYTES);
    std::fs::write(folder.join("large"), &bytes).unwrap();
    let written = "forebay_worker_written_through_bytes_total";
    for target in ["/s3/a/large file", "/hdfs/a/large", "/m/a/large"] {
        let before = cluster.worker_metrics(written).await;
        let said = cluster.json(&["fs", "cp", "/m/large", target]);
        assert_eq!((&said["files"], &said["bytes"], &said["bytes_found"]), (&1.into(), &LARGE_BYTES.into(), &LARGE_BYTES.into()), "{said}");
        let after = cluster.worker_metrics(written).await;
        let each: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        assert!(
            each.len() == 3 && each.iter().all(|bytes| *bytes >= 8 << 20) && each.iter().sum::<u64>() == LARGE_BYTES as u64,
            "{target}: {each:?}"
        );
        assert!(read_all(&fs, target).await == bytes, "{target}");
    }
    assert!(std::fs::read(s3.folder.join("deep/er/a/large file")).unwrap() == bytes);
    assert!(hdfs.shell(&["-cat", "/w/a/large"]).stdout == bytes);
    cluster.ok(&["fs", "checkConsistency", "/"]);
    // A worker is killed in the middle.
    for (round, target) in ["/s3/b", "/hdfs/b", "/m/b"].into_iter().enumerate() {
        let job = cluster.json(&["fs", "cp", "/m/large", target, "--bandwidth", "24MiB", "--no-wait"])["job"].as_u64().unwrap().to_string();
        eventually("some of it is there", 60, async || cluster.json(&["job", "stat", &job])["bytes"].as_u64().unwrap() > 8 << 20).await;
        let victim = round % 3;
        cluster.kill_worker(victim);
        eventually("the job is over", 120, async || cluster.json(&["job", "stat", &job])["state"] != "running").await;
        let said = cluster.json(&["job", "stat", &job]);
        assert!(said["state"] == "done" && said["bytes"] == LARGE_BYTES, "{said}");
        cluster.start_worker(victim);
        eventually("all workers", 40, async || cluster.json(&["fsadmin", "report", "summary"])["live_workers"] == 3).await;
        assert!(read_all(&fs, target).await == bytes, "{target}");
    }
    // Given up in the middle.
    for target in ["/s3/c", "/hdfs/c", "/m/c"] {
        let job = cluster.json(&["fs", "cp", "/m/large", target, "--bandwidth", "16MiB", "--no-wait"])["job"].as_u64().unwrap().to_string();
        eventually("some of it is there", 60, async || cluster.json(&["job", "stat", &job])["bytes"].as_u64().unwrap() > 0).await;
        cluster.ok(&["job", "cancel", &job]);
    }
    let remnants = async || {
        let local =
            std::fs::read_dir(&folder).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".forebay-tmp")).count();
        let there = String::from_utf8(hdfs.shell(&["-ls", "/w"]).stdout).unwrap();
        local + there.matches(".forebay-tmp").count()
    };
    eventually("nothing is left in progress", 60, async || remnants().await == 0).await;
    assert!(!folder.join("c").exists() && !s3.folder.join("deep/er/c").exists());
}

/// (S-26) Files that wish for copies have them, again after a worker was lost; those of no under store first. What is read
/// elsewhere again and again gets a copy there, up to the mount's limit.
#[tokio::test(flavor = "multi_thread")]
async fn replication() {
    let mut cluster = Cluster::start(3, &[("master.worker_timeout_ms", "1000")]).await;
    let folder = cluster.mount_folder("/m", &[("passive_replicas", "2")]).await;
    std::fs::write(folder.join("f"), pattern(1, 0, 3_000_000)).unwrap();
    let fs = cluster.client().await;
    write(&fs, "/m/only", &pattern(2, 0, 2_000_000), CreateOptions { write_type: "cache_only".into(), replicas: 2, ..Default::default() }).await;
    assert_eq!(copies(&fs, "/m/only").await, [2], "before it was acknowledged");
    cluster.ok(&["fs", "setReplication", "--min", "3", "/m/f"]);
    assert_eq!(copies(&fs, "/m/f").await, [3]);
    assert_eq!(cluster.json(&["fs", "stat", "/m/f"])["replication_min"], 3);
    cluster.ok(&["fs", "setReplication", "--min", "0", "--max", "1", "/m/f"]);
    assert_eq!(copies(&fs, "/m/f").await, [1]);
    let holder = cluster.json(&["fs", "stat", "/m/only"])["blocks"][0]["locations"][0]["worker"].as_str().unwrap().to_owned();
    let i = cluster.worker_of(&holder);
    cluster.kill_worker(i);
    cluster.forget_disks(i);
    eventually("copied again", 30, async || copies(&fs, "/m/only").await == [2]).await;
    assert!(read_all(&fs, "/m/only").await == pattern(2, 0, 2_000_000));
    // Passive: read twice beside a worker that does not have it.
    std::fs::write(folder.join("hot"), pattern(3, 0, 1_000_000)).unwrap();
    cluster.ok(&["fs", "load", "/m/hot"]);
    assert_eq!(copies(&fs, "/m/hot").await, [1]);
    let mut clients = Vec::new();
    for _ in 0..2 {
        clients.push(cluster.client().await);
    }
    for _ in 0..3 {
        for client in &clients {
            assert!(read_all(client, "/m/hot").await == pattern(3, 0, 1_000_000));
        }
    }
    assert!(copies(&fs, "/m/hot").await[0] <= 2, "the mount's limit");
}

/// Many small files, while the master and a worker are killed: the job goes on and all is loaded. With the rates of the same run.
#[tokio::test(flavor = "multi_thread")]
async fn many_small_files() {
    let files = small_files();
    let mut cluster = Cluster::start(2, &[("worker.mem_quota", "\"2GiB\"")]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("page_size", "64KiB")]).await;
    let bytes = pattern(1, 0, 16 << 10);
    for d in 0..files.div_ceil(1_000) {
        std::fs::create_dir_all(folder.join(format!("d{d:03}"))).unwrap();
        for i in 0..1_000.min(files - d * 1_000) {
            std::fs::write(folder.join(format!("d{d:03}/f{i:03}")), &bytes).unwrap();
        }
    }
    let timed = |what: &str, command: &mut std::process::Command| {
        let began = std::time::Instant::now();
        assert!(command.output().unwrap().status.success());
        let seconds = began.elapsed().as_secs_f64();
        eprintln!("{what}: {files} files in {seconds:.2} s, {:.0}/s", files as f64 / seconds);
    };
    timed("find (bare recursive listing)", std::process::Command::new("find").arg(&folder).arg("-printf").arg("%s %T@\\n"));
    let loaded = cluster.json(&["fs", "loadMetadata", "-R", "/m"]);
    eprintln!("loadMetadata: {:.0}/s", files as f64 / loaded["seconds"].as_f64().unwrap());
    assert_eq!(loaded["entries"].as_u64().unwrap() as usize, files + files.div_ceil(1_000));
    timed("cp -r from the store", std::process::Command::new("cp").arg("-r").arg(&folder).arg(cluster.dir.path().join("copy")));
    let job = cluster.json(&["fs", "load", "/m", "--no-wait"])["job"].as_u64().unwrap().to_string();
    cluster.restart_master();
    cluster.kill_worker(0);
    cluster.start_worker(0);
    eventually("the job is over", 300, async || cluster.json(&["job", "stat", &job])["state"] != "running").await;
    let said = cluster.json(&["job", "stat", &job]);
    assert!(said["state"] == "done" && said["files"] == files, "{said}");
    let fs = cluster.client().await;
    cluster.ok(&["fs", "free", "/m/*"]);
    cluster.counters_arrived().await;
    let before = cluster.metric("Cluster.BytesReadUfs").await;
    let loaded = cluster.json(&["fs", "load", "/m"]);
    eprintln!("load: {:.0}/s", files as f64 / loaded["seconds"].as_f64().unwrap());
    cluster.counters_arrived().await;
    let moved = cluster.metric("Cluster.BytesReadUfs").await - before;
    assert_eq!(moved, (files * bytes.len()) as u64, "each byte once");
    let began = std::time::Instant::now();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let read = async || loop {
        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if i >= files {
            return;
        }
        assert!(read_all(&fs, &format!("/m/d{:03}/f{:03}", i / 1_000, i % 1_000)).await == bytes);
    };
    tokio::join!(read(), read(), read(), read(), read(), read(), read(), read());
    eprintln!("reading all: {:.0}/s", files as f64 / began.elapsed().as_secs_f64());
    cluster.counters_arrived().await;
    assert_eq!(cluster.metric("Cluster.BytesReadUfs").await - before, moved, "from the cache alone");
}
