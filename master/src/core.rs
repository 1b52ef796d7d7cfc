//! `Core`: the parts of one master, shared by its services and drivers.

use crate::apply::Applied;
use crate::block::{BlockMap, Orphans};
use crate::driver::PendingDriver;
use crate::held::Held;
use crate::identity::Identity;
use crate::job::Jobs;
use crate::journal::Journal;
use crate::kubernetes;
use crate::locks::Waiting;
use crate::metrics::ClusterMetrics;
use crate::mount::{MountTable, Syncer};
use crate::namespace::Who;
use crate::persist::Persist;
use crate::store::{Cf, Reader, Store, reply_key};
use crate::tasks::Tasks;
use crate::worker::{Registry, TokenKeys};
use forebay_common::config::{KubernetesConfig, MasterConfig, SecurityConfig};
use forebay_common::{BlockId, MountId, Result, WorkerId, clock, err};
use forebay_proto::journal::{Command, RenewLease, Reply, SetWorkerState, command::Op};
use forebay_proto::store::Cluster;
use forebay_proto::{Caller, NamedValue};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Soft state that follows applied commands.
#[derive(Default)]
pub struct Soft {
    /// Who has which block.
    pub blocks: BlockMap,
    /// What workers have that only newer data of this master know.
    pub orphans: Orphans,
    /// Workers, by heartbeat.
    pub workers: Registry,
    /// Opened under stores.
    pub mounts: MountTable,
    /// What workers are to do.
    pub tasks: Tasks,
    /// Files that are about to be taken out of their under stores.
    pub held: Held,
    /// Calls that wait for locks.
    pub locks: Waiting,
    /// Something wishes for other copies than there are.
    pub replicas_dirty: AtomicBool,
}

impl Applied for Soft {
    fn applied(&self, command: &Command, reply: &Reply) {
        for (first, count) in reply.freed_first.iter().zip(&reply.freed_count) {
            for (block, worker) in self.blocks.remove_run(BlockId(*first), *count) {
                self.workers.queue_delete(worker, block);
            }
        }
        for run in reply.settled.chunks_exact(2) {
            for id in run[0]..run[0].saturating_add(run[1]) {
                self.blocks.holders(BlockId(id)).iter().for_each(|h| self.workers.queue_settled(h.worker, BlockId(id)));
            }
        }
        reply.unlocked.iter().for_each(|file| self.locks.wake(*file));
        if matches!(command.op, Some(Op::SetReplication(_) | Op::Complete(_))) {
            self.replicas_dirty.store(true, Ordering::Relaxed);
        }
        if matches!(command.op, Some(Op::AddMount(_) | Op::RemoveMount(_) | Op::UpdateMount(_))) {
            self.mounts.forget_all();
        }
    }
}

/// Everything a service needs.
pub struct Core {
    pub config: MasterConfig,
    pub security: SecurityConfig,
    pub kubernetes_config: KubernetesConfig,
    /// The cluster around it; empty where there is none.
    pub kubernetes: Arc<kubernetes::View>,
    pub cluster_secret: Vec<u8>,
    /// Which cluster this is.
    pub cluster: Cluster,
    pub store: Store,
    pub journal: Journal,
    pub soft: Arc<Soft>,
    pub syncer: Syncer,
    pub identity: Identity,
    pub keys: TokenKeys,
    pub metrics: ClusterMetrics,
    pub pending: PendingDriver,
    pub persist: Persist,
    pub jobs: Jobs,
    pub started_ms: u64,
    /// Where Hadoop's clients call it.
    pub hadoop_port: u16,
}

impl Core {
    /// Who a caller is. Errors: `Unauthenticated` when it does not say.
    pub fn who(&self, caller: Option<&Caller>) -> Result<Who> {
        match caller {
            Some(caller) if !caller.user.is_empty() => Ok(self.identity.who(&caller.user)),
            _ => Err(err!(Unauthenticated, "the call does not say which user it is for")),
        }
    }

    /// The answer to a caller's change that was made before, where the call is sent again. Somebody else's is not told.
    pub fn remembered(&self, caller: &Caller) -> Result<Option<Reply>> {
        let key = reply_key(caller.client_id, caller.sequence);
        let reply: Option<Reply> = self.store.view().record(Cf::Reply, &key)?;
        Ok(reply.filter(|reply| reply.principal == caller.user && reply.error_kind == 0))
    }

    /// Stamps a change for a caller and has it applied.
    pub async fn change(&self, caller: Option<&Caller>, op: Op) -> Result<Reply> {
        let who = self.who(caller)?;
        let (client_id, sequence) = caller.map_or((0, 0), |c| (c.client_id, c.sequence));
        if client_id == 0 || sequence == 0 {
            return Err(err!(InvalidArgument, "a change needs the client's id and a sequence number of at least 1"));
        }
        self.propose(who, client_id, sequence, op).await
    }

    /// What a mount has cost, by kind of request, this master and all workers together.
    pub fn requests_of(&self, mount: MountId) -> Vec<NamedValue> {
        let own = self.soft.mounts.requests(mount).all();
        let of_workers = |kind: &str| self.metrics.total(&format!("Ufs.{mount}.{kind}"));
        own.into_iter().map(|(kind, n)| NamedValue { name: kind.to_owned(), value: n + of_workers(kind) }).collect()
    }

    /// Has the soft state follow what the store says of workers that are to leave.
    pub fn follow_leaving(&self) -> Result<()> {
        self.soft.workers.set_leaving(&self.store.view().leaving_workers()?);
        Ok(())
    }

    /// A worker is not to leave any more.
    pub async fn stay(&self, worker: WorkerId) -> Result<()> {
        let op = SetWorkerState { worker_id: worker.get(), leaving: false, process: 0 };
        self.own_change(Op::SetWorkerState(op)).await?;
        self.follow_leaving()
    }

    /// The master itself.
    pub fn own_identity(&self) -> Who {
        Who { user: self.identity.started_by().to_owned(), groups: Vec::new(), superuser: true }
    }

    /// Has a change of the master's own applied.
    pub async fn own_change(&self, op: Op) -> Result<Reply> {
        self.propose(self.own_identity(), 0, 0, op).await
    }

    /// Has a change applied on behalf of somebody whose job this is.
    pub async fn change_as(&self, who: &Who, op: Op) -> Result<Reply> {
        self.propose(who.clone(), 0, 0, op).await
    }

    /// Sees to it that a file's lease holds for half its time at least, and returns for how many milliseconds; one that is that young costs
    /// no journal entry. Errors: `Expired`.
    pub async fn hold_lease(&self, file_id: u64, lease_id: u64) -> Result<u64> {
        let remaining = || -> Result<(u64, u64)> {
            let lease = self.store.view().lease(lease_id)?.filter(|l| l.file_id == file_id);
            let lease =
                lease.ok_or_else(|| err!(Expired, "the lease of file {file_id} is over: its writer was silent for too long, write it again"))?;
            Ok((lease.expires_at_ms.saturating_sub(clock::now_ms()), lease.ttl_ms))
        };
        let (mut remaining_ms, ttl_ms) = remaining()?;
        if remaining_ms < ttl_ms / 2 {
            self.own_change(Op::RenewLease(RenewLease { lease_ids: vec![lease_id] })).await?;
            (remaining_ms, _) = remaining()?;
        }
        Ok(remaining_ms)
    }

    async fn propose(&self, who: Who, client_id: u64, sequence: u64, op: Op) -> Result<Reply> {
        let command =
            Command { principal: who.user, groups: who.groups, superuser: who.superuser, now_ms: clock::now_ms(), client_id, sequence, op: Some(op) };
        self.journal.propose(command).await
    }
}
