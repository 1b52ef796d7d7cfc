//! `hdfs://` through hdfs-native: a NameNode by address, or a name service of Hadoop's own configuration files.
//!
//! A write goes to a temporary name beside its target, is closed (as durable as HDFS makes a closed file; with `hsync` on the
//! DataNodes' disks) and renamed over it. A version is length and modification time: HDFS has nothing better, so two changes of
//! the same length within one millisecond are beyond detection. A file is opened for reading between two looks at its version;
//! its blocks are then those of that version, whatever the name stands for later, and are kept for a while.
//! Files are never appended to: a reader of the older length would meet blocks that change under it.

use crate::hdfs_events::HdfsEvents;
use crate::namenodes::{Namenodes, NamenodesOf};
use crate::requests::{Request, Requests};
use crate::store::{LIST_PAGE_ENTRIES, Page, UfsEntry};
use crate::{UfsUri, fingerprint, metrics};
use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{Error, ErrorKind, Result, err};
use forebay_hdfs::hadoop::hdfs::{ConcatRequestProto, ConcatResponseProto, GetFileInfoRequestProto, GetFileInfoResponseProto};
use hdfs_native::client::{FileStatus, ListStatusIterator};
use hdfs_native::file::{FileReader, FileWriter};
use hdfs_native::{Client, ClientBuilder, HdfsError, WriteOptions};
use moka::sync::Cache;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Options of an HDFS; besides, `hadoop.KEY` sets KEY of the Hadoop configuration.
const OPTIONS: &[&str] =
    &["config_dir", "user", "principal", "keytab", "ticket_cache", "replication", "hsync", "inotify_ms", "timeout_ms", "io_timeout_ms", "retries"];
/// What an option of the Hadoop configuration begins with.
const HADOOP: &str = "hadoop.";
/// Names of writes in progress begin with this; they are never shown.
const TEMPORARY_PREFIX: &str = ".forebay-tmp-";
/// Opened files that are kept, and for how long: the NameNode is not asked again for each page.
const READERS_MAX: u64 = 1_024;
const READER_KEPT: Duration = Duration::from_secs(30);
/// The least a call that moves written bytes may take: hdfs-native replaces a DataNode that is silent for a minute.
const WRITE_TIMEOUT_MIN: Duration = Duration::from_secs(150);
/// Permissions of what is made here. Who may do what through Forebay is the namespace's affair.
const FOLDER_MODE: u32 = 0o755;

pub struct HdfsStore {
    client: Client,
    name: String,
    root: String,
    write: WriteOptions,
    hsync: bool,
    timeout: Duration,
    io_timeout: Duration,
    retries: usize,
    readers: Cache<(Vec<u8>, String), Arc<FileReader>>,
    requests: Arc<Requests>,
    /// Its NameNodes, for the calls that hdfs-native does not make.
    namenodes: NamenodesOf,
    /// Which those calls do not speak.
    kerberos: bool,
    /// How often its event stream is read, where that was asked for.
    inotify: Option<Duration>,
}

fn number(options: &BTreeMap<String, String>, name: &str, default: u64) -> Result<u64> {
    match options.get(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| err!(InvalidArgument, "option {name} = {text:?} is not a number")),
    }
}

impl HdfsStore {
    pub fn open(uri: &UfsUri, authority: &str, root: &str, options: &BTreeMap<String, String>, requests: Arc<Requests>) -> Result<HdfsStore> {
        let mut hadoop: BTreeMap<String, String> = BTreeMap::new();
        // The crate's own patience is minutes; ours is `retries`.
        hadoop.insert("dfs.client.failover.max.attempts".into(), "4".into());
        hadoop.insert("dfs.client.failover.sleep.base.millis".into(), "100".into());
        hadoop.insert("dfs.client.failover.sleep.max.millis".into(), "1000".into());
        let io_timeout = Duration::from_millis(number(options, "io_timeout_ms", 30_000)?);
        // A silent DataNode is given up, and the next replica tried, well before the whole read is.
        let socket_ms = (io_timeout.as_millis() / 5).max(1_000);
        hadoop.insert("dfs.client.socket-timeout".into(), socket_ms.to_string());
        for (name, value) in options {
            match name.strip_prefix(HADOOP) {
                Some(key) => drop(hadoop.insert(key.to_owned(), value.clone())),
                None if OPTIONS.contains(&name.as_str()) => {}
                None => {
                    return Err(err!(
                        InvalidArgument,
                        "hdfs has no option {name:?}; it takes {} and {HADOOP}KEY for KEY of Hadoop",
                        OPTIONS.join(", ")
                    ));
                }
            }
        }
        let timeout = Duration::from_millis(number(options, "timeout_ms", 10_000)?);
        let inotify = Some(number(options, "inotify_ms", 0)?).filter(|ms| *ms > 0).map(Duration::from_millis);
        let namenodes = NamenodesOf {
            authority: authority.to_owned(),
            config_dir: options.get("config_dir").cloned(),
            hadoop: hadoop.clone(),
            user: options.get("user").cloned(),
            timeout,
        };
        let kerberos = ["principal", "keytab", "ticket_cache"].iter().any(|name| options.contains_key(*name));
        let mut builder = ClientBuilder::new().with_config(hadoop);
        if let Some(dir) = options.get("config_dir") {
            let file = std::path::Path::new(dir).join("core-site.xml");
            if !file.exists() {
                return Err(err!(InvalidArgument, "option config_dir = {dir:?}: there is no {} on this machine", file.display()));
            }
            builder = builder.with_config_dir(dir);
        }
        if !authority.is_empty() {
            builder = builder.with_url(format!("hdfs://{authority}"));
        }
        if let Some(user) = options.get("user") {
            builder = builder.with_user(user);
        }
        if let Some(principal) = options.get("principal") {
            builder = builder.with_kerberos_principal(principal);
        }
        if let Some(keytab) = options.get("keytab") {
            builder = builder.with_kerberos_keytab(keytab);
        }
        if let Some(cache) = options.get("ticket_cache") {
            builder = builder.with_kerberos_cache(cache);
        }
        let client =
            builder.build().map_err(|e| err!(InvalidArgument, "{uri}: {e}: is it host:port, or a name service of the files in config_dir?"))?;
        let mut write = WriteOptions::default().overwrite(true);
        if let replication @ 1.. = number(options, "replication", 0)? {
            write = write.replication(u32::try_from(replication).unwrap_or(u32::MAX));
        }
        let hsync = match options.get("hsync").map(String::as_str) {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(err!(InvalidArgument, "option hsync = {other:?} is not true or false")),
        };
        Ok(HdfsStore {
            client,
            name: uri.to_string(),
            root: root.trim_end_matches('/').to_owned(),
            write,
            hsync,
            timeout,
            io_timeout,
            retries: usize::try_from(number(options, "retries", 4)?).unwrap_or(4),
            readers: Cache::builder().max_capacity(READERS_MAX).time_to_live(READER_KEPT).build(),
            requests,
            namenodes,
            kerberos,
            inotify,
        })
    }

    /// Its event stream, where the mount asks for it. Errors: a name service that the configuration does not know.
    pub fn events(&self) -> Result<Option<HdfsEvents>> {
        let Some(interval) = self.inotify else { return Ok(None) };
        Ok(Some(HdfsEvents::new(Namenodes::find(&self.namenodes)?, &self.root, interval)))
    }

    /// Whether files can be joined here.
    pub fn can_concat(&self) -> bool {
        !self.kerberos
    }

    /// A hidden folder beside the target, for its pieces.
    pub async fn begin_pieces(&self, key: &[u8]) -> Result<String> {
        let target = self.path(key)?;
        let folder = target.rsplit_once('/').filter(|_| !key.is_empty()).map(|(folder, _)| folder);
        let folder = folder.ok_or_else(|| err!(IsADirectory, "a folder cannot be written"))?;
        // What joins them is asked first whether it is spoken to.
        let look = GetFileInfoRequestProto { src: "/".into() };
        Namenodes::find(&self.namenodes)?.call::<GetFileInfoResponseProto>("getFileInfo", &look).await?;
        let pieces = format!("{folder}/{TEMPORARY_PREFIX}{:016x}", rand::random::<u64>());
        self.mkdirs(&pieces).await?;
        Ok(pieces)
    }

    /// A file of its own, whoever was at the same piece before: a late writer is in nobody's way.
    pub async fn piece(&self, upload: &str, number: u64) -> Result<HdfsWriter> {
        let path = format!("{upload}/{number:08}-{:08x}", rand::random::<u32>());
        let (name, options) = (path.clone(), self.write.clone().create_parent(false));
        let made = self
            .call(Request::Write, |client| {
                let (path, options) = (name.clone(), options.clone());
                async move { client.create(&path, options).await }
            })
            .await?;
        Ok(self.writing(made, path.clone(), path))
    }

    /// Joins the pieces, by their paths, and moves the whole to its name.
    pub async fn complete_pieces(&self, key: &[u8], upload: &str, pieces: &[String], length: u64) -> Result<UfsEntry> {
        let [whole, others @ ..] = pieces else { return Err(err!(InvalidArgument, "a file without pieces")) };
        let (whole, target) = (whole.clone(), self.path(key)?);
        if !others.is_empty() {
            self.requests.count(Request::Rename);
            let request = ConcatRequestProto { trg: whole.clone(), srcs: others.to_vec() };
            let joined = Namenodes::find(&self.namenodes)?.call::<ConcatResponseProto>("concat", &request).await;
            // Of an answer that was lost the length tells.
            if let Err(e) = joined
                && self.info(&whole).await.is_ok_and(|status| status.length as u64 != length)
            {
                return Err(e);
            }
        }
        let status = self.info(&whole).await?;
        if status.length as u64 != length {
            return Err(err!(UnderStore, "the pieces have {} bytes together instead of {length}", status.length));
        }
        self.requests.count(Request::Rename);
        timed(self.timeout, self.client.rename(&whole, &target, true)).await?;
        if let Err(e) = self.abort_pieces(upload).await {
            tracing::warn!(error = %e, path = upload, "an empty folder stays behind");
        }
        Ok(entry(target.rsplit('/').next().unwrap_or_default().as_bytes(), &status))
    }

    pub async fn abort_pieces(&self, upload: &str) -> Result<()> {
        let path = upload.to_owned();
        self.call(Request::Delete, |client| {
            let path = path.clone();
            async move { client.delete(&path, true).await }
        })
        .await
        .map(drop)
    }

    fn writing(&self, writer: FileWriter, temporary: String, target: String) -> HdfsWriter {
        HdfsWriter {
            client: self.client.clone(),
            writer: Some(writer),
            temporary,
            target,
            hsync: self.hsync,
            timeout: self.timeout,
            io_timeout: self.io_timeout.max(WRITE_TIMEOUT_MIN),
            requests: self.requests.clone(),
        }
    }

    fn path(&self, key: &[u8]) -> Result<String> {
        let key = std::str::from_utf8(key).map_err(|_| err!(InvalidArgument, "names of an HDFS must be UTF-8"))?;
        Ok(match (self.root.is_empty(), key.is_empty()) {
            (true, true) => "/".to_owned(),
            (false, true) => self.root.clone(),
            _ => format!("{}/{key}", self.root),
        })
    }

    /// A call that may be repeated, with limits of time and number. Given up here, it still runs to its own end: it is what finds out
    /// that a NameNode is silent, and turns to the next one.
    async fn call<T: Send + 'static, F>(&self, kind: Request, mut make: impl FnMut(Client) -> F) -> Result<T>
    where
        F: Future<Output = hdfs_native::Result<T>> + Send + 'static,
    {
        let once = || {
            self.requests.count(kind);
            let call = tokio::spawn(make(self.client.clone()));
            detached(self.timeout, call)
        };
        once.retry(self.backoff()).when(Error::is_retryable).notify(|e, after| self.note_retry(e, after)).await
    }

    async fn info(&self, path: &str) -> Result<FileStatus> {
        let path = path.to_owned();
        self.call(Request::Stat, |client| {
            let path = path.clone();
            async move { client.get_file_info(&path).await }
        })
        .await
    }

    async fn mkdirs(&self, path: &str) -> Result<()> {
        let path = path.to_owned();
        self.call(Request::Mkdir, |client| {
            let path = path.clone();
            async move { client.mkdirs(&path, FOLDER_MODE, true).await }
        })
        .await
    }

    pub async fn check(&self) -> Result<()> {
        let root = self.path(b"")?;
        match self.info(&root).await {
            Ok(status) if status.isdir => Ok(()),
            Ok(_) => Err(err!(NotADirectory, "{root} is a file")),
            // Like a prefix of a bucket: made by the first write.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    pub async fn stat(&self, key: &[u8]) -> Result<UfsEntry> {
        let path = self.path(key)?;
        match self.info(&path).await {
            Ok(status) => Ok(entry(key.rsplit(|b| *b == b'/').next().unwrap_or(key), &status)),
            Err(e) if e.kind() == ErrorKind::NotFound && key.is_empty() => Ok(UfsEntry { folder: true, ..UfsEntry::default() }),
            Err(e) => Err(e),
        }
    }

    pub fn lister(&self, key: &[u8]) -> Result<HdfsLister> {
        let path = self.path(key)?;
        let names = self.client.list_status_iter(&path, false);
        Ok(HdfsLister { names, path, timeout: self.timeout, requests: self.requests.clone(), ended: false })
    }

    fn backoff(&self) -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .with_max_times(self.retries)
    }

    fn note_retry(&self, e: &Error, after: Duration) {
        metrics::RETRIES.inc();
        tracing::warn!(store = self.name, ?after, error = %e, "under store call is tried again");
    }

    pub async fn read(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        let once = || self.read_once(key, offset, length, expected);
        once.retry(self.backoff()).when(Error::is_retryable).notify(|e, after| self.note_retry(e, after)).await
    }

    async fn read_once(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        let kept = (key.to_vec(), expected.to_owned());
        let known = self.readers.get(&kept);
        let was_known = known.is_some();
        let reader = match known {
            Some(reader) => reader,
            None => {
                let reader = Arc::new(self.open_version(key, expected).await?);
                self.readers.insert(kept.clone(), reader.clone());
                reader
            }
        };
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if at.checked_add(length).is_none_or(|end| end > reader.file_length()) {
            return Err(err!(FileChanged, "the file is shorter than when it was opened: open it again"));
        }
        self.requests.count(Request::Read);
        // Its blocks may be gone, or elsewhere: the NameNode is asked again then.
        let bytes = timed(self.io_timeout, reader.read_range(at, length)).await.inspect_err(|_| self.readers.invalidate(&kept))?;
        // A block that was cut and appended to keeps its id: what is read out of a kept list of blocks is believed after one more look.
        if was_known {
            self.check_version(&self.path(key)?, expected).await.inspect_err(|_| self.readers.invalidate(&kept))?;
        }
        Ok(bytes)
    }

    /// Errors: `FileChanged` when the file is another version now.
    async fn check_version(&self, path: &str, expected: &str) -> Result<()> {
        let status = self.info(path).await?;
        let now = fingerprint_of(&status);
        if now == expected && !status.isdir {
            return Ok(());
        }
        Err(err!(FileChanged, "the file is another version ({now}) than the one opened ({expected}): open it again"))
    }

    /// Opens a file whose version is the expected one both before and after its blocks were asked for.
    async fn open_version(&self, key: &[u8], expected: &str) -> Result<FileReader> {
        let path = self.path(key)?;
        self.check_version(&path, expected).await?;
        let name = path.clone();
        let reader = self
            .call(Request::Stat, |client| {
                let path = name.clone();
                async move { client.read(&path).await }
            })
            .await?;
        self.check_version(&path, expected).await?;
        Ok(reader)
    }

    /// The temporary file is made in the nearest folder that exists: those of the target are made when it is published.
    pub async fn writer(&self, key: &[u8]) -> Result<HdfsWriter> {
        let target = self.path(key)?;
        let Some((mut folder, _)) = target.rsplit_once('/').filter(|_| !key.is_empty()) else {
            return Err(err!(IsADirectory, "a folder cannot be written"));
        };
        let name = format!("{TEMPORARY_PREFIX}{:016x}", rand::random::<u64>());
        loop {
            // The mount's own folder may be made.
            let is_root = folder.len() <= self.root.len();
            let temporary = format!("{folder}/{name}");
            let (path, options) = (temporary.clone(), self.write.clone().create_parent(is_root));
            let made = self
                .call(Request::Write, |client| {
                    let (path, options) = (path.clone(), options.clone());
                    async move { client.create(&path, options).await }
                })
                .await;
            match made {
                Ok(writer) => {
                    return Ok(self.writing(writer, temporary, target.clone()));
                }
                Err(e) if e.kind() == ErrorKind::NotFound && !is_root => folder = folder.rsplit_once('/').map_or("", |(above, _)| above),
                Err(e) => {
                    // An answer that was lost may have been that it is there.
                    let client = self.client.clone();
                    tokio::spawn(async move { drop(client.delete(&temporary, false).await) });
                    return Err(e);
                }
            }
        }
    }

    pub async fn mkdir(&self, key: &[u8]) -> Result<()> {
        self.mkdirs(&self.path(key)?).await
    }

    pub async fn delete(&self, key: &[u8], folder: bool) -> Result<()> {
        if key.is_empty() {
            return Err(err!(InvalidArgument, "the root of a mount cannot be deleted"));
        }
        let path = self.path(key)?;
        let deleted = self
            .call(Request::Delete, |client| {
                let path = path.clone();
                async move { client.delete(&path, folder).await }
            })
            .await;
        match deleted {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other.map(drop),
        }
    }

    pub async fn rename(&self, source: &[u8], target: &[u8]) -> Result<()> {
        let (from, to) = (self.path(source)?, self.path(target)?);
        if let Some((folder, _)) = to.rsplit_once('/').filter(|(folder, _)| !folder.is_empty()) {
            self.mkdirs(folder).await?;
        }
        let renamed = self
            .call(Request::Rename, |client| {
                let (from, to) = (from.clone(), to.clone());
                async move { client.rename(&from, &to, true).await }
            })
            .await;
        let Err(e) = renamed else { return Ok(()) };
        if e.kind() != ErrorKind::NotFound {
            return Err(e);
        }
        let there = async |path: &str| match self.info(path).await {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        };
        match (there(&from).await?, there(&to).await?) {
            // A repetition after a crash, or after an answer that was lost: the first time has done it.
            (false, true) => Ok(()),
            (false, false) => Err(e),
            (true, _) => Err(err!(UnderStore, "the folder of {to} went away meanwhile")),
        }
    }
}

async fn timed<T>(limit: Duration, call: impl Future<Output = hdfs_native::Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(done) => done.map_err(error),
        Err(_) => Err(err!(UnderStore, "no answer within {} ms", limit.as_millis())),
    }
}

/// Waits for a call that goes on when its time is over.
async fn detached<T>(limit: Duration, call: tokio::task::JoinHandle<hdfs_native::Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(done)) => done.map_err(error),
        Ok(Err(e)) => Err(err!(UnderStore, "the client of HDFS failed: {e}")),
        Err(_) => Err(err!(UnderStore, "no answer within {} ms", limit.as_millis())),
    }
}

fn fingerprint_of(status: &FileStatus) -> String {
    fingerprint::of_object(None, status.modification_time, status.length as u64)
}

fn entry(name: &[u8], status: &FileStatus) -> UfsEntry {
    UfsEntry {
        name: name.to_vec(),
        folder: status.isdir,
        length: if status.isdir { 0 } else { status.length as u64 },
        modified_ms: status.modification_time,
        fingerprint: if status.isdir { String::new() } else { fingerprint_of(status) },
        owner: status.owner.clone(),
        group: status.group.clone(),
        mode: u32::from(status.permission) & 0o7777,
    }
}

/// What the NameNode or a DataNode said. Only "no such file" is "not found": blocks that cannot be found are a failing store.
fn error(e: HdfsError) -> Error {
    let kind = match &e {
        HdfsError::FileNotFound(_) => ErrorKind::NotFound,
        HdfsError::AlreadyExists(_) => ErrorKind::AlreadyExists,
        HdfsError::IsADirectoryError(_) => ErrorKind::IsADirectory,
        HdfsError::InvalidPath(_) | HdfsError::InvalidArgument(_) | HdfsError::UrlParseError(_) | HdfsError::XmlParseError(_) => {
            ErrorKind::InvalidArgument
        }
        HdfsError::UnsupportedFeature(_) | HdfsError::UnsupportedErasureCodingPolicy(_) => ErrorKind::Unsupported,
        HdfsError::RPCError(class, _) | HdfsError::FatalRPCError(class, _) => match class.rsplit('.').next().unwrap_or(class) {
            "FileNotFoundException" => ErrorKind::NotFound,
            "AccessControlException" | "AuthorizationException" => ErrorKind::PermissionDenied,
            "FileAlreadyExistsException" => ErrorKind::AlreadyExists,
            "ParentNotDirectoryException" | "PathIsNotDirectoryException" => ErrorKind::NotADirectory,
            "PathIsNotEmptyDirectoryException" => ErrorKind::NotEmpty,
            "NSQuotaExceededException" | "DSQuotaExceededException" | "QuotaByStorageTypeExceededException" => ErrorKind::NoSpace,
            "InvalidPathException" | "FSLimitException$PathComponentTooLongException" | "HadoopIllegalArgumentException" => {
                ErrorKind::InvalidArgument
            }
            "UnresolvedPathException" | "SnapshotAccessControlException" => ErrorKind::Unsupported,
            // Safe mode, standby, a lease, a restart: all of it passes.
            _ => ErrorKind::UnderStore,
        },
        _ => ErrorKind::UnderStore,
    };
    // The first line: Java's stack follows.
    let text = e.to_string();
    Error::new(kind, text.lines().next().unwrap_or("").chars().take(400).collect::<String>())
}

/// One folder being listed.
pub struct HdfsLister {
    names: ListStatusIterator,
    path: String,
    timeout: Duration,
    requests: Arc<Requests>,
    ended: bool,
}

impl HdfsLister {
    pub async fn next(&mut self) -> Result<Option<Page>> {
        if self.ended {
            return Ok(None);
        }
        self.requests.count(Request::List);
        let mut page = Page::default();
        while page.entries.len() < LIST_PAGE_ENTRIES {
            let next = timed(self.timeout, async { self.names.next().await.transpose() }).await;
            let status = match next {
                Ok(Some(status)) => status,
                Ok(None) => {
                    self.ended = true;
                    break;
                }
                // A missing folder lists as empty.
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    self.ended = true;
                    break;
                }
                Err(e) => return Err(e),
            };
            // Asked for a file, HDFS lists that file.
            if status.path == self.path {
                continue;
            }
            let name = status.path.rsplit('/').next().unwrap_or_default().as_bytes();
            if name.starts_with(TEMPORARY_PREFIX.as_bytes()) {
                continue;
            }
            if forebay_common::path::check_name(name).is_err() || name.len() > NAME_MAX_BYTES {
                page.unshown += 1;
                continue;
            }
            page.entries.push(entry(name, &status));
        }
        Ok(Some(page))
    }
}

/// A file being written under a temporary name.
pub struct HdfsWriter {
    client: Client,
    writer: Option<FileWriter>,
    temporary: String,
    target: String,
    hsync: bool,
    timeout: Duration,
    io_timeout: Duration,
    requests: Arc<Requests>,
}

impl HdfsWriter {
    fn open(&mut self) -> Result<&mut FileWriter> {
        self.writer.as_mut().ok_or_else(|| err!(Internal, "the file is closed already"))
    }

    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let limit = self.io_timeout;
        self.requests.count(Request::Write);
        timed(limit, self.open()?.write_bytes(bytes)).await.map(drop)
    }

    /// Ends what is open. Not cut off half-way: a pipeline that is dropped open keeps its DataNodes busy for ever.
    async fn end(&mut self) -> Result<()> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        self.requests.count(Request::Write);
        detached(self.io_timeout, tokio::spawn(async move { writer.close().await })).await
    }

    /// Closes the file under its temporary name, so that publishing is a rename.
    pub async fn settle(&mut self) -> Result<()> {
        let (limit, hsync) = (self.io_timeout, self.hsync);
        if let Some(writer) = self.writer.as_mut().filter(|_| hsync) {
            timed(limit, writer.hsync()).await?;
        }
        self.end().await
    }

    pub async fn close(&mut self) -> Result<UfsEntry> {
        self.settle().await?;
        if let Some((folder, _)) = self.target.rsplit_once('/').filter(|(folder, _)| !folder.is_empty()) {
            self.requests.count(Request::Mkdir);
            timed(self.timeout, self.client.mkdirs(folder, FOLDER_MODE, true)).await?;
        }
        // What was written, as it stands under its own name: once renamed it may be replaced.
        self.requests.count(Request::Stat);
        let status = timed(self.timeout, self.client.get_file_info(&self.temporary)).await?;
        self.requests.count(Request::Rename);
        timed(self.timeout, self.client.rename(&self.temporary, &self.target, true)).await?;
        Ok(entry(self.target.rsplit('/').next().unwrap_or_default().as_bytes(), &status))
    }

    /// Where it is written.
    pub fn path(&self) -> &str {
        &self.temporary
    }

    /// Ends the file as it stands.
    pub async fn end_quietly(mut self) {
        if let Err(e) = self.end().await {
            tracing::debug!(error = %e, path = self.temporary, "a piece that was given up was not closed");
        }
    }

    pub async fn abort(mut self) {
        if let Err(e) = self.end().await {
            tracing::debug!(error = %e, path = self.temporary, "an aborted file was not closed");
        }
        self.requests.count(Request::Delete);
        if let Err(e) = timed(self.timeout, self.client.delete(&self.temporary, false)).await {
            tracing::warn!(error = %e, path = self.temporary, "a temporary file stays behind");
        }
    }
}
