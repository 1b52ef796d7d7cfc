//! Jobs: long work on many files, done by the workers, split by block, with progress; journaled, so that a new master goes on.
//!
//! A job walks the files of its paths and has each handled by its kind (`load`, `copy`, `persist`, `free`, `replicate`), as many at a
//! time as keep all workers busy. It is done again from the start after a restart of the master: each kind skips what is done
//! already. What a job does is done on behalf of who started it.

mod copy;
mod free;
mod load;
mod persist;
mod pieces;
mod replicate;

use crate::apply::RUNNING;
use crate::core::Core;
use crate::mount::{self, Entry, Told};
use crate::namespace::Who;
use crate::store::{Cf, Reader, id_key};
use forebay_common::limits::JOB_FAILURES_KEPT;
use forebay_common::{AbsPath, Error, ErrorKind, Result, counter, err, gauge};
use forebay_proto::journal::{StartJob, UpdateJob, command::Op};
use forebay_proto::store::Inode;
use forebay_proto::{Caller, Job, JobFailure};
use forebay_ufs::Bandwidth;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

counter!(STARTED, "forebay_master_jobs_total", "jobs that were started");
gauge!(AT_WORK, "forebay_master_jobs_running", "jobs that run");

/// Files that wait between the walk and the work.
const FOUND_QUEUE: usize = 1_024;
/// Files handled at a time.
const FILES_AT_ONCE: usize = 512;
/// How often the progress of a job is journaled.
const REPORT_EVERY: Duration = Duration::from_secs(2);

/// A job at work.
pub struct Running {
    job: Mutex<Job>,
    pub cancel: CancellationToken,
    pub bandwidth: Bandwidth,
    pub who: Who,
}

/// What became of one file.
pub enum Done {
    /// It took so many bytes.
    Did(u64),
    /// Nothing was to be done.
    Nothing,
}

impl Running {
    pub fn job(&self) -> MutexGuard<'_, Job> {
        self.job.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn fail(&self, path: &AbsPath, e: &Error) {
        let mut job = self.job();
        job.files_failed += 1;
        if job.failures.len() < JOB_FAILURES_KEPT {
            job.failures.push(JobFailure { path: mount::raw(path), error: e.to_string() });
        }
    }

    /// Counts a file's outcome.
    pub fn count(&self, path: &AbsPath, inode: &Inode, outcome: &Result<Done>) {
        let loads = self.job().kind == "load";
        match outcome {
            Ok(Done::Did(bytes)) => {
                let mut job = self.job();
                job.files_done += 1;
                job.bytes_done += bytes;
            }
            Ok(Done::Nothing) => {
                let mut job = self.job();
                job.files_done += 1;
                job.files_skipped += 1;
                job.bytes_done += inode.length;
            }
            Err(e) if loads && e.kind() == ErrorKind::NoSpace => self.note_partly(),
            Err(e) => self.fail(path, e),
        }
    }

    /// A file that is not cached whole although it was loaded.
    pub fn note_partly(&self) {
        self.job().files_partly += 1;
    }
}

#[derive(Default)]
pub struct Jobs {
    running: Mutex<HashMap<u64, Arc<Running>>>,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Running>>> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Starts one and returns its id. Errors: what it asks for makes no sense.
    pub async fn start(&self, core: &Arc<Core>, caller: Option<&Caller>, job: Job) -> Result<u64> {
        check(&job)?;
        let reply = core.change(caller, Op::StartJob(StartJob { job: Some(job) })).await?;
        // Sent again after an answer that was lost: it runs, or is over.
        let known = self.lock().contains_key(&reply.job_id);
        if let Some(job) = core.store.view().record::<Job>(Cf::Job, &id_key(reply.job_id))?.filter(|job| !known && job.state == RUNNING) {
            self.begin(core, job);
        }
        Ok(reply.job_id)
    }

    /// Goes on with what an earlier master was at.
    pub fn resume(&self, core: &Arc<Core>) -> Result<()> {
        for job in core.store.view().jobs()?.into_iter().filter(|job| job.state == RUNNING) {
            tracing::info!(job = job.id, kind = job.kind, "a job goes on");
            let fresh = Job {
                files_found: 0,
                files_done: 0,
                files_failed: 0,
                files_skipped: 0,
                files_partly: 0,
                bytes_found: 0,
                bytes_done: 0,
                all_found: false,
                failures: Vec::new(),
                ..job
            };
            self.begin(core, fresh);
        }
        Ok(())
    }

    fn begin(&self, core: &Arc<Core>, job: Job) {
        let who = Who { user: job.principal.clone(), groups: job.groups.clone(), superuser: job.superuser };
        let running = Arc::new(Running { bandwidth: Bandwidth::new(job.bandwidth), cancel: CancellationToken::new(), who, job: Mutex::new(job) });
        let id = running.job().id;
        if self.lock().insert(id, running.clone()).is_some() {
            return;
        }
        STARTED.inc();
        AT_WORK.inc();
        let core = core.clone();
        tokio::spawn(async move {
            run(&core, &running).await;
            core.jobs.lock().remove(&id);
            AT_WORK.dec();
        });
    }

    /// All jobs, or one, newest first, as they stand.
    pub fn list(&self, core: &Core, id: u64) -> Result<Vec<Job>> {
        let mut jobs = if id == 0 { core.store.view().jobs()? } else { core.store.view().record(Cf::Job, &id_key(id))?.into_iter().collect() };
        if jobs.is_empty() && id > 0 {
            return Err(err!(NotFound, "there is no job {id}: `forebay job ls` lists them"));
        }
        for job in &mut jobs {
            if job.state == RUNNING
                && let Some(running) = self.lock().get(&job.id)
            {
                *job = running.job().clone();
            }
        }
        jobs.reverse();
        Ok(jobs)
    }

    /// Ends one. Errors: `NotFound`, `InvalidArgument` for one that is over, `PermissionDenied` for somebody else's.
    pub async fn cancel(&self, core: &Core, who: &Who, id: u64) -> Result<()> {
        let job = self.list(core, id)?.remove(0);
        if !who.superuser && who.user != job.principal {
            return Err(err!(PermissionDenied, "job {id} is of user {}", job.principal));
        }
        if job.state != RUNNING {
            return Err(err!(InvalidArgument, "job {id} is over: {}", job.state));
        }
        let running = self.lock().get(&id).cloned();
        if let Some(running) = running {
            running.cancel.cancel();
        }
        let job = Job { state: "cancelled".into(), ..job };
        core.own_change(Op::UpdateJob(UpdateJob { job: Some(job) })).await.map(drop)
    }
}

fn check(job: &Job) -> Result<()> {
    let kinds = ["load", "free", "persist", "replicate", "copy"];
    if !kinds.contains(&job.kind.as_str()) {
        return Err(err!(InvalidArgument, "there is no job {:?}: there are {}", job.kind, kinds.join(", ")));
    }
    if job.paths.is_empty() {
        return Err(err!(InvalidArgument, "a job needs a path"));
    }
    for path in &job.paths {
        AbsPath::parse(path)?;
    }
    if job.kind == "copy" {
        AbsPath::parse(&job.target)?;
    }
    if !["", "MEM", "SSD", "HDD"].contains(&job.tier.as_str()) {
        return Err(err!(InvalidArgument, "there is no tier {:?}: there are MEM, SSD and HDD", job.tier));
    }
    Ok(())
}

async fn run(core: &Arc<Core>, running: &Arc<Running>) {
    let kind = running.job().kind.clone();
    let work = async {
        match kind.as_str() {
            "load" => load::run(core, running).await,
            "free" => free::run(core, running).await,
            "persist" => persist::run(core, running).await,
            "replicate" => replicate::run(core, running).await,
            _ => copy::run(core, running).await,
        }
    };
    let mut work = std::pin::pin!(work);
    let mut tick = tokio::time::interval(REPORT_EVERY);
    tick.tick().await;
    let ended = loop {
        tokio::select! {
            () = running.cancel.cancelled() => return,
            ended = &mut work => break ended,
            _ = tick.tick() => {
                let job = running.job().clone();
                if let Err(e) = core.own_change(Op::UpdateJob(UpdateJob { job: Some(job) })).await {
                    tracing::warn!(error = %e, "the progress of a job was not journaled");
                }
            }
        }
    };
    let job = {
        let mut job = running.job();
        job.state = match &ended {
            Ok(()) if job.files_failed + job.files_partly == 0 => "done".to_owned(),
            _ => "failed".to_owned(),
        };
        job.message = match &ended {
            Ok(()) if job.files_failed > 0 => format!("{} files failed", job.files_failed),
            Ok(()) if job.files_partly > 0 => format!("{} files are cached in part: the tiers have no room for all of it", job.files_partly),
            Ok(()) => String::new(),
            Err(e) => e.message().to_owned(),
        };
        Job { state: job.state.clone(), ..job.clone() }
    };
    tracing::info!(job = job.id, kind = job.kind, state = job.state, files = job.files_done, failed = job.files_failed, "a job is over");
    let mut backoff = Duration::from_millis(100);
    while let Err(e) = core.own_change(Op::UpdateJob(UpdateJob { job: Some(job.clone()) })).await {
        tracing::warn!(error = %e, "the end of a job was not journaled; it is tried again");
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(Duration::from_secs(10));
    }
}

/// Whether a path holds a glob.
fn is_glob(path: &AbsPath) -> bool {
    path.as_bytes().iter().any(|b| b"*?[{".contains(b))
}

/// Finds the entries of a path: one that exists, or those that a glob matches, with all below them.
async fn find(core: &Arc<Core>, who: &Who, path: &AbsPath, sender: &mpsc::Sender<Told>) -> Result<()> {
    let exists = core.syncer.resolve(core, who, path).await.is_ok_and(|r| r.walk.is_complete());
    if exists || !is_glob(path) {
        mount::entries(core, who, path.clone(), sender).await;
        return Ok(());
    }
    let pattern = String::from_utf8_lossy(path.as_bytes()).into_owned();
    let glob = globset::GlobBuilder::new(&pattern).literal_separator(true).build();
    let matcher = glob.map_err(|e| err!(InvalidArgument, "{pattern}: {e}"))?.compile_matcher();
    let literal = path.components().take_while(|name| !name.iter().any(|b| b"*?[{".contains(b)));
    let base = literal.into_iter().try_fold(AbsPath::root(), |at, name| at.join(name))?;
    let (all, mut found) = mpsc::channel::<Told>(FOUND_QUEUE);
    let walk = async {
        mount::entries(core, who, base, &all).await;
        drop(all);
    };
    let take = async {
        while let Some(told) = found.recv().await {
            let matches = |path: &AbsPath| {
                let mut at = Some(path.clone());
                while let Some(p) = at {
                    if matcher.is_match(String::from_utf8_lossy(p.as_bytes()).as_ref()) {
                        return true;
                    }
                    at = p.parent();
                }
                false
            };
            if told.as_ref().map_or(true, |entry| matches(&entry.path)) && sender.send(told).await.is_err() {
                found.close();
            }
        }
    };
    // `all` is dropped by the walk, which ends `take`.
    tokio::join!(walk, take);
    Ok(())
}

/// What is done with one entry.
type Handled = BoxFuture<'static, Result<Done>>;

/// Has each entry of a job's paths handled by `handle`, several at a time, and counts what came of it. Folders are handled only if
/// `folders` says so, and are not counted. What is under way ends when this is dropped.
async fn each(core: &Arc<Core>, running: &Arc<Running>, folders: bool, handle: impl Fn(AbsPath, Inode) -> Handled + Send) -> Result<()> {
    let paths: Vec<AbsPath> = running.job().paths.iter().map(AbsPath::parse).collect::<Result<_>>()?;
    let (sender, mut receiver) = mpsc::channel::<Told>(FOUND_QUEUE);
    let mut under_way = JoinSet::new();
    {
        let (core, running) = (core.clone(), running.clone());
        under_way.spawn(async move {
            for path in paths {
                if let Err(e) = find(&core, &running.who, &path, &sender).await {
                    running.fail(&path, &e);
                }
            }
            running.job().all_found = true;
        });
    }
    while let Some(told) = receiver.recv().await {
        match told {
            Err((path, e)) => running.fail(&path, &e),
            Ok(entry) if entry.inode.folder && !folders => {}
            Ok(Entry { path, inode }) => {
                if !inode.folder {
                    let mut job = running.job();
                    job.files_found += 1;
                    job.bytes_found += inode.length;
                }
                let (running, handled) = (running.clone(), handle(path.clone(), inode.clone()));
                under_way.spawn(async move {
                    match (handled.await, inode.folder) {
                        (Err(e), true) => running.fail(&path, &e),
                        (Ok(_), true) => {}
                        (outcome, false) => running.count(&path, &inode, &outcome),
                    }
                });
            }
        }
        while under_way.len() >= FILES_AT_ONCE {
            ended(under_way.join_next().await);
        }
    }
    while let Some(one) = under_way.join_next().await {
        ended(Some(one));
    }
    Ok(())
}

fn ended(task: Option<std::result::Result<(), tokio::task::JoinError>>) {
    if let Some(Err(e)) = task {
        tracing::error!(error = %e, "part of a job ended without an outcome");
    }
}

/// How long a job waits for workers after the master began: they register within a heartbeat or two.
const WORKERS_WAIT: Duration = Duration::from_secs(20);

/// Waits until so many workers take blocks, as long as the master is young. Returns how many there are.
async fn workers(core: &Core, wanted: usize) -> Result<usize> {
    loop {
        let there = core.soft.workers.live().iter().filter(|w| !w.leaving).count();
        if there >= wanted {
            return Ok(there);
        }
        let age = Duration::from_millis(forebay_common::clock::now_ms().saturating_sub(core.started_ms));
        if age > WORKERS_WAIT {
            return Err(err!(Unavailable, "{wanted} copies were asked for, and there are {there} workers that take blocks"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether trying again elsewhere, or a little later, may help.
fn may_pass(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::Busy | ErrorKind::Timeout | ErrorKind::UnderStore)
}
