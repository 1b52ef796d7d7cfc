//! The same behaviour over every under store, what operators may set for each, and changes behind our back while clients read and
//! write.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::hdfs::{Hdfs, NAMESERVICE};
use forebay_tests::s3::S3;
use forebay_tests::suite::{bytes_come_back, follows, get_behind, names, put_behind, read_all, unfinished, write};
use forebay_tests::{Cluster, eventually, pattern, rng};
use forebay_ufs::{UfsUri, UnderStore};
use rand::Rng;
use rand::seq::IndexedRandom;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

type Options = BTreeMap<String, String>;

fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn open(uri: &str, options: &Options) -> UnderStore {
    UnderStore::open(&UfsUri::parse(uri).expect("uri"), options).expect("store")
}

/// A folder of this test as a store.
fn folder(cluster: &Cluster) -> String {
    let folder = cluster.dir.path().join("folder");
    std::fs::create_dir_all(&folder).expect("folder");
    format!("file://{}", folder.display())
}

/// (S-1, S-2, S-3, S-5) One suite over a file system, an S3 that checks signatures, and an HDFS.
async fn behaves(cluster: &Cluster, uri: &str, mount: Options) {
    let fs = cluster.client().await;
    fs.mount(&p("/m"), uri, false, mount.clone().into_iter().chain(options(&[("sync_interval_ms", "0")])).collect()).await.expect("mount");
    let store = open(uri, &mount);
    follows(&fs, "/m", &store).await;
    for (way, dir) in [(fs.clone(), "/m/local"), (cluster.network_client().await, "/m/network")] {
        bytes_come_back(&way, dir).await;
        names(&way, dir).await;
        let quick = forebay_common::config::ClientConfig { call_timeout_ms: 300, ..cluster.client_config() };
        unfinished(&FileSystem::connect(&quick).await.unwrap(), dir).await;
    }
    eventually("everything is in the store", 60, async || cluster.json(&["fsadmin", "report", "atRisk"])["files"] == 0).await;
    // What the store has is what the namespace says, and the other way round.
    cluster.ok(&["fs", "checkConsistency", "/m"]);
    let listed = store.list(b"local").await.unwrap();
    let persisted = fs.list(&p("/m/local"), false).await.unwrap().into_iter().filter(|e| e.persisted || e.folder).count();
    assert_eq!(listed.entries.len(), persisted);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_file_system() {
    let cluster = Cluster::start(1, &[]).await;
    behaves(&cluster, &folder(&cluster), Options::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_s3() {
    let cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    behaves(&cluster, "s3://bucket/below", s3.options(None)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_hdfs() {
    let cluster = Cluster::start(1, &[]).await;
    let hdfs = Hdfs::start(cluster.dir.path()).await;
    behaves(&cluster, &format!("{}/warehouse", hdfs.uri), Options::new()).await;
    // Hadoop's own shell sees the same bytes, and what it writes is seen here with its owner and mode.
    let fs = cluster.client().await;
    write(&fs, "/m/ours", &pattern(7, 0, 3_000_000), CreateOptions::default()).await;
    assert!(hdfs.shell(&["-cat", "/warehouse/ours"]).stdout == pattern(7, 0, 3_000_000));
    let local = cluster.dir.path().join("theirs");
    std::fs::write(&local, pattern(8, 0, 1_000_000)).unwrap();
    assert!(hdfs.shell(&["-put", &local.to_string_lossy(), "/warehouse/theirs"]).status.success());
    assert!(hdfs.shell(&["-chmod", "640", "/warehouse/theirs"]).status.success());
    assert!(hdfs.shell(&["-chown", "spark:users", "/warehouse/theirs"]).status.success());
    let status = fs.get_status(&p("/m/theirs")).await.unwrap();
    assert_eq!((status.owner.as_str(), status.group.as_str(), status.mode), ("spark", "users", 0o640));
    assert!(read_all(&fs, "/m/theirs").await == pattern(8, 0, 1_000_000));
    // Through a name service whose first NameNode is dead.
    let config = hdfs.config_files(cluster.dir.path());
    let ha = options(&[("config_dir", &config.to_string_lossy())]);
    fs.mount(&p("/ha"), &format!("hdfs://{NAMESERVICE}/other"), false, ha).await.expect("mount");
    write(&fs, "/ha/f", b"failed over", CreateOptions::default()).await;
    assert_eq!(hdfs.shell(&["-cat", "/other/f"]).stdout, b"failed over");
    let missing = fs.mount(&p("/bad"), &format!("hdfs://{NAMESERVICE}/x"), false, options(&[("config_dir", "/nonexistent")])).await.unwrap_err();
    assert!(missing.kind() == ErrorKind::InvalidArgument && missing.message().contains("core-site.xml"), "{missing}");
    let dead = options(&[("retries", "0"), ("timeout_ms", "3000")]);
    let dead = fs.mount(&p("/bad"), "hdfs://127.0.0.1:1/x", false, dead).await.unwrap_err();
    assert!(dead.message().contains("hdfs://127.0.0.1:1/x"), "{dead}");
    // The same folder over HTTP, to be read only.
    let web = format!("webhdfs://{}/warehouse", hdfs.web.trim_start_matches("http://"));
    let overlapping = fs.mount(&p("/web"), &web, false, options(&[("user_name", "root")])).await;
    overlapping.expect("another address is another store");
    assert!(read_all(&fs, "/web/ours").await == pattern(7, 0, 3_000_000));
    let refused = fs.touch(&p("/web/new"), &CreateOptions::default()).await.map(drop).unwrap_err();
    assert!(refused.kind() == ErrorKind::ReadOnly && refused.message().contains("hdfs://"), "{refused}");
}

/// (S-28) opendal's `hdfs-native` service as a client of our own `hdfs://`: the same sizes and names as the suite's.
#[tokio::test(flavor = "multi_thread")]
async fn opendal_over_forebay() {
    let cluster = Cluster::start(2, &[]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    opendal::install_default();
    let builder = opendal::services::HdfsNative::default().name_node(&cluster.hdfs()).root("/m/dal");
    let operator = opendal::Operator::new(builder).expect("operator");
    for (i, length) in [0usize, 1, 65_536, 65_537, 3_000_000, 5_000_001].into_iter().enumerate() {
        let (name, bytes) = (format!("a/b/f{i}"), pattern(i as u64, 0, length));
        operator.write(&name, bytes.clone()).await.expect("write");
        assert_eq!(operator.stat(&name).await.expect("stat").content_length(), length as u64);
        assert!(operator.read(&name).await.expect("read").to_vec() == bytes, "{name}");
        for (offset, want) in [(0usize, 10usize), (length / 2, 70_000), (length.saturating_sub(5), 10)] {
            let end = length.min(offset + want);
            let got = operator.read_with(&name).range(offset as u64..end as u64).await.expect("range").to_vec();
            assert!(got == bytes[offset.min(end)..end], "{name} at {offset}");
        }
        assert!(std::fs::read(folder.join("dal").join(&name)).unwrap() == bytes, "it is in the under store");
    }
    let names = async |path: &str| {
        let listed = operator.list(path).await.expect("list").into_iter().map(|e| e.name().to_owned()).filter(|name| !name.is_empty() && name != "/");
        let mut listed: Vec<String> = listed.filter(|name| *name != format!("{}/", path.trim_end_matches('/').rsplit('/').next().unwrap())).collect();
        listed.sort();
        listed
    };
    assert_eq!(names("a/b/").await, ["f0", "f1", "f2", "f3", "f4", "f5"]);
    operator.create_dir("a/c/d/").await.expect("create_dir");
    operator.rename("a/b/f4", "a/c/g").await.expect("rename");
    assert_eq!((names("a/").await, names("a/c/").await), (vec!["b/".to_owned(), "c/".to_owned()], vec!["d/".to_owned(), "g".to_owned()]));
    assert!(operator.read("a/c/g").await.expect("read").to_vec() == pattern(4, 0, 3_000_000));
    assert_eq!(operator.stat("a/b/f4").await.unwrap_err().kind(), opendal::ErrorKind::NotFound);
    assert_eq!(operator.read("none").await.unwrap_err().kind(), opendal::ErrorKind::NotFound);
    operator.write("a/c/g", "other".as_bytes()).await.expect("overwrite");
    assert_eq!(operator.read("a/c/g").await.expect("read").to_vec(), b"other");
    operator.delete("a/c/g").await.expect("delete");
    operator.delete("a/c/g").await.expect("what is gone is deleted");
    assert!(!operator.exists("a/c/g").await.expect("exists") && !folder.join("dal/a/c/g").exists());
}

/// A version of an object: its tag (0 is "not there"), since when, and until when.
type Version = (u64, Instant, Option<Instant>);

/// A store's content as somebody else leaves it: per key the versions it ever had.
#[derive(Default)]
struct History {
    versions: std::sync::Mutex<BTreeMap<String, Vec<Version>>>,
}

impl History {
    fn begin(&self, key: &str, tag: u64) {
        self.versions.lock().unwrap().entry(key.to_owned()).or_default().push((tag, Instant::now(), None));
    }

    /// What was there before is gone since now.
    fn end_others(&self, key: &str, tag: u64) {
        for v in self.versions.lock().unwrap().entry(key.to_owned()).or_default() {
            if v.0 != tag && v.2.is_none() {
                v.2 = Some(Instant::now());
            }
        }
    }

    /// Whether a version may have been seen by an open that began then.
    fn allowed(&self, key: &str, tag: u64, opened: Instant, interval: Duration) -> bool {
        let versions = self.versions.lock().unwrap();
        versions.get(key).into_iter().flatten().any(|(t, _, until)| *t == tag && until.is_none_or(|until| until + interval >= opened))
    }
}

/// Changes at least, however fast the readers are.
const CHANGES_MIN: u64 = 30;
const KEYS: usize = 12;
const LENGTH: usize = 96 << 10;

fn key(i: usize) -> String {
    format!("d{}/k{i}", i % 3)
}

/// The version in bytes of `pattern`, if all of them are of it.
fn tag_of(bytes: &[u8]) -> Option<u64> {
    let tag = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == pattern(tag, 0, bytes.len())).then_some(tag)
}

/// (S-12) Somebody writes, overwrites with the same length, deletes, renames, puts a file in place of a folder, while clients read
/// and write: what a client sees is always one version, and one that was there within the sync interval before it opened.
async fn behind_our_back(name: &str, uri: &str, mount: Options, cluster: Arc<Cluster>, checks: u64, tick: Duration) {
    const INTERVAL: Duration = Duration::from_millis(200);
    let mut rng = rng(name);
    let fs = cluster.client().await;
    let mut with_interval = mount.clone();
    with_interval.extend(options(&[("sync_interval_ms", "200"), ("page_size", "64KiB")]));
    fs.mount(&p("/m"), uri, false, with_interval).await.expect("mount");
    let store = open(uri, &mount);
    let history = Arc::new(History::default());
    (0..KEYS).for_each(|i| history.begin(&key(i), 0));
    let (done, mixed, stale) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for r in 0..4 {
        let client = if r % 2 == 0 { cluster.client().await } else { cluster.network_client().await };
        let (history, done, mixed, stale, stop) = (history.clone(), done.clone(), mixed.clone(), stale.clone(), stop.clone());
        readers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let key = key(rand::random_range(0..KEYS));
                let opened = Instant::now();
                let read = async {
                    let file = client.open(&p(&format!("/m/{key}"))).await?;
                    let mut out = vec![0; file.length() as usize];
                    let got = file.read_at(0, &mut out).await?;
                    assert_eq!(got, out.len());
                    Ok::<_, forebay_common::Error>(out)
                };
                let tag = match read.await {
                    Ok(bytes) => match tag_of(&bytes) {
                        Some(tag) => tag,
                        None => {
                            mixed.fetch_add(1, Ordering::Relaxed);
                            eprintln!("{key}: bytes of two versions");
                            continue;
                        }
                    },
                    Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory | ErrorKind::NotADirectory) => 0,
                    // It changed while it was read: opened again.
                    Err(e) if matches!(e.kind(), ErrorKind::FileChanged | ErrorKind::Busy) => continue,
                    Err(e) => panic!("{key}: {e}"),
                };
                // How long the call itself took is no part of the promise.
                if !history.allowed(&key, tag, opened, INTERVAL) {
                    stale.fetch_add(1, Ordering::Relaxed);
                    eprintln!("{key}: version {tag} was seen by an open that came later than the sync interval");
                }
                done.fetch_add(1, Ordering::Relaxed);
                // Two cores: whoever changes things is to get a turn.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }));
    }
    // One writer through us, on names of its own.
    let writer = {
        let (client, stop) = (cluster.client().await, stop.clone());
        tokio::spawn(async move {
            let mut tag = 1u64;
            while !stop.load(Ordering::Relaxed) {
                tag += 1;
                let bytes = pattern(tag, 0, LENGTH);
                let path = format!("/m/own/w{}", tag % 5);
                write(&client, &path, &bytes, CreateOptions { overwrite: true, recursive: true, ..Default::default() }).await;
                assert!(read_all(&client, &path).await == bytes, "what was written through us is what is read");
            }
            tag
        })
    };
    let mut tag = 1_000_000u64;
    let deadline = Instant::now() + Duration::from_secs(600);
    while done.load(Ordering::Relaxed) < checks || tag < 1_000_000 + CHANGES_MIN {
        assert!(Instant::now() < deadline, "only {} checks in ten minutes", done.load(Ordering::Relaxed));
        let (k, other) = (key(rng.random_range(0..KEYS)), key(rng.random_range(0..KEYS)));
        tag += 1;
        let put = async |k: &str, tag: u64| {
            history.begin(k, tag);
            put_behind(&store, k, pattern(tag, 0, LENGTH)).await;
            history.end_others(k, tag);
        };
        let gone = async |k: &str, folder: bool| {
            history.begin(k, 0);
            store.delete(k.as_bytes(), folder).await.expect("delete");
            history.end_others(k, 0);
        };
        match *[0, 0, 0, 1, 2, 3].choose(&mut rng).unwrap() {
            0 => put(&k, tag).await,
            1 => gone(&k, false).await,
            2 if k != other => {
                if let Ok(bytes) = get_behind(&store, &k).await {
                    let moved = tag_of(&bytes).unwrap_or(0);
                    history.begin(&other, moved);
                    history.begin(&k, 0);
                    store.rename(k.as_bytes(), other.as_bytes(), false).await.expect("rename");
                    history.end_others(&k, 0);
                    history.end_others(&other, moved);
                }
            }
            // A folder in place of a file, and a file again.
            _ => {
                gone(&k, false).await;
                put_behind(&store, &format!("{k}/inside"), pattern(tag, 0, 100)).await;
                store.delete(k.as_bytes(), true).await.expect("delete");
                put(&k, tag).await;
            }
        }
        tokio::time::sleep(tick).await;
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.expect("reader");
    }
    let written = writer.await.expect("writer");
    let (done, mixed, stale) = (done.load(Ordering::Relaxed), mixed.load(Ordering::Relaxed), stale.load(Ordering::Relaxed));
    eprintln!("{name}: {done} checks, {mixed} mixed, {stale} stale, {} changes behind our back, {written} files written", tag - 1_000_000);
    assert_eq!((mixed, stale), (0, 0));
}

/// Checks of each store; `--full` raises it to the promised 100,000.
fn checks(default: u64) -> u64 {
    std::env::var("FOREBAY_TEST_CHECKS").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_behind_our_back_in_a_file_system() {
    let cluster = Arc::new(Cluster::start(2, &[("worker.mem_quota", "\"8MiB\"")]).await);
    let uri = folder(&cluster);
    behind_our_back("changes_behind_our_back_in_a_file_system", &uri, Options::new(), cluster, checks(10_000), Duration::from_millis(20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_behind_our_back_in_s3() {
    let cluster = Arc::new(Cluster::start(2, &[("worker.mem_quota", "\"8MiB\"")]).await);
    let s3 = S3::start(cluster.dir.path()).await;
    behind_our_back("changes_behind_our_back_in_s3", "s3://bucket", s3.options(None), cluster, checks(10_000), Duration::from_millis(20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_behind_our_back_in_hdfs() {
    let cluster = Arc::new(Cluster::start(2, &[("worker.mem_quota", "\"8MiB\"")]).await);
    let hdfs = Hdfs::start(cluster.dir.path()).await;
    let uri = format!("{}/m", hdfs.uri);
    behind_our_back("changes_behind_our_back_in_hdfs", &uri, Options::new(), cluster, checks(5_000), Duration::from_millis(50)).await;
}

/// (S-28) Through its own `hdfs://`: the hdfs-native crate, a third party's client, finds in Forebay what it finds in an HDFS.
#[tokio::test(flavor = "multi_thread")]
async fn over_another_forebay() {
    let (below, cluster) = (Cluster::start(1, &[]).await, Cluster::start(1, &[]).await);
    behaves(&cluster, &format!("{}/warehouse", below.hdfs()), Options::new()).await;
}

/// (S-23) What an HDFS tells by its event stream is seen at once, whatever the sync interval: new, changed, moved, deleted, folders with all
/// below them; also after the NameNode was away. Through a name service whose first NameNode is dead.
#[tokio::test(flavor = "multi_thread")]
async fn hdfs_tells_what_happens() {
    let cluster = Cluster::start(1, &[]).await;
    let mut hdfs = Hdfs::start(cluster.dir.path()).await;
    let config = hdfs.config_files(cluster.dir.path());
    let uri = format!("hdfs://{NAMESERVICE}/m");
    let fs = cluster.client().await;
    let told = options(&[("config_dir", &config.to_string_lossy()), ("inotify_ms", "100"), ("sync_interval_ms", "-1")]);
    let store = open(&uri, &options(&[("config_dir", &config.to_string_lossy())]));
    for key in ["a/f", "a/deep/g", "b/h"] {
        put_behind(&store, key, "one").await;
    }
    fs.mount(&p("/m"), &uri, false, told).await.expect("mount");
    for path in ["/m/a/f", "/m/a/deep/g", "/m/b/h"] {
        assert_eq!(read_all(&fs, path).await, b"one");
    }
    assert_eq!(fs.list(&p("/m/b"), false).await.unwrap().len(), 1);
    put_behind(&store, "a/f", "two").await;
    put_behind(&store, "b/new", "three").await;
    eventually("a changed file", 20, async || read_all(&fs, "/m/a/f").await == b"two").await;
    eventually("a new file", 20, async || fs.list(&p("/m/b"), false).await.unwrap().len() == 2).await;
    store.rename(b"a", b"c", true).await.unwrap();
    eventually("a folder that moved", 20, async || !fs.exists(&p("/m/a/deep/g")).await.unwrap()).await;
    assert_eq!(read_all(&fs, "/m/c/deep/g").await, b"one");
    // What happens while nobody can be asked is found out afterwards.
    hdfs.start_again().await;
    store.delete(b"c", true).await.unwrap();
    eventually("a folder that is gone", 30, async || !fs.exists(&p("/m/c/deep/g")).await.unwrap()).await;
    assert_eq!(read_all(&fs, "/m/b/h").await, b"one");
}

/// (S-4) Found in the store of a shared mount, everything is everybody's; what the store says nothing of is the mount's.
#[tokio::test(flavor = "multi_thread")]
async fn shared_mounts_and_owners() {
    let cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let store = open("s3://bucket", &s3.options(None));
    put_behind(&store, "shared/d/f", "1").await;
    put_behind(&store, "own/d/f", "2").await;
    let fs = cluster.client().await;
    let with = |more: &[(&str, &str)]| s3.options(None).into_iter().chain(options(more)).collect::<Options>();
    fs.mount(&p("/own"), "s3://bucket/own", false, with(&[("owner", "etl"), ("group", "data"), ("mode", "750")])).await.unwrap();
    let flags: Vec<String> = s3.options(None).into_iter().flat_map(|(k, v)| ["--option".to_owned(), format!("{k}={v}")]).collect();
    let mut words = vec!["fs", "mount", "/shared", "s3://bucket/shared", "--shared"];
    words.extend(flags.iter().map(String::as_str));
    cluster.ok(&words);
    let of = async |path: &str| {
        let status = fs.get_status(&p(path)).await.unwrap();
        (status.owner, status.group, status.mode)
    };
    assert_eq!(of("/own/d/f").await, ("etl".into(), "data".into(), 0o640));
    assert_eq!((of("/own").await.2, of("/own/d").await.2), (0o750, 0o750));
    assert_eq!((of("/shared").await.2, of("/shared/d").await.2, of("/shared/d/f").await.2), (0o777, 0o777, 0o666));
    let mut config = cluster.client_config();
    config.user = "nobody".into();
    let nobody = FileSystem::connect(&config).await.unwrap();
    assert_eq!(read_all(&nobody, "/shared/d/f").await, b"1");
    write(&nobody, "/shared/d/theirs", b"3", CreateOptions::default()).await;
    assert_eq!(nobody.open(&p("/own/d/f")).await.map(drop).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(cluster.run(&["fs", "updateMount", "/own", "--option", "mode=9"]).status.code(), Some(2));
}

fn requests(cluster: &Cluster, mount: &str) -> serde_json::Value {
    let all = cluster.json(&["fsadmin", "report", "ufs"]);
    all.as_array().unwrap().iter().find(|m| m["path"] == mount).unwrap()["requests"].clone()
}

/// What a mount costs: one page when one page is asked for, no HEAD where the listing told, nothing while idle.
#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_and_few() {
    let cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    for i in 0..2_500 {
        std::fs::write(s3.folder.join(format!("f{i:05}")), "x").unwrap();
    }
    let fs = cluster.client().await;
    fs.mount(&p("/s3"), "s3://bucket", false, s3.options(None)).await.unwrap();
    cluster.counters_arrived().await;
    let count = |kind: &str| requests(&cluster, "/s3")[kind].as_u64().unwrap();
    // A report itself asks each store whether it is there: one listing of one name.
    let report = |before: u64, after: u64| after - before - 1;
    let before = count("list");
    assert_eq!(fs.list_first(&p("/s3"), 10).await.unwrap().len(), 10);
    assert_eq!(report(before, count("list")), 1, "ten entries are on one page");
    let before = count("list");
    assert_eq!(fs.list(&p("/s3"), false).await.unwrap().len(), 2_500);
    assert_eq!(report(before, count("list")), 3, "2,500 entries are on three pages");
    let before = requests(&cluster, "/s3");
    for i in 0..20 {
        assert_eq!(read_all(&fs, &format!("/s3/f{i:05}")).await, b"x");
    }
    let after = requests(&cluster, "/s3");
    let lists = report(before["list"].as_u64().unwrap(), after["list"].as_u64().unwrap());
    assert_eq!((&after["stat"], lists), (&before["stat"], 0), "what the listing told is not asked again");
    // Idle: but for the reports of this test, which list one name each, nothing is asked.
    let without_reports = || {
        let mut all = requests(&cluster, "/s3");
        all["list"].take();
        all
    };
    cluster.counters_arrived().await;
    let before = without_reports();
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.counters_arrived().await;
    assert_eq!(without_reports(), before);
}

/// (S-23) Modes, intervals of single paths, notifications, updateMount, loadMetadata and checkConsistency.
#[tokio::test(flavor = "multi_thread")]
async fn what_operators_set() {
    let cluster = Cluster::start(1, &[]).await;
    let s3 = S3::start(cluster.dir.path()).await;
    let store = open("s3://bucket", &s3.options(None));
    let fs = cluster.client().await;
    let mut never = s3.options(None);
    never.extend(options(&[("sync_interval_ms", "-1")]));
    fs.mount(&p("/s3"), "s3://bucket", false, never).await.unwrap();
    put_behind(&store, "a/f", "one").await;
    put_behind(&store, "b/f", "one").await;
    assert_eq!(read_all(&fs, "/s3/a/f").await, b"one");
    assert_eq!(read_all(&fs, "/s3/b/f").await, b"one");
    put_behind(&store, "a/f", "two").await;
    put_behind(&store, "b/f", "two").await;
    assert_eq!(read_all(&fs, "/s3/a/f").await, b"one", "never looked at again");
    // One path says otherwise.
    cluster.ok(&["fsadmin", "pathConf", "set", "/s3/a", "sync_interval_ms=0"]);
    assert_eq!((read_all(&fs, "/s3/a/f").await, read_all(&fs, "/s3/b/f").await), (b"two".to_vec(), b"one".to_vec()));
    assert_eq!(cluster.json(&["fsadmin", "pathConf", "list"])[0]["config"]["sync_interval_ms"], "0");
    cluster.ok(&["fsadmin", "pathConf", "unset", "/s3/a", "sync_interval_ms"]);
    assert_eq!(cluster.json(&["fsadmin", "pathConf", "list"]), serde_json::json!([]));
    assert_eq!(cluster.run(&["fsadmin", "pathConf", "set", "/s3/a", "nonsense=1"]).status.code(), Some(2));
    // A notification, as S3 sends it.
    let web = cluster.web_address();
    let notify = async |body: String| -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(&web).await.unwrap();
        let request = format!("POST /v1/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let event = |key: &str| {
        serde_json::json!({ "Records": [{ "eventName": "ObjectCreated:Put", "s3": { "bucket": { "name": "bucket" }, "object": { "key": key } } }] })
            .to_string()
    };
    let answer = notify(event("b/f")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"taken\":1"), "{answer}");
    assert_eq!(read_all(&fs, "/s3/b/f").await, b"two", "looked at again at once");
    assert_eq!(fs.list(&p("/s3/b"), false).await.unwrap().len(), 1);
    put_behind(&store, "b/new", "3").await;
    assert!(!fs.exists(&p("/s3/b/new")).await.unwrap(), "the folder is known");
    notify(event("b/new")).await;
    assert_eq!(read_all(&fs, "/s3/b/new").await, b"3");
    assert!(notify("{}".into()).await.starts_with("HTTP/1.1 400"));
    // Compared, mended, loaded.
    put_behind(&store, "b/newer", "4").await;
    store.delete(b"b/new", false).await.unwrap();
    let found = cluster.run(&["fs", "checkConsistency", "/s3", "--json"]);
    let said = serde_json::Deserializer::from_slice(&found.stdout).into_iter::<serde_json::Value>().next().unwrap().unwrap();
    assert!(found.status.code() == Some(1) && said["inconsistent"] == 2, "{said}");
    assert!(fs.exists(&p("/s3/b/new")).await.unwrap(), "a check changes nothing");
    assert_eq!(cluster.json(&["fs", "checkConsistency", "--repair", "/s3"])["inconsistent"], 2);
    assert_eq!(cluster.json(&["fs", "checkConsistency", "/s3"])["inconsistent"], 0);
    assert!(fs.exists(&p("/s3/b/newer")).await.unwrap() && !fs.exists(&p("/s3/b/new")).await.unwrap());
    put_behind(&store, "c/deep/er/f", "5").await;
    assert_eq!(cluster.json(&["fs", "loadMetadata", "-R", "/s3"])["changes"], 3 + 1);
    assert_eq!(cluster.json(&["fs", "loadMetadata", "-R", "/s3"])["changes"], 0);
    // Closed: what is cached is served, nothing else; opened again it goes on.
    assert_eq!(read_all(&fs, "/s3/a/f").await, b"two");
    cluster.ok(&["fsadmin", "ufs", "--mode", "noAccess", "/s3"]);
    cluster.counters_arrived().await;
    assert_eq!(read_all(&fs, "/s3/a/f").await, b"two");
    let closed = fs.open(&p("/s3/c/deep/er/f")).await.unwrap().read_at(0, &mut [0]).await.unwrap_err();
    assert!(closed.message().contains("noAccess"), "{closed}");
    cluster.ok(&["fsadmin", "ufs", "--mode", "readOnly", "/s3"]);
    cluster.counters_arrived().await;
    assert_eq!(read_all(&fs, "/s3/c/deep/er/f").await, b"5");
    assert_eq!(fs.mkdir(&p("/s3/new"), false, false).await.map(drop).unwrap_err().kind(), ErrorKind::ReadOnly);
    cluster.ok(&["fsadmin", "ufs", "--mode", "readWrite", "/s3"]);
    cluster.ok(&["fs", "updateMount", "/s3", "--option", "write_type=async", "--read-only", "false"]);
    cluster.counters_arrived().await;
    write(&fs, "/s3/later", b"6", CreateOptions::default()).await;
    eventually("persisted as the mount says", 20, async || fs.get_status(&p("/s3/later")).await.unwrap().persisted).await;
    assert_eq!(get_behind(&store, "later").await.unwrap(), "6");
    assert_eq!(cluster.run(&["fs", "updateMount", "/s3", "--option", "bandwidth=x"]).status.code(), Some(2));
    assert_eq!(cluster.run(&["fs", "updateMount", "/s3", "--option", "secret_access_key=wrong"]).status.code(), Some(1), "the store must answer");
    assert_eq!(cluster.run(&["fs", "mount", "/again", "s3://bucket/a"]).status.code(), Some(1), "overlapping");
    // A nested mount is seen at once, and survives what happens around it.
    let inner = cluster.mount_folder("/s3/b/inner", &[]).await;
    std::fs::write(inner.join("x"), "7").unwrap();
    assert_eq!(read_all(&fs, "/s3/b/inner/x").await, b"7");
    cluster.ok(&["fs", "loadMetadata", "-R", "/s3"]);
    assert_eq!(read_all(&fs, "/s3/b/inner/x").await, b"7");
    assert!(fs.delete(&p("/s3/b"), true).await.is_err(), "a mount is not deleted with what is around it");
}
