//! Drivers: what the leader does outside of apply, each step safe to repeat.
//!
//! `PendingDriver` has under stores follow deletions and renames: it takes pending records oldest first, never one whose
//! keys touch those of an older unfinished one, retries with backoff for ever what may be retried, and proposes the
//! outcome. After a crash it finds the records again. `run` also ends leases, times to live and workers, and rotates token keys.

use crate::core::Core;
use crate::drain::Drain;
use crate::free;
use crate::hadoop;
use crate::locks::SESSIONS;
use crate::namespace::Found;
use crate::persist::PUBLISH_TTL_MS;
use crate::replicate::Replicate;
use crate::store::{Cf, Reader, reply_key};
use forebay_common::{Error, ErrorKind, InodeId, MountId, Result, abort_point, counter, err, gauge};
use forebay_proto::Caller;
use forebay_proto::journal::{Abandon, EndLocks, ExpireTtl, FinishPending, Reply, command::Op};
use forebay_proto::store::Pending;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

counter!(RETRIES, "forebay_master_pending_retries_total", "changes that an under store did not take at once");
counter!(EXPIRED, "forebay_master_ttl_expired_total", "files and folders whose time was over");
counter!(POSTPONED, "forebay_master_ttl_postponed_total", "ends of times to live that had to wait");
gauge!(ACTIVE, "forebay_master_pending_changes", "changes on their way to under stores");

/// Calls under way to under stores at once; a change that waits to be tried again makes none.
const CONCURRENCY: usize = 16;
/// Changes that are looked after at once; further ones wait in the store.
const STARTED_MAX: usize = 4_096;
/// Files and folders whose time is over that are looked after in one round, each second.
const EXPIRED_AT_ONCE: usize = 1_000;
/// A file that is being written when its time comes is looked at again after this time.
const POSTPONED_FOR: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

type Outcome = Option<Result<(), Error>>;

pub struct PendingDriver {
    active: Mutex<HashMap<u64, watch::Receiver<Outcome>>>,
    calls: Semaphore,
}

impl Default for PendingDriver {
    fn default() -> Self {
        PendingDriver { active: Mutex::default(), calls: Semaphore::new(CONCURRENCY) }
    }
}

/// Whether one key is the other or lies below it.
fn touches(a: &[u8], b: &[u8]) -> bool {
    let (short, long) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    long.starts_with(short) && (long.len() == short.len() || short.is_empty() || long[short.len()] == b'/')
}

fn conflicts(a: &Pending, b: &Pending) -> bool {
    let keys = |p: &Pending| if p.kind == "rename" { vec![p.source_key.clone(), p.target_key.clone()] } else { vec![p.source_key.clone()] };
    a.mount_id == b.mount_id && keys(a).iter().any(|x| keys(b).iter().any(|y| touches(x, y)))
}

impl PendingDriver {
    /// Waits until the under store has followed, at most `limit`.
    ///
    /// Errors: what the store said when it never will; `Timeout` when it has not yet (it is retried on).
    pub async fn wait(&self, core: &Arc<Core>, id: u64, call: Option<&Caller>, limit: Duration) -> Result<()> {
        self.start_ready(core)?;
        let deadline = Instant::now() + limit;
        loop {
            let receiver = self.active.lock().unwrap_or_else(|e| e.into_inner()).get(&id).cloned();
            let left = deadline.saturating_duration_since(Instant::now());
            match receiver {
                Some(mut receiver) => match tokio::time::timeout(left, receiver.wait_for(Option::is_some)).await {
                    Ok(Ok(outcome)) => return outcome.clone().unwrap_or(Ok(())),
                    Ok(Err(_)) => {}
                    Err(_) => break,
                },
                // Finished before this call looked: its outcome is in the remembered answer.
                None if !core.store.view().pending()?.iter().any(|p| p.id == id) => return recorded_outcome(core, call),
                None if left.is_zero() => break,
                None => {
                    tokio::time::sleep(Duration::from_millis(5).min(left)).await;
                    self.start_ready(core)?;
                }
            }
        }
        Err(err!(Timeout, "the change is done here and on its way to the under store, which has not taken it yet; it is tried on"))
    }

    /// Starts every pending record that touches no older one.
    fn start_ready(&self, core: &Arc<Core>) -> Result<()> {
        let view = core.store.view();
        let pending = view.pending()?;
        ACTIVE.set(pending.len() as i64);
        let mut active = self.active.lock().unwrap_or_else(|e| e.into_inner());
        for (i, record) in pending.iter().enumerate() {
            if active.len() >= STARTED_MAX {
                break;
            }
            if active.contains_key(&record.id) || pending[..i].iter().any(|older| conflicts(older, record)) {
                continue;
            }
            // What is to be deleted is all that the store has of a file that is on its way there.
            let waits_for = if record.after_inode > 0 { view.inode(InodeId(record.after_inode))? } else { None };
            if waits_for.is_some_and(|(_, inode)| !inode.completed || inode.persist_id > 0) {
                continue;
            }
            let (sender, receiver) = watch::channel(None);
            active.insert(record.id, receiver);
            let (core, record) = (core.clone(), record.clone());
            tokio::spawn(async move {
                let active = Active { core: core.clone(), id: record.id };
                let outcome = carry_out(&core, &record).await;
                sender.send_replace(Some(outcome));
                drop(active);
                if let Err(e) = core.pending.start_ready(&core) {
                    tracing::warn!(error = %e, "pending changes could not be read");
                }
            });
        }
        Ok(())
    }
}

/// A record under way; however its task ends, it may be started again afterwards.
struct Active {
    core: Arc<Core>,
    id: u64,
}

impl Drop for Active {
    fn drop(&mut self) {
        self.core.pending.active.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.id);
    }
}

/// What the under store said in the end, as it stands in the reply cache.
fn recorded_outcome(core: &Core, call: Option<&Caller>) -> Result<()> {
    let Some(call) = call else { return Ok(()) };
    match core.store.view().record::<Reply>(Cf::Reply, &reply_key(call.client_id, call.sequence))? {
        Some(reply) => crate::apply::refusal(&reply).map_or(Ok(()), Err),
        None => Err(err!(Expired, "the under store has answered, and what it said is not remembered any more: look before repeating the call")),
    }
}

/// Whether an under store's answer is final. Everything else may pass, whatever its cause, and is tried again.
fn is_refusal(e: &Error) -> bool {
    use ErrorKind::*;
    matches!(
        e.kind(),
        NotFound
            | AlreadyExists
            | NotADirectory
            | IsADirectory
            | NotEmpty
            | PermissionDenied
            | InvalidArgument
            | NameTooLong
            | ReadOnly
            | Unsupported
    )
}

async fn carry_out(core: &Arc<Core>, record: &Pending) -> Result<()> {
    let mut backoff = BACKOFF_MIN;
    loop {
        abort_point("pending_read");
        let outcome = {
            let _call = core.pending.calls.acquire().await;
            attempt(core, record).await
        };
        abort_point("pending_done_in_store");
        let (error_kind, error, fingerprints) = match &outcome {
            Ok(fingerprints) => (0, String::new(), fingerprints.clone()),
            Err(e) if !is_refusal(e) => {
                RETRIES.inc();
                tracing::warn!(error = %e, kind = record.kind, "an under store has not taken a change yet; it is tried again");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
                continue;
            }
            Err(e) => {
                if record.client_id == 0 {
                    tracing::error!(error = %e, kind = record.kind, "an under store refuses for good what was asked for by nobody who waits");
                }
                (e.kind().code(), e.message().to_owned(), None)
            }
        };
        let (previous_fingerprint, fingerprint) = fingerprints.unwrap_or_default();
        let finish = FinishPending { pending_id: record.id, error, error_kind, previous_fingerprint, fingerprint };
        match core.own_change(Op::FinishPending(finish)).await {
            Ok(_) => {
                abort_point("pending_finished");
                if record.inode_id > 0 && outcome.is_ok() {
                    core.syncer.note_looked(InodeId(record.inode_id));
                }
                return outcome.map(drop);
            }
            Err(e) => {
                tracing::warn!(error = %e, "the outcome of a pending change was not journaled; it is tried again");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }
}

/// Does it once. Of a renamed file also its fingerprints before and after, when nobody else touched it between.
async fn attempt(core: &Arc<Core>, record: &Pending) -> Result<Option<(String, String)>> {
    // A store that cannot be opened now (its disk is not mounted yet, …) has refused nothing.
    let mount = core.soft.mounts.get(&core.store, &core.config, MountId(record.mount_id)).or_else(|e| {
        let gone = core.store.view().mount(MountId(record.mount_id))?.is_none();
        Err(if gone { e } else { err!(UnderStore, "{}", e.message()) })
    })?;
    // It was acknowledged: the operator's word postpones it.
    if mount.options.ufs.get("ufs_mode").is_some_and(|mode| mode == "readOnly") {
        return Err(err!(UnderStore, "an operator has set the under store of {} to readOnly", mount.path));
    }
    if record.kind == "delete" {
        mount.ufs.delete(&record.source_key, record.folder).await?;
        return Ok(None);
    }
    if record.kind == "mkdir" {
        mount.ufs.mkdir(&record.source_key).await?;
        return Ok(None);
    }
    let before = if record.folder { None } else { mount.ufs.stat(&record.source_key).await.ok() };
    match mount.ufs.rename(&record.source_key, &record.target_key, record.folder).await {
        // Nothing of it had got to the store yet: there is nothing to move.
        Err(e) if e.kind() == ErrorKind::NotFound && record.folder => return Ok(None),
        other => other?,
    }
    let Some(before) = before else { return Ok(None) };
    let after = mount.ufs.stat(&record.target_key).await?;
    // An object store's copy has a new modification time but keeps its ETag; a file keeps its modification time.
    let same = before.length == after.length && (before.fingerprint == after.fingerprint || before.modified_ms == after.modified_ms);
    Ok(same.then_some((before.fingerprint, after.fingerprint)))
}

/// Runs until shutdown: leases, workers, keys, pending records left from before, rate samples.
pub async fn run(core: Arc<Core>, shutdown: CancellationToken) {
    let started = Instant::now();
    let (mut drain, mut replicate) = (Drain::default(), Replicate::default());
    let mut silent = Silent::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        for worker in core.soft.workers.expire(Duration::from_millis(core.config.worker_timeout_ms)) {
            tracing::warn!(%worker, "worker is lost: no heartbeat within master.worker_timeout_ms");
            core.soft.blocks.remove_worker(worker);
            core.soft.orphans.forget_worker(worker);
            core.soft.tasks.forget_worker(worker, true);
            core.soft.replicas_dirty.store(true, Ordering::Relaxed);
            core.persist.wake();
        }
        // By then every worker that is there has told so.
        if started.elapsed() > 2 * Duration::from_millis(core.config.worker_timeout_ms) {
            for (worker, left) in core.soft.workers.stopped() {
                if left {
                    tracing::info!(%worker, "it had left, and is forgotten");
                    core.soft.workers.forget(worker);
                }
                if let Err(e) = core.stay(worker).await {
                    tracing::warn!(%worker, error = %e, "that its process was to leave is not forgotten yet");
                }
            }
        }
        if let Err(e) = core.journal.running() {
            tracing::error!(error = %e, "the master stops: start it again when the cause is mended");
            return shutdown.cancel();
        }
        let looked = core.clone();
        // All blocks of such workers are looked at.
        (drain, replicate) = tokio::task::spawn_blocking(move || {
            drain.round(&looked);
            replicate.round(&looked);
            (drain, replicate)
        })
        .await
        .unwrap_or_default();
        core.metrics.sample();
        if let Err(e) = core.keys.rotate() {
            tracing::error!(error = %e, "token keys were not rotated");
        }
        if let Err(e) = core.pending.start_ready(&core) {
            tracing::error!(error = %e, "pending changes could not be read");
        }
        // Writers could not renew while this master was down: they get one lease's time to come back.
        let all = started.elapsed() > Duration::from_millis(core.config.lease_ttl_ms);
        if all || started.elapsed() > Duration::from_millis(PUBLISH_TTL_MS) {
            expire_leases(&core, all).await;
        }
        if started.elapsed() > Duration::from_millis(core.config.lock_ttl_ms)
            && let Err(e) = end_lock_sessions(&core, &mut silent).await
        {
            tracing::error!(error = %e, "locks of mounts that are silent could not be ended");
        }
    }
}

/// Times to live whose end has to wait, and until when.
type Postponed = HashMap<(u64, InodeId), Instant>;

/// Runs until shutdown: what has outlived its time.
pub async fn run_lives(core: Arc<Core>, shutdown: CancellationToken) {
    let mut postponed = Postponed::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        if let Err(e) = end_lives(&core, &mut postponed).await {
            tracing::error!(error = %e, "what has outlived its time could not be looked up, or ended");
        }
    }
}

/// Frees or deletes what has outlived its time.
async fn end_lives(core: &Arc<Core>, postponed: &mut Postponed) -> Result<()> {
    postponed.retain(|_, until| *until > Instant::now());
    // Those that have to wait are not in the way of those behind them.
    let due = core.store.view().expired(forebay_common::clock::now_ms(), EXPIRED_AT_ONCE + postponed.len())?;
    for (expires_at_ms, id) in due.into_iter().filter(|(at, id)| !postponed.contains_key(&(*at, *id))).collect::<Vec<_>>() {
        let path = core.store.view().path_of(id).ok();
        let mut op = ExpireTtl { inode_id: id.get(), expires_at_ms, give_up: false };
        let done = match free_due(core, id, expires_at_ms).await {
            Ok(()) => core.own_change(Op::ExpireTtl(op)).await,
            Err(e) => Err(e),
        };
        match done {
            Ok(_) => {
                EXPIRED.inc();
                tracing::info!(?path, "the time of a file or folder is over");
            }
            // Being written, or on the move: next time.
            Err(e) if e.is_retryable() && e.kind() != ErrorKind::LimitExceeded => {
                POSTPONED.inc();
                tracing::debug!(error = %e, "the end of a time to live is tried again");
                postponed.insert((expires_at_ms, id), Instant::now() + POSTPONED_FOR);
            }
            Err(e) => {
                tracing::error!(error = %e, ?path, "what has outlived its time stays: it cannot be deleted");
                op.give_up = true;
                core.own_change(Op::ExpireTtl(op)).await?;
            }
        }
    }
    Ok(())
}

/// Drops the cached bytes of an inode whose time is over, where that is what was asked for.
async fn free_due(core: &Arc<Core>, id: InodeId, expires_at_ms: u64) -> Result<()> {
    let found = core.store.view().inode(id)?.filter(|(_, inode)| inode.ttl_expires_at_ms == expires_at_ms && inode.ttl_frees);
    let Some((link, inode)) = found else { return Ok(()) };
    let path = core.store.view().path_of(id)?;
    let found = Found { parent: InodeId(link.parent_id), name: link.name.to_vec(), inode, alias: None };
    let freed = free::below(core, &core.own_identity(), &path, &found).await?;
    tracing::info!(%path, files = freed.files, kept = freed.kept, "freed, for its time is over");
    Ok(())
}

/// Ends leases that ran out; unless `all` only those of publications.
async fn expire_leases(core: &Arc<Core>, all: bool) {
    let leases = match core.store.view().leases() {
        Ok(leases) => leases,
        Err(e) => return tracing::error!(error = %e, "leases could not be read"),
    };
    let now = forebay_common::clock::now_ms();
    for lease in leases.into_iter().filter(|l| l.expires_at_ms <= now && (all || l.publishing)) {
        if lease.publishing {
            tracing::info!(file = lease.file_id, "a publication was not heard of again: the file is written out anew");
        } else if lease.holder.is_empty() {
            tracing::info!(file = lease.file_id, principal = lease.principal, "a lease ran out: the unfinished file is removed");
        }
        if !lease.holder.is_empty() {
            if let Err(e) = hadoop::recover(core, &lease, true).await {
                tracing::warn!(error = %e, file = lease.file_id, "a file of a Hadoop client could not be completed; it is tried again");
            }
            continue;
        }
        let op = Abandon { file_id: lease.file_id, lease_id: lease.id, expired_only: true };
        match core.own_change(Op::Abandon(op)).await {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::Busy => {}
            Err(e) => tracing::warn!(error = %e, file = lease.file_id, "a lease could not be ended"),
        }
    }
}

/// Sessions of locks: when each was to expire when it was looked at last, and since when that is so by a clock that nobody sets.
type Silent = HashMap<u64, (u64, Instant)>;

/// Takes their locks from mounts that were not heard of for too long, by both clocks.
async fn end_lock_sessions(core: &Arc<Core>, silent: &mut Silent) -> Result<()> {
    let now = forebay_common::clock::now_ms();
    let sessions = core.store.view().lock_sessions()?;
    SESSIONS.set(sessions.len() as i64);
    silent.retain(|id, _| sessions.iter().any(|session| session.id == *id));
    for session in sessions {
        let seen = silent.entry(session.id).or_insert((session.expires_at_ms, Instant::now()));
        if seen.0 != session.expires_at_ms {
            *seen = (session.expires_at_ms, Instant::now());
        }
        if !session.ending && (session.expires_at_ms > now || seen.1.elapsed() < Duration::from_millis(session.ttl_ms)) {
            continue;
        }
        tracing::warn!(holder = session.holder, files = session.files, "a mount that holds locks is silent: others may take them");
        core.own_change(Op::EndLocks(EndLocks { session_id: session.id, expired_only: true })).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_touch_by_whole_names() {
        assert!(touches(b"a", b"a/b") && touches(b"a/b", b"a") && touches(b"a", b"a") && touches(b"", b"x"));
        assert!(!touches(b"a", b"ab") && !touches(b"a/b", b"a/c"));
    }
}
