//! Workers register and report.

use crate::block::{Noted, tier_name};
use crate::cluster;
use crate::core::Core;
use crate::mount::MountOptions;
use crate::namespace;
use crate::persist::PUBLISH_TTL_MS;
use crate::store::Reader;
use crate::worker::Orders;
use forebay_common::{BlockId, InodeId, Result, WorkerId, clock, counter, err};
use forebay_proto::convert::to_status;
use forebay_proto::journal::BeginPublish;
use forebay_proto::worker_master_server::WorkerMaster;
use forebay_proto::{
    BeginPublishRequest, BeginPublishResponse, FinishTasksRequest, FinishTasksResponse, HeartbeatRequest, HeartbeatResponse, HoldLeaseRequest,
    HoldLeaseResponse, KeyInfo, MountCredentials, RegisterRequest, TakeTasksRequest, TakeTasksResponse,
};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use tonic::{Request, Response, Status};

counter!(UNKNOWN, "forebay_master_unknown_blocks_total", "reported blocks that no file has, and whose deletion was ordered");

pub struct Service(pub Arc<Core>);

impl Service {
    fn admit(&self, secret: &[u8]) -> Result<()> {
        if bool::from(secret.ct_eq(&self.0.cluster_secret)) {
            return Ok(());
        }
        Err(err!(Unauthenticated, "this worker does not know the cluster's secret: give it the same security.cluster_secret_file"))
    }

    fn answer(&self, worker: WorkerId, orders: Orders) -> Result<HeartbeatResponse> {
        let core = &self.0;
        let mut mounts = Vec::new();
        for mount in core.store.view().mounts()? {
            let options = MountOptions::parse(&mount.options, &core.config)?;
            mounts.push(MountCredentials {
                mount_id: mount.id,
                uri: mount.uri,
                read_only: mount.read_only,
                quota_bytes: options.quota_bytes,
                reserved_bytes: options.reserved_bytes,
                options: options.ufs.into_iter().collect(),
            });
        }
        let keys = core.keys.all().into_iter().map(|k| KeyInfo { id: k.id, secret: k.secret.into() }).collect();
        let (pin, unpin): (Vec<_>, Vec<_>) = orders.pins.into_iter().partition(|(_, pinned)| *pinned);
        let ids = |pins: Vec<(u64, bool)>| pins.into_iter().map(|(id, _)| id).collect();
        Ok(HeartbeatResponse {
            register_again: false,
            keys,
            mounts,
            mounts_version: 0,
            delete_blocks: orders.deletes,
            now_ms: clock::now_ms(),
            pin_blocks: ids(pin),
            unpin_blocks: ids(unpin),
            leaving: core.soft.workers.is_leaving(worker),
            settled_blocks: orders.settled,
            cluster_id: core.cluster.id.clone(),
            admits_unnamed: core.cluster.older,
            refused: String::new(),
        })
    }

    fn take(&self, request: &HeartbeatRequest) -> Result<HeartbeatResponse> {
        self.admit(&request.cluster_secret)?;
        let core = &self.0;
        let worker = WorkerId(request.worker_id);
        let Some(mut orders) = core.soft.workers.heartbeat(request) else {
            return Ok(HeartbeatResponse { register_again: true, ..HeartbeatResponse::default() });
        };
        for counter in std::mem::take(&mut orders.increments) {
            core.metrics.add(&counter.name, counter.value);
        }
        core.soft.workers.note_told(worker, false);
        // Before the view is taken: who changes a pin from now on finds these holders.
        for block in request.changed.iter().filter(|b| !b.open) {
            core.soft.blocks.report(worker, BlockId(block.block_id), block.cached_bytes, tier_name(&block.tier));
        }
        let view = core.store.view();
        let counters = view.counters()?;
        let any_pinned = counters.pinned_files > 0;
        let orphan = |id| cluster::never_numbered(&core.cluster, counters.next_block_id, id);
        let keep = |id, bytes| {
            let noted = core.soft.orphans.note(worker, id, bytes);
            if noted == Noted::First {
                tracing::error!(block = %id, %worker, "a worker has only copies that these data of the master know nothing of: newer data were here before. They are kept (fsadmin report)");
            }
            noted != Noted::GivenUp
        };
        for block in request.changed.iter().filter(|b| b.cached_bytes == 0 && !b.open) {
            core.soft.orphans.gone(worker, BlockId(block.block_id));
        }
        for block in request.changed.iter().filter(|b| b.cached_bytes > 0) {
            let id = BlockId(block.block_id);
            let Some(owner) = view.block_owner(id)? else {
                if block.only_copy && orphan(id) && keep(id, block.cached_bytes) {
                    continue;
                }
                UNKNOWN.inc();
                orders.deletes.push(id.get());
                core.soft.blocks.report(worker, id, 0, "MEM");
                continue;
            };
            // A worker that was started again, or missed an order, is told how it is.
            let pinned = any_pinned && view.inode(owner)?.is_some_and(|(_, inode)| inode.pinned);
            if pinned != block.pinned {
                orders.pins.insert(id.get(), pinned);
            }
            if !block.only_copy {
                continue;
            }
            let Some((_, inode)) = view.inode(owner)? else { continue };
            // Bytes that a file is to have later are not those that its store has.
            if inode.persisted && !namespace::has_block(&inode, id) {
                continue;
            }
            if inode.persisted {
                if !core.soft.held.is_held(owner) {
                    orders.settled.push(id.get());
                }
            } else if inode.completed
                && let Some((_, (_, length))) = namespace::blocks(&inode).find(|(b, _)| *b == id)
                && length != block.cached_bytes
            {
                // Ended elsewhere with another length while this worker could not be asked.
                tracing::warn!(block = %id, %worker, length, has = block.cached_bytes, "a block has another length than its file says; it is dropped");
                orders.deletes.push(id.get());
                core.soft.blocks.report(worker, id, 0, "MEM");
            }
        }
        // Left in the middle by their writer: those of a file that is completed, or gone, nobody will go on with.
        for block in request.changed.iter().filter(|b| b.open) {
            let owner = view.block_owner(BlockId(block.block_id))?.map(|owner| view.inode(owner)).transpose()?.flatten();
            let id = BlockId(block.block_id);
            if owner.is_none() && orphan(id) && keep(id, block.cached_bytes) {
                continue;
            }
            if owner.is_none_or(|(_, inode)| inode.completed) {
                orders.deletes.push(block.block_id);
            }
        }
        for file in &request.changed_files {
            tracing::info!(file = file.file_id, "a worker met another version in the under store");
            core.syncer.invalidate(InodeId(file.file_id));
        }
        // Only now: until here the block map did not have all of it.
        core.soft.workers.note_told(worker, request.all_told && request.leaving);
        self.answer(worker, orders)
    }

    async fn hold(&self, request: &HoldLeaseRequest) -> Result<HoldLeaseResponse> {
        self.admit(&request.cluster_secret)?;
        let remaining_ms = self.0.hold_lease(request.file_id, request.lease_id).await?;
        Ok(HoldLeaseResponse { remaining_ms })
    }
}

#[tonic::async_trait]
impl WorkerMaster for Service {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let request = request.into_inner();
        self.admit(&request.cluster_secret).map_err(|e| to_status(&e))?;
        let address = request.address.clone().ok_or_else(|| to_status(&err!(InvalidArgument, "a worker registers without an address")))?;
        let id = WorkerId(address.worker_id);
        if let Err(e) = cluster::admit(&self.0.cluster, &cluster::told(&request)) {
            self.0.soft.blocks.remove_worker(id);
            self.0.soft.orphans.forget_worker(id);
            self.0.soft.tasks.forget_worker(id, false);
            self.0.soft.workers.refuse(&address, e.message());
            return Ok(Response::new(HeartbeatResponse {
                cluster_id: self.0.cluster.id.clone(),
                admits_unnamed: self.0.cluster.older,
                refused: e.message().to_owned(),
                ..HeartbeatResponse::default()
            }));
        }
        tracing::info!(worker = %id, host = address.host, port = address.data_port, "worker registered");
        // Another process than the one that was to leave.
        if self.0.soft.workers.another_was_to_leave(id, request.incarnation) {
            self.0.stay(id).await.map_err(|e| to_status(&e))?;
        }
        self.0.soft.blocks.remove_worker(id);
        self.0.soft.orphans.forget_worker(id);
        self.0.soft.tasks.forget_worker(id, false);
        self.0.soft.workers.register(&request, address);
        self.answer(id, Orders::default()).map(Response::new).map_err(|e| to_status(&e))
    }

    async fn hold_lease(&self, request: Request<HoldLeaseRequest>) -> Result<Response<HoldLeaseResponse>, Status> {
        self.hold(request.get_ref()).await.map(Response::new).map_err(|e| to_status(&e))
    }

    async fn begin_publish(&self, request: Request<BeginPublishRequest>) -> Result<Response<BeginPublishResponse>, Status> {
        let r = request.into_inner();
        self.admit(&r.cluster_secret).map_err(|e| to_status(&e))?;
        let op = BeginPublish { file_id: r.file_id, content_version: r.content_version, mount_id: r.mount_id, key: r.key, ..BeginPublish::default() };
        let reply = self.0.persist.begin(&self.0, WorkerId(r.worker_id), op).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(BeginPublishResponse { lease_id: reply.lease_id, remaining_ms: PUBLISH_TTL_MS }))
    }

    async fn take_tasks(&self, request: Request<TakeTasksRequest>) -> Result<Response<TakeTasksResponse>, Status> {
        let r = request.into_inner();
        self.admit(&r.cluster_secret).map_err(|e| to_status(&e))?;
        let worker = WorkerId(r.worker_id);
        if !self.0.soft.workers.is_incarnation(worker, r.incarnation) {
            return Err(to_status(&err!(Unavailable, "register first")));
        }
        let tasks = self.0.soft.tasks.take(worker, r.room as usize, &r.running).await;
        Ok(Response::new(TakeTasksResponse { tasks }))
    }

    async fn finish_tasks(&self, request: Request<FinishTasksRequest>) -> Result<Response<FinishTasksResponse>, Status> {
        let r = request.into_inner();
        self.admit(&r.cluster_secret).map_err(|e| to_status(&e))?;
        self.0.soft.tasks.finish(WorkerId(r.worker_id), r.outcomes);
        Ok(Response::new(FinishTasksResponse {}))
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        self.take(&request.into_inner()).map(Response::new).map_err(|e| to_status(&e))
    }
}
