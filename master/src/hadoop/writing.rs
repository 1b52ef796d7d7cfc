//! Files under construction: created under a lease of the client's name, written block by block to workers, completed.
//!
//! A block is written to the cache as the only copy of its bytes; the file is completed when a worker has told of every block whole,
//! and gets to its under store as a file of write type `async` does. Where files are written through (or to the store alone), `complete` is answered
//! only when the store has it. A lease that runs out, or is taken away, completes the file with what workers have of it, once the worker that was writing its
//! last block has ended that as it stands: nothing that was flushed is cut off while that worker can be asked.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::{locate, status};
use crate::core::Core;
use crate::mount::{PathConfig, Resolved, WriteType, raw};
use crate::namespace::{self, block_ids};
use crate::replicate;
use crate::source;
use crate::store::Reader;
use crate::worker::WorkerView;
use forebay_common::limits::REPLICAS_MAX;
use forebay_common::token::{self, Claims};
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId, Result, WorkerId, clock, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::SealBlock;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::{Inode, Lease};
use forebay_proto::task::What;
use std::time::Duration;
use tokio::time::Instant;

counter!(RECOVERED, "forebay_master_hadoop_leases_recovered_total", "files of Hadoop clients that were completed because their lease was over");

type Answer<T> = Result<T, Thrown>;

const LEASE_EXPIRED: &str = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
const BEING_CREATED: &str = "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException";

/// How long a lease may be over before its file is completed without the worker that has its last blocks: as HDFS's hard limit.
const GIVEN_UP_AFTER_MS: u64 = 20 * 60 * 1_000;
/// How long a worker may take to end a block.
const SEAL_WAIT: Duration = Duration::from_secs(20);
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
    if r.client_name.is_empty() {
        return Err(Thrown::io("a file is created under the name of its client, and that is empty"));
    }
    if resolved.walk.is_complete() && !overwrite {
        let inode = &resolved.found(&path)?.inode;
        let holder = core.store.view().lease(inode.lease_id)?.map(|l| l.holder).unwrap_or_default();
        if !inode.completed && !holder.is_empty() {
            let why = if holder == r.client_name {
                format!("{holder} is already the current lease holder.")
            } else {
                format!("this file lease is currently owned by {holder}")
            };
            let message = format!("Failed to CREATE_FILE {path} for {} on {} because {why}", r.client_name, a.ip);
            return Err(Thrown::new(BEING_CREATED, ErrorKind::Busy, message));
        }
    }
    let least = core.config.hadoop_min_block_size.as_u64();
    if r.block_size < least {
        let setting = "master.hadoop_min_block_size";
        return Err(Thrown::io(format!("Specified block size {} is less than configured minimum value {setting}={least}", r.block_size)));
    }
    let write_type = write_type(&resolved);
    let in_store = write_type != WriteType::CacheOnly && resolved.mount.is_some();
    let replicas = PathConfig::of(&resolved.walk).replicas.or(resolved.mount.as_ref().map(|m| m.options.replicas)).unwrap_or(1);
    // Bytes that are in the store when they are acknowledged need no copies.
    let replicas = if matches!(write_type, WriteType::Async | WriteType::CacheOnly) { replicas } else { 1 };
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
        hadoop_replication: r.replication.min(REPLICAS_MAX),
        replication_min: if replicas > 1 { replicas } else { 0 },
        ..journal::Create::default()
    };
    let reply = match core.persist.change(core, Some(&a.caller(0)), Op::Create(op), &[&path]).await {
        Err(e) if e.kind() == ErrorKind::Busy => return Err(Thrown::from(e).named(BEING_CREATED)),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Err(Thrown::exists(format!("{path} for client {} already exists", a.ip))),
        other => other?,
    };
    let (_, inode) = core.store.view().inode(InodeId(reply.file_id))?.ok_or_else(|| err!(NotFound, "{path} was deleted in the meantime"))?;
    Ok(wire::CreateResponseProto { fs: Some(status::encode(b"", &inode, None)) })
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
    let op = journal::AddBlocks { file_id: inode.id, lease_id: lease.id, count: 1, worker_id: worker.id.get() };
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
    let block = locate::located(core, Some(&claims), index * inode.block_size_bytes, locate::extended(block, 0), &[(&worker, false)])?;
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

fn complete_op(inode: &Inode, length: u64, expired_only: bool) -> Op {
    let blocks = lengths(inode, length);
    Op::Complete(journal::Complete {
        file_id: inode.id,
        lease_id: inode.lease_id,
        length,
        block_ids: blocks.iter().map(|(id, _)| id.get()).collect(),
        block_lengths: blocks.iter().map(|(_, length)| *length).collect(),
        fingerprint: String::new(),
        expired_only,
    })
}

pub async fn complete(h: &Hadoop, a: &Asker, r: wire::CompleteRequestProto) -> Answer<wire::CompleteResponseProto> {
    let core = &h.core;
    let file_id = r.file_id();
    let (inode, lease) = match open_file(h, a, &r.src, file_id, &r.client_name).await {
        Ok(open) => open,
        // Asked again after it was done, and not cut by a recovery: the store may still be on its way.
        Err(e) if e.kind == ErrorKind::Expired && is_completed_as(core, file_id, r.last.as_ref())? => {
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
    // What was written is looked at by whoever wrote it.
    if !core.identity.who(&a.user).superuser && a.user != lease.principal {
        return Err(Thrown::denied(format!("user {} does not hold the lease of {}", a.user, r.src)));
    }
    let deadline = Instant::now() + BLOCKS_WAIT;
    while !blocks.iter().all(|(id, length)| is_whole(core, *id, *length)) {
        if Instant::now() > deadline {
            return Ok(wire::CompleteResponseProto { result: false });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let copies = inode.replication_min as usize;
    if copies > 1 {
        let named: Vec<(u64, u64)> = blocks.iter().map(|(id, length)| (id.get(), *length)).collect();
        replicate::before_acknowledging(core, &inode, length, &named, None, copies).await?;
    }
    core.change(Some(&a.caller(0)), complete_op(&Inode { lease_id: lease.id, ..inode.clone() }, length, false)).await?;
    core.persist.wake();
    core.syncer.note_looked(InodeId(inode.id));
    Ok(wire::CompleteResponseProto { result: in_store(h, a, &r.src, inode.id).await? })
}

/// Whether a file is complete, and ends as its writer says.
fn is_completed_as(core: &Core, file_id: u64, last: Option<&wire::ExtendedBlockProto>) -> Result<bool> {
    let Some((_, inode)) = core.store.view().inode(InodeId(file_id))?.filter(|(_, inode)| inode.completed) else { return Ok(false) };
    let there = lengths(&inode, inode.length).last().map(|(id, length)| (id.get(), *length));
    Ok(there == last.map(|block| (block.block_id, block.num_bytes())))
}

fn is_whole(core: &Core, block: BlockId, length: u64) -> bool {
    !source::whole_on(core, &core.soft.workers.present(), block, length).is_empty()
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

pub async fn renew_lease(h: &Hadoop, a: &Asker, r: wire::RenewLeaseRequestProto) -> Answer<wire::RenewLeaseResponseProto> {
    let leases = h.core.store.view().leases()?;
    let its = |l: &Lease| !l.publishing && !l.holder.is_empty() && l.holder == r.client_name && l.principal == a.user;
    let lease_ids: Vec<u64> = leases.iter().filter(|l| its(l)).map(|l| l.id).collect();
    if !lease_ids.is_empty() {
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
    match recover(&h.core, &lease, false).await {
        Ok(()) => Ok(wire::RecoverLeaseResponseProto { result: true }),
        // Its worker cannot be asked now: the caller asks again.
        Err(e) if e.is_retryable() => Ok(wire::RecoverLeaseResponseProto { result: false }),
        Err(e) => Err(e.into()),
    }
}

/// Completes the file of a lease that is over, or is taken away, with what workers have of it: full blocks, and a last one that may be short.
///
/// Errors: `Unavailable` while a worker that has blocks of it cannot be asked; it is tried again until the lease is over for `GIVEN_UP_AFTER_MS`.
pub async fn recover(core: &Core, lease: &Lease, expired_only: bool) -> Result<()> {
    let found = || core.store.view().inode(InodeId(lease.file_id)).map(|i| i.filter(|(_, i)| i.lease_id == lease.id && !i.completed));
    let Some((_, inode)) = found()? else { return Ok(()) };
    let given_up = lease.expires_at_ms + GIVEN_UP_AFTER_MS < clock::now_ms();
    let sealed = match block_ids(&inode).last() {
        Some(last) => seal(core, WorkerId(lease.worker_id), last).await,
        None => Ok(()),
    };
    if let Err(e) = sealed
        && !given_up
    {
        return Err(err!(Unavailable, "the worker that file {} was written to cannot be asked for its last block: {}", inode.id, e.message()));
    }
    let present = core.soft.workers.present();
    let (mut length, mut blocks) = (0, block_ids(&inode).peekable());
    while let Some(block) = blocks.next() {
        let holders = core.soft.blocks.holders(block);
        let there = holders.iter().filter(|h| present.iter().any(|w| w.id == h.worker)).map(|h| h.cached_bytes).max().unwrap_or(0);
        length += there.min(inode.block_size_bytes);
        if there < inode.block_size_bytes {
            // Blocks before the last were ended by their writer.
            if blocks.peek().is_some() && !given_up {
                return Err(err!(Unavailable, "block {block} of file {} is on no worker that is there", inode.id));
            }
            break;
        }
    }
    RECOVERED.inc();
    let path: Option<AbsPath> = core.store.view().path_of(InodeId(inode.id)).ok();
    tracing::info!(?path, holder = lease.holder, length, "a lease of a Hadoop client is over: its file is completed with what is there");
    match core.own_change(complete_op(&inode, length, expired_only)).await {
        // Renewed after all, or somebody else was quicker.
        Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::Expired) => Ok(()),
        Err(e) => Err(e),
        Ok(_) => {
            core.persist.wake();
            Ok(())
        }
    }
}

/// Has a worker end a block as it stands, and notes what it has of it then.
async fn seal(core: &Core, worker: WorkerId, block: BlockId) -> Result<()> {
    if !core.soft.workers.present().iter().any(|w| w.id == worker) {
        return Err(err!(Unavailable, "worker {worker} is not there"));
    }
    let submitted = core.soft.tasks.submit(worker, What::Seal(SealBlock { block_id: block.get() }));
    let sealed = tokio::time::timeout(SEAL_WAIT, submitted.outcome()).await.map_err(|_| err!(Timeout, "worker {worker} does not answer"))??;
    if sealed.bytes > 0 {
        let tier = core.soft.blocks.holders(block).iter().find(|h| h.worker == worker).map_or("MEM", |h| h.tier);
        core.soft.blocks.report(worker, block, sealed.bytes, tier);
    }
    Ok(())
}
