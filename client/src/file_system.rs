//! `FileSystem`: the namespace, and the door to readers and writers. Cheap to clone.

use crate::block::Pool;
use crate::counters::Counters;
use crate::master::Master;
use crate::reader::FileReader;
use crate::writer::FileWriter;
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, WorkerId, err};
use forebay_proto::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tonic::Request;

/// Counters are reported, closed grants told and leases looked after this often.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// How a file is made.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Replace a file that is there.
    pub overwrite: bool,
    /// Replace a file that is there as a whole, when all is written: until then it is what it was, and it keeps its id, owner, mode and
    /// other attributes. Nobody else changes it meanwhile.
    pub replace: bool,
    /// With `replace`: nothing but the file of this id (`FileChanged` when it is not there any more); 0: whatever is there, or a new one.
    pub only_file: u64,
    /// With `only_file`: only over the content of this version (`FileChanged` when there is another by now).
    pub only_content: Option<u64>,
    /// Make missing folders.
    pub recursive: bool,
    /// Permission bits; 0 takes 0644.
    pub mode: u32,
    /// Bytes per block; 0 takes the mount's.
    pub block_size_bytes: u64,
    /// `through`, `async`, `cache_only`, `ufs_only`; empty takes `client.write_type`, and that empty what the path or mount says.
    pub write_type: String,
    /// Whole copies in the cache before the file is acknowledged, where it is not in an under store by then; 0 takes the mount's.
    pub replicas: u32,
}

/// A worker of this machine, as it said hello.
#[derive(Clone, Debug)]
pub struct LocalWorker {
    /// Its id.
    pub id: WorkerId,
    /// Descriptors come through a read-only mount.
    pub read_only_mount: bool,
    /// Its MEM tier is on huge pages.
    pub huge_pages: bool,
}

pub(crate) struct Inner {
    pub master: Master,
    pub pool: Pool,
    pub counters: Counters,
    pub config: ClientConfig,
    leases: Mutex<HashMap<u64, (Instant, Duration)>>,
}

/// A folder being listed.
pub struct Listing {
    stream: tonic::Streaming<ListResponse>,
    /// Folders below that this user may not read, as far as they were come upon.
    pub denied: Vec<AbsPath>,
}

impl Listing {
    /// The next entries, by name; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<FileStatus>>> {
        let Some(message) = self.stream.message().await.map_err(|s| forebay_proto::convert::from_status(&s))? else { return Ok(None) };
        for folder in message.denied {
            self.denied.push(AbsPath::parse(&folder)?);
        }
        Ok(Some(message.entries))
    }
}

/// A connected client.
#[derive(Clone)]
pub struct FileSystem {
    pub(crate) inner: Arc<Inner>,
}

fn raw(path: &AbsPath) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(path.as_bytes())
}

fn status(answer: GetStatusResponse) -> Result<FileStatus> {
    answer.status.ok_or_else(|| err!(Internal, "the master answered without a status"))
}

impl FileSystem {
    /// Connects. Errors: an address that is none; the master itself is called when first used.
    pub async fn connect(config: &ClientConfig) -> Result<FileSystem> {
        let inner = Arc::new(Inner {
            master: Master::new(config)?,
            pool: Pool::new(config.clone()),
            counters: Counters::default(),
            config: config.clone(),
            leases: Mutex::default(),
        });
        tokio::spawn(housekeeping(Arc::downgrade(&inner)));
        Ok(FileSystem { inner })
    }

    /// What was counted and not reported yet.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Reports counters and closed grants now. A client that exits calls this first.
    pub async fn flush(&self) -> Result<()> {
        self.inner.pool.flush_closes().await;
        self.inner.report_counters().await
    }

    /// Workers whose socket answers on this machine.
    pub async fn local_workers(&self) -> Vec<LocalWorker> {
        self.inner.pool.local_workers().await;
        let hellos = self.inner.pool.hellos().await.into_iter().filter(|(_, domain)| *domain);
        hellos
            .map(|(h, _)| LocalWorker { id: WorkerId(h.worker_id), read_only_mount: h.grants_read_only_mount, huge_pages: h.mem_huge_pages })
            .collect()
    }

    /// Attributes of a file or folder.
    pub async fn get_status(&self, path: &AbsPath) -> Result<FileStatus> {
        status(self.get_status_with_blocks(path, false).await?)
    }

    /// Attributes, blocks with their locations, and the live workers.
    pub async fn get_status_with_blocks(&self, path: &AbsPath, with_blocks: bool) -> Result<GetStatusResponse> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let request = GetStatusRequest { caller, path: raw(path), with_blocks };
            let mut files = m.files.clone();
            async move { files.get_status(request).await }
        })
        .await
    }

    /// Whether something is there.
    pub async fn exists(&self, path: &AbsPath) -> Result<bool> {
        match self.get_status(path).await {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), forebay_common::ErrorKind::NotFound | forebay_common::ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The entries of a folder (of a file, itself), by name; of everything below it when `recursive`.
    ///
    /// Errors: `PermissionDenied` when a folder below may not be read: `list_each` gives the rest.
    pub async fn list(&self, path: &AbsPath, recursive: bool) -> Result<Vec<FileStatus>> {
        let mut all = Vec::new();
        let denied = self
            .list_each(path, recursive, |batch| {
                all.extend(batch);
                Ok(())
            })
            .await?;
        match denied.first() {
            Some(folder) => Err(err!(PermissionDenied, "{folder} may not be read, and {} more folders below {path}", denied.len() - 1)),
            None => Ok(all),
        }
    }

    /// The same, batch by batch. Returns the folders below that this user may not read.
    pub async fn list_each(&self, path: &AbsPath, recursive: bool, mut each: impl FnMut(Vec<FileStatus>) -> Result<()>) -> Result<Vec<AbsPath>> {
        let mut listing = self.listing(path, recursive).await?;
        while let Some(entries) = listing.next().await? {
            each(entries)?;
        }
        Ok(listing.denied)
    }

    /// The same, for who takes the batches when it wants them: what is not asked for yet stays with the master.
    pub async fn listing(&self, path: &AbsPath, recursive: bool) -> Result<Listing> {
        let m = &self.inner.master;
        let stream = m
            .ask(|caller| {
                let request = ListRequest { caller, path: raw(path), recursive, limit: 0 };
                let mut files = m.files.clone();
                async move { files.list(request).await }
            })
            .await?;
        Ok(Listing { stream, denied: Vec::new() })
    }

    /// The first entries of a folder, at most `limit`; the under store is asked for no more than the page they are on.
    pub async fn list_first(&self, path: &AbsPath, limit: u32) -> Result<Vec<FileStatus>> {
        let m = &self.inner.master;
        let mut stream = m
            .ask(|caller| {
                let request = ListRequest { caller, path: raw(path), recursive: false, limit };
                let mut files = m.files.clone();
                async move { files.list(request).await }
            })
            .await?;
        let mut all = Vec::new();
        while let Some(message) = stream.message().await.map_err(|s| forebay_proto::convert::from_status(&s))? {
            all.extend(message.entries);
        }
        Ok(all)
    }

    /// Brings a folder (with `recursive` all below it) in step with its under store now, or with `only_check` tells what differs.
    /// `each` is told how far it is.
    pub async fn load_metadata(
        &self,
        path: &AbsPath,
        recursive: bool,
        only_check: bool,
        mut each: impl FnMut(LoadMetadataResponse) -> Result<()>,
    ) -> Result<()> {
        let m = &self.inner.master;
        let mut stream = m
            .ask(|caller| {
                let request = LoadMetadataRequest { caller, path: raw(path), recursive, only_check };
                let mut files = m.files.clone();
                async move { files.load_metadata(request).await }
            })
            .await?;
        while let Some(message) = stream.message().await.map_err(|s| forebay_proto::convert::from_status(&s))? {
            each(message)?;
        }
        Ok(())
    }

    /// Sets, and takes away, what holds for a path and all below it: `sync_interval_ms`, `write_type`, `replicas`.
    pub async fn set_path_config(&self, path: &AbsPath, set: &[(String, String)], unset: &[String]) -> Result<()> {
        let set: Vec<Setting> = set.iter().map(|(name, value)| Setting { name: name.clone(), value: value.clone() }).collect();
        let m = &self.inner.master;
        m.change(|caller| {
            let request = SetPathConfigRequest { caller, path: raw(path), set: set.clone(), unset: unset.to_vec() };
            let mut files = m.files.clone();
            async move { files.set_path_config(request).await }
        })
        .await
        .map(drop)
    }

    /// Paths with settings of their own.
    pub async fn list_path_config(&self) -> Result<Vec<FileStatus>> {
        let m = &self.inner.master;
        let answer = m
            .ask(|caller| {
                let mut files = m.files.clone();
                async move { files.list_path_config(ListPathConfigRequest { caller }).await }
            })
            .await?;
        Ok(answer.paths)
    }

    /// Starts a job and returns its id.
    pub async fn start_job(&self, job: Job) -> Result<u64> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = StartJobRequest { caller, job: Some(job.clone()) };
                let mut files = m.files.clone();
                async move { files.start_job(request).await }
            })
            .await?;
        Ok(answer.job_id)
    }

    /// Jobs, the newest first; with an id that one.
    pub async fn list_jobs(&self, job_id: u64) -> Result<Vec<Job>> {
        let m = &self.inner.master;
        let answer = m
            .ask(|caller| {
                let mut files = m.files.clone();
                async move { files.list_jobs(ListJobsRequest { caller, job_id }).await }
            })
            .await?;
        Ok(answer.jobs)
    }

    /// Ends a job; what it has done stays.
    pub async fn cancel_job(&self, job_id: u64) -> Result<()> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let mut files = m.files.clone();
            async move { files.cancel_job(CancelJobRequest { caller, job_id }).await }
        })
        .await
        .map(drop)
    }

    /// Makes a folder.
    pub async fn mkdir(&self, path: &AbsPath, recursive: bool, exist_ok: bool) -> Result<FileStatus> {
        self.mkdir_as(path, recursive, exist_ok, 0).await
    }

    /// The same with permission bits; 0 takes 0755.
    pub async fn mkdir_as(&self, path: &AbsPath, recursive: bool, exist_ok: bool, mode: u32) -> Result<FileStatus> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = MkdirRequest { caller, path: raw(path), recursive, exist_ok, mode, ..MkdirRequest::default() };
                let mut files = m.files.clone();
                async move { files.mkdir(request).await }
            })
            .await?;
        status(answer)
    }

    /// Makes a symbolic link, pipe, socket or device: `kind` is the upper bits of a POSIX mode (`S_IFMT >> 12`). It is in no under store.
    pub async fn make_node(&self, path: &AbsPath, kind: u32, mode: u32, target: &[u8], device: u64) -> Result<FileStatus> {
        let m = &self.inner.master;
        let target = bytes::Bytes::copy_from_slice(target);
        let answer = m
            .change(|caller| {
                let request = MakeNodeRequest { caller, path: raw(path), kind, mode, target: target.clone(), device };
                let mut files = m.files.clone();
                async move { files.make_node(request).await }
            })
            .await?;
        status(answer)
    }

    /// Gives a file one more name (a hard link). Errors: `Unsupported` for a name in another mount, `LimitExceeded` for one too many.
    pub async fn link(&self, source: &AbsPath, target: &AbsPath) -> Result<FileStatus> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = LinkRequest { caller, source: raw(source), target: raw(target) };
                let mut files = m.files.clone();
                async move { files.link(request).await }
            })
            .await?;
        status(answer)
    }

    /// The extended attributes of a file or folder that this user may read.
    pub async fn x_attrs(&self, path: &AbsPath) -> Result<Vec<XAttr>> {
        let m = &self.inner.master;
        let answer = m
            .ask(|caller| {
                let request = GetXAttrsRequest { caller, path: raw(path) };
                let mut files = m.files.clone();
                async move { files.get_x_attrs(request).await }
            })
            .await?;
        Ok(answer.x_attrs)
    }

    /// Sets an extended attribute, or takes it away without a value.
    pub async fn set_x_attr(&self, path: &AbsPath, x: XAttr, value: Option<bytes::Bytes>, may_create: bool, may_replace: bool) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let (namespace, name, value) = (x.namespace, x.name.clone(), value.clone());
            let request = SetXAttrRequest { caller, path: raw(path), namespace, name, value, may_create, may_replace };
            let mut files = m.files.clone();
            async move { files.set_x_attr(request).await }
        })
        .await?;
        Ok(())
    }

    /// Deletes a file, an empty folder, or with `recursive` a folder with all below it.
    pub async fn delete(&self, path: &AbsPath, recursive: bool) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let request = DeleteRequest { caller, path: raw(path), recursive };
            let mut files = m.files.clone();
            async move { files.delete(request).await }
        })
        .await
        .map(drop)
    }

    /// Moves a file or folder; with `overwrite` over a file or an empty folder.
    pub async fn rename(&self, source: &AbsPath, target: &AbsPath, overwrite: bool) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let request = RenameRequest { caller, source: raw(source), target: raw(target), overwrite };
            let mut files = m.files.clone();
            async move { files.rename(request).await }
        })
        .await
        .map(drop)
    }

    /// Changes attributes; `request`'s caller and path are filled in.
    pub async fn set_attributes(&self, path: &AbsPath, request: SetAttributesRequest) -> Result<FileStatus> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = SetAttributesRequest { caller, path: raw(path), ..request.clone() };
                let mut files = m.files.clone();
                async move { files.set_attributes(request).await }
            })
            .await?;
        status(answer)
    }

    /// Drops the cached bytes of a file or of all files below a folder; what is in no under store stays.
    pub async fn free(&self, path: &AbsPath) -> Result<FreeResponse> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let request = FreeRequest { caller, path: raw(path) };
            let mut files = m.files.clone();
            async move { files.free(request).await }
        })
        .await
    }

    /// Mounts an under store.
    pub async fn mount(&self, path: &AbsPath, uri: &str, read_only: bool, options: BTreeMap<String, String>) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let request = MountRequest { caller, path: raw(path), uri: uri.to_owned(), read_only, options: options.clone().into_iter().collect() };
            let mut files = m.files.clone();
            async move { files.mount(request).await }
        })
        .await
        .map(drop)
    }

    /// Gives a mount other options, or takes some away.
    pub async fn update_mount(&self, path: &AbsPath, read_only: Option<bool>, set: BTreeMap<String, String>, unset: Vec<String>) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let request = UpdateMountRequest { caller, path: raw(path), read_only, set: set.clone().into_iter().collect(), unset: unset.clone() };
            let mut files = m.files.clone();
            async move { files.update_mount(request).await }
        })
        .await
        .map(drop)
    }

    /// Unmounts; nothing in the under store changes.
    pub async fn unmount(&self, path: &AbsPath) -> Result<()> {
        let m = &self.inner.master;
        m.change(|caller| {
            let request = UnmountRequest { caller, path: raw(path) };
            let mut files = m.files.clone();
            async move { files.unmount(request).await }
        })
        .await
        .map(drop)
    }

    /// The mount table, secrets hidden.
    pub async fn list_mounts(&self) -> Result<Vec<MountPoint>> {
        let m = &self.inner.master;
        let answer = m
            .ask(|caller| {
                let mut files = m.files.clone();
                async move { files.list_mounts(ListMountsRequest { caller }).await }
            })
            .await?;
        Ok(answer.mounts)
    }

    /// The cluster's report.
    pub async fn report(&self) -> Result<ReportResponse> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let mut admin = m.admin.clone();
            async move { admin.report(ReportRequest { caller }).await }
        })
        .await
    }

    /// Which file a block belongs to, and who has it. Errors: `NotFound` when no file has it.
    pub async fn get_block(&self, block_id: u64) -> Result<GetBlockResponse> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let mut admin = m.admin.clone();
            async move { admin.get_block(GetBlockRequest { caller, block_id }).await }
        })
        .await
    }

    /// Has a worker (its id in hexadecimal, or `host:port`) leave the cluster, or takes it in again; returns its id.
    pub async fn set_worker(&self, worker: &str, leaving: bool, until_gone: bool) -> Result<u64> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = SetWorkerRequest { caller, worker: worker.to_owned(), leaving, until_gone };
                let mut admin = m.admin.clone();
                async move { admin.set_worker(request).await }
            })
            .await?;
        Ok(answer.worker_id)
    }

    /// Has workers drop only copies that no file has, and that the master's data know nothing of; how many, and their bytes. Errors: `PermissionDenied`.
    pub async fn drop_orphans(&self) -> Result<(u64, u64)> {
        let m = &self.inner.master;
        let done = m
            .ask(|caller| {
                let mut admin = m.admin.clone();
                async move { admin.drop_orphans(DropOrphansRequest { caller }).await }
            })
            .await?;
        Ok((done.blocks, done.bytes))
    }

    /// Asks the master for its clock and state; with the time the question took.
    pub async fn ping(&self) -> Result<(PingResponse, Duration)> {
        let at = Instant::now();
        let mut admin = self.inner.master.admin.clone();
        let mut request = Request::new(PingRequest {});
        request.set_timeout(Duration::from_secs(5));
        let answer = tokio::time::timeout(Duration::from_secs(5), admin.ping(request))
            .await
            .map_err(|_| err!(Timeout, "master {} does not answer within 5 s", self.inner.master.address()))?
            .map_err(|s| forebay_proto::convert::from_status(&s).context(format!("master {}", self.inner.master.address())))?;
        Ok((answer.into_inner(), at.elapsed()))
    }

    /// Whether a worker answers on its data port. Returns the time it took.
    pub async fn ping_worker(&self, address: &WorkerAddress) -> Result<Duration> {
        let at = Instant::now();
        self.inner.pool.network(address).await?;
        Ok(at.elapsed())
    }

    /// Tries to reach a worker through its Unix socket; the error says why not.
    pub async fn try_socket(&self, address: &WorkerAddress) -> Result<()> {
        self.inner.pool.domain(address).await.map(drop)
    }

    /// Opens a file for reading.
    pub async fn open(&self, path: &AbsPath) -> Result<FileReader> {
        let answer = self.inner.open(path).await?;
        FileReader::new(self.inner.clone(), path.clone(), answer)
    }

    /// Makes a file and opens it for writing. It appears whole, when `close` returns.
    pub async fn create(&self, path: &AbsPath, options: &CreateOptions) -> Result<FileWriter> {
        FileWriter::create(self.inner.clone(), path, options).await
    }

    /// Makes an empty file.
    pub async fn touch(&self, path: &AbsPath, options: &CreateOptions) -> Result<FileStatus> {
        self.create(path, options).await?.close().await
    }
}

impl Inner {
    pub async fn local_ids(&self) -> Vec<u64> {
        self.pool.local_workers().await.into_iter().map(WorkerId::get).collect()
    }

    pub async fn open(&self, path: &AbsPath) -> Result<OpenResponse> {
        let local_workers = self.local_ids().await;
        let m = &self.master;
        m.ask(|caller| {
            let request = OpenRequest { caller, path: raw(path), local_workers: local_workers.clone(), node: self.config.node_name.clone() };
            let mut files = m.files.clone();
            async move { files.open(request).await }
        })
        .await
    }

    /// Keeps a lease alive until `end_lease`.
    pub fn keep_lease(&self, lease_id: u64, ttl_ms: u64) {
        let mut leases = self.leases.lock().unwrap_or_else(|e| e.into_inner());
        let every = Duration::from_millis(ttl_ms / 3);
        leases.insert(lease_id, (Instant::now() + every, every));
    }

    pub fn end_lease(&self, lease_id: u64) {
        self.leases.lock().unwrap_or_else(|e| e.into_inner()).remove(&lease_id);
    }

    async fn renew_leases(&self) {
        let due: Vec<u64> = {
            let leases = self.leases.lock().unwrap_or_else(|e| e.into_inner());
            leases.iter().filter(|(_, (due, _))| *due <= Instant::now()).map(|(id, _)| *id).collect()
        };
        if due.is_empty() {
            return;
        }
        let renewed = self.renew(due.clone()).await;
        let mut leases = self.leases.lock().unwrap_or_else(|e| e.into_inner());
        match renewed {
            Ok(_) => due.iter().for_each(|id| {
                if let Some(next) = leases.get_mut(id) {
                    next.0 = Instant::now() + next.1;
                }
            }),
            Err(e) => tracing::warn!(error = %e, "leases were not renewed"),
        }
    }

    /// Renews one lease now. Errors: `Expired` when it is over.
    pub async fn renew_lease(&self, lease_id: u64) -> Result<()> {
        self.renew(vec![lease_id]).await
    }

    async fn renew(&self, lease_ids: Vec<u64>) -> Result<()> {
        let m = &self.master;
        m.change(|caller| {
            let request = RenewLeaseRequest { caller, lease_ids: lease_ids.clone() };
            let mut files = m.files.clone();
            async move { files.renew_lease(request).await }
        })
        .await
        .map(drop)
    }

    async fn report_counters(&self) -> Result<()> {
        let counters = self.counters.take();
        if counters.is_empty() {
            return Ok(());
        }
        let m = &self.master;
        let reported = m
            .ask(|caller| {
                let request = ClientCounters { caller, counters: counters.clone() };
                let mut admin = m.admin.clone();
                async move { admin.add_client_counters(request).await }
            })
            .await;
        reported.map(drop).inspect_err(|_| self.counters.put_back(&counters))
    }
}

async fn housekeeping(inner: std::sync::Weak<Inner>) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    tick.tick().await;
    loop {
        tick.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        // Leases first: a worker that hangs must not keep them from being renewed.
        inner.renew_leases().await;
        inner.pool.flush_closes().await;
        if let Err(e) = inner.report_counters().await {
            tracing::debug!(error = %e, "counters are reported later");
        }
    }
}
