//! (S-40) A live mount changes hands under programs that have files open, and nobody notices. `FOREBAY_TEST_TAKE_OVERS` says how often.

use forebay_client::CreateOptions;
use forebay_tests::fuse::{Mount, is_here};
use forebay_tests::suite::write;
use forebay_tests::{Cluster, pattern, rng};
use rand::{Rng, SeedableRng};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SMALL: usize = 700_000;
const LARGE: usize = 12 << 20;

/// Counts what threads did, and says when to stop.
#[derive(Clone, Default)]
struct Work {
    over: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

impl Work {
    fn spawn(&self, mut one: impl FnMut(u64) + Send + 'static) -> std::thread::JoinHandle<u64> {
        let work = self.clone();
        std::thread::spawn(move || {
            let mut count = 0;
            while !work.over.load(Ordering::Relaxed) {
                one(count);
                count += 1;
                work.done.fetch_add(1, Ordering::Relaxed);
            }
            count
        })
    }
}

fn slice(seed: u64, whole: &[u8], file: &File, at: u64, length: usize) {
    let mut out = vec![0; length];
    file.read_exact_at(&mut out, at).unwrap_or_else(|e| panic!("file {seed} at {at}: {e}"));
    assert!(out == whole[at as usize..at as usize + length], "file {seed} at {at}: other bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_mount_changes_hands() {
    if !is_here("a_live_mount_changes_hands") {
        return;
    }
    let times: u32 = std::env::var("FOREBAY_TEST_TAKE_OVERS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let cluster = Cluster::start(1, &[]).await;
    let store = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "256KiB")]).await;
    let client = cluster.client().await;
    let (small, large) = (pattern(1, 0, SMALL), pattern(2, 0, LARGE));
    write(&client, "/m/small", &small, CreateOptions::default()).await;
    write(&client, "/m/large", &large, CreateOptions::default()).await;
    for i in 0..20 {
        write(&client, &format!("/m/d/f{i}"), &pattern(100 + i, 0, 30_000), CreateOptions { recursive: true, ..CreateOptions::default() }).await;
    }
    let staging = cluster.dir.path().join("control");
    fs::create_dir(&staging).unwrap();
    let option = format!("control_dir={}", staging.display());
    let mut mount = Mount::start(&cluster, "mnt", &["--path", "/m", "-o", &option]);
    let at = |name: &str| -> PathBuf { mount.at.join(name) };
    let mut rng = rng("a_live_mount_changes_hands");
    let work = Work::default();
    let mut threads = Vec::new();
    // Open all the time: read by the kernel itself, by the process, mapped, deleted meanwhile, and written.
    let open = |name: &str| File::open(at(name)).unwrap();
    let (passes, through, deleted) = (open("small"), open("large"), open("d/f19"));
    let mut first = [0; 10];
    passes.read_exact_at(&mut first, 0).unwrap();
    // SAFETY of the mapping: nobody cuts the file.
    let mapped = unsafe { memmap2::Mmap::map(&open("large")).unwrap() };
    fs::remove_file(at("d/f19")).unwrap();
    {
        let (small, mut seeded) = (small.clone(), rand::rngs::SmallRng::from_rng(&mut rng));
        threads.push(work.spawn(move |_| slice(1, &small, &passes, seeded.random_range(0..(SMALL - 5_000) as u64), 5_000)));
    }
    {
        let (large, mut seeded) = (large.clone(), rand::rngs::SmallRng::from_rng(&mut rng));
        threads.push(work.spawn(move |_| slice(2, &large, &through, seeded.random_range(0..(LARGE - 70_000) as u64), 70_000)));
    }
    {
        let (large, mut seeded) = (large.clone(), rand::rngs::SmallRng::from_rng(&mut rng));
        threads.push(work.spawn(move |_| {
            let from = seeded.random_range(0..LARGE - 4_096);
            assert!(mapped[from..from + 4_096] == large[from..from + 4_096], "mapped at {from}");
            std::thread::sleep(Duration::from_millis(1));
        }));
    }
    {
        let whole = pattern(119, 0, 30_000);
        threads.push(work.spawn(move |_| {
            slice(119, &whole, &deleted, 100, 20_000);
            std::thread::sleep(Duration::from_millis(2));
        }));
    }
    // Opened and closed, listed, made and deleted.
    let d = at("d");
    threads.push(work.spawn(move |n| {
        let i = n % 19;
        let mut bytes = Vec::new();
        File::open(d.join(format!("f{i}"))).and_then(|mut f| f.read_to_end(&mut bytes)).unwrap_or_else(|e| panic!("f{i}: {e}"));
        assert!(bytes == pattern(100 + i, 0, 30_000), "f{i}");
    }));
    let d = at("d");
    threads.push(work.spawn(move |_| {
        assert_eq!(fs::read_dir(&d).and_then(|all| all.map(|e| e.map(drop)).collect::<Result<Vec<()>, _>>()).expect("listed").len(), 19)
    }));
    let top = mount.at.clone();
    threads.push(work.spawn(move |n| {
        let (tmp, name) = (top.join(format!("new{n}")), top.join(format!("kept{}", n % 4)));
        fs::write(&tmp, pattern(n, 0, 5_000)).expect("written");
        fs::rename(&tmp, &name).expect("renamed");
        assert!(fs::read(&name).expect("read") == pattern(n, 0, 5_000), "{n}");
    }));
    // One that is open for writing all the time.
    let mut log = OpenOptions::new().append(true).create(true).open(at("log")).unwrap();
    let appended = work.spawn(move |n| {
        log.write_all(&n.to_le_bytes()).expect("appended");
        if n % 64 == 0 {
            log.sync_all().expect("synced");
        }
    });
    let mut longest = Duration::ZERO;
    for round in 0..times {
        if round % 3 == 1 {
            // One that dies in the middle of it: the process that has the mount goes on.
            let control = fs::read_dir(&staging).unwrap().map(|e| e.unwrap().path()).find(|path| path.to_string_lossy().contains("mount-")).unwrap();
            let mut stream = std::os::unix::net::UnixStream::connect(control).unwrap();
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut [0; 100]).unwrap();
            drop(stream);
            let before = work.done.load(Ordering::Relaxed);
            forebay_tests::eventually("everybody goes on", 20, async || work.done.load(Ordering::Relaxed) > before + 50).await;
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(100..400)));
        let began = Instant::now();
        let next = Mount::start(&cluster, "mnt", &["--path", "/m", "--take-over", "-o", &option]);
        longest = longest.max(began.elapsed());
        std::mem::replace(&mut mount, next).given_away();
        let before = work.done.load(Ordering::Relaxed);
        forebay_tests::eventually("everybody goes on", 20, async || work.done.load(Ordering::Relaxed) > before + 50).await;
    }
    work.over.store(true, Ordering::Relaxed);
    let counts: Vec<u64> = threads.into_iter().map(|thread| thread.join().expect("no failed call")).collect();
    let appended = appended.join().expect("no failed call");
    eprintln!("{times} take-overs, each within {longest:?}; calls {counts:?}, {appended} appended");
    assert!(counts.iter().all(|count| *count > 0));
    let expected: Vec<u8> = (0..appended).flat_map(u64::to_le_bytes).collect();
    assert!(
        fs::read(mount.at.join("log")).unwrap() == expected && fs::read(store.join("log")).unwrap() == expected,
        "what was appended is there, in order"
    );
    assert!(forebay_tests::fuse::names(&mount.at.join("d")).iter().all(|name| name.starts_with('f')));
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
    // As another mount than it is it is not taken over, and nor where there is no master to go on with.
    let words = |more: &[&str]| {
        [&["mount", "--foreground", "--path", "/m", "--take-over", "-o", &option], more, &[mount.at.to_str().unwrap()]]
            .concat()
            .iter()
            .map(|w| w.to_string())
            .collect::<Vec<_>>()
    };
    let refused = |words: Vec<String>| {
        let output = cluster.run(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(words(&["--read-only"])).contains("mounted there, for writing"));
    let nobody = forebay_tests::forebay();
    let output = std::process::Command::new(nobody)
        .args(["--master", "127.0.0.1:1"])
        .args(words(&[]))
        .env("FOREBAY_CLIENT__CALL_TIMEOUT_MS", "500")
        .env("FOREBAY_CONFIG", "/nonexistent")
        .output()
        .unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(fs::read(mount.at.join("small")).unwrap() == small);
    // The last one takes the mount away as any other does.
    assert!(mount.stop());
    assert!(!mounted(&mount.at));
    // Where there is none, one is made.
    let fresh = Mount::start(&cluster, "mnt", &["--path", "/m", "--take-over", "-o", &option]);
    assert!(fs::read(fresh.at.join("small")).unwrap() == small);
}

fn mounted(at: &Path) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == at.to_str())
}
