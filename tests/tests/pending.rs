//! (S-27) Folders that are deleted, renamed and made again while the master is killed at any step: nothing deleted comes back, nothing is
//! seen twice or half renamed, and the store catches up.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::s3::S3;
use forebay_tests::suite::{get_behind, put_behind, read_all, write};
use forebay_tests::{Cluster, eventually, pattern, rng};
use forebay_ufs::{UfsUri, UnderStore};
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Names of the files below a folder of the store, with their lengths.
async fn stored(store: &UnderStore) -> BTreeMap<String, u64> {
    let (mut folders, mut out) = (vec![String::new()], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for e in store.list(folder.as_bytes()).await.expect("list").entries {
            let name = String::from_utf8_lossy(&e.name);
            let path = if folder.is_empty() { name.into_owned() } else { format!("{folder}/{name}") };
            if e.folder {
                folders.push(path);
            } else {
                out.insert(path, e.length);
            }
        }
    }
    out
}

async fn shown(fs: &FileSystem) -> BTreeMap<String, u64> {
    let all = fs.list(&p("/s3"), true).await.expect("list");
    let files = all.into_iter().filter(|e| !e.folder);
    files.map(|e| (String::from_utf8_lossy(&e.path).trim_start_matches("/s3/").to_owned(), e.length)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    let objects: usize = std::env::var("FOREBAY_TEST_OBJECTS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    const ROUNDS: u32 = 14;
    let mut rng = rng("killed_at_every_step");
    let mut cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").unwrap(), &s3.options(None)).unwrap();
    let fs = cluster.client().await;
    let mut mount = s3.options(None);
    mount.insert("sync_interval_ms".into(), "0".into());
    fs.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    let mut expected: BTreeMap<String, u64> = BTreeMap::new();
    let mut puts = tokio::task::JoinSet::new();
    for i in 0..objects {
        let name = if i % 2 == 0 { format!("big0/f{i:05}") } else { format!("big0/in/f{i:05}") };
        expected.insert(name.clone(), 1);
        let store = store.clone();
        puts.spawn(async move { put_behind(&store, &name, "x").await });
        if puts.len() >= 16 {
            puts.join_next().await.unwrap().unwrap();
        }
    }
    puts.join_all().await;
    put_behind(&store, "file0", pattern(1, 0, 200_000)).await;
    expected.insert("file0".into(), 200_000);
    assert_eq!(shown(&fs).await, expected);
    let stop = Arc::new(AtomicBool::new(false));
    // Somebody looks all the while: of what is renamed one name is there, never both, never none.
    let watcher = {
        let (fs, stop) = (cluster.client().await, stop.clone());
        tokio::spawn(async move {
            let mut looks = 0u32;
            while !stop.load(Ordering::Relaxed) {
                match fs.list(&p("/s3"), false).await {
                    Ok(all) => {
                        let names: BTreeSet<String> = all.iter().map(|e| String::from_utf8_lossy(&e.path).into_owned()).collect();
                        for prefix in ["/s3/big", "/s3/file"] {
                            assert_eq!(names.iter().filter(|n| n.starts_with(prefix)).count(), 1, "{names:?}");
                        }
                        looks += 1;
                    }
                    Err(e) if e.is_retryable() || e.kind() == ErrorKind::Busy => {}
                    Err(e) => panic!("{e}"),
                }
            }
            looks
        })
    };
    let (mut big, mut file, mut gone) = (0, 0, BTreeSet::new());
    for round in 0..ROUNDS {
        let client = cluster.client().await;
        let what = rng.random_range(0..4);
        let change = {
            let (from_big, to_big) = (p(&format!("/s3/big{big}")), p(&format!("/s3/big{}", big + 1)));
            let (from_file, to_file) = (p(&format!("/s3/file{file}")), p(&format!("/s3/file{}", file + 1)));
            tokio::spawn(async move {
                match what {
                    0 => client.rename(&from_big, &to_big, false).await,
                    1 => client.rename(&from_file, &to_file, false).await,
                    2 => {
                        for i in 0..20 {
                            write(&client, &format!("/s3/t{round}/f{i}"), b"gone", CreateOptions { recursive: true, ..Default::default() }).await;
                        }
                        client.delete(&p(&format!("/s3/t{round}")), true).await
                    }
                    // Deleted, and made again with other bytes.
                    _ => {
                        let path = p("/s3/again/f");
                        if client.exists(&path).await? {
                            client.delete(&p("/s3/again"), true).await?;
                        }
                        write(&client, "/s3/again/f", format!("round {round}").as_bytes(), CreateOptions { recursive: true, ..Default::default() })
                            .await;
                        Ok(())
                    }
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await;
        cluster.restart_master();
        change.await.unwrap().unwrap_or_else(|e| panic!("round {round}, {what}: {e}"));
        match what {
            0 => {
                let all = std::mem::take(&mut expected);
                expected = all.into_iter().map(|(name, n)| (name.replace(&format!("big{big}/"), &format!("big{}/", big + 1)), n)).collect();
                big += 1;
            }
            1 => {
                let n = expected.remove(&format!("file{file}")).unwrap();
                file += 1;
                expected.insert(format!("file{file}"), n);
            }
            2 => drop(gone.insert(format!("t{round}"))),
            _ => drop(expected.insert("again/f".into(), format!("round {round}").len() as u64)),
        }
        assert_eq!(shown(&fs).await, expected, "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    let looks = watcher.await.unwrap();
    eventually("the store catches up", 60, async || cluster.json(&["fsadmin", "report", "summary"])["pending_changes"] == 0).await;
    assert_eq!(stored(&store).await, expected, "the store has what the namespace has");
    cluster.ok(&["fs", "checkConsistency", "/s3"]);
    assert!(get_behind(&store, &format!("file{file}")).await.unwrap() == pattern(1, 0, 200_000));
    assert!(read_all(&fs, &format!("/s3/file{file}")).await == pattern(1, 0, 200_000));
    eprintln!("{ROUNDS} kills over {objects} objects, {looks} looks meanwhile");
    assert!(looks > 0);
}

/// (S-27) The master dies at each step of what is on its way to a store, by name: the change is journaled, the store has done it, its outcome is journaled.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_step_by_name() {
    const OBJECTS: usize = 60;
    let mut cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").unwrap(), &s3.options(None)).unwrap();
    let mut mount = s3.options(None);
    mount.insert("sync_interval_ms".into(), "0".into());
    cluster.client().await.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    for (i, step) in ["pending_read", "pending_done_in_store", "pending_finished"].into_iter().enumerate() {
        for what in ["rename", "delete", "rename a file", "again"] {
            let name = |of: &str| format!("{of}{i}-{}", what.replace(' ', "-"));
            let (from, to) = (name("from"), name("to"));
            let mut expected = BTreeMap::new();
            for n in 0..OBJECTS {
                put_behind(&store, &format!("{from}/d{}/f{n:03}", n % 3), "x").await;
                expected.insert(format!("d{}/f{n:03}", n % 3), 1u64);
            }
            put_behind(&store, &format!("{from}-file"), "y").await;
            let fs = cluster.client().await;
            fs.list(&p("/s3"), true).await.unwrap();
            // It dies at this step from its next start on.
            cluster.master_environment = vec![("FOREBAY_ABORT_AT".into(), step.into())];
            cluster.restart_master();
            let (path, target) = (p(&format!("/s3/{from}")), p(&format!("/s3/{to}")));
            let change = tokio::spawn(async move {
                match what {
                    "rename" => fs.rename(&path, &target, false).await,
                    "delete" => fs.delete(&path, true).await,
                    "rename a file" => fs.rename(&p(&format!("{path}-file")), &p(&format!("{target}-file")), false).await,
                    _ => {
                        fs.delete(&path, true).await?;
                        write(&fs, &format!("{path}/new"), b"new", CreateOptions { recursive: true, ..Default::default() }).await;
                        Ok(())
                    }
                }
            });
            cluster.master_died().await;
            cluster.master_environment.clear();
            cluster.start_master();
            change.await.unwrap().unwrap_or_else(|e| panic!("{step}, {what}: {e}"));
            eventually("the store catches up", 60, async || cluster.json(&["fsadmin", "report", "summary"])["pending_changes"] == 0).await;
            let all = stored(&store).await;
            assert_eq!(all, shown(&cluster.client().await).await, "{step}, {what}");
            let below = |folder: &str| -> BTreeMap<String, u64> {
                all.iter().filter_map(|(k, n)| Some((k.strip_prefix(&format!("{folder}/"))?.to_owned(), *n))).collect()
            };
            let empty = BTreeMap::new();
            let new = BTreeMap::from([("new".to_owned(), 3u64)]);
            let wanted = match what {
                "rename" => (empty.clone(), expected),
                "delete" => (empty.clone(), empty.clone()),
                "rename a file" => (expected, empty.clone()),
                _ => (new, empty.clone()),
            };
            assert_eq!((below(&from), below(&to)), wanted, "{step}, {what}");
            assert_eq!(all.contains_key(&format!("{to}-file")), what == "rename a file", "{step}");
        }
    }
}
