//! What administrators do: times to live, blocks looked up, workers that leave and come back.

use forebay_client::CreateOptions;
use forebay_common::config::ClientConfig;
use forebay_tests::cluster::{Cluster, p};
use forebay_tests::{eventually, pattern, rng};
use rand::Rng;

/// (S-20) What has outlived its time is deleted, here and in the under store, or dropped from the cache; also when the master
/// was restarted in between; what was given more time stays.
#[tokio::test(flavor = "multi_thread")]
async fn times_to_live() {
    let mut cluster = Cluster::start(1, &[("master.lease_ttl_ms", "1000")]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1")]).await;
    std::fs::create_dir(folder.join("d")).unwrap();
    for name in ["gone", "freed", "stays", "later", "d/below"] {
        std::fs::write(folder.join(name), pattern(1, 0, 100_000)).unwrap();
    }
    cluster.ok(&["fs", "load", "/m"]);
    let cached = |name: &str| cluster.json(&["fs", "stat", name])["cached_percent"].as_u64().unwrap();
    eventually("all cached", 10, async || ["/m/gone", "/m/freed", "/m/stays"].iter().all(|f| cached(f) == 100)).await;
    cluster.ok(&["fs", "setTtl", "/m/stays", "1s"]);
    let stat = cluster.json(&["fs", "stat", "/m/stays"]);
    assert_eq!((stat["ttl_ms"].as_i64(), stat["ttl_action"].as_str()), (Some(1000), Some("delete")));
    cluster.ok(&["fs", "unsetTtl", "/m/stays"]);
    assert_eq!(cluster.json(&["fs", "stat", "/m/stays"])["ttl_ms"], -1);
    cluster.ok(&["fs", "setTtl", "/m/gone", "300"]);
    cluster.ok(&["fs", "setTtl", "--action", "free", "/m/freed", "300ms"]);
    cluster.ok(&["fs", "setTtl", "/m/d", "300ms"]);
    // The longer time replaces the shorter.
    cluster.ok(&["fs", "setTtl", "/m/later", "1500ms"]);
    cluster.ok(&["fs", "setTtl", "/m/later", "3s"]);
    let set = std::time::Instant::now();
    cluster.restart_master();
    let fs = cluster.client().await;
    let exists = async |name: &str| fs.exists(&p(name)).await.unwrap();
    eventually("what was to be deleted is", 20, async || !exists("/m/gone").await && !exists("/m/d").await).await;
    eventually("and in the under store", 20, async || !folder.join("gone").exists() && !folder.join("d").exists()).await;
    tokio::time::sleep(std::time::Duration::from_millis(2400).saturating_sub(set.elapsed())).await;
    let there = exists("/m/later").await;
    assert!(there || set.elapsed() > std::time::Duration::from_secs(3), "the longer time counts");
    eventually("what was to be freed is", 20, async || cluster.json(&["fs", "stat", "/m/freed"])["cached_percent"] == 0).await;
    assert_eq!(cluster.json(&["fs", "stat", "/m/freed"])["ttl_ms"], -1, "its time is over");
    assert!(folder.join("freed").exists() && exists("/m/stays").await);
    eventually("the later one too", 20, async || !exists("/m/later").await).await;
    assert!(exists("/m/stays").await);
    // What cannot be deleted now cannot be set to be deleted.
    for (arguments, says) in [
        (&["fs", "setTtl", "/m", "1s"][..], "mount"),
        (&["fs", "setTtl", "/m/stays", "soon"][..], "no time to live"),
        (&["fs", "setTtl", "/m/nothing", "1s"][..], "/m/nothing"),
    ] {
        let output = cluster.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(says), "{arguments:?}: {text}");
    }
}

/// A block's number leads to its file and to who has it, and nobody is told of files that are not for them.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_looked_up() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    let options = CreateOptions { write_type: "cache_only".into(), block_size_bytes: 1 << 20, mode: 0o600, ..CreateOptions::default() };
    let mut file = fs.create(&p("/f"), &options).await.unwrap();
    file.write(&pattern(1, 0, 2_500_000)).await.unwrap();
    file.close().await.unwrap();
    let stat = || cluster.json(&["fs", "stat", "/f"]);
    eventually("reported", 10, async || stat()["cached_percent"] == 100).await;
    let stat = stat();
    assert_eq!(stat["blocks"].as_array().unwrap().len(), 3);
    for block in stat["blocks"].as_array().unwrap() {
        let info = cluster.json(&["fsadmin", "getBlockInfo", &block["id"].to_string()]);
        assert_eq!(
            (&info["path"], &info["offset"], &info["length"], &info["locations"]),
            (&serde_json::json!("/f"), &block["offset"], &block["length"], &block["locations"])
        );
    }
    let output = cluster.run(&["fsadmin", "getBlockInfo", "999999999"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("no file has block 999999999"));
    let other = forebay_client::FileSystem::connect(&ClientConfig { user: "nobody".into(), ..cluster.client_config() }).await.unwrap();
    let id = stat["blocks"][0]["id"].as_u64().unwrap();
    let refused = other.get_block(id).await.unwrap_err();
    assert!(refused.kind() == forebay_common::ErrorKind::NotFound && !refused.message().contains("/f"), "not even its name: {refused}");
    assert_eq!(other.set_worker("1", true, false).await.unwrap_err().kind(), forebay_common::ErrorKind::NotFound);
    let worker = stat["blocks"][0]["locations"][0]["worker"].as_str().unwrap();
    assert_eq!(other.set_worker(worker, true, false).await.unwrap_err().kind(), forebay_common::ErrorKind::PermissionDenied);
}

/// (S-21) A worker that is told to leave gives its grants back, and has left when nothing is only there: it can be killed then
/// without a byte being lost. It gets nothing new until it is taken in again.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_leaves_and_comes_back() {
    let mut rng = rng("a_worker_leaves_and_comes_back");
    let mut cluster = Cluster::start(1, &[("worker.revoke_deadline_ms", "1500"), ("master.worker_timeout_ms", "2000")]).await;
    let fs = cluster.client().await;
    let options = CreateOptions { write_type: "cache_only".into(), block_size_bytes: 256 << 10, ..CreateOptions::default() };
    let mut lengths = Vec::new();
    for i in 0..30u64 {
        let length = rng.random_range(1..900_000);
        let mut file = fs.create(&p(&format!("/f{i}")), &options).await.unwrap();
        file.write(&pattern(i, 0, length)).await.unwrap();
        file.close().await.unwrap();
        lengths.push(length);
    }
    let first = format!("{:016x}", fs.report().await.unwrap().workers[0].address.as_ref().unwrap().worker_id);
    // Nobody is there to take anything over: it stays, and says so.
    cluster.ok(&["fsadmin", "decommissionWorker", "--no-wait", &first]);
    let to_move = async || fs.report().await.map_or(0, |r| r.workers[0].to_move);
    eventually("what is only there is counted", 20, async || (30..u64::MAX).contains(&to_move().await)).await;
    let state = &cluster.json(&["fsadmin", "report", "capacity"])["workers"][0];
    assert_eq!((&state["leaving"], &state["left"]), (&serde_json::json!(true), &serde_json::json!(false)));
    let hasty = forebay_client::FileSystem::connect(&ClientConfig { call_timeout_ms: 500, ..cluster.client_config() }).await.unwrap();
    assert!(hasty.create(&p("/nowhere"), &options).await.is_err(), "nothing new comes to a worker that leaves");
    // Held through short circuit, as long as its client likes: its connection is closed in the end.
    let holder = cluster.client().await;
    cluster.ok(&["fsadmin", "enableWorker", &first]);
    eventually("registered again", 20, async || fs.report().await.is_ok_and(|r| r.workers.first().is_some_and(|w| !w.leaving && !w.lost))).await;
    eventually("reported again", 20, async || cluster.json(&["fs", "stat", "/f0"])["cached_percent"] == 100).await;
    // A large one, which is mapped.
    let large = (0..lengths.len()).max_by_key(|i| lengths[*i]).unwrap();
    let file = holder.open(&p(&format!("/f{large}"))).await.unwrap();
    eventually("grants are given again", 20, async || file.descriptor(0).await.is_some()).await;
    let slice = file.slice(0, 1000).await.unwrap();
    cluster.add_worker(&[]);
    eventually("two workers", 20, async || fs.report().await.is_ok_and(|r| r.workers.len() == 2)).await;
    let said = cluster.ok(&["fsadmin", "decommissionWorker", &first]);
    assert!(said.contains("has left"), "{said}");
    let log = cluster.dir.path().join("worker-0/worker.log");
    let log = || std::fs::read_to_string(&log).unwrap();
    eventually("who does not let go is cut off", 20, async || log().contains("did not let go in time")).await;
    cluster.kill_worker(0);
    assert!(slice[..] == pattern(large as u64, 0, slice.len())[..], "what a client holds stays as it is");
    let later = cluster.client().await;
    for (i, length) in lengths.iter().enumerate() {
        let file = later.open(&p(&format!("/f{i}"))).await.unwrap();
        let mut out = vec![0; *length];
        assert_eq!(file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("/f{i}: {e}")), *length);
        assert!(out == pattern(i as u64, 0, *length), "/f{i}");
    }
    // It remembers over restarts of both, and serves again when it is taken in.
    cluster.restart_master();
    cluster.start_worker(0);
    eventually("both are there", 20, async || later.report().await.is_ok_and(|r| r.workers.iter().filter(|w| !w.lost).count() == 2)).await;
    let leaving = |r: &forebay_proto::ReportResponse| r.workers.iter().filter(|w| w.leaving).count();
    assert_eq!(leaving(&later.report().await.unwrap()), 1, "a new master knows who is to leave");
    cluster.ok(&["fsadmin", "enableWorker", &first]);
    eventually("taken in again", 20, async || later.report().await.is_ok_and(|r| leaving(&r) == 0 && r.workers.len() == 2)).await;
    cluster.kill_worker(1);
    for (i, length) in lengths.iter().enumerate().step_by(7) {
        let file = later.open(&p(&format!("/f{i}"))).await.unwrap();
        let mut out = vec![0; *length];
        file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("/f{i} on the worker that came back: {e}"));
        assert!(out == pattern(i as u64, 0, *length), "/f{i}");
    }
}
