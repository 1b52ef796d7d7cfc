//! The namespace, for clients.

use super::{encode, mounts, placement};
use crate::core::Core;
use crate::mount::{self, Mounted, PathConfig, Resolved, WriteType, raw};
use crate::namespace::{self, READ, Walk, Who};
use crate::store::{Cf, Reader};
use crate::{free, passive, replicate};
use forebay_common::config::Locality;
use forebay_common::layout::shorter_than;
use forebay_common::limits::LIST_BATCH_ENTRIES;
use forebay_common::token::UfsSource;
use forebay_common::{AbsPath, ErrorKind, InodeId, MountId, Result, err};
use forebay_proto::convert::to_status;
use forebay_proto::file_system_server::FileSystem;
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::Inode;
use forebay_proto::*;
use futures::{Stream, StreamExt};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// The umask of files and folders made without a mode.
const UMASK: u32 = 0o022;
/// Nanoseconds beyond a millisecond.
const NANOSECONDS_MAX: u32 = 999_999;
/// How long a call waits for the under store to follow a deletion or a rename.
const PENDING_WAIT: Duration = Duration::from_secs(50);
/// Messages of a listing that may wait for a slow client.
const LIST_QUEUE: usize = 4;

pub struct Service(pub Arc<Core>);

impl Service {
    /// Resolves what a caller names.
    pub(super) async fn resolve(&self, caller: Option<&Caller>, path: &[u8]) -> Result<(Who, AbsPath, Resolved)> {
        let who = self.0.who(caller)?;
        let path = AbsPath::parse(path)?;
        let resolved = self.0.syncer.resolve(&self.0, &who, &path).await?;
        Ok((who, path, resolved))
    }

    /// Resolves what a caller makes; where its bytes, or its name, are acknowledged without the store, without waiting for that.
    pub(super) async fn resolve_new(&self, caller: Option<&Caller>, path: &[u8], kept_alone: Option<bool>) -> Result<(Who, AbsPath, Resolved)> {
        let who = self.0.who(caller)?;
        let path = AbsPath::parse(path)?;
        let without_store = match kept_alone {
            Some(kept_alone) => kept_alone,
            None => {
                let walk = namespace::walk(&self.0.store.view(), &path)?;
                let mount = walk.mount.and_then(|(id, _)| self.0.soft.mounts.get(&self.0.store, &self.0.config, id).ok());
                later(&walk, mount.as_deref())
            }
        };
        let resolved =
            if without_store { self.0.syncer.resolve_free(&self.0, &who, &path).await? } else { self.0.syncer.resolve(&self.0, &who, &path).await? };
        Ok((who, path, resolved))
    }

    pub(super) fn status_by_id(&self, id: u64) -> Result<(AbsPath, Inode, FileStatus)> {
        let view = self.0.store.view();
        let id = InodeId(id);
        let inode = if id == InodeId::ROOT { Some(view.root()?) } else { view.inode(id)?.map(|(_, inode)| inode) };
        let inode = inode.ok_or_else(|| err!(NotFound, "the file is gone already"))?;
        let path = view.path_of(id)?;
        let walk = namespace::walk(&view, &path)?;
        let mount = walk.mount.map(|(id, _)| self.0.soft.mounts.get(&self.0.store, &self.0.config, id)).transpose()?;
        let status = encode::status(&path, &inode, mount.as_deref(), &walk.ufs_key(&path));
        Ok((path, inode, status))
    }

    async fn get_status_inner(&self, request: GetStatusRequest) -> Result<GetStatusResponse> {
        let (_, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let found = resolved.found(&path)?;
        let mut status = encode::status(&path, &found.inode, resolved.mount.as_deref(), &resolved.walk.ufs_key(&path));
        let (mut blocks, mut workers) = (Vec::new(), Vec::new());
        if request.with_blocks && !found.inode.folder {
            blocks = encode::blocks(&self.0, &found.inode, &mut status);
            workers = self.0.soft.workers.live().into_iter().map(|w| w.address).collect();
        }
        Ok(GetStatusResponse { status: Some(status), blocks, workers })
    }

    async fn list_inner(&self, request: ListRequest) -> Result<mpsc::Receiver<Result<ListResponse, Status>>> {
        let (who, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let found = resolved.found(&path)?;
        let (sender, receiver) = mpsc::channel(LIST_QUEUE);
        if !found.inode.folder {
            let status = encode::status(&path, &found.inode, resolved.mount.as_deref(), &resolved.walk.ufs_key(&path));
            let _ = sender.try_send(Ok(ListResponse { entries: vec![status], ..ListResponse::default() }));
            return Ok(receiver);
        }
        namespace::check(&who, &found.inode, READ, &path)?;
        let limit = request.limit as usize;
        if limit > 0 {
            if request.recursive {
                return Err(err!(InvalidArgument, "a recursive listing has no limit"));
            }
            self.0.syncer.sync_first(&self.0, &path, &resolved, limit).await?;
        } else {
            self.0.syncer.sync_folder(&self.0, &path, &resolved).await?;
        }
        let core = self.0.clone();
        tokio::spawn(async move {
            if let Err(e) = send_listing(core, who, path, request.recursive, limit, &sender).await {
                let _ = sender.send(Err(to_status(&e))).await;
            }
        });
        Ok(receiver)
    }

    /// Where a call comes from. Outside of a cluster a client's sockets say all there is to say.
    fn from<T>(&self, request: &Request<T>, node: &str) -> placement::Origin {
        let ip = request.remote_addr().map(|address| address.ip()).filter(|_| self.0.kubernetes_config.locality != Locality::None);
        placement::Origin { ip, node: node.to_owned() }
    }

    async fn open_inner(&self, from: placement::Origin, request: OpenRequest) -> Result<OpenResponse> {
        let (who, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let found = resolved.found(&path)?;
        if found.inode.folder {
            return Err(err!(IsADirectory, "{path} is a folder"));
        }
        namespace::check(&who, &found.inode, READ, &path)?;
        if !found.inode.completed {
            return Err(err!(Busy, "{path} is still being written"));
        }
        if found.inode.kind > 0 {
            return Err(err!(InvalidArgument, "{path} is a link, pipe, socket or device, and holds no bytes"));
        }
        let key = resolved.walk.ufs_key(&path);
        let mut status = encode::status(&path, &found.inode, resolved.mount.as_deref(), &key);
        let mut blocks = encode::blocks(&self.0, &found.inode, &mut status);
        let source = match &resolved.mount {
            Some(mount) if found.inode.persisted => Some(UfsSource {
                mount_id: mount.id.get(),
                previous_key: mount::previous_key(&self.0.store.view(), resolved.walk.mount, &key)?,
                key,
                fingerprint: found.inode.fingerprint.clone(),
            }),
            _ => None,
        };
        passive::note_open(&self.0, &found.inode, resolved.mount.as_deref(), &request.local_workers, &blocks);
        let (workers, token_expires_at_ms) = placement::for_reading(&self.0, &who, &from, &found.inode, source, &request.local_workers, &mut blocks)?;
        Ok(OpenResponse { status: Some(status), blocks, workers, token_expires_at_ms })
    }

    async fn create_inner(&self, from: placement::Origin, request: CreateRequest) -> Result<CreateResponse> {
        let core = &self.0;
        let named: Option<WriteType> = if request.write_type.is_empty() { None } else { Some(request.write_type.parse()?) };
        let kept_alone = named.map(|w| matches!(w, WriteType::Async | WriteType::CacheOnly));
        let (who, path, resolved) = self.resolve_new(request.caller.as_ref(), &request.path, kept_alone).await?;
        let options = resolved.mount.as_ref().map(|m| m.options.clone());
        let on_path = PathConfig::of(&resolved.walk);
        let write_type = named.or(on_path.write_type).or(options.as_ref().map(|o| o.write_type)).unwrap_or(WriteType::Through);
        let (to_ufs, cached) = match write_type {
            WriteType::Through | WriteType::Async => (true, true),
            WriteType::CacheOnly => (false, true),
            WriteType::UfsOnly => (true, false),
        };
        // Bytes that are in the store when they are acknowledged need no copies.
        let kept_alone = matches!(write_type, WriteType::Async | WriteType::CacheOnly);
        let wished = if request.replicas > 0 { Some(request.replicas) } else { on_path.replicas };
        let replicas = if kept_alone { wished.or(options.as_ref().map(|o| o.replicas)).unwrap_or(1) } else { 1 };
        let there = core.soft.workers.live().iter().filter(|w| !w.leaving).count();
        if kept_alone && replicas as usize > there {
            return Err(err!(Unavailable, "{path} is to be kept {replicas} times before it is acknowledged, and there are {there} workers"));
        }
        let (block_size, page_size) =
            options.map_or((core.config.block_size.as_u64(), core.config.page_size.as_u64()), |o| (o.block_size_bytes, o.page_size_bytes));
        let worker = placement::for_writing(core, &from, &request.local_workers, &request.avoid_workers)?;
        let op = journal::Create {
            path: raw(&path),
            overwrite: request.overwrite,
            recursive: request.recursive,
            mode: if request.mode == 0 { 0o666 & !UMASK } else { request.mode & 0o7777 },
            block_size_bytes: if request.block_size_bytes == 0 { block_size } else { request.block_size_bytes },
            page_size_bytes: page_size,
            to_ufs,
            cached,
            lease_ttl_ms: core.config.lease_ttl_ms,
            worker_id: worker.id.get(),
            block_count: u32::from(cached),
            asynchronous: write_type == WriteType::Async,
            replication_min: if replicas > 1 { replicas } else { 0 },
            replication_max: 0,
            replace: request.replace,
            only_file: request.only_file,
            only_content: request.only_content,
            ..journal::Create::default()
        };
        let reply = core.persist.change(core, request.caller.as_ref(), Op::Create(op), &[&path]).await?;
        let (inode, key) = self.just_made(&path, reply.file_id)?;
        let inode = self.under_construction(inode, reply.lease_id)?;
        check_open_for_writing(&path, &inode, reply.lease_id)?;
        let status = encode::status(&path, &inode, resolved.mount.as_deref(), &key);
        // That of the lease: of a call that was sent again it is the one chosen at first.
        let worker_id = core.store.view().lease(reply.lease_id)?.map_or(0, |lease| lease.worker_id);
        let present = core.soft.workers.present();
        let worker = present
            .iter()
            .find(|w| w.id.get() == worker_id)
            .ok_or_else(|| err!(Unavailable, "the worker that {path} was to be written to is lost: create it again").with_retryable(false))?;
        let target = placement::write_target(core, &who, &inode, resolved.mount.as_deref(), key, worker, reply.block_ids)?;
        Ok(CreateResponse { status: Some(status), target: Some(target) })
    }

    /// The inode of a path that a command of this caller has just made, and its key below its mount.
    fn just_made(&self, path: &AbsPath, file_id: u64) -> Result<(Inode, Vec<u8>)> {
        let walk = namespace::walk(&self.0.store.view(), path)?;
        let found = walk.found(path)?;
        if found.inode.id != file_id {
            return Err(err!(NotFound, "{path} was replaced by somebody else in the meantime"));
        }
        Ok((found.inode.clone(), walk.ufs_key(path)))
    }

    /// A file as the holder of a lease writes it: what is to replace it, where something is.
    fn under_construction(&self, inode: Inode, lease_id: u64) -> Result<Inode> {
        Ok(self.0.store.view().lease(lease_id)?.filter(|lease| lease.file_id == inode.id).and_then(|lease| lease.replacement).unwrap_or(inode))
    }

    async fn add_blocks_inner(&self, request: AddBlocksRequest) -> Result<WriteTarget> {
        let core = &self.0;
        let who = core.who(request.caller.as_ref())?;
        let lease = core.store.view().lease(request.lease_id)?;
        let op = journal::AddBlocks { file_id: request.file_id, lease_id: request.lease_id, count: request.count, ..journal::AddBlocks::default() };
        let reply = core.change(request.caller.as_ref(), Op::AddBlocks(op)).await?;
        let (path, inode, _) = self.status_by_id(reply.file_id)?;
        let inode = self.under_construction(inode, reply.lease_id)?;
        check_open_for_writing(&path, &inode, reply.lease_id)?;
        let walk = namespace::walk(&core.store.view(), &path)?;
        let mount = walk.mount.map(|(id, _)| core.soft.mounts.get(&core.store, &core.config, id)).transpose()?;
        let worker_id = lease.map_or(0, |l| l.worker_id);
        let present = core.soft.workers.present();
        let worker = present
            .iter()
            .find(|w| w.id.get() == worker_id)
            .ok_or_else(|| err!(Unavailable, "the worker that {path} is written to is lost: write the file again"))?;
        placement::write_target(core, &who, &inode, mount.as_deref(), walk.ufs_key(&path), worker, reply.block_ids)
    }

    async fn complete_inner(&self, request: CompleteRequest) -> Result<GetStatusResponse> {
        let core = &self.0;
        core.who(request.caller.as_ref())?;
        let lease = core.store.view().lease(request.lease_id)?;
        let op = journal::Complete {
            file_id: request.file_id,
            lease_id: request.lease_id,
            length: request.length,
            block_ids: request.blocks.iter().map(|b| b.id).collect(),
            block_lengths: request.blocks.iter().map(|b| b.length).collect(),
            fingerprint: request.fingerprint,
            modified_ms: request.modified_ms,
            modified_ns: request.modified_ns.min(NANOSECONDS_MAX),
            expired_only: false,
        };
        if let Some(lease) = &lease {
            // A worker that is to leave has not, before it has told of these blocks.
            core.soft.workers.note_told(forebay_common::WorkerId(lease.worker_id), false);
            let under_construction = core.store.view().inode(InodeId(request.file_id))?.map(|(_, inode)| inode);
            let under_construction = under_construction.map(|inode| self.under_construction(inode, request.lease_id)).transpose()?;
            if let Some(inode) = under_construction.filter(|inode| inode.replication_min > 1 && !inode.completed && !lease.publishing) {
                let who = core.who(request.caller.as_ref())?;
                if !who.superuser && who.user != lease.principal {
                    return Err(err!(PermissionDenied, "user {} does not hold the lease of file {}", who.user, request.file_id));
                }
                let blocks: Vec<(u64, u64)> = request.blocks.iter().map(|b| (b.id, b.length)).collect();
                // The same that `Complete` checks: what is copied is what will be acknowledged.
                let ids: Vec<u64> = namespace::block_ids(&inode).map(|b| b.get()).take(blocks.len()).collect();
                let all: Vec<u64> = blocks.iter().map(|(_, length)| *length).collect();
                let sum = all.iter().try_fold(0u64, |sum, length| sum.checked_add(*length));
                if shorter_than(inode.block_size_bytes, &all).is_none() || sum != Some(request.length) || !blocks.iter().map(|(id, _)| *id).eq(ids) {
                    return Err(err!(InvalidArgument, "the blocks of file {} do not add up to {} bytes", request.file_id, request.length));
                }
                let (first, copies) = (forebay_common::WorkerId(lease.worker_id), inode.replication_min as usize);
                replicate::before_acknowledging(core, &inode, request.length, &blocks, Some(first), copies).await?;
            }
        }
        let reply = core.change(request.caller.as_ref(), Op::Complete(op)).await?;
        core.syncer.note_looked(InodeId(reply.file_id));
        let (_, inode, mut status) = self.status_by_id(reply.file_id)?;
        if let Some(lease) = lease.filter(|_| inode.cached) {
            // Known before the worker's next report; a lost worker's is dropped with it. What it has reported already says in which tier it is.
            let worker = forebay_common::WorkerId(lease.worker_id);
            for (id, length) in request.blocks.iter().map(|b| (forebay_common::BlockId(b.id), b.length)) {
                let told = core.soft.blocks.holders(id).iter().any(|h| h.worker == worker && h.cached_bytes == length);
                if !told {
                    core.soft.blocks.report(worker, id, length, "MEM");
                }
            }
        }
        if inode.persist_id > 0 {
            core.persist.wake();
        }
        let blocks = encode::blocks(core, &inode, &mut status);
        Ok(GetStatusResponse { status: Some(status), blocks, workers: Vec::new() })
    }

    pub async fn mkdir_inner(&self, request: MkdirRequest) -> Result<GetStatusResponse> {
        let core = &self.0;
        let (who, path, resolved) = self.resolve_new(request.caller.as_ref(), &request.path, None).await?;
        let exists = resolved.walk.is_complete();
        if let (false, Some(mount)) = (exists, &resolved.mount) {
            // The store first: an entry never is without its folder. What apply will check is checked before.
            namespace::check_folder_of(&who, &resolved.walk.deepest().inode, &path)?;
            if mount.read_only {
                return Err(err!(ReadOnly, "{path} lies in the read-only mount {}", mount.path));
            }
            if resolved.walk.missing.len() > 1 && !request.recursive {
                return Err(err!(NotFound, "the folder above {path} does not exist: make it first, or use -p"));
            }
            if !later(&resolved.walk, resolved.mount.as_deref()) {
                crate::apply::check_arrived(&core.store.view(), &path)?;
                mount.ufs.mkdir(&resolved.walk.ufs_key(&path)).await?;
            }
        }
        let mode = if request.mode == 0 { 0o777 & !UMASK } else { request.mode & 0o7777 };
        let later = !exists && later(&resolved.walk, resolved.mount.as_deref());
        let op = journal::Mkdir {
            path: raw(&path),
            recursive: request.recursive,
            exist_ok: request.exist_ok,
            mode,
            later,
            unmasked_mode: request.unmasked_mode,
        };
        let reply = core.change(request.caller.as_ref(), Op::Mkdir(op)).await?;
        if !exists {
            core.syncer.note_listed(InodeId(reply.file_id));
        }
        let (_, _, status) = self.status_by_id(reply.file_id)?;
        Ok(GetStatusResponse { status: Some(status), ..GetStatusResponse::default() })
    }

    pub async fn delete_inner(&self, request: DeleteRequest) -> Result<Done> {
        let core = &self.0;
        let (_, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let waits = !later(&resolved.walk, resolved.mount.as_deref());
        if resolved.walk.is_complete() && !request.recursive {
            // Whether a folder is empty is the store's to say as well.
            self.0.syncer.sync_folder(core, &path, &resolved).await?;
        }
        let op = journal::Delete { path: raw(&path), recursive: request.recursive };
        let reply = core.persist.change(core, request.caller.as_ref(), Op::Delete(op), &[&path]).await?;
        self.follow(if waits { reply.pending_id } else { 0 }, request.caller.as_ref()).await
    }

    pub async fn rename_inner(&self, request: RenameRequest) -> Result<Done> {
        let core = &self.0;
        let (_, source, _) = self.resolve(request.caller.as_ref(), &request.source).await?;
        let (_, target, resolved) = self.resolve_new(request.caller.as_ref(), &request.target, None).await?;
        if resolved.walk.is_complete() {
            self.0.syncer.sync_folder(core, &target, &resolved).await?;
        }
        let waits = !later(&resolved.walk, resolved.mount.as_deref());
        let op = journal::Rename { source: raw(&source), target: raw(&target), overwrite: request.overwrite };
        let reply = core.persist.change(core, request.caller.as_ref(), Op::Rename(op), &[&source, &target]).await?;
        self.follow(if waits { reply.pending_id } else { 0 }, request.caller.as_ref()).await?;
        core.syncer.note_looked(InodeId(reply.file_id));
        Ok(Done {})
    }

    /// Waits for the under store to follow, where a pending record was written.
    async fn follow(&self, pending_id: u64, call: Option<&Caller>) -> Result<Done> {
        if pending_id > 0 {
            self.0.pending.wait(&self.0, pending_id, call, PENDING_WAIT).await?;
        }
        Ok(Done {})
    }

    async fn set_attributes_inner(&self, request: SetAttributesRequest) -> Result<GetStatusResponse> {
        let (_, path, _) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let op = journal::SetAttributes {
            path: raw(&path),
            mode: request.mode,
            owner: request.owner,
            group: request.group,
            modified_ms: request.modified_ms,
            pinned: request.pinned,
            ttl_ms: request.ttl_ms,
            ttl_frees: request.ttl_frees,
            accessed_ms: request.accessed_ms,
            modified_ns: request.modified_ns.min(NANOSECONDS_MAX),
            accessed_ns: request.accessed_ns.min(NANOSECONDS_MAX),
            ..journal::SetAttributes::default()
        };
        let reply = self.0.change(request.caller.as_ref(), Op::SetAttributes(op)).await?;
        let (_, inode, status) = self.status_by_id(reply.file_id)?;
        if let Some(pinned) = request.pinned {
            let soft = &self.0.soft;
            for id in namespace::block_ids(&inode) {
                soft.blocks.holders(id).iter().for_each(|holder| soft.workers.queue_pin(holder.worker, id, pinned));
            }
        }
        Ok(GetStatusResponse { status: Some(status), ..GetStatusResponse::default() })
    }

    async fn free_inner(&self, request: FreeRequest) -> Result<FreeResponse> {
        let core = &self.0;
        let (who, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        free::below(core, &who, &path, resolved.found(&path)?).await
    }
}

/// Whether changes at the end of a walk are acknowledged before the under store has followed: where files are written so as well.
fn later(walk: &Walk, mount: Option<&Mounted>) -> bool {
    PathConfig::of(walk).write_type.or(mount.map(|m| m.options.write_type)) == Some(WriteType::Async)
}

/// Errors: `Expired` for a call that was sent again after its file was completed: no token to write it is given any more.
fn check_open_for_writing(path: &AbsPath, inode: &Inode, lease_id: u64) -> Result<()> {
    if inode.completed || inode.lease_id != lease_id {
        return Err(err!(Expired, "{path} is no longer being written under this lease: create it again"));
    }
    Ok(())
}

/// Sends the entries below a folder in batches; the parents of a recursive listing come before their children.
async fn send_listing(
    core: Arc<Core>,
    who: Who,
    top: AbsPath,
    recursive: bool,
    limit: usize,
    sender: &mpsc::Sender<Result<ListResponse, Status>>,
) -> Result<()> {
    let mut left = if limit == 0 { usize::MAX } else { limit };
    let mut folders = vec![top.clone()];
    while let Some(path) = folders.pop() {
        if path != top {
            let resolved = core.syncer.resolve(&core, &who, &path).await?;
            if namespace::check(&who, &resolved.found(&path)?.inode, READ, &path).is_err() {
                let denied = ListResponse { denied: vec![raw(&path)], ..ListResponse::default() };
                if sender.send(Ok(denied)).await.is_err() {
                    break;
                }
                continue;
            }
            core.syncer.sync_folder(&core, &path, &resolved).await?;
        }
        let mut after: Option<Vec<u8>> = None;
        let mut subfolders = Vec::new();
        loop {
            let batch = next_batch(&core, &path, after.as_deref(), left.min(LIST_BATCH_ENTRIES))?;
            left -= batch.len();
            let Some(last) = batch.last() else { break };
            let whole = batch.len() < LIST_BATCH_ENTRIES || left == 0;
            after = AbsPath::parse(&last.path)?.name().map(<[u8]>::to_vec);
            for entry in batch.iter().filter(|e| e.folder && recursive) {
                subfolders.push(AbsPath::parse(&entry.path)?);
            }
            if sender.send(Ok(ListResponse { entries: batch, ..ListResponse::default() })).await.is_err() || whole {
                break;
            }
        }
        folders.extend(subfolders.into_iter().rev());
    }
    Ok(())
}

fn next_batch(core: &Core, path: &AbsPath, after: Option<&[u8]>, limit: usize) -> Result<Vec<FileStatus>> {
    let view = core.store.view();
    let walk = namespace::walk(&view, path)?;
    let folder = walk.found(path)?;
    let outer = walk.mount.map(|(id, _)| core.soft.mounts.get(&core.store, &core.config, id)).transpose()?;
    let (base, depth) = (walk.ufs_key(path), walk.mount.map_or(0, |(_, depth)| depth));
    let mut out = Vec::new();
    for (name, inode) in view.children(folder.id(), after, limit)? {
        let mounted = if inode.mount_id > 0 { Some(core.soft.mounts.get(&core.store, &core.config, MountId(inode.mount_id))?) } else { None };
        let key = match (&mounted, base.is_empty()) {
            (Some(_), _) => Vec::new(),
            (None, _) if !inode.other_names.is_empty() => view.path_of(InodeId(inode.id))?.components().skip(depth).collect::<Vec<_>>().join(&b'/'),
            (None, true) => name.clone(),
            (None, false) => [&base[..], b"/", &name].concat(),
        };
        out.push(encode::status(&path.join(&name)?, &inode, mounted.as_deref().or(outer.as_deref()), &key));
    }
    Ok(out)
}

impl Service {
    async fn mount_inner(&self, request: MountRequest) -> Result<Done> {
        let path = AbsPath::parse(&request.path)?;
        let who = self.0.who(request.caller.as_ref())?;
        if !who.superuser {
            return Err(err!(PermissionDenied, "user {} is not a superuser: only those mount", who.user));
        }
        let resolved = self.0.syncer.resolve(&self.0, &who, &path).await?;
        if resolved.walk.is_complete() && !path.is_root() {
            return Err(err!(AlreadyExists, "{path} exists already: mount on a name that does not"));
        }
        mounts::mount(&self.0, request.caller.as_ref(), &path, &request.uri, request.read_only, request.options).await?;
        Ok(Done {})
    }

    async fn unmount_inner(&self, request: UnmountRequest) -> Result<Done> {
        self.0.change(request.caller.as_ref(), Op::RemoveMount(journal::RemoveMount { path: request.path })).await?;
        Ok(Done {})
    }

    async fn load_metadata_inner(&self, request: LoadMetadataRequest) -> Result<mpsc::Receiver<LoadMetadataResponse>> {
        let who = self.0.who(request.caller.as_ref())?;
        let path = AbsPath::parse(&request.path)?;
        self.0.syncer.resolve(&self.0, &who, &path).await?.found(&path)?;
        let (sender, receiver) = mpsc::channel(LIST_QUEUE);
        let core = self.0.clone();
        tokio::spawn(async move { mount::load_metadata(&core, &who, path, request.recursive, request.only_check, &sender).await });
        Ok(receiver)
    }

    async fn set_path_config_inner(&self, request: SetPathConfigRequest) -> Result<Done> {
        self.resolve(request.caller.as_ref(), &request.path).await?;
        let op = journal::SetPathConfig { path: request.path, set: request.set, unset: request.unset };
        self.0.change(request.caller.as_ref(), Op::SetPathConfig(op)).await?;
        Ok(Done {})
    }

    /// Paths with settings of their own that the caller may know of.
    fn list_path_config_inner(&self, request: &ListPathConfigRequest) -> Result<ListPathConfigResponse> {
        let who = self.0.who(request.caller.as_ref())?;
        let (mut paths, mut after) = (Vec::new(), 0);
        loop {
            let ids = self.0.store.view().indexed(Cf::PathConfig, after, LIST_BATCH_ENTRIES)?;
            let Some(last) = ids.last() else { break };
            after = last.get();
            for id in &ids {
                let (path, _, status) = self.status_by_id(id.get())?;
                let walk = namespace::walk(&self.0.store.view(), &path)?;
                if namespace::check_traverse(&who, &walk, &path).is_ok() {
                    paths.push(status);
                }
            }
        }
        paths.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(ListPathConfigResponse { paths })
    }

    async fn start_job_inner(&self, request: StartJobRequest) -> Result<StartJobResponse> {
        let job = request.job.ok_or_else(|| err!(InvalidArgument, "a job without a word"))?;
        let job_id = self.0.jobs.start(&self.0, request.caller.as_ref(), job).await?;
        Ok(StartJobResponse { job_id })
    }

    fn list_jobs_inner(&self, request: &ListJobsRequest) -> Result<ListJobsResponse> {
        self.0.who(request.caller.as_ref())?;
        Ok(ListJobsResponse { jobs: self.0.jobs.list(&self.0, request.job_id)? })
    }

    async fn cancel_job_inner(&self, request: CancelJobRequest) -> Result<Done> {
        let who = self.0.who(request.caller.as_ref())?;
        self.0.jobs.cancel(&self.0, &who, request.job_id).await?;
        Ok(Done {})
    }

    async fn abandon_inner(&self, request: AbandonRequest) -> Result<Done> {
        let op = journal::Abandon { file_id: request.file_id, lease_id: request.lease_id, expired_only: false };
        self.0.change(request.caller.as_ref(), Op::Abandon(op)).await?;
        Ok(Done {})
    }

    async fn renew_lease_inner(&self, request: RenewLeaseRequest) -> Result<Done> {
        let lease_ids = request.lease_ids;
        if lease_ids.len() > 10_000 {
            return Err(err!(LimitExceeded, "more than 10000 leases in one call"));
        }
        let view_has = |id: &u64| self.0.store.view().lease(*id).is_ok_and(|l| l.is_some());
        if let Some(gone) = lease_ids.iter().find(|id| !view_has(id)) {
            return Err(err!(Expired, "lease {gone} is over: its writer was silent for too long"));
        }
        self.0.change(request.caller.as_ref(), Op::RenewLease(journal::RenewLease { lease_ids })).await?;
        Ok(Done {})
    }
}

fn answer<T>(result: Result<T>) -> Result<Response<T>, Status> {
    if let Err(e) = &result
        && matches!(e.kind(), ErrorKind::Internal | ErrorKind::Corrupt)
    {
        tracing::error!(error = %e, "a call failed");
    }
    result.map(Response::new).map_err(|e| to_status(&e))
}

#[tonic::async_trait]
impl FileSystem for Service {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListResponse, Status>> + Send>>;
    type LoadMetadataStream = Pin<Box<dyn Stream<Item = Result<LoadMetadataResponse, Status>> + Send>>;

    async fn get_status(&self, r: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.get_status_inner(r.into_inner()).await)
    }
    async fn list(&self, r: Request<ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        answer(self.list_inner(r.into_inner()).await.map(|receiver| Box::pin(ReceiverStream::new(receiver)) as Self::ListStream))
    }
    async fn open(&self, r: Request<OpenRequest>) -> Result<Response<OpenResponse>, Status> {
        let from = self.from(&r, &r.get_ref().node);
        answer(self.open_inner(from, r.into_inner()).await)
    }
    async fn create(&self, r: Request<CreateRequest>) -> Result<Response<CreateResponse>, Status> {
        let from = self.from(&r, &r.get_ref().node);
        answer(self.create_inner(from, r.into_inner()).await)
    }
    async fn add_blocks(&self, r: Request<AddBlocksRequest>) -> Result<Response<WriteTarget>, Status> {
        answer(self.add_blocks_inner(r.into_inner()).await)
    }
    async fn complete(&self, r: Request<CompleteRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.complete_inner(r.into_inner()).await)
    }
    async fn abandon(&self, r: Request<AbandonRequest>) -> Result<Response<Done>, Status> {
        answer(self.abandon_inner(r.into_inner()).await)
    }
    async fn renew_lease(&self, r: Request<RenewLeaseRequest>) -> Result<Response<Done>, Status> {
        answer(self.renew_lease_inner(r.into_inner()).await)
    }
    async fn mkdir(&self, r: Request<MkdirRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.mkdir_inner(r.into_inner()).await)
    }
    async fn make_node(&self, r: Request<MakeNodeRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.make_node_inner(r.into_inner()).await)
    }
    async fn link(&self, r: Request<LinkRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.link_inner(r.into_inner()).await)
    }
    async fn get_x_attrs(&self, r: Request<GetXAttrsRequest>) -> Result<Response<GetXAttrsResponse>, Status> {
        answer(self.get_x_attrs_inner(r.into_inner()).await)
    }
    async fn set_x_attr(&self, r: Request<SetXAttrRequest>) -> Result<Response<Done>, Status> {
        answer(self.set_x_attr_inner(r.into_inner()).await)
    }
    async fn hold_locks(&self, r: Request<HoldLocksRequest>) -> Result<Response<HoldLocksResponse>, Status> {
        answer(self.hold_locks_inner(r.into_inner()).await)
    }
    async fn set_lock(&self, r: Request<SetLockRequest>) -> Result<Response<LockResponse>, Status> {
        answer(self.set_lock_inner(r.into_inner()).await)
    }
    async fn test_lock(&self, r: Request<TestLockRequest>) -> Result<Response<LockResponse>, Status> {
        answer(self.test_lock_inner(r.into_inner()).await)
    }
    async fn end_locks(&self, r: Request<EndLocksRequest>) -> Result<Response<Done>, Status> {
        answer(self.end_locks_inner(r.into_inner()).await)
    }
    async fn list_locks(&self, r: Request<ListLocksRequest>) -> Result<Response<ListLocksResponse>, Status> {
        answer(self.list_locks_inner(r.get_ref()))
    }
    async fn delete(&self, r: Request<DeleteRequest>) -> Result<Response<Done>, Status> {
        answer(self.delete_inner(r.into_inner()).await)
    }
    async fn rename(&self, r: Request<RenameRequest>) -> Result<Response<Done>, Status> {
        answer(self.rename_inner(r.into_inner()).await)
    }
    async fn set_attributes(&self, r: Request<SetAttributesRequest>) -> Result<Response<GetStatusResponse>, Status> {
        answer(self.set_attributes_inner(r.into_inner()).await)
    }
    async fn free(&self, r: Request<FreeRequest>) -> Result<Response<FreeResponse>, Status> {
        answer(self.free_inner(r.into_inner()).await)
    }
    async fn mount(&self, r: Request<MountRequest>) -> Result<Response<Done>, Status> {
        answer(self.mount_inner(r.into_inner()).await)
    }
    async fn unmount(&self, r: Request<UnmountRequest>) -> Result<Response<Done>, Status> {
        answer(self.unmount_inner(r.into_inner()).await)
    }
    async fn update_mount(&self, r: Request<UpdateMountRequest>) -> Result<Response<Done>, Status> {
        answer(mounts::change(&self.0, r.into_inner()).await)
    }
    async fn load_metadata(&self, r: Request<LoadMetadataRequest>) -> Result<Response<Self::LoadMetadataStream>, Status> {
        let told = self.load_metadata_inner(r.into_inner()).await;
        answer(told.map(|receiver| Box::pin(ReceiverStream::new(receiver).map(Ok)) as Self::LoadMetadataStream))
    }
    async fn set_path_config(&self, r: Request<SetPathConfigRequest>) -> Result<Response<Done>, Status> {
        answer(self.set_path_config_inner(r.into_inner()).await)
    }
    async fn list_path_config(&self, r: Request<ListPathConfigRequest>) -> Result<Response<ListPathConfigResponse>, Status> {
        answer(self.list_path_config_inner(r.get_ref()))
    }
    async fn start_job(&self, r: Request<StartJobRequest>) -> Result<Response<StartJobResponse>, Status> {
        answer(self.start_job_inner(r.into_inner()).await)
    }
    async fn list_jobs(&self, r: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        answer(self.list_jobs_inner(r.get_ref()))
    }
    async fn cancel_job(&self, r: Request<CancelJobRequest>) -> Result<Response<Done>, Status> {
        answer(self.cancel_job_inner(r.into_inner()).await)
    }
    async fn list_mounts(&self, r: Request<ListMountsRequest>) -> Result<Response<ListMountsResponse>, Status> {
        answer(mounts::list(&self.0, r.get_ref()))
    }
}
