//! Telling the master: registration, heartbeats, block reports in increments.
//!
//! A worker that has blocks of another cluster is not let in: nothing is told and nothing taken until its master has changed, or the blocks are given up.
//! A change of blocks is reported within `CHANGE_DELAY`, everything else each heartbeat interval. Answers bring the token
//! keys, the mounts with their credentials, and blocks to drop. A report that did not arrive is sent again.

use crate::cluster;
use crate::core::Core;
use crate::store::{Changed, ShareLimits};
use crate::{hadoop, ufs_read, write};
use forebay_common::limits::REPORT_BATCH_BLOCKS;
use forebay_common::token::TokenKey;
use forebay_common::{BlockId, Error, ErrorKind, InodeId, MountId, Result, clock, counter, err};
use forebay_proto::{
    ChangedFile, Clusters, HeartbeatRequest, HeartbeatResponse, MountCredentials, NamedValue, RegisterRequest, ReportedBlock, WorkerAddress,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

counter!(FAILED, "forebay_worker_heartbeats_failed_total", "heartbeats that the master did not answer");

/// How long block changes are gathered before they are reported.
const CHANGE_DELAY: Duration = Duration::from_millis(50);
/// Changed files kept for the next heartbeat.
const CHANGED_FILES_MAX: usize = 1_000;
/// Between heartbeats while the master does not answer.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Between two looks at all blocks for the working set.
const WORKING_SET_EVERY: Duration = Duration::from_secs(10);
/// Between registrations that were refused: somebody has to mend something first.
const REFUSED_RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long a session waits for news from the master.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The asking side, shared by sessions.
pub struct Reporter {
    wake: Notify,
    /// Rounds begun, and the newest that was answered.
    begun: AtomicU64,
    answered: watch::Sender<u64>,
    changed_files: Mutex<Vec<ChangedFile>>,
    warnings: Mutex<Vec<String>>,
}

impl Default for Reporter {
    fn default() -> Self {
        Reporter {
            wake: Notify::new(),
            begun: AtomicU64::new(0),
            answered: watch::channel(0).0,
            changed_files: Mutex::default(),
            warnings: Mutex::default(),
        }
    }
}

impl Reporter {
    /// Has a heartbeat sent now and waits for its answer, a few seconds at most.
    pub async fn report_now(&self) {
        let mut answered = self.answered.subscribe();
        // One that is under way may have been answered before the key was made: only one that begins from now on counts.
        let wanted = self.begun.load(Ordering::Acquire) + 1;
        self.wake.notify_one();
        let _ = tokio::time::timeout(CALL_TIMEOUT, answered.wait_for(|r| *r >= wanted)).await;
    }

    /// The under store holds another version than `fingerprint` of this file.
    pub fn note_changed_file(&self, file: InodeId, fingerprint: &str) {
        let mut files = self.changed_files.lock().unwrap_or_else(|e| e.into_inner());
        if files.len() < CHANGED_FILES_MAX && !files.iter().any(|f| f.file_id == file.get()) {
            files.push(ChangedFile { file_id: file.get(), fingerprint: fingerprint.to_owned() });
        }
        drop(files);
        self.wake.notify_one();
    }

    /// What `doctor` should say of this worker.
    pub fn warn(&self, warning: String) {
        self.warnings.lock().unwrap_or_else(|e| e.into_inner()).push(warning);
    }
}

/// What the master has said of this worker.
#[derive(Clone, Debug)]
pub enum Registration {
    /// Nothing yet.
    Unanswered,
    /// It is not let in, and why.
    Refused(Error),
    /// It is one of the master's.
    Done,
}

/// The loop.
pub struct Heartbeat {
    pub core: Arc<Core>,
    pub address: WorkerAddress,
    pub incarnation: u64,
}

impl Heartbeat {
    /// Runs until shutdown. `registered` says how far it is with the master.
    pub async fn run(self, registered: watch::Sender<Registration>, shutdown: CancellationToken) {
        let interval = Duration::from_millis(self.core.config.heartbeat_interval_ms.max(50));
        let mut known = false;
        let mut counted: Option<Instant> = None;
        loop {
            if counted.is_none_or(|at| at.elapsed() > WORKING_SET_EVERY) {
                counted = Some(Instant::now());
                let (store, window) = (self.core.store.clone(), Duration::from_millis(self.core.config.working_set_window_ms));
                let _ = tokio::task::spawn_blocking(move || store.working_set(window)).await;
            }
            let round = self.core.reporter.begun.fetch_add(1, Ordering::AcqRel) + 1;
            let retry_after = match self.round(&mut known).await {
                Ok(()) => {
                    registered.send_if_modified(|was| !matches!(std::mem::replace(was, Registration::Done), Registration::Done));
                    self.core.reporter.answered.send_replace(round);
                    if self.core.store.has_changes() {
                        self.core.store.reap();
                        tokio::select! {
                            () = shutdown.cancelled() => return,
                            () = self.gather() => continue,
                        }
                    }
                    None
                }
                Err(e) if e.kind() == ErrorKind::WrongCluster => {
                    if !matches!(&*registered.borrow(), Registration::Refused(before) if before.message() == e.message()) {
                        tracing::error!("{e}");
                    }
                    registered.send_replace(Registration::Refused(e));
                    Some(REFUSED_RETRY_AFTER)
                }
                Err(e) => {
                    FAILED.inc();
                    tracing::warn!(error = %e, "heartbeat failed; it is tried again");
                    Some(interval.min(RETRY_AFTER))
                }
            };
            self.core.store.reap();
            if let Some(retry_after) = retry_after {
                // Nothing wakes it before its time: every block counts as changed until the master answers.
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(retry_after) => continue,
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
                () = self.core.reporter.wake.notified() => {}
                () = self.core.store.changed_notify.notified() => self.gather().await,
            }
        }
    }

    /// Waits for more changes, unless somebody waits for the report.
    async fn gather(&self) {
        tokio::select! {
            () = tokio::time::sleep(CHANGE_DELAY) => {}
            () = self.core.reporter.wake.notified() => {}
        }
    }

    async fn round(&self, known: &mut bool) -> Result<()> {
        let master = &self.core.master;
        let mut client = master.client();
        if !*known {
            let request = RegisterRequest {
                cluster_secret: master.secret(),
                address: Some(self.address.clone()),
                incarnation: self.incarnation,
                tiers: self.core.store.usage(),
                counters: counters(&self.core),
                clusters: Some(Clusters { ids: cluster::told(&self.core) }),
            };
            let answer = client.register(request).await.map_err(|s| master.failed(&s))?.into_inner();
            if !answer.refused.is_empty() {
                return self.refused(answer).await;
            }
            self.join(&answer.cluster_id).await?;
            self.take(answer).await;
            self.core.store.note_all_changed();
            *known = true;
        }
        let changed = self.core.store.take_changed(REPORT_BATCH_BLOCKS);
        let changed_files = std::mem::take(&mut *self.core.reporter.changed_files.lock().unwrap_or_else(|e| e.into_inner()));
        let request = self.request(&changed, changed_files.clone());
        match client.heartbeat(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                *known = !answer.register_again;
                if *known {
                    // A folder may have had no room for its name until now.
                    self.join(&answer.cluster_id).await?;
                    self.take(answer).await;
                }
                Ok(())
            }
            Err(status) => {
                self.core.store.put_changed_back(changed.into_iter().map(|c| c.id));
                // The lost answer may have carried deletions: what no file has is reported, and ordered deleted again.
                self.core.store.note_all_changed();
                self.core.reporter.changed_files.lock().unwrap_or_else(|e| e.into_inner()).extend(changed_files);
                Err(master.failed(&status))
            }
        }
    }

    /// Names the folders for the cluster that this worker is in. A master of an earlier version does not say which that is.
    async fn join(&self, cluster: &str) -> Result<()> {
        if cluster.is_empty() {
            self.core.store.join_unnamed();
            return Ok(());
        }
        if !self.core.store.is_unnamed(cluster) {
            return Ok(());
        }
        let (store, cluster) = (self.core.store.clone(), cluster.to_owned());
        tokio::task::spawn_blocking(move || store.join_cluster(&cluster)).await.map_err(|e| err!(Internal, "registration: {e}"))?
    }

    /// Drops the blocks that keep this worker out, where it may. Errors: `WrongCluster`, as long as it does not; `Unavailable` when the next registration can do better.
    async fn refused(&self, answer: HeartbeatResponse) -> Result<()> {
        let (core, refused) = (self.core.clone(), answer.refused);
        let dropped = tokio::task::spawn_blocking(move || cluster::give_up_others(&core, &answer.cluster_id, answer.admits_unnamed));
        match dropped.await.map_err(|e| err!(Internal, "blocks of another cluster: {e}"))?? {
            0 => Err(self.core.master.named(err!(WrongCluster, "this worker is not let in: {refused}"))),
            blocks => Err(err!(Unavailable, "{blocks} blocks of another cluster are given up; this worker registers again")),
        }
    }

    fn request(&self, changed: &[Changed], changed_files: Vec<ChangedFile>) -> HeartbeatRequest {
        HeartbeatRequest {
            cluster_secret: self.core.master.secret(),
            worker_id: self.core.id.get(),
            incarnation: self.incarnation,
            tiers: self.core.store.usage(),
            changed: changed
                .iter()
                .map(|c| ReportedBlock {
                    block_id: c.id.get(),
                    cached_bytes: c.cached_bytes,
                    tier: c.tier.into(),
                    pinned: c.pinned,
                    only_copy: c.only_copy,
                    open: false,
                })
                .chain(self.core.open_blocks.abandoned().into_iter().take(REPORT_BATCH_BLOCKS).map(|id| ReportedBlock {
                    block_id: id.get(),
                    open: true,
                    ..ReportedBlock::default()
                }))
                .collect(),
            counters: counters(&self.core),
            now_ms: clock::now_ms(),
            warnings: self.core.reporter.warnings.lock().unwrap_or_else(|e| e.into_inner()).clone(),
            changed_files,
            all_told: self.core.store.is_all_read() && !self.core.store.has_changes(),
            leaving: *self.core.leaving.borrow(),
        }
    }

    async fn take(&self, answer: HeartbeatResponse) {
        self.core.keys.set(answer.keys.into_iter().map(|k| TokenKey { id: k.id, secret: k.secret.to_vec() }).collect());
        let limits = |m: &MountCredentials| ShareLimits { quota_bytes: m.quota_bytes, reserved_bytes: m.reserved_bytes };
        let limited = answer.mounts.iter().filter(|m| m.quota_bytes > 0 || m.reserved_bytes > 0);
        self.core.store.set_shares(limited.map(|m| (MountId(m.mount_id), limits(m))).collect());
        self.core.mounts.set(answer.mounts.into_iter().map(|m| (MountId(m.mount_id), m.uri, m.options.into_iter().collect())).collect());
        let leaving = answer.leaving;
        let changed = self.core.leaving.send_if_modified(|known| std::mem::replace(known, leaving) != leaving);
        if changed {
            self.core.store.set_closed(leaving);
            tracing::warn!(leaving, "the master has said whether this worker is to leave");
        }
        let (core, store) = (self.core.clone(), self.core.store.clone());
        // Headers may have to be read for it, off a disk.
        let orders = tokio::task::spawn_blocking(move || {
            // The master names each block once, with what counts last.
            answer.pin_blocks.iter().for_each(|block| store.set_pinned(BlockId(*block), true));
            answer.unpin_blocks.iter().for_each(|block| store.set_pinned(BlockId(*block), false));
            answer.settled_blocks.iter().for_each(|block| store.settle(BlockId(*block)));
            for block in &answer.delete_blocks {
                if !store.remove_by_order(BlockId(*block)) {
                    core.open_blocks.discard(BlockId(*block));
                }
            }
        });
        if let Err(e) = orders.await {
            tracing::error!(error = %e, "orders of the master were not carried out; they come again with the next report");
        }
    }
}

/// What this process counted since it started.
fn counters(core: &Core) -> Vec<NamedValue> {
    let counter = |name: &str, value: u64| NamedValue { name: name.to_owned(), value };
    let mut all = vec![
        counter("BytesReadUfs", ufs_read::FETCHED.get()),
        counter("BytesWrittenUfs", write::WRITTEN_UFS.get()),
        counter("HadoopBytesRead", hadoop::READ.get()),
        counter("HadoopBytesWritten", hadoop::WRITTEN.get()),
        counter("HadoopGrants", hadoop::GRANTED.get()),
        counter("BlocksEvicted", crate::store::EVICTED.get()),
        counter("BlocksQuarantined", crate::store::QUARANTINED.get()),
    ];
    for (mount, requests) in core.mounts.requests() {
        all.extend(requests.into_iter().filter(|(_, n)| *n > 0).map(|(kind, n)| counter(&format!("Ufs.{mount}.{kind}"), n)));
    }
    all
}
