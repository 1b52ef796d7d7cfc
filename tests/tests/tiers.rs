//! Tiers on a real worker: blocks move and stay right, damaged ones are never delivered, readers keep what they hold.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::config::ClientConfig;
use forebay_tests::cluster::p;
use forebay_tests::{Cluster, eventually, pattern, rng};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// `worker.tiers` as TOML, with folders of these names below `dir`.
fn tiers(dir: &Path, list: &[(&str, &str)]) -> String {
    let one = |(medium, quota): &(&str, &str)| {
        format!("{{ medium = \"{medium}\", dirs = [{{ path = {:?}, quota = \"{quota}\" }}] }}", dir.join(medium).display().to_string())
    };
    format!("[{}]", list.iter().map(one).collect::<Vec<_>>().join(", "))
}

async fn cluster(list: &[(&str, &str)], settings: &[(&'static str, &str)]) -> Cluster {
    let mut cluster = Cluster::prepare(&[]);
    cluster.start_master();
    let tiers = tiers(cluster.dir.path(), list);
    let mut all = vec![("worker.tiers", tiers.as_str())];
    all.extend(settings);
    cluster.add_worker(&all);
    let fs = cluster.client().await;
    eventually("worker registered", 30, async || fs.report().await.is_ok_and(|r| r.workers.len() == 1)).await;
    cluster
}

async fn read(fs: &FileSystem, path: &str) -> forebay_common::Result<Vec<u8>> {
    let file = fs.open(&p(path)).await?;
    let mut out = vec![0; file.length() as usize];
    file.read_at(0, &mut out).await?;
    Ok(out)
}

/// What does not fit in memory goes to the next tier, comes back up when it is used, and is reported where it is.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_where_there_is_room() {
    let cluster = cluster(&[("MEM", "8MiB"), ("SSD", "64MiB"), ("HDD", "64MiB")], &[]).await;
    let fs = cluster.client().await;
    let folder = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "256KiB"), ("sync_interval_ms", "-1")]).await;
    const FILES: u64 = 24;
    let name = |i: u64| format!("/m/f{i}");
    for i in 0..FILES {
        std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, 1 << 20)).unwrap();
        assert!(read(&fs, &name(i)).await.unwrap() == pattern(i, 0, 1 << 20));
    }
    let tier_of = |i: u64| {
        let stat = cluster.json(&["fs", "stat", &name(i)]);
        stat["blocks"][0]["locations"][0]["tier"].as_str().map(str::to_owned)
    };
    let here = |tier: &str| (0..FILES).filter(|i| tier_of(*i).as_deref() == Some(tier)).count();
    eventually("blocks on SSD", 20, async || here("SSD") > 4 && here("MEM") > 2).await;
    let capacity = cluster.json(&["fsadmin", "report", "capacity"]);
    let ssd = &capacity["tiers"]["SSD"];
    assert!(ssd["used_bytes"].as_u64().unwrap() > 4 << 20 && ssd["total_bytes"] == 64 << 20, "{capacity}");
    assert_eq!(capacity["workers"][0]["tiers"]["SSD"]["dirs"][0]["healthy"], true, "{capacity}");
    let down = (0..FILES).find(|i| tier_of(*i).as_deref() == Some("SSD")).unwrap();
    let before = cluster.metric("Cluster.BytesReadUfs").await;
    // From a disk too: by descriptor, by stream.
    assert!(read(&cluster.client().await, &name(down)).await.unwrap() == pattern(down, 0, 1 << 20));
    assert!(read(&cluster.network_client().await, &name(down)).await.unwrap() == pattern(down, 0, 1 << 20));
    cluster.counters_arrived().await;
    assert_eq!(cluster.metric("Cluster.BytesReadUfs").await, before, "a lower tier is not the under store");
    eventually("what is used comes up", 20, async || {
        let _ = read(&cluster.network_client().await, &name(down)).await;
        tier_of(down).as_deref() == Some("MEM")
    })
    .await;
    for i in 0..FILES {
        for fs in [&fs, &cluster.network_client().await] {
            assert!(read(fs, &name(i)).await.unwrap() == pattern(i, 0, 1 << 20));
        }
    }
}

/// The files of blocks below a tier's folder.
fn block_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir.join("blocks"))
        .unwrap()
        .flatten()
        .filter_map(|shard| std::fs::read_dir(shard.path()).ok())
        .flat_map(|files| files.flatten().map(|f| f.path()))
        .filter(|f| f.extension().is_some_and(|e| e == "data"))
        .collect();
    files.sort();
    files
}

fn flip(path: &Path, rng: &mut StdRng) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let bit = rng.random_range(0..file.metadata().unwrap().len() * 8);
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

/// (S-18) A bit flipped anywhere in a block's files, on any tier, is never delivered: stored files are fetched again, and
/// what was nowhere else is an error.
#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_are_never_delivered() {
    const FILES: u64 = 60;
    let flips: u64 = std::env::var("FOREBAY_TEST_FLIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(600);
    let mut rng = rng("flipped_bits_are_never_delivered");
    for medium in ["MEM", "SSD", "HDD"] {
        let mut cluster = cluster(&[(medium, "64MiB")], &[]).await;
        let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("page_size", "64KiB")]).await;
        let length = |i: u64| 100_000 + (i as usize * 7_919) % 200_000;
        for i in 0..FILES {
            std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, length(i))).unwrap();
        }
        let (mut flipped, mut lost, mut round) = (0, 0, 0);
        while flipped < flips / 3 {
            round += 1;
            cluster.ok(&["fs", "load", "/m"]);
            let fs = cluster.client().await;
            for i in 0..FILES / 4 {
                let options = CreateOptions { write_type: "cache_only".into(), recursive: true, ..Default::default() };
                let mut file = fs.create(&p(&format!("/c{round}/f{i}")), &options).await.unwrap();
                file.write(&pattern(i, 0, length(i))).await.unwrap();
                file.close().await.unwrap();
            }
            cluster.kill_worker(0);
            for data in block_files(&cluster.dir.path().join(medium)) {
                flip(&if rng.random_bool(0.5) { data.clone() } else { data.with_extension("head") }, &mut rng);
                flipped += 1;
            }
            cluster.start_worker(0);
            let quick = ClientConfig { call_timeout_ms: 100, ..cluster.client_config() };
            let short = FileSystem::connect(&quick).await.unwrap();
            let network = FileSystem::connect(&ClientConfig { short_circuit: false, ..quick }).await.unwrap();
            let stored = [cluster.client().await, cluster.network_client().await];
            for i in 0..FILES {
                for (way, fs) in stored.iter().enumerate() {
                    let read = read(fs, &format!("/m/f{i}")).await.unwrap_or_else(|e| panic!("{medium} f{i} way {way}: {e}"));
                    assert!(read == pattern(i, 0, length(i)), "{medium}: wrong bytes of f{i}, way {way}");
                }
            }
            for i in 0..FILES / 4 {
                for (way, fs) in [&short, &network].into_iter().enumerate() {
                    match read(fs, &format!("/c{round}/f{i}")).await {
                        Ok(read) => assert!(read == pattern(i, 0, length(i)), "{medium}: wrong bytes of c{round}/f{i}, way {way}"),
                        Err(_) => lost += 1,
                    }
                }
            }
            cluster.ok(&["fs", "rm", "-R", &format!("/c{round}")]);
        }
        eprintln!("{medium}: {flipped} bits flipped in {round} rounds, {lost} reads of what was nowhere else were refused, no wrong byte");
    }
}

/// (S-17) Readers that hold descriptors, mappings and slices while everything around them is evicted and moved read what they
/// opened; the memory tier stays within its quota meanwhile, held bytes included; when they are gone nothing is held.
#[tokio::test(flavor = "multi_thread")]
async fn readers_under_eviction() {
    const FILES: u64 = 400;
    const LENGTH: usize = 600_000;
    let mut rng = rng("readers_under_eviction");
    let cluster = cluster(&[("MEM", "96MiB"), ("SSD", "64MiB")], &[]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("page_size", "64KiB")]).await;
    for i in 0..FILES {
        std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, LENGTH)).unwrap();
    }
    let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut readers = Vec::new();
    let (stopped, tier, most) = (stop.clone(), cluster.dir.path().join("MEM"), Arc::new(AtomicU64::new(0)));
    let highest = most.clone();
    let sampler = tokio::spawn(async move {
        while !stopped.load(Ordering::SeqCst) {
            let s = nix::sys::statvfs::statvfs(&tier).unwrap();
            highest.fetch_max((s.blocks() - s.blocks_free()) * s.fragment_size(), Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for n in 0..32u64 {
        let fs = if n % 4 == 3 { cluster.network_client().await } else { cluster.client().await };
        let (stop, reads, mut rng) = (stop.clone(), reads.clone(), StdRng::seed_from_u64(rng.random()));
        readers.push(tokio::spawn(async move {
            let mut held: Vec<(u64, usize, bytes::Bytes)> = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let i = rng.random_range(0..FILES);
                let file = fs.open(&p(&format!("/m/f{i}"))).await.unwrap_or_else(|e| panic!("reader {n}: {e}"));
                for _ in 0..4 {
                    let offset = rng.random_range(0..LENGTH - 100_000);
                    let slice = file.slice(offset as u64, rng.random_range(1..100_000)).await.unwrap_or_else(|e| panic!("reader {n}: {e}"));
                    held.push((i, offset, slice));
                }
                while held.len() > 16 {
                    let (i, offset, slice) = held.swap_remove(rng.random_range(0..held.len()));
                    assert!(slice == pattern(i, offset as u64, slice.len()), "reader {n}: wrong bytes at {offset} of f{i}");
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            }
        }));
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.unwrap();
    }
    sampler.await.unwrap();
    let (most, quota) = (most.load(Ordering::SeqCst), 96u64 << 20);
    eprintln!("at most {most} bytes of memory for a quota of {quota}");
    assert!(most > quota / 2, "the tier was looked at");
    assert!(most <= quota + quota / 50, "{most} bytes of memory for a quota of {quota}");
    eprintln!("{} slices held and checked", reads.load(Ordering::SeqCst));
    assert!(reads.load(Ordering::SeqCst) > 500);
    let held = async || {
        let tiers = cluster.json(&["fsadmin", "report", "capacity"])["tiers"].clone();
        ["MEM", "SSD"].iter().map(|t| tiers[t]["zombie_bytes"].as_u64().unwrap()).sum::<u64>()
    };
    eventually("nothing is held after the readers", 20, async || held().await == 0).await;
    let capacity = cluster.json(&["fsadmin", "report", "capacity"]);
    assert!(["MEM", "SSD"].iter().all(|t| capacity["tiers"][t]["used_bytes"].as_u64() <= capacity["tiers"][t]["total_bytes"].as_u64()), "{capacity}");
}

/// (S-17) A pinned file stays cached while everything else passes by, over restarts of master and worker; let go, it leaves.
#[tokio::test(flavor = "multi_thread")]
async fn pinned_files_stay() {
    let mut cluster = cluster(&[("MEM", "16MiB")], &[]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "-1"), ("page_size", "64KiB")]).await;
    const LENGTH: usize = 500_000;
    for i in 0..80 {
        std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, LENGTH)).unwrap();
    }
    let percent = |cluster: &Cluster| cluster.json(&["fs", "stat", "/m/f0"])["cached_percent"].as_u64().unwrap();
    let pass_by = async |cluster: &Cluster| {
        let fs = cluster.client().await;
        for i in 1..80 {
            assert!(read(&fs, &format!("/m/f{i}")).await.unwrap() == pattern(i, 0, LENGTH));
        }
    };
    cluster.ok(&["fs", "load", "/m/f0"]);
    assert_eq!(cluster.json(&["fs", "pin", "/m/f0"]), serde_json::json!({ "files": 1 }));
    assert_eq!(cluster.json(&["fs", "stat", "/m/f0"])["pinned"], true);
    cluster.counters_arrived().await;
    pass_by(&cluster).await;
    cluster.counters_arrived().await;
    assert_eq!(percent(&cluster), 100);
    assert_eq!(cluster.json(&["fs", "free", "/m/f0"])["kept"], 1);
    cluster.restart_master();
    cluster.kill_worker(0);
    cluster.start_worker(0);
    eventually("taken over and reported", 20, async || percent(&cluster) == 100).await;
    cluster.counters_arrived().await;
    pass_by(&cluster).await;
    cluster.counters_arrived().await;
    assert_eq!(percent(&cluster), 100);
    // What does not fit is not called loaded.
    let load = cluster.run(&["fs", "load", "/m", "--json"]);
    // What it did, then why it failed.
    let said = serde_json::Deserializer::from_slice(&load.stdout).into_iter::<serde_json::Value>().next().unwrap().unwrap();
    assert!(load.status.code() == Some(1) && said["cached_in_part"].as_u64() > Some(10) && said["failed"] == 0, "{said}");
    cluster.ok(&["fs", "unpin", "/m"]);
    cluster.counters_arrived().await;
    eventually("let go, it leaves", 30, async || {
        pass_by(&cluster).await;
        percent(&cluster) == 0
    })
    .await;
}

/// A tier smaller than a block takes small files; a file that outgrows it goes on in the tier below, whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_tier_smaller_than_a_block() {
    let cluster = cluster(&[("MEM", "16MiB"), ("SSD", "200MiB")], &[]).await;
    let fs = cluster.client().await;
    for (path, length, tier) in [("/small", 3_000_000, "MEM"), ("/large", 50_000_000, "SSD")] {
        for write_type in ["cache_only", "through"] {
            let path = format!("{path}-{write_type}");
            let mut file = fs.create(&p(&path), &CreateOptions { write_type: write_type.into(), ..Default::default() }).await.unwrap();
            for piece in pattern(7, 0, length).chunks(1 << 20) {
                file.write(piece).await.unwrap();
            }
            file.close().await.unwrap();
            let stat = cluster.json(&["fs", "stat", &path]);
            assert_eq!(stat["cached_percent"], 100, "{stat}");
            cluster.counters_arrived().await;
            let location = cluster.json(&["fs", "stat", &path])["blocks"][0]["locations"][0].clone();
            assert_eq!(location["tier"], tier, "{path}: {location}");
            for fs in [&fs, &cluster.network_client().await] {
                assert!(read(fs, &path).await.unwrap() == pattern(7, 0, length), "{path}");
            }
        }
    }
}

/// (S-22) The options `quota` and `reserved` of mounts hold on a real worker, over a restart of it, and reads go on beyond them.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_keep_to_their_shares() {
    let mut cluster = cluster(&[("MEM", "32MiB")], &[]).await;
    const LENGTH: usize = 500_000;
    let common = [("sync_interval_ms", "-1"), ("page_size", "64KiB")];
    for (mount, files, options) in [("/q", 40, &[("quota", "8MiB")][..]), ("/r", 12, &[("reserved", "8MiB")]), ("/m", 120, &[])] {
        let folder = cluster.mount_folder(mount, &[&common[..], options].concat()).await;
        for i in 0..files {
            std::fs::write(folder.join(format!("f{i}")), pattern(i, 0, LENGTH)).unwrap();
        }
    }
    let output = cluster.run(&["fs", "mount", "/x", "file:///tmp", "--option", "quota=1MiB", "--option", "reserved=2MiB"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("more than quota"));
    cluster.counters_arrived().await;
    let cached = |cluster: &Cluster, path: &str| cluster.json(&["fs", "du", "-s", path])["cached_bytes"].as_u64().unwrap();
    let read_all = async |cluster: &Cluster, mount: &str, files: u64| {
        let fs = cluster.client().await;
        for i in 0..files {
            assert!(read(&fs, &format!("{mount}/f{i}")).await.unwrap() == pattern(i, 0, LENGTH), "{mount}/f{i}");
        }
    };
    for round in 0..2 {
        read_all(&cluster, "/r", 12).await;
        read_all(&cluster, "/q", 40).await;
        cluster.counters_arrived().await;
        let q = cached(&cluster, "/q");
        read_all(&cluster, "/m", 120).await;
        cluster.counters_arrived().await;
        let r = cached(&cluster, "/r");
        assert!(q > 4 << 20 && q <= 8 << 20, "round {round}: {q} bytes of a quota of 8 MiB");
        assert_eq!(r, 12 * LENGTH as u64, "round {round}: what is reserved stays");
        if round == 0 {
            cluster.kill_worker(0);
            cluster.start_worker(0);
            eventually("taken over and reported", 20, async || cached(&cluster, "/r") == 12 * LENGTH as u64).await;
            cluster.counters_arrived().await;
        }
    }
    // For the cache only a file has to fit; written through it is kept as far as it does.
    let fs = cluster.client().await;
    for (write_type, kept) in [("cache_only", false), ("through", true)] {
        let write = async {
            let mut file =
                fs.create(&p(&format!("/q/large-{write_type}")), &CreateOptions { write_type: write_type.into(), ..Default::default() }).await?;
            for piece in pattern(7, 0, 20_000_000).chunks(1 << 20) {
                file.write(piece).await?;
            }
            file.close().await
        };
        let written = write.await;
        assert_eq!(written.is_ok(), kept, "{write_type}: {written:?}");
        assert!(written.err().is_none_or(|e| e.message().contains("quota")), "the error names the quota");
    }
    assert!(read(&fs, "/q/large-through").await.unwrap() == pattern(7, 0, 20_000_000));
}
