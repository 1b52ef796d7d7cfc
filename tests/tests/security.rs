//! A lying client gets nothing: no token, no bytes; no descriptor that could change anything; no name that leads out.

use forebay_client::CreateOptions;
use forebay_common::token::{self, Claims, TokenKey};
use forebay_common::{ErrorKind, clock};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{Fill, OpenBlock, OpenRequest, ReadBlock};
use forebay_tests::Cluster;
use forebay_tests::cluster::p;
use forebay_tests::raw::{Raw, caller, files};
use std::os::fd::{AsFd, AsRawFd};

struct Target {
    address: forebay_proto::WorkerAddress,
    good: bytes::Bytes,
    block: u64,
}

async fn open_raw(cluster: &Cluster, path: &str) -> Target {
    let (mut files, caller) = (files(&cluster.address).await, caller("root", 0, 0));
    let answer = files.open(OpenRequest { caller, path: path.as_bytes().to_vec().into(), ..Default::default() }).await.expect("open").into_inner();
    let worker = answer.workers[0].clone();
    Target { address: worker.address.expect("address"), good: worker.token, block: answer.blocks[0].id }
}

/// (S-6) Without the right token neither the socket nor the data port gives a byte or a descriptor.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_guard_both_doors() {
    let cluster = Cluster::start(1, &[("master.token_ttl_ms", "60000")]).await;
    let fs = cluster.client().await;
    for name in ["/one", "/two"] {
        let mut file = fs.create(&p(name), &CreateOptions::default()).await.unwrap();
        file.write(name.as_bytes()).await.unwrap();
        file.close().await.unwrap();
    }
    let (one, two) = (open_raw(&cluster, "/one").await, open_raw(&cluster, "/two").await);
    let forged = TokenKey::generate()
        .sign(&Claims {
            file_id: 1,
            worker_id: one.address.worker_id,
            rights: token::READ,
            expires_at_ms: clock::now_ms() + 60_000,
            ..Default::default()
        })
        .unwrap();
    let mut flipped = one.good.to_vec();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let expired = {
        let raw = std::fs::read(cluster.dir.path().join("master/token-keys.json")).unwrap();
        let keys: serde_json::Value = serde_json::from_slice(&raw).unwrap();
        let secret = keys[0]["secret"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
        let key = TokenKey { id: keys[0]["id"].as_u64().unwrap(), secret };
        let claims = Claims {
            file_id: 1,
            blocks: vec![token::BlockRun { first: one.block, count: 1 }],
            block_size_bytes: 1 << 20,
            length_bytes: 4,
            page_size_bytes: 1 << 20,
            rights: token::READ,
            worker_id: one.address.worker_id,
            expires_at_ms: clock::now_ms() - token::CLOCK_SKEW_TOLERANCE_MS - 1_000,
            ..Default::default()
        };
        key.sign(&claims).unwrap()
    };
    for door in ["tcp", "unix"] {
        let connect = async || Raw::connect(door, &one.address).await;
        for (what, token) in [
            ("no", vec![]),
            ("garbage", vec![7; 40]),
            ("a forged", forged.clone()),
            ("a changed", flipped.clone()),
            ("another file's", two.good.to_vec()),
            ("an expired", expired.clone()),
        ] {
            let token = bytes::Bytes::from(token);
            let ops = [
                Op::ReadBlock(ReadBlock { token: token.clone(), block_id: one.block, offset: 0, length: 4, readahead: 0 }),
                Op::Fill(Fill { token: token.clone(), block_id: one.block, offset: 0, length: 4, wait: true }),
                Op::OpenBlock(OpenBlock { token: token.clone(), block_id: one.block }),
            ];
            for op in ops {
                if door == "tcp" && matches!(op, Op::OpenBlock(_)) {
                    continue;
                }
                match connect().await.ask(op).await {
                    Answer::Error(e) => assert_eq!(ErrorKind::from_code(e.kind), ErrorKind::Unauthenticated, "{what} token at {door}: {}", e.message),
                    other => panic!("{what} token at {door} was answered with {other:?}"),
                }
            }
        }
        let read = Op::ReadBlock(ReadBlock { token: one.good.clone(), block_id: one.block, offset: 0, length: 4, readahead: 0 });
        assert!(matches!(connect().await.ask(read).await, Answer::ReadData(_)), "the right token at {door}");
        let mut garbage = connect().await;
        garbage.bytes(&[0xff; 64]).await;
        assert!(garbage.next().await.is_none(), "garbage ends the connection at {door}");
    }
}

/// (S-7) A granted descriptor cannot be written, re-opened for writing, truncated or chmod-ed, by root neither.
#[tokio::test(flavor = "multi_thread")]
async fn a_grant_is_read_only_for_everyone() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    let mut file = fs.create(&p("/f"), &CreateOptions::default()).await.unwrap();
    file.write(&[5; 200_000]).await.unwrap();
    file.close().await.unwrap();
    let reader = fs.open(&p("/f")).await.unwrap();
    let granted = reader.descriptor(0).await.expect("a grant");
    if !fs.local_workers().await.iter().all(|w| w.read_only_mount) {
        eprintln!("SKIPPED: no read-only mount is possible here");
        return;
    }
    assert!(nix::unistd::write(granted.as_fd(), b"x").is_err());
    let again = format!("/proc/self/fd/{}", granted.as_raw_fd());
    for options in
        [std::fs::File::options().write(true), std::fs::File::options().read(true).append(true), std::fs::File::options().write(true).truncate(true)]
    {
        let error = options.open(&again).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS), "{error}");
    }
    assert_eq!(nix::unistd::ftruncate(granted.as_fd(), 0), Err(nix::errno::Errno::EINVAL));
    assert_eq!(nix::sys::stat::fchmod(granted.as_fd(), nix::sys::stat::Mode::S_IRWXU), Err(nix::errno::Errno::EROFS));
    let writable_mapping = unsafe { memmap(&granted) };
    assert!(!writable_mapping, "no shared writable mapping");
    let mut bytes = vec![0; 200_000];
    assert_eq!(reader.read_at(0, &mut bytes).await.unwrap(), 200_000);
    assert!(bytes.iter().all(|b| *b == 5));
}

/// Whether a shared writable mapping of a descriptor is possible.
unsafe fn memmap(fd: &std::os::fd::OwnedFd) -> bool {
    use nix::libc;
    // SAFETY: a null hint and a length of one page; a mapping that succeeds is unmapped at once and never touched.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd.as_raw_fd(), 0);
        at != libc::MAP_FAILED && libc::munmap(at, 4096) == 0
    }
}

/// (S-8) No name leads out of a mount: `..`, NUL, names that are too long, symbolic links.
#[tokio::test(flavor = "multi_thread")]
async fn names_stay_inside() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    let outside = cluster.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "s").unwrap();
    std::os::unix::fs::symlink(&outside, folder.join("out")).unwrap();
    std::os::unix::fs::symlink("../outside/secret", folder.join("up")).unwrap();
    // A link that stays inside would pass by the modes of the folders it skips: it is not followed either.
    std::fs::create_dir(folder.join("in")).unwrap();
    std::fs::write(folder.join("in/f"), "f").unwrap();
    std::os::unix::fs::symlink("in", folder.join("within")).unwrap();
    for name in ["/m/out/secret", "/m/up", "/m/out", "/m/within", "/m/within/f"] {
        assert!(fs.open(&p(name)).await.is_err(), "{name}");
        assert!(fs.touch(&p(&format!("{name}/new")), &CreateOptions { recursive: true, ..Default::default() }).await.is_err());
    }
    let shown: Vec<_> = fs.list(&p("/m"), false).await.unwrap().into_iter().map(|e| e.path).collect();
    assert_eq!(shown, ["/m/in"]);
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    // Past the client's own checks, straight to the master.
    let mut files = files(&cluster.address).await;
    let long = format!("/m/{}", "n".repeat(300)).into_bytes();
    for bad in [b"/m/../outside/secret".to_vec(), b"/m/a\0b".to_vec(), long, b"m".to_vec(), b"".to_vec(), b"/m/./x".to_vec()] {
        let status = files.open(OpenRequest { caller: caller("root", 0, 0), path: bad.clone().into(), ..Default::default() }).await.unwrap_err();
        let kind = forebay_proto::convert::from_status(&status).kind();
        assert!(matches!(kind, ErrorKind::InvalidArgument | ErrorKind::NameTooLong), "{:?}: {kind:?}", String::from_utf8_lossy(&bad));
    }
    assert!(files.open(OpenRequest { caller: None, path: b"/".to_vec().into(), ..Default::default() }).await.is_err());
}
