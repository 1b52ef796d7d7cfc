//! Asynchronous persistence: files that were acknowledged go to their under store, in the order they were written, for ever tried.
//!
//! Driven by the family `Persist`. A file is written out by a worker that has its blocks; when all bytes are there the worker asks
//! for a lease (`BeginPublish`, journaled), publishes, and the outcome is journaled (`FinishPersist`). Whatever dies in between, the
//! record is still there and the file is written out again, over what may be there. A change of a path waits for what is being
//! published at or below it, and while it waits nothing there begins to be published (`pause`).

use crate::core::Core;
use crate::namespace;
use crate::source;
use crate::store::Reader;
use forebay_common::{AbsPath, ErrorKind, InodeId, Result, WorkerId, clock, counter, err, gauge};
use forebay_proto::journal::{BeginPublish, FinishPersist, Reply, command::Op};
use forebay_proto::store::Persist as Record;
use forebay_proto::task::What;
use forebay_proto::{AtRisk, AtRiskFile, Caller, WriteOut};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

counter!(PERSISTED, "forebay_master_persisted_files_total", "acknowledged files that got to their under store");
counter!(RETRIES, "forebay_master_persist_retries_total", "files that did not get to their under store at once");
gauge!(ACTIVE, "forebay_master_persist_active", "files on their way to their under store");
gauge!(WAITING, "forebay_master_unpersisted_files", "acknowledged files that are not in their under store yet");

/// Files on their way at once, per live worker.
const ACTIVE_PER_WORKER: usize = 16;
/// The part of these places that mounts may have together whose store did not take the last file: the others' files go on.
const FAILING_SHARE: usize = 4;
/// Records looked at in one round beyond those that wait or are under way.
const LOOKED_AT: usize = 256;
/// How long a lease to publish holds without a word of its worker.
pub const PUBLISH_TTL_MS: u64 = 10_000;
/// A file that is not due is looked at again after this time at the latest: its mount may get other options.
const DUE_AGAIN: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A file whose blocks no live worker has is looked at again after this time.
const MISSING_AGAIN: Duration = Duration::from_secs(1);
/// How long a change of a path waits for what is being published there.
const CHANGE_WAIT: Duration = Duration::from_secs(30);
/// Files named in a report.
const NAMED: usize = 100;

/// Why a file is not there yet, and when it is tried again.
#[derive(Clone)]
struct Waiting {
    until: Instant,
    backoff: Duration,
    error: String,
    /// Of its mount; 0 where that is not known.
    mount_id: u64,
}

#[derive(Default)]
struct State {
    active: HashSet<u64>,
    waiting: HashMap<u64, Waiting>,
    paused: Vec<AbsPath>,
    /// Mounts whose store did not take the last file.
    failing: HashSet<u64>,
    /// Places that these have.
    failing_active: usize,
}

pub struct Persist {
    state: Mutex<State>,
    wake: Notify,
    finished: watch::Sender<u64>,
}

impl Default for Persist {
    fn default() -> Self {
        Persist { state: Mutex::default(), wake: Notify::default(), finished: watch::Sender::new(0) }
    }
}

/// While it lives, nothing at or below its paths begins to be published.
pub struct Pause<'a> {
    persist: &'a Persist,
    paths: Vec<AbsPath>,
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        let mut state = self.persist.lock();
        for path in &self.paths {
            if let Some(i) = state.paused.iter().position(|p| p == path) {
                state.paused.swap_remove(i);
            }
        }
    }
}

impl Persist {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// There may be something new to do.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Changes whenever a file got to its store.
    pub fn finished(&self) -> watch::Receiver<u64> {
        self.finished.subscribe()
    }

    fn pause(&self, paths: &[&AbsPath]) -> Pause<'_> {
        let paths: Vec<AbsPath> = paths.iter().map(|p| (*p).clone()).collect();
        self.lock().paused.extend(paths.iter().cloned());
        Pause { persist: self, paths }
    }

    fn is_paused(&self, path: &AbsPath) -> bool {
        self.lock().paused.iter().any(|p| path.starts_with(p))
    }

    /// A change of paths, once nothing there is being published any more. Errors: `Busy` when that took too long, or somebody is
    /// writing there.
    pub async fn change(&self, core: &Core, caller: Option<&Caller>, op: Op, paths: &[&AbsPath]) -> Result<Reply> {
        let deadline = Instant::now() + CHANGE_WAIT;
        let mut pause = None;
        loop {
            match core.change(caller, op.clone()).await {
                Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline && publishing_at(core, &stored_at(core, paths))? => {
                    pause.get_or_insert_with(|| self.pause(&stored_at(core, paths).iter().collect::<Vec<_>>()));
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                other => return other,
            }
        }
    }

    /// A worker has all bytes of a file in the store and wants to publish it.
    pub async fn begin(&self, core: &Core, worker: WorkerId, op: BeginPublish) -> Result<Reply> {
        let path = core.store.view().path_of(InodeId(op.file_id)).map_err(|_| err!(Expired, "file {} is gone", op.file_id))?;
        if self.is_paused(&path) {
            return Err(err!(Busy, "{path} is about to be changed"));
        }
        core.own_change(Op::BeginPublish(BeginPublish { worker_id: worker.get(), lease_ttl_ms: PUBLISH_TTL_MS, ..op })).await
    }

    /// What is not there yet.
    pub fn at_risk(&self, core: &Core) -> Result<AtRisk> {
        let view = core.store.view();
        let counters = view.counters()?;
        let mut out = AtRisk { files: counters.unpersisted_files, bytes: counters.unpersisted_bytes, ..AtRisk::default() };
        let waiting = self.lock().waiting.clone();
        // The oldest, and whatever fails.
        let mut records = view.persists(0, NAMED)?;
        for id in waiting.keys().take(NAMED) {
            if !records.iter().any(|r| r.id == *id) {
                records.extend(view.persists(id - 1, 1)?.into_iter().filter(|r| r.id == *id));
            }
        }
        out.oldest_ms = records.iter().map(|r| r.queued_ms).min().unwrap_or(0);
        for record in records {
            let Some((_, inode)) = view.inode(InodeId(record.inode_id))? else { continue };
            let (_, copies) = source::holder_of_most(core, &inode);
            out.oldest.push(AtRiskFile {
                path: view.path_of(InodeId(record.inode_id))?.as_bytes().to_vec().into(),
                bytes: inode.length,
                since_ms: record.queued_ms,
                copies: u32::try_from(copies).unwrap_or(u32::MAX),
                missing: copies == 0,
                error: waiting.get(&record.id).map(|w| w.error.clone()).unwrap_or_default(),
            });
        }
        Ok(out)
    }

    /// Why a file is not there yet; `None`: nothing is wrong.
    pub fn trouble(&self, persist_id: u64) -> Option<String> {
        self.lock().waiting.get(&persist_id).map(|w| w.error.clone()).filter(|e| !e.is_empty())
    }

    /// Starts what may start. Returns when something will be due at the latest.
    fn round(core: &Arc<Core>) -> Result<Duration> {
        let persist = &core.persist;
        let view = core.store.view();
        let counters = view.counters()?;
        WAITING.set(counters.unpersisted_files as i64);
        let mut next = Duration::from_secs(1);
        if counters.unpersisted_files == 0 {
            persist.lock().waiting.clear();
            return Ok(next);
        }
        let workers = core.soft.workers.live().len();
        let room = ACTIVE_PER_WORKER * workers;
        let (mut after, mut looked, mut seen) = (0, 0, HashSet::new());
        loop {
            let rows = view.persists(after, LOOKED_AT)?;
            for record in &rows {
                after = record.id;
                seen.insert(record.id);
                {
                    let mut state = persist.lock();
                    if state.active.len() >= room {
                        return Ok(next);
                    }
                    if state.active.contains(&record.id) {
                        continue;
                    }
                    if let Some(waiting) = state.waiting.get(&record.id) {
                        let left = waiting.until.saturating_duration_since(Instant::now());
                        if !left.is_zero() {
                            next = next.min(left);
                            continue;
                        }
                    }
                    looked += 1;
                    state.active.insert(record.id);
                    ACTIVE.set(state.active.len() as i64);
                }
                let (core, record) = (core.clone(), *record);
                tokio::spawn(async move {
                    let mut mount_id = 0;
                    let done = one(&core, &record, room, &mut mount_id).await;
                    core.persist.ended(&record, mount_id, done);
                    core.persist.wake();
                });
            }
            if rows.len() < LOOKED_AT {
                // All were looked at: what was deleted while it waited is forgotten.
                persist.lock().waiting.retain(|id, _| seen.contains(id));
                return Ok(next);
            }
            if looked >= LOOKED_AT {
                return Ok(next);
            }
        }
    }

    /// A place for a file of a mount. `None`: mounts whose stores do not answer have as many as they may.
    fn place(&self, mount_id: u64, room: usize) -> Option<Place<'_>> {
        let mut state = self.lock();
        let failing = state.failing.contains(&mount_id);
        if failing && state.failing_active >= (room / FAILING_SHARE).max(1) {
            return None;
        }
        state.failing_active += usize::from(failing);
        Some(Place { persist: self, failing })
    }

    fn ended(&self, record: &Record, mount_id: u64, done: Result<Option<Duration>>) {
        let mut state = self.lock();
        state.active.remove(&record.id);
        ACTIVE.set(state.active.len() as i64);
        match done {
            Ok(Some(wait)) => {
                let until = Instant::now() + wait.min(DUE_AGAIN);
                let before = state.waiting.remove(&record.id);
                let (backoff, error) = before.map_or((BACKOFF_MIN, String::new()), |w| (w.backoff, w.error));
                state.waiting.insert(record.id, Waiting { until, backoff, error, mount_id });
            }
            Ok(None) => {
                PERSISTED.inc();
                self.finished.send_modify(|n| *n += 1);
                state.waiting.remove(&record.id);
                // The store takes files again: the others of its mount need not wait on.
                if state.failing.remove(&mount_id) {
                    let now = Instant::now();
                    // Once: a file that fails for itself goes on to wait longer each time.
                    state.waiting.values_mut().filter(|w| w.mount_id == mount_id).for_each(|w| w.until = now);
                }
            }
            Err(e) => {
                let before = state.waiting.get(&record.id).map_or(BACKOFF_MIN / 2, |w| w.backoff);
                let missing = e.kind() == ErrorKind::NotFound;
                // Not yet due, in the way of a change, moved a moment ago: no trouble.
                let quiet = matches!(e.kind(), ErrorKind::Expired | ErrorKind::Busy);
                let backoff = if missing { MISSING_AGAIN } else { (before * 2).min(BACKOFF_MAX) };
                if !quiet {
                    // Of the store itself, not of this file.
                    let store_fails = matches!(e.kind(), ErrorKind::UnderStore | ErrorKind::Timeout | ErrorKind::Unavailable);
                    if store_fails && mount_id > 0 {
                        state.failing.insert(mount_id);
                    }
                    RETRIES.inc();
                    tracing::warn!(inode = record.inode_id, error = %e, "a file is not in its under store yet; it is tried again");
                }
                let (until, error) = (Instant::now() + if quiet { BACKOFF_MIN } else { backoff }, if quiet { String::new() } else { e.to_string() });
                state.waiting.insert(record.id, Waiting { until, backoff: if quiet { before } else { backoff }, error, mount_id });
            }
        }
    }
}

/// A file's place among those on their way.
struct Place<'a> {
    persist: &'a Persist,
    /// Its mount was failing when it was given.
    failing: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.persist.lock().failing_active -= usize::from(self.failing);
    }
}

/// The paths that under stores have what is at these paths under.
fn stored_at(core: &Core, paths: &[&AbsPath]) -> Vec<AbsPath> {
    let view = core.store.view();
    let record = |path: &AbsPath| {
        let walk = namespace::walk(&view, path).ok().filter(|walk| walk.is_complete() && walk.deepest().alias.is_some())?;
        view.path_of(walk.deepest().id()).ok()
    };
    paths.iter().map(|path| record(path).unwrap_or_else(|| (*path).clone())).collect()
}

/// Whether a file at or below one of these paths is being published.
fn publishing_at(core: &Core, paths: &[AbsPath]) -> Result<bool> {
    let view = core.store.view();
    for lease in view.leases()?.into_iter().filter(|l| l.publishing) {
        if let Ok(path) = view.path_of(InodeId(lease.file_id))
            && paths.iter().any(|p| path.starts_with(p))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Writes one file out; of one that is not due yet, or has no place, returns how long that is. `of_mount` is set once it is known.
///
/// Errors: `NotFound` when no live worker has all of it; `Expired` or `Busy` when it is not its turn.
async fn one(core: &Arc<Core>, record: &Record, room: usize, of_mount: &mut u64) -> Result<Option<Duration>> {
    let id = InodeId(record.inode_id);
    let (worker, what, delay) = {
        let view = core.store.view();
        let Some((_, inode)) = view.inode(id)?.filter(|(_, inode)| inode.persist_id == record.id) else { return Ok(None) };
        let path = view.path_of(id)?;
        let now = clock::now_ms();
        if view.lease(inode.lease_id)?.is_some_and(|lease| lease.expires_at_ms > now) {
            return Err(err!(Busy, "an earlier publication of {path} may still be under way"));
        }
        let walk = namespace::walk(&view, &path)?;
        let Some((mount_id, _)) = walk.mount else {
            return Err(err!(InvalidArgument, "{path} lies in no mount any more: move it into one"));
        };
        *of_mount = mount_id.get();
        let mount = core.soft.mounts.get(&core.store, &core.config, mount_id)?;
        let age = clock::now_ms().saturating_sub(record.queued_ms);
        let delay = mount.options.persist_delay.as_millis() as u64;
        if age < delay {
            (None, None, Duration::from_millis(delay - age))
        } else {
            let (worker, copies) = source::holder_of_most(core, &inode);
            let Some(worker) = worker.filter(|_| copies > 0) else {
                return Err(err!(NotFound, "{path}: blocks of it are on no live worker: start the worker that has them"));
            };
            let write = WriteOut {
                from: Some(source::file_bytes(core, &inode, None, worker.id)?),
                mount_id: mount_id.get(),
                key: walk.ufs_key(&path).into(),
                file_id: inode.id,
                lease_id: 0,
                content_version: inode.content_version,
            };
            (Some(worker.id), Some(write), Duration::ZERO)
        }
    };
    let (Some(worker), Some(write)) = (worker, what) else {
        return Ok(Some(delay));
    };
    let Some(_place) = core.persist.place(*of_mount, room) else { return Ok(Some(BACKOFF_MAX)) };
    let outcome = core.soft.tasks.submit(worker, What::WriteOut(write)).outcome().await?;
    let finish = FinishPersist { file_id: record.inode_id, lease_id: outcome.lease_id, fingerprint: outcome.fingerprint };
    match core.own_change(Op::FinishPersist(finish)).await {
        Ok(_) => {
            core.syncer.note_looked(id);
            Ok(None)
        }
        // Deleted, or written out by somebody else, meanwhile.
        Err(e) if e.kind() == ErrorKind::Expired && core.store.view().inode(id)?.is_none_or(|(_, inode)| inode.persist_id != record.id) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Runs until shutdown.
pub async fn run(core: Arc<Core>, shutdown: CancellationToken) {
    loop {
        let next = match Persist::round(&core) {
            Ok(next) => next,
            Err(e) => {
                tracing::error!(error = %e, "files that wait for their under store could not be looked up");
                Duration::from_secs(1)
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = core.persist.wake.notified() => {}
            () = tokio::time::sleep(next.max(Duration::from_millis(5))) => {}
        }
    }
}
