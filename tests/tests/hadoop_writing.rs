//! Files that Hadoop's clients write: workers that die in the middle of a block, disks that fail at its end, pipelines that go on without a worker, and
//! files that are gone on with, cut and joined.

use forebay_client::FileSystem;
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_tests::cluster::p;
use forebay_tests::hadoop::{Raw, RawBlock, Stage, command};
use forebay_tests::suite::read_all;
use forebay_tests::{Cluster, eventually, pattern, rng};
use rand::Rng;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const MIB: usize = 1 << 20;

/// A worker whose only tier is a folder on the disk, or in memory.
async fn cluster(on_disk: bool, settings: &[(&'static str, &str)]) -> Cluster {
    let mut cluster = Cluster::prepare(settings);
    cluster.start_master();
    let tiers =
        format!("[{{ medium = \"SSD\", dirs = [{{ path = {:?}, quota = \"256MiB\" }}] }}]", cluster.dir.path().join("SSD").display().to_string());
    let own: &[(&'static str, &str)] = if on_disk { &[("worker.tiers", &tiers)] } else { &[] };
    cluster.add_worker(own);
    let fs = cluster.client().await;
    eventually("worker registered", 30, async || fs.report().await.is_ok_and(|r| r.workers.len() == 1)).await;
    cluster
}

async fn completed(fs: &FileSystem, path: &str) {
    eventually("completed", 60, async || fs.get_status(&p(path)).await.is_ok_and(|s| s.completed)).await;
}

/// (S-29) A worker killed with -9 in the middle of a block, started again: what was acknowledged is in the file, whether its client goes on, its lease runs
/// out, or somebody takes it away; in memory and on a disk; nothing is left over.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_brings_back_what_it_acknowledged() {
    for on_disk in [false, true] {
        let mut cluster = cluster(on_disk, &[("master.lease_ttl_ms", "4000")]).await;
        let fs = cluster.client().await;
        // A few bytes, within the first page, at its end, several pages, the end of the block.
        for (i, second) in [1, 700, 65_536, 524_288, 1_000_001, MIB].into_iter().enumerate() {
            let bytes = pattern(i as u64, 0, MIB + second);
            let path = format!("/f{i}");
            let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
            raw.create(&path).await.unwrap();
            let mut block = RawBlock::open(raw.add_block(&path, None).await.unwrap()).await.unwrap();
            for piece in bytes[..MIB].chunks(64 << 10) {
                block.write(piece).await.unwrap();
            }
            let first = block.end().await.unwrap();
            let located = raw.add_block(&path, Some(first)).await.unwrap();
            let mut block = RawBlock::open(located.clone()).await.unwrap();
            for piece in bytes[MIB..].chunks(60_000) {
                block.write(piece).await.unwrap();
            }
            raw.fsync(&path).await.unwrap();
            let so_far = block.acknowledged;
            assert_eq!(so_far, second as u64);
            cluster.kill_worker(0);
            drop(block);
            cluster.start_worker(0);
            match i % 3 {
                // Its client goes on.
                0 if second < MIB => {
                    let located = with_locations_of(&mut raw, &path, located).await;
                    let mut block = raw.go_on(&located, Stage::PipelineSetupStreamingRecovery, so_far).await.unwrap();
                    block.write(b"more").await.unwrap();
                    let last = block.end().await.unwrap();
                    assert!(raw.complete(&path, Some(last)).await.unwrap());
                    assert!(read_all(&fs, &path).await == [&bytes[..], b"more"].concat(), "{path}");
                    continue;
                }
                1 => {
                    eventually("taken away", 30, async || {
                        Raw::connect(&cluster.hadoop_address(), "root").await.recover_lease(&path).await.is_ok_and(|done| done)
                    })
                    .await
                }
                _ => {}
            }
            completed(&fs, &path).await;
            assert!(read_all(&fs, &path).await == bytes, "{path}, {second} bytes of the last block");
        }
        cluster.kill_worker(0);
        cluster.start_worker(0);
        for i in 0..6 {
            assert!(fs.get_status(&p(&format!("/f{i}"))).await.unwrap().length > MIB as u64);
        }
        assert!(left_open(cluster.dir.path()).is_empty(), "{:?}", left_open(cluster.dir.path()));
    }
}

/// Where the worker is now: its ports are others after a start.
async fn with_locations_of(raw: &mut Raw, path: &str, located: wire::LocatedBlockProto) -> wire::LocatedBlockProto {
    for _ in 0..300 {
        let request = wire::GetBlockLocationsRequestProto { src: path.to_owned(), offset: 0, length: u64::MAX };
        let answer: wire::GetBlockLocationsResponseProto = raw.rpc.call("getBlockLocations", &request).await.expect("locations");
        let last = answer
            .locations
            .and_then(|l| l.last_block)
            .filter(|last| !last.locs.is_empty() && last.locs[0].id.xfer_port != located.locs[0].id.xfer_port);
        if let Some(last) = last {
            return wire::LocatedBlockProto { locs: last.locs, ..located };
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the worker has not come back");
}

/// Logs of blocks that were not ended.
fn left_open(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) && !entry.file_name().to_string_lossy().ends_with(".ro") {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|e| e == "open") {
                found.push(entry.path());
            }
        }
    }
    found
}

/// (S-29) A disk that fails at the end of a block: the client is told, and the block is ended once the disk works again.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_at_the_end_of_a_block_loses_nothing() {
    let cluster = cluster(true, &[("master.lease_ttl_ms", "600000")]).await;
    let fs = cluster.client().await;
    let bytes = pattern(9, 0, 300_000);
    let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
    raw.create("/f").await.unwrap();
    let mut block = RawBlock::open(raw.add_block("/f", None).await.unwrap()).await.unwrap();
    for piece in bytes.chunks(60_000) {
        block.write(piece).await.unwrap();
    }
    // Nothing new can be made in the folder of its files: its header neither.
    let shard = left_open(cluster.dir.path())[0].parent().unwrap().to_owned();
    let immutable = |on: &str| Command::new("chattr").arg(on).arg(&shard).status().is_ok_and(|s| s.success());
    if !immutable("+i") {
        eprintln!("SKIPPED: chattr +i does not work on this file system");
        return;
    }
    let ended = block.end_with().await;
    assert!(ended.is_ok_and(|status| status != wire::Status::Success), "the client is told");
    assert!(!raw.recover_lease("/f").await.unwrap(), "not as long as the disk fails");
    assert!(immutable("-i"));
    eventually("taken away", 30, async || Raw::connect(&cluster.hadoop_address(), "root").await.recover_lease("/f").await.is_ok_and(|done| done))
        .await;
    completed(&fs, "/f").await;
    assert!(read_all(&fs, "/f").await == bytes);
}

/// (S-29) Bytes that were flushed and are on no worker any more: the file is not completed without them as if nothing had been.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_not_passed_over() {
    let mut cluster = cluster(false, &[("master.lease_ttl_ms", "3000")]).await;
    let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
    let mut blocks = Vec::new();
    for (path, flushed) in [("/flushed", true), ("/not", false)] {
        raw.create(path).await.unwrap();
        let mut block = RawBlock::open(raw.add_block(path, None).await.unwrap()).await.unwrap();
        block.write(&pattern(1, 0, 10_000)).await.unwrap();
        if flushed {
            raw.fsync(path).await.unwrap();
        }
        blocks.push(block);
    }
    cluster.kill_worker(0);
    drop(blocks);
    for log in left_open(cluster.dir.path()) {
        std::fs::remove_file(log).unwrap();
    }
    cluster.start_worker(0);
    let fs = cluster.client().await;
    // Nobody was told that anything is kept of this one.
    completed(&fs, "/not").await;
    assert_eq!(fs.get_status(&p("/not")).await.unwrap().length, 0);
    let mut other = Raw::connect(&cluster.hadoop_address(), "root").await;
    assert!(!other.recover_lease("/flushed").await.unwrap());
    assert!(!fs.get_status(&p("/flushed")).await.unwrap().completed);
}

/// What a file should hold, beside what it does.
struct Model {
    raw: Raw,
    fs: FileSystem,
    tag: u64,
}

impl Model {
    /// Writes bytes of a client at the end of a file that it opened; `block` is the last one, where it is gone on with.
    async fn write(&mut self, path: &str, block: Option<RawBlock>, mut bytes: &[u8]) {
        let size = usize::try_from(self.raw.block_size).unwrap();
        let mut previous = None;
        if let Some(mut block) = block {
            let room = size - usize::try_from(block.acknowledged).unwrap();
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            for piece in now.chunks(50_000) {
                block.write(piece).await.unwrap();
            }
            (previous, bytes) = (Some(block.end().await.unwrap()), rest);
        }
        for part in bytes.chunks(size) {
            let mut block = RawBlock::open(self.raw.add_block(path, previous).await.unwrap()).await.unwrap();
            for piece in part.chunks(50_000) {
                block.write(piece).await.unwrap();
            }
            previous = Some(block.end().await.unwrap());
        }
        let mut done = self.raw.complete(path, previous.clone()).await.unwrap();
        while !done {
            done = self.raw.complete(path, previous.clone()).await.unwrap();
        }
    }

    fn fresh(&mut self, length: usize) -> Vec<u8> {
        self.tag += 1;
        pattern(self.tag, 0, length)
    }

    async fn create(&mut self, path: &str, length: usize) -> Vec<u8> {
        let bytes = self.fresh(length);
        self.raw.create(path).await.unwrap();
        self.write(path, None, &bytes).await;
        bytes
    }

    async fn append(&mut self, path: &str, bytes: &mut Vec<u8>, length: usize, new_block: bool) {
        let more = self.fresh(length);
        let (located, there) = self.raw.append(path, new_block).await.unwrap();
        assert_eq!(there, bytes.len() as u64);
        let block = match located {
            Some(located) => {
                let length = located.b.num_bytes();
                Some(self.raw.go_on(&located, Stage::PipelineSetupAppend, length).await.unwrap())
            }
            None => None,
        };
        self.write(path, block, &more).await;
        bytes.extend(more);
    }
}

/// (S-28) Files that are gone on with, cut and joined at random, beside plain bytes: in the cache alone, in a store at once, in a store later; read by our own
/// client, whole and in part, while workers are killed in between.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_gone_on_with_cut_and_joined() {
    let steps = std::env::var("FOREBAY_TEST_STEPS").ok().and_then(|n| n.parse().ok()).unwrap_or(120);
    let mut random = rng("files_are_gone_on_with_cut_and_joined");
    let mut cluster = Cluster::start(2, &[("master.hadoop_min_block_size", "65536")]).await;
    let through = cluster.mount_folder("/through", &[("page_size", "64KiB"), ("write_type", "through")]).await;
    let later = cluster.mount_folder("/later", &[("page_size", "64KiB"), ("write_type", "async")]).await;
    cluster.ok(&["fs", "mkdir", "/only"]);
    cluster.ok(&["fsadmin", "pathConf", "set", "/only", "write_type=cache_only"]);
    let fs = cluster.client().await;
    let raw = Raw { block_size: 256 << 10, ..Raw::connect(&cluster.hadoop_address(), "root").await };
    let mut model = Model { raw, fs, tag: 0 };
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut counts = std::collections::BTreeMap::new();
    for step in 0..steps {
        let folder = ["/only", "/through", "/later"][random.random_range(0..3)];
        let length = [0, 1, 511, 70_000, 256 << 10, 300_000, 700_000][random.random_range(0..7)];
        let action = if files.len() < 6 { 0 } else { random.random_range(0..10) };
        let name = ["create", "append", "append", "append in a new block", "truncate", "concat", "kill", "free", "rename", "append"][action];
        *counts.entry(name).or_insert(0) += 1;
        let at = random.random_range(0..files.len().max(1));
        // What led to a failure.
        eprintln!("{step}: {name} {} {length}", files.get(at).map_or("", |(path, _)| path));
        match action {
            0 => {
                let path = format!("{folder}/{step}");
                let bytes = model.create(&path, length).await;
                files.push((path, bytes));
            }
            1..=3 | 9 => {
                let (path, mut bytes) = files[at].clone();
                model.append(&path, &mut bytes, length, action == 3).await;
                files[at].1 = bytes;
            }
            4 => {
                let (path, bytes) = &mut files[at];
                let length = random.random_range(0..=bytes.len());
                assert!(model.raw.truncate(path, length as u64).await.unwrap());
                bytes.truncate(length);
            }
            5 => {
                let (target, _) = files[at].clone();
                let parent = |path: &str| path.rsplit_once('/').map(|(parent, _)| parent.to_owned());
                let sources: Vec<usize> =
                    (0..files.len()).filter(|i| *i != at && parent(&files[*i].0) == parent(&target) && !files[*i].1.is_empty()).take(2).collect();
                if sources.is_empty() {
                    continue;
                }
                let names: Vec<String> = sources.iter().map(|i| files[*i].0.clone()).collect();
                model.raw.concat(&target, &names).await.unwrap();
                let joined: Vec<u8> = sources.iter().flat_map(|i| files[*i].1.clone()).collect();
                files[at].1.extend(joined);
                for i in sources.into_iter().rev() {
                    let (path, _) = files.remove(i);
                    assert!(model.raw.status(&path).await.is_none(), "{path} is gone");
                }
            }
            6 => {
                let worker = random.random_range(0..2);
                cluster.kill_worker(worker);
                cluster.start_worker(worker);
                eventually("both workers", 60, async || model.fs.report().await.is_ok_and(|r| r.workers.iter().filter(|w| !w.lost).count() == 2))
                    .await;
                // And have told what they have.
                let all_read = async || {
                    for (path, bytes) in &files {
                        let mut out = vec![0; bytes.len()];
                        let Ok(file) = model.fs.open(&p(path)).await else { return false };
                        if file.read_at(0, &mut out).await.is_err() {
                            return false;
                        }
                    }
                    true
                };
                eventually("everything can be read", 60, all_read).await;
            }
            7 => {
                // What is in its store alone is read, and gone on with, from there.
                let _ = cluster.run(&["fs", "free", &files[at].0]);
            }
            _ => {
                let to = format!("{}-{step}", files[at].0);
                model.fs.rename(&p(&files[at].0), &p(&to), false).await.unwrap();
                files[at].0 = to;
            }
        }
        for (path, bytes) in &files {
            if random.random_range(0..6) > 0 {
                continue;
            }
            assert_eq!(model.fs.get_status(&p(path)).await.unwrap().length, bytes.len() as u64, "{path} after {name}, step {step}");
            assert!(read_all(&model.fs, path).await == *bytes, "{path} after {name}, step {step}");
            if !bytes.is_empty() {
                let from = random.random_range(0..bytes.len());
                let mut out = vec![0; random.random_range(1..100_000)];
                let read = model.fs.open(&p(path)).await.unwrap().read_at(from as u64, &mut out).await.unwrap();
                assert!(out[..read] == bytes[from..from + read], "{path} from {from}");
            }
        }
    }
    eprintln!("{counts:?}");
    for (path, bytes) in &files {
        assert!(read_all(&model.fs, path).await == *bytes, "{path}");
        let folder = if path.starts_with("/through") { &through } else { &later };
        if !path.starts_with("/only") {
            let (_, name) = path.rsplit_once('/').unwrap();
            eventually("in its store", 30, async || std::fs::read(folder.join(name)).is_ok_and(|there| there == *bytes)).await;
        }
    }
    // Nothing comes back, and nothing else is there.
    for (folder, mount) in [(&through, "/through/"), (&later, "/later/")] {
        let names =
            || std::fs::read_dir(folder).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).filter(|n| !n.starts_with('.')).count();
        let wanted = files.iter().filter(|(path, _)| path.starts_with(mount)).count();
        eventually("the store as the namespace", 30, async || names() == wanted).await;
    }
}

/// A Java client that writes with an `hflush` after each piece, and notes what was acknowledged.
struct Writer {
    child: std::process::Child,
    said: std::path::PathBuf,
    errors: std::path::PathBuf,
}

impl Writer {
    fn start(cluster: &Cluster, path: &str, replicas: usize, pieces: usize) -> Writer {
        let dir = cluster.dir.path();
        let name = path.trim_matches('/').replace('/', "-");
        let (said, file, errors) = (dir.join(format!("said-{name}")), dir.join(format!("commands-{name}")), dir.join(format!("errors-{name}")));
        std::fs::write(&file, format!("api\tacknowledged\t{path}\t{}\t1048576\t30011\t{pieces}\t{replicas}\n", said.display())).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/hdfs/hdfs.sh");
        let output = std::fs::File::create(&errors).unwrap();
        let child = Command::new("bash")
            .arg(script)
            .args(["commands", &format!("-Dfs.defaultFS={}", cluster.hdfs())])
            .args(["-Ddfs.client.block.write.replace-datanode-on-failure.best-effort=true", "-Ddfs.client.socket-timeout=5000"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Writer { child, said, errors }
    }

    fn acknowledged(&self) -> (usize, bool) {
        let text = std::fs::read_to_string(&self.said).unwrap_or_default();
        // A line that is not all there yet does not count.
        let lines: Vec<&str> = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::trim).collect();
        (lines.iter().rev().find_map(|line| line.parse().ok()).unwrap_or(0), lines.last() == Some(&"closed"))
    }
}

fn numbered(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// (S-29) A worker killed with -9 in a pipeline of three, under Java's own client: it goes on with the others, and with another one, and every byte that
/// `hflush` acknowledged is there, also when the client is killed as well.
#[tokio::test(flavor = "multi_thread")]
async fn workers_killed_in_a_pipeline_of_three() {
    let rounds: usize = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let mut random = rng("workers_killed_in_a_pipeline_of_three");
    let mut cluster = Cluster::start(4, &[("master.lease_ttl_ms", "20000"), ("master.worker_timeout_ms", "3000")]).await;
    let fs = cluster.client().await;
    cluster.ok(&["fs", "mkdir", "/k"]);
    cluster.ok(&["fsadmin", "pathConf", "set", "/k", "replicas=3"]);
    let (mut closed, mut recovered) = (0, 0);
    for round in 0..rounds {
        let path = format!("/k/{round}");
        let mut writer = Writer::start(&cluster, &path, 3, 400);
        eventually("it writes", 60, async || writer.acknowledged().0 > 0).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
        let killed = random.random_range(0..4);
        cluster.kill_worker(killed);
        let client_too = round % 3 == 2;
        if client_too {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..1_500))).await;
            kill_tree(&writer.child);
        }
        let before = writer.acknowledged().0;
        cluster.start_worker(killed);
        eventually("the writer ends", 120, async || writer.child.try_wait().is_ok_and(|ended| ended.is_some())).await;
        let (acknowledged, is_closed) = writer.acknowledged();
        assert!(acknowledged >= before);
        if client_too {
            eventually("taken away", 60, async || {
                Raw::connect(&cluster.hadoop_address(), "root").await.recover_lease(&path).await.is_ok_and(|done| done)
            })
            .await;
            recovered += 1;
        } else {
            assert!(is_closed, "round {round}: {acknowledged} bytes: {}", std::fs::read_to_string(&writer.errors).unwrap_or_default());
            closed += 1;
        }
        completed(&fs, &path).await;
        let there = read_all(&fs, &path).await;
        assert!(there.len() >= acknowledged, "round {round}: {} bytes are there, and {acknowledged} were acknowledged", there.len());
        assert!(there == numbered(there.len()), "round {round}: wrong bytes");
        assert!(!is_closed || there.len() == 400 * 30_011);
        eventually("all workers", 60, async || fs.report().await.is_ok_and(|r| r.workers.iter().filter(|w| !w.lost).count() == 4)).await;
    }
    let done = command(&cluster.hdfs(), &[], cluster.dir.path(), &["-checksum", "/k/0"]);
    assert_eq!(done.exit, 0, "{}", done.err);
    eprintln!("{rounds} kills in a pipeline: {closed} files closed by their client, {recovered} recovered after it was killed too");
    eventually("nothing is left open", 60, async || left_open(cluster.dir.path()).is_empty()).await;
}

fn kill_tree(child: &std::process::Child) {
    let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    // The script has become the Java process.
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// (S-28) Racks from a table and from a script: shown by the stock commands, and followed when a block's workers are chosen and sorted.
#[tokio::test(flavor = "multi_thread")]
async fn racks_are_known() {
    let mut cluster = Cluster::prepare(&[]);
    let (table, script) = (cluster.dir.path().join("racks"), cluster.dir.path().join("racks.sh"));
    std::fs::write(&table, "worker-a /row1/rack1\nworker-b /row1/rack1\nworker-c /row1/rack2\n").unwrap();
    std::fs::write(&script, "#!/bin/sh\nfor m in \"$@\"; do case $m in worker-d) echo /row2/rack3;; *) echo /elsewhere;; esac; done\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    cluster.master_extra = format!("topology_file = {:?}\ntopology_script = {:?}\n", table.display().to_string(), script.display().to_string());
    cluster.start_master();
    for name in ["\"worker-a\"", "\"worker-b\"", "\"worker-c\"", "\"worker-d\""] {
        // Each is a machine of its own, as far as names go.
        cluster.add_worker(&[("worker.hadoop_host", name)]);
    }
    let report = || command(&cluster.hdfs(), &[], cluster.dir.path(), &["dfsadmin", "-printTopology"]).out;
    eventually("all racks", 30, async || {
        let said = report();
        ["/row1/rack1", "/row1/rack2", "/row2/rack3"].iter().all(|rack| said.contains(&format!("Rack: {rack}")))
    })
    .await;
    let said = report();
    assert!(!said.contains("default-rack") && said.matches("In Service").count() == 4, "{said}");
    cluster.ok(&["fs", "mkdir", "/r"]);
    cluster.ok(&["fsadmin", "pathConf", "set", "/r", "replicas=3"]);
    let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
    for i in 0..10 {
        raw.create_replicated(&format!("/r/{i}"), 3).await.unwrap();
        let located = raw.add_block(&format!("/r/{i}"), None).await.unwrap();
        let racks: Vec<&str> = located.locs.iter().map(|l| l.location.as_deref().unwrap_or_default()).collect();
        assert_eq!(racks.len(), 3);
        assert_ne!(racks[0], racks[1], "the second copy is on another rack");
    }
}

/// (S-29) Clients that die after an append went on to the next block: before its first byte, after it was given up, and with bytes in it; and blocks that were
/// ended early before one that was given up.
#[tokio::test(flavor = "multi_thread")]
async fn appends_are_recovered_as_they_stand() {
    let cluster = Cluster::start(1, &[("master.lease_ttl_ms", "600000")]).await;
    let fs = cluster.client().await;
    let size = 1usize << 20;
    let bytes = pattern(7, 0, size + 500);
    for (i, name) in ["begun", "given up", "written"].into_iter().enumerate() {
        let path = format!("/r{i}");
        let mut model = Model { raw: Raw::connect(&cluster.hadoop_address(), "root").await, fs: fs.clone(), tag: 0 };
        model.raw.create(&path).await.unwrap();
        model.write(&path, None, &bytes[..100_000]).await;
        let mut raw = model.raw;
        let (located, there) = raw.append(&path, false).await.unwrap();
        let located = located.expect("the short block is gone on with");
        assert_eq!((there, located.b.num_bytes()), (100_000, 100_000));
        let mut block = raw.go_on(&located, Stage::PipelineSetupAppend, 100_000).await.unwrap();
        for piece in bytes[100_000..size].chunks(60_000) {
            block.write(piece).await.unwrap();
        }
        let last = block.end().await.unwrap();
        let next = raw.add_block(&path, Some(last.clone())).await.unwrap();
        let mut expected = size;
        match name {
            "given up" => {
                let request = wire::AbandonBlockRequestProto { b: next.b.clone(), src: path.clone(), holder: raw.name.clone(), file_id: None };
                raw.rpc.call::<wire::AbandonBlockResponseProto>("abandonBlock", &request).await.unwrap();
                // What was there before cannot be given up.
                let request = wire::AbandonBlockRequestProto { b: last, src: path.clone(), holder: raw.name.clone(), file_id: None };
                assert!(raw.rpc.call::<wire::AbandonBlockResponseProto>("abandonBlock", &request).await.is_err());
            }
            "written" => {
                let mut block = RawBlock::open(next).await.unwrap();
                block.write(&bytes[size..]).await.unwrap();
                raw.fsync(&path).await.unwrap();
                expected = size + 500;
            }
            _ => {}
        }
        drop(raw);
        eventually("taken away", 30, async || {
            Raw::connect(&cluster.hadoop_address(), "root").await.recover_lease(&path).await.is_ok_and(|done| done)
        })
        .await;
        completed(&fs, &path).await;
        assert!(read_all(&fs, &path).await == bytes[..expected], "{name}");
    }
    // A block that is ended early, one after it that is given up, and another in its place.
    let mut raw = Raw::connect(&cluster.hadoop_address(), "root").await;
    raw.create("/early").await.unwrap();
    let mut block = RawBlock::open(raw.add_block("/early", None).await.unwrap()).await.unwrap();
    block.write(&bytes[..60_000]).await.unwrap();
    let first = block.end().await.unwrap();
    let gone = raw.add_block("/early", Some(first.clone())).await.unwrap();
    let request = wire::AbandonBlockRequestProto { b: gone.b, src: "/early".into(), holder: raw.name.clone(), file_id: None };
    raw.rpc.call::<wire::AbandonBlockResponseProto>("abandonBlock", &request).await.unwrap();
    let mut block = RawBlock::open(raw.add_block("/early", Some(first)).await.unwrap()).await.unwrap();
    block.write(&bytes[60_000..90_000]).await.unwrap();
    let last = block.end().await.unwrap();
    assert!(raw.complete("/early", Some(last)).await.unwrap());
    assert!(read_all(&fs, "/early").await == bytes[..90_000]);
}

/// (S-29) Java clients killed with -9 in the middle of what they write: once their lease is taken away, or over, everything that `hflush` acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn clients_killed_with_a_lease_open() {
    let rounds: usize = std::env::var("FOREBAY_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let mut random = rng("clients_killed_with_a_lease_open");
    let cluster = Cluster::start(2, &[("master.lease_ttl_ms", "5000")]).await;
    let fs = cluster.client().await;
    let mut bytes = 0;
    for round in 0..rounds {
        let path = format!("/c/{round}");
        let mut writer = Writer::start(&cluster, &path, 1, 10_000);
        eventually("it writes", 60, async || writer.acknowledged().0 > 0).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
        kill_tree(&writer.child);
        writer.child.wait().unwrap();
        let (acknowledged, _) = writer.acknowledged();
        if round % 2 == 0 {
            eventually("taken away", 60, async || {
                Raw::connect(&cluster.hadoop_address(), "root").await.recover_lease(&path).await.is_ok_and(|done| done)
            })
            .await;
        }
        completed(&fs, &path).await;
        let there = read_all(&fs, &path).await;
        assert!(there.len() >= acknowledged, "round {round}: {} bytes are there, and {acknowledged} were acknowledged", there.len());
        assert!(there == numbered(there.len()), "round {round}: wrong bytes");
        bytes += acknowledged;
        fs.delete(&p(&path), false).await.unwrap();
    }
    eprintln!("{rounds} clients killed: {bytes} bytes acknowledged, all there");
    eventually("nothing is left open", 60, async || left_open(cluster.dir.path()).is_empty()).await;
}
