//! The power of a worker's disk is cut: what was acknowledged as kept on a worker is there, and nothing is wrong.

use forebay_client::CreateOptions;
use forebay_tests::cluster::{Cluster, p, quoted};
use forebay_tests::disk::Disk;
use forebay_tests::{eventually, pattern, rng};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Cuts; `FOREBAY_TEST_CUTS` asks for more.
fn cuts() -> u64 {
    std::env::var("FOREBAY_TEST_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(8)
}

const MAX_BYTES: usize = 600_000;
const COLD_FILES: u64 = 12;

/// (S-19) Files kept only on a worker's disk survive a power cut once they are acknowledged; cached ones are whole or gone.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_power_cut() {
    if !std::path::Path::new("/dev/fuse").exists() {
        return println!("SKIPPED what_was_acknowledged_survives_a_power_cut: there is no /dev/fuse here");
    }
    let mut rng = rng("what_was_acknowledged_survives_a_power_cut");
    let mut cluster = Cluster::prepare(&[("master.worker_timeout_ms", "2000"), ("master.lease_ttl_ms", "3000")]);
    let disk = Disk::default();
    let mount_point = cluster.dir.path().join("disk");
    let mut mounted = disk.mount(&mount_point);
    let tier = mount_point.join("tier");
    let tiers = format!("[{{ medium = \"SSD\", dirs = [{{ path = {}, quota = \"256MiB\", reserve = \"0B\" }}] }}]", quoted(tier.display()));
    cluster.start_master();
    cluster.add_worker(&[("worker.tiers", &tiers)]);
    let fs = cluster.client().await;
    eventually("the worker registered", 20, async || fs.report().await.is_ok_and(|r| r.workers.len() == 1)).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("page_size", "64KiB"), ("block_size", "1MiB")]).await;
    for i in 0..COLD_FILES {
        std::fs::write(folder.join(format!("c{i}")), pattern(1_000_000 + i, 0, MAX_BYTES)).unwrap();
    }
    fs.mkdir(&p("/w"), true, true).await.unwrap();
    // Which files were acknowledged, and how long they are.
    let kept: Arc<Mutex<Vec<(u64, usize)>>> = Arc::default();
    let (mut next, mut torn, mut deleted) = (0, 0, 0);
    for cut in 0..cuts() {
        let stop = Arc::new(AtomicBool::new(false));
        let mut busy = Vec::new();
        for _ in 0..3 {
            let (kept, stop, fs, seed, first) = (kept.clone(), stop.clone(), cluster.client().await, rng.random(), next);
            next += 1_000;
            busy.push(tokio::spawn(async move {
                let mut rng = StdRng::seed_from_u64(seed);
                for i in first..first + 1_000 {
                    let length = rng.random_range(1..MAX_BYTES);
                    let options = CreateOptions { write_type: "cache_only".into(), ..CreateOptions::default() };
                    let write = async {
                        let mut file = fs.create(&p(&format!("/w/f{i}")), &options).await?;
                        file.write(&pattern(i, 0, length)).await?;
                        file.close().await
                    };
                    match write.await {
                        Ok(_) => kept.lock().unwrap().push((i, length)),
                        Err(e) => eprintln!("f{i} was not written: {e}"),
                    }
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            }));
        }
        let (stopped, reader, seed) = (stop.clone(), cluster.client().await, rng.random());
        busy.push(tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stopped.load(Ordering::SeqCst) {
                let i = rng.random_range(0..COLD_FILES);
                let Ok(file) = reader.open(&p(&format!("/m/c{i}"))).await else { continue };
                let mut out = vec![0; 70_000];
                let _ = file.read_at(rng.random_range(0..500_000), &mut out).await;
            }
        }));
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..400))).await;
        cluster.kill_worker(0);
        stop.store(true, Ordering::SeqCst);
        for task in &busy {
            task.abort();
        }
        drop(mounted);
        torn += disk.cut(&mut rng);
        mounted = disk.mount(&mount_point);
        cluster.start_worker(0);
        eventually("the worker is back", 20, async || fs.report().await.is_ok_and(|r| r.workers.iter().any(|w| !w.lost && w.silent_ms < 500))).await;
        let checked = cluster.client().await;
        let files = kept.lock().unwrap().clone();
        // All of the newest, some of the others.
        let all = cut + 1 == cuts();
        for (i, length) in files.iter().rev().enumerate().filter(|(n, _)| all || *n < 60 || n % 10 == 0).map(|(_, file)| file) {
            let path = p(&format!("/w/f{i}"));
            let file = checked.open(&path).await.unwrap_or_else(|e| panic!("cut {cut}: {path} was acknowledged: {e}"));
            assert_eq!(file.length(), *length as u64, "cut {cut}: {path}");
            let mut out = vec![0; *length];
            file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("cut {cut}: {path} was acknowledged: {e}"));
            assert!(out == pattern(*i, 0, *length), "cut {cut}: {path} has other bytes than were written");
        }
        // So that there is room for the next ones.
        let old: Vec<(u64, usize)> = {
            let mut kept = kept.lock().unwrap();
            let old = kept.len().saturating_sub(150);
            kept.drain(..old).collect()
        };
        deleted += old.len();
        for (i, _) in old {
            checked.delete(&p(&format!("/w/f{i}")), false).await.unwrap();
        }
        for i in 0..COLD_FILES {
            let file = checked.open(&p(&format!("/m/c{i}"))).await.unwrap();
            let mut out = vec![0; MAX_BYTES];
            file.read_at(0, &mut out).await.unwrap_or_else(|e| panic!("cut {cut}: /m/c{i}: {e}"));
            assert!(out == pattern(1_000_000 + i, 0, MAX_BYTES), "cut {cut}: /m/c{i} has wrong bytes");
        }
    }
    let acknowledged = deleted + kept.lock().unwrap().len();
    eprintln!("{} cuts, {acknowledged} files acknowledged, {torn} files torn", cuts());
    let log = std::fs::read_to_string(cluster.dir.path().join("worker-0/worker.log")).unwrap();
    let trouble: Vec<&str> = log.lines().filter(|l| l.contains("taken out")).take(5).collect();
    assert!(trouble.is_empty() && acknowledged > 20 && torn > 0, "the load was real: {trouble:#?}");
    cluster.kill_worker(0);
}
