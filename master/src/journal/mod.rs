//! The journal: the only way the namespace changes.
//!
//! `propose` puts a command into a bounded queue; one task takes all that wait (at most `journal_batch_max_commands`),
//! hands them to openraft as one log entry, and answers each when the entry is fsynced, committed and applied. While one
//! entry is being fsynced the next one fills: that is the group commit. A single master is a one-node group.
//!
//! Invariants: nothing is answered before `apply` ran on a committed entry; a command that was not answered is wholly
//! there or wholly absent after a crash.

mod log_store;
mod network;
mod state_machine;
mod types;

pub use types::{Batch, BatchReply, NODE_ID, TypeConfig};

use crate::apply::Applied;
use crate::store::Store;
use forebay_common::config::MasterConfig;
use forebay_common::{Result, counter, err, gauge};
use forebay_proto::journal::{Command, Reply};
use log_store::LogStore;
use openraft::error::{ClientWriteError, InitializeError, RaftError};
use openraft::{BasicNode, Raft, RaftMetrics, SnapshotPolicy};
use state_machine::StateMachine;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot, watch};

counter!(COMMANDS, "forebay_master_journal_commands_total", "commands proposed to the journal");
counter!(ENTRIES, "forebay_master_journal_entries_total", "entries of the journal, one fsync each");
counter!(REFUSED, "forebay_master_journal_queue_full_total", "commands refused because the journal's queue was full");
gauge!(QUEUED, "forebay_master_journal_queued_commands", "commands waiting for the journal");

type Proposal = (Command, oneshot::Sender<Result<Reply>>);

/// How far the replay of the log is, for people and probes.
#[derive(Default)]
pub struct Replay {
    applied: AtomicU64,
    last: AtomicU64,
}

impl Replay {
    /// What follows a journal's metrics until its master serves.
    fn follow(self: &Arc<Self>) -> impl FnOnce(watch::Receiver<RaftMetrics<u64, BasicNode>>) + use<> {
        let replay = self.clone();
        move |mut metrics| {
            tokio::spawn(async move {
                loop {
                    {
                        let m = metrics.borrow_and_update();
                        replay.applied.store(m.last_applied.map_or(0, |l| l.index), Ordering::Relaxed);
                        replay.last.store(m.last_log_index.unwrap_or(0), Ordering::Relaxed);
                    }
                    if metrics.changed().await.is_err() {
                        return;
                    }
                }
            });
        }
    }
}

impl std::fmt::Display for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (applied, last) = (self.applied.load(Ordering::Relaxed), self.last.load(Ordering::Relaxed));
        match last {
            0 => write!(f, "starting"),
            _ => write!(f, "recovering, {} %", applied.min(last) * 100 / last),
        }
    }
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    raft: Raft<TypeConfig>,
    queue: mpsc::Sender<Proposal>,
}

impl Journal {
    /// Opens the log in `dir/log`, replays what the store has not applied yet, and waits until this node leads. `replay` tells how far that is.
    pub async fn start(dir: &Path, config: &MasterConfig, store: Store, on_applied: Arc<dyn Applied>, replay: &Arc<Replay>) -> Result<Journal> {
        let log = LogStore::open(&dir.join("log"))?;
        let machine = StateMachine::open(store, dir.join("checkpoints"), on_applied, config)?;
        let raft_config = openraft::Config {
            cluster_name: "forebay".into(),
            election_timeout_min: 500,
            election_timeout_max: 1000,
            heartbeat_interval: 200,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(config.checkpoint_every_entries),
            max_in_snapshot_log_to_keep: 1_000,
            ..openraft::Config::default()
        };
        let raft_config = raft_config.validate().map_err(|e| err!(Internal, "journal configuration: {e}"))?;
        let follow = replay.follow();
        let raft = Raft::new(NODE_ID, Arc::new(raft_config), network::NoPeers, log, machine).await.map_err(|e| err!(Internal, "journal: {e}"))?;
        match raft.initialize(BTreeMap::from([(NODE_ID, BasicNode::default())])).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(e) => return Err(err!(Internal, "journal: {e}")),
        }
        if raft.current_leader().await.is_none() {
            raft.trigger().elect().await.map_err(|e| err!(Internal, "journal: {e}"))?;
        }
        follow(raft.metrics());
        // However long the log is; the probe says that it goes on.
        raft.wait(None)
            .metrics(
                |m| m.running_state.is_err() || m.current_leader == Some(NODE_ID) && m.last_applied.map(|l| l.index) == m.last_log_index,
                "leading, and all applied",
            )
            .await
            .map_err(|e| err!(Unavailable, "journal: this master does not become the leader: {e}"))?
            .running_state
            .map_err(|e| err!(Unavailable, "the journal has stopped: {e}"))?;
        let (queue, waiting) = mpsc::channel(config.journal_queue_max_commands);
        tokio::spawn(write_batches(raft.clone(), waiting, config.journal_batch_max_commands));
        Ok(Journal { raft, queue })
    }

    /// Has a command applied. Returns apply's answer, errors of the command included.
    ///
    /// Errors besides those: `LimitExceeded` when too many wait, `Unavailable` when this master does not lead.
    pub async fn propose(&self, command: Command) -> Result<Reply> {
        let (answer, answered) = oneshot::channel();
        COMMANDS.inc();
        self.queue.try_send((command, answer)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                REFUSED.inc();
                err!(LimitExceeded, "too many changes are waiting for the journal (master.journal_queue_max_commands): try again")
            }
            mpsc::error::TrySendError::Closed(_) => err!(Unavailable, "the journal is closed"),
        })?;
        QUEUED.inc();
        let reply =
            answered.await.map_err(|_| err!(Unavailable, "the journal closed before it answered; whether the change is done is not known"))??;
        match crate::apply::refusal(&reply) {
            None => Ok(reply),
            Some(e) => Err(e),
        }
    }

    /// Returns when reads may be served: everything acknowledged before is applied here.
    ///
    /// In a one-node group the leader has applied whatever it has answered, so only leadership is looked at.
    pub fn read_barrier(&self) -> Result<()> {
        self.running()?;
        let metrics = self.raft.metrics();
        let leads = metrics.borrow().current_leader == Some(NODE_ID);
        if leads { Ok(()) } else { Err(err!(Unavailable, "this master does not lead")) }
    }

    /// Errors: `Unavailable` once the log or the store failed for good; nothing is answered any more then.
    pub fn running(&self) -> Result<()> {
        match &self.raft.metrics().borrow().running_state {
            Ok(()) => Ok(()),
            Err(e) => Err(err!(Unavailable, "the journal has stopped: {e}")),
        }
    }

    /// Stops taking commands and closes the log.
    pub async fn shutdown(&self) {
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(error = %e, "journal did not stop cleanly");
        }
    }
}

async fn write_batches(raft: Raft<TypeConfig>, mut waiting: mpsc::Receiver<Proposal>, max: usize) {
    let mut batch = Vec::with_capacity(max);
    loop {
        if waiting.recv_many(&mut batch, max).await == 0 {
            return;
        }
        QUEUED.sub(batch.len() as i64);
        ENTRIES.inc();
        let (commands, answers): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        match raft.client_write(Batch::new(commands)).await {
            Ok(written) => {
                let replies = written.data.0;
                assert_eq!(replies.len(), answers.len(), "apply answers every command of an entry");
                for (answer, reply) in answers.into_iter().zip(replies) {
                    let _ = answer.send(Ok(reply));
                }
            }
            Err(e) => {
                let error = match &e {
                    RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => err!(Unavailable, "this master does not lead"),
                    e => err!(Unavailable, "journal: {e}"),
                };
                tracing::error!(error = %e, "a journal entry was not written");
                for answer in answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }
}
