//! Files being written: programs write anywhere in them, the namespace takes whole files in order.
//!
//! Bytes go to a nameless local file. As long as they come in order they go to a worker at the same time, so that closing has little
//! left to do; written elsewhere, what was sent is given up and the file is sent again as a whole when it is handed over. It is handed over when it is closed or fsynced, by
//! `CreateOptions::replace`: nobody sees half of it, and a crash of this process leaves what was handed over last. Called by `mount`, under the node's lock for opening
//! and handing over.

use crate::attributes::{Time, Version};
use crate::extents::Extents;
use forebay_client::{CreateOptions, FileSystem, FileWriter};
use forebay_common::{AbsPath, Error, Result, counter, err};
use forebay_proto::{FileStatus, SetAttributesRequest};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex as Lock, MutexGuard};
use tokio::sync::Mutex;

counter!(HANDED_OVER, "forebay_fuse_handed_over_total", "files that were written here and handed over to the namespace");
counter!(SENT_AGAIN, "forebay_fuse_sent_again_total", "files of which what was sent was given up, because they were not written in order");
counter!(pub LOST, "forebay_fuse_lost_writes_total", "files that were closed and could not be handed over");

/// Bytes read and sent at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What is to be set on a file.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    pub mode: Option<u32>,
    pub owner: Option<String>,
    pub group: Option<String>,
    pub modified: Option<Time>,
    pub accessed: Option<Time>,
}

impl Attributes {
    pub fn is_empty(&self) -> bool {
        self.mode.is_none() && self.owner.is_none() && self.group.is_none() && self.modified.is_none() && self.accessed.is_none()
    }

    /// Those of `newer`, and of these what it says nothing of.
    pub fn with(self, newer: Attributes) -> Attributes {
        Attributes {
            mode: newer.mode.or(self.mode),
            owner: newer.owner.or(self.owner),
            group: newer.group.or(self.group),
            modified: newer.modified.or(self.modified),
            accessed: newer.accessed.or(self.accessed),
        }
    }

    pub fn request(self) -> SetAttributesRequest {
        SetAttributesRequest {
            mode: self.mode,
            owner: self.owner,
            group: self.group,
            modified_ms: self.modified.map(|time| time.ms),
            modified_ns: self.modified.map_or(0, |time| time.ns),
            accessed_ms: self.accessed.map(|time| time.ms),
            accessed_ns: self.accessed.map_or(0, |time| time.ns),
            ..Default::default()
        }
    }
}

pub struct Staged {
    file: File,
    length: AtomicU64,
    /// There is something that was not handed over.
    dirty: AtomicBool,
    /// The namespace has a complete file of it.
    complete: AtomicBool,
    /// The lock under which it was written is somebody else's.
    lost: AtomicBool,
    /// It is written under a lock: only over the content that it is based on.
    locked: AtomicBool,
    /// Handles that write.
    writers: AtomicU32,
    /// Which content of the namespace it was loaded from or handed over as.
    version: Lock<Option<Version>>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The file on its way, as far as it was written in order.
    writer: Option<FileWriter>,
    sent: u64,
    /// It was made, and then not written in order: it is made again, with these.
    made_again: bool,
    own: Attributes,
    /// What waits for the last byte: when it was read last. When it was written goes with the bytes.
    later: Attributes,
    /// Since it was loaded, or handed over last.
    written: Extents,
}

fn nameless(dir: &Path) -> Result<File> {
    tempfile::tempfile_in(dir).map_err(|e| Error::io(format!("a file in the staging folder {}", dir.display()), &e))
}

fn blocking<T>(work: impl FnOnce() -> std::io::Result<T>) -> Result<T> {
    tokio::task::block_in_place(work).map_err(|e| Error::io("a file that is being written, in the staging folder", &e))
}

impl Staged {
    fn of(file: File, length: u64, version: Option<Version>, inner: Inner) -> Staged {
        let known = version.is_some();
        Staged {
            file,
            length: AtomicU64::new(length),
            dirty: AtomicBool::new(!known),
            complete: AtomicBool::new(known),
            lost: AtomicBool::new(false),
            locked: AtomicBool::new(false),
            writers: AtomicU32::new(0),
            version: Lock::new(version),
            inner: Mutex::new(inner),
        }
    }

    /// One that was just made; `writer` holds its name.
    pub fn new(dir: &Path, writer: FileWriter) -> Result<Staged> {
        Ok(Staged::of(nameless(dir)?, 0, None, Inner { writer: Some(writer), ..Inner::default() }))
    }

    /// One that is there, with its first bytes.
    pub async fn load(dir: &Path, reader: &forebay_client::FileReader, first: u64) -> Result<Staged> {
        let file = nameless(dir)?;
        let mut at = 0;
        let mut pieces = reader.pieces(0..first.min(reader.length()));
        while let Some(piece) = pieces.next().await? {
            blocking(|| file.write_all_at(&piece, at))?;
            at += piece.len() as u64;
        }
        Ok(Staged::of(file, at, Some(Version::of(reader.status())), Inner::default()))
    }

    /// One that another process had open, when nothing of it was to be handed over to the namespace.
    pub fn taken_over(file: File, saved: &forebay_proto::mount::Staged) -> Staged {
        let version = saved.version.as_ref().map(|v| Version { file_id: v.file_id, content: v.content, length: v.length });
        Staged {
            file,
            length: AtomicU64::new(saved.length),
            // What is lost is not clean.
            dirty: AtomicBool::new(saved.lost),
            complete: AtomicBool::new(saved.complete),
            lost: AtomicBool::new(saved.lost),
            locked: AtomicBool::new(saved.locked),
            writers: AtomicU32::new(saved.writers),
            version: Lock::new(version),
            inner: Mutex::default(),
        }
    }

    /// What another process needs to go on with it, beside the file itself.
    pub fn save(&self) -> forebay_proto::mount::Staged {
        let version = *self.version_lock();
        forebay_proto::mount::Staged {
            length: self.length(),
            writers: self.writers.load(Ordering::SeqCst),
            complete: !self.is_new(),
            version: version.map(Version::save),
            lost: self.is_lost(),
            locked: self.is_locked(),
        }
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn version_lock(&self) -> MutexGuard<'_, Option<Version>> {
        self.version.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn length(&self) -> u64 {
        self.length.load(Ordering::SeqCst)
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::SeqCst)
    }

    /// Whether the namespace has no complete file of it yet.
    pub fn is_new(&self) -> bool {
        !self.complete.load(Ordering::SeqCst)
    }

    pub fn add_writer(&self) {
        self.writers.fetch_add(1, Ordering::SeqCst);
    }

    pub fn end_writer(&self) {
        self.writers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Which content of the namespace it holds, where nothing was written since.
    pub fn version(&self) -> Option<Version> {
        if self.is_dirty() { None } else { *self.version_lock() }
    }

    /// The same, where nobody has it open for writing: then it is no more than a copy.
    pub fn settled(&self) -> Option<Version> {
        if self.writers.load(Ordering::SeqCst) > 0 { None } else { self.version() }
    }

    /// When it was written to last, and when anything of it was changed, where that is news.
    pub fn times(&self) -> Option<(Time, Time)> {
        let metadata = self.file.metadata().ok().filter(|_| self.is_dirty())?;
        let time = |s: i64, ns: i64| {
            let (s, ns) = (u64::try_from(s).unwrap_or(0), u64::try_from(ns).unwrap_or(0));
            Time { ms: s * 1_000 + ns / 1_000_000, ns: (ns % 1_000_000) as u32 }
        };
        Some((time(metadata.mtime(), metadata.mtime_nsec()), time(metadata.ctime(), metadata.ctime_nsec())))
    }

    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; length.min(usize::try_from(self.length().saturating_sub(offset)).unwrap_or(usize::MAX))];
        let mut read = 0;
        // Cut by somebody else meanwhile, it is shorter than it was.
        while read < out.len() {
            match blocking(|| self.file.read_at(&mut out[read..], offset + read as u64))? {
                0 => break,
                some => read += some,
            }
        }
        out.truncate(read);
        Ok(out)
    }

    /// Something is about to be written.
    fn change(&self) {
        self.dirty.store(true, Ordering::SeqCst);
    }

    /// It is not to get to the namespace any more.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    pub fn set_locked(&self, locked: bool) {
        self.locked.store(locked, Ordering::SeqCst);
    }

    pub fn is_locked(&self) -> bool {
        self.locked.load(Ordering::SeqCst)
    }

    /// Which content of the namespace it is based on.
    pub fn base(&self) -> Option<Version> {
        *self.version_lock()
    }

    /// Is based on another content from now on: becomes that, with what was written here laid over it.
    pub async fn rebase(&self, fresh: &Staged) -> Result<()> {
        let inner = self.inner.lock().await;
        let Some(written) = inner.written.ranges()? else {
            *self.version_lock() = fresh.base();
            return Ok(());
        };
        let length = written.last().map_or(0, |last| last.end).min(self.length()).max(fresh.length());
        blocking(|| {
            let mut piece = vec![0; PIECE_BYTES];
            for range in written {
                let mut at = range.start;
                while at < range.end.min(self.length()) {
                    let some = piece.len().min(usize::try_from(range.end.min(self.length()) - at).unwrap_or(piece.len()));
                    self.file.read_exact_at(&mut piece[..some], at)?;
                    fresh.file.write_all_at(&piece[..some], at)?;
                    at += some as u64;
                }
            }
            // All of the room first: half of one content and half of another would be neither.
            let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            match fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, signed(length)) {
                Err(e) if length > 0 && e != nix::errno::Errno::EOPNOTSUPP => return Err(e.into()),
                _ => {}
            }
            // By offsets: the files' own places are `seek`'s.
            let mut at = 0;
            loop {
                let some = fresh.file.read_at(&mut piece, at)?;
                if some == 0 {
                    break;
                }
                self.file.write_all_at(&piece[..some], at)?;
                at += some as u64;
            }
            self.file.set_len(length)
        })?;
        self.length.store(length, Ordering::SeqCst);
        *self.version_lock() = fresh.base();
        Ok(())
    }

    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.is_lost() {
            return Err(err!(Expired, "the lock under which this file is written was given to others"));
        }
        let mut inner = self.inner.lock().await;
        self.change();
        if let Err(e) = blocking(|| self.file.write_all_at(bytes, offset)) {
            // Part of it may be there, where a longer file has zeros.
            let _ = self.file.set_len(self.length());
            return Err(e);
        }
        let end = offset + bytes.len() as u64;
        // What lies between the end and where it begins is zeros from now on.
        inner.written.add(offset.min(self.length())..end);
        self.length.fetch_max(end, Ordering::SeqCst);
        if offset < inner.sent {
            give_up(&mut inner).await;
        } else if offset == inner.sent && inner.writer.is_some() {
            send(&mut inner, bytes).await;
        }
        Ok(())
    }

    pub async fn cut(&self, length: u64) -> Result<()> {
        let mut inner = self.inner.lock().await;
        self.change();
        if length < inner.sent {
            give_up(&mut inner).await;
        }
        blocking(|| self.file.set_len(length))?;
        let before = self.length();
        match length < before {
            true => inner.written.add_all(),
            false => inner.written.add(before..length),
        }
        self.length.store(length, Ordering::SeqCst);
        Ok(())
    }

    /// `fallocate(2)`, on the local file.
    pub async fn allocate(&self, mode: i32, offset: u64, length: u64) -> nix::Result<()> {
        let mut inner = self.inner.lock().await;
        self.change();
        let flags = FallocateFlags::from_bits_retain(mode);
        if !FallocateFlags::FALLOC_FL_KEEP_SIZE.contains(flags) && offset < inner.sent {
            give_up(&mut inner).await;
        }
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        tokio::task::block_in_place(|| fallocate(&self.file, flags, signed(offset), signed(length)))?;
        let before = self.length();
        let after = self.file.metadata().map_err(|_| nix::errno::Errno::EIO)?.len();
        let zeroes = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE;
        if (zeroes | FallocateFlags::FALLOC_FL_KEEP_SIZE).contains(flags) {
            if flags.intersects(zeroes) {
                inner.written.add(offset.min(before)..offset.saturating_add(length).min(after));
            }
            inner.written.add(before..after);
        } else {
            inner.written.add_all();
        }
        self.length.store(after, Ordering::SeqCst);
        Ok(())
    }

    /// `lseek(2)` for data and holes.
    pub fn seek(&self, offset: i64, whence: i32) -> nix::Result<i64> {
        let whence = match whence {
            nix::libc::SEEK_DATA => nix::unistd::Whence::SeekData,
            nix::libc::SEEK_HOLE => nix::unistd::Whence::SeekHole,
            _ => return Err(nix::errno::Errno::EINVAL),
        };
        nix::unistd::lseek(&self.file, offset, whence)
    }

    /// What it was given when it was made.
    pub async fn note_own(&self, own: Attributes) {
        self.inner.lock().await.own = own;
    }

    /// Notes what is to hold once it is complete. Returns what is to be set at once.
    pub async fn set(&self, wanted: Attributes) -> Result<Attributes> {
        let mut inner = self.inner.lock().await;
        if let Some(time) = wanted.modified.filter(|_| self.is_dirty()) {
            let ns = i64::try_from(time.ms % 1_000).unwrap_or(0) * 1_000_000 + i64::from(time.ns);
            let spec = TimeSpec::new(i64::try_from(time.ms / 1_000).unwrap_or(i64::MAX), ns);
            blocking(|| futimens(&self.file, &spec, &spec).map_err(Into::into))?;
        }
        if wanted.accessed.is_some() && self.is_dirty() {
            inner.later.accessed = wanted.accessed;
        }
        let besides = Attributes { modified: None, accessed: None, ..wanted.clone() };
        if self.is_new() {
            inner.own = std::mem::take(&mut inner.own).with(besides.clone());
        }
        if !self.is_dirty() {
            return Ok(wanted);
        }
        // Given up on its way, it is not there to be changed.
        Ok(if self.is_new() && inner.made_again { Attributes::default() } else { besides })
    }

    /// Hands over what is new; returns the status then. Errors: it stays to be handed over.
    pub async fn hand_over(&self, fs: &FileSystem, path: &AbsPath) -> Result<Option<FileStatus>> {
        let mut inner = self.inner.lock().await;
        if !self.is_dirty() {
            return Ok(None);
        }
        let mut status = match self.send_rest(&mut inner, fs, path).await {
            // What was on its way may have failed for reasons of its own; all bytes are here.
            Err(e) if e.kind() != forebay_common::ErrorKind::FileChanged => {
                tracing::info!(error = %e, %path, "a file is sent again, as a whole");
                self.send_rest(&mut inner, fs, path).await?
            }
            other => other?,
        };
        self.dirty.store(false, Ordering::SeqCst);
        inner.written = Extents::default();
        let again = std::mem::take(&mut inner.made_again) && self.is_new();
        self.complete.store(true, Ordering::SeqCst);
        *self.version_lock() = Some(Version::of(&status));
        HANDED_OVER.inc();
        let later = if again { inner.own.clone().with(inner.later.clone()) } else { inner.later.clone() };
        if !later.is_empty() {
            match fs.set_attributes(path, later.request()).await {
                Ok(with) => {
                    status = with;
                    inner.later = Attributes::default();
                }
                Err(e) => tracing::warn!(error = %e, %path, "the bytes of a file were handed over, its time or owner were not set"),
            }
        }
        Ok(Some(status))
    }

    /// What has not been sent, and the end.
    async fn send_rest(&self, inner: &mut Inner, fs: &FileSystem, path: &AbsPath) -> Result<FileStatus> {
        let length = self.length();
        let mut at = std::mem::take(&mut inner.sent);
        let mut writer = match inner.writer.take() {
            Some(writer) => writer,
            None => {
                at = 0;
                inner.made_again |= self.is_new();
                let base = self.base();
                let only_content = base.filter(|_| self.is_locked()).map(|base| base.content);
                let only_file = base.map_or(0, |base| base.file_id);
                fs.create(path, &CreateOptions { replace: true, only_file, only_content, ..CreateOptions::default() }).await?
            }
        };
        let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(length - at).unwrap_or(PIECE_BYTES))];
        while at < length {
            let some = piece.len().min(usize::try_from(length - at).unwrap_or(piece.len()));
            blocking(|| self.file.read_exact_at(&mut piece[..some], at))?;
            if let Err(e) = writer.write(&piece[..some]).await {
                writer.abort().await;
                return Err(e);
            }
            at += some as u64;
        }
        let modified = self.times().map_or(Time { ms: 0, ns: 0 }, |(modified, _)| modified);
        writer.close_as_of(modified.ms, modified.ns).await
    }

    /// The name that is held for it is let go: it is made again when it is handed over.
    pub async fn let_name_go(&self) {
        give_up(&mut *self.inner.lock().await).await;
    }

    /// Nobody wants it any more.
    pub async fn forget(&self) {
        self.dirty.store(false, Ordering::SeqCst);
        self.let_name_go().await;
    }
}

/// Passes bytes on that follow what was sent. One that fails is not told to whoever wrote: the file is sent as a whole later.
async fn send(inner: &mut Inner, bytes: &[u8]) {
    let Some(writer) = &mut inner.writer else { return };
    match writer.write(bytes).await {
        Ok(()) => inner.sent += bytes.len() as u64,
        Err(e) => {
            tracing::debug!(error = %e, "a file is sent again as a whole when it is closed");
            give_up(inner).await;
        }
    }
}

async fn give_up(inner: &mut Inner) {
    inner.sent = 0;
    if let Some(writer) = inner.writer.take() {
        SENT_AGAIN.inc();
        inner.made_again = true;
        writer.abort().await;
    }
}
