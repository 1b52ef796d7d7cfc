//! Open files: opened, read, written, handed over, closed. The third part of `Mount`.
//!
//! Every change of how a node is open is made with its `opened` locked, over the calls that it takes.

use crate::attributes::Version;
use crate::device::Backing;
use crate::mount::{CONFLICTS, HANDLES, Handle, How, Mount, New, OPENS, PASSTHROUGH, REFUSED, STATISTICS_NODE, WRITTEN_BYTES, statistics};
use crate::nodes::{Node, Opened, ROOT, Use};
use crate::staged::{self, Attributes, Staged};
use forebay_client::{CreateOptions, FileReader};
use forebay_common::{AbsPath, Error, ErrorKind, Result, err};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long the end of an earlier opening is waited for that the kernel has told, and this process not booked yet.
const ENDING_TRIES: u32 = 3;
const ENDING: Duration = Duration::from_millis(2);

/// How often a newer content is taken before what was written is handed over, or not.
const NEWER_TAKEN_MAX: u32 = 16;

/// A conflicting open: to be made again, on another node.
fn look_again() -> Error {
    CONFLICTS.inc();
    err!(FileChanged, "open in another way")
}

impl Mount {
    /// Makes a file and opens it; one that somebody else made meanwhile is opened, unless `flags` want a new one.
    pub async fn create(&self, new: &New, flags: i32) -> Result<(Arc<Node>, u64, How)> {
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
                return match self.open(node.id, flags).await {
                    Ok((handle, how)) => {
                        if flags & nix::libc::O_TRUNC != 0 && uid != 0 {
                            self.drop_privileges(node.id).await?;
                        }
                        Ok((node, handle, how))
                    }
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

    /// Opens a node.
    pub async fn open(&self, id: u64, flags: i32) -> Result<(u64, How)> {
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
        let reader = self.reader_here(&node).await?;
        if self.config.prefetch_files > 0
            && let (Some(folder), Ok(path)) = (self.nodes.folder_of(id), AbsPath::parse(&reader.status().path))
        {
            self.neighbours.read(&self.fs, folder, &path, self.config.prefetch_files);
        }
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
            None if opened.readers == 0 && self.passthrough.load(Ordering::Relaxed) => self.take_backing(&reader).await,
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
    pub fn forget_attributes(&self, id: u64) {
        self.forget(id, -1);
    }

    /// Nor is what it has of its bytes; of `staged` it is told how long it is: who appends does so behind them, without asking. `opened` is not locked: the kernel may want something of
    /// this process first.
    pub fn forget_content(&self, id: u64, staged: &Staged) {
        let told = self.content_of(id, staged);
        tokio::task::block_in_place(told);
    }

    /// The same with `opened` locked: not waited for.
    pub fn forget_content_later(&self, id: u64, staged: &Staged) {
        tokio::task::spawn_blocking(self.content_of(id, staged));
    }

    fn content_of(&self, id: u64, staged: &Staged) -> impl FnOnce() + Send + 'static {
        let notifier = self.notifier.read().unwrap_or_else(|e| e.into_inner()).clone();
        let last = staged.length().checked_sub(1).and_then(|at| Some((at, staged.read(at, 1).ok()?)));
        move || {
            let Some(notifier) = notifier else { return };
            let told = notifier.inval_inode(fuser::INodeNo(id), 0, 0).and_then(|()| match last {
                // The kernel knows no other way to be told of a length than by a byte of the page cache.
                Some((at, byte)) => notifier.store(fuser::INodeNo(id), at, &byte),
                None => Ok(()),
            });
            if let Err(e) = told {
                tracing::debug!(error = %e, "the kernel keeps what it knows of a file");
            }
        }
    }

    fn forget(&self, id: u64, from: i64) {
        if let Some(notifier) = &*self.notifier.read().unwrap_or_else(|e| e.into_inner())
            && let Err(e) = notifier.inval_inode(fuser::INodeNo(id), from, 0)
        {
            tracing::debug!(error = %e, "the kernel keeps what it knows of a file");
        }
    }

    /// A node's content, for an open. A name that somebody else has taken away since the kernel was told of it is looked up again: who makes a file where there is none gets a new one.
    async fn reader_here(&self, node: &Node) -> Result<FileReader> {
        match self.reader_of(node).await {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.nodes.detach(node);
                Err(look_again())
            }
            other => other,
        }
    }

    async fn take_backing(&self, reader: &FileReader) -> Option<Arc<Backing>> {
        let device = self.device.get()?;
        let descriptor = match reader.block_count() {
            _ if reader.length() == 0 => return None,
            1 => reader.whole_descriptor(0).await?,
            _ => reader.joined_descriptor().await?,
        };
        match Backing::open(device, descriptor) {
            Ok(backing) => Some(Arc::new(backing)),
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
        let (gone, mut newer) = (node.is_gone(), false);
        let (staged, keep) = match &opened.staged {
            Some(staged) => {
                // A copy that was not written to: what the namespace has may be newer.
                if let Some(version) = staged.version().filter(|_| !gone) {
                    let there = match self.status_of(node).await {
                        Err(e) if e.kind() == ErrorKind::NotFound => None,
                        other => Some(Version::of(&other?)),
                    };
                    if there.is_none_or(|there| there != version && (staged.settled().is_some() || there.file_id != version.file_id)) {
                        self.nodes.detach(node);
                        return Err(look_again());
                    }
                    // Those who have it open to write it see what there is as well.
                    newer = there != Some(version);
                    if newer {
                        staged.rebase(&self.fresh(node).await?).await?;
                        self.forget_content_later(node.id, staged);
                    }
                }
                (staged.clone(), !newer)
            }
            None => {
                let reader = self.reader_here(node).await?;
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
        if self.locks.is_locked(node.status().file_id) {
            staged.set_locked(true);
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
            Handle::Lost { node, .. } => match node.in_use() {
                Use::Staged(staged) => staged.read(offset, length).map(Into::into),
                _ => Err(err!(FileChanged, "this file was replaced while the mount changed hands")),
            },
        }
    }

    /// `appends`: behind the end, which the kernel may take for further on than it is.
    pub async fn write(&self, handle: &Handle, offset: u64, bytes: &[u8], appends: bool) -> Result<()> {
        match handle {
            Handle::Writes { node, staged, .. } => {
                let end = staged.length();
                if appends && offset > end {
                    staged.write(end, bytes).await?;
                    self.forget_content_later(node.id, staged);
                } else {
                    staged.write(offset, bytes).await?;
                }
                WRITTEN_BYTES.inc_by(bytes.len() as u64);
                Ok(())
            }
            _ => Err(err!(PermissionDenied, "this file is not open for writing")),
        }
    }

    /// Hands over what was written. `opened` is locked by the caller.
    pub async fn hand_over(&self, node: &Node, staged: &Staged) -> Result<()> {
        if node.is_gone() {
            return Ok(());
        }
        if !staged.is_dirty() {
            return Ok(());
        }
        self.check_locks(node, staged).await?;
        let path = self.sure_path(node).await?;
        for again in 0.. {
            match staged.hand_over(&self.fs, &path).await {
                Err(e) if e.kind() == ErrorKind::FileChanged && staged.is_locked() && again < NEWER_TAKEN_MAX => {
                    tracing::debug!(error = %e, "a file has a newer content, by the holder of another lock: that is taken first");
                    self.take_newer(node, staged).await?;
                }
                Err(e) => return Err(e),
                Ok(status) => {
                    if let Some(status) = status {
                        node.set_status(status);
                    }
                    if again > 0 {
                        self.forget_content_later(node.id, staged);
                    }
                    break;
                }
            }
        }
        Ok(())
    }

    /// `close`: what was written by it is in the namespace, as durable as its write type says.
    pub async fn flush(&self, handle: u64) -> Result<()> {
        let Handle::Writes { node, staged, writes: true } = &*self.handle(handle)? else { return Ok(()) };
        let _opened = node.opened.lock().await;
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
            Handle::Lost { node, reads } => (node, *reads),
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
            Handle::Lost { node, reads } => (node, *reads),
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

    pub async fn cut(&self, node: &Arc<Node>, opened: &mut Opened, size: u64) -> Result<()> {
        if let Some(staged) = &opened.staged {
            return staged.cut(size).await;
        }
        if node.is_gone() {
            return Err(err!(NotFound, "this file was deleted"));
        }
        let path = self.sure_path(node).await?;
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

    /// Everything that was written and not handed over yet, before the mount goes; returns how many files that failed for.
    pub async fn hand_over_all(&self) -> usize {
        let mut failures = 0;
        for node in self.nodes.written_below(ROOT) {
            let opened = node.opened.lock().await;
            if let Some(staged) = opened.staged.clone()
                && let Err(e) = self.hand_over(&node, &staged).await
            {
                // What is not to be handed over is in nobody's way.
                failures += usize::from(!staged.is_lost());
                tracing::error!(error = %e, node = node.id, "a file that is being written could not be handed over");
            }
        }
        failures
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
