//! Which workers a client should read from and write to, each with a token for it.

use crate::core::Core;
use crate::locality::Position;
use crate::mount::Mounted;
use crate::namespace::{Who, block_runs};
use crate::source::read_claims;
use crate::worker::WorkerView;
use forebay_common::token::{self, Claims, UfsSource};
use forebay_common::{BlockId, Result, WorkerId, clock, err};
use forebay_proto::store::Inode;
use forebay_proto::{BlockInfo, BlockLocation, WorkerToken, WriteTarget};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Workers named per block that may fetch it, beside those that have it.
const FETCHERS: usize = 2;

/// Where a client calls from: its address, and the node it says it is on.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    pub ip: Option<IpAddr>,
    pub node: String,
}

/// Orders each block's holders (the client's own first), appends who may fetch what is missing, and signs a token per worker.
pub fn for_reading(
    core: &Core,
    who: &Who,
    from: &Origin,
    inode: &Inode,
    source: Option<UfsSource>,
    local: &[u64],
    blocks: &mut [BlockInfo],
) -> Result<(Vec<WorkerToken>, u64)> {
    let all = core.soft.workers.live();
    let position = Position::of(core, from.ip, &from.node, &all);
    // A worker that is to leave still serves what it has, and fetches nothing.
    let views: Vec<WorkerView> = all.iter().filter(|w| !w.leaving).cloned().collect();
    let live: BTreeMap<WorkerId, WorkerView> = all.into_iter().map(|w| (w.id, w)).collect();
    let local: Vec<WorkerId> = local.iter().map(|id| WorkerId(*id)).filter(|id| live.get(id).is_some_and(|w| !w.leaving)).collect();
    let mut needed = BTreeSet::new();
    for block in blocks.iter_mut() {
        block.locations.retain(|l| live.contains_key(&WorkerId(l.worker_id)));
        // The fullest first, a local one before others as full, and then the nearest.
        block.locations.sort_by_cached_key(|l| {
            let id = WorkerId(l.worker_id);
            (std::cmp::Reverse(l.cached_bytes), !local.contains(&id), live.get(&id).map(|w| position.distance(w)))
        });
        if let Some(i) = block.locations.iter().position(|l| local.contains(&WorkerId(l.worker_id)) && l.cached_bytes >= block.length) {
            block.locations[..=i].rotate_right(1);
        }
        if source.is_some() {
            for id in local.iter().copied().chain(position.fetchers(&views, BlockId(block.id), true, FETCHERS)) {
                if !block.locations.iter().any(|l| l.worker_id == id.get()) {
                    block.locations.push(BlockLocation { worker_id: id.get(), tier: String::new(), cached_bytes: 0 });
                }
            }
        }
        needed.extend(block.locations.iter().map(|l| WorkerId(l.worker_id)));
    }
    let mut claims = Claims { ufs: source, ..read_claims(core, inode, who.user.clone()) };
    let expires_at_ms = claims.expires_at_ms;
    let mut tokens = Vec::with_capacity(needed.len());
    for id in needed {
        claims.worker_id = id.get();
        let Some(view) = live.get(&id) else { continue };
        tokens.push(WorkerToken { address: Some(view.address.clone()), token: core.keys.sign(&claims)?.into() });
    }
    Ok((tokens, expires_at_ms))
}

/// The worker that a new file is written to: the client's own, else the one on its machine, else the one with most room.
pub fn for_writing(core: &Core, from: &Origin, local: &[u64], avoid: &[u64]) -> Result<WorkerView> {
    let live = core.soft.workers.live();
    let position = Position::of(core, from.ip, &from.node, &live);
    let open = |w: &&WorkerView| !w.leaving && !avoid.contains(&w.id.get());
    live.iter()
        .filter(open)
        .find(|w| local.contains(&w.id.get()))
        .or_else(|| live.iter().filter(open).find(|w| !w.address.node.is_empty() && position.is_here(w)))
        .or_else(|| live.iter().filter(open).max_by_key(|w| w.free_bytes))
        .cloned()
        .ok_or_else(|| err!(Unavailable, "no worker is there to write to: start one with `forebay worker`, or wait for it to register"))
}

/// Where, under which lease and into which blocks a client writes.
pub fn write_target(
    core: &Core,
    who: &Who,
    inode: &Inode,
    mount: Option<&Mounted>,
    key: Vec<u8>,
    worker: &WorkerView,
    new_blocks: Vec<u64>,
) -> Result<WriteTarget> {
    let source = match mount {
        Some(mount) if inode.to_ufs && !inode.asynchronous => Some(UfsSource { mount_id: mount.id.get(), key, ..UfsSource::default() }),
        _ => None,
    };
    let claims = Claims {
        file_id: inode.id,
        blocks: block_runs(inode),
        block_size_bytes: inode.block_size_bytes,
        page_size_bytes: inode.page_size_bytes,
        rights: token::WRITE,
        principal: who.user.clone(),
        worker_id: worker.id.get(),
        expires_at_ms: clock::now_ms() + core.config.token_ttl_ms,
        ufs: source,
        write_cached: inode.cached,
        lease_id: inode.lease_id,
        mount_id: mount.map_or(0, |m| m.id.get()),
        ..Claims::default()
    };
    Ok(WriteTarget {
        file_id: inode.id,
        lease_id: inode.lease_id,
        lease_ttl_ms: core.config.lease_ttl_ms,
        worker: Some(worker.address.clone()),
        token: core.keys.sign(&claims)?.into(),
        block_ids: new_blocks,
    })
}
