//! Changes of a complete file: `append`, `truncate`, `concat`.
//!
//! What is changed is in no under store any more until it was written out again, so every block that stays is first kept whole in the cache, as the only copy
//! of its bytes (`hold`); then the change is journaled. A block never changes: the last, short one of a file that is appended to, and the one that a cut lies
//! in, are replaced by new ones that begin with the same bytes; the old one stays until the file is completed. A call that is sent again goes on from where it was. Where a file has blocks that are shorter than
//! others already, it is appended to in a new block: Hadoop's clients count the checksums of a block's end from the length of its file.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::recovery::rewrite;
use super::writing::{Answer, BEING_CREATED, candidates, complete_op, in_store, writable, write_type};
use super::{locate, status};
use crate::core::Core;
use crate::mount::{Resolved, WriteType, raw};
use crate::namespace::{self, layout};
use crate::replicate::load_order;
use crate::source;
use crate::store::Reader;
use crate::worker::fetch_order;
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId, Result, WorkerId, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::{Inode, Lease};
use forebay_proto::task::What;
use futures::StreamExt;

const FLAG_NEW_BLOCK: u32 = wire::CreateFlagProto::NewBlock as u32;
const ILLEGAL_ARGUMENT: &str = "org.apache.hadoop.HadoopIllegalArgumentException";

/// Blocks of one file that are brought into the cache at once.
const HELD_AT_ONCE: usize = 16;

/// A file that may be changed; HDFS's words where it may not.
async fn changeable(h: &Hadoop, a: &Asker, src: &str, client: &str, what: &str) -> Answer<(AbsPath, Resolved, Inode)> {
    let (path, resolved) = h.find(a, src).await?;
    let inode = resolved.found(&path)?.inode.clone();
    if inode.folder {
        return Err(Thrown::not_found(format!("Path is not a file: {path}")));
    }
    namespace::check(&h.core.identity.who(&a.user), &inode, namespace::WRITE, &path)?;
    if let Some(mount) = &resolved.mount
        && mount.read_only
    {
        return Err(err!(ReadOnly, "{path} lies in a read-only mount").into());
    }
    if !inode.completed {
        let holder = h.core.store.view().lease(inode.lease_id)?.map(|l| l.holder).unwrap_or_default();
        let why = if holder == client {
            format!("{holder} is already the current lease holder.")
        } else {
            format!("this file lease is currently owned by {holder}")
        };
        let message = format!("Failed to {what} {path} for {client} on {} because {why}", a.ip);
        return Err(Thrown::new(BEING_CREATED, ErrorKind::Busy, message));
    }
    Ok((path, resolved, inode))
}

/// Whether a changed file is to get to its under store: as new files do, and where it was there already.
fn to_ufs(resolved: &Resolved, inode: &Inode) -> bool {
    resolved.mount.is_some() && (write_type(resolved) != WriteType::CacheOnly || inode.persisted || inode.shadows || inode.persist_id > 0)
}

/// Has every block of a file that lies below `length` kept whole, as the only copy of its bytes.
async fn hold(core: &Core, path: &AbsPath, inode: &Inode, length: u64) -> Answer<()> {
    if !inode.persisted {
        // They are the only copies already. Without the worker that has them the file is not changed, but read, later.
        for (block, (at, length_of_block)) in namespace::blocks(inode) {
            if at < length && source::whole_on(core, &core.soft.workers.live(), block, length_of_block).is_empty() {
                return Err(err!(Unavailable, "{path}: block {block} is on no live worker: start the worker that has it").into());
            }
        }
        return Ok(());
    }
    let blocks: Vec<(BlockId, u64)> = namespace::blocks(inode).filter(|(_, (at, _))| *at < length).map(|(id, (_, length))| (id, length)).collect();
    let held = futures::stream::iter(blocks).map(|(block, length)| async move {
        let live = core.soft.workers.live();
        let open: Vec<_> = live.iter().filter(|w| !w.leaving).cloned().collect();
        let whole = source::whole_on(core, &open, block, length).into_iter().next();
        let worker: Option<WorkerId> = whole.or_else(|| fetch_order(&open, block).into_iter().next());
        let worker = worker.ok_or_else(|| err!(Unavailable, "no worker is there to keep block {block}"))?;
        let order = load_order(core, InodeId(inode.id), inode, block)?;
        core.soft.tasks.submit(worker, What::Hold(order)).outcome().await?;
        core.soft.blocks.report(worker, block, length, core.soft.blocks.holders(block).iter().find(|h| h.worker == worker).map_or("MEM", |h| h.tier));
        Ok(())
    });
    let held: Vec<Result<()>> = held.buffer_unordered(HELD_AT_ONCE).collect().await;
    held.into_iter()
        .collect::<Result<()>>()
        .map_err(|e| e.context(format!("{path} cannot be changed: all of it has to be in the cache for that")).into())
}

/// A file under construction by its id, with its lease.
fn opened(core: &Core, file_id: u64) -> Result<(Inode, Lease)> {
    let view = core.store.view();
    let (_, inode) = view.inode(InodeId(file_id))?.ok_or_else(|| err!(NotFound, "the file was deleted in the meantime"))?;
    let lease = view.lease(inode.lease_id)?.ok_or_else(|| err!(Expired, "the lease is over"))?;
    Ok((inode, lease))
}

/// Tries of a change whose file is changed by somebody else between the look and the change: a publication that ends, mostly.
const TRIES: u32 = 8;

/// Holds what stays of a file, and has it changed. `op` builds the change from what was looked at.
async fn change(
    h: &Hadoop,
    a: &Asker,
    src: &str,
    client: &str,
    what: &str,
    op: impl Fn(&AbsPath, &Resolved, &Inode) -> Answer<Option<journal::Reopen>>,
) -> Answer<Option<InodeId>> {
    let core = &h.core;
    if client.is_empty() {
        return Err(Thrown::io("a file is written under the name of its client, and that is empty"));
    }
    for attempt in 1.. {
        let (path, resolved, inode) = changeable(h, a, src, client, what).await?;
        let Some(op) = op(&path, &resolved, &inode)? else { return Ok(None) };
        let _held = core.soft.held.hold(InodeId(inode.id));
        hold(core, &path, &inode, op.length).await?;
        match core.persist.change(core, Some(&a.caller(0)), Op::Reopen(op), &[&path]).await {
            Err(e) if e.kind() == ErrorKind::Busy && attempt < TRIES => {}
            reply => return Ok(Some(InodeId(reply?.file_id))),
        }
    }
    Ok(None)
}

/// The file of a call that is sent again, where its change was made.
fn made_before(core: &Core, a: &Asker) -> Answer<Option<InodeId>> {
    Ok(core.remembered(&a.caller(0))?.map(|reply| InodeId(reply.file_id)))
}

pub async fn append(h: &Hadoop, a: &Asker, r: wire::AppendRequestProto) -> Answer<wire::AppendResponseProto> {
    let core = &h.core;
    let file = match made_before(core, a)? {
        Some(file) => file,
        None => {
            match h.look(a, &r.src).await? {
                None => return Err(Thrown::not_found(format!("Failed to append to non-existent file {} for client {}", r.src, a.ip))),
                Some((path, resolved)) if resolved.found(&path)?.inode.folder => {
                    return Err(Thrown::exists(format!("Cannot append to directory {path}; already exists as a directory.")));
                }
                Some(_) => {}
            }
            let op = |path: &AbsPath, resolved: &Resolved, inode: &Inode| {
                let uniform = inode.short_blocks.is_empty() && !inode.length.is_multiple_of(inode.block_size_bytes.max(1));
                Ok(Some(journal::Reopen {
                    path: raw(path),
                    changed_index: inode.changed_index,
                    holder: r.client_name.clone(),
                    lease_ttl_ms: core.config.lease_ttl_ms,
                    length: inode.length,
                    rewrite: uniform && r.flag() & FLAG_NEW_BLOCK == 0,
                    worker_id: maker(core, a, inode, inode.length)?.get(),
                    to_ufs: to_ufs(resolved, inode),
                }))
            };
            let changed = change(h, a, &r.src, &r.client_name, "APPEND_FILE", op).await?;
            changed.ok_or_else(|| Thrown::from(err!(Busy, "{} is changed all the time: try again", r.src)))?
        }
    };
    let (inode, lease) = opened(core, file.get())?;
    let mut block = None;
    if lease.rewritten_as > 0 {
        // Its client cannot go on without; the file is completed as it was once the lease is over.
        rewrite(core, &inode, &lease, false).await?;
        let workers: Vec<_> = core.soft.workers.live().into_iter().filter(|w| w.id.get() == lease.worker_id).collect();
        let last = locate::extended(core, BlockId(lease.rewritten_as), lease.rewritten_length);
        block = Some(writable(core, a, &inode, lease.id, last, &workers)?);
    }
    Ok(wire::AppendResponseProto { block, stat: Some(status::encode(b"", &inode, None)) })
}

/// The worker that gets the block in which `length` ends: one that has the old one, the caller's own machine first.
fn maker(core: &Core, a: &Asker, inode: &Inode, length: u64) -> Result<WorkerId> {
    let open = candidates(core, a, &[]);
    let at = length.checked_sub(1).map(|last| layout(inode).block_at(last).0);
    let old = at.and_then(|index| namespace::blocks(inode).nth(usize::try_from(index).ok()?));
    let whole = old.map(|(block, (_, length))| source::whole_on(core, &open, block, length)).unwrap_or_default();
    let chosen = open.iter().find(|w| whole.contains(&w.id)).or(open.first());
    chosen.map(|w| w.id).ok_or_else(|| err!(Unavailable, "no worker is there to write to"))
}

pub async fn truncate(h: &Hadoop, a: &Asker, r: wire::TruncateRequestProto) -> Answer<wire::TruncateResponseProto> {
    let core = &h.core;
    let file = match made_before(core, a)? {
        Some(file) => file,
        None => {
            let op = |path: &AbsPath, resolved: &Resolved, inode: &Inode| {
                if r.new_length == inode.length {
                    return Ok(None);
                }
                if r.new_length > inode.length {
                    let sizes = format!("Current size: {}, truncate size: {}.", inode.length, r.new_length);
                    let message = format!("Cannot truncate to a larger file size. {sizes}");
                    return Err(Thrown::new(ILLEGAL_ARGUMENT, ErrorKind::InvalidArgument, message));
                }
                Ok(Some(journal::Reopen {
                    path: raw(path),
                    changed_index: inode.changed_index,
                    holder: r.client_name.clone(),
                    lease_ttl_ms: core.config.lease_ttl_ms,
                    length: r.new_length,
                    rewrite: layout(inode).block_at(r.new_length).1 < r.new_length,
                    worker_id: maker(core, a, inode, r.new_length)?.get(),
                    to_ufs: to_ufs(resolved, inode),
                }))
            };
            match change(h, a, &r.src, &r.client_name, "TRUNCATE_FILE", op).await? {
                Some(file) => file,
                None => return Ok(wire::TruncateResponseProto { result: true }),
            }
        }
    };
    let inode = core.store.view().inode(file)?.map(|(_, inode)| inode);
    let inode = inode.ok_or_else(|| err!(NotFound, "{} was deleted in the meantime", r.src))?;
    // Sent again, the second change may have been made as well.
    if !inode.completed {
        let (inode, lease) = opened(core, file.get())?;
        if lease.rewritten_as > 0 {
            rewrite(core, &inode, &lease, true).await?;
        }
        core.change(Some(&a.caller(1)), complete_op(&Inode { lease_id: lease.id, ..inode.clone() }, r.new_length, false)).await?;
        core.persist.wake();
        core.syncer.note_looked(file);
    }
    in_store(h, a, &r.src, file.get()).await?;
    Ok(wire::TruncateResponseProto { result: true })
}

pub async fn concat(h: &Hadoop, a: &Asker, r: wire::ConcatRequestProto) -> Answer<wire::ConcatResponseProto> {
    let core = &h.core;
    let illegal = |message: String| Thrown::new(ILLEGAL_ARGUMENT, ErrorKind::InvalidArgument, message);
    if r.srcs.is_empty() {
        return Err(Thrown::new("java.lang.IllegalArgumentException", ErrorKind::InvalidArgument, "No sources given"));
    }
    if let Some(file) = made_before(core, a)? {
        in_store(h, a, &r.trg, file.get()).await?;
        return Ok(wire::ConcatResponseProto {});
    }
    for attempt in 1.. {
        match concat_once(h, a, &r, &illegal).await {
            Err(e) if e.kind == ErrorKind::Busy && attempt < TRIES => {}
            joined => {
                in_store(h, a, &r.trg, joined?.get()).await?;
                break;
            }
        }
    }
    Ok(wire::ConcatResponseProto {})
}

async fn concat_once(h: &Hadoop, a: &Asker, r: &wire::ConcatRequestProto, illegal: &impl Fn(String) -> Thrown) -> Answer<InodeId> {
    let core = &h.core;
    let (path, resolved) = h.find(a, &r.trg).await?;
    let inode = resolved.found(&path)?.inode.clone();
    if inode.folder {
        return Err(Thrown::not_found(format!("Path is not a file: {path}")));
    }
    if !inode.completed {
        return Err(illegal(format!("concat: target file {path} is under construction")));
    }
    let mut sources: Vec<(AbsPath, Inode)> = Vec::new();
    for src in &r.srcs {
        let (source, found) = h.find(a, src).await?;
        let old = found.found(&source)?.inode.clone();
        if old.folder {
            return Err(Thrown::not_found(format!("Path is not a file: {source}")));
        }
        if source.parent() != path.parent() {
            return Err(illegal(format!("Source file {source} is not in the same directory with the target {path}")));
        }
        if old.id == inode.id {
            return Err(illegal(format!("concat: the src file {source} is the same with the target file {path}")));
        }
        if !old.completed || old.length == 0 {
            return Err(illegal(format!("concat: source file {source} is invalid or empty or underConstruction")));
        }
        if old.block_size_bytes > inode.block_size_bytes {
            let (theirs, ours) = (old.block_size_bytes, inode.block_size_bytes);
            return Err(illegal(format!(
                "concat: source file {source} has preferred block size {theirs} which is greater than the target file's preferred block size {ours}"
            )));
        }
        if sources.iter().any(|(_, known)| known.id == old.id) {
            return Err(illegal("concat: at least two of the source files are the same".to_owned()));
        }
        sources.push((source, old));
    }
    let op = journal::Concat {
        path: raw(&path),
        changed_index: inode.changed_index,
        sources: sources.iter().map(|(source, _)| raw(source)).collect(),
        changed_indexes: sources.iter().map(|(_, old)| old.changed_index).collect(),
        to_ufs: to_ufs(&resolved, &inode) || sources.iter().any(|(_, old)| to_ufs(&resolved, old)),
    };
    let files = std::iter::once(inode.id).chain(sources.iter().map(|(_, old)| old.id));
    let _held: Vec<_> = files.map(|id| core.soft.held.hold(InodeId(id))).collect();
    hold(core, &path, &inode, inode.length).await?;
    for (source, old) in &sources {
        hold(core, source, old, old.length).await?;
    }
    let paths: Vec<&AbsPath> = std::iter::once(&path).chain(sources.iter().map(|(source, _)| source)).collect();
    let reply = core.persist.change(core, Some(&a.caller(0)), Op::Concat(op), &paths).await?;
    core.persist.wake();
    core.syncer.note_looked(InodeId(reply.file_id));
    Ok(InodeId(reply.file_id))
}
