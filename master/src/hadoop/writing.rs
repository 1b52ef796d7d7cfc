//! Files under construction: created under a lease of the client's name, written block by block to workers, completed.
//!
//! A block is written to the cache as the only copy of its bytes, on as many workers as the client and the path's `replicas` both want; the file is completed
//! when a worker has told of every block whole, and gets to its under store as a file of write type `async` does. Where files are written through (or to the
//! store alone), `complete` is answered only when the store has it. What becomes of a file whose client is gone is in `recovery`, changes of a complete one in
//! `reopen`.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::{locate, status};
use crate::core::Core;
use crate::locality::Position;
use crate::mount::{PathConfig, Resolved, WriteType, raw};
use crate::namespace::{self, block_ids};
use crate::replicate;
use crate::source;
use crate::store::Reader;
use crate::worker::{WorkerView, fetch_order};
use forebay_common::limits::REPLICAS_MAX;
use forebay_common::token::{self, Claims};
use forebay_common::{BlockId, ErrorKind, InodeId, Result, WorkerId, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::{Inode, Lease};
use std::time::Duration;
use tokio::time::Instant;

pub type Answer<T> = Result<T, Thrown>;

pub const LEASE_EXPIRED: &str = "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException";
pub const BEING_CREATED: &str = "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException";

/// How long `complete` waits for workers to tell of the last blocks, and for the under store; the client asks again after that.
const BLOCKS_WAIT: Duration = Duration::from_secs(3);
const STORE_WAIT: Duration = Duration::from_secs(50);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

const FLAG_CREATE: u32 = wire::CreateFlagProto::Create as u32;
const FLAG_OVERWRITE: u32 = wire::CreateFlagProto::Overwrite as u32;

/// Workers beside a block's own that its token is good for: one of them may take the place of one that fails.
const STAND_INS: usize = 16;

/// How files are written at the end of a walk.
pub fn write_type(resolved: &Resolved) -> WriteType {
    let of_mount = resolved.mount.as_ref().map(|m| m.options.write_type);
    PathConfig::of(&resolved.walk).write_type.or(of_mount).unwrap_or(WriteType::Through)
}

pub async fn create(h: &Hadoop, a: &Asker, r: wire::CreateRequestProto) -> Answer<wire::CreateResponseProto> {
    let core = &h.core;
    // Sent again after it was done: there is a file of this name, which is its own.
    if let Some(reply) = core.remembered(&a.caller(0))?
        && let Some((_, inode)) = core.store.view().inode(InodeId(reply.file_id))?
    {
        return Ok(wire::CreateResponseProto { fs: Some(status::encode(b"", &inode, None)) });
    }
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
    let replicas = replicas(&resolved);
    // Bytes that are in the store when they are acknowledged need no copies.
    let replicas = if matches!(write_type, WriteType::Async | WriteType::CacheOnly) { replicas } else { 1 };
    let page_size = resolved.mount.as_ref().map_or(core.config.page_size.as_u64(), |m| m.options.page_size_bytes);
    let op = journal::Create {
        path: raw(&path),
        overwrite,
        recursive: r.create_parent,
        mode: r.masked.perm & 0o1777,
        unmasked_mode: r.unmasked.as_ref().map_or(0, |unmasked| unmasked.perm & 0o1777),
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
pub async fn open_file(h: &Hadoop, a: &Asker, src: &str, file_id: u64, holder: &str) -> Answer<(Inode, Lease)> {
    if holder.is_empty() {
        return Err(Thrown::io("a file is written under the name of its client, and that is empty"));
    }
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

/// On how many workers files are to be at the end of a walk before they are acknowledged.
fn replicas(resolved: &Resolved) -> u32 {
    PathConfig::of(&resolved.walk).replicas.or(resolved.mount.as_ref().map(|m| m.options.replicas)).unwrap_or(1).max(1)
}

/// The order in which workers share a block: as HDFS, the second on another rack than the first, the third on the second's.
fn spread(mut from: Vec<WorkerView>, count: usize) -> Vec<WorkerView> {
    let mut chosen: Vec<WorkerView> = Vec::new();
    while chosen.len() < count && !from.is_empty() {
        let wanted = |w: &WorkerView| match chosen.as_slice() {
            [first] => w.rack != first.rack,
            [_, second] => w.rack == second.rack,
            _ => true,
        };
        let at = from.iter().position(wanted).unwrap_or(0);
        chosen.push(from.remove(at));
    }
    chosen
}

/// Workers that a block may be written to: the caller's own machine, then those with most room.
pub fn candidates(core: &Core, a: &Asker, excluded: &[WorkerId]) -> Vec<WorkerView> {
    let mut open = core.soft.workers.live();
    open.retain(|w| !w.leaving && w.address.hadoop_port > 0 && !excluded.contains(&w.id));
    let position = Position::of(core, Some(a.ip), "", &open);
    open.sort_by_cached_key(|w| (!position.is_here(w), std::cmp::Reverse(w.free_bytes)));
    open
}

/// Up to `count` workers for the next block, one at least.
fn choose(core: &Core, a: &Asker, exclude: &[wire::DatanodeInfoProto], count: usize) -> Answer<Vec<WorkerView>> {
    let excluded: Vec<WorkerId> = exclude.iter().filter_map(|d| locate::worker_of(&d.id.datanode_uuid)).collect();
    let chosen = spread(candidates(core, a, &excluded), count.max(1));
    if chosen.is_empty() {
        let live = core.soft.workers.live().len();
        return Err(Thrown::io(format!("no worker is there to write to: {live} are live, {} of them are excluded by the client", excluded.len())));
    }
    Ok(chosen)
}

/// A block that is written by a client, with the token to do so on these workers, and on those that may take the place of one of them.
pub fn writable(
    core: &Core,
    a: &Asker,
    inode: &Inode,
    lease_id: u64,
    block: wire::ExtendedBlockProto,
    workers: &[WorkerView],
) -> Result<wire::LocatedBlockProto> {
    let id = BlockId(block.block_id);
    let index = block_ids(inode).position(|b| b == id).ok_or_else(|| err!(Expired, "block {id} was abandoned"))? as u64;
    let view = core.store.view();
    let mount_id = namespace::walk(&view, &view.path_of(InodeId(inode.id))?)?.mount.map_or(0, |(id, _)| id.get());
    drop(view);
    let mut audience: Vec<WorkerId> = workers.iter().map(|w| w.id).collect();
    let stand_ins = candidates(core, a, &audience);
    audience.extend(fetch_order(&stand_ins, id).into_iter().take(STAND_INS));
    let offset = namespace::layout(inode).offset(index);
    let claims = Claims {
        // What is in it already may not be its writer's to read.
        rights: token::WRITE,
        write_cached: true,
        lease_id,
        mount_id,
        ..locate::block_claims(core, inode, offset, id, &a.user, &audience)
    };
    let at: Vec<locate::Told<'_>> = workers.iter().map(locate::Told::own).collect();
    locate::located(core, Some(&claims), offset, block, &at)
}

pub async fn add_block(h: &Hadoop, a: &Asker, r: wire::AddBlockRequestProto) -> Answer<wire::AddBlockResponseProto> {
    let core = &h.core;
    let (inode, lease) = open_file(h, a, &r.src, r.file_id(), &r.client_name).await?;
    let mut previous_length = 0;
    if let Some(previous) = &r.previous {
        previous_length = previous.num_bytes();
        if previous_length == 0 || previous_length > inode.block_size_bytes {
            let (id, most) = (previous.block_id, inode.block_size_bytes);
            return Err(Thrown::io(format!("block {id} is no full block of {}: it has {previous_length} bytes, of at most {most}", r.src)));
        }
    }
    let wanted = {
        let view = core.store.view();
        let walk = namespace::walk(&view, &view.path_of(InodeId(inode.id))?)?;
        let mount = walk.mount.map(|(id, _)| core.soft.mounts.get(&core.store, &core.config, id)).transpose()?;
        replicas(&Resolved { walk, mount }).min(inode.hadoop_replication.max(1))
    };
    let workers = choose(core, a, &r.exclude_nodes, wanted as usize)?;
    let op = journal::AddBlocks {
        file_id: inode.id,
        lease_id: lease.id,
        count: 1,
        worker_id: workers[0].id.get(),
        other_workers: workers[1..].iter().map(|w| w.id.get()).collect(),
        previous_length,
        previous_block: r.previous.as_ref().map_or(0, |previous| previous.block_id),
    };
    let reply = core.change(Some(&a.caller(0)), Op::AddBlocks(op)).await?;
    let (_, inode) = core.store.view().inode(InodeId(inode.id))?.ok_or_else(|| err!(NotFound, "{} was deleted in the meantime", r.src))?;
    let block = locate::extended(core, BlockId(reply.block_ids.first().copied().unwrap_or(0)), 0);
    Ok(wire::AddBlockResponseProto { block: writable(core, a, &inode, lease.id, block, &workers)? })
}

pub async fn abandon_block(h: &Hadoop, a: &Asker, r: wire::AbandonBlockRequestProto) -> Answer<wire::AbandonBlockResponseProto> {
    let (inode, lease) = open_file(h, a, &r.src, r.file_id(), &r.holder).await?;
    let op = journal::AbandonBlock { file_id: inode.id, lease_id: lease.id, block_id: r.b.block_id };
    h.core.change(Some(&a.caller(0)), Op::AbandonBlock(op)).await?;
    Ok(wire::AbandonBlockResponseProto {})
}

/// Each block of a file whose last one ends at `length`, with its bytes.
fn lengths(inode: &Inode, length: u64) -> Vec<(BlockId, u64)> {
    let sized = Inode { length, ..inode.clone() };
    namespace::blocks(&sized).map(|(id, (_, length))| (id, length)).collect()
}

pub fn complete_op(inode: &Inode, length: u64, expired_only: bool) -> Op {
    let blocks = lengths(inode, length);
    Op::Complete(journal::Complete {
        file_id: inode.id,
        lease_id: inode.lease_id,
        length,
        block_ids: blocks.iter().map(|(id, _)| id.get()).collect(),
        block_lengths: blocks.iter().map(|(_, length)| *length).collect(),
        fingerprint: String::new(),
        expired_only,
        ..Default::default()
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
        // Gone on with, and nothing was written.
        (None, count) if namespace::layout(&inode).offset(count) == inode.length => inode.length,
        (Some(last), count) if block_ids(&inode).last().is_some_and(|b| b.get() == last.block_id) && last.num_bytes() <= inode.block_size_bytes => {
            namespace::layout(&inode).offset(count - 1) + last.num_bytes()
        }
        _ => return Err(Thrown::io(format!("{} ends with another block than the client says", r.src))),
    };
    let blocks = lengths(&inode, length);
    // What was written is looked at by whoever wrote it.
    if !core.identity.who(&a.user).superuser && a.user != lease.principal {
        return Err(Thrown::denied(format!("user {} does not hold the lease of {}", a.user, r.src)));
    }
    let deadline = Instant::now() + BLOCKS_WAIT;
    // A last block that was abandoned, or never got a byte, is given back.
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
    // A client that wrote nothing says nothing.
    Ok(last.is_none() || there == last.map(|block| (block.block_id, block.num_bytes())))
}

fn is_whole(core: &Core, block: BlockId, length: u64) -> bool {
    !source::whole_on(core, &core.soft.workers.present(), block, length).is_empty()
}

/// Waits until a file that is written through is in its store. `false`: not yet, the client asks again.
pub async fn in_store(h: &Hadoop, a: &Asker, src: &str, file_id: u64) -> Answer<bool> {
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

/// What was flushed is with the workers when they acknowledge it. That there is something is written down, so that its loss is noticed: a client says it with
/// the first flush of each block, and each time it wants the length seen.
pub async fn fsync(h: &Hadoop, a: &Asker, r: wire::FsyncRequestProto) -> Answer<wire::FsyncResponseProto> {
    let (inode, lease) = open_file(h, a, &r.src, r.file_id(), &r.client).await?;
    if let Some(last) = block_ids(&inode).last() {
        let length = u64::try_from(r.last_block_length()).unwrap_or(0);
        let op = journal::NoteFlushed { file_id: inode.id, lease_id: lease.id, block_id: last.get(), length };
        h.core.change(Some(&a.caller(0)), Op::NoteFlushed(op)).await?;
    }
    Ok(wire::FsyncResponseProto {})
}
