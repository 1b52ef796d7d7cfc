//! Files under construction: created under a lease of the client's name, written block by block to workers, completed.
//!
//! A block is written to the cache as the only copy of its bytes; the file is completed when a worker has told of every block whole,
//! and gets to its under store as a file of write type `async` does. Where files are written through (or to the store alone), `complete` is answered
//! only when the store has it. A lease that runs out, or is taken away, completes the file with what workers have of it.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::{locate, status};
use crate::core::Core;
use crate::mount::{PathConfig, Resolved, WriteType, raw};
use crate::namespace::{self, block_ids};
use crate::source;
use crate::store::Reader;
use crate::worker::WorkerView;
use forebay_common::token::{self, Claims};
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId, Result, WorkerId, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::{Inode, Lease};
use std::time::Duration;
use tokio::time::Instant;

counter!(RECOVERED, "forebay_master_hadoop_leases_recovered_total", "files of Hadoop clients that were completed because their lease was over");

type Answer<T> = Result<T, Thrown>;

const LEASE_EXPIRED: &str = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
const BEING_CREATED: &str = "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException";

/// How long `complete` waits for workers to tell of the last blocks, and for the under store; the client asks again after that.
const BLOCKS_WAIT: Duration = Duration::from_secs(3);
const STORE_WAIT: Duration = Duration::from_secs(50);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

const FLAG_CREATE: u32 = wire::CreateFlagProto::Create as u32;
const FLAG_OVERWRITE: u32 = wire::CreateFlagProto::Overwrite as u32;

/// How files are written at the end of a walk.
fn write_type(resolved: &Resolved) -> WriteType {
    let of_mount = resolved.mount.as_ref().map(|m| m.options.write_type);
    PathConfig::of(&resolved.walk).write_type.or(of_mount).unwrap_or(WriteType::Through)
}

pub async fn create(h: &Hadoop, a: &Asker, r: wire::CreateRequestProto) -> Answer<wire::CreateResponseProto> {
    let core = &h.core;
    let (path, resolved) = h.resolve(a, &r.src).await?;
    let overwrite = r.create_flag & FLAG_OVERWRITE != 0;
    if resolved.walk.is_complete() && resolved.found(&path)?.inode.folder {
        return Err(Thrown::exists(format!("{path} already exists as a directory")));
    }
    if !resolved.walk.is_complete() && r.create_flag & FLAG_CREATE == 0 {
        return Err(Thrown::not_found(format!("Can't overwrite non-existent {path} for client {}", r.client_name)));
    }
    let write_type = write_type(&resolved);
    let in_store = write_type != WriteType::CacheOnly && resolved.mount.is_some();
    let page_size = resolved.mount.as_ref().map_or(core.config.page_size.as_u64(), |m| m.options.page_size_bytes);
    let op = journal::Create {
        path: raw(&path),
        overwrite,
        recursive: r.create_parent,
        mode: r.masked.perm & 0o1777,
        block_size_bytes: r.block_size,
        page_size_bytes: page_size,
        to_ufs: in_store,
        cached: true,
        lease_ttl_ms: core.config.lease_ttl_ms,
        worker_id: 0,
        block_count: 0,
        asynchronous: in_store,
        holder: r.client_name.clone(),
        hadoop_replication: r.replication,
        ..journal::Create::default()
    };
    let reply = match core.persist.change(core, Some(&a.caller(0)), Op::Create(op), &[&path]).await {
        Err(e) if e.kind() == ErrorKind::Busy => return Err(Thrown::from(e).named(BEING_CREATED)),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Err(Thrown::exists(format!("{path} for client {} already exists", a.ip))),
        other => other?,
    };
    let (_, inode) = core.store.view().inode(InodeId(reply.file_id))?.ok_or_else(|| err!(NotFound, "{path} was deleted in the meantime"))?;
    Ok(wire::CreateResponseProto { fs: Some(status::encode(b"", &inode, None, None)) })
}

/// A file that a client is writing, found by its id, wherever it was moved to, or by its name.
async fn open_file(h: &Hadoop, a: &Asker, src: &str, file_id: u64, holder: &str) -> Answer<(Inode, Lease)> {
    let view = h.core.store.view();
    let by_id = if file_id > 0 { view.inode(InodeId(file_id))? } else { None };
    drop(view);
    let inode = match by_id {
        Some((_, inode)) => inode,
        None => {
            let (path, resolved) = h.find(a, src).await?;
            resolved.found(&path)?.inode.clone()
        }
    };
    let lease = h.core.store.view().lease(inode.lease_id)?.filter(|l| !inode.completed && !l.publishing && l.holder == holder);
    let lease = lease.ok_or_else(|| {
        let message = format!("No lease on {src} (inode {}): it is not being written by {holder}, or was not heard of for too long", inode.id);
        Thrown::new(LEASE_EXPIRED, ErrorKind::Expired, message)
    })?;
    Ok((inode, lease))
}

/// A worker for the next block: the caller's own machine, else the one with most room.
fn choose(core: &Core, a: &Asker, exclude: &[wire::DatanodeInfoProto]) -> Answer<WorkerView> {
    let excluded: Vec<WorkerId> = exclude.iter().filter_map(|d| locate::worker_of(&d.id.datanode_uuid)).collect();
    let live = core.soft.workers.live();
    let open = |w: &&WorkerView| !w.leaving && w.address.hadoop_port > 0 && !excluded.contains(&w.id);
    let beside = live.iter().filter(open).find(|w| locate::is_at(w, a.ip));
    let chosen = beside.or_else(|| live.iter().filter(open).max_by_key(|w| w.free_bytes));
    chosen.cloned().ok_or_else(|| {
        Thrown::io(format!("no worker is there to write to: {} are live, {} of them are excluded by the client", live.len(), excluded.len()))
    })
}

pub async fn add_block(h: &Hadoop, a: &Asker, r: wire::AddBlockRequestProto) -> Answer<wire::AddBlockResponseProto> {
    let core = &h.core;
    let (inode, lease) = open_file(h, a, &r.src, r.file_id(), &r.client_name).await?;
    if let Some(previous) = &r.previous {
        let full = previous.num_bytes() == inode.block_size_bytes;
        let known = block_ids(&inode).any(|b| b.get() == previous.block_id);
        if !full || !known {
            let message = format!(
                "block {} of {} has {} bytes instead of {}: only the last block of a file may be short",
                previous.block_id,
                r.src,
                previous.num_bytes(),
                inode.block_size_bytes
            );
            return Err(Thrown::io(message));
        }
    }
    let worker = choose(core, a, &r.exclude_nodes)?;
    let op = journal::AddBlocks { file_id: inode.id, lease_id: lease.id, count: 1 };
    let reply = core.change(Some(&a.caller(0)), Op::AddBlocks(op)).await?;
    let (_, inode) = core.store.view().inode(InodeId(inode.id))?.ok_or_else(|| err!(NotFound, "{} was deleted in the meantime", r.src))?;
    let block = BlockId(reply.block_ids.first().copied().unwrap_or(0));
    let index = block_ids(&inode).position(|b| b == block).ok_or_else(|| err!(Expired, "block {block} was abandoned"))? as u64;
    let view = core.store.view();
    let mount_id = namespace::walk(&view, &view.path_of(InodeId(inode.id))?)?.mount.map_or(0, |(id, _)| id.get());
    drop(view);
    let claims = Claims {
        rights: token::WRITE | token::READ,
        write_cached: true,
        lease_id: lease.id,
        mount_id,
        ..locate::block_claims(core, &inode, index, block, &a.user, &[worker.id])
    };
    let block = locate::located(core, &claims, index * inode.block_size_bytes, locate::extended(block, 0), &[(&worker, false)])?;
    Ok(wire::AddBlockResponseProto { block })
}

pub async fn abandon_block(h: &Hadoop, a: &Asker, r: wire::AbandonBlockRequestProto) -> Answer<wire::AbandonBlockResponseProto> {
    let (inode, lease) = open_file(h, a, &r.src, r.file_id(), &r.holder).await?;
    let op = journal::AbandonBlock { file_id: inode.id, lease_id: lease.id, block_id: r.b.block_id };
    h.core.change(Some(&a.caller(0)), Op::AbandonBlock(op)).await?;
    Ok(wire::AbandonBlockResponseProto {})
}

/// Bytes of each block of a file that is `length` long.
fn lengths(inode: &Inode, length: u64) -> Vec<(BlockId, u64)> {
    let sized = Inode { length, ..inode.clone() };
    let count = namespace::blocks_for(length, inode.block_size_bytes) as usize;
    block_ids(inode).take(count).enumerate().map(|(i, id)| (id, source::block_length(&sized, i as u64))).collect()
}

fn complete_op(inode: &Inode, length: u64) -> Op {
    let blocks = lengths(inode, length);
    Op::Complete(journal::Complete {
        file_id: inode.id,
        lease_id: inode.lease_id,
        length,
        block_ids: blocks.iter().map(|(id, _)| id.get()).collect(),
        block_lengths: blocks.iter().map(|(_, length)| *length).collect(),
        fingerprint: String::new(),
    })
}

pub async fn complete(h: &Hadoop, a: &Asker, r: wire::CompleteRequestProto) -> Answer<wire::CompleteResponseProto> {
    let core = &h.core;
    let file_id = r.file_id();
    let (inode, lease) = match open_file(h, a, &r.src, file_id, &r.client_name).await {
        Ok(open) => open,
        // Asked again after it was done: the store may still be on its way.
        Err(e) if e.kind == ErrorKind::Expired && is_completed(core, file_id)? => {
            return Ok(wire::CompleteResponseProto { result: in_store(h, a, &r.src, file_id).await? });
        }
        Err(e) => return Err(e),
    };
    let count = block_ids(&inode).count() as u64;
    let length = match (&r.last, count) {
        (_, 0) => 0,
        (Some(last), count) if block_ids(&inode).last().is_some_and(|b| b.get() == last.block_id) && last.num_bytes() <= inode.block_size_bytes => {
            (count - 1) * inode.block_size_bytes + last.num_bytes()
        }
        _ => return Err(Thrown::io(format!("{} ends with another block than the client says", r.src))),
    };
    let blocks = lengths(&inode, length);
    let deadline = Instant::now() + BLOCKS_WAIT;
    while !blocks.iter().all(|(id, length)| is_whole(core, *id, *length)) {
        if Instant::now() > deadline {
            return Ok(wire::CompleteResponseProto { result: false });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    core.change(Some(&a.caller(0)), complete_op(&Inode { lease_id: lease.id, ..inode.clone() }, length)).await?;
    core.persist.wake();
    core.syncer.note_looked(InodeId(inode.id));
    Ok(wire::CompleteResponseProto { result: in_store(h, a, &r.src, inode.id).await? })
}

fn is_completed(core: &Core, file_id: u64) -> Result<bool> {
    Ok(core.store.view().inode(InodeId(file_id))?.is_some_and(|(_, inode)| inode.completed))
}

fn is_whole(core: &Core, block: BlockId, length: u64) -> bool {
    !source::whole_on(core, &core.soft.workers.live(), block, length).is_empty()
}

/// Waits until a file that is written through is in its store. `false`: not yet, the client asks again.
async fn in_store(h: &Hadoop, a: &Asker, src: &str, file_id: u64) -> Answer<bool> {
    let core = &h.core;
    let waits = {
        let view = core.store.view();
        let Some((_, inode)) = view.inode(InodeId(file_id))? else { return Ok(true) };
        // Without looking at the store: what was just written is newer than what is there.
        let walk = namespace::walk(&view, &view.path_of(InodeId(file_id))?)?;
        let mount = walk.mount.map(|(id, _)| core.soft.mounts.get(&core.store, &core.config, id)).transpose()?;
        inode.persist_id > 0 && write_type(&Resolved { walk, mount }) != WriteType::Async
    };
    if !waits {
        return Ok(true);
    }
    let deadline = Instant::now() + STORE_WAIT;
    let mut finished = core.persist.finished();
    loop {
        let inode = core.store.view().inode(InodeId(file_id))?.map(|(_, inode)| inode);
        match inode {
            // Deleted, or replaced: whoever did that knew what was there.
            None => return Ok(true),
            Some(inode) if inode.persisted || inode.persist_id == 0 => return Ok(true),
            Some(_) if Instant::now() > deadline => {
                tracing::warn!(path = src, user = a.user, "a file of a Hadoop client is not in its under store yet; it is tried on");
                return Ok(false);
            }
            Some(_) => {}
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), finished.changed()).await;
    }
}

/// What was flushed is with the worker when it acknowledges it; here only the lease is looked at.
pub async fn fsync(h: &Hadoop, a: &Asker, r: wire::FsyncRequestProto) -> Answer<wire::FsyncResponseProto> {
    open_file(h, a, &r.src, r.file_id(), &r.client).await?;
    Ok(wire::FsyncResponseProto {})
}

pub async fn renew_lease(h: &Hadoop, _: &Asker, r: wire::RenewLeaseRequestProto) -> Answer<wire::RenewLeaseResponseProto> {
    let leases = h.core.store.view().leases()?;
    let lease_ids: Vec<u64> = leases.into_iter().filter(|l| !l.publishing && l.holder == r.client_name).map(|l| l.id).collect();
    if !lease_ids.is_empty() {
        // The name of a client is drawn at random, and known to nobody else.
        h.core.own_change(Op::RenewLease(journal::RenewLease { lease_ids })).await?;
    }
    Ok(wire::RenewLeaseResponseProto {})
}

pub async fn recover_lease(h: &Hadoop, a: &Asker, r: wire::RecoverLeaseRequestProto) -> Answer<wire::RecoverLeaseResponseProto> {
    let (path, resolved) = h.find(a, &r.src).await?;
    let inode = resolved.found(&path)?.inode.clone();
    if inode.folder {
        return Err(Thrown::not_found(format!("Path is not a file: {path}")));
    }
    if inode.completed {
        return Ok(wire::RecoverLeaseResponseProto { result: true });
    }
    namespace::check(&h.core.identity.who(&a.user), &inode, namespace::WRITE, &path)?;
    let lease = h.core.store.view().lease(inode.lease_id)?.filter(|l| !l.holder.is_empty());
    let lease = lease.ok_or_else(|| Thrown::io(format!("{path} is not being written by a Hadoop client")))?;
    recover(&h.core, &lease).await?;
    Ok(wire::RecoverLeaseResponseProto { result: true })
}

/// Completes the file of a lease that is over with what workers have of it: full blocks, and one that may be short.
pub async fn recover(core: &Core, lease: &Lease) -> Result<()> {
    let Some((_, inode)) = core.store.view().inode(InodeId(lease.file_id))?.filter(|(_, i)| i.lease_id == lease.id && !i.completed) else {
        return Ok(());
    };
    let live = core.soft.workers.live();
    let mut length = 0;
    for block in block_ids(&inode) {
        let holders = core.soft.blocks.holders(block);
        let there = holders.iter().filter(|h| live.iter().any(|w| w.id == h.worker)).map(|h| h.cached_bytes).max().unwrap_or(0);
        length += there.min(inode.block_size_bytes);
        if there < inode.block_size_bytes {
            break;
        }
    }
    RECOVERED.inc();
    let path: Option<AbsPath> = core.store.view().path_of(InodeId(inode.id)).ok();
    tracing::info!(?path, holder = lease.holder, length, "a lease of a Hadoop client is over: its file is completed with what is there");
    core.own_change(complete_op(&inode, length)).await?;
    core.persist.wake();
    Ok(())
}
