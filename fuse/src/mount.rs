//! `Mount`: what each request of the kernel comes to, in terms of the namespace.
//!
//! Called by `handler`, one task per request. Opening for reading asks the master each time (close-to-open), and the kernel's page cache is kept
//! while the content is the same. A cached file of one block, whole and verified, is read by the kernel itself (passthrough); such a
//! node cannot be opened in any other way meanwhile, so an open that conflicts answers ESTALE, which makes the kernel look the name up again and get a node of its
//! own. What is open for writing is in `staged`, for readers of this mount as well, unless they came first by passthrough.

use crate::attributes::{self, Names, Time, Version};
use crate::folder::Folder;
use crate::nodes::{Node, Nodes, Opened, ROOT, Use};
use crate::staged::{self, Attributes, Staged};
use forebay_client::{CreateOptions, FileReader, FileSystem};
use forebay_common::config::FuseConfig;
use forebay_common::{AbsPath, Error, ErrorKind, Result, counter, err, gauge};
use forebay_proto::FileStatus;
use fuser::{BackingId, FileAttr, Notifier, TimeOrNow};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Mutex;

counter!(OPENS, "forebay_fuse_opens_total", "files opened");
counter!(pub PASSTHROUGH, "forebay_fuse_passthrough_opens_total", "files opened so that the kernel reads their block itself");
counter!(REFUSED, "forebay_fuse_passthrough_refused_total", "blocks that the kernel would not take for passthrough");
counter!(CONFLICTS, "forebay_fuse_conflicting_opens_total", "opens that were answered ESTALE, to be made on a node of their own");
counter!(pub READS, "forebay_fuse_reads_total", "reads that came to this process");
counter!(pub READ_BYTES, "forebay_fuse_read_bytes_total", "bytes of those reads");
counter!(pub WRITTEN_BYTES, "forebay_fuse_written_bytes_total", "bytes written");
gauge!(HANDLES, "forebay_fuse_handles", "open files and folders");

/// What the name of a file begins with that was deleted while somebody reads it.
const HIDDEN: &[u8] = b".forebay-hidden-";
/// How long the end of an earlier opening is waited for that the kernel has told, and this process not booked yet.
const ENDING_TRIES: u32 = 3;
const ENDING: Duration = Duration::from_millis(2);
/// What `statfs` says there is, since an under store has no end.
const STATFS_BYTES: u64 = 1 << 50;
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
    Passthrough(Arc<BackingId>),
}

pub struct Mount {
    pub fs: FileSystem,
    pub config: FuseConfig,
    pub read_only: bool,
    pub nodes: Nodes,
    pub names: Names,
    pub notifier: OnceLock<Notifier>,
    /// The kernel and this process's capabilities allow it.
    pub passthrough: AtomicBool,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    /// Names under which this process keeps files that were deleted while it reads them.
    hiding: std::sync::Mutex<HashSet<AbsPath>>,
    under_way: Arc<()>,
}

/// A conflicting open: to be made again, on another node.
pub fn look_again() -> Error {
    CONFLICTS.inc();
    err!(FileChanged, "open in another way")
}

fn hidden(name: &[u8]) -> bool {
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
            notifier: OnceLock::new(),
            handles: RwLock::default(),
            next_handle: AtomicU64::new(1),
            hiding: std::sync::Mutex::default(),
            under_way: Arc::default(),
        }
    }

    /// A request that is being worked on, until it is dropped.
    pub fn under_way(&self) -> Arc<()> {
        self.under_way.clone()
    }

    /// Waits until no request is being worked on, for a while.
    pub async fn settle(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while Arc::strong_count(&self.under_way) > 1 && Instant::now() < deadline {
            tokio::time::sleep(ENDING).await;
        }
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

    fn keep(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.write().unwrap_or_else(|e| e.into_inner()).insert(number, Arc::new(handle));
        HANDLES.inc();
        number
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only { Err(err!(ReadOnly, "this is a read-only mount")) } else { Ok(()) }
    }

    fn check_name(name: &[u8]) -> Result<()> {
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
        match self.fs.get_status(&self.nodes.path(id)?).await {
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

    /// Gives the caller what it makes, where this process makes it as somebody else and may give it away.
    async fn own(&self, path: &AbsPath, status: FileStatus, uid: u32, gid: u32, mode: u32) -> Result<FileStatus> {
        let wanted = Attributes {
            owner: (self.names.uid(&status.owner) != uid).then(|| Names::user(uid)),
            group: (self.names.gid(&status.group) != gid).then(|| Names::group(gid)),
            mode: (status.mode & 0o7777 != mode & 0o7777).then_some(mode & 0o7777),
            modified: None,
            accessed: None,
        };
        if wanted.is_empty() {
            return Ok(status);
        }
        match self.fs.set_attributes(path, wanted.request()).await {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                tracing::debug!(error = %e, %path, "what was made belongs to whom the master takes this mount for");
                Ok(status)
            }
            other => other,
        }
    }

    /// Whose a new entry is: in a folder with the set-group-id bit the folder's group's.
    fn group_of_new(&self, parent: &Node, gid: u32) -> (u32, bool) {
        let status = parent.status();
        let inherits = status.mode & 0o2000 != 0;
        (if inherits { self.names.gid(&status.group) } else { gid }, inherits)
    }

    pub async fn mkdir(&self, new: New) -> Result<Arc<Node>> {
        let New { parent, name, mode, uid, gid } = &new;
        let (parent, name, uid) = (*parent, name.as_slice(), *uid);
        self.check_writable()?;
        Self::check_name(name)?;
        let path = self.nodes.path_below(parent, name)?;
        let (gid, inherits) = self.group_of_new(&*self.nodes.get(parent)?, *gid);
        let mode = mode & 0o7777 | if inherits { 0o2000 } else { 0 };
        let status = self.fs.mkdir_as(&path, false, false, mode).await?;
        let status = self.own(&path, status, uid, gid, mode).await?;
        self.nodes.removed(parent, name);
        Ok(self.nodes.show(parent, name, status))
    }

    /// Makes a file and opens it; one that somebody else made meanwhile is opened, unless `flags` want a new one.
    pub async fn create(
        &self,
        new: &New,
        flags: i32,
        backing: impl Fn(OwnedFd) -> std::io::Result<BackingId> + Send,
    ) -> Result<(Arc<Node>, u64, How)> {
        let New { parent, name, mode, uid, gid } = new;
        let (parent, name, mode, uid) = (*parent, name.as_slice(), *mode, *uid);
        self.check_writable()?;
        Self::check_name(name)?;
        let path = self.nodes.path_below(parent, name)?;
        let (gid, _) = self.group_of_new(&*self.nodes.get(parent)?, *gid);
        let options = CreateOptions { mode: mode & 0o7777, ..CreateOptions::default() };
        let writer = match self.fs.create(&path, &options).await {
            Ok(writer) => writer,
            Err(e) if e.kind() == ErrorKind::AlreadyExists && flags & nix::libc::O_EXCL == 0 => {
                let node = self.lookup(parent, name).await?;
                return match self.open(node.id, flags, backing).await {
                    Ok((handle, how)) => Ok((node, handle, how)),
                    Err(e) => {
                        self.nodes.forget(node.id, 1);
                        Err(e)
                    }
                };
            }
            Err(e) => return Err(e),
        };
        let status = writer.status().clone();
        let staged = Arc::new(Staged::new(&self.config.staging_dir, writer)?);
        let status = match self.own(&path, status, uid, gid, mode).await {
            Ok(status) => status,
            Err(e) => {
                staged.forget().await;
                return Err(e);
            }
        };
        let own = Attributes {
            owner: Some(status.owner.clone()),
            group: Some(status.group.clone()),
            mode: Some(status.mode),
            modified: None,
            accessed: None,
        };
        staged.note_own(own).await;
        OPENS.inc();
        self.nodes.removed(parent, name);
        let node = self.nodes.show(parent, name, status);
        let mut opened = node.opened.lock().await;
        opened.handles += 1;
        opened.staged = Some(staged.clone());
        staged.add_writer();
        node.note_use(&opened);
        drop(opened);
        let handle = self.keep(Handle::Writes { node: node.clone(), staged, writes: true });
        Ok((node, handle, How::Cached { keep: true }))
    }

    /// A regular file that nobody opens, a pipe, a socket, a device.
    pub async fn mknod(&self, new: New, device: u64) -> Result<Arc<Node>> {
        let kind = new.mode >> 12;
        if kind != 0 && kind != nix::libc::S_IFREG >> 12 {
            return self.make_node(&new, kind, b"", device).await;
        }
        let exclusive = nix::libc::O_EXCL | nix::libc::O_WRONLY;
        let no_backing = |_| Err(std::io::Error::from(std::io::ErrorKind::Unsupported));
        let (node, handle, _) = self.create(&new, exclusive, no_backing).await?;
        if let Err(e) = self.release(handle).await {
            self.nodes.forget(node.id, 1);
            return Err(e);
        }
        Ok(node)
    }

    pub async fn symlink(&self, new: New, target: &[u8]) -> Result<Arc<Node>> {
        self.make_node(&new, nix::libc::S_IFLNK >> 12, target, 0).await
    }

    async fn make_node(&self, new: &New, kind: u32, target: &[u8], device: u64) -> Result<Arc<Node>> {
        self.check_writable()?;
        Self::check_name(&new.name)?;
        let path = self.nodes.path_below(new.parent, &new.name)?;
        let (gid, _) = self.group_of_new(&*self.nodes.get(new.parent)?, new.gid);
        let mode = new.mode & 0o7777;
        let status = self.fs.make_node(&path, kind, mode, target, device).await?;
        let status = self.own(&path, status, new.uid, gid, mode).await?;
        self.nodes.removed(new.parent, &new.name);
        Ok(self.nodes.show(new.parent, &new.name, status))
    }

    /// Where a link leads.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>> {
        let status = self.nodes.get(id)?.status();
        if status.target.is_empty() { Err(err!(InvalidArgument, "no link")) } else { Ok(status.target.to_vec()) }
    }

    /// Opens a node. `backing` has the kernel take a descriptor for passthrough.
    pub async fn open(&self, id: u64, flags: i32, backing: impl Fn(OwnedFd) -> std::io::Result<BackingId> + Send) -> Result<(u64, How)> {
        if id == STATISTICS_NODE {
            return Ok((self.keep(Handle::Statistics(statistics())), How::Direct));
        }
        let node = self.nodes.get(id)?;
        let writes = flags & nix::libc::O_ACCMODE != nix::libc::O_RDONLY;
        let cuts = flags & nix::libc::O_TRUNC != 0;
        if writes || cuts {
            self.check_writable()?;
        }
        let mut opened = node.opened.lock().await;
        OPENS.inc();
        // A reader that the kernel has let go is booked in a moment.
        for _ in 0..ENDING_TRIES {
            if !(writes || cuts) || opened.backing.is_none() {
                break;
            }
            drop(opened);
            tokio::time::sleep(ENDING).await;
            opened = node.opened.lock().await;
        }
        if node.is_gone() && opened.staged.is_none() {
            return Err(err!(NotFound, "this file was deleted"));
        }
        if writes || cuts || opened.staged.is_some() {
            return self.open_staged(&node, &mut opened, writes, cuts).await;
        }
        let path = self.nodes.path(id)?;
        let reader = self.fs.open(&path).await?;
        let version = Version::of(reader.status());
        let reading = opened.readers > 0 || opened.backing.is_some();
        if (reading && version != opened.version) || (!reading && version.file_id != node.status().file_id) {
            self.nodes.detach(&node);
            return Err(look_again());
        }
        if Version::of(&node.status()) != version {
            self.forget_attributes(id);
        }
        node.set_status(reader.status().clone());
        let passes = match &opened.backing {
            Some(backing) => Some(backing.clone()),
            None if opened.readers == 0 && self.passthrough.load(Ordering::Relaxed) => self.take_backing(&reader, backing).await,
            None => None,
        };
        opened.version = version;
        opened.handles += 1;
        let answer = match passes {
            Some(backing) => {
                opened.backing = Some(backing.clone());
                PASSTHROUGH.inc();
                (self.keep(Handle::Passes { node: node.clone(), reader }), How::Passthrough(backing))
            }
            None => {
                opened.readers += 1;
                let keep = opened.cached == Some(version);
                opened.cached = Some(version);
                (self.keep(Handle::Reads { node: node.clone(), reader }), How::Cached { keep })
            }
        };
        node.note_use(&opened);
        Ok(answer)
    }

    /// What the kernel believes of a file's length is not what it is.
    fn forget_attributes(&self, id: u64) {
        if let Some(notifier) = self.notifier.get()
            && let Err(e) = notifier.inval_inode(fuser::INodeNo(id), -1, 0)
        {
            tracing::debug!(error = %e, "the kernel keeps what it knows of a file");
        }
    }

    async fn take_backing(&self, reader: &FileReader, backing: impl Fn(OwnedFd) -> std::io::Result<BackingId>) -> Option<Arc<BackingId>> {
        if reader.length() == 0 || reader.block_count() != 1 {
            return None;
        }
        let descriptor = reader.whole_descriptor(0).await?;
        match backing(descriptor) {
            Ok(id) => Some(Arc::new(id)),
            Err(e) => {
                REFUSED.inc();
                tracing::debug!(error = %e, "the kernel does not take a block for passthrough");
                None
            }
        }
    }

    async fn open_staged(&self, node: &Arc<Node>, opened: &mut Opened, writes: bool, cuts: bool) -> Result<(u64, How)> {
        if opened.backing.is_some() {
            self.nodes.detach(node);
            return Err(look_again());
        }
        let gone = node.is_gone();
        let (staged, keep) = match &opened.staged {
            Some(staged) => {
                // A copy that nobody writes: what the namespace has may be newer.
                if let Some(version) = staged.settled().filter(|_| !gone)
                    && Version::of(&self.fs.get_status(&self.nodes.path(node.id)?).await?) != version
                {
                    self.nodes.detach(node);
                    return Err(look_again());
                }
                (staged.clone(), true)
            }
            None => {
                let reader = self.fs.open(&self.nodes.path(node.id)?).await?;
                let version = Version::of(reader.status());
                // The kernel appends behind what it takes for the end, and would mix what two openings read.
                let known = Version::of(&node.status()) == version && (opened.readers == 0 || opened.version == version);
                if !known && !cuts {
                    if opened.readers > 0 || version.file_id != node.status().file_id {
                        self.nodes.detach(node);
                    }
                    return Err(look_again());
                }
                let staged = Staged::load(&self.config.staging_dir, &reader, if cuts { 0 } else { u64::MAX }).await?;
                (Arc::new(staged), opened.cached == Some(version))
            }
        };
        if cuts {
            staged.cut(0).await?;
        }
        let writes = writes || cuts;
        if writes {
            staged.add_writer();
        }
        opened.staged = Some(staged.clone());
        opened.handles += 1;
        opened.cached = None;
        node.note_use(opened);
        Ok((self.keep(Handle::Writes { node: node.clone(), staged, writes }), How::Cached { keep }))
    }

    /// Bytes of an open file, at once where they are here.
    pub fn read_now(&self, handle: &Handle, offset: u64, length: usize) -> Option<bytes::Bytes> {
        match handle {
            Handle::Reads { node, reader } if !matches!(node.in_use(), Use::Staged(_)) => reader.slice_now(offset, length),
            _ => None,
        }
    }

    pub async fn read(&self, handle: &Handle, offset: u64, length: usize) -> Result<bytes::Bytes> {
        match handle {
            Handle::Reads { node, reader } => match node.in_use() {
                Use::Staged(staged) => staged.read(offset, length).map(Into::into),
                _ => reader.slice(offset, length).await,
            },
            Handle::Writes { staged, .. } => staged.read(offset, length).map(Into::into),
            Handle::Statistics(text) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                Ok(bytes::Bytes::copy_from_slice(&text[from..(from + length).min(text.len())]))
            }
            Handle::Passes { reader, .. } => reader.slice(offset, length).await,
            Handle::Folder { .. } => Err(err!(IsADirectory, "a folder")),
        }
    }

    pub async fn write(&self, handle: &Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        match handle {
            Handle::Writes { staged, .. } => {
                staged.write(offset, bytes).await?;
                WRITTEN_BYTES.inc_by(bytes.len() as u64);
                Ok(())
            }
            _ => Err(err!(PermissionDenied, "this file is not open for writing")),
        }
    }

    /// Hands over what was written. `opened` is locked by the caller.
    async fn hand_over(&self, node: &Node, staged: &Staged) -> Result<()> {
        if node.is_gone() {
            return Ok(());
        }
        let path = self.nodes.path(node.id)?;
        if let Some(status) = staged.hand_over(&self.fs, &path).await? {
            node.set_status(status);
        }
        Ok(())
    }

    /// `close`: what was written by it is in the namespace, as durable as its write type says.
    pub async fn flush(&self, handle: u64) -> Result<()> {
        let Handle::Writes { node, staged, writes: true } = &*self.handle(handle)? else { return Ok(()) };
        let _opened = node.opened.lock().await;
        // Of a file that was just made a shell closes one descriptor before it writes to the other; the last one hands it over.
        if staged.is_new() && staged.length() == 0 {
            return Ok(());
        }
        self.hand_over(node, staged).await
    }

    /// `fsync`: what anybody has written to this file here.
    pub async fn sync(&self, handle: u64) -> Result<()> {
        let handle = self.handle(handle)?;
        let (Handle::Writes { node, .. } | Handle::Reads { node, .. } | Handle::Passes { node, .. }) = &*handle else { return Ok(()) };
        let opened = node.opened.lock().await;
        match &opened.staged {
            Some(staged) => self.hand_over(node, staged).await,
            None => Ok(()),
        }
    }

    /// Books the end of a handle that needs nobody to be asked, where nobody is at the file just now. `false`: `release` has to.
    pub fn release_now(&self, number: u64) -> bool {
        let Ok(handle) = self.handle(number) else { return true };
        let (node, reads) = match &*handle {
            Handle::Reads { node, .. } => (node, true),
            Handle::Passes { node, .. } => (node, false),
            Handle::Writes { .. } => return false,
            Handle::Folder { .. } | Handle::Statistics(_) => {
                self.let_go(number);
                return true;
            }
        };
        let Ok(mut opened) = node.opened.try_lock() else { return false };
        if opened.handles <= 1 && (opened.staged.is_some() || opened.hidden.is_some()) {
            return false;
        }
        self.let_go(number);
        book_end(node, &mut opened, reads);
        true
    }

    fn let_go(&self, number: u64) -> Option<Arc<Handle>> {
        let handle = self.handles.write().unwrap_or_else(|e| e.into_inner()).remove(&number);
        if handle.is_some() {
            HANDLES.dec();
        }
        handle
    }

    pub async fn release(&self, number: u64) -> Result<()> {
        let Some(handle) = self.let_go(number) else { return Ok(()) };
        let (node, reads) = match &*handle {
            Handle::Reads { node, .. } => (node, true),
            Handle::Passes { node, .. } | Handle::Writes { node, .. } => (node, false),
            Handle::Folder { .. } | Handle::Statistics(_) => return Ok(()),
        };
        let mut opened = node.opened.lock().await;
        let mut done = Ok(());
        if opened.handles <= 1
            && let Some(staged) = opened.staged.clone()
        {
            // What a mapping wrote after the last close.
            done = self.hand_over(node, &staged).await;
            if let Err(e) = &done {
                staged::LOST.inc();
                tracing::error!(error = %e, node = node.id, "a file that was written could not be handed over: what was written since its last close or fsync is lost");
            }
            opened.cached = staged.version();
            staged.forget().await;
            opened.staged = None;
        }
        if let Handle::Writes { staged, writes: true, .. } = &*handle {
            staged.end_writer();
        }
        book_end(node, &mut opened, reads);
        if opened.handles == 0
            && let Some(path) = opened.hidden.take()
        {
            if let Err(e) = self.fs.delete(&path, false).await {
                tracing::warn!(error = %e, %path, "a file that was deleted while it was read stays behind under this name");
            }
            self.hiding.lock().unwrap_or_else(|e| e.into_inner()).remove(&path);
        }
        done
    }

    pub async fn setattr(&self, id: u64, size: Option<u64>, wanted: Attributes) -> Result<FileAttr> {
        self.check_writable()?;
        let node = self.nodes.get(id)?;
        let mut opened = node.opened.lock().await;
        if let Some(size) = size {
            self.cut(&node, &mut opened, size).await?;
        }
        if !wanted.is_empty() && !node.is_gone() {
            let now = match &opened.staged {
                Some(staged) => staged.set(wanted.clone()).await?,
                None => wanted.clone(),
            };
            let status = if now.is_empty() { None } else { Some(self.fs.set_attributes(&self.nodes.path(id)?, now.request()).await?) };
            node.set_status(status.unwrap_or_else(|| changed(node.status(), &wanted)));
        }
        Ok(self.attr_of(&node))
    }

    async fn cut(&self, node: &Arc<Node>, opened: &mut Opened, size: u64) -> Result<()> {
        if let Some(staged) = &opened.staged {
            return staged.cut(size).await;
        }
        if node.is_gone() {
            return Err(err!(NotFound, "this file was deleted"));
        }
        let path = self.nodes.path(node.id)?;
        let reader = self.fs.open(&path).await?;
        let staged = Arc::new(Staged::load(&self.config.staging_dir, &reader, size).await?);
        staged.cut(size).await?;
        if let Some(status) = staged.hand_over(&self.fs, &path).await? {
            node.set_status(status);
        }
        opened.cached = None;
        // Who reads it through this process reads on, in what it is now.
        if opened.readers > 0 {
            opened.staged = Some(staged);
            node.note_use(opened);
        }
        Ok(())
    }

    pub async fn allocate(&self, handle: u64, mode: i32, offset: u64, length: u64) -> nix::Result<()> {
        match &*self.handle(handle).map_err(|_| nix::errno::Errno::EBADF)? {
            Handle::Writes { staged, .. } => staged.allocate(mode, offset, length).await,
            _ => Err(nix::errno::Errno::EBADF),
        }
    }

    pub fn seek(&self, handle: u64, offset: i64, whence: i32) -> nix::Result<i64> {
        use nix::errno::Errno;
        match &*self.handle(handle).map_err(|_| Errno::EBADF)? {
            Handle::Writes { staged, .. } => staged.seek(offset, whence),
            Handle::Reads { node, .. } | Handle::Passes { node, .. } => {
                // All of it is data.
                let length = i64::try_from(node.status().length).unwrap_or(i64::MAX);
                if offset < 0 || offset >= length {
                    return Err(Errno::ENXIO);
                }
                Ok(if whence == nix::libc::SEEK_DATA { offset } else { length })
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Readers that fetch bytes as they go must not lose the file: it is moved out of sight until they are done. `opened` is `node`'s.
    async fn hide(&self, node: &Node, opened: &mut Opened, path: &AbsPath) -> Result<bool> {
        if opened.readers == 0 || opened.hidden.is_some() || opened.staged.is_some() {
            return Ok(false);
        }
        let parent = path.parent().ok_or_else(|| err!(InvalidArgument, "/ cannot be deleted"))?;
        let hiding = parent.join(&[HIDDEN, format!("{:016x}", rand::random::<u64>()).as_bytes()].concat())?;
        self.fs.rename(path, &hiding, false).await?;
        self.note_moved(node, &hiding);
        self.hiding.lock().unwrap_or_else(|e| e.into_inner()).insert(hiding.clone());
        opened.hidden = Some(hiding);
        Ok(true)
    }

    /// What was hidden takes its name again.
    async fn show_again(&self, node: &Node, opened: &mut Opened, path: &AbsPath) {
        let Some(hidden) = opened.hidden.take() else { return };
        match self.fs.rename(&hidden, path, false).await {
            Ok(()) => {
                self.note_moved(node, path);
                self.hiding.lock().unwrap_or_else(|e| e.into_inner()).remove(&hidden);
            }
            Err(e) => {
                tracing::error!(error = %e, %path, %hidden, "a file that was to be replaced and was not stays under another name: move it back");
                self.hiding.lock().unwrap_or_else(|e| e.into_inner()).remove(&hidden);
            }
        }
    }

    /// Whoever has a file open looks it up under its new name from now on.
    fn note_moved(&self, node: &Node, path: &AbsPath) {
        let handles = self.handles.read().unwrap_or_else(|e| e.into_inner());
        for handle in handles.values() {
            if let Handle::Reads { node: of, reader } | Handle::Passes { node: of, reader } = &**handle
                && of.id == node.id
            {
                reader.note_moved(path.clone());
            }
        }
    }

    pub async fn unlink(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let path = self.nodes.path_below(parent, name)?;
        let Some(node) = self.nodes.named(parent, name) else { return self.fs.delete(&path, false).await };
        if node.folder {
            return Err(err!(IsADirectory, "a folder"));
        }
        // Held until the name leads nowhere: what is handed over meanwhile would make the file again.
        let mut opened = node.opened.lock().await;
        match opened.staged.clone().filter(|staged| staged.is_new()) {
            // Its name, which was held for it, goes with it.
            Some(staged) => staged.forget().await,
            None if self.hide(&node, &mut opened, &path).await? => {}
            None => self.fs.delete(&path, false).await?,
        }
        self.nodes.removed(parent, name);
        Ok(())
    }

    pub async fn rmdir(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let path = self.nodes.path_below(parent, name)?;
        if !self.fs.get_status(&path).await?.folder {
            return Err(err!(NotADirectory, "a file"));
        }
        let mut done = self.fs.delete(&path, false).await;
        if done.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotEmpty) && self.clear_hidden(&path).await? {
            done = self.fs.delete(&path, false).await;
        }
        done?;
        self.nodes.removed(parent, name);
        Ok(())
    }

    /// Deletes what a mount that died has left hidden in a folder. `false`: there is more than that.
    async fn clear_hidden(&self, path: &AbsPath) -> Result<bool> {
        let entries = self.fs.list(path, false).await?;
        let entries = entries.iter().map(|entry| AbsPath::parse(&entry.path)).collect::<Result<Vec<_>>>()?;
        let left_behind = |path: &AbsPath| path.name().is_some_and(hidden) && !self.hiding.lock().unwrap_or_else(|e| e.into_inner()).contains(path);
        if !entries.iter().all(left_behind) {
            return Ok(false);
        }
        for path in entries {
            self.fs.delete(&path, false).await?;
        }
        Ok(true)
    }

    pub async fn rename(&self, parent: u64, name: &[u8], new_parent: u64, new_name: &[u8], overwrite: bool) -> Result<()> {
        self.check_writable()?;
        Self::check_name(new_name)?;
        let (from, to) = (self.nodes.path_below(parent, name)?, self.nodes.path_below(new_parent, new_name)?);
        let source = self.nodes.named(parent, name);
        let target = self.nodes.named(new_parent, new_name).filter(|target| overwrite && !target.folder);
        let target = target.filter(|target| source.as_ref().is_none_or(|source| source.id != target.id && !source.folder));
        // Held, in the order of their numbers, until the names lead to where they shall.
        let mut held = match &source {
            Some(node) if node.folder => self.nodes.written_below(node.id),
            Some(node) => vec![node.clone()],
            None => Vec::new(),
        };
        held.extend(target.clone());
        held.sort_by_key(|node| node.id);
        held.dedup_by_key(|node| node.id);
        let mut locked = Vec::with_capacity(held.len());
        for node in &held {
            locked.push((node, node.opened.lock().await));
        }
        let is_target = |node: &Node| target.as_ref().is_some_and(|target| target.id == node.id);
        for (node, opened) in &mut locked {
            let new = opened.staged.clone().filter(|staged| staged.is_new());
            match new {
                Some(staged) if is_target(node) => staged.let_name_go().await,
                // What is being made has no complete file that could be moved.
                Some(staged) => self.hand_over(node, &staged).await?,
                None if is_target(node) => drop(self.hide(node, opened, &to).await?),
                None => {}
            }
        }
        if let Err(e) = self.fs.rename(&from, &to, overwrite).await {
            for (node, opened) in &mut locked {
                if is_target(node) {
                    self.show_again(node, opened, &to).await;
                }
            }
            return Err(e);
        }
        if let Some(source) = source.filter(|source| !source.folder) {
            self.note_moved(&source, &to);
        }
        self.nodes.moved(parent, name, new_parent, new_name);
        Ok(())
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
        }
        let mut at = place;
        while let Some(status) = folder.entry(&self.fs, &path, at).await? {
            at += 1;
            let entry = AbsPath::parse(&status.path)?;
            let Some(name) = entry.name().filter(|name| !hidden(name)) else { continue };
            if take(at, name, &status) {
                break;
            }
        }
        Ok(())
    }

    /// Everything that was written and not handed over yet, before the mount goes.
    pub async fn hand_over_all(&self) {
        for node in self.nodes.written_below(ROOT) {
            let opened = node.opened.lock().await;
            if let Some(staged) = opened.staged.clone()
                && let Err(e) = self.hand_over(&node, &staged).await
            {
                staged::LOST.inc();
                tracing::error!(error = %e, node = node.id, "a file could not be handed over before the mount ended");
            }
        }
    }

    pub fn total_bytes() -> u64 {
        STATFS_BYTES
    }
}

/// A handle less. `opened` is `node`'s.
fn book_end(node: &Node, opened: &mut Opened, reads: bool) {
    opened.handles = opened.handles.saturating_sub(1);
    opened.readers = opened.readers.saturating_sub(u32::from(reads));
    if opened.handles == 0 {
        opened.backing = None;
    }
    node.note_use(opened);
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
fn statistics() -> Vec<u8> {
    let began = Instant::now();
    let mut text = Vec::new();
    if let Err(e) = prometheus::Encoder::encode(&prometheus::TextEncoder::new(), &prometheus::gather(), &mut text) {
        tracing::warn!(error = %e, "metrics could not be written down");
    }
    tracing::trace!(took = ?began.elapsed(), "statistics");
    text
}
