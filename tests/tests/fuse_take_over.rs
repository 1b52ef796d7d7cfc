//! (S-40) A live mount changes hands under programs that have files open, from process to process and by a keeper, and nobody notices. `FOREBAY_TEST_TAKE_OVERS` says how often.

use forebay_client::CreateOptions;
use forebay_tests::fuse::{Mount, is_here};
use forebay_tests::suite::write;
use forebay_tests::{Cluster, pattern, rng};
use rand::{Rng, SeedableRng};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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

/// Of `programs`: the mount, the folder that its files are kept in, and the file that the number of calls is written to.
const PLACES: [&str; 3] = ["FOREBAY_TEST_MOUNT", "FOREBAY_TEST_STORE", "FOREBAY_TEST_PROGRESS"];

/// What programs do on a mount all the time, with files open: by the kernel, by the process, mapped, deleted meanwhile, and written. A process of its own, begun by `Programs`: one that has
/// files of a mount open that waits for its next process cannot begin that one (its address space is locked by a page fault, and `exec` waits for the close of what it does not inherit).
#[test]
fn programs() {
    let [Some(top), Some(store), Some(progress)] = PLACES.map(std::env::var_os) else { return };
    let (top, store) = (PathBuf::from(top), PathBuf::from(store));
    let mut rng = rng("programs");
    let at = |name: &str| -> PathBuf { top.join(name) };
    let (small, large) = (pattern(1, 0, SMALL), pattern(2, 0, LARGE));
    let work = Work::default();
    let mut threads = Vec::new();
    let open = |name: &str| File::open(at(name)).unwrap();
    let (passes, through, deleted) = (open("small"), open("large"), open("d/f19"));
    let mut first = [0; 10];
    passes.read_exact_at(&mut first, 0).unwrap();
    // SAFETY of the mapping: nobody cuts the file.
    let mapped = unsafe { memmap2::Mmap::map(&open("large")).unwrap() };
    fs::remove_file(at("d/f19")).unwrap();
    let mut seeded = rand::rngs::SmallRng::from_rng(&mut rng);
    threads.push(work.spawn(move |_| slice(1, &small, &passes, seeded.random_range(0..(SMALL - 5_000) as u64), 5_000)));
    let mut seeded = rand::rngs::SmallRng::from_rng(&mut rng);
    let whole = large.clone();
    threads.push(work.spawn(move |_| slice(2, &whole, &through, seeded.random_range(0..(LARGE - 70_000) as u64), 70_000)));
    let mut seeded = rand::rngs::SmallRng::from_rng(&mut rng);
    threads.push(work.spawn(move |_| {
        let from = seeded.random_range(0..LARGE - 4_096);
        assert!(mapped[from..from + 4_096] == large[from..from + 4_096], "mapped at {from}");
        std::thread::sleep(Duration::from_millis(1));
    }));
    let whole = pattern(119, 0, 30_000);
    threads.push(work.spawn(move |_| {
        slice(119, &whole, &deleted, 100, 20_000);
        std::thread::sleep(Duration::from_millis(2));
    }));
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
    let dir = top.clone();
    threads.push(work.spawn(move |n| {
        let (tmp, name) = (dir.join(format!("new{n}")), dir.join(format!("kept{}", n % 4)));
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
    let (over, told) = (work.over.clone(), work.done.clone());
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        over.store(true, Ordering::Relaxed);
    });
    while !work.over.load(Ordering::Relaxed) {
        // What the kernel reads by itself goes on in any case, so each has to have done something.
        fs::write(&progress, told.load(Ordering::Relaxed).to_string()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    // None of their calls has failed, and all that was appended is there.
    let counts: Vec<u64> = threads.into_iter().map(|thread| thread.join().expect("no failed call")).collect();
    let appended = appended.join().expect("no failed call");
    eprintln!("calls {counts:?}, {appended} appended");
    assert!(counts.iter().all(|count| *count > 0));
    let expected: Vec<u8> = (0..appended).flat_map(u64::to_le_bytes).collect();
    assert!(
        fs::read(top.join("log")).unwrap() == expected && fs::read(store.join("log")).unwrap() == expected,
        "what was appended is there, in order"
    );
    assert!(forebay_tests::fuse::names(&top.join("d")).iter().all(|name| name.starts_with('f')));
}

/// `programs` as a process.
struct Programs {
    child: Child,
    progress: PathBuf,
}

const OPTION: &[&str] = &["--path", "/m", "--take-over", "-o"];

impl Programs {
    /// Files in the namespace, below /m of the cluster; the folder that it is kept in.
    async fn files(cluster: &Cluster) -> PathBuf {
        let store = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "256KiB")]).await;
        let client = cluster.client().await;
        write(&client, "/m/small", &pattern(1, 0, SMALL), CreateOptions::default()).await;
        write(&client, "/m/large", &pattern(2, 0, LARGE), CreateOptions::default()).await;
        for i in 0..20 {
            write(&client, &format!("/m/d/f{i}"), &pattern(100 + i, 0, 30_000), CreateOptions { recursive: true, ..CreateOptions::default() }).await;
        }
        store
    }

    async fn begin(cluster: &Cluster, top: &Path, store: &Path) -> Programs {
        let progress = cluster.dir.path().join("progress");
        let places = [top, store, &progress];
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "programs", "--nocapture"])
            .envs(PLACES.into_iter().zip(places))
            .stdin(Stdio::piped())
            // The runner's words of it would be counted as another test.
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let programs = Programs { child, progress };
        forebay_tests::eventually("programs are at work", 20, async || programs.done() > 0).await;
        programs
    }

    fn done(&self) -> u64 {
        fs::read_to_string(&self.progress).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    async fn go_on(&self) {
        let before = self.done();
        forebay_tests::eventually("everybody goes on", 20, async || self.done() > before + 50).await;
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success(), "a call has failed");
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A cluster with the programs' files and where they are kept, a control folder, and the option that names it.
async fn setting() -> (Cluster, PathBuf, PathBuf, String) {
    let cluster = Cluster::start(1, &[]).await;
    let store = Programs::files(&cluster).await;
    let control = cluster.dir.path().join("control");
    fs::create_dir(&control).unwrap();
    let option = format!("control_dir={}", control.display());
    (cluster, store, control, option)
}

fn times() -> u32 {
    std::env::var("FOREBAY_TEST_TAKE_OVERS").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_mount_changes_hands() {
    if !is_here("a_live_mount_changes_hands") {
        return;
    }
    let times = times();
    let (cluster, store, control, option) = setting().await;
    let mut mount = Mount::start(&cluster, "mnt", &["--path", "/m", "-o", &option]);
    let mut rng = rng("a_live_mount_changes_hands");
    let programs = Programs::begin(&cluster, &mount.at, &store).await;
    let mut longest = Duration::ZERO;
    for round in 0..times {
        if round % 3 == 1 {
            // One that dies in the middle of it: the process that has the mount goes on.
            let control = fs::read_dir(&control).unwrap().map(|e| e.unwrap().path()).find(|path| path.to_string_lossy().contains("mount-")).unwrap();
            let mut stream = std::os::unix::net::UnixStream::connect(control).unwrap();
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut [0; 100]).unwrap();
            drop(stream);
            programs.go_on().await;
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(100..400)));
        let began = Instant::now();
        let next = Mount::start(&cluster, "mnt", &[OPTION, &[&option]].concat());
        longest = longest.max(began.elapsed());
        std::mem::replace(&mut mount, next).given_away();
        programs.go_on().await;
    }
    programs.end();
    eprintln!("{times} take-overs, each within {longest:?}");
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
    let output = Command::new(nobody)
        .args(["--master", "127.0.0.1:1"])
        .args(words(&[]))
        .env("FOREBAY_CLIENT__CALL_TIMEOUT_MS", "500")
        .env("FOREBAY_CONFIG", "/nonexistent")
        .output()
        .unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(fs::read(mount.at.join("small")).unwrap() == pattern(1, 0, SMALL));
    // The last one takes the mount away as any other does.
    assert!(mount.stop());
    assert!(!mounted(&mount.at));
    // Where there is none, one is made.
    let fresh = Mount::start(&cluster, "mnt", &[OPTION, &[&option]].concat());
    assert!(fs::read(fresh.at.join("small")).unwrap() == pattern(1, 0, SMALL));
}

fn mounted(at: &Path) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == at.to_str())
}

/// A keeper of one control folder.
struct Keeper(Child);

impl Keeper {
    fn start(control: &Path, wait: &str) -> Keeper {
        let child = Command::new(forebay_tests::forebay())
            .args(["keeper", "--wait", wait, "--web", "127.0.0.1:0"])
            .arg(control)
            .env("FOREBAY_CONFIG", "/dev/null")
            .spawn()
            .expect("forebay keeper");
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(control.join("keeper")).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "the keeper listens");
            std::thread::sleep(Duration::from_millis(10));
        }
        Keeper(child)
    }

    fn stop(mut self) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id() as i32), nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        assert!(self.0.wait().expect("wait").success());
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_has_a_mount_between_two_processes() {
    if !is_here("a_keeper_has_a_mount_between_two_processes") {
        return;
    }
    let times = times();
    let (cluster, store, control, option) = setting().await;
    let options = [OPTION, &[&option]].concat();
    let keeper = Keeper::start(&control, "60s");
    let mut mount = Mount::start(&cluster, "mnt", &options);
    let mut rng = rng("a_keeper_has_a_mount_between_two_processes");
    let programs = Programs::begin(&cluster, &mount.at, &store).await;
    for round in 0..times {
        std::thread::sleep(Duration::from_millis(rng.random_range(50..300)));
        mount.terminate();
        mount.given_away();
        // A successor that dies in the middle leaves it where it is.
        if round % 3 == 1 {
            let socket = fs::read_dir(&control).unwrap().map(|e| e.unwrap().path()).find(|path| path.to_string_lossy().contains("mount-")).unwrap();
            let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut [0; 100]).unwrap();
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
        mount = Mount::start(&cluster, "mnt", &options);
        programs.go_on().await;
    }
    programs.end();
    eprintln!("kept {times} times");
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
    // Told to end by SIGINT, it takes the mount away nevertheless: that is how a volume ends.
    let read = |mount: &Mount| fs::read(mount.at.join("small")).unwrap() == pattern(1, 0, SMALL);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(mount.id() as i32), nix::sys::signal::Signal::SIGINT).expect("SIGINT");
    let at = mount.at.clone();
    mount.given_away();
    assert!(!mounted(&at));
    // The keeper's own end is that of what it keeps.
    let mut mount = Mount::start(&cluster, "mnt", &options);
    assert!(read(&mount));
    let open = File::open(mount.at.join("large")).unwrap();
    mount.terminate();
    mount.given_away();
    assert!(mounted(&at));
    keeper.stop();
    assert!(!mounted(&at));
    assert_eq!(open.lock_shared().unwrap_err().raw_os_error(), Some(nix::libc::ENOTCONN));
    // And where nobody comes for it, that of its time; programs do not wait longer.
    let keeper = Keeper::start(&control, "1s");
    let mut mount = Mount::start(&cluster, "mnt", &options);
    assert!(read(&mount));
    let open = File::open(mount.at.join("large")).unwrap();
    mount.terminate();
    mount.given_away();
    assert!(matches!(open.lock_shared().unwrap_err().raw_os_error(), Some(nix::libc::ENOTCONN | nix::libc::ECONNABORTED)));
    forebay_tests::eventually("the mount is gone", 20, async || !mounted(&at)).await;
    let mut mount = Mount::start(&cluster, "mnt", &options);
    assert!(read(&mount));
    // One that offers nothing sensible is not kept, and does no harm.
    let mut stream = std::os::unix::net::UnixStream::connect(control.join("keeper")).unwrap();
    stream.write_all(&[0xff; 64]).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    // Where there is none, the mount ends with its process.
    keeper.stop();
    assert!(mount.stop());
    assert!(!mounted(&at));
}
