//! The Hadoop front: the stock shell beside a real HDFS, short circuit by the Java client's own statistics, leases of clients that die, clients
//! that lie, and bytes that are no protocol at all.

use bytes::Bytes;
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_hdfs::hadoop::common::{IpcConnectionContextProto, UserInformationProto};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::ipc::{self, CallId, Preamble};
use forebay_hdfs::transfer::{self, Op};
use forebay_tests::cluster::p;
use forebay_tests::hadoop::{Done, Raw, RawBlock, ask, command, commands, data_address, plain, read_request, write_request};
use forebay_tests::hdfs::Hdfs;
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, eventually, pattern, rng};
use rand::Rng;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The rows that are compared. `{in}`: files of this machine; `{out}`: a folder of it.
const ROWS: &str = include_str!("hadoop_rows.txt");

/// Commands whose outcome differs, and why. Everything else is the same to the letter.
const DIFFERENT: &[(&str, &str)] =
    &[("-createSnapshot", "there are no snapshots"), ("-truncate", "done when it is answered: nobody waits for it"), ("-df", "the cache's capacity")];

/// (S-28) Every row of the shell, and calls of the API: the same exit code, output and complaint as a real HDFS.
#[tokio::test(flavor = "multi_thread")]
async fn the_shell_says_what_it_says_of_a_real_hdfs() {
    let cluster = Cluster::start(1, &[]).await;
    // Root's group there is its superuser group.
    let group = nix::unistd::Group::from_gid(nix::unistd::getgid()).unwrap().unwrap().name;
    let hdfs = Hdfs::start_with(cluster.dir.path(), &[&format!("dfs.permissions.superusergroup={group}")]).await;
    let local = cluster.dir.path().join("in");
    std::fs::create_dir_all(local.join("tree/sub")).unwrap();
    std::fs::write(local.join("small"), "hello\n").unwrap();
    std::fs::write(local.join("big"), pattern(1, 0, 2_000_000)).unwrap();
    std::fs::write(local.join("tree/f1"), "one\n").unwrap();
    std::fs::write(local.join("tree/sub/f2"), "two\n").unwrap();
    let mut said: Vec<Vec<Done>> = Vec::new();
    let mut rows = Vec::new();
    for (uri, name) in [(hdfs.uri.clone(), "out-hdfs"), (cluster.hdfs(), "out-forebay")] {
        let out = cluster.dir.path().join(name);
        std::fs::create_dir_all(&out).unwrap();
        let lines = ROWS.replace("{in}", &local.to_string_lossy()).replace("{out}", &out.to_string_lossy());
        rows = lines.lines().map(|line| line.split('|').map(str::to_owned).collect::<Vec<_>>()).collect();
        let done = commands(&uri, &["-Ddfs.replication=1"], cluster.dir.path(), &rows);
        said.push(done.into_iter().map(|d| Done { out: plain(&d.out, &uri, &out), err: plain(&d.err, &uri, &out), ..d }).collect());
        assert!(std::fs::read(out.join("got")).unwrap() == pattern(1, 0, 2_000_000), "{uri}");
        assert_eq!(std::fs::read_to_string(out.join("gottree/sub/f2")).unwrap(), "two\n");
    }
    let mut wrong = Vec::new();
    for ((row, theirs), ours) in rows.iter().zip(&said[0]).zip(&said[1]) {
        if theirs != ours && !DIFFERENT.iter().any(|(command, _)| *command == row[0]) {
            wrong.push(format!("{row:?}\n  HDFS    {theirs:?}\n  Forebay {ours:?}"));
        }
    }
    eprintln!("{} commands, {} differ", rows.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(said[0].iter().filter(|d| d.exit == 0).count() > rows.len() / 2, "most of them are to succeed");
    // What the shell wrote is in the under store, and read by our own client; what ours wrote by the shell.
    let fs = cluster.client().await;
    let done = command(&cluster.hdfs(), &[], cluster.dir.path(), &["-put", &local.join("big").to_string_lossy(), "/theirs"]);
    assert_eq!(done.exit, 0, "{}", done.err);
    assert!(fs.get_status(&p("/theirs")).await.unwrap().persisted, "written through: in the store when the shell is told so");
    assert!(read_all(&fs, "/theirs").await == pattern(1, 0, 2_000_000));
    write(&fs, "/ours", b"from the other side", CreateOptions::default()).await;
    assert_eq!(command(&cluster.hdfs(), &[], cluster.dir.path(), &["-cat", "/ours"]).out, "from the other side");
}

/// (S-28) By the Java client's own statistics every byte of a block that was whole comes by descriptor, verified by its meta file; of one that is not, over
/// TCP; without the socket all of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_java_client_reads_by_descriptor() {
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "64KiB")]).await;
    let length = 3_500_000;
    std::fs::write(folder.join("f"), pattern(5, 0, length)).unwrap();
    cluster.ok(&["fs", "load", "/m/f"]);
    let socket = format!("-Ddfs.domain.socket.path={}/hadoop__PORT", cluster.socket_dir().display());
    let by_descriptor = ["-Ddfs.client.read.shortcircuit=true", socket.as_str()];
    let read = |options: &[&str], path: &str| {
        let done = command(&cluster.hdfs(), options, cluster.dir.path(), &["api", "statistics", path]);
        assert_eq!(done.exit, 0, "{}", done.err);
        done.out
    };
    assert_eq!(read(&by_descriptor, "/m/f"), format!("{length} read={length} short={length}"));
    assert_eq!(read(&[], "/m/f"), format!("{length} read={length} short=0"));
    cluster.counters_arrived().await;
    assert_eq!(cluster.metric("Cluster.HadoopGrants").await, 4, "one for each block");
    assert_eq!(cluster.metric("Cluster.HadoopBytesRead").await, length as u64, "the second time over TCP");
    // Cold: read through in the stream.
    std::fs::write(folder.join("cold"), pattern(6, 0, length)).unwrap();
    assert_eq!(read(&by_descriptor, "/m/cold"), format!("{length} read={length} short=0"));
    assert_eq!(command(&cluster.hdfs(), &[], cluster.dir.path(), &["-tail", "/m/cold"]).exit, 0);
    assert!(cluster.ok(&["fsadmin", "doctor"]).contains("hdfs"));
}

/// (S-28) A block that leaves under a Java client that keeps its descriptors: by its slot of shared memory the client learns of it, and asks again; what it
/// read last counts as over TCP by its own statistics.
#[tokio::test(flavor = "multi_thread")]
async fn the_java_client_learns_of_evictions() {
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "1MiB"), ("page_size", "64KiB")]).await;
    let length = 2_500_000;
    for name in ["gone", "kept"] {
        std::fs::write(folder.join(name), pattern(5, 0, length)).unwrap();
        cluster.ok(&["fs", "load", &format!("/m/{name}")]);
    }
    let socket = format!("-Ddfs.domain.socket.path={}/hadoop__PORT", cluster.socket_dir().display());
    let go_on = cluster.dir.path().join("go-on");
    let statistics = |name: &str| vec!["api".to_owned(), "statistics".to_owned(), format!("/m/{name}")];
    let rows = vec![
        statistics("gone"),
        statistics("kept"),
        vec!["api".to_owned(), "wait".to_owned(), go_on.to_string_lossy().into_owned()],
        statistics("gone"),
        statistics("kept"),
    ];
    let (uri, dir) = (cluster.hdfs(), cluster.dir.path().to_owned());
    let client = std::thread::spawn(move || commands(&uri, &["-Ddfs.client.read.shortcircuit=true", &socket], &dir, &rows));
    eventually("it waits", 60, async || Path::new(&format!("{}.waits", go_on.display())).exists()).await;
    let worker = cluster.worker_metric("forebay_worker_hadoop_slots").await;
    assert_eq!(worker, 6, "one for each block that it holds");
    cluster.ok(&["fs", "free", "/m/gone"]);
    eventually("revoked", 30, async || cluster.worker_metric("forebay_worker_hadoop_slots_revoked_total").await == 3).await;
    std::fs::write(&go_on, "").unwrap();
    let done = tokio::task::spawn_blocking(|| client.join().unwrap()).await.unwrap();
    let said: Vec<&str> = done.iter().map(|d| d.out.as_str()).collect();
    let (by_descriptor, over_tcp) = (format!("{length} read={length} short={length}"), format!("{length} read={length} short=0"));
    assert_eq!(said, [&by_descriptor, &by_descriptor, "", &over_tcp, &by_descriptor]);
    // It has ended: so have its segment and its slots, and what it held is free.
    eventually("no slots", 30, async || cluster.worker_metric("forebay_worker_hadoop_segments").await == 0).await;
    assert_eq!(cluster.worker_metric("forebay_worker_hadoop_slots").await, 0);
    eventually("no zombies", 30, async || cluster.worker_metric("forebay_worker_tier_zombie_bytes").await == 0).await;
}

/// (S-29) A client that dies with a file open: what was acknowledged is in the file once its lease is over, or at once for whoever asks for that.
#[tokio::test(flavor = "multi_thread")]
async fn leases_of_dead_clients_are_recovered() {
    let mut cluster = Cluster::start(1, &[("master.lease_ttl_ms", "8000")]).await;
    let fs = cluster.client().await;
    // One that does not wait until the file is complete.
    let quick = FileSystem::connect(&forebay_common::config::ClientConfig { call_timeout_ms: 300, ..cluster.client_config() }).await.unwrap();
    let bytes = pattern(3, 0, (1 << 20) + 700_416);
    for (path, asked) in [("/late", false), ("/asked", true)] {
        let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
        raw.create(path).await.unwrap();
        let mut block = RawBlock::open(raw.add_block(path, None).await.unwrap()).await.unwrap();
        for piece in bytes[..1 << 20].chunks(64 << 10) {
            block.write(piece).await.unwrap();
        }
        let first = block.end().await.unwrap();
        let mut block = RawBlock::open(raw.add_block(path, Some(first)).await.unwrap()).await.unwrap();
        for piece in bytes[1 << 20..].chunks(64 << 10) {
            block.write(piece).await.unwrap();
        }
        assert_eq!(block.acknowledged, 700_416);
        assert_eq!(quick.open(&p(path)).await.map(drop).unwrap_err().kind(), ErrorKind::Busy, "still being written");
        let so_far = command(&cluster.hdfs(), &[], cluster.dir.path(), &["api", "pread", path, "1048000", "1000"]);
        assert_eq!(so_far.exit, 0, "what was acknowledged is read by Hadoop's clients: {}", so_far.err);
        drop(block);
        drop(raw);
        if asked {
            let done = command(&cluster.hdfs(), &[], cluster.dir.path(), &["api", "closed", path]);
            assert_eq!(done.out, "false true", "{}", done.err);
        } else {
            // The master that granted it is gone.
            cluster.restart_master();
        }
        eventually("completed", 30, async || fs.get_status(&p(path)).await.is_ok_and(|s| s.completed)).await;
        assert!(read_all(&fs, path).await == bytes, "{path}");
    }
}

/// (S-29) The master is killed while files are completed: each is there whole, or its client is told so when it asks again.
#[tokio::test(flavor = "multi_thread")]
async fn complete_under_kill_of_the_master() {
    let rounds = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let mut random = rng("complete_under_kill_of_the_master");
    let mut cluster = Cluster::start(1, &[]).await;
    let (mut answered, mut asked_again) = (0, 0);
    for round in 0..rounds {
        let address = cluster.hadoop_address();
        let writer = tokio::spawn(async move {
            let mut raw = Raw::connect(&address, "root").await;
            let (mut done, mut open) = (Vec::new(), None);
            for i in 0.. {
                let path = format!("/k/{round}-{i}");
                let step = async {
                    raw.create(&path).await?;
                    let located = raw.add_block(&path, None).await?;
                    let mut block = RawBlock::open(located).await.map_err(|_| forebay_common::err!(Unavailable, "worker"))?;
                    let broken = |e: std::io::Error| forebay_common::Error::io("block", &e);
                    block.write(&pattern(i, 0, 5_000)).await.map_err(broken)?;
                    let last = block.end().await.map_err(broken)?;
                    open = Some((path.clone(), last.clone(), i));
                    raw.complete(&path, Some(last)).await
                };
                match step.await {
                    Ok(true) => {
                        open = None;
                        done.push((path, i));
                    }
                    Ok(false) => panic!("a store that answers"),
                    Err(e) => {
                        eprintln!("{path}: {e}");
                        break;
                    }
                }
            }
            (done, open, raw.name)
        });
        tokio::time::sleep(Duration::from_millis(random.random_range(50..400))).await;
        cluster.restart_master();
        let (done, open, name) = tokio::time::timeout(Duration::from_secs(60), writer).await.expect("ends").unwrap();
        answered += done.len();
        let fs = cluster.client().await;
        for (path, i) in &done {
            assert!(read_all(&fs, path).await == pattern(*i, 0, 5_000), "{path} was acknowledged");
        }
        if let Some((path, last, i)) = open {
            // The same client asks again, as Java's does.
            let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
            raw.name = name;
            if raw.complete(&path, Some(last)).await.is_ok_and(|done| done) {
                asked_again += 1;
                assert!(read_all(&fs, &path).await == pattern(i, 0, 5_000), "{path}");
            }
        }
    }
    eprintln!("{rounds} kills: {answered} files acknowledged, {asked_again} when asked again");
    assert!(answered > 0);
}

/// (S-6, S-30) What a client that lies gets: nothing that its token does not say, no lease of another, no user that it may not act for.
#[tokio::test(flavor = "multi_thread")]
async fn lying_clients_get_nothing() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    write(&fs, "/secret", &pattern(1, 0, 200_000), CreateOptions { mode: 0o600, ..CreateOptions::default() }).await;
    write(&fs, "/public", &pattern(2, 0, 200_000), CreateOptions::default()).await;
    let address = cluster.hadoop_address();
    let (mut root, mut other) = (Raw::connect(&address, "root").await, Raw::connect(&address, "nobody").await);
    let ask_for = |path: &str| wire::GetBlockLocationsRequestProto { src: path.to_owned(), offset: 0, length: 200_000 };
    let located = async |raw: &mut Raw, path: &str| {
        let answer: forebay_common::Result<wire::GetBlockLocationsResponseProto> = raw.rpc.call("getBlockLocations", &ask_for(path)).await;
        answer.map(|a| a.locations.expect("locations").blocks.remove(0))
    };
    assert_eq!(located(&mut other, "/secret").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    // A listing says where it is, and gives no token.
    let listing = wire::GetListingRequestProto { src: "/".into(), start_after: Bytes::new(), need_location: true };
    let listed: wire::GetListingResponseProto = other.rpc.call("getListing", &listing).await.unwrap();
    let entry = listed.dir_list.unwrap().partial_listing.into_iter().find(|e| e.path == "secret").unwrap();
    let without = entry.locations.unwrap().blocks.remove(0);
    assert_eq!(ask(&without, Op::ReadBlock, &read_request(&without, 0, 10)).await.1.status(), wire::Status::ErrorAccessToken);
    // The token of one block does not open another, nor lets it be written, nor does it survive a flipped bit.
    let (secret, public) = (located(&mut root, "/secret").await.unwrap(), located(&mut other, "/public").await.unwrap());
    let mixed = wire::LocatedBlockProto { block_token: public.block_token.clone(), ..secret.clone() };
    assert_eq!(ask(&mixed, Op::ReadBlock, &read_request(&mixed, 0, 10)).await.1.status(), wire::Status::ErrorAccessToken);
    assert_eq!(ask(&public, Op::WriteBlock, &write_request(&public)).await.1.status(), wire::Status::ErrorAccessToken);
    let mut bad = public.clone();
    let mut token = bad.block_token.identifier.to_vec();
    let middle = token.len() / 2;
    token[middle] ^= 1;
    bad.block_token.identifier = token.into();
    assert_eq!(ask(&bad, Op::ReadBlock, &read_request(&bad, 0, 10)).await.1.status(), wire::Status::ErrorAccessToken);
    assert_eq!(ask(&public, Op::ReadBlock, &read_request(&public, 0, 10)).await.1.status(), wire::Status::Success);
    for (offset, length) in [(0, 200_001), (u64::MAX, 1), (200_000, u64::MAX)] {
        assert_eq!(ask(&public, Op::ReadBlock, &read_request(&public, offset, length)).await.1.status(), wire::Status::Error);
    }
    // Another client's file is neither completed, nor given up, nor written.
    root.create("/open").await.unwrap();
    let block = root.add_block("/open", None).await.unwrap();
    other.name.clone_from(&root.name);
    assert!(other.complete("/open", Some(block.b.clone())).await.is_err(), "the name of the lease is not enough");
    assert!(other.add_block("/open", None).await.is_err());
    let abandon = wire::AbandonBlockRequestProto { b: block.b.clone(), src: "/open".into(), holder: root.name.clone(), file_id: None };
    assert!(other.rpc.call::<wire::AbandonBlockResponseProto>("abandonBlock", &abandon).await.is_err());
    // Bytes with a wrong checksum, too many of them, and a block that is there already.
    let mut open = RawBlock::open(block.clone()).await.unwrap();
    assert_eq!(open.write(&vec![7; 1 << 20]).await.unwrap(), wire::Status::Success);
    assert_eq!(open.write(&[7; 512]).await.unwrap(), wire::Status::Error, "more than the block holds");
    drop(open);
    // To act for others takes the master's word.
    let context = |effective: &str, real: &str| IpcConnectionContextProto {
        user_info: Some(UserInformationProto { effective_user: Some(effective.to_owned()), real_user: Some(real.to_owned()) }),
        protocol: Some(forebay_hdfs::client::CLIENT_PROTOCOL.to_owned()),
    };
    let mut stream = TcpStream::connect(&address).await.unwrap();
    stream.write_all(&Preamble::encode()).await.unwrap();
    stream.write_all(&ipc::context(&Bytes::from_static(&[1; 16]), &context("root", "nobody"))).await.unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.unwrap();
    assert!(String::from_utf8_lossy(&said).contains("not allowed to impersonate"), "{}", String::from_utf8_lossy(&said));
}

/// (S-30) Recorded calls and requests with bytes changed, left out and put in: nobody dies, and others are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_protocol() {
    let mutations: usize = std::env::var("FOREBAY_TEST_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000);
    let mut random = rng("bytes_that_are_no_protocol");
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    write(&fs, "/f", &pattern(1, 0, 300_000), CreateOptions::default()).await;
    let address = cluster.hadoop_address();
    let mut good = Raw::connect(&address, "root").await;
    let request = wire::GetBlockLocationsRequestProto { src: "/f".into(), offset: 0, length: 300_000 };
    let located: wire::GetBlockLocationsResponseProto = good.rpc.call("getBlockLocations", &request).await.unwrap();
    let block = located.locations.unwrap().blocks.remove(0);
    let id = CallId { client_id: Bytes::from_static(&[9; 16]), call_id: 3, retry_count: 0 };
    let context = IpcConnectionContextProto {
        user_info: Some(UserInformationProto { effective_user: Some("nobody".to_owned()), real_user: None }),
        protocol: Some(forebay_hdfs::client::CLIENT_PROTOCOL.to_owned()),
    };
    let call = |method: &str, request: &dyn Fn() -> Bytes| {
        let _ = method;
        [&Preamble::encode()[..], &ipc::context(&id.client_id, &context), &request()].concat()
    };
    let calls = [
        call("getFileInfo", &|| {
            ipc::request(&id, "getFileInfo", forebay_hdfs::client::CLIENT_PROTOCOL, &wire::GetFileInfoRequestProto { src: "/f".into() })
        }),
        call("getBlockLocations", &|| ipc::request(&id, "getBlockLocations", forebay_hdfs::client::CLIENT_PROTOCOL, &request)),
        call("mkdirs", &|| {
            let masked = wire::FsPermissionProto { perm: 0o755 };
            let mkdirs = wire::MkdirsRequestProto { src: "/none/x".into(), masked, create_parent: false, unmasked: None };
            ipc::request(&id, "mkdirs", forebay_hdfs::client::CLIENT_PROTOCOL, &mkdirs)
        }),
    ];
    let requests = [
        transfer::request(Op::ReadBlock, &read_request(&block, 0, 300_000)).to_vec(),
        transfer::request(Op::WriteBlock, &write_request(&block)).to_vec(),
        transfer::request(Op::RequestShortCircuitShm, &wire::ShortCircuitShmRequestProto { client_name: "c".into(), trace_info: None }).to_vec(),
    ];
    let data = data_address(&block);
    for n in 0..mutations {
        let (to, recorded) = if n % 2 == 0 { (&address, &calls[n / 2 % calls.len()]) } else { (&data, &requests[n / 2 % requests.len()]) };
        let mut raw = recorded.clone();
        for _ in 0..random.random_range(1..5) {
            let at = random.random_range(0..raw.len());
            match random.random_range(0..4) {
                0 => raw[at] = random.random(),
                1 => raw[at] ^= 1 << random.random_range(0..8),
                2 => drop(raw.drain(at..(at + random.random_range(1..9)).min(raw.len()))),
                _ => drop(raw.splice(at..at, (0..random.random_range(1..9)).map(|_| random.random::<u8>()).collect::<Vec<_>>())),
            }
            if raw.is_empty() {
                break;
            }
        }
        let mut stream = TcpStream::connect(to).await.expect("the server is there");
        let _ = stream.write_all(&raw).await;
        let _ = stream.shutdown().await;
        let mut sink = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.take(1 << 20).read_to_end(&mut sink)).await;
        if n % 100 == 0 {
            assert_eq!(good.status("/f").await.expect("there").length, 300_000);
        }
    }
    assert!(read_all(&fs, "/f").await == pattern(1, 0, 300_000));
    assert_eq!(command(&cluster.hdfs(), &[], cluster.dir.path(), &["-count", "/f"]).exit, 0);
    let resident = |hello: u32| {
        let status = std::fs::read_to_string(format!("/proc/{hello}/status")).unwrap();
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")).and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap()
    };
    let used = resident(cluster.master_id());
    assert!(used < 1 << 20, "the master's memory is {used} KiB after all that");
}

/// (S-28) Hadoop's own contract tests of a FileSystem, with its options for HDFS unmodified: the same outcome as on a real HDFS, case by case.
#[tokio::test(flavor = "multi_thread")]
async fn hadoops_own_contract() {
    let cluster = Cluster::start(1, &[("master.hadoop_min_block_size", "512")]).await;
    let out = cluster.dir.path().join("contract");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/contract/run.sh");
    let ran = std::process::Command::new("bash").arg(script).arg(cluster.hdfs()).arg(&out).output().expect("run.sh");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let cases = |text: &str| {
        let of_line = |line: &str| {
            let mut fields = line.split('\t');
            let name = format!("{}.{}", fields.next()?, fields.next()?);
            Some((name, (fields.next()?.to_owned(), fields.nth(1).unwrap_or_default().to_owned())))
        };
        text.lines().filter_map(of_line).collect::<std::collections::BTreeMap<_, _>>()
    };
    let theirs = cases(include_str!("../peers/contract/hdfs-3.4.1.txt"));
    let ours = cases(&std::fs::read_to_string(&out).unwrap());
    let (mut same, mut wrong) = (0, Vec::new());
    for (name, (wanted, _)) in &theirs {
        match ours.get(name) {
            Some((outcome, _)) if outcome == wanted => same += 1,
            found => wrong.push(format!("{name}: {wanted} on HDFS, here {found:?}")),
        }
    }
    eprintln!("contract: {} cases, {same} as on HDFS, {} differ", theirs.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
