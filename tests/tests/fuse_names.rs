//! What a mount has beyond names and bytes: files of several names, extended attributes, a limit of what it knows.

use forebay_client::CreateOptions;
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::fuse::{Mount, errno, is_here, sh};
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, eventually, pattern};
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

fn ids(path: &Path) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.ino(), metadata.nlink())
}

/// (S-37) Names of one file, by what programs, another mount, clients and the under store see of them.
#[tokio::test(flavor = "multi_thread")]
async fn several_names() {
    if !is_here("several_names") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let store = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    cluster.mount_folder("/other", &[]).await;
    let client = cluster.client().await;
    let mount = Mount::start(&cluster, "mnt", &["-o", "attr_ttl_ms=0,entry_ttl_ms=0"]);
    let at = |path: &str| mount.path(path);
    let first = pattern(1, 0, 300_000);
    fs::create_dir(at("m/d")).unwrap();
    fs::write(at("m/a"), &first).unwrap();
    fs::hard_link(at("m/a"), at("m/d/b")).unwrap();
    assert_eq!((ids(&at("m/a")).1, ids(&at("m/a"))), (2, ids(&at("m/d/b"))));
    assert_eq!(errno(fs::hard_link(at("m/a"), at("m/d/b"))), nix::libc::EEXIST);
    assert_eq!(errno(fs::hard_link(at("m/a"), at("other/a"))), nix::libc::EXDEV);
    assert_eq!(errno(fs::hard_link(at("m/d"), at("m/e"))), nix::libc::EPERM);

    // One file: bytes, modes and what is being written.
    let second = pattern(2, 0, 200_000);
    fs::write(at("m/d/b"), &second).unwrap();
    assert!(fs::read(at("m/a")).unwrap() == second && fs::read(store.join("a")).unwrap() == second);
    assert!(!store.join("d/b").exists(), "the store has it once");
    fs::set_permissions(at("m/a"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(at("m/d/b")).unwrap().permissions().mode() & 0o777, 0o640);
    let mut writing = OpenOptions::new().append(true).open(at("m/a")).unwrap();
    writing.write_all(b"more").unwrap();
    assert_eq!(fs::metadata(at("m/d/b")).unwrap().len(), 200_004);
    drop(writing);
    let second = [&second[..], b"more"].concat();
    // By other ways in.
    assert!(read_all(&client, "/m/d/b").await == second);
    assert_eq!(client.get_status(&p("/m/d/b")).await.unwrap().other_names, 1);
    let listed: Vec<u64> = client.list(&p("/m/d"), false).await.unwrap().iter().map(|entry| entry.length).collect();
    assert_eq!(listed, [200_004]);
    write(&client, "/m/d/b", &first, CreateOptions { overwrite: true, ..CreateOptions::default() }).await;
    assert!(fs::read(at("m/a")).unwrap() == first && fs::read(store.join("a")).unwrap() == first);
    let evicted = client.free(&p("/m/d/b")).await.unwrap();
    assert_eq!((evicted.files, evicted.refused), (1, 0));
    assert!(fs::read(at("m/d/b")).unwrap() == first, "fetched from the store by any of its names");

    // The name that the store has it under goes; a reader reads on.
    let mut reading = File::open(at("m/a")).unwrap();
    fs::remove_file(at("m/a")).unwrap();
    assert!(fs::read(store.join("d/b")).unwrap() == first && !store.join("a").exists());
    assert_eq!((ids(&at("m/d/b")).1, reading.metadata().unwrap().nlink()), (1, 1));
    let mut bytes = Vec::new();
    reading.read_to_end(&mut bytes).unwrap();
    assert!(bytes == first);

    // Replaced under one name, it is there under the other one.
    fs::hard_link(at("m/d/b"), at("m/c")).unwrap();
    fs::write(at("m/new"), b"new").unwrap();
    fs::rename(at("m/new"), at("m/d/b")).unwrap();
    assert_eq!((fs::read(at("m/d/b")).unwrap(), fs::read(store.join("d/b")).unwrap()), (b"new".to_vec(), b"new".to_vec()));
    assert!(fs::read(at("m/c")).unwrap() == first && fs::read(store.join("c")).unwrap() == first);
    // What is moved stays what it is.
    fs::hard_link(at("m/c"), at("m/d/c")).unwrap();
    fs::rename(at("m/d"), at("m/moved")).unwrap();
    assert_eq!((ids(&at("m/c")), ids(&at("m/moved/c")).1), (ids(&at("m/moved/c")), 2));
    fs::rename(at("m/c"), at("m/moved/c")).unwrap();
    assert!(at("m/c").exists(), "two names of one file: both stay");

    // A folder is deleted in which the store has it: it stays under its name outside.
    fs::rename(at("m/moved/c"), at("m/out")).unwrap();
    fs::rename(at("m/c"), at("m/moved/c")).unwrap();
    assert!(store.join("moved/c").exists() && !store.join("out").exists());
    client.delete(&p("/m/moved"), true).await.unwrap();
    assert!(!store.join("moved").exists() && fs::read(store.join("out")).unwrap() == first);
    assert_eq!((ids(&at("m/out")).1, fs::read(at("m/out")).unwrap() == first), (1, true));

    // What the store loses is gone under all names.
    fs::hard_link(at("m/out"), at("m/out2")).unwrap();
    fs::remove_file(store.join("out")).unwrap();
    eventually("gone under all names", 20, async || {
        client.get_status(&p("/m/out2")).await.is_err_and(|e| e.kind() == ErrorKind::NotFound)
            && client.get_status(&p("/m/out")).await.is_err_and(|e| e.kind() == ErrorKind::NotFound)
    })
    .await;

    // Of a file that is still being written, and of one that only the cache has.
    let mut new = File::create(at("m/fresh")).unwrap();
    new.write_all(&second[..1_000]).unwrap();
    fs::hard_link(at("m/fresh"), at("m/fresh2")).unwrap();
    new.write_all(&second[1_000..]).unwrap();
    fs::remove_file(at("m/fresh")).unwrap();
    drop(new);
    assert!(fs::read(at("m/fresh2")).unwrap() == second && fs::read(store.join("fresh2")).unwrap() == second);
    write(&client, "/m/kept", &first, CreateOptions { write_type: "cache_only".into(), ..CreateOptions::default() }).await;
    fs::hard_link(at("m/kept"), at("m/kept2")).unwrap();
    fs::remove_file(at("m/kept")).unwrap();
    assert!(fs::read(at("m/kept2")).unwrap() == first && !store.join("kept2").exists());
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}

/// (S-37) Programs that make links: a copy by links, an archive that keeps them, and both after the master began anew.
#[tokio::test(flavor = "multi_thread")]
async fn programs_that_link() {
    if !is_here("programs_that_link") {
        return;
    }
    let mut cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    sh(
        &mount.at,
        "mkdir -p a/b && for i in 1 2 3 4 5; do head -c ${i}0000 /dev/urandom > a/b/f$i; ln a/b/f$i a/l$i; done
         cp -al a copy && cp -a a archived && mkdir untarred && tar -cf - a | tar -C untarred -xf -
         for d in copy archived untarred/a; do diff -r a $d; test $d/l3 -ef $d/b/f3; done
         test $(stat -c %h a/l1) = 4 && test $(stat -c %h archived/l1) = 2
         rm -r a && test $(stat -c %h copy/b/f1) = 2 && diff -r copy archived",
    );
    cluster.restart_master();
    sh(
        &mount.at,
        "test $(stat -c %h copy/b/f1) = 2 && test copy/l1 -ef copy/b/f1 && diff -r copy archived && rm -r copy archived untarred && test -z \"$(ls)\"",
    );
}

/// (S-38) Extended attributes: kinds, sizes, flags, between clients, over new bytes.
#[tokio::test(flavor = "multi_thread")]
async fn extended_attributes() {
    if !is_here("extended_attributes") {
        return;
    }
    let mut cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let file = mount.path("f");
    let get = |path: &Path, name: &str| {
        let mut value = vec![0; 20_000];
        getxattr(path, name, &mut value[..]).map(|length| value[..length].to_vec())
    };
    let list = |path: &Path| {
        let mut names = vec![0; 20_000];
        let length = listxattr(path, &mut names[..]).unwrap();
        let mut names: Vec<String> =
            names[..length].split(|b| *b == 0).map(|n| String::from_utf8(n.to_vec()).unwrap()).filter(|n| !n.is_empty()).collect();
        names.sort();
        names
    };
    use rustix::io::Errno;
    fs::write(&file, b"one").unwrap();
    assert_eq!(get(&file, "user.none"), Err(Errno::NODATA));
    setxattr(&file, "user.colour", b"red", XattrFlags::empty()).unwrap();
    setxattr(&file, "user.empty", b"", XattrFlags::CREATE).unwrap();
    setxattr(&file, "trusted.size", &[7; 9_000], XattrFlags::empty()).unwrap();
    assert_eq!(setxattr(&file, "user.colour", b"x", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(setxattr(&file, "user.none", b"x", XattrFlags::REPLACE), Err(Errno::NODATA));
    setxattr(&file, "user.colour", b"blue", XattrFlags::REPLACE).unwrap();
    assert_eq!(setxattr(&file, "user.big", &[0; 17_000], XattrFlags::empty()), Err(Errno::NOSPC));
    assert_eq!(setxattr(&file, "security.some", b"x", XattrFlags::empty()), Err(Errno::OPNOTSUPP));
    assert_eq!(list(&file), ["trusted.size", "user.colour", "user.empty"]);
    assert_eq!(
        (get(&file, "user.colour"), get(&file, "user.empty"), get(&file, "trusted.size")),
        (Ok(b"blue".to_vec()), Ok(vec![]), Ok(vec![7; 9_000]))
    );
    assert_eq!(getxattr(&file, "user.colour", &mut [0u8; 2][..]), Err(Errno::RANGE));
    // Over new bytes, a rename, another name; on a folder; set while the file is being written out of order.
    fs::write(&file, b"two").unwrap();
    fs::hard_link(&file, mount.path("linked")).unwrap();
    fs::rename(&file, mount.path("g")).unwrap();
    assert_eq!((get(&mount.path("g"), "user.colour"), get(&mount.path("linked"), "user.colour")), (Ok(b"blue".to_vec()), Ok(b"blue".to_vec())));
    fs::create_dir(mount.path("d")).unwrap();
    setxattr(mount.path("d"), "user.kind", b"folder", XattrFlags::empty()).unwrap();
    let writing = File::create(mount.path("w")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writing, b"later", 5_000).unwrap();
    rustix::fs::fsetxattr(&writing, "user.early", b"yes", XattrFlags::empty()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writing, b"first", 0).unwrap();
    drop(writing);
    assert_eq!(fs::metadata(mount.path("w")).unwrap().len(), 5_005);
    removexattr(mount.path("g"), "user.empty").unwrap();
    assert_eq!(removexattr(mount.path("g"), "user.empty"), Err(Errno::NODATA));
    // They are kept, and seen by other clients.
    cluster.restart_master();
    assert_eq!((get(&mount.path("d"), "user.kind"), get(&mount.path("w"), "user.early")), (Ok(b"folder".to_vec()), Ok(b"yes".to_vec())));
    let seen = cluster.client().await.x_attrs(&p("/m/linked")).await.unwrap();
    let seen: Vec<(u32, &str)> = seen.iter().map(|x| (x.namespace, x.name.as_str())).collect();
    assert_eq!(seen, [(0, "colour"), (1, "size")]);
}

/// What a mount's process knows of files keeps to its limit, whatever is listed and looked at: the kernel is asked to forget what was not used for longest. What is open,
/// or somebody's folder, or something is mounted on, stays, and all that was forgotten is found again.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_files_is_bounded() {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let version: Vec<u32> = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok()).take(2).collect();
    if !is_here("what_is_known_of_files_is_bounded") {
        return;
    }
    if version < vec![6, 18] {
        println!("SKIPPED what_is_known_of_files_is_bounded: Linux {release} has no FUSE_NOTIFY_PRUNE (6.18 has)");
        return;
    }
    const FILES: usize = 6_000;
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[]).await;
    fs::create_dir_all(folder.join("d/e")).unwrap();
    for i in 0..FILES {
        fs::write(folder.join(format!("d/f{i}")), format!("bytes of {i}")).unwrap();
    }
    fs::write(folder.join("d/e/x"), "x").unwrap();
    // The least there is: 1,000 files.
    let mount = Mount::start(&cluster, "mnt", &["-o", "nodes_memory=1MB,attr_ttl_ms=600000,entry_ttl_ms=600000"]);
    let at = |i: usize| mount.path(&format!("m/d/f{i}"));
    let read = |i: usize| fs::read_to_string(at(i)).unwrap();
    let known = || mount.metric("forebay_fuse_nodes");
    let mut open = File::options().read(true).append(true).open(at(7)).unwrap();
    let path_only = rustix::fs::open(at(8), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let number = fs::metadata(at(11)).unwrap().ino();
    let over = cluster.dir.path().join("over");
    fs::write(&over, "another file").unwrap();
    nix::mount::mount(Some(&over), &at(9), None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>).unwrap();
    // A program whose folder is below, and which looks there again at the end.
    let mut program = std::process::Command::new("sh")
        .args(["-c", "read line; readlink /proc/self/cwd; cat x; ls"])
        .current_dir(mount.path("m/d/e"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let dir = mount.path("m/d");
    let listed =
        tokio::task::spawn_blocking(move || sh(&dir, "for i in 1 2 3; do find . -type f -exec stat -c %s {} + | wc -l; done")).await.unwrap();
    assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), vec![(FILES + 1).to_string(); 3]);
    eventually("no more is known than may be", 20, async || known() <= 1_010).await;
    assert!(known() >= 900, "and no more forgotten than has to be: {}", known());
    assert!(mount.metric("forebay_fuse_nodes_trimmed_total") >= (FILES - 1_000) as u64);
    assert_eq!(mount.metric("forebay_fuse_nodes_limit"), 1_000);
    // What was in somebody's hands all the time.
    let name_of = |fd: &dyn std::os::fd::AsRawFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert_eq!((name_of(&open), name_of(&path_only)), (at(7), at(8)));
    assert_eq!(read(9), "another file");
    nix::mount::umount(&at(9)).unwrap();
    drop(program.stdin.take());
    let said = String::from_utf8(program.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(said, format!("{}\nxx\n", mount.path("m/d/e").display()), "its folder is where it was");
    open.write_all(b"!").unwrap();
    drop(open);
    // And what was forgotten.
    assert_eq!(read(7), "bytes of 7!");
    assert_eq!(fs::metadata(at(11)).unwrap().ino(), number);
    for i in (0..FILES).step_by(97).filter(|i| *i != 7) {
        assert_eq!(read(i), format!("bytes of {i}"));
    }
}
