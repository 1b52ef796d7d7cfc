//! Reports.

use super::encode;
use crate::core::Core;
use crate::hadoop;
use crate::mount::Mounted;
use crate::namespace;
use crate::store::Reader;
use forebay_common::config::Locality;
use forebay_common::{BlockId, ErrorKind, MountId, Result, WorkerId, clock, err};
use forebay_proto::admin_server::Admin;
use forebay_proto::convert::to_status;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::{
    ClientCounters, ClientCountersDone, DropOrphansRequest, DropOrphansResponse, GetBlockRequest, GetBlockResponse, KubernetesReport, NamedValue,
    PingRequest, PingResponse, ReportRequest, ReportResponse, SetWorkerRequest, SetWorkerResponse, UfsReport, WorkerAddress,
};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// Limit of asking one under store for a report.
const UFS_CHECK_TIMEOUT: Duration = Duration::from_secs(3);

pub struct Service(pub Arc<Core>);

impl Service {
    async fn ufs(&self) -> Result<Vec<UfsReport>> {
        let core = &self.0;
        let mounts = core.store.view().mounts()?;
        let checks = mounts.into_iter().map(|record| async move {
            let checked = match core.soft.mounts.get(&core.store, &core.config, MountId(record.id)) {
                Ok(mounted) => check(&mounted).await,
                Err(e) => Err(e),
            };
            UfsReport {
                mount_id: record.id,
                path: record.path,
                uri: record.uri,
                read_only: record.read_only,
                reachable: checked.is_ok(),
                error: checked.err().map(|e| e.to_string()).unwrap_or_default(),
                unshown_objects: core.syncer.unshown(record.id),
                requests: core.requests_of(MountId(record.id)),
            }
        });
        Ok(futures::future::join_all(checks).await)
    }

    async fn set_worker(&self, request: &SetWorkerRequest) -> Result<SetWorkerResponse> {
        let core = &self.0;
        let workers = core.soft.workers.report();
        let addresses: Vec<&WorkerAddress> = workers.iter().filter_map(|w| w.address.as_ref()).collect();
        let name = |a: &WorkerAddress| format!("{}:{}", a.host, a.data_port);
        let by_id = u64::from_str_radix(&request.worker, 16).ok();
        let known = addresses.iter().find(|a| name(a) == request.worker || Some(a.worker_id) == by_id).map(|a| a.worker_id);
        // One that left and was stopped is known by its id alone.
        let left = || core.store.view().leaving_workers().ok()?.into_iter().map(|(id, _)| id.get()).find(|id| Some(*id) == by_id);
        let worker_id = known.or_else(left).ok_or_else(|| {
            let known: Vec<String> = addresses.iter().map(|a| format!("{} ({:016x})", name(a), a.worker_id)).collect();
            err!(NotFound, "there is no worker {}; there are {}", request.worker, if known.is_empty() { "none".to_owned() } else { known.join(", ") })
        })?;
        let op = journal::SetWorkerState {
            worker_id,
            leaving: request.leaving,
            process: if request.until_gone { core.soft.workers.incarnation(WorkerId(worker_id)) } else { 0 },
        };
        core.change(request.caller.as_ref(), Op::SetWorkerState(op)).await?;
        core.follow_leaving()?;
        Ok(SetWorkerResponse { worker_id })
    }

    /// The file of a block, for who may read it.
    fn block(&self, request: &GetBlockRequest) -> Result<GetBlockResponse> {
        let core = &self.0;
        let who = core.who(request.caller.as_ref())?;
        let view = core.store.view();
        let id = BlockId(request.block_id);
        let unknown = || err!(NotFound, "no file has block {}", request.block_id);
        let owner = view.block_owner(id)?.ok_or_else(unknown)?;
        let path = view.path_of(owner)?;
        let walk = namespace::walk(&view, &path)?;
        let found = walk.found(&path)?;
        // A refusal would say where the file is.
        namespace::check_traverse(&who, &walk, &path)
            .and_then(|()| namespace::check(&who, &found.inode, namespace::READ, &path))
            .map_err(|_| unknown())?;
        let mount = walk.mount.map(|(id, _)| core.soft.mounts.get(&core.store, &core.config, id)).transpose()?;
        let mut status = encode::status(&path, &found.inode, mount.as_deref(), &walk.ufs_key(&path));
        let block = encode::blocks(core, &found.inode, &mut status).into_iter().find(|b| b.id == request.block_id).ok_or_else(unknown)?;
        let workers = core.soft.workers.live().into_iter().map(|w| w.address).collect();
        Ok(GetBlockResponse { status: Some(status), block: Some(block), workers })
    }

    /// Has workers drop what only newer data of this master know.
    fn drop_orphans(&self, request: &DropOrphansRequest) -> Result<DropOrphansResponse> {
        let core = &self.0;
        let who = core.who(request.caller.as_ref())?;
        if !who.superuser {
            return Err(err!(PermissionDenied, "user {} is not a superuser: only those give up blocks", who.user));
        }
        let orphans = core.soft.orphans.give_up();
        let mut dropped = DropOrphansResponse { blocks: orphans.len() as u64, bytes: 0 };
        for (worker, block, bytes) in orphans {
            dropped.bytes += bytes;
            core.soft.workers.queue_delete(worker, block);
        }
        tracing::warn!(user = who.user, blocks = dropped.blocks, bytes = dropped.bytes, "only copies that no file has are given up");
        Ok(dropped)
    }

    fn metrics(&self) -> Vec<NamedValue> {
        let mut all: Vec<NamedValue> = self.0.metrics.report().into_iter().map(|(name, value)| NamedValue { name, value }).collect();
        all.push(NamedValue { name: "Cluster.HadoopCalls".to_owned(), value: hadoop::CALLS.get() });
        all
    }

    async fn gather(&self) -> Result<ReportResponse> {
        let core = &self.0;
        let ufs = self.ufs().await?;
        let view = core.store.view();
        let counters = view.counters()?;
        let applied = crate::apply::read_applied_in(&view)?;
        let disk = nix::sys::statvfs::statvfs(&core.config.data_dir).ok();
        let bytes = |blocks: u64| disk.as_ref().map_or(0, |d| blocks * d.fragment_size());
        let (orphan_blocks, orphan_bytes) = core.soft.orphans.count();
        let mut warnings = Vec::new();
        if core.security.allow_insecure_bind {
            warnings.push("security.allow_insecure_bind is on: identity is 'simple', every client is whoever it says".to_owned());
        }
        if core.cluster_secret.is_empty() && core.security.allow_insecure_bind {
            warnings.push(
                "no security.cluster_secret_file: any process that reaches the RPC port can register as a worker and is given credentials".to_owned(),
            );
        }
        Ok(ReportResponse {
            workers: core.soft.workers.report(),
            metrics: self.metrics(),
            ufs,
            files: counters.files,
            folders: counters.folders,
            started_ms: core.started_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now_ms: clock::now_ms(),
            applied_index: applied.index,
            warnings,
            pending_changes: view.pending()?.len() as u64,
            data_dir_total_bytes: bytes(disk.as_ref().map_or(0, nix::sys::statvfs::Statvfs::blocks)),
            data_dir_free_bytes: bytes(disk.as_ref().map_or(0, nix::sys::statvfs::Statvfs::blocks_available)),
            at_risk: Some(core.persist.at_risk(core)?),
            hadoop_port: u32::from(core.hadoop_port),
            cluster_id: core.cluster.id.clone(),
            orphan_blocks,
            orphan_bytes,
            refused_workers: core.soft.workers.refused_lately(),
            kubernetes: (core.kubernetes_config.locality != Locality::None).then(|| kubernetes(core)),
        })
    }
}

fn kubernetes(core: &Core) -> KubernetesReport {
    let (pods, nodes, error) = core.kubernetes.summary();
    let locality = format!("{:?}", core.kubernetes_config.locality).to_lowercase();
    KubernetesReport { locality, pods: pods as u64, nodes: nodes as u64, error }
}

async fn check(mounted: &Mounted) -> Result<()> {
    match tokio::time::timeout(UFS_CHECK_TIMEOUT, mounted.ufs.check()).await {
        Ok(result) => result,
        Err(_) => Err(forebay_common::Error::new(
            ErrorKind::Timeout,
            format!("{} does not answer within {} s", mounted.ufs.uri(), UFS_CHECK_TIMEOUT.as_secs()),
        )),
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        let state = if self.0.journal.read_barrier().is_ok() { "leader" } else { "not leading" };
        Ok(Response::new(PingResponse { now_ms: clock::now_ms(), version: env!("CARGO_PKG_VERSION").to_owned(), state: state.to_owned() }))
    }

    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        self.0.who(request.get_ref().caller.as_ref()).map_err(|e| to_status(&e))?;
        self.gather().await.map(Response::new).map_err(|e| to_status(&e))
    }

    async fn get_block(&self, request: Request<GetBlockRequest>) -> Result<Response<GetBlockResponse>, Status> {
        self.block(request.get_ref()).map(Response::new).map_err(|e| to_status(&e))
    }

    async fn set_worker(&self, request: Request<SetWorkerRequest>) -> Result<Response<SetWorkerResponse>, Status> {
        Service::set_worker(self, request.get_ref()).await.map(Response::new).map_err(|e| to_status(&e))
    }

    async fn drop_orphans(&self, request: Request<DropOrphansRequest>) -> Result<Response<DropOrphansResponse>, Status> {
        Service::drop_orphans(self, request.get_ref()).map(Response::new).map_err(|e| to_status(&e))
    }

    async fn add_client_counters(&self, request: Request<ClientCounters>) -> Result<Response<ClientCountersDone>, Status> {
        self.0.who(request.get_ref().caller.as_ref()).map_err(|e| to_status(&e))?;
        for counter in request.into_inner().counters {
            self.0.metrics.add(&counter.name, counter.value);
        }
        Ok(Response::new(ClientCountersDone {}))
    }
}
