//! (S-41) flock(2) and fcntl(2) between mounts: who is let in, who waits, what the next one finds, and what becomes of locks whose mount is killed, silent, or changes hands.

use forebay_tests::fuse::{Mount, errno, is_here, sh};
use forebay_tests::{Cluster, eventually};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// How long the master waits for a mount that is silent, in these tests.
const TTL_MS: &str = "3000";

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn flock(file: &File, how: i32) -> i32 {
    // SAFETY: a descriptor that is open.
    errno(if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) })
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
}

/// fcntl(2) without waiting.
fn set(file: &File, kind: i32, start: i64, length: i64) -> i32 {
    fcntl(file, FcntlArg::F_SETLK(&range(kind, start, length))).err().map_or(0, |e| e as i32)
}

/// By the open file, not the process (F_OFD_SETLK): so that one process can be two.
fn set_own(file: &File, kind: i32, start: i64, length: i64) -> i32 {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, start, length))).err().map_or(0, |e| e as i32)
}

/// Who is in the way, as kind and range.
fn test(file: &File, kind: i32, start: i64, length: i64) -> Option<(i32, i64, i64)> {
    let mut lock = range(kind, start, length);
    fcntl(file, FcntlArg::F_GETLK(&mut lock)).unwrap();
    (i32::from(lock.l_type) != libc::F_UNLCK).then_some((lock.l_type.into(), lock.l_start, lock.l_len))
}

/// A process that takes a lock, says so, and keeps it until it is told to end.
fn holder(path: &Path, waits: bool) -> Child {
    let how = if waits { "fcntl.LOCK_EX" } else { "fcntl.LOCK_EX | fcntl.LOCK_NB" };
    let script = format!("import fcntl, sys\nf = open(sys.argv[1], 'r+')\nfcntl.flock(f, {how})\nprint('has it', flush=True)\nsys.stdin.read()\n");
    Command::new("python3").args(["-c", &script]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn has_it(child: &mut Child) {
    let mut said = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"has it");
}

/// Adds to a number in a file that it opens before it locks it, as programs do.
const COUNTING: &str = r"
import fcntl, sys
for i in range(int(sys.argv[2])):
    with open(sys.argv[1], 'r+') as f:
        if i % 2:
            fcntl.flock(f, fcntl.LOCK_EX)
        else:
            fcntl.flock(f, fcntl.LOCK_EX)
            fcntl.lockf(f, fcntl.LOCK_EX)
        n = int(f.read())
        f.seek(0)
        f.write(str(n + 1))
        f.flush()
";

struct Two {
    /// Taken away before the cluster ends.
    mounts: [Mount; 2],
    cluster: Cluster,
}

impl Two {
    async fn start(options: &[&str]) -> Two {
        let cluster = Cluster::start(1, &[("master.lock_ttl_ms", TTL_MS)]).await;
        cluster.mount_folder("/m", &[]).await;
        let control = cluster.dir.path().join("control");
        fs::create_dir(&control).unwrap();
        let control = format!("control_dir={}", control.display());
        let options: Vec<&str> = ["--path", "/m", "-o", &control].iter().chain(options).copied().collect();
        let mounts = ["one", "two"].map(|name| Mount::start(&cluster, name, &options));
        Two { mounts, cluster }
    }

    fn both(&self, name: &str) -> [PathBuf; 2] {
        [self.mounts[0].path(name), self.mounts[1].path(name)]
    }

    fn locked(&self) -> usize {
        let all = self.cluster.json(&["fsadmin", "report", "locks"]);
        all["files"].as_array().unwrap().iter().map(|file| file["locks"].as_array().unwrap().len()).sum()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_hold_between_mounts() {
    if !is_here("locks_hold_between_mounts") {
        return;
    }
    let two = Two::start(&["-o", "attr_ttl_ms=0,entry_ttl_ms=0"]).await;
    let [a, b] = two.both("f");
    fs::write(&a, b"0123456789").unwrap();
    // flock.
    let (one, other) = (open(&a), open(&b));
    assert_eq!((flock(&one, libc::LOCK_SH), flock(&other, libc::LOCK_SH | libc::LOCK_NB)), (0, 0), "both read");
    assert_eq!(flock(&one, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK);
    assert_eq!(flock(&other, libc::LOCK_UN), 0);
    assert_eq!(flock(&one, libc::LOCK_EX | libc::LOCK_NB), 0, "it is the only one now");
    assert_eq!(flock(&other, libc::LOCK_SH | libc::LOCK_NB), libc::EWOULDBLOCK);
    // The other kind does not see it.
    assert_eq!((set(&other, libc::F_WRLCK, 0, 0), set(&other, libc::F_UNLCK, 0, 0)), (0, 0));
    let listed = two.cluster.ok(&["fsadmin", "report", "locks"]);
    assert!(listed.contains("/m/f") && listed.contains("exclusive") && listed.contains("flock"), "{listed}");
    // A duplicate keeps it; the last close gives it back.
    let twice = one.try_clone().unwrap();
    drop(one);
    assert_eq!(flock(&other, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK);
    drop(twice);
    eventually("given back by the last close", 10, async || flock(&other, libc::LOCK_EX | libc::LOCK_NB) == 0).await;
    assert_eq!(flock(&other, libc::LOCK_UN), 0);

    // fcntl: ranges, which others see as they are; joined, and cut in the middle.
    let one = open(&a);
    assert_eq!((set(&one, libc::F_WRLCK, 0, 5), set(&one, libc::F_WRLCK, 5, 5), set(&one, libc::F_RDLCK, 20, 0)), (0, 0, 0));
    assert_eq!((set_own(&other, libc::F_WRLCK, 10, 10), set_own(&other, libc::F_RDLCK, 100, 1)), (0, 0), "beside, and shared");
    assert_eq!((set_own(&other, libc::F_WRLCK, 9, 1), set_own(&other, libc::F_WRLCK, 1 << 40, 1)), (libc::EAGAIN, libc::EAGAIN));
    assert_eq!(test(&other, libc::F_WRLCK, 0, 0), Some((libc::F_WRLCK, 0, 10)), "by another mount a process is another one");
    assert_eq!(set(&one, libc::F_UNLCK, 3, 2), 0);
    assert_eq!(
        (set_own(&other, libc::F_WRLCK, 3, 2), set_own(&other, libc::F_WRLCK, 2, 1), set_own(&other, libc::F_WRLCK, 5, 1)),
        (0, libc::EAGAIN, libc::EAGAIN)
    );
    let seen = sh(
        &two.mounts[1].at,
        "python3 -c \"import fcntl, struct\nf = open('f', 'r+')\nt = struct.unpack('hhqqi', fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 5, 3, 0)))\nprint(t[0] == fcntl.F_WRLCK, t[2], t[3])\"",
    );
    assert_eq!(seen.trim(), "True 5 5");
    // A process's own go with any descriptor of the file that it closes.
    drop(open(&a));
    assert_eq!((set_own(&other, libc::F_WRLCK, 0, 3), set_own(&other, libc::F_WRLCK, 5, 5)), (0, 0));
    drop(other);
    drop(one);
    eventually("nothing is locked", 10, async || two.locked() == 0).await;

    // A file that is only made here, out of order, has one identity for all.
    let mut fresh = File::create_new(two.mounts[0].path("fresh")).unwrap();
    fresh.write_all(b"head").unwrap();
    fresh.seek(std::io::SeekFrom::Start(0)).unwrap();
    fresh.write_all(b"HEAD").unwrap();
    assert_eq!(flock(&fresh, libc::LOCK_EX), 0);
    let theirs = open(&two.mounts[1].path("fresh"));
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK);
    fresh.write_all(b" and tail").unwrap();
    assert_eq!(flock(&fresh, libc::LOCK_UN), 0);
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), 0);
    let mut text = String::new();
    (&theirs).read_to_string(&mut text).unwrap();
    assert_eq!(text, "HEAD and tail", "what was written under a lock is there for the next one, though nobody has closed anything");
    // Deleted while it is locked.
    fs::remove_file(two.mounts[1].path("fresh")).unwrap();
    assert_eq!((flock(&theirs, libc::LOCK_UN), flock(&theirs, libc::LOCK_SH)), (0, 0));
    drop((fresh, theirs));
    assert!(two.cluster.master_metric("forebay_master_file_lock_conflicts_total").await >= 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_gets_it() {
    if !is_here("who_waits_gets_it") {
        return;
    }
    let mut two = Two::start(&[]).await;
    let [a, b] = two.both("f");
    fs::write(&a, b"0").unwrap();
    let mine = open(&a);
    assert_eq!(flock(&mine, libc::LOCK_EX), 0);
    let (mut waiting, mut killed) = (holder(&b, true), holder(&b, true));
    let mut here = holder(&a, true);
    async fn waits(cluster: &Cluster) -> u64 {
        cluster.master_metric("forebay_master_file_lock_waiters").await
    }
    eventually("three wait", 20, async || waits(&two.cluster).await == 3).await;
    // One that waits can be killed, and only that one is gone.
    killed.kill().unwrap();
    killed.wait().unwrap();
    eventually("two wait", 20, async || waits(&two.cluster).await == 2).await;
    // While they wait the mount changes hands: they wait on, and what is held is held.
    let old = two.mounts[0].id();
    let control = format!("control_dir={}", two.cluster.dir.path().join("control").display());
    let next = Mount::start(&two.cluster, "one", &["--path", "/m", "--take-over", "-o", &control]);
    assert_ne!(next.id(), old);
    std::mem::replace(&mut two.mounts[0], next).given_away();
    eventually("two wait again", 20, async || waits(&two.cluster).await == 2).await;
    let theirs = open(&b);
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK, "held through the hand-over");
    // The master begins anew: so it is then.
    two.cluster.restart_master();
    eventually("two wait again", 30, async || waits(&two.cluster).await == 2).await;
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK, "held through the master's restart");
    // Longer than the master would wait for a silent mount.
    std::thread::sleep(std::time::Duration::from_millis(4_000));
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK, "held as long as the mount is there");
    assert_eq!(flock(&mine, libc::LOCK_UN), 0);
    // Both get it, one after the other.
    for _ in 0..2 {
        let (first, second) = (&mut waiting, &mut here);
        eventually("one of them has it", 20, async || waits(&two.cluster).await <= 1).await;
        for child in [first, second] {
            drop(child.stdin.take());
        }
    }
    has_it(&mut waiting);
    has_it(&mut here);
    assert!(waiting.wait().unwrap().success() && here.wait().unwrap().success());

    // Four processes on two mounts count: no addition is lost.
    let each = 40;
    let counting: Vec<Child> =
        [&a, &b, &a, &b].iter().map(|path| Command::new("python3").args(["-c", COUNTING]).arg(path).arg(each.to_string()).spawn().unwrap()).collect();
    for mut child in counting {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(fs::read_to_string(&b).unwrap(), (4 * each).to_string());
    // Databases lock their files so, in the same process by two connections.
    let database = |at: &Path, what: &str| sh(at, &format!("python3 -c \"import sqlite3\ndb = sqlite3.connect('db', timeout=60)\n{what}\""));
    database(&two.mounts[0].at, "db.execute('create table t(n)'); db.commit()");
    let script = "for i in range(15):\n  db.execute('begin immediate'); db.execute('insert into t values (?)', (i,)); db.commit()";
    std::thread::scope(|scope| two.mounts.each_ref().map(|mount| scope.spawn(move || database(&mount.at, script))).map(|done| done.join().unwrap()));
    for mount in &two.mounts {
        assert_eq!(
            database(&mount.at, "print(db.execute('select count(*) from t').fetchone()[0], db.execute('pragma integrity_check').fetchone()[0])")
                .trim(),
            "30 ok"
        );
    }
    eventually("nothing is locked", 10, async || two.locked() == 0).await;
}

/// What the next holder finds, by every way that programs write under a lock.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_under_a_lock() {
    if !is_here("what_is_written_under_a_lock") {
        return;
    }
    let two = Two::start(&[]).await;
    // Two that write different ranges at the same time, each under its own lock: both are there.
    let [a, b] = two.both("ranges");
    fs::write(&a, vec![b'.'; 100_000]).unwrap();
    let (one, other) = (open(&a), open(&b));
    for round in 0..4u64 {
        let (at, there) = (round * 1_000, 50_000 + round * 1_000);
        assert_eq!((set_own(&one, libc::F_WRLCK, at as i64, 500), set_own(&other, libc::F_WRLCK, there as i64, 500)), (0, 0));
        one.write_all_at(&[b'a'; 500], at).unwrap();
        other.write_all_at(&[b'b'; 500], there).unwrap();
        assert_eq!((set_own(&one, libc::F_UNLCK, at as i64, 500), set_own(&other, libc::F_UNLCK, there as i64, 500)), (0, 0));
    }
    // One that makes it longer, and one of the same mount with a descriptor of its own.
    let third = open(&b);
    assert_eq!((set_own(&one, libc::F_WRLCK, 100_000, 10), set_own(&third, libc::F_WRLCK, 90_000, 10)), (0, 0));
    one.write_all_at(b"0123456789", 100_000).unwrap();
    // Neither of these says that all of it was written here.
    one.set_len(100_010).unwrap();
    nix::fcntl::fallocate(&one, nix::fcntl::FallocateFlags::empty(), 0, 100_010).unwrap();
    third.write_all_at(b"9876543210", 90_000).unwrap();
    drop((one, third));
    eventually("given back", 10, async || two.locked() == 0).await;
    let mut expected = vec![b'.'; 100_010];
    for round in 0..4 {
        expected[round * 1_000..][..500].fill(b'a');
        expected[50_000 + round * 1_000..][..500].fill(b'b');
    }
    expected[100_000..].copy_from_slice(b"0123456789");
    expected[90_000..90_010].copy_from_slice(b"9876543210");
    drop(other);
    let mut left: Vec<usize> = Vec::new();
    for at in [&a, &b] {
        let found = fs::read(at).unwrap();
        left.extend((0..expected.len().max(found.len())).filter(|i| found.get(*i) != expected.get(*i)).take(3));
    }
    assert_eq!(left, [0usize; 0], "all parts of both");

    // Two logs that are open all the time, appended to in turn.
    let [a, b] = two.both("log");
    fs::write(&a, b"").unwrap();
    let logs = [&a, &b].map(|path| OpenOptions::new().append(true).open(path).unwrap());
    let mut expected = String::new();
    for line in 0..30 {
        let mut log = &logs[line % 2];
        assert_eq!(flock(log, libc::LOCK_EX), 0);
        let text = format!("line {line} of {}\n", "x".repeat(line * 37));
        log.write_all(text.as_bytes()).unwrap();
        expected += &text;
        assert_eq!(flock(log, libc::LOCK_UN), 0);
    }
    for at in [&a, &b] {
        let found = fs::read_to_string(at).unwrap_or_else(|e| e.to_string());
        let differs = found.lines().zip(expected.lines()).position(|(found, expected)| found != expected);
        assert!(found == expected, "{} bytes instead of {}, from line {differs:?} on", found.len(), expected.len());
    }

    // One of them is cut by its holder: the other one appends behind what is left.
    assert_eq!(flock(&logs[0], libc::LOCK_EX), 0);
    logs[0].set_len(10).unwrap();
    assert_eq!((flock(&logs[0], libc::LOCK_UN), flock(&logs[1], libc::LOCK_EX)), (0, 0));
    (&logs[1]).write_all(b" and on").unwrap();
    assert_eq!(flock(&logs[1], libc::LOCK_UN), 0);
    for at in [&a, &b] {
        assert_eq!(fs::read_to_string(at).unwrap(), format!("{} and on", &expected[..10]));
    }

    // Locked by a descriptor for reading, written by another.
    let [a, b] = two.both("pair");
    fs::write(&a, b"1").unwrap();
    let (lock, mut writes) = (File::open(&a).unwrap(), open(&a));
    assert_eq!(flock(&lock, libc::LOCK_EX), 0);
    writes.write_all(b"2").unwrap();
    assert_eq!(flock(&lock, libc::LOCK_UN), 0);
    assert_eq!(fs::read(&b).unwrap(), b"2");
    assert_eq!(set(&lock, libc::F_RDLCK, 0, 0), 0);
    writes.write_all(b"3").unwrap();
    drop(lock);
    assert_eq!((fs::read(&b).unwrap(), two.locked()), (b"23".to_vec(), 0));

    // The lock file is deleted by its holder, as programs tidy up, while somebody waits.
    let [a, b] = two.both("tidy.lock");
    let mine = open(&a);
    assert_eq!(flock(&mine, libc::LOCK_EX), 0);
    let mut waiting = holder(&b, true);
    eventually("it waits", 20, async || two.cluster.master_metric("forebay_master_file_lock_waiters").await == 1).await;
    fs::remove_file(&a).unwrap();
    drop(mine);
    has_it(&mut waiting);
    drop(waiting.stdin.take());
    assert!(waiting.wait().unwrap().success());

    // No room for the newer content in the staging folder: no lock, and what is open is what it was; with room again it is taken.
    let [a, b] = two.both("room");
    let staging = two.cluster.dir.path().join("small");
    fs::create_dir(&staging).unwrap();
    nix::mount::mount(Some("tmpfs"), &staging, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=1m")).unwrap();
    fs::write(&a, vec![b'1'; 300_000]).unwrap();
    {
        let option = format!("staging_dir={}", staging.display());
        let third = Mount::start(&two.cluster, "three", &["--path", "/m", "-o", &option]);
        let small = open(&third.path("room"));
        let mut theirs = open(&b);
        assert_eq!(flock(&theirs, libc::LOCK_EX), 0);
        theirs.write_all(&vec![b'2'; 600_000]).unwrap();
        assert_eq!(flock(&theirs, libc::LOCK_UN), 0);
        assert_eq!(flock(&small, libc::LOCK_EX | libc::LOCK_NB), libc::ENOSPC);
        let mut bytes = Vec::new();
        (&small).read_to_end(&mut bytes).unwrap();
        assert!(bytes == vec![b'1'; 300_000], "{} bytes", bytes.len());
        assert_eq!((flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), flock(&theirs, libc::LOCK_UN)), (0, 0), "nobody has it");
        nix::mount::mount(None::<&str>, &staging, None::<&str>, nix::mount::MsFlags::MS_REMOUNT, Some("size=16m")).unwrap();
        assert_eq!(flock(&small, libc::LOCK_EX | libc::LOCK_NB), 0);
        assert!(fs::read(third.path("room")).unwrap() == vec![b'2'; 600_000]);
    }
    nix::mount::umount2(&staging, nix::mount::MntFlags::MNT_DETACH).unwrap();

    // Two readers that both want to write: neither waits for the other's reading for ever.
    let [a, b] = two.both("upgrade");
    fs::write(&a, b"").unwrap();
    let files = [open(&a), open(&b)];
    assert_eq!((flock(&files[0], libc::LOCK_SH), flock(&files[1], libc::LOCK_SH)), (0, 0));
    std::thread::scope(|scope| {
        for mut file in &files {
            scope.spawn(move || {
                assert_eq!(flock(file, libc::LOCK_EX), 0);
                file.write_all(b"x").unwrap();
                assert_eq!(flock(file, libc::LOCK_UN), 0);
            });
        }
    });
    assert_eq!(fs::read(&a).unwrap(), b"x", "both wrote their first byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_a_mount_that_is_gone() {
    if !is_here("locks_of_a_mount_that_is_gone") {
        return;
    }
    let mut two = Two::start(&["-o", "attr_ttl_ms=0,entry_ttl_ms=0"]).await;
    let [a, b] = two.both("f");
    fs::write(&a, b"first").unwrap();
    // Silent for too long: somebody else has it, and what comes of it later is refused.
    let mine = open(&a);
    assert_eq!(flock(&mine, libc::LOCK_EX), 0);
    (&mine).write_all(b"FIRST").unwrap();
    let silent = nix::unistd::Pid::from_raw(two.mounts[0].id() as i32);
    nix::sys::signal::kill(silent, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let mut theirs = open(&b);
    assert_eq!(flock(&theirs, libc::LOCK_EX), 0, "waited for until the mount was given up");
    theirs.write_all(b"second").unwrap();
    assert_eq!(flock(&theirs, libc::LOCK_UN), 0);
    nix::sys::signal::kill(silent, nix::sys::signal::Signal::SIGCONT).unwrap();
    assert_eq!(errno(mine.sync_all()), libc::ESTALE, "it was written under a lock that is another's");
    assert_eq!(errno((&mine).write_all(b"x")), libc::ESTALE);
    drop(mine);
    assert_eq!(fs::read(&b).unwrap(), b"second");
    assert_eq!(fs::read(&a).unwrap(), b"second", "opened again it is what it is");
    let mine = open(&a);
    assert_eq!(flock(&mine, libc::LOCK_EX), 0, "and can be locked again");
    assert_eq!(two.mounts[0].metric("forebay_fuse_locks_lost_total"), 1);

    // Killed: after its time, too. Ended well: at once.
    two.mounts[0].kill();
    assert_eq!(flock(&theirs, libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK);
    assert_eq!(flock(&theirs, libc::LOCK_EX), 0);
    drop(mine);
    assert!(two.mounts[1].stop());
    drop(theirs);
    assert_eq!(two.locked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_one_mount_alone() {
    if !is_here("locks_of_one_mount_alone") {
        return;
    }
    let two = Two::start(&["-o", "shared_locks=false"]).await;
    let [a, b] = two.both("f");
    fs::write(&a, b"0").unwrap();
    let (one, same, other) = (open(&a), open(&a), open(&b));
    assert_eq!(
        (flock(&one, libc::LOCK_EX), flock(&same, libc::LOCK_EX | libc::LOCK_NB), flock(&other, libc::LOCK_EX | libc::LOCK_NB)),
        (0, libc::EWOULDBLOCK, 0)
    );
    assert_eq!(two.locked(), 0, "the master is not asked");
}
