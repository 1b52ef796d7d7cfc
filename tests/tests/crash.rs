//! `kill -9` on real processes, under load, against a record of what was acknowledged.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_common::config::ClientConfig;
use forebay_tests::cluster::p;
use forebay_tests::{Cluster, eventually, pattern, rng};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const KILLS: usize = 20;
const CLIENTS: usize = 8;

/// What a client knows of one of its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Acknowledged, with this many bytes.
    There(usize),
    /// Its absence was acknowledged.
    Gone,
    /// A call about it was not answered: there with these bytes, or not at all.
    Either(usize),
}

/// One client's record.
#[derive(Default)]
struct Record {
    names: BTreeMap<String, Known>,
    /// Renames that were not answered: exactly one of the two names is there.
    moves: Vec<(String, String, usize)>,
    acknowledged: u64,
    unanswered: u64,
}

fn name_bytes(name: &str) -> u64 {
    name.bytes().fold(7, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)))
}

async fn put(fs: &FileSystem, path: &str, length: usize) -> forebay_common::Result<()> {
    let options = CreateOptions { write_type: if length.is_multiple_of(2) { "cache_only".into() } else { "through".into() }, ..Default::default() };
    let mut file = fs.create(&p(path), &options).await?;
    file.write(&pattern(name_bytes(path.rsplit('/').next().unwrap_or("")), 0, length)).await?;
    file.close().await.map(drop)
}

async fn work(fs: FileSystem, dir: String, seed: u64, stop: Arc<AtomicBool>) -> Record {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut record = Record::default();
    let mut next = 0;
    while !stop.load(Ordering::SeqCst) {
        let there: Vec<(String, usize)> =
            record.names.iter().filter_map(|(n, k)| if let Known::There(l) = k { Some((n.clone(), *l)) } else { None }).collect();
        let choice = if there.is_empty() { 0 } else { rng.random_range(0..10) };
        match choice {
            0..=5 => {
                let (name, length) = (format!("n{next}"), rng.random_range(1..3000));
                next += 1;
                let done = put(&fs, &format!("{dir}/{name}"), length).await;
                note(&mut record, name, done, Known::There(length), length);
            }
            6..=7 => {
                let (name, length) = there[rng.random_range(0..there.len())].clone();
                let done = fs.delete(&p(&format!("{dir}/{name}")), false).await;
                note(&mut record, name, done, Known::Gone, length);
            }
            _ => {
                let (name, length) = there[rng.random_range(0..there.len())].clone();
                // The same bytes under another name: what a file holds is told by its first name.
                let target = format!("{name}.{next}");
                next += 1;
                match fs.rename(&p(&format!("{dir}/{name}")), &p(&format!("{dir}/{target}")), false).await {
                    Ok(()) => {
                        record.acknowledged += 1;
                        record.names.insert(name, Known::Gone);
                        record.names.insert(target, Known::There(length));
                    }
                    Err(_) => {
                        record.unanswered += 1;
                        record.names.remove(&name);
                        record.moves.push((name, target, length));
                    }
                }
            }
        }
    }
    record
}

fn note(record: &mut Record, name: String, done: forebay_common::Result<()>, known: Known, length: usize) {
    let known = match done {
        Ok(()) => {
            record.acknowledged += 1;
            known
        }
        Err(_) => {
            record.unanswered += 1;
            Known::Either(length)
        }
    };
    record.names.insert(name, known);
}

/// Looks at a name: its bytes when it is wholly there, `None` when it is wholly absent. An entry that is still under
/// construction is an unanswered creation on its way to being removed with its lease.
async fn look(fs: &FileSystem, path: &str) -> Option<Vec<u8>> {
    match fs.get_status(&p(path)).await {
        Ok(status) if !status.completed => None,
        Ok(_) => {
            let file = fs.open(&p(path)).await.unwrap_or_else(|e| panic!("{path} is there and cannot be opened: {e}"));
            let mut out = vec![0; file.length() as usize];
            file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("{path} is there and cannot be read: {e}"));
            Some(out)
        }
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => panic!("{path}: {e}"),
    }
}

async fn check(fs: &FileSystem, dir: &str, record: &Record) {
    for (name, known) in &record.names {
        let first = name.split('.').next().unwrap_or(name);
        let whole = |bytes: &[u8], length: usize| bytes == pattern(name_bytes(first), 0, length);
        match (known, look(fs, &format!("{dir}/{name}")).await) {
            (Known::There(length), Some(bytes)) => assert!(whole(&bytes, *length), "{dir}/{name} has other bytes than were acknowledged"),
            (Known::There(_), None) => panic!("{dir}/{name} was acknowledged and is lost"),
            (Known::Gone, None) | (Known::Either(_), None) => {}
            (Known::Gone, Some(_)) => panic!("{dir}/{name} was deleted, acknowledged, and is back"),
            (Known::Either(length), Some(bytes)) => assert!(whole(&bytes, *length), "{dir}/{name} is there in part"),
        }
    }
    for (from, to, length) in &record.moves {
        let first = from.split('.').next().unwrap_or(from);
        let found = (look(fs, &format!("{dir}/{from}")).await, look(fs, &format!("{dir}/{to}")).await);
        match &found {
            (Some(bytes), None) | (None, Some(bytes)) => assert!(*bytes == pattern(name_bytes(first), 0, *length)),
            _ => panic!(
                "{from} -> {to}: a rename that was not answered is there {} times",
                usize::from(found.0.is_some()) + usize::from(found.1.is_some())
            ),
        }
    }
}

/// (S-14) A master killed at any instant has every acknowledged change; each unanswered one is wholly there or wholly absent.
#[tokio::test(flavor = "multi_thread")]
async fn the_master_is_killed_under_load() {
    let mut rng = rng("the_master_is_killed_under_load");
    // Checkpoints, and logs cut behind them, happen many times in between.
    let mut cluster = Cluster::start(1, &[("master.checkpoint_every_entries", "1500")]).await;
    let patient = cluster.client().await;
    for i in 0..CLIENTS {
        patient.mkdir(&p(&format!("/c{i}")), false, false).await.unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for i in 0..CLIENTS {
        // Half of them wait for the answer across restarts, half give up at once and do not know.
        let call_timeout_ms = if i % 2 == 0 { 60_000 } else { 40 };
        let fs = FileSystem::connect(&ClientConfig { call_timeout_ms, ..cluster.client_config() }).await.unwrap();
        clients.push(tokio::spawn(work(fs, format!("/c{i}"), rng.random(), stop.clone())));
    }
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..400))).await;
        cluster.restart_master();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::SeqCst);
    let mut records = Vec::new();
    for client in clients {
        records.push(client.await.unwrap());
    }
    cluster.restart_master();
    eventually("worker registered", 20, async || patient.report().await.is_ok_and(|r| !r.workers.is_empty())).await;
    let (acknowledged, unanswered): (u64, u64) = (records.iter().map(|r| r.acknowledged).sum(), records.iter().map(|r| r.unanswered).sum());
    eprintln!("{KILLS} kills, {acknowledged} changes acknowledged, {unanswered} not answered");
    assert!(acknowledged > 200, "the load was real");
    let checkpoints = std::fs::read_dir(cluster.dir.path().join("master/checkpoints")).map_or(0, Iterator::count);
    assert!(checkpoints > 0, "checkpoints were made");
    for (i, record) in records.iter().enumerate() {
        check(&patient, &format!("/c{i}"), record).await;
    }
}

/// (S-15) A worker killed during reads: no wrong byte and no failed read while another source exists; after its restart its
/// blocks are served from memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_killed_under_readers() {
    let mut rng = rng("a_worker_is_killed_under_readers");
    let mut cluster = Cluster::start(2, &[("master.worker_timeout_ms", "1500")]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("block_size", "1MiB"), ("page_size", "256KiB")]).await;
    const FILES: u64 = 8;
    const LENGTH: usize = 3_500_000;
    for i in 0..FILES {
        std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, LENGTH)).unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::new();
    for (n, fs) in
        [cluster.client().await, cluster.network_client().await, cluster.client().await, cluster.network_client().await].into_iter().enumerate()
    {
        let (stop, reads, seed) = (stop.clone(), reads.clone(), rng.random::<u64>());
        readers.push(tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stop.load(Ordering::SeqCst) {
                let i = rng.random_range(0..FILES);
                let file = fs.open(&p(&format!("/m/f{i}"))).await.unwrap_or_else(|e| panic!("reader {n}: {e}"));
                for _ in 0..8 {
                    let offset = rng.random_range(0..LENGTH as u64);
                    let mut out = vec![0; rng.random_range(1..400_000)];
                    let got = file.read_at(offset, &mut out).await.unwrap_or_else(|e| panic!("reader {n}: {e}"));
                    assert!(out[..got] == pattern(i, offset, got), "reader {n}: wrong bytes at {offset} of f{i}");
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            }
        }));
    }
    for k in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..300))).await;
        cluster.kill_worker(k % 2);
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
        cluster.start_worker(k % 2);
    }
    let so_far = reads.load(Ordering::SeqCst);
    eventually("reads go on after the last kill", 30, async || reads.load(Ordering::SeqCst) > so_far + 50).await;
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.unwrap();
    }
    eprintln!("{KILLS} kills, {} reads", reads.load(Ordering::SeqCst));
    assert!(reads.load(Ordering::SeqCst) > 100);
    // Everything cached; then a kill, and after the restart nothing comes from the under store.
    let fs = cluster.client().await;
    cluster.ok(&["fs", "load", "/m"]);
    let full = async || cluster.json(&["fs", "du", "-s", "/m"])["cached_bytes"] == FILES * LENGTH as u64;
    eventually("all cached", 20, full).await;
    for i in 0..2 {
        cluster.kill_worker(i);
        cluster.start_worker(i);
    }
    let full = async || cluster.json(&["fs", "du", "-s", "/m"])["cached_bytes"] == FILES * LENGTH as u64;
    eventually("blocks taken over and reported", 20, full).await;
    cluster.counters_arrived().await;
    let before = cluster.metric("Cluster.BytesReadUfs").await;
    for i in 0..FILES {
        let file = fs.open(&p(&format!("/m/f{i}"))).await.unwrap();
        let mut out = vec![0; LENGTH];
        file.read_at(0, &mut out).await.unwrap();
        assert!(out == pattern(i, 0, LENGTH));
    }
    cluster.counters_arrived().await;
    assert_eq!(cluster.metric("Cluster.BytesReadUfs").await, before, "served from memory after the restart");
}

/// (S-16) A writer that dies leaves nothing: its lease runs out and the unfinished file goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_dies() {
    let cluster = Cluster::start(1, &[("master.lease_ttl_ms", "1500")]).await;
    let fs = cluster.client().await;
    let script = format!("exec {} --master {} fs put /dev/zero /g", forebay_tests::forebay().display(), cluster.address);
    let mut child = std::process::Command::new("sh")
        .args(["-c", &script])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    eventually("the file is being written", 10, async || fs.exists(&p("/g")).await.unwrap()).await;
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the lease ran out", 20, async || !fs.exists(&p("/g")).await.unwrap()).await;
    let root = cluster.dir.path().join("master/root");
    eventually("nothing half-written stays", 10, async || std::fs::read_dir(&root).unwrap().count() == 0).await;
}
