//! Golden tests of the records on disk: a change of a field number or type shows here, before it shows in somebody's data.
//! A format may grow; what is written here must be read for ever.

use crate::{AclEntry, FileLock, Job, JobFailure, Setting, XAttr, journal, store};
use prost::Message;

fn hex(message: &impl Message) -> String {
    message.encode_to_vec().iter().map(|b| format!("{b:02x}")).collect()
}

/// Encodes as `golden`, and `golden` decodes to the same.
fn check<M: Message + Default + PartialEq>(message: &M, golden: &str) {
    assert_eq!(hex(message), golden);
    let raw: Vec<u8> = (0..golden.len()).step_by(2).map(|i| u8::from_str_radix(&golden[i..i + 2], 16).unwrap()).collect();
    assert!(M::decode(raw.as_slice()).unwrap() == *message);
}

fn b(text: &str) -> bytes::Bytes {
    text.as_bytes().to_vec().into()
}

#[test]
fn commands_of_the_journal() {
    use journal::command::Op;
    let command = |op| journal::Command {
        principal: "p".into(),
        groups: vec!["g".into()],
        superuser: true,
        now_ms: 1,
        client_id: 2,
        sequence: 3,
        op: Some(op),
    };
    let options: std::collections::HashMap<_, _> = [("k".to_owned(), "v".to_owned())].into();
    let ops = [
        Op::Create(journal::Create {
            path: b("/a"),
            overwrite: true,
            recursive: true,
            mode: 1,
            block_size_bytes: 2,
            page_size_bytes: 3,
            to_ufs: true,
            cached: true,
            lease_ttl_ms: 4,
            worker_id: 5,
            block_count: 6,
            ..Default::default()
        }),
        Op::AddBlocks(journal::AddBlocks { file_id: 1, lease_id: 2, count: 3, ..Default::default() }),
        Op::Complete(journal::Complete {
            file_id: 1,
            lease_id: 2,
            length: 3,
            block_ids: vec![4, 5],
            block_lengths: vec![6, 7],
            fingerprint: "f".into(),
            expired_only: false,
            ..Default::default()
        }),
        Op::Abandon(journal::Abandon { file_id: 1, lease_id: 2, expired_only: true }),
        Op::RenewLease(journal::RenewLease { lease_ids: vec![1] }),
        Op::Mkdir(journal::Mkdir { path: b("/a"), recursive: true, exist_ok: true, mode: 1, ..Default::default() }),
        Op::Delete(journal::Delete { path: b("/a"), recursive: true }),
        Op::Rename(journal::Rename { source: b("/a"), target: b("/b"), overwrite: true }),
        Op::SetAttributes(journal::SetAttributes {
            path: b("/a"),
            mode: Some(1),
            owner: Some("o".into()),
            group: Some("g".into()),
            modified_ms: Some(2),
            pinned: Some(true),
            ..journal::SetAttributes::default()
        }),
        Op::SyncChildren(journal::SyncChildren {
            parent_id: 1,
            seen: vec![journal::Seen {
                name: b("n"),
                folder: true,
                length: 2,
                modified_ms: 3,
                fingerprint: "f".into(),
                owner: "o".into(),
                group: "g".into(),
                mode: 4,
            }],
            gone: vec![b("x")],
            all_seen: true,
            base_index: 5,
            block_size_bytes: 6,
            page_size_bytes: 7,
        }),
        Op::AddMount(journal::AddMount { path: b("/a"), uri: "u".into(), read_only: true, options: options.clone() }),
        Op::RemoveMount(journal::RemoveMount { path: b("/a") }),
        Op::FinishPending(journal::FinishPending {
            pending_id: 1,
            error: "e".into(),
            previous_fingerprint: "p".into(),
            fingerprint: "f".into(),
            error_kind: 2,
        }),
        Op::UpdateMount(journal::UpdateMount { path: b("/a"), read_only: true, options }),
    ];
    let batch = journal::Batch { commands: ops.into_iter().map(command).collect() };
    check(&batch, COMMANDS);
    // Came later.
    check(&journal::SetAttributes { path: b("/a"), ttl_ms: Some(5), ttl_frees: true, ..Default::default() }, "0a022f6138054001");
    let only = |op| journal::Command { op: Some(op), ..Default::default() };
    check(&only(Op::ExpireTtl(journal::ExpireTtl { inode_id: 1, expires_at_ms: 2, give_up: true })), "c20106080110021801");
    check(&only(Op::SetWorkerState(journal::SetWorkerState { worker_id: 1, leaving: true, process: 0 })), "ca010408011001");
    check(&journal::Create { asynchronous: true, replication_min: 2, replication_max: 3, ..Default::default() }, "600168027003");
    check(&journal::Mkdir { later: true, ..Default::default() }, "2801");
    let begin = journal::BeginPublish { file_id: 1, content_version: 2, mount_id: 3, key: b("k"), worker_id: 4, lease_ttl_ms: 5 };
    check(&only(Op::BeginPublish(begin)), "d2010d08011002180322016b28043005");
    check(&only(Op::FinishPersist(journal::FinishPersist { file_id: 1, lease_id: 2, fingerprint: "f".into() })), "da0107080110021a0166");
    check(&only(Op::QueuePersist(journal::QueuePersist { file_ids: vec![1, 2] })), "e201040a020102");
    check(&only(Op::SetReplication(journal::SetReplication { file_ids: vec![1], min: 2, max: 3 })), "ea01070a010110021803");
    let set = vec![Setting { name: "k".into(), value: "v".into() }];
    check(&only(Op::SetPathConfig(journal::SetPathConfig { path: b("/a"), set, unset: vec!["x".into()] })), "f2010f0a022f6112060a016b1201761a0178");
    check(&only(Op::StartJob(journal::StartJob { job: Some(job()) })), START_JOB);
    check(&only(Op::UpdateJob(journal::UpdateJob { job: Some(Job { id: 1, ..Default::default() }) })), "8202040a020801");
}

fn job() -> Job {
    Job {
        id: 1,
        kind: "load".into(),
        principal: "p".into(),
        groups: vec!["g".into()],
        superuser: true,
        created_ms: 2,
        finished_ms: 3,
        state: "done".into(),
        paths: vec![b("/a")],
        target: b("/b"),
        replicas: 4,
        replicas_max: 5,
        tier: "MEM".into(),
        bandwidth: 6,
        overwrite: true,
        r#move: true,
        files_found: 7,
        files_done: 8,
        files_failed: 9,
        bytes_found: 10,
        bytes_done: 11,
        all_found: true,
        failures: vec![JobFailure { path: b("/c"), error: "e".into() }],
        message: "m".into(),
        files_skipped: 12,
        files_partly: 13,
    }
}

#[test]
fn records_of_the_store() {
    let inode = store::Inode {
        id: 1,
        folder: true,
        length: 2,
        block_size_bytes: 3,
        page_size_bytes: 4,
        block_runs: vec![5, 6],
        completed: true,
        persisted: true,
        pinned: true,
        owner: "o".into(),
        group: "g".into(),
        mode: 7,
        content_version: 8,
        created_ms: 9,
        modified_ms: 10,
        fingerprint: "f".into(),
        mount_id: 11,
        changed_index: 12,
        removal_index: 13,
        children_known: true,
        lease_id: 14,
        to_ufs: true,
        cached: true,
        shadows: true,
        ..store::Inode::default()
    };
    check(&inode, INODE);
    check(&store::Inode { id: 1, ttl_ms: 2, ttl_expires_at_ms: 3, ttl_frees: true, ..Default::default() }, "0801c80102d00103d80101");
    let config = vec![Setting { name: "k".into(), value: "v".into() }];
    let later = store::Inode { id: 1, asynchronous: true, persist_id: 2, replication_min: 3, replication_max: 4, config, ..Default::default() };
    check(&later, "0801e00101e80102f00103f801048202060a016b120176");
    check(&store::Persist { id: 1, inode_id: 2, queued_ms: 3, length: 4 }, "0801100218032004");
    check(&store::Lease { publishing: true, ..Default::default() }, "3801");
    check(&journal::Reply { job_id: 1, settled: vec![2, 3], ..Default::default() }, "680172020203");
    let counters = store::Counters { next_persist_id: 1, unpersisted_files: 2, unpersisted_bytes: 3, next_job_id: 4, ..Default::default() };
    check(&counters, "5001580260036804");
    check(&store::Link { parent_id: 1, name: b("n") }, "080112016e");
    let lease =
        store::Lease { id: 1, file_id: 2, expires_at_ms: 3, ttl_ms: 4, principal: "p".into(), worker_id: 5, publishing: false, ..Default::default() };
    check(&lease, "08011002180320042a01703005");
    check(&store::Lease { holder: "c".into(), ..Default::default() }, "420163");
    let open = store::Lease {
        other_workers: vec![1, 2],
        generation_stamp: 3,
        drawn_stamp: 4,
        flushed_block: 5,
        flushed_length: 6,
        rewritten_block: 7,
        rewritten_length: 8,
        rewritten_as: 9,
        ..Default::default()
    };
    check(&open, "4a020102500358046005680670077808800109");
    check(&store::Inode { short_blocks: vec![1, 2], ..Default::default() }, "9a02020102");
    check(&journal::AddBlocks { other_workers: vec![1, 2], previous_length: 3, previous_block: 4, ..Default::default() }, "2a02010230033804");
    let pipeline = journal::SetPipeline { file_id: 1, lease_id: 2, block_id: 3, generation_stamp: 4, worker_ids: vec![5, 6] };
    check(&pipeline, "08011002180320042a020506");
    check(&journal::NoteFlushed { file_id: 1, lease_id: 2, block_id: 3, length: 4 }, "0801100218032004");
    let reopen = journal::Reopen {
        path: b("/a"),
        changed_index: 1,
        holder: "h".into(),
        lease_ttl_ms: 2,
        length: 3,
        rewrite: true,
        worker_id: 4,
        to_ufs: true,
    };
    check(&reopen, "0a022f6110011a016820022803300138044001");
    let concat = journal::Concat { path: b("/a"), changed_index: 1, sources: vec![b("/b")], changed_indexes: vec![2], to_ufs: true };
    check(&concat, "0a022f6110011a022f622201022801");
    check(&journal::Reply { generation_stamp: 1, ..Default::default() }, "7801");
    let acl = vec![AclEntry { scope: 1, kind: 2, name: "n".into(), perm: 3 }];
    let x_attrs = vec![XAttr { namespace: 1, name: "n".into(), value: b("v") }];
    check(&store::Inode { acl: acl.clone(), x_attrs, ..Default::default() }, "a20209080110021a016e2003aa0208080112016e1a0176");
    check(&journal::SetAcl { path: b("/a"), change: 1, entries: acl }, "0a022f6110011a09080110021a016e2003");
    let x_attr = journal::SetXAttr { path: b("/a"), namespace: 1, name: "n".into(), value: Some(b("v")), may_create: true, may_replace: true };
    check(&x_attr, "0a022f6110011a016e22017628013001");
    check(&journal::Mkdir { unmasked_mode: 1, ..Default::default() }, "3001");
    check(&journal::Create { unmasked_mode: 1, ..Default::default() }, "880101");
    check(&store::Inode { hadoop_replication: 1, accessed_ms: 2, ..Default::default() }, "880201900202");
    check(&journal::Create { holder: "c".into(), hadoop_replication: 1, ..Default::default() }, "7a0163800101");
    check(&journal::AddBlocks { worker_id: 1, ..Default::default() }, "2001");
    check(&journal::Complete { expired_only: true, ..Default::default() }, "3801");
    check(&journal::AbandonBlock { file_id: 1, lease_id: 2, block_id: 3 }, "080110021803");
    check(&journal::SetAttributes { accessed_ms: Some(1), hadoop_replication: Some(2), ..Default::default() }, "48015002");
    let pending = store::Pending {
        id: 1,
        mount_id: 2,
        kind: "rename".into(),
        source_key: b("s"),
        target_key: b("t"),
        folder: true,
        created_ms: 3,
        source_parent_id: 4,
        source_name: b("a"),
        target_parent_id: 5,
        target_name: b("b"),
        target_path: b("/b"),
        inode_id: 6,
        client_id: 7,
        sequence: 8,
        ..Default::default()
    };
    check(&pending, PENDING);
    let reply = journal::Reply {
        error_kind: 1,
        error_message: "e".into(),
        file_id: 2,
        lease_id: 3,
        block_ids: vec![4],
        freed_first: vec![5],
        freed_count: vec![6],
        pending_id: 7,
        skipped: 8,
        mount_id: 9,
        principal: "p".into(),
        op: 10,
        ..Default::default()
    };
    check(&reply, REPLY);
    let entry = store::LogEntry { term: 1, node_id: 2, index: 3, payload: Some(store::log_entry::Payload::Batch(journal::Batch::default())) };
    check(&entry, "0801100218032a00");
    check(&store::Applied { term: 1, node_id: 2, index: 3, membership: b("m"), changes: 4 }, "0801100218032a016d3004");
    check(&store::ClientReplies { touched: 1, forgotten_below: 2 }, "08011002");
}

#[test]
fn locks() {
    let lock = FileLock { session_id: 2, owner: 3, whole: true, start: 4, end: 5, exclusive: true, process: 6 };
    check(&journal::SetLock { file_id: 1, lock: Some(lock), unlock: true }, "0801120e08021003180120042805300138061801");
    check(&journal::HoldLocks { session_id: 1, ttl_ms: 2, holder: "h".into(), begin: true }, "080110021a01682001");
    check(&journal::EndLocks { session_id: 1, expired_only: true }, "08011001");
    check(&journal::OpenCluster { cluster_id: "c".into(), first_id: 1, step: 2 }, "0a016310011802");
    let numbered = |used| Some(store::Numbered { used, from: used + 1 });
    let (inodes, blocks, leases, versions) = (numbered(1), numbered(2), numbered(3), numbered(4));
    let cluster = store::Cluster {
        id: "c".into(),
        older: true,
        inodes,
        blocks,
        leases,
        versions,
        opened_change: 5,
        skipped_blocks: vec![store::Numbered { used: 6, from: 7 }],
    };
    check(&cluster, "0a016310011a04080110022204080210032a04080310043204080410053805420408061007");
    check(&store::Counters { versions_from: 1, ..Default::default() }, "800101");
    check(&store::FileLocks { locks: vec![lock] }, "0a0e0802100318012004280530013806");
    let session = store::LockSession { id: 1, expires_at_ms: 2, ttl_ms: 3, principal: "p".into(), holder: "h".into(), files: 4, ending: true };
    check(&session, "0801100218032201702a016830043801");
}

const COMMANDS: &str = "\
    0a280a0170120167180120012802300352180a022f6110011801200128023003380140014804500558060a160a017012016718012001280230035a06\
    0801100218030a210a017012016718012001280230036211080110021803220204052a0206073201660a160a017012016718012001280230036a0608\
    01100218010a130a0170120167180120012802300372030a01010a1a0a017012016718012001280230037a0a0a022f611001180120010a170a017012\
    016718012001280230038201060a022f6110010a1b0a017012016718012001280230038a010a0a022f6112022f6218010a210a017012016718012001\
    280230039201100a022f6110011a016f220167280230010a340a017012016718012001280230039a0123080112140a016e1001180220032a01663201\
    6f3a016740041a017820012805300638070a220a01701201671801200128023003a201110a022f61120175180122060a016b1201760a150a01701201\
    671801200128023003aa01040a022f610a1e0a01701201671801200128023003b2010d08011201651a017022016628020a1f0a017012016718012001\
    28023003ba010e0a022f6110011a060a016b120176";
const INODE: &str = "\
    080110011802200328043202050638014001480152016f5a0167600768087009780a8201016688010b90010c98010da00101a8010eb00101b80101c0\
    0101";
const PENDING: &str = "\
    080110021a0672656e616d652201732a01743001380340044a016150055a016262022f62680670077808";
const REPLY: &str = "\
    0801120165180220032a01043201053a01064007480850095a0170600a";
const START_JOB: &str = "\
    fa015a0a58080112046c6f61641a01702201672801300238034204646f6e654a022f6152022f62580460056a034d454d700678018001018801079001\
    08980109a0010aa8010bb00101ba01070a022f63120165c201016dc8010cd0010d";
