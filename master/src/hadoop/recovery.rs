//! Clients and workers that fail in the middle of a block: leases that are renewed, end, or are taken away; pipelines that go on with other workers.
//!
//! A lease that runs out, or is taken away, completes the file with what workers have of it, once those that were writing its last block have ended that as it
//! stands. Invariants: nothing that was flushed is cut off while a worker that has it can be asked, and when none can any more, that is said, and counted; a
//! worker that a pipeline went on without has an older stamp, and is not asked for the block any more.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::locate;
use super::writing::{Answer, LEASE_EXPIRED, candidates, complete_op, writable};
use crate::core::Core;
use crate::namespace::{self, block_ids};
use crate::source;
use crate::store::Reader;
use crate::worker::WorkerView;
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId, Result, WorkerId, clock, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::{Inode, Lease};
use forebay_proto::task::What;
use forebay_proto::{RewriteBlock, SealBlock};
use std::time::Duration;

counter!(RECOVERED, "forebay_master_hadoop_leases_recovered_total", "files of Hadoop clients that were completed because their lease was over");
counter!(
    CUT,
    "forebay_master_hadoop_files_cut_total",
    "files of Hadoop clients that were completed without bytes that had been flushed, because no worker has them"
);
counter!(PIPELINES, "forebay_master_hadoop_pipelines_recovered_total", "blocks of Hadoop clients that are gone on with after a worker failed");

/// How long a lease may be over before its file is completed without the worker that has its last blocks: as HDFS's hard limit.
const GIVEN_UP_AFTER_MS: u64 = 20 * 60 * 1_000;
/// How long a worker may take to end a block.
const SEAL_WAIT: Duration = Duration::from_secs(20);
/// How long it may take to make a block of another one.
const REWRITE_WAIT: Duration = Duration::from_secs(50);

pub async fn renew_lease(h: &Hadoop, a: &Asker, r: wire::RenewLeaseRequestProto) -> Answer<wire::RenewLeaseResponseProto> {
    let leases = h.core.store.view().leases()?;
    let its = |l: &Lease| !l.publishing && !l.holder.is_empty() && l.holder == r.client_name && l.principal == a.user;
    let lease_ids: Vec<u64> = leases.iter().filter(|l| its(l)).map(|l| l.id).collect();
    if !lease_ids.is_empty() {
        h.core.own_change(Op::RenewLease(journal::RenewLease { lease_ids })).await?;
    }
    Ok(wire::RenewLeaseResponseProto {})
}

/// The file that a client is writing a block of, as its last one.
fn written(core: &Core, a: &Asker, block: &wire::ExtendedBlockProto, holder: &str) -> Answer<(Inode, Lease)> {
    let view = core.store.view();
    let id = BlockId(block.block_id);
    let inode = view.block_owner(id)?.map(|owner| view.inode(owner)).transpose()?.flatten().map(|(_, inode)| inode);
    let inode = inode.filter(|inode| !inode.completed && block_ids(inode).last() == Some(id));
    let lease = inode.as_ref().map(|inode| view.lease(inode.lease_id)).transpose()?.flatten();
    match (inode, lease.filter(|l| !l.publishing && l.holder == holder && l.principal == a.user)) {
        (Some(inode), Some(lease)) => Ok((inode, lease)),
        _ => {
            let message = format!("block {id} is not the last one of a file that {holder} is writing");
            Err(Thrown::new(LEASE_EXPIRED, ErrorKind::Expired, message))
        }
    }
}

fn pipeline(lease: &Lease) -> impl Iterator<Item = WorkerId> + '_ {
    std::iter::once(lease.worker_id).chain(lease.other_workers.iter().copied()).map(WorkerId)
}

/// A new stamp, under which the block is gone on with, and a token to do so.
pub async fn update_block_for_pipeline(
    h: &Hadoop,
    a: &Asker,
    r: wire::UpdateBlockForPipelineRequestProto,
) -> Answer<wire::UpdateBlockForPipelineResponseProto> {
    let core = &h.core;
    let (inode, lease) = written(core, a, &r.block, &r.client_name)?;
    let op = journal::SetPipeline { file_id: inode.id, lease_id: lease.id, block_id: r.block.block_id, ..journal::SetPipeline::default() };
    let reply = core.change(Some(&a.caller(0)), Op::SetPipeline(op)).await?;
    let live = core.soft.workers.live();
    let workers: Vec<WorkerView> = pipeline(&lease).filter_map(|id| live.iter().find(|w| w.id == id).cloned()).collect();
    let block = wire::ExtendedBlockProto { generation_stamp: reply.generation_stamp, ..r.block };
    Ok(wire::UpdateBlockForPipelineResponseProto { block: writable(core, a, &inode, lease.id, block, &workers)? })
}

/// The workers that go on with the block. The others are not asked for it any more.
pub async fn update_pipeline(h: &Hadoop, a: &Asker, r: wire::UpdatePipelineRequestProto) -> Answer<wire::UpdatePipelineResponseProto> {
    let core = &h.core;
    let (inode, lease) = written(core, a, &r.new_block, &r.client_name)?;
    let worker_ids: Vec<u64> = r.new_nodes.iter().filter_map(|node| locate::worker_of(&node.datanode_uuid)).map(WorkerId::get).collect();
    if worker_ids.is_empty() || worker_ids.len() != r.new_nodes.len() || r.new_block.block_id != r.old_block.block_id {
        return Err(Thrown::io("a pipeline of workers that are not known, or another block"));
    }
    let (block_id, generation_stamp) = (r.new_block.block_id, r.new_block.generation_stamp);
    let op = journal::SetPipeline { file_id: inode.id, lease_id: lease.id, block_id, generation_stamp, worker_ids };
    core.change(Some(&a.caller(0)), Op::SetPipeline(op)).await?;
    PIPELINES.inc();
    Ok(wire::UpdatePipelineResponseProto {})
}

/// Workers that may take the place of those that failed.
pub async fn get_additional_datanode(
    h: &Hadoop,
    a: &Asker,
    r: wire::GetAdditionalDatanodeRequestProto,
) -> Answer<wire::GetAdditionalDatanodeResponseProto> {
    let core = &h.core;
    let (inode, lease) = written(core, a, &r.blk, &r.client_name)?;
    let known = r.existings.iter().chain(&r.excludes).filter_map(|node| locate::worker_of(&node.id.datanode_uuid));
    let known: Vec<WorkerId> = known.collect();
    let mut more = candidates(core, a, &known);
    // In the order in which the block's token names them.
    let order = crate::worker::fetch_order(&more, BlockId(r.blk.block_id));
    more.sort_by_key(|w| order.iter().position(|id| *id == w.id));
    more.truncate(r.num_additional_nodes as usize);
    if more.is_empty() {
        return Err(Thrown::io(format!("no other worker is there that could take the place of one that failed: {} are excluded", known.len())));
    }
    let live = core.soft.workers.live();
    let existing = r.existings.iter().filter_map(|node| locate::worker_of(&node.id.datanode_uuid));
    let mut workers: Vec<WorkerView> = existing.filter_map(|id| live.iter().find(|w| w.id == id).cloned()).collect();
    workers.extend(more);
    Ok(wire::GetAdditionalDatanodeResponseProto { block: writable(core, a, &inode, lease.id, r.blk, &workers)? })
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

/// Completes the file of a lease that is over, or is taken away, with what workers have of it.
///
/// Errors: `Unavailable` while a worker that has blocks of it cannot be asked, or bytes that were flushed are on none; it is tried again until the lease is
/// over for `GIVEN_UP_AFTER_MS`.
pub async fn recover(core: &Core, lease: &Lease, expired_only: bool) -> Result<()> {
    let found = core.store.view().inode(InodeId(lease.file_id))?.filter(|(_, i)| i.lease_id == lease.id && !i.completed);
    let Some((_, inode)) = found else { return Ok(()) };
    let given_up = lease.expires_at_ms + GIVEN_UP_AFTER_MS < clock::now_ms();
    let blocks: Vec<BlockId> = block_ids(&inode).collect();
    let mut lost = String::new();
    // Blocks before the last were ended by their writer; the last one too, where the one after it was given up, or none was begun.
    let ended = if has_open_block(&inode) { blocks.len() - 1 } else { blocks.len() };
    let (before, open) = blocks.split_at(ended);
    let mut length = namespace::layout(&inode).offset(ended as u64);
    for (i, block) in before.iter().enumerate() {
        let sized = Inode { length: u64::MAX, ..inode.clone() };
        let (offset, wanted) = namespace::layout(&sized).span(i as u64);
        if source::whole_on(core, &core.soft.workers.present(), *block, wanted).is_empty() {
            lost = format!("block {block}, which was ended, is on no worker that is there");
            length = offset;
            break;
        }
    }
    if let (true, Some(last)) = (lost.is_empty(), open.first()) {
        match last_block(core, &inode, lease, *last).await {
            Ok(bytes) => {
                let flushed = if lease.flushed_block == last.get() { lease.flushed_length.max(1) } else { 0 };
                let kept = if lease.rewritten_as == last.get() { lease.rewritten_length } else { 0 };
                if bytes < flushed.max(kept) {
                    lost = format!("{bytes} bytes of its last block {last} are there, and {flushed} at least were flushed");
                }
                length += bytes;
            }
            Err(e) => lost = format!("a worker that its last block was written to cannot be asked: {}", e.message()),
        }
    }
    let path: Option<AbsPath> = core.store.view().path_of(InodeId(inode.id)).ok();
    if !lost.is_empty() {
        if !given_up {
            return Err(err!(Unavailable, "file {} is not completed yet: {lost}", inode.id));
        }
        CUT.inc();
        tracing::error!(
            ?path,
            holder = lease.holder,
            length,
            lost,
            "a file is completed without bytes that were acknowledged: no worker has brought them back"
        );
    }
    RECOVERED.inc();
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

/// Whether the last block of a file under construction may be open: its length does not count it yet.
pub fn has_open_block(inode: &Inode) -> bool {
    let count = block_ids(inode).count() as u64;
    count > 0 && namespace::layout(inode).offset(count) != inode.length
}

/// Ends the last block of a file on the workers that have it; how many bytes it has then, the same on all that keep it.
///
/// Errors: of those of its pipeline none that answers has it, and one does not answer.
async fn last_block(core: &Core, inode: &Inode, lease: &Lease, last: BlockId) -> Result<u64> {
    let (mut length, mut silent) = (0, None);
    for worker in pipeline(lease).filter(|w| w.get() > 0) {
        match seal(core, worker, last, lease.generation_stamp, length).await {
            Ok(bytes) => length = length.max(bytes),
            Err(e) => silent = Some(e),
        }
    }
    if length == 0 && silent.is_none() && lease.rewritten_as == last.get() {
        // It was never begun: what stays of the block that it replaces.
        return rewrite(core, inode, lease, true).await;
    }
    match silent {
        Some(e) if length == 0 => Err(e),
        _ => Ok(length),
    }
}

/// Has a worker end a block, as it stands or with `length` bytes, and notes what it has of it then.
async fn seal(core: &Core, worker: WorkerId, block: BlockId, generation_stamp: u64, length: u64) -> Result<u64> {
    if !core.soft.workers.present().iter().any(|w| w.id == worker) {
        return Err(err!(Unavailable, "worker {worker} is not there"));
    }
    let submitted = core.soft.tasks.submit(worker, What::Seal(SealBlock { block_id: block.get(), generation_stamp, length }));
    let sealed = tokio::time::timeout(SEAL_WAIT, submitted.outcome()).await.map_err(|_| err!(Timeout, "worker {worker} does not answer"))??;
    if sealed.bytes > 0 {
        let tier = core.soft.blocks.holders(block).iter().find(|h| h.worker == worker).map_or("MEM", |h| h.tier);
        core.soft.blocks.report(worker, block, sealed.bytes, tier);
    }
    Ok(sealed.bytes)
}

/// Has the block of a file made that replaces another one: whole with `seal`, else for its writer to go on with. Returns its length, which is more where it was
/// begun before.
pub async fn rewrite(core: &Core, inode: &Inode, lease: &Lease, seal: bool) -> Result<u64> {
    let old = BlockId(lease.rewritten_block);
    let new = BlockId(lease.rewritten_as);
    let live = core.soft.workers.live();
    let whole = source::whole_on(core, &live, old, lease.rewritten_length);
    let holder = whole.first().and_then(|id| live.iter().find(|w| w.id == *id));
    let holder = holder.ok_or_else(|| err!(Unavailable, "block {old}, which is gone on with, is on no worker that is there"))?;
    let maker = live.iter().find(|w| w.id.get() == lease.worker_id).unwrap_or(holder);
    let view = core.store.view();
    let mount_id = namespace::walk(&view, &view.path_of(InodeId(inode.id))?)?.mount.map_or(0, |(id, _)| id.get());
    drop(view);
    // A token for the old block, which its file does not name any more; it is there whole, so that its length is what its worker has.
    let length = core.soft.blocks.holders(old).iter().find(|h| h.worker == holder.id).map_or(0, |h| h.cached_bytes);
    let of_old = Inode { block_runs: vec![old.get(), 1], short_blocks: Vec::new(), length, ..inode.clone() };
    let order = RewriteBlock {
        source: Some(source::block_source(core, &of_old, old, holder)?),
        length: lease.rewritten_length,
        block_id: new.get(),
        file_id: inode.id,
        lease_id: lease.id,
        capacity: inode.block_size_bytes,
        page_size_bytes: inode.page_size_bytes,
        mount_id,
        seal,
    };
    let submitted = core.soft.tasks.submit(maker.id, What::Rewrite(order));
    let made = tokio::time::timeout(REWRITE_WAIT, submitted.outcome()).await.map_err(|_| err!(Timeout, "worker {} does not answer", maker.id))??;
    if seal {
        core.soft.blocks.report(maker.id, new, made.bytes, "MEM");
    }
    Ok(made.bytes)
}
