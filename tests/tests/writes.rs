//! Writers that sleep, repeat themselves or lie: nothing is published that should not be, and nobody waits for ever.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::{ErrorKind, checksum};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{AddBlocksRequest, CommitWrite, CompleteRequest, CreateRequest, OpenWrite, WriteData, WriteTarget, WrittenBlock};
use forebay_tests::cluster::p;
use forebay_tests::raw::{Raw, caller, files, path};
use forebay_tests::{Cluster, eventually};
use std::time::Duration;

fn kind_of(answer: &Answer) -> ErrorKind {
    match answer {
        Answer::Error(e) => ErrorKind::from_code(e.kind),
        other => panic!("answered with {other:?}"),
    }
}

fn create(client_id: u64, sequence: u64, name: &str) -> CreateRequest {
    CreateRequest { caller: caller("root", client_id, sequence), path: path(name), overwrite: true, ..Default::default() }
}

async fn target(cluster: &Cluster, client_id: u64, name: &str) -> WriteTarget {
    files(&cluster.address).await.create(create(client_id, 1, name)).await.expect("create").into_inner().target.expect("target")
}

/// Opens the write and sends its bytes; the commit is the caller's.
async fn send(door: &str, target: &WriteTarget, bytes: &[u8]) -> (Raw, u64) {
    let mut raw = Raw::connect(door, target.worker.as_ref().expect("worker")).await;
    let write_id = raw.send(Op::OpenWrite(OpenWrite { token: target.token.clone() }), &[]).await;
    assert!(matches!(raw.next().await.expect("answer").1, Answer::Ack(_)));
    let data = WriteData { write_id, block_id: target.block_ids[0], crc: checksum::crc32c(bytes), ..WriteData::default() };
    raw.send(Op::WriteData(data), bytes).await;
    (raw, write_id)
}

async fn read(fs: &FileSystem, name: &str) -> Vec<u8> {
    let file = fs.open(&p(name)).await.expect("open");
    let mut out = vec![0; file.length() as usize];
    file.read_at(0, &mut out).await.expect("read");
    out
}

async fn put(fs: &FileSystem, name: &str, bytes: &[u8]) {
    let mut file = fs.create(&p(name), &CreateOptions { overwrite: true, ..Default::default() }).await.expect("create");
    file.write(bytes).await.expect("write");
    file.close().await.expect("close");
}

/// (S-5) A writer that slept past its lease publishes nothing over what somebody else wrote since, whatever its client checks.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_writer_publishes_nothing() {
    let cluster = Cluster::start(1, &[("master.lease_ttl_ms", "1000")]).await;
    let fs = cluster.client().await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    for door in ["tcp", "unix"] {
        let target = target(&cluster, 0x1000 + door.len() as u64, "/m/f").await;
        let (mut raw, write_id) = send(door, &target, b"stale bytes").await;
        eventually("the lease ran out", 20, async || !fs.exists(&p("/m/f")).await.unwrap()).await;
        put(&fs, "/m/f", b"new").await;
        let refused = raw.ask(Op::CommitWrite(CommitWrite { write_id, length: 11 })).await;
        assert_eq!(kind_of(&refused), ErrorKind::Expired, "{refused:?}");
        assert_eq!((read(&fs, "/m/f").await, std::fs::read(folder.join("f")).unwrap()), (b"new".to_vec(), b"new".to_vec()));
        eventually("no temporary file stays", 10, async || std::fs::read_dir(&folder).unwrap().count() == 1).await;
        fs.delete(&p("/m/f"), false).await.unwrap();
    }
}

/// A client that is slow, and alive, keeps its lease however short it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_writer_keeps_its_lease() {
    let cluster = Cluster::start(1, &[("master.lease_ttl_ms", "1000")]).await;
    let fs = cluster.client().await;
    let mut file = fs.create(&p("/f"), &CreateOptions::default()).await.unwrap();
    for _ in 0..5 {
        file.write(b"x").await.unwrap();
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    file.close().await.unwrap();
    assert_eq!(read(&fs, "/f").await, b"xxxxx");
}

/// (S-14) A creation or allocation that is sent again after its file was completed gives no token to write it again, and the
/// token there was changes nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_completed_file_is_not_written_again() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    let mut master = files(&cluster.address).await;
    let target = target(&cluster, 0x2000, "/f").await;
    let (mut raw, write_id) = send("tcp", &target, b"first").await;
    let Answer::Committed(committed) = raw.ask(Op::CommitWrite(CommitWrite { write_id, length: 5 })).await else { panic!("not committed") };
    let blocks = vec![WrittenBlock { id: committed.block_ids[0], length: 5 }];
    let (file_id, lease_id) = (target.file_id, target.lease_id);
    let more = AddBlocksRequest { caller: caller("root", 0x2000, 2), file_id, lease_id, count: 1 };
    master.add_blocks(more.clone()).await.expect("add blocks");
    let complete = CompleteRequest {
        caller: caller("root", 0x2000, 3),
        file_id,
        lease_id,
        length: 5,
        blocks,
        fingerprint: committed.fingerprint,
        ..Default::default()
    };
    master.complete(complete.clone()).await.expect("complete");
    master.complete(complete).await.expect("the same answer again");
    let kind = |status: tonic::Status| forebay_proto::convert::from_status(&status).kind();
    assert_eq!(kind(master.create(create(0x2000, 1, "/f")).await.unwrap_err()), ErrorKind::Expired);
    assert_eq!(kind(master.add_blocks(more).await.unwrap_err()), ErrorKind::Expired);
    let (mut raw, write_id) = send("unix", &target, b"other").await;
    // The block is there already, so the write goes on without the cache, and then finds its lease gone.
    assert_eq!(kind_of(&raw.ask(Op::CommitWrite(CommitWrite { write_id, length: 5 })).await), ErrorKind::Expired);
    assert_eq!(read(&fs, "/f").await, b"first");
    assert_eq!(std::fs::read(cluster.dir.path().join("master/root/f")).unwrap(), b"first");
}

/// Somebody else's numbers get neither the answer nor a token.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_not_given_to_others() {
    let cluster = Cluster::start(1, &[]).await;
    target(&cluster, 0x3000, "/f").await;
    let mut master = files(&cluster.address).await;
    let theirs = CreateRequest { caller: caller("nobody", 0x3000, 1), ..create(0, 0, "/f") };
    let refused = forebay_proto::convert::from_status(&master.create(theirs).await.unwrap_err());
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument, "{refused}");
}

/// A piece that fails is told to the commit that was sent behind it: its writer does not wait for a time-out.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_piece_answers_the_commit_behind_it() {
    let cluster = Cluster::start(1, &[]).await;
    let target = target(&cluster, 0x4000, "/f").await;
    let mut raw = Raw::connect("tcp", target.worker.as_ref().unwrap()).await;
    let write_id = raw.send(Op::OpenWrite(OpenWrite { token: target.token.clone() }), &[]).await;
    let wrong = WriteData { write_id, block_id: target.block_ids[0], crc: 1, ..WriteData::default() };
    raw.send(Op::WriteData(wrong), b"bytes").await;
    let commit = raw.send(Op::CommitWrite(CommitWrite { write_id, length: 5 }), &[]).await;
    let mut kinds = std::collections::BTreeMap::new();
    while !kinds.contains_key(&commit) {
        let (id, answer) = raw.next().await.expect("an answer to the commit");
        if !matches!(answer, Answer::Ack(_)) {
            kinds.insert(id, kind_of(&answer));
        }
    }
    assert_eq!(kinds[&write_id], ErrorKind::Corrupt);
    assert!([ErrorKind::Corrupt, ErrorKind::Expired].contains(&kinds[&commit]), "{kinds:?}");
}
