//! `Mount`: what each request of the kernel comes to, in terms of the namespace.
//!
//! Called by `handler`, one task per request. Opening for reading asks the master each time (close-to-open), and the kernel's page cache is kept
//! while the content is the same. A cached file of one block (or that its worker has in one piece), whole and verified, is read by the kernel itself (passthrough); such a
//! node cannot be opened in any other way meanwhile, so an open that conflicts answers ESTALE, which makes the kernel look the name up again and get a node of its
//! own. What is open for writing is in `staged`, for readers of this mount as well, unless they came first by passthrough.

use crate::attributes::{self, Names, Time, Version};
use crate::device::{Agreed, Backing};
use crate::folder::Folder;
use crate::locks::Locks;
use crate::neighbours::Neighbours;
use crate::nodes::{Node, Nodes, Use};
use crate::staged::{Attributes, Staged};
use forebay_client::{FileReader, FileSystem};
use forebay_common::config::FuseConfig;
use forebay_common::{AbsPath, ErrorKind, Result, counter, err, gauge};
use forebay_proto::FileStatus;
use forebay_proto::mount as wire;
use fuser::{FileAttr, Notifier, TimeOrNow};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Mutex;

counter!(pub OPENS, "forebay_fuse_opens_total", "files opened");
counter!(pub PASSTHROUGH, "forebay_fuse_passthrough_opens_total", "files opened so that the kernel reads their block itself");
counter!(pub REFUSED, "forebay_fuse_passthrough_refused_total", "blocks that the kernel would not take for passthrough");
counter!(pub CONFLICTS, "forebay_fuse_conflicting_opens_total", "opens that were answered ESTALE, to be made on a node of their own");
counter!(pub READS, "forebay_fuse_reads_total", "reads that came to this process");
counter!(pub READ_BYTES, "forebay_fuse_read_bytes_total", "bytes of those reads");
counter!(pub WRITTEN_BYTES, "forebay_fuse_written_bytes_total", "bytes written");
gauge!(pub HANDLES, "forebay_fuse_handles", "open files and folders");

/// What the name of a file begins with that was deleted while somebody reads it.
pub const HIDDEN: &[u8] = b".forebay-hidden-";
/// Between two looks whether requests are still being worked on.
const SETTLING: Duration = Duration::from_millis(5);
/// What `statfs` says there is, since an under store has no end.
pub const STATFS_BYTES: u64 = 1 << 50;
/// The virtual file that shows this process's metrics.
pub const STATISTICS: &[u8] = b".forebay-stats";
/// Its number.
pub const STATISTICS_NODE: u64 = u64::MAX - 1;

pub enum Handle {
    Reads {
        node: Arc<Node>,
        reader: FileReader,
    },
    /// The kernel reads by itself; what it asks for nevertheless (`posix_fadvise`) is read here.
    Passes {
        node: Arc<Node>,
        reader: FileReader,
    },
    Writes {
        node: Arc<Node>,
        staged: Arc<Staged>,
        writes: bool,
    },
    Folder {
        path_of: u64,
        folder: Mutex<Folder>,
    },
    Statistics(Vec<u8>),
    /// Open when the mount changed hands, and not there any more as it was read. The kernel goes on with what it reads by itself.
    Lost {
        node: Arc<Node>,
        reads: bool,
    },
}

/// A name that is to be there.
pub struct New {
    pub parent: u64,
    pub name: Vec<u8>,
    pub mode: u32,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
}

/// How an open is answered.
pub enum How {
    Cached {
        keep: bool,
    },
    /// The kernel passes by its cache.
    Direct,
    Passthrough(Arc<Backing>),
}

/// Whether requests are worked on.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Gate {
    #[default]
    Open,
    /// They wait, each in the thread that took it from the kernel.
    Shut,
    /// The device is not this process's any more: they are left unanswered, and the kernel sends them again to whoever goes on.
    Moved,
}

pub struct Mount {
    pub fs: FileSystem,
    pub config: FuseConfig,
    pub read_only: bool,
    pub nodes: Nodes,
    pub names: Names,
    pub notifier: RwLock<Option<Notifier>>,
    /// The kernel's end.
    pub device: OnceLock<Arc<OwnedFd>>,
    /// What was agreed on with the kernel.
    pub agreed: std::sync::Mutex<Agreed>,
    /// Whether requests are worked on.
    pub gate: RwLock<Gate>,
    /// The kernel and this process's capabilities allow it.
    pub passthrough: AtomicBool,
    pub handles: RwLock<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    /// Names under which this process keeps files that were deleted while it reads them.
    pub hiding: std::sync::Mutex<HashSet<AbsPath>>,
    pub locks: Locks,
    pub neighbours: Arc<Neighbours>,
    /// How often the mount was on its way to other hands.
    pub hands: AtomicU64,
    under_way: Arc<()>,
}

pub fn hidden(name: &[u8]) -> bool {
    name.starts_with(HIDDEN)
}

impl Mount {
    pub fn new(fs: FileSystem, top: AbsPath, status: &FileStatus, config: FuseConfig, read_only: bool) -> Mount {
        Mount {
            fs,
            passthrough: AtomicBool::new(false),
            config,
            read_only,
            nodes: Nodes::new(top, status),
            names: Names::default(),
            notifier: RwLock::default(),
            device: OnceLock::new(),
            agreed: std::sync::Mutex::default(),
            gate: RwLock::default(),
            handles: RwLock::default(),
            next_handle: AtomicU64::new(1),
            hiding: std::sync::Mutex::default(),
            locks: Locks::default(),
            neighbours: Arc::default(),
            hands: AtomicU64::new(0),
            under_way: Arc::default(),
        }
    }

    /// One that another process had. Its handles follow.
    pub fn taken_over(fs: FileSystem, nodes: Nodes, locks: Locks, config: FuseConfig, state: &wire::State) -> Mount {
        let fresh = Mount::new(fs, AbsPath::root(), &FileStatus::default(), config, state.read_only);
        Mount { nodes, locks, next_handle: AtomicU64::new(state.next_handle), ..fresh }
    }

    pub fn next_handle(&self) -> u64 {
        self.next_handle.load(Ordering::SeqCst)
    }

    /// What is open, as another process goes on with it.
    pub async fn save_handles(&self) -> Result<Vec<wire::Handle>> {
        use wire::handle::Kind;
        let handles: Vec<(u64, Arc<Handle>)> =
            self.handles.read().unwrap_or_else(|e| e.into_inner()).iter().map(|(number, handle)| (*number, handle.clone())).collect();
        let mut out = Vec::with_capacity(handles.len());
        for (number, handle) in handles {
            let (mut first, mut entries) = (0, Vec::new());
            let (kind, node, text) = match &*handle {
                Handle::Reads { node, .. } => (Kind::Reads, node.id, Vec::new()),
                Handle::Passes { node, .. } => (Kind::Passes, node.id, Vec::new()),
                Handle::Writes { node, writes, .. } => (if *writes { Kind::Writes } else { Kind::ReadsStaged }, node.id, Vec::new()),
                Handle::Folder { path_of, folder } => {
                    (first, entries) = folder.lock().await.rest().await?;
                    (Kind::Folder, *path_of, Vec::new())
                }
                Handle::Statistics(text) => (Kind::Statistics, 0, text.clone()),
                Handle::Lost { node, reads } => (if *reads { Kind::Reads } else { Kind::Passes }, node.id, Vec::new()),
            };
            out.push(wire::Handle { number, kind: kind.into(), node, text: text.into(), first, entries });
        }
        Ok(out)
    }

    /// A handle as it was, as far as what it was open for is still there.
    pub async fn restore_handle(&self, saved: &wire::Handle) -> Result<Handle> {
        use wire::handle::Kind;
        let handle = match saved.kind() {
            Kind::Folder => Handle::Folder { path_of: saved.node, folder: Mutex::new(Folder::taken_over(saved.first, &saved.entries)) },
            Kind::Statistics => Handle::Statistics(saved.text.to_vec()),
            kind @ (Kind::Writes | Kind::ReadsStaged) => {
                let node = self.nodes.get(saved.node)?;
                let staged = node.opened.lock().await.staged.clone().ok_or_else(|| err!(Corrupt, "a handle of a file that nobody writes"))?;
                Handle::Writes { node, staged, writes: kind == Kind::Writes }
            }
            kind @ (Kind::Reads | Kind::Passes) => {
                let node = self.nodes.get(saved.node)?;
                let (hidden, version) = {
                    let opened = node.opened.lock().await;
                    (opened.hidden.clone(), opened.version)
                };
                let reader = match hidden {
                    Some(path) => self.fs.open(&path).await,
                    None => self.reader_of(&node).await,
                };
                let reader = match reader {
                    Ok(reader) if Version::of(reader.status()) == version => reader,
                    // Whoever gave it may not be there to go on: what cannot be opened now and will not be later is as one that is gone.
                    Err(e) if e.is_retryable() => return Err(e),
                    _ => return Ok(Handle::Lost { node, reads: kind == Kind::Reads }),
                };
                if kind == Kind::Reads { Handle::Reads { node, reader } } else { Handle::Passes { node, reader } }
            }
        };
        Ok(handle)
    }

    /// A handle under the number that the kernel knows it by.
    pub fn put_handle(&self, number: u64, handle: Handle) {
        self.handles.write().unwrap_or_else(|e| e.into_inner()).insert(number, Arc::new(handle));
        HANDLES.inc();
    }

    /// A request that is being worked on, until it is dropped.
    pub fn under_way(&self) -> Arc<()> {
        self.under_way.clone()
    }

    /// Waits until no request is being worked on, for a while.
    pub async fn settle(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while Arc::strong_count(&self.under_way) > 1 && Instant::now() < deadline {
            tokio::time::sleep(SETTLING).await;
        }
    }

    /// Whether no request is being worked on.
    pub fn is_at_rest(&self) -> bool {
        Arc::strong_count(&self.under_way) == 1
    }

    pub fn attr_ttl(&self) -> Duration {
        Duration::from_millis(self.config.attr_ttl_ms)
    }

    pub fn entry_ttl(&self) -> Duration {
        Duration::from_millis(self.config.entry_ttl_ms)
    }

    pub fn attr_of(&self, node: &Node) -> FileAttr {
        let attr = attributes::of(node.id, &node.status(), &self.names);
        if node.is_gone() { FileAttr { nlink: 0, ..attr } } else { attr }
    }

    pub fn handle(&self, number: u64) -> Result<Arc<Handle>> {
        let handles = self.handles.read().unwrap_or_else(|e| e.into_inner());
        handles.get(&number).cloned().ok_or_else(|| err!(InvalidArgument, "no such handle"))
    }

    pub fn keep(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.write().unwrap_or_else(|e| e.into_inner()).insert(number, Arc::new(handle));
        HANDLES.inc();
        number
    }

    pub fn check_writable(&self) -> Result<()> {
        if self.read_only { Err(err!(ReadOnly, "this is a read-only mount")) } else { Ok(()) }
    }

    pub fn check_name(name: &[u8]) -> Result<()> {
        if name.len() > forebay_common::limits::NAME_MAX_BYTES {
            return Err(err!(NameTooLong, "a name of {} bytes", name.len()));
        }
        Ok(())
    }

    pub async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Arc<Node>> {
        Self::check_name(name)?;
        if hidden(name) {
            return Err(err!(NotFound, "hidden"));
        }
        let status = match self.fs.get_status(&self.nodes.path_below(parent, name)?).await {
            // Made here, and given up on its way: its name is free until it is handed over.
            Err(e) if e.kind() == ErrorKind::NotFound => match self.nodes.named(parent, name) {
                Some(node) if matches!(node.in_use(), Use::Staged(staged) if staged.is_new()) => node.status(),
                _ => return Err(e),
            },
            other => other?,
        };
        Ok(self.nodes.show(parent, name, status))
    }

    /// What the namespace says of a node, under a name that is still there.
    pub async fn status_of(&self, node: &Node) -> Result<FileStatus> {
        loop {
            match self.fs.get_status(&self.nodes.path(node.id)?).await {
                Err(e) if e.kind() == ErrorKind::NotFound && self.nodes.drop_name(node) => {}
                other => return other,
            }
        }
    }

    /// Where a node is for sure: of several names one may have been deleted, or given to another file, by somebody else.
    pub async fn sure_path(&self, node: &Node) -> Result<AbsPath> {
        loop {
            let path = self.nodes.path(node.id)?;
            if !self.nodes.has_others(node) {
                return Ok(path);
            }
            match self.fs.get_status(&path).await {
                Ok(status) if status.file_id == node.status().file_id => return Ok(path),
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ if self.nodes.drop_name(node) => {}
                _ => return Ok(path),
            }
        }
    }

    /// The same, opened.
    pub async fn reader_of(&self, node: &Node) -> Result<FileReader> {
        loop {
            match self.fs.open(&self.nodes.path(node.id)?).await {
                Err(e) if e.kind() == ErrorKind::NotFound && self.nodes.drop_name(node) => {}
                other => return other,
            }
        }
    }

    pub async fn getattr(&self, id: u64) -> Result<FileAttr> {
        let node = self.nodes.get(id)?;
        let in_use = node.in_use();
        if node.is_gone() || matches!(&in_use, Use::Staged(staged) if staged.settled().is_none()) {
            return Ok(self.attr_of(&node));
        }
        let reads = match &in_use {
            Use::Reads(version) => Some(*version),
            Use::Staged(staged) => staged.settled(),
            Use::Free => None,
        };
        match self.status_of(&node).await {
            // Who reads an older content is told of that one.
            Ok(status) if reads.is_some_and(|version| version != Version::of(&status)) => {}
            // Another file is under that name by now: this one is as it was.
            Ok(status) if node.folder || status.file_id == node.status().file_id => node.set_status(status),
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound && reads.is_some() => {}
            Err(e) => return Err(e),
        }
        Ok(self.attr_of(&node))
    }

    /// What the kernel leaves to this process (`FUSE_HANDLE_KILLPRIV_V2`): whoever may not set them takes the set-user-id and set-group-id bits away by
    /// changing the file.
    pub async fn drop_privileges(&self, id: u64) -> Result<()> {
        let node = self.nodes.get(id)?;
        let mode = node.status().mode;
        if node.folder || without_privileges(mode) == mode {
            return Ok(());
        }
        self.setattr(id, None, Attributes { mode: Some(without_privileges(mode)), ..Attributes::default() }, true).await?;
        self.forget_attributes(id);
        Ok(())
    }

    /// `privileged`: cutting takes no bits of the mode away.
    pub async fn setattr(&self, id: u64, size: Option<u64>, mut wanted: Attributes, privileged: bool) -> Result<FileAttr> {
        self.check_writable()?;
        let node = self.nodes.get(id)?;
        let taken = wanted.owner.is_some() || wanted.group.is_some() || (size.is_some() && !privileged);
        let mode = node.status().mode;
        if taken && !node.folder && wanted.mode.is_none() && without_privileges(mode) != mode {
            wanted.mode = Some(without_privileges(mode));
        }
        let mut opened = node.opened.lock().await;
        if let Some(size) = size {
            self.cut(&node, &mut opened, size).await?;
        }
        if !wanted.is_empty() && !node.is_gone() {
            let now = match &opened.staged {
                Some(staged) => staged.set(wanted.clone()).await?,
                None => wanted.clone(),
            };
            let status = if now.is_empty() { None } else { Some(self.fs.set_attributes(&self.sure_path(&node).await?, now.request()).await?) };
            node.set_status(status.unwrap_or_else(|| changed(node.status(), &wanted)));
        }
        Ok(self.attr_of(&node))
    }

    pub async fn opendir(&self, id: u64) -> Result<u64> {
        self.nodes.get(id)?;
        Ok(self.keep(Handle::Folder { path_of: id, folder: Mutex::default() }))
    }

    /// Entries of a folder from a place on, until `take` has enough: it is given the place that follows, the name and what is there.
    pub async fn readdir(&self, handle: u64, place: u64, mut take: impl FnMut(u64, &[u8], &FileStatus) -> bool) -> Result<()> {
        let handle = self.handle(handle)?;
        let Handle::Folder { path_of, folder } = &*handle else { return Err(err!(NotADirectory, "a file")) };
        let path = self.nodes.path(*path_of)?;
        let mut folder = folder.lock().await;
        if place == 0 {
            folder.rewind();
            self.neighbours.begun(*path_of);
        }
        let mut at = place;
        let mut files = Vec::new();
        while let Some(status) = folder.entry(&self.fs, &path, at).await? {
            at += 1;
            let entry = AbsPath::parse(&status.path)?;
            let Some(name) = entry.name().filter(|name| !hidden(name)) else { continue };
            if take(at, name, &status) {
                break;
            }
            if !status.folder && status.kind == 0 && self.config.prefetch_files > 0 {
                files.push((name.to_vec(), status.length));
            }
        }
        self.neighbours.listed(*path_of, files.iter().map(|(name, length)| (name.as_slice(), *length)));
        Ok(())
    }
}

/// A mode without the bits that make others act for the owner. A set-group-id bit without the group's execution means something else.
fn without_privileges(mode: u32) -> u32 {
    let group = if mode & 0o010 != 0 { 0o2000 } else { 0 };
    mode & !(0o4000 | group)
}

fn changed(status: FileStatus, wanted: &Attributes) -> FileStatus {
    FileStatus {
        mode: wanted.mode.unwrap_or(status.mode),
        owner: wanted.owner.clone().unwrap_or(status.owner.clone()),
        group: wanted.group.clone().unwrap_or(status.group.clone()),
        modified_ms: wanted.modified.map_or(status.modified_ms, |time| time.ms),
        modified_ns: wanted.modified.map_or(status.modified_ns, |time| time.ns),
        accessed_ms: wanted.accessed.map_or(status.accessed_ms, |time| time.ms),
        accessed_ns: wanted.accessed.map_or(status.accessed_ns, |time| time.ns),
        ..status
    }
}

/// What `setattr` asks for.
pub fn wanted(mode: Option<u32>, uid: Option<u32>, gid: Option<u32>, modified: Option<TimeOrNow>, accessed: Option<TimeOrNow>) -> Attributes {
    let time = |time: TimeOrNow| match time {
        TimeOrNow::SpecificTime(time) => Time::from(time),
        TimeOrNow::Now => Time::from(SystemTime::now()),
    };
    Attributes {
        mode: mode.map(|mode| mode & 0o7777),
        owner: uid.map(Names::user),
        group: gid.map(Names::group),
        modified: modified.map(time),
        accessed: accessed.map(time),
    }
}

/// This process's metrics as text.
pub fn statistics() -> Vec<u8> {
    let mut text = Vec::new();
    if let Err(e) = prometheus::Encoder::encode(&prometheus::TextEncoder::new(), &prometheus::gather(), &mut text) {
        tracing::warn!(error = %e, "metrics could not be written down");
    }
    text
}
