//! A cluster's id: blocks of one cluster are never taken for another's, whatever becomes of a master's data.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::config::ClientConfig;
use forebay_tests::cluster::{Cluster, p};
use forebay_tests::{eventually, pattern};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

const LENGTH: usize = 900_000;

async fn write(fs: &FileSystem, path: &str, seed: u64, write_type: &str) {
    let options = CreateOptions { write_type: write_type.into(), block_size_bytes: 256 << 10, ..CreateOptions::default() };
    let mut file = fs.create(&p(path), &options).await.unwrap_or_else(|e| panic!("{path}: {e}"));
    file.write(&pattern(seed, 0, LENGTH)).await.unwrap();
    file.close().await.unwrap();
}

async fn assert_reads(fs: &FileSystem, path: &str, seed: u64) {
    let file = fs.open(&p(path)).await.unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut out = vec![0; LENGTH];
    assert_eq!(file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("{path}: {e}")), LENGTH);
    assert!(out == pattern(seed, 0, LENGTH), "{path} has other bytes");
}

fn blocks(cluster: &Cluster, path: &str) -> BTreeSet<u64> {
    cluster.json(&["fs", "stat", path])["blocks"].as_array().unwrap().iter().map(|b| b["id"].as_u64().unwrap()).collect()
}

fn report(cluster: &Cluster) -> Value {
    cluster.json(&["fsadmin", "report"])
}

fn id(cluster: &Cluster) -> String {
    report(cluster)["cluster"].as_str().unwrap().to_owned()
}

/// The master ends, and its data are kept under another name.
fn stop_master(cluster: &mut Cluster, keep_as: &str) -> (PathBuf, PathBuf) {
    cluster.master.take().unwrap().kill();
    let (dir, kept) = (cluster.dir.path().join("master"), cluster.dir.path().join(keep_as));
    std::fs::rename(&dir, &kept).unwrap();
    (dir, kept)
}

async fn let_in(cluster: &Cluster) {
    eventually("the worker is let in", 30, async || report(cluster)["live_workers"] == 1).await;
}

async fn refused(cluster: &Cluster, says: &[&str]) {
    let reason = || report(cluster)["refused_workers"][0]["reason"].as_str().unwrap_or_default().to_owned();
    eventually("the worker is refused", 30, async || says.iter().all(|word| reason().contains(word))).await;
    eventually("and says so", 30, async || cluster.worker_page(0, "/readyz").await.contains(says[0])).await;
    assert_eq!(report(cluster)["live_workers"], 0);
}

/// (S-44) A master that begins anew does not take the blocks of workers that are still there for its own files'; nothing of them is lost before somebody has said
/// so, and they are served again when their master is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_begins_anew_takes_no_old_blocks() {
    let mut cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let fs = cluster.client().await;
    write(&fs, "/only", 1, "cache_only").await;
    write(&fs, "/m/through", 2, "through").await;
    let (first, old) = (id(&cluster), blocks(&cluster, "/only"));

    // Its data are gone; the worker runs on.
    let (dir, kept) = stop_master(&mut cluster, "first");
    cluster.start_master();
    let second = id(&cluster);
    assert_ne!(first, second);
    refused(&cluster, &[&format!("of cluster {first}"), &format!("of cluster {second}"), "worker.discard_blocks_of"]).await;
    let doctor = cluster.run(&["fsadmin", "doctor"]);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(!doctor.status.success() && said.contains("not let in") && said.contains(&first), "{said}");
    let hasty = FileSystem::connect(&ClientConfig { call_timeout_ms: 500, ..cluster.client_config() }).await.unwrap();
    let options = CreateOptions { write_type: "cache_only".into(), ..CreateOptions::default() };
    assert!(hasty.create(&p("/x"), &options).await.is_err(), "nothing comes to a worker that is not let in");
    // Started again it is the same.
    cluster.kill_worker(0);
    cluster.start_worker(0);
    refused(&cluster, &[&format!("of cluster {first}")]).await;

    // Its own master is back, and all is there.
    cluster.master.take().unwrap().kill();
    std::fs::rename(&dir, cluster.dir.path().join("second")).unwrap();
    std::fs::rename(&kept, &dir).unwrap();
    cluster.start_master();
    let_in(&cluster).await;
    assert_eq!((id(&cluster), blocks(&cluster, "/only")), (first.clone(), old.clone()));
    let fs = cluster.client().await;
    assert_reads(&fs, "/only", 1).await;
    assert_reads(&fs, "/m/through", 2).await;

    // Gone for good: what is nowhere else is given up by its cluster's name alone.
    stop_master(&mut cluster, "third");
    cluster.start_master();
    cluster.kill_worker(0);
    cluster.set_worker(0, "worker.discard_blocks_of", "[\"any\"]");
    cluster.start_worker(0);
    let says = async || cluster.worker_page(0, "/readyz").await;
    eventually("what keeps it out is said", 30, async || says().await.contains("4 blocks whose bytes are nowhere else")).await;
    assert!(says().await.contains(&format!("[\"{first}\"]")), "{}", says().await);
    cluster.kill_worker(0);
    cluster.set_worker(0, "worker.discard_blocks_of", &format!("[{first:?}]"));
    cluster.start_worker(0);
    let_in(&cluster).await;
    assert_eq!(report(&cluster)["refused_workers"], serde_json::json!([]));
    let page = cluster.worker_page(0, "/metrics").await;
    let dropped = page.lines().find(|line| line.starts_with("forebay_worker_discarded_blocks_total ")).unwrap();
    assert_eq!(dropped, "forebay_worker_discarded_blocks_total 8");
    let fs = cluster.client().await;
    write(&fs, "/only", 3, "cache_only").await;
    assert!(blocks(&cluster, "/only").is_disjoint(&old), "numbers begin elsewhere");
    assert_reads(&fs, "/only", 3).await;
    // It stays so, whatever is still configured.
    cluster.kill_worker(0);
    cluster.start_worker(0);
    eventually("read again", 30, async || cluster.json(&["fs", "stat", "/only"])["cached_percent"] == 100).await;
    assert_reads(&cluster.client().await, "/only", 3).await;
}

/// What is cached, and in a store, is dropped for whichever cluster where the configuration says so: nobody has to come.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_cached_may_be_dropped_by_itself() {
    let mut cluster = Cluster::start(1, &[("worker.discard_blocks_of", "[\"any\"]")]).await;
    let folder = cluster.mount_folder("/m", &[]).await;
    write(&cluster.client().await, "/m/f", 1, "through").await;
    eventually("settled", 10, async || cluster.json(&["fs", "stat", "/m/f"])["cached_percent"] == 100).await;
    stop_master(&mut cluster, "first");
    cluster.start_master();
    let_in(&cluster).await;
    let uri = format!("file://{}", folder.display());
    let fs = cluster.client().await;
    fs.mount(&p("/m"), &uri, false, Default::default()).await.unwrap();
    assert_eq!(cluster.json(&["fs", "stat", "/m/f"])["cached_percent"], 0);
    assert_reads(&fs, "/m/f", 1).await;
}

/// Blocks that a version wrote that knew no clusters are not a new cluster's either.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_without_a_name_are_not_a_new_clusters() {
    let mut cluster = Cluster::start(1, &[]).await;
    write(&cluster.client().await, "/f", 1, "cache_only").await;
    cluster.kill_worker(0);
    std::fs::remove_file(cluster.dir.path().join("worker-0/mem/blocks/CLUSTER")).unwrap();
    stop_master(&mut cluster, "first");
    cluster.start_master();
    cluster.start_worker(0);
    refused(&cluster, &["a version that knew no clusters", "[\"unnamed\"]"]).await;
    cluster.kill_worker(0);
    cluster.set_worker(0, "worker.discard_blocks_of", "[\"unnamed\"]");
    cluster.start_worker(0);
    let_in(&cluster).await;
    let fs = cluster.client().await;
    write(&fs, "/f", 2, "cache_only").await;
    assert_reads(&fs, "/f", 2).await;
}

/// (S-44) A master whose data were put back to an earlier state does not know which numbers it has given out since. It gives out others; and what is nowhere else is kept until
/// the newer data are back, or somebody has given it up.
#[tokio::test(flavor = "multi_thread")]
async fn data_that_were_put_back_give_out_other_numbers() {
    let mut cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    write(&fs, "/before", 1, "cache_only").await;
    // Nothing is numbered between this start and the copy.
    cluster.restart_master();
    let_in(&cluster).await;
    cluster.master.take().unwrap().kill();
    let (dir, copy) = (cluster.dir.path().join("master"), cluster.dir.path().join("copy"));
    let copied = std::process::Command::new("cp").arg("-a").args([&dir, &copy]).status().unwrap();
    assert!(copied.success());
    cluster.start_master();
    let_in(&cluster).await;
    let fs = cluster.client().await;
    write(&fs, "/lost", 2, "cache_only").await;
    let (lost, file) = (blocks(&cluster, "/lost"), fs.open(&p("/lost")).await.unwrap());
    stop_master(&mut cluster, "newer");
    std::fs::rename(&copy, &dir).unwrap();
    cluster.start_master();
    let_in(&cluster).await;
    let fs = cluster.client().await;
    write(&fs, "/after", 3, "cache_only").await;
    let after = blocks(&cluster, "/after");
    assert!(after.is_disjoint(&lost), "{after:?} {lost:?}");
    assert!(after.iter().chain(&lost).all(|id| *id < 1 << 53), "what reads JSON as doubles can read them");
    assert_reads(&fs, "/after", 3).await;
    assert_reads(&fs, "/before", 1).await;
    assert!(!fs.exists(&p("/lost")).await.unwrap());
    // Who had it open reads its bytes or an error, nobody else's.
    let mut out = vec![0; LENGTH];
    if let Ok(got) = file.read_at(0, &mut out).await {
        assert!(out[..got] == pattern(2, 0, got));
    }
    let orphans = async |cluster: &Cluster, count: usize| {
        eventually("orphans are counted", 30, async || report(cluster)["orphan_blocks"].as_u64() == Some(count as u64)).await;
    };
    orphans(&cluster, lost.len()).await;
    assert_eq!(report(&cluster)["orphan_bytes"].as_u64(), Some(LENGTH as u64));
    let doctor = cluster.run(&["fsadmin", "doctor"]);
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("put these back"), "{}", String::from_utf8_lossy(&doctor.stdout));
    // A start more, with blocks numbered in between: they are orphans as before.
    cluster.restart_master();
    let_in(&cluster).await;
    orphans(&cluster, lost.len()).await;
    let (dir, _) = stop_master(&mut cluster, "older");
    std::fs::rename(cluster.dir.path().join("newer"), &dir).unwrap();
    cluster.start_master();
    let_in(&cluster).await;
    let fs = cluster.client().await;
    assert_reads(&fs, "/lost", 2).await;
    assert_reads(&fs, "/before", 1).await;
    // Now those of the other history are, and nobody wants them.
    orphans(&cluster, after.len()).await;
    assert!(!cluster.run(&["fsadmin", "dropOrphans"]).status.success(), "not without being told twice");
    assert_eq!(cluster.json(&["fsadmin", "dropOrphans", "--yes"])["blocks"].as_u64(), Some(after.len() as u64));
    // A worker that starts again tells all it has.
    eventually("they are dropped", 30, async || report(&cluster)["used_bytes"].as_u64().unwrap() < 3 * LENGTH as u64).await;
    cluster.kill_worker(0);
    cluster.start_worker(0);
    let_in(&cluster).await;
    assert_reads(&fs, "/lost", 2).await;
    orphans(&cluster, 0).await;
}
