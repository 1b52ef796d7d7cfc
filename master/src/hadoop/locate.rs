//! Where blocks are, as a caller should see it: the one place that builds located blocks.
//!
//! `crate::locality` says how near a block's workers are to the caller, and by which names they are told: the nearest first, the fullest copy of those as near. A
//! block that nobody has names the workers that should fetch it. Each located block carries a token for exactly that block on exactly those workers.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::recovery;
use crate::core::Core;
use crate::locality::{Name, Position};
use crate::mount::{self, Resolved};
use crate::namespace::{self, READ, block_ids};
use crate::source;
use crate::store::Reader;
use crate::worker::WorkerView;
use forebay_common::config::Locality;
use forebay_common::token::{BlockRun, Claims, UfsSource};
use forebay_common::{AbsPath, BlockId, InodeId, Result, WorkerId, clock};
use forebay_hdfs::hadoop::common::TokenProto;
use forebay_hdfs::hadoop::hdfs::{self as wire, datanode_info_proto::AdminState};
use forebay_proto::TierUsage;
use forebay_proto::store::{Inode, Lease};

/// All blocks are of one pool, the cluster's: Hadoop's clients keep descriptors of blocks by pool and number. What its name begins with.
const BLOCK_POOL: &str = "BP-";
/// That of clusters that are older than their ids: streams that were open while such a one got its id go on.
const OLDER_BLOCK_POOL: &str = "BP-forebay-1";
/// All blocks that are whole have it: an id never changes its meaning, so no stamp is needed to tell two contents apart. Greater ones are drawn only
/// while a pipeline is recovered, to tell the workers that go on from those that do not.
pub const GENERATION_STAMP: u64 = crate::apply::FIRST_STAMP;
/// Workers named for a block that nobody has.
const FETCHERS: usize = 2;
/// Workers named for a block.
const LOCATIONS_MAX: usize = 8;
/// Located blocks of one answer.
const BLOCKS_PER_ANSWER: usize = 20_000;
/// A worker that has a block, or should fetch it.
struct Candidate<'a> {
    worker: &'a WorkerView,
    /// Bytes of the block that it has.
    cached_bytes: u64,
    /// It has all of the block, in memory.
    in_memory: bool,
}

/// A worker as one block tells it.
pub struct Told<'a> {
    pub worker: &'a WorkerView,
    pub in_memory: bool,
    pub name: Name,
}

impl<'a> Told<'a> {
    /// By its own name.
    pub fn own(worker: &'a WorkerView) -> Told<'a> {
        Told { worker, in_memory: false, name: Name::Own }
    }

    fn datanode(&self) -> wire::DatanodeInfoProto {
        let mut info = datanode(self.worker, &[]);
        match &self.name {
            Name::Own => {}
            // The same DataNode: a client that finds it dead finds all its names dead.
            Name::Host(host) => info.id.host_name.clone_from(host),
            // Another one: where its socket fails, the worker's own address is still good.
            Name::Here(ip) => {
                info.id.ip_addr = ip.to_string();
                info.id.host_name = ip.to_string();
                info.id.datanode_uuid.push_str(BY_SOCKET);
            }
        }
        info
    }
}

/// Ends the id of a worker that is told under its caller's address.
const BY_SOCKET: &str = "-socket";

/// A worker as a DataNode. `tiers`: where they are known.
pub fn datanode(worker: &WorkerView, tiers: &[TierUsage]) -> wire::DatanodeInfoProto {
    let address = &worker.address;
    let capacity: u64 = tiers.iter().map(|t| t.total_bytes).sum();
    let used: u64 = tiers.iter().map(|t| t.used_bytes).sum();
    let host = if address.hadoop_host.is_empty() { &address.host } else { &address.hadoop_host };
    wire::DatanodeInfoProto {
        id: wire::DatanodeIdProto {
            ip_addr: address.ip.clone(),
            host_name: host.clone(),
            datanode_uuid: uuid(worker.id),
            xfer_port: address.hadoop_port,
            info_port: address.web_port,
            ipc_port: address.hadoop_ipc_port,
            info_secure_port: None,
        },
        capacity: Some(capacity),
        dfs_used: Some(used),
        remaining: Some(capacity.saturating_sub(used)),
        block_pool_used: Some(used),
        last_update: Some(clock::now_ms()),
        location: Some(worker.rack.clone()),
        admin_state: Some(if worker.leaving { AdminState::DecommissionInprogress } else { AdminState::Normal } as i32),
        num_blocks: Some(u32::try_from(tiers.iter().map(|t| t.blocks).sum::<u64>()).unwrap_or(u32::MAX)),
        ..wire::DatanodeInfoProto::default()
    }
}

/// A worker's id as a DataNode's.
pub fn uuid(worker: WorkerId) -> String {
    format!("forebay-{:016x}", worker.get())
}

/// The worker of a DataNode's id.
pub fn worker_of(uuid: &str) -> Option<WorkerId> {
    let id = uuid.strip_prefix("forebay-")?;
    u64::from_str_radix(id.strip_suffix(BY_SOCKET).unwrap_or(id), 16).ok().map(WorkerId)
}

/// A block as clients name it.
pub fn extended(core: &Core, block: BlockId, length: u64) -> wire::ExtendedBlockProto {
    let pool_id = if core.cluster.older { OLDER_BLOCK_POOL.to_owned() } else { format!("{BLOCK_POOL}{}", core.cluster.id) };
    wire::ExtendedBlockProto { pool_id, block_id: block.get(), generation_stamp: GENERATION_STAMP, num_bytes: Some(length) }
}

/// What a token for one block of a file says, but for its right; the block begins at `offset`, and may have its file's block size.
pub fn block_claims(core: &Core, inode: &Inode, offset: u64, block: BlockId, user: &str, workers: &[WorkerId]) -> Claims {
    Claims {
        blocks: vec![BlockRun { first: block.get(), count: 1 }],
        first_offset_bytes: offset,
        short_blocks: Vec::new(),
        worker_id: workers.first().map_or(0, |w| w.get()),
        other_workers: workers.iter().skip(1).map(|w| w.get()).collect(),
        ..source::read_claims(core, inode, user.to_owned())
    }
}

/// A located block, with a token that says `claims`, or with none. Errors: tokens cannot be signed.
pub fn located(
    core: &Core,
    claims: Option<&Claims>,
    offset: u64,
    block: wire::ExtendedBlockProto,
    at: &[Told<'_>],
) -> Result<wire::LocatedBlockProto> {
    let token: bytes::Bytes = claims.map(|claims| core.keys.sign(claims)).transpose()?.unwrap_or_default().into();
    Ok(wire::LocatedBlockProto {
        b: block,
        offset,
        locs: at.iter().map(Told::datanode).collect(),
        corrupt: false,
        // Clients echo it unread.
        block_token: TokenProto { identifier: token, password: bytes::Bytes::new(), kind: "HDFS_BLOCK_TOKEN".to_owned(), service: String::new() },
        is_cached: at.iter().map(|told| told.in_memory).collect(),
        storage_types: at.iter().map(|_| wire::StorageTypeProto::Disk as i32).collect(),
        storage_i_ds: at.iter().map(|told| storage(told.worker.id)).collect(),
        ..wire::LocatedBlockProto::default()
    })
}

/// The one storage that a worker shows to Hadoop.
pub fn storage(worker: WorkerId) -> String {
    format!("DS-{:016x}", worker.get())
}

/// What is asked of a file's blocks.
struct Asked<'a> {
    core: &'a Core,
    asker: &'a Asker,
    inode: &'a Inode,
    source: Option<UfsSource>,
    /// Without it no token is signed.
    readable: bool,
    /// It is about to read: told by a call of its own, not by a listing.
    reads: bool,
}

impl Asked<'_> {
    /// The blocks that touch `offset..offset + length`.
    fn blocks(&self, offset: u64, length: u64) -> Result<Vec<wire::LocatedBlockProto>> {
        let end = offset.saturating_add(length).min(self.inode.length);
        let live: Vec<WorkerView> = self.core.soft.workers.live().into_iter().filter(|w| w.address.hadoop_port > 0).collect();
        let position = Position::of(self.core, Some(self.asker.ip), "", &live);
        let open: Vec<WorkerView> = live.iter().filter(|w| !w.leaving).cloned().collect();
        let touched = namespace::blocks(self.inode).skip_while(|(_, (at, length))| at + length <= offset).take_while(|(_, (at, _))| *at < end);
        // More than that are asked for again, from where the answer ends.
        touched.take(BLOCKS_PER_ANSWER).map(|(block, span)| self.block(&position, &live, &open, block, span)).collect()
    }

    fn block(
        &self,
        position: &Position<'_>,
        live: &[WorkerView],
        open: &[WorkerView],
        block: BlockId,
        (offset, length): (u64, u64),
    ) -> Result<wire::LocatedBlockProto> {
        let holders = self.core.soft.blocks.holders(block);
        let mut candidates: Vec<Candidate<'_>> = holders
            .iter()
            .filter_map(|h| {
                let worker = live.iter().find(|w| w.id == h.worker)?;
                Some(Candidate { worker, cached_bytes: h.cached_bytes, in_memory: h.tier == "MEM" && h.cached_bytes >= length })
            })
            .collect();
        if self.source.is_some() && candidates.iter().all(|c| c.cached_bytes < length) {
            for id in position.fetchers(open, block, self.reads, FETCHERS) {
                if let Some(worker) = live.iter().find(|w| w.id == id)
                    && candidates.iter().all(|c| c.worker.id != id)
                {
                    candidates.push(Candidate { worker, cached_bytes: 0, in_memory: false });
                }
            }
        }
        candidates.sort_by_cached_key(|c| position.rank(c.worker, c.cached_bytes, self.reads));
        candidates.truncate(LOCATIONS_MAX);
        let by_rank: Vec<&WorkerView> = candidates.iter().map(|c| c.worker).collect();
        let mut told: Vec<Told<'_>> = position
            .tell(block, &by_rank)
            .into_iter()
            .map(|(i, name)| Told { worker: candidates[i].worker, in_memory: candidates[i].in_memory, name })
            .collect();
        if let Some(first) = candidates.first().filter(|c| self.reads && c.cached_bytes >= length)
            && let Some(name) = position.by_socket(first.worker)
        {
            told.insert(0, Told { worker: first.worker, in_memory: first.in_memory, name });
        }
        let workers: Vec<WorkerId> = candidates.iter().map(|c| c.worker.id).collect();
        let claims = Claims {
            ufs: self.source.clone(),
            short_blocks: if length < self.inode.block_size_bytes { vec![0, length] } else { Vec::new() },
            ..block_claims(self.core, self.inode, offset, block, &self.asker.user, &workers)
        };
        located(self.core, self.readable.then_some(&claims), offset, extended(self.core, block, length), &told)
    }

    /// The block that is being written: its workers say how long it is.
    fn open_block(&self, lease: &Lease, offset: u64, block: BlockId) -> Result<Option<wire::LocatedBlockProto>> {
        let present = self.core.soft.workers.present();
        let at: Vec<Told<'_>> = present.iter().filter(|w| is_written_to(lease, w.id)).map(Told::own).collect();
        if at.is_empty() {
            return Ok(None);
        }
        let workers: Vec<WorkerId> = at.iter().map(|told| told.worker.id).collect();
        let claims = Claims { lease_id: lease.id, ..block_claims(self.core, self.inode, offset, block, &self.asker.user, &workers) };
        located(self.core, self.readable.then_some(&claims), offset, extended(self.core, block, 0), &at).map(Some)
    }
}

/// The blocks of a file that touch a range, with tokens for who may read it.
fn blocks_of(
    h: &Hadoop,
    a: &Asker,
    path: &AbsPath,
    inode: &Inode,
    resolved: &Resolved,
    key: Vec<u8>,
    range: Option<(u64, u64)>,
) -> Result<wire::LocatedBlocksProto, Thrown> {
    let source = match &resolved.mount {
        Some(mount) if inode.persisted => Some(UfsSource {
            mount_id: mount.id.get(),
            previous_key: mount::previous_key(&h.core.store.view(), resolved.walk.mount, &key)?,
            key,
            fingerprint: inode.fingerprint.clone(),
        }),
        _ => None,
    };
    // Whoever lists a folder is told where its files are, and gets tokens only for those that may be read.
    let readable = namespace::check(&h.core.identity.who(&a.user), inode, READ, path).is_ok();
    let lease = if inode.completed { None } else { h.core.store.view().lease(inode.lease_id)?.filter(|l| !l.holder.is_empty() && !l.publishing) };
    let (known, open) = match &lease {
        Some(lease) => so_far(h, inode, lease),
        None => (inode.clone(), None),
    };
    let asked = Asked { core: &h.core, asker: a, inode: &known, source, readable, reads: range.is_some() };
    let (offset, length) = range.unwrap_or((0, u64::MAX));
    let blocks = asked.blocks(offset, length)?;
    let last_block = match (&lease, open) {
        (Some(lease), Some((offset, block))) => asked.open_block(lease, offset, block)?,
        _ => match known.length.checked_sub(1) {
            Some(at) => asked.blocks(at, 1)?.pop(),
            None => None,
        },
    };
    Ok(wire::LocatedBlocksProto {
        file_length: known.length,
        blocks,
        under_construction: !inode.completed,
        is_last_block_complete: open.is_none(),
        last_block,
        file_encryption_info: None,
        ec_policy: None,
    })
}

/// Whether the last block of a file is written to a worker.
fn is_written_to(lease: &Lease, worker: WorkerId) -> bool {
    lease.worker_id == worker.get() || lease.other_workers.contains(&worker.get())
}

/// What there is of a file that a Hadoop client is writing: with the length of its ended blocks, and the one that is open with where it begins.
fn so_far(h: &Hadoop, inode: &Inode, lease: &Lease) -> (Inode, Option<(u64, BlockId)>) {
    let blocks: Vec<BlockId> = block_ids(inode).collect();
    let Some((last, before)) = blocks.split_last().filter(|_| recovery::has_open_block(inode)) else { return (inode.clone(), None) };
    let before = namespace::layout(inode).offset(before.len() as u64);
    let ended = h.core.soft.blocks.holders(*last).iter().find(|held| is_written_to(lease, held.worker)).map(|held| held.cached_bytes);
    match ended {
        Some(length) => (Inode { length: before + length, ..inode.clone() }, None),
        None => (Inode { length: before, ..inode.clone() }, Some((before, *last))),
    }
}

/// All blocks of the file that was resolved.
pub fn all_blocks(h: &Hadoop, a: &Asker, path: &AbsPath, inode: &Inode, resolved: &Resolved) -> Result<wire::LocatedBlocksProto, Thrown> {
    blocks_of(h, a, path, inode, resolved, resolved.walk.ufs_key(path), None)
}

/// All blocks of a file in the folder that was resolved.
pub fn all_blocks_below(h: &Hadoop, a: &Asker, path: &AbsPath, inode: &Inode, folder: &Resolved) -> Result<wire::LocatedBlocksProto, Thrown> {
    // Something mounted there is not below the folder's store; it is a folder, and has no blocks.
    let stored_at = if inode.other_names.is_empty() { path.clone() } else { h.core.store.view().path_of(InodeId(inode.id))? };
    blocks_of(h, a, path, inode, folder, folder.walk.ufs_key(&stored_at), None)
}

pub async fn get_block_locations(
    h: &Hadoop,
    a: &Asker,
    r: wire::GetBlockLocationsRequestProto,
) -> Result<wire::GetBlockLocationsResponseProto, Thrown> {
    let kubernetes = &h.core.kubernetes_config;
    if kubernetes.java_short_circuit && kubernetes.locality != Locality::None {
        // This answer says whether it is to try the socket.
        h.core.kubernetes.await_pod(a.ip).await;
    }
    let (path, resolved) = h.find(a, &r.src).await?;
    let inode = resolved.found(&path)?.inode.clone();
    if inode.folder {
        return Err(Thrown::not_found(format!("Path is not a file: {path}")));
    }
    namespace::check(&h.core.identity.who(&a.user), &inode, READ, &path)?;
    let key = resolved.walk.ufs_key(&path);
    let locations = blocks_of(h, a, &path, &inode, &resolved, key, Some((r.offset, r.length)))?;
    Ok(wire::GetBlockLocationsResponseProto { locations: Some(locations) })
}
