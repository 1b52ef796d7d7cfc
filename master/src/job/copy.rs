//! `copy`: files and folders to another place, within a mount or between mounts, the bytes moved by the workers. With `move` the
//! source goes when all of it has arrived.
//!
//! Each file is created under a lease, written to its under store by a worker (a large one by all of them, see `pieces`) from wherever its bytes
//! are, and completed: nobody sees half a file. A file that is there already and was written by this very job is left alone.

use super::{Done, Running, each, pieces};
use crate::core::Core;
use crate::mount::raw;
use crate::namespace::{self, READ, Who};
use crate::source;
use crate::store::Reader;
use forebay_common::token::UfsSource;
use forebay_common::{AbsPath, ErrorKind, InodeId, Result, WorkerId, err};
use forebay_proto::WriteOut;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::Inode;
use forebay_proto::task::What;
use futures::FutureExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Files on their way at once, per worker.
const FILES_PER_WORKER: usize = 16;
/// How long one deletion waits for the under store.
const STORE_FOLLOWS: Duration = Duration::from_secs(3_600);

pub async fn run(core: &Arc<Core>, running: &Arc<Running>) -> Result<()> {
    let (top, target, moves) = {
        let job = running.job();
        (AbsPath::parse(&job.paths[0])?, AbsPath::parse(&job.target)?, job.r#move)
    };
    if target.starts_with(&top) {
        return Err(err!(InvalidArgument, "{top} cannot be copied below itself"));
    }
    if !core.syncer.resolve(core, &running.who, &top).await?.walk.is_complete() {
        return Err(err!(NotFound, "{top} does not exist"));
    }
    super::workers(core, 1).await?;
    let workers = core.soft.workers.live().len().max(1);
    let permits = Arc::new(Semaphore::new(FILES_PER_WORKER * workers));
    let in_pieces = Arc::new(Semaphore::new(pieces::at_once(workers)));
    let depth = top.components().count();
    // What was copied, as it was then.
    let copied: Arc<Mutex<Vec<(AbsPath, Inode)>>> = Arc::default();
    each(core, running, true, |path, inode| {
        let (core, running, permits, in_pieces) = (core.clone(), running.clone(), permits.clone(), in_pieces.clone());
        let (target, copied) = (target.clone(), copied.clone());
        async move {
            let at = path.components().skip(depth).try_fold(target, |at, name| at.join(name))?;
            let entry = (path.clone(), inode.clone());
            let done = if inode.folder {
                folder(&core, &running.who, &at, &inode).await?
            } else if inode.kind > 0 {
                let op = journal::MakeNode { path: raw(&at), kind: inode.kind, mode: inode.mode, target: inode.target.clone(), device: inode.device };
                match core.change_as(&running.who, Op::MakeNode(op)).await {
                    Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                    _ => Done::Nothing,
                }
            } else {
                let _permit = permits.acquire().await;
                file(&core, &running, &in_pieces, path, inode, at).await?
            };
            if moves {
                copied.lock().unwrap_or_else(|e| e.into_inner()).push(entry);
            }
            Ok(done)
        }
        .boxed()
    })
    .await?;
    // An empty folder alone has no entry below it that would have made it.
    let resolved = core.syncer.resolve(core, &running.who, &top).await?;
    if let Ok(found) = resolved.found(&top)
        && found.inode.folder
    {
        folder(core, &running.who, &target, &found.inode).await?;
    }
    // Nothing goes unless every file that was found is there.
    let whole = {
        let job = running.job();
        job.all_found && job.files_failed + job.files_partly == 0 && job.files_done == job.files_found
    };
    if moves && !whole {
        return Err(err!(Unavailable, "not all of {top} was copied: nothing of it was deleted"));
    }
    if moves {
        let mut copied = std::mem::take(&mut *copied.lock().unwrap_or_else(|e| e.into_inner()));
        if let Some((_, top_inode)) = core.store.view().inode(InodeId(resolved.found(&top)?.inode.id))?
            && top_inode.folder
        {
            copied.push((top.clone(), top_inode));
        }
        delete_copied(core, &running.who, copied).await?;
    }
    Ok(())
}

/// Deletes what was copied and is still what it was; folders last, and only those that are empty by then: what was written there
/// meanwhile stays.
async fn delete_copied(core: &Arc<Core>, who: &Who, mut copied: Vec<(AbsPath, Inode)>) -> Result<()> {
    // Of a file with several names first those that are no key in its store: taking that one away would change the file.
    let is_record =
        |path: &AbsPath, inode: &Inode| inode.other_names.is_empty() || core.store.view().path_of(InodeId(inode.id)).is_ok_and(|at| at == *path);
    copied.sort_by_cached_key(|(path, inode)| (inode.folder, is_record(path, inode), std::cmp::Reverse(path.components().count())));
    for (path, was) in copied {
        let now = core.store.view().inode(InodeId(was.id))?.map(|(_, inode)| inode);
        let same = now.is_some_and(|now| now.folder || (now.content_version == was.content_version && now.fingerprint == was.fingerprint));
        if !same {
            continue;
        }
        match core.change_as(who, Op::Delete(journal::Delete { path: raw(&path), recursive: false })).await {
            Ok(reply) if reply.pending_id > 0 => core.pending.wait(core, reply.pending_id, None, STORE_FOLLOWS).await?,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotEmpty | ErrorKind::NotFound | ErrorKind::Busy) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

async fn folder(core: &Arc<Core>, who: &Who, path: &AbsPath, like: &Inode) -> Result<Done> {
    let resolved = core.syncer.resolve(core, who, path).await?;
    if !resolved.walk.is_complete() {
        namespace::check_folder_of(who, &resolved.walk.deepest().inode, path)?;
        if let Some(mount) = resolved.mount.as_ref().filter(|m| !m.read_only) {
            crate::apply::check_arrived(&core.store.view(), path)?;
            mount.ufs.mkdir(&resolved.walk.ufs_key(path)).await?;
        }
    }
    let op = journal::Mkdir { path: raw(path), recursive: true, exist_ok: true, mode: like.mode, ..journal::Mkdir::default() };
    core.change_as(who, Op::Mkdir(op)).await?;
    Ok(Done::Nothing)
}

async fn file(core: &Arc<Core>, running: &Running, in_pieces: &Semaphore, path: AbsPath, inode: Inode, target: AbsPath) -> Result<Done> {
    let who = &running.who;
    namespace::check(who, &inode, READ, &path)?;
    if !inode.completed {
        return Err(err!(Busy, "{path} is still being written"));
    }
    let (overwrite, created_ms) = {
        let job = running.job();
        (job.overwrite, job.created_ms)
    };
    let resolved = core.syncer.resolve(core, who, &target).await?;
    if let Ok(found) = resolved.found(&target) {
        // What sync found there is cached by rule, what this job writes is not.
        let ours = !found.inode.cached
            && found.inode.content_version == 1
            && found.inode.completed
            && found.inode.created_ms >= created_ms
            && found.inode.length == inode.length
            && found.inode.owner == who.user;
        if ours && !found.inode.folder {
            return Ok(Done::Nothing);
        }
        end_earlier(core, who, &found.inode, created_ms).await?;
        let found = core.store.view().inode(InodeId(found.inode.id))?;
        let overwrite = overwrite || found.is_none();
        if !overwrite {
            return Err(err!(AlreadyExists, "{target} exists already: use --force to replace it"));
        }
    }
    let Some(mount) = resolved.mount.clone() else { return Err(err!(InvalidArgument, "{target} lies in no mount")) };
    let (_, ufs) = read_source(core, &inode)?;
    let (holder, _) = source::holder_of_most(core, &inode);
    let live = core.soft.workers.live();
    let worker = holder.filter(|w| !w.leaving).or_else(|| live.into_iter().filter(|w| !w.leaving).max_by_key(|w| w.free_bytes));
    let worker = worker.ok_or_else(|| err!(Unavailable, "no worker is there to copy with"))?;
    let create = journal::Create {
        path: raw(&target),
        overwrite,
        recursive: true,
        mode: inode.mode,
        block_size_bytes: mount.options.block_size_bytes,
        page_size_bytes: mount.options.page_size_bytes,
        to_ufs: true,
        cached: false,
        lease_ttl_ms: core.config.lease_ttl_ms,
        worker_id: worker.id.get(),
        ..journal::Create::default()
    };
    let made = core.change_as(who, Op::Create(create)).await?;
    // Of a target that is one of several names of a file it is another one's.
    let key = {
        let view = core.store.view();
        let stored_at = view.path_of(InodeId(made.file_id))?;
        namespace::walk(&view, &stored_at)?.ufs_key(&stored_at)
    };
    let split = pieces::split(core, &mount, &key, &inode);
    let written = while_leased(core, made.file_id, made.lease_id, async {
        let begun = match split {
            Some(split) => pieces::begin(split, &inode).await,
            None => None,
        };
        if let Some(upload) = begun {
            return pieces::write(core, running, in_pieces, upload, &inode, ufs, &made).await;
        }
        running.bandwidth.take(inode.length).await;
        let from = source::file_bytes(core, &inode, ufs, worker.id)?;
        let (file_id, lease_id) = (made.file_id, made.lease_id);
        write_out(core, worker.id, WriteOut { from: Some(from), mount_id: mount.id.get(), key: key.into(), file_id, lease_id, content_version: 0 })
            .await
    })
    .await;
    let fingerprint = match written {
        Ok(fingerprint) => fingerprint,
        Err(e) => {
            let abandon = journal::Abandon { file_id: made.file_id, lease_id: made.lease_id, expired_only: false };
            let _ = core.change_as(who, Op::Abandon(abandon)).await;
            return Err(e);
        }
    };
    let complete =
        journal::Complete { file_id: made.file_id, lease_id: made.lease_id, length: inode.length, fingerprint, ..journal::Complete::default() };
    core.change_as(who, Op::Complete(complete)).await?;
    core.syncer.note_looked(InodeId(made.file_id));
    Ok(Done::Did(inode.length))
}

/// A file that this job was at when the master before this one died: nobody completes it, and its worker publishes nothing once its lease is gone.
async fn end_earlier(core: &Arc<Core>, who: &Who, inode: &Inode, created_ms: u64) -> Result<()> {
    let Some(lease) = core.store.view().lease(inode.lease_id)?.filter(|l| !l.publishing && l.holder.is_empty()) else { return Ok(()) };
    let before_this_master = (created_ms..core.started_ms).contains(&inode.created_ms);
    let of_this_job = !inode.completed && !inode.cached && before_this_master && lease.principal == who.user;
    if !of_this_job {
        return Ok(());
    }
    let abandon = journal::Abandon { file_id: inode.id, lease_id: lease.id, expired_only: false };
    core.change_as(who, Op::Abandon(abandon)).await.map(drop)
}

/// Where a file's bytes are in its under store, if they are.
fn read_source(core: &Core, inode: &Inode) -> Result<(AbsPath, Option<UfsSource>)> {
    let view = core.store.view();
    let path = view.path_of(InodeId(inode.id))?;
    let walk = namespace::walk(&view, &path)?;
    let Some((mount_id, _)) = walk.mount.filter(|_| inode.persisted) else { return Ok((path, None)) };
    let key = walk.ufs_key(&path);
    let previous_key = crate::mount::previous_key(&view, walk.mount, &key)?;
    Ok((path, Some(UfsSource { mount_id: mount_id.get(), key, fingerprint: inode.fingerprint.clone(), previous_key })))
}

/// Has a worker write a file out.
async fn write_out(core: &Arc<Core>, worker: WorkerId, order: WriteOut) -> Result<String> {
    let lease_id = order.lease_id;
    let done = core.soft.tasks.submit(worker, What::WriteOut(order)).outcome().await?;
    if done.lease_id != lease_id {
        return Err(err!(Internal, "a worker answered for another file than the one that was copied"));
    }
    Ok(done.fingerprint)
}

/// Keeps a lease alive while the work goes on. Errors: also the lease is over, and the work is given up.
async fn while_leased<T>(core: &Arc<Core>, file_id: u64, lease_id: u64, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(Duration::from_millis(core.config.lease_ttl_ms / 3)) => {
                match core.hold_lease(file_id, lease_id).await {
                    Err(e) if e.kind() == ErrorKind::Expired => return Err(e),
                    Err(e) => tracing::warn!(error = %e, "the lease of a copy was not renewed"),
                    Ok(_) => {}
                }
            }
        }
    }
}
