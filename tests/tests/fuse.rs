//! (S-33, S-34) The FUSE mount, by what programs see of it.

use forebay_client::CreateOptions;
use forebay_tests::cluster::p;
use forebay_tests::fuse::{Mount, errno, is_here, names, sh};
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, eventually, pattern, rng};
use rand::Rng;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

/// Files and folders as POSIX has them.
#[tokio::test(flavor = "multi_thread")]
async fn files_and_folders() {
    if !is_here("files_and_folders") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let fs_ = cluster.client().await;
    // Made, read, written over, added to, cut, grown.
    let f = mount.path("f");
    fs::write(&f, b"hello").unwrap();
    assert_eq!((fs::read(&f).unwrap(), fs::read(folder.join("f")).unwrap()), (b"hello".to_vec(), b"hello".to_vec()));
    OpenOptions::new().append(true).open(&f).unwrap().write_all(b", world").unwrap();
    assert_eq!(fs::read(&f).unwrap(), b"hello, world");
    let id = fs::metadata(&f).unwrap().ino();
    let file = OpenOptions::new().read(true).write(true).open(&f).unwrap();
    file.write_all_at(b"HE", 0).unwrap();
    file.write_all_at(b"far", 20).unwrap();
    let mut all = Vec::new();
    (&file).read_to_end(&mut all).unwrap();
    assert_eq!(all, b"HEllo, world\0\0\0\0\0\0\0\0far", "before it is closed");
    drop(file);
    assert_eq!(fs::read(folder.join("f")).unwrap(), b"HEllo, world\0\0\0\0\0\0\0\0far");
    OpenOptions::new().write(true).open(&f).unwrap().set_len(5).unwrap();
    assert_eq!(fs::read(&f).unwrap(), b"HEllo");
    nix::unistd::truncate(&f, 8).unwrap();
    assert_eq!((fs::read(&f).unwrap(), fs::metadata(&f).unwrap().len()), (b"HEllo\0\0\0".to_vec(), 8));
    fs::write(&f, b"x").unwrap();
    assert_eq!((fs::read(&f).unwrap(), fs::metadata(&f).unwrap().ino()), (b"x".to_vec(), id), "the same file with other bytes");
    // Exclusive, missing, wrong kinds.
    assert_eq!(OpenOptions::new().write(true).create_new(true).open(&f).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(errno(fs::read(mount.path("none"))), nix::libc::ENOENT);
    assert_eq!(errno(fs::read(mount.path("f/below"))), nix::libc::ENOTDIR);
    assert_eq!(errno(fs::write(&mount.at, b"")), nix::libc::EISDIR);
    assert_eq!(errno(fs::write(mount.path(&"n".repeat(256)), b"")), nix::libc::ENAMETOOLONG);
    // Links and pipes are of the namespace alone.
    std::os::unix::fs::symlink("f", mount.path("link")).unwrap();
    assert_eq!((fs::read_link(mount.path("link")).unwrap(), fs::read(mount.path("link")).unwrap()), (Path::new("f").to_owned(), b"x".to_vec()));
    assert!(fs::symlink_metadata(mount.path("link")).unwrap().file_type().is_symlink() && !folder.join("link").exists());
    assert_eq!(errno(std::os::unix::fs::symlink("g", mount.path("link"))), nix::libc::EEXIST);
    fs::rename(mount.path("link"), mount.path("link2")).unwrap();
    assert_eq!(fs::read(mount.path("link2")).unwrap(), b"x");
    nix::unistd::mkfifo(&mount.path("pipe"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    sh(&mount.at, "timeout 10 bash -c 'echo through > pipe & cat pipe' | grep -qx through");
    assert_eq!(sh(&mount.at, "stat -c %F link2 pipe"), "symbolic link\nfifo\n");
    cluster.ok(&["fs", "checkConsistency", "/m"]);
    fs::remove_file(mount.path("link2")).unwrap();
    fs::remove_file(mount.path("pipe")).unwrap();
    // Folders.
    fs::create_dir_all(mount.path("d/e")).unwrap();
    fs::write(mount.path("d/e/g"), b"g").unwrap();
    assert_eq!(errno(fs::remove_dir(mount.path("d/e"))), nix::libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_file(mount.path("d"))), nix::libc::EISDIR);
    assert_eq!(errno(fs::create_dir(mount.path("d"))), nix::libc::EEXIST);
    fs::rename(mount.path("d"), mount.path("moved")).unwrap();
    assert_eq!(fs::read(mount.path("moved/e/g")).unwrap(), b"g");
    assert!(!mount.path("d").exists() && folder.join("moved/e/g").exists());
    // Renamed over what is there; with it open.
    fs::write(mount.path("a"), b"new").unwrap();
    fs::write(mount.path("b"), b"old").unwrap();
    let mut old = File::open(mount.path("b")).unwrap();
    fs::rename(mount.path("a"), mount.path("b")).unwrap();
    assert_eq!(fs::read(mount.path("b")).unwrap(), b"new");
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old", "whoever has it open keeps it");
    // Deleted while it is open, for reading and for writing.
    let mut reads = File::open(mount.path("b")).unwrap();
    let mut writes = OpenOptions::new().read(true).write(true).create_new(true).open(mount.path("c")).unwrap();
    writes.write_all(b"kept").unwrap();
    fs::remove_file(mount.path("b")).unwrap();
    fs::remove_file(mount.path("c")).unwrap();
    assert!(!mount.path("b").exists() && !mount.path("c").exists());
    text.clear();
    reads.read_to_string(&mut text).unwrap();
    writes.seek(SeekFrom::Start(0)).unwrap();
    writes.read_to_string(&mut text).unwrap();
    assert_eq!(text, "newkept");
    drop((reads, writes, old));
    assert!(!folder.join("c").exists());
    // Moved while it is written.
    let mut open = File::create(mount.path("moving")).unwrap();
    open.write_all(b"one ").unwrap();
    fs::rename(mount.path("moving"), mount.path("arrived")).unwrap();
    open.write_all(b"two").unwrap();
    drop(open);
    assert_eq!((fs::read(folder.join("arrived")).unwrap(), mount.path("moving").exists()), (b"one two".to_vec(), false));
    // Modes, owners, times.
    fs::set_permissions(&f, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&f, Some(33), Some(33)).unwrap();
    let stamp = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
    File::options().write(true).open(&f).unwrap().set_modified(stamp).unwrap();
    let m = fs::metadata(&f).unwrap();
    assert_eq!((m.mode() & 0o7777, m.uid(), m.gid(), m.modified().unwrap()), (0o640, 33, 33, stamp));
    fs::write(&f, b"other bytes").unwrap();
    let m = fs::metadata(&f).unwrap();
    assert_eq!((m.mode() & 0o7777, m.uid(), m.gid()), (0o640, 33, 33), "other bytes leave them");
    let copy = File::create(mount.path("timed")).unwrap();
    (&copy).write_all(b"t").unwrap();
    copy.set_modified(stamp).unwrap();
    drop(copy);
    assert_eq!(fs::metadata(mount.path("timed")).unwrap().modified().unwrap(), stamp, "set before it was closed");
    sh(
        &mount.at,
        "umask 027; su -s /bin/bash www-data -c true 2>/dev/null || true; mkdir -m 2775 shared; : > shared/x; stat -c '%a %G' shared shared/x",
    );
    // When anything was changed last.
    let changed = |path: &Path| fs::metadata(path).map(|m| (m.ctime(), m.ctime_nsec(), m.mtime(), m.mtime_nsec())).unwrap();
    let (before, folder_before) = (changed(&f), changed(&mount.at));
    std::thread::sleep(Duration::from_millis(20));
    fs::set_permissions(&f, fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(mount.path("more")).unwrap();
    let (after, folder_after) = (changed(&f), changed(&mount.at));
    assert!((after.0, after.1) > (before.0, before.1) && (after.2, after.3) == (before.2, before.3));
    assert!((folder_after.2, folder_after.3) > (folder_before.2, folder_before.3));
    // Many entries.
    fs::create_dir(mount.path("many")).unwrap();
    for i in 0..2_500 {
        fs::write(folder.join(format!("many/{i:05}")), b"").unwrap();
    }
    assert_eq!(names(&mount.path("many")).len(), 2_500);
    assert_eq!(sh(&mount.at, "find many -type f | wc -l").trim(), "2500");
    sh(&mount.at, "rm -rf many");
    assert!(!folder.join("many").exists());
    // What others do is seen.
    write(&fs_, "/m/theirs", b"1", CreateOptions::default()).await;
    assert_eq!(fs::read(mount.path("theirs")).unwrap(), b"1");
    write(&fs_, "/m/theirs", b"twenty-two", CreateOptions { overwrite: true, ..CreateOptions::default() }).await;
    eventually("seen", 5, async || fs::read(mount.path("theirs")).unwrap() == b"twenty-two").await;
    fs::write(folder.join("theirs"), b"behind our back").unwrap();
    eventually("seen", 5, async || fs::read(mount.path("theirs")).unwrap() == b"behind our back").await;
    assert!(nix::sys::statvfs::statvfs(&mount.at).unwrap().blocks_available() > 0);
}

/// (S-33) A cached file of one block is read by the kernel itself; any other by this process; a program that changes it is not in the way.
#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_reads_cached_blocks_itself() {
    if !is_here("the_kernel_reads_cached_blocks_itself") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "4MiB"), ("page_size", "1MiB")]).await;
    let (one, three) = (pattern(1, 0, 3_333_333), pattern(2, 0, 10_000_000));
    fs::write(folder.join("one"), &one).unwrap();
    fs::write(folder.join("three"), &three).unwrap();
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let reads = || mount.metric("forebay_fuse_reads_total");
    // Cold: through this process, and cached.
    assert!(fs::read(mount.path("one")).unwrap() == one && fs::read(mount.path("three")).unwrap() == three);
    assert!(reads() > 0);
    cluster.ok(&["fs", "load", "/m"]);
    if mount.metric("forebay_fuse_passthrough_refused_total") > 0
        || !fs::read_to_string(cluster.dir.path().join("mnt.log")).unwrap().contains("passthrough=true")
    {
        return println!("SKIPPED the_kernel_reads_cached_blocks_itself: this kernel has no FUSE passthrough, or the process may not use it");
    }
    // The statistics themselves are read through the process.
    let before = reads();
    let own = reads() - before;
    let before = reads();
    let file = File::open(mount.path("one")).unwrap();
    let mut out = vec![0; 100_000];
    for offset in [0, 3_000_000, 7, 2_222_222] {
        file.read_exact_at(&mut out, offset).unwrap();
        assert!(out == one[offset as usize..offset as usize + out.len()]);
    }
    assert!(fs::read(mount.path("one")).unwrap() == one);
    let mapped = unsafe { memmap2::Mmap::map(&file).unwrap() };
    assert!(mapped[..] == one[..]);
    assert_eq!((reads() - before - own, mount.metric("forebay_fuse_passthrough_opens_total") >= 2), (0, true));
    // Of several blocks: through the process.
    assert!(fs::read(mount.path("three")).unwrap() == three);
    // Somebody writes it while it is open and mapped: they keep what they opened, who opens it from now on has the new bytes.
    let mut writes = OpenOptions::new().write(true).open(mount.path("one")).unwrap();
    writes.write_all(b"changed").unwrap();
    drop(writes);
    assert!(fs::read(mount.path("one")).unwrap()[..7] == *b"changed");
    assert!(mapped[..] == one[..]);
    file.read_exact_at(&mut out, 0).unwrap();
    assert!(out == one[..100_000]);
    // Evicted, and deleted by another client, while it is open and mapped.
    cluster.ok(&["fs", "load", "/m"]);
    let file = File::open(mount.path("one")).unwrap();
    let again = unsafe { memmap2::Mmap::map(&file).unwrap() };
    cluster.ok(&["fs", "free", "/m/one"]);
    assert!(again[7..] == one[7..]);
    cluster.ok(&["fs", "rm", "/m/one"]);
    assert!(again[7..] == one[7..]);
    file.read_exact_at(&mut out, 7).unwrap();
    assert!(out == one[7..100_007]);
    drop((file, again, mapped));
    eventually("gone here as well", 5, async || !mount.path("one").exists()).await;
}

/// (S-34) Random operations on one file, through two descriptors and a shared mapping, beside a plain file.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_what_a_plain_file_is() {
    if !is_here("a_file_is_what_a_plain_file_is") {
        return;
    }
    let steps: usize = std::env::var("FOREBAY_TEST_STEPS").ok().and_then(|n| n.parse().ok()).unwrap_or(3_000);
    let mut rng = rng("a_file_is_what_a_plain_file_is");
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "64KiB"), ("page_size", "64KiB")]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let (plain, ours) = (cluster.dir.path().join("plain"), mount.path("f"));
    let open = |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    let mut files = [(open(&plain), open(&plain)), (open(&ours), open(&ours))];
    const LONGEST: u64 = 300_000;
    for step in 0..steps {
        let (offset, length) = (rng.random_range(0..LONGEST), rng.random_range(1..20_000u64));
        let second = rng.random_bool(0.5);
        let what = rng.random_range(0..100);
        let bytes = pattern(step as u64, offset, length as usize);
        let seen: Vec<Vec<u8>> = files
            .iter()
            .map(|(a, b)| {
                let file = if second { b } else { a };
                match what {
                    0..35 => file.write_all_at(&bytes, offset).unwrap(),
                    35..45 => file.set_len(offset).unwrap(),
                    45..50 => file.sync_all().unwrap(),
                    50..55 => {
                        let length = file.metadata().unwrap().len();
                        if length > 0 {
                            let mut map = unsafe { memmap2::MmapMut::map_mut(file).unwrap() };
                            let from = (offset % length) as usize;
                            let to = (from + bytes.len()).min(length as usize);
                            map[from..to].copy_from_slice(&bytes[..to - from]);
                            map.flush().unwrap();
                        }
                    }
                    _ => {}
                }
                let mut out = vec![0; length as usize];
                let read = file.read_at(&mut out, offset).unwrap();
                out.truncate(read);
                out.extend(file.metadata().unwrap().len().to_le_bytes());
                out
            })
            .collect();
        assert!(seen[0] == seen[1], "step {step}, operation {what}: another content, or {:?} bytes", seen.iter().map(Vec::len).collect::<Vec<_>>());
        if what >= 97 {
            // Closed and opened again.
            files = [(open(&plain), open(&plain)), (open(&ours), open(&ours))];
            assert!(fs::read(&plain).unwrap() == fs::read(folder.join("f")).unwrap(), "step {step}: what was closed is in the store");
        }
    }
    drop(files);
    assert!(fs::read(&plain).unwrap() == fs::read(&ours).unwrap() && fs::read(&plain).unwrap() == fs::read(folder.join("f")).unwrap());
}

/// (S-34) What was fsynced or closed survives the death of the process; a dead mount is replaced; SIGTERM hands over what is open.
#[tokio::test(flavor = "multi_thread")]
async fn the_process_dies() {
    if !is_here("the_process_dies") {
        return;
    }
    let rounds: u64 = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let cluster = Cluster::start(1, &[("master.lease_ttl_ms", "1000")]).await;
    let folder = cluster.mount_folder("/m", &[]).await;
    let fs_ = cluster.client().await;
    for round in 0..rounds {
        let mut mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
        let mut synced = File::create(mount.path(&format!("synced{round}"))).unwrap();
        synced.write_all(&pattern(round, 0, 200_000)).unwrap();
        synced.sync_all().unwrap();
        synced.write_all(b"and what was not").unwrap();
        fs::write(mount.path(&format!("closed{round}")), pattern(round, 0, 100_000)).unwrap();
        drop(File::create(mount.path(&format!("empty{round}"))).unwrap());
        let mut over = OpenOptions::new().write(true).open(mount.path("closed0")).unwrap();
        over.write_all(b"never handed over").unwrap();
        let _open = File::open(mount.path(&format!("closed{round}"))).unwrap();
        mount.kill();
        assert_eq!(nix::sys::statvfs::statvfs(&mount.at).err(), Some(nix::errno::Errno::ENOTCONN));
        drop((synced, over));
        let again = Mount::start(&cluster, "mnt", &["--path", "/m"]);
        for i in 0..=round {
            let file = fs::read(again.path(&format!("synced{i}"))).unwrap();
            assert!(file.starts_with(&pattern(i, 0, 200_000)), "round {round}: synced{i}");
            assert!(fs::read(again.path(&format!("closed{i}"))).unwrap() == pattern(i, 0, 100_000));
            assert!(fs::read(folder.join(format!("closed{i}"))).unwrap() == pattern(i, 0, 100_000));
            assert!(fs::read(folder.join(format!("empty{i}"))).unwrap().is_empty(), "made and closed");
        }
        drop((mount, again));
    }
    let mut mount = Mount::start(&cluster, "mnt2", &["--path", "/m"]);
    let mut open = File::create(mount.path("open")).unwrap();
    open.write_all(b"not closed yet").unwrap();
    assert!(mount.stop());
    assert_eq!(read_all(&fs_, "/m/open").await, b"not closed yet");
    drop(open);
    assert!(names(&mount.at).is_empty(), "nothing is mounted any more");
    fs_.delete(&p("/m/open"), false).await.unwrap();
}

/// (S-33, S-34) A staging folder that is full refuses the write and harms nothing; a rename that fails leaves its target, read or not, where it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_harms_nothing() {
    if !is_here("what_fails_harms_nothing") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let one = cluster.mount_folder("/one", &[("block_size", "64KiB"), ("page_size", "64KiB")]).await;
    cluster.mount_folder("/two", &[]).await;
    let staging = cluster.dir.path().join("staging");
    fs::create_dir(&staging).unwrap();
    nix::mount::mount(Some("tmpfs"), &staging, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=2m")).expect("a small tmpfs");
    let old = pattern(1, 0, 700_000);
    fs::write(one.join("f"), &old).unwrap();
    let option = format!("staging_dir={}", staging.display());
    let mount = Mount::start(&cluster, "mnt", &["-o", &option]);
    let f = mount.path("one/f");
    let file = OpenOptions::new().write(true).open(&f).unwrap();
    assert_eq!(errno(file.write_all_at(&pattern(2, 0, 4_000_000), 600_000)), nix::libc::ENOSPC);
    drop(file);
    let now = fs::read(&f).unwrap();
    assert!(
        now.len() < 2 << 20 && now[..600_000] == old[..600_000] && now[600_000..] == pattern(2, 0, 4_000_000)[..now.len() - 600_000],
        "no more than was taken"
    );
    fs::write(&f, &old).unwrap();
    assert!(fs::read(one.join("f")).unwrap() == old, "there is room again");
    // Read through the process, of several blocks; another under store's file cannot take its name.
    let mut reads = File::open(&f).unwrap();
    fs::write(mount.path("two/g"), b"g").unwrap();
    assert_eq!(errno(fs::rename(mount.path("two/g"), &f)), nix::libc::EXDEV);
    let mut seen = Vec::new();
    reads.read_to_end(&mut seen).unwrap();
    drop(reads);
    assert!(seen == old && fs::read(&f).unwrap() == old && fs::read(one.join("f")).unwrap() == old);
    assert_eq!((names(&mount.path("one")), fs::read(mount.path("two/g")).unwrap()), (vec!["f".to_owned()], b"g".to_vec()));
    sh(&cluster.dir.path().join("mnt"), "mv two/g one/g && grep -qx g one/g && ! test -e two/g");
    drop(mount);
    let _ = nix::mount::umount2(&staging, nix::mount::MntFlags::MNT_DETACH);
}

/// (S-34) The process of a supervised mount is killed again and again under readers that open, read and close: a read is right or refused, and they read on.
#[tokio::test(flavor = "multi_thread")]
async fn a_supervised_mount_is_begun_anew() {
    if !is_here("a_supervised_mount_is_begun_anew") {
        return;
    }
    let rounds: usize = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5).min(50);
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[]).await;
    let bytes = pattern(3, 0, 300_000);
    std::fs::write(folder.join("f"), &bytes).unwrap();
    let mut mount = Mount::start(&cluster, "mnt", &["--supervise"]);
    let path = mount.path("/m/f");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let good = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (path, bytes, stop, good) = (path.clone(), bytes.clone(), stop.clone(), good.clone());
            std::thread::spawn(move || {
                let mut refused = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    match std::fs::read(&path) {
                        Ok(read) => {
                            assert!(read == bytes, "wrong bytes");
                            good.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                        Err(_) => refused += 1,
                    }
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                refused
            })
        })
        .collect();
    let mut longest = std::time::Duration::ZERO;
    for _ in 0..rounds {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", mount.id())).unwrap();
        let child: i32 = children.split_whitespace().next().expect("the mount's process").parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL).unwrap();
        let (began, before) = (std::time::Instant::now(), good.load(std::sync::atomic::Ordering::Relaxed));
        // What was under way when it was killed may still come to its end: more than that.
        forebay_tests::eventually("readers read again", 60, async || good.load(std::sync::atomic::Ordering::Relaxed) > before + 4).await;
        longest = longest.max(began.elapsed());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let refused: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    eprintln!(
        "{rounds} kills: {} reads were right, {refused} refused; the longest until both read again: {longest:?}",
        good.load(std::sync::atomic::Ordering::Relaxed)
    );
    assert!(mount.stop(), "told to stop, it ends well");
    assert!(std::fs::read_dir(&mount.at).unwrap().next().is_none(), "and the mount is gone");
}

/// (S-15, S-33) The worker and the master are killed under readers and a writer: no wrong byte, nothing acknowledged is lost, and all goes on.
#[tokio::test(flavor = "multi_thread")]
async fn servers_die_under_the_mount() {
    if !is_here("servers_die_under_the_mount") {
        return;
    }
    let rounds: u64 = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3).min(20);
    let mut rng = rng("servers_die_under_the_mount");
    let mut cluster = Cluster::start(1, &[("master.worker_timeout_ms", "1000")]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "256KiB")]).await;
    const FILES: u64 = 6;
    let length = |i: u64| 400_000 + i as usize * 500_000;
    for i in 0..FILES {
        fs::write(folder.join(format!("f{i}")), pattern(i, 0, length(i))).unwrap();
    }
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let plain = cluster.dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    for i in 0..FILES {
        fs::write(plain.join(format!("f{i}")), pattern(i, 0, length(i))).unwrap();
    }
    // Processes of their own: what starts the servers must not have files of the mount open, whose closing waits for the servers.
    let reads = "while [ ! -e $0/stop ]; do f=f$((RANDOM % 6)); rc=0; timeout 90 cmp -s $f $0/$f || rc=$?; echo $rc >> $0/reads-$$; done";
    let writes = "i=0; while [ ! -e $0/stop ]; do i=$((i + 1)); if cp $0/f0 w$i && sync w$i; then echo w$i >> $0/synced; fi; done";
    let start = |script: &str| {
        let log = File::options().create(true).append(true).open(cluster.dir.path().join("programs.log")).unwrap();
        Command::new("bash").args(["-uc", script]).arg(&plain).current_dir(&mount.at).stderr(log).spawn().unwrap()
    };
    let mut programs = vec![start(reads), start(reads), start(writes)];
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(rng.random_range(200..800))).await;
        cluster.kill_worker(0);
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..500))).await;
        cluster.start_worker(0);
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..500))).await;
        cluster.restart_master();
    }
    let lines = |name: &str| -> Vec<String> {
        let all = fs::read_dir(&plain).unwrap().map(|e| e.unwrap()).filter(|e| e.file_name().to_string_lossy().starts_with(name));
        all.flat_map(|e| fs::read_to_string(e.path()).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    let (read, synced) = (lines("reads-").len(), lines("synced").len());
    eventually("all go on", 90, async || lines("reads-").len() > read + 20 && lines("synced").len() > synced + 3).await;
    fs::write(plain.join("stop"), b"").unwrap();
    for program in &mut programs {
        program.wait().unwrap();
    }
    let (read, synced) = (lines("reads-"), lines("synced"));
    let count = |code: &str| read.iter().filter(|line| *line == code).count();
    eprintln!("{rounds} kills of each: {} reads were right, {} refused; {} files synced", count("0"), count("2"), synced.len());
    assert_eq!((count("1"), count("124")), (0, 0), "wrong bytes; waited for longer than 90 s");
    assert!(count("0") > 20);
    for name in &synced {
        assert!(fs::read(folder.join(name)).unwrap() == pattern(0, 0, length(0)), "{name} was synced");
    }
    for i in 0..FILES {
        assert!(fs::read(mount.path(&format!("f{i}"))).unwrap() == pattern(i, 0, length(i)));
    }
}

/// Two mounts: what one closed the other opens; nobody sees half a file.
#[tokio::test(flavor = "multi_thread")]
async fn close_to_open_between_mounts() {
    if !is_here("close_to_open_between_mounts") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mounts = [Mount::start(&cluster, "one", &["--path", "/m"]), Mount::start(&cluster, "two", &["--path", "/m", "-o", "passthrough=false"])];
    for round in 0..60u64 {
        let (from, to) = (&mounts[round as usize % 2], &mounts[(round as usize + 1) % 2]);
        let bytes = pattern(round, 0, 1_000 + (round as usize * 7_919) % 90_000);
        let name = format!("f{}", round % 3);
        fs::write(from.path(&name), &bytes).unwrap();
        let mut file = File::open(to.path(&name)).unwrap();
        let mut seen = Vec::new();
        file.read_to_end(&mut seen).unwrap();
        assert!(seen == bytes, "round {round}: {} bytes instead of {}", seen.len(), bytes.len());
    }
    fs::create_dir(mounts[0].path("d")).unwrap();
    fs::write(mounts[0].path("d/x"), b"x").unwrap();
    assert_eq!(names(&mounts[1].path("d")), ["x"]);
    fs::rename(mounts[1].path("d"), mounts[1].path("e")).unwrap();
    eventually("moved here as well", 5, async || mounts[0].path("e/x").exists() && !mounts[0].path("d").exists()).await;
    let read_only = Mount::start(&cluster, "ro", &["--path", "/m", "--read-only"]);
    assert_eq!(errno(fs::write(read_only.path("f0"), b"")), nix::libc::EROFS);
    assert_eq!(fs::read(read_only.path("e/x")).unwrap(), b"x");
}
