//! `file://`: a folder of this machine, reached so that no name and no symbolic link can lead out of it.
//!
//! Every path is opened with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)` from a descriptor of the root: a link inside
//! the folder is not followed either, because it would pass by folders whose mode forbids it. What is read is the descriptor
//! that was checked. A read compares the fingerprint of the open file before and after.
//! A write goes to a temporary name beside its target, is fsynced, renamed over it, and its folder fsynced.

use crate::fingerprint;
use crate::requests::{Request, Requests};
use crate::store::{LIST_PAGE_ENTRIES, Page, UfsEntry};
use bytes::{Bytes, BytesMut};
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{Error, ErrorKind, Result, err};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Group, Uid, UnlinkatFlags, User, unlinkat};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};

/// Names of writes in progress begin with this; they are never shown.
const TEMPORARY_PREFIX: &str = ".forebay-tmp-";

pub struct LocalStore {
    root: Arc<OwnedFd>,
    names: Arc<Names>,
    requests: Arc<Requests>,
}

/// User and group names of ids, remembered: looking one up reads /etc/passwd.
#[derive(Default)]
struct Names {
    users: Mutex<HashMap<u32, String>>,
    groups: Mutex<HashMap<u32, String>>,
}

impl Names {
    fn user(&self, id: u32) -> String {
        let mut users = self.users.lock().unwrap_or_else(|e| e.into_inner());
        users.entry(id).or_insert_with(|| User::from_uid(Uid::from_raw(id)).ok().flatten().map_or_else(|| id.to_string(), |u| u.name)).clone()
    }

    fn group(&self, id: u32) -> String {
        let mut groups = self.groups.lock().unwrap_or_else(|e| e.into_inner());
        groups.entry(id).or_insert_with(|| Group::from_gid(Gid::from_raw(id)).ok().flatten().map_or_else(|| id.to_string(), |g| g.name)).clone()
    }

    fn entry(&self, name: &[u8], m: &Metadata) -> UfsEntry {
        let modified_ms = u64::try_from(m.mtime()).unwrap_or(0) * 1000 + u64::try_from(m.mtime_nsec()).unwrap_or(0) / 1_000_000;
        UfsEntry {
            name: name.to_vec(),
            folder: m.is_dir(),
            length: if m.is_file() { m.len() } else { 0 },
            modified_ms,
            fingerprint: if m.is_file() { fingerprint::of_file(m) } else { String::new() },
            owner: self.user(m.uid()),
            group: self.group(m.gid()),
            mode: m.mode() & 0o7777,
        }
    }
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

fn split(key: &[u8]) -> (&[u8], &[u8]) {
    match key.iter().rposition(|b| *b == b'/') {
        Some(i) => (&key[..i], &key[i + 1..]),
        None => (b"", key),
    }
}

/// Opens `key` below `root`, never outside it.
fn beneath(root: &OwnedFd, key: &[u8], flags: OFlag) -> Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let path: &[u8] = if key.is_empty() { b"." } else { key };
    openat2(root.as_fd(), os(path), how).map_err(|errno| match errno {
        nix::errno::Errno::EXDEV | nix::errno::Errno::ELOOP => err!(PermissionDenied, "symbolic links are not followed in a file:// mount"),
        errno => failed("opening", errno),
    })
}

/// What a system call said. What may pass (a disk that errs, too many open files, a stale handle) is an error of the store and
/// may be tried again; anything unknown is a refusal, so that nobody repeats for ever what can never be done.
fn failed(doing: impl std::fmt::Display, errno: nix::errno::Errno) -> Error {
    use nix::errno::Errno::*;
    let source = std::io::Error::from(errno);
    match errno {
        EIO | EMFILE | ENFILE | ENOMEM | ENOBUFS | EAGAIN | EINTR | EBUSY | ESTALE | ENOTCONN | ETIMEDOUT | EHOSTDOWN | EHOSTUNREACH | ETXTBSY => {
            err!(UnderStore, "{doing}: {source}")
        }
        EXDEV => err!(Unsupported, "{doing}: source and target are on different file systems of the machine below: copy, then delete"),
        _ => match Error::io(doing, &source) {
            e if e.kind() == ErrorKind::Internal => err!(Unsupported, "{}", e.message()),
            e => e,
        },
    }
}

/// `at` of `forebay_common::error`, for a store: see `failed`.
fn at(doing: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Error {
    move |e| match e.raw_os_error() {
        Some(errno) => failed(doing, nix::errno::Errno::from_raw(errno)),
        None => Error::io(doing, &e),
    }
}

fn metadata(root: &OwnedFd, key: &[u8]) -> Result<Metadata> {
    File::from(beneath(root, key, OFlag::O_PATH)?).metadata().map_err(at("stat"))
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(|e| err!(Internal, "file store task: {e}"))?
}

impl LocalStore {
    pub fn open(root: &str, options: &BTreeMap<String, String>, requests: Arc<Requests>) -> Result<Self> {
        if let Some(name) = options.keys().next() {
            return Err(err!(InvalidArgument, "file:// takes no option {name}"));
        }
        let root = nix::fcntl::open(root, OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| failed(format!("folder {root}"), e))?;
        Ok(LocalStore { root: Arc::new(root), names: Arc::default(), requests })
    }

    pub async fn stat(&self, key: &[u8]) -> Result<UfsEntry> {
        self.requests.count(Request::Stat);
        let (root, names, key) = (self.root.clone(), self.names.clone(), key.to_vec());
        blocking(move || {
            let m = metadata(&root, &key)?;
            if !m.is_file() && !m.is_dir() {
                return Err(err!(NotFound, "neither a file nor a folder"));
            }
            Ok(names.entry(split(&key).1, &m))
        })
        .await
    }

    pub fn lister(&self, key: &[u8]) -> LocalLister {
        LocalLister { root: self.root.clone(), names: self.names.clone(), requests: self.requests.clone(), key: key.to_vec(), at: At::Start }
    }

    pub async fn read(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        self.requests.count(Request::Read);
        let (root, key, expected) = (self.root.clone(), key.to_vec(), expected.to_owned());
        blocking(move || read(&root, &key, offset, length, &expected)).await
    }

    /// `read` on the caller's own thread.
    pub fn read_blocking(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        self.requests.count(Request::Read);
        read(&self.root, key, offset, length, expected)
    }

    pub async fn writer(&self, key: &[u8]) -> Result<LocalWriter> {
        self.requests.count(Request::Write);
        let (root, names, key) = (self.root.clone(), self.names.clone(), key.to_vec());
        blocking(move || {
            let (parent, name) = split(&key);
            if name.is_empty() {
                return Err(err!(IsADirectory, "a folder cannot be written"));
            }
            // In the nearest folder that exists: those of the target are made when it is published.
            let mut at = parent;
            let dir = loop {
                match beneath(&root, at, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
                    Err(e) if e.kind() == ErrorKind::NotFound && !at.is_empty() => at = split(at).0,
                    dir => break dir?,
                }
            };
            let (temporary, file) = make_temporary(&dir)?;
            Ok(LocalWriter { state: Some(WriterState { root, parent: parent.to_vec(), dir, temporary, name: name.to_vec(), file }), names })
        })
        .await
    }

    /// A temporary file of that length beside the target; its name is what the pieces are handed in under.
    pub async fn begin_pieces(&self, key: &[u8], length: u64) -> Result<String> {
        self.requests.count(Request::Write);
        let (root, key) = (self.root.clone(), key.to_vec());
        blocking(move || {
            let (parent, name) = split(&key);
            if name.is_empty() {
                return Err(err!(IsADirectory, "a folder cannot be written"));
            }
            make_folders(&root, parent)?;
            let dir = beneath(&root, parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
            let (temporary, file) = make_temporary(&dir)?;
            file.set_len(length).and_then(|()| file.sync_all()).map_err(at("a temporary file"))?;
            sync(&dir)?;
            Ok(temporary)
        })
        .await
    }

    fn open_temporary(root: &OwnedFd, key: &[u8], upload: &str) -> Result<(OwnedFd, File)> {
        if !upload.starts_with(TEMPORARY_PREFIX) || upload.contains('/') {
            return Err(err!(InvalidArgument, "{upload:?} is no file in progress"));
        }
        let dir = beneath(root, split(key).0, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        let file = beneath(&dir, upload.as_bytes(), OFlag::O_WRONLY).map_err(|e| match e.kind() {
            ErrorKind::NotFound => err!(NotFound, "the file in progress is not here: is this folder the same on every worker?"),
            _ => e,
        })?;
        Ok((dir, File::from(file)))
    }

    pub async fn piece(&self, key: &[u8], upload: &str, offset: u64) -> Result<LocalPiece> {
        let (root, key, upload) = (self.root.clone(), key.to_vec(), upload.to_owned());
        let file = blocking(move || Self::open_temporary(&root, &key, &upload).map(|(_, file)| file)).await?;
        Ok(LocalPiece { file: Arc::new(file), at: offset })
    }

    pub async fn complete_pieces(&self, key: &[u8], upload: &str, length: u64) -> Result<UfsEntry> {
        self.requests.count(Request::Rename);
        let (root, names, key, upload) = (self.root.clone(), self.names.clone(), key.to_vec(), upload.to_owned());
        blocking(move || {
            let (dir, file) = Self::open_temporary(&root, &key, &upload)?;
            let there = file.metadata().map_err(at("stat"))?.len();
            if there != length {
                return Err(err!(UnderStore, "the pieces have {there} bytes together instead of {length}"));
            }
            file.sync_all().map_err(at("fsync"))?;
            let name = split(&key).1;
            nix::fcntl::renameat(dir.as_fd(), upload.as_str(), dir.as_fd(), os(name)).map_err(|e| failed("publishing", e))?;
            sync(&dir)?;
            Ok(names.entry(name, &file.metadata().map_err(at("stat"))?))
        })
        .await
    }

    pub async fn abort_pieces(&self, key: &[u8], upload: &str) -> Result<()> {
        let (root, key, upload) = (self.root.clone(), key.to_vec(), upload.to_owned());
        blocking(move || {
            let (dir, _) = Self::open_temporary(&root, &key, &upload)?;
            unlink(&dir, upload.as_bytes(), UnlinkatFlags::NoRemoveDir)
        })
        .await
    }

    pub async fn mkdir(&self, key: &[u8]) -> Result<()> {
        self.requests.count(Request::Mkdir);
        let (root, key) = (self.root.clone(), key.to_vec());
        blocking(move || make_folders(&root, &key)).await
    }

    pub async fn delete(&self, key: &[u8], folder: bool) -> Result<()> {
        self.requests.count(Request::Delete);
        let (root, key) = (self.root.clone(), key.to_vec());
        blocking(move || {
            let (parent, name) = split(&key);
            if name.is_empty() {
                return Err(err!(InvalidArgument, "the root of a mount cannot be deleted"));
            }
            let dir = match beneath(&root, parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
                other => other?,
            };
            if folder {
                remove_tree(&dir, name)?
            } else {
                unlink(&dir, name, UnlinkatFlags::NoRemoveDir)?
            }
            sync(&dir)
        })
        .await
    }

    pub async fn rename(&self, source: &[u8], target: &[u8]) -> Result<()> {
        self.requests.count(Request::Rename);
        let (root, source, target) = (self.root.clone(), source.to_vec(), target.to_vec());
        blocking(move || {
            let ((from, from_name), (to, to_name)) = (split(&source), split(&target));
            make_folders(&root, to)?;
            let to = beneath(&root, to, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
            let from = beneath(&root, from, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
            match nix::fcntl::renameat(from.as_fd(), os(from_name), to.as_fd(), os(to_name)) {
                Ok(()) => {}
                // A repetition after a crash: the first time has done it.
                Err(e @ nix::errno::Errno::ENOENT) => match (metadata(&root, &source), metadata(&root, &target)) {
                    (Err(gone), Ok(_)) if gone.kind() == ErrorKind::NotFound => {}
                    (Err(gone), Err(none)) if gone.kind() == ErrorKind::NotFound && none.kind() == ErrorKind::NotFound => {
                        return Err(failed("renaming", e));
                    }
                    // What cannot be looked at now decides nothing.
                    _ => return Err(err!(UnderStore, "renaming: source or target went away meanwhile")),
                },
                Err(e) => return Err(failed("renaming", e)),
            }
            sync(&to)?;
            sync(&from)
        })
        .await
    }
}

fn make_temporary(dir: &OwnedFd) -> Result<(String, File)> {
    let temporary = format!("{TEMPORARY_PREFIX}{:016x}", rand::random::<u64>());
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let made = nix::fcntl::openat(dir.as_fd(), temporary.as_str(), flags, Mode::from_bits_truncate(0o644));
    made.map(|fd| (temporary, File::from(fd))).map_err(|e| failed("making a temporary file", e))
}

fn read(root: &OwnedFd, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
    let file = File::from(beneath(root, key, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
    let changed = |m: Metadata| {
        let now = fingerprint::of_file(&m);
        if now == expected {
            Ok(())
        } else {
            Err(err!(FileChanged, "the file is another version ({now}) than the one opened ({expected}): open it again"))
        }
    };
    changed(file.metadata().map_err(at("stat"))?)?;
    let mut out = BytesMut::zeroed(length);
    file.read_exact_at(&mut out, offset).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => err!(FileChanged, "the file is shorter than when it was opened: open it again"),
        _ => err!(UnderStore, "{e}"),
    })?;
    changed(file.metadata().map_err(at("stat"))?)?;
    Ok(out.freeze())
}

fn sync(dir: &OwnedFd) -> Result<()> {
    nix::unistd::fsync(dir.as_fd()).map_err(|e| failed("fsync of a folder", e))
}

fn unlink(dir: &OwnedFd, name: &[u8], how: UnlinkatFlags) -> Result<()> {
    match unlinkat(dir.as_fd(), os(name), how) {
        Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(e) => Err(failed("unlinking", e)),
    }
}

/// Removes a folder and all below it without following any link.
fn remove_tree(parent: &OwnedFd, name: &[u8]) -> Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = match nix::fcntl::openat(parent.as_fd(), os(name), flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(nix::errno::Errno::ENOENT) => return Ok(()),
        Err(nix::errno::Errno::ENOTDIR | nix::errno::Errno::ELOOP) => return unlink(parent, name, UnlinkatFlags::NoRemoveDir),
        Err(e) => return Err(failed("opening folder", e)),
    };
    let again = fd.try_clone().map_err(at("folder"))?;
    let mut dir = nix::dir::Dir::from_fd(fd).map_err(|e| failed("opening folder", e))?;
    let names: Vec<Vec<u8>> =
        dir.iter().map(|e| e.map(|e| e.file_name().to_bytes().to_vec())).collect::<nix::Result<_>>().map_err(|e| failed("reading folder", e))?;
    for child in names.iter().filter(|n| *n != b"." && *n != b"..") {
        remove_tree(&again, child)?;
    }
    unlink(parent, name, UnlinkatFlags::RemoveDir)
}

fn make_folders(root: &OwnedFd, key: &[u8]) -> Result<()> {
    if key.is_empty() || beneath(root, key, OFlag::O_DIRECTORY | OFlag::O_PATH).is_ok() {
        return Ok(());
    }
    let (parent, name) = split(key);
    make_folders(root, parent)?;
    let dir = beneath(root, parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
    match nix::sys::stat::mkdirat(dir.as_fd(), os(name), Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
        Err(e) => return Err(failed("making a folder", e)),
    }
    sync(&dir)?;
    beneath(root, key, OFlag::O_DIRECTORY | OFlag::O_PATH).map(drop)
}

/// One folder being listed.
pub struct LocalLister {
    root: Arc<OwnedFd>,
    names: Arc<Names>,
    requests: Arc<Requests>,
    key: Vec<u8>,
    at: At,
}

enum At {
    Start,
    Open(nix::dir::OwningIter),
    End,
}

impl LocalLister {
    pub async fn next(&mut self) -> Result<Option<Page>> {
        let at = match std::mem::replace(&mut self.at, At::End) {
            At::End => return Ok(None),
            at => at,
        };
        self.requests.count(Request::List);
        let (root, names, key) = (self.root.clone(), self.names.clone(), self.key.clone());
        let (page, at) = blocking(move || page(&root, &names, &key, at)).await?;
        self.at = at;
        Ok(Some(page))
    }
}

fn page(root: &OwnedFd, names: &Names, key: &[u8], at: At) -> Result<(Page, At)> {
    let mut page = Page::default();
    let mut open = match at {
        At::Open(open) => open,
        At::Start => match beneath(root, key, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok((page, At::End)),
            dir => nix::dir::Dir::from_fd(dir?).map_err(|e| failed("opening folder", e))?.into_iter(),
        },
        At::End => return Ok((page, At::End)),
    };
    while page.entries.len() < LIST_PAGE_ENTRIES {
        let Some(next) = open.next() else { return Ok((page, At::End)) };
        let name = next.map_err(|e| failed("reading folder", e))?.file_name().to_bytes().to_vec();
        if name == b"." || name == b".." || name.starts_with(TEMPORARY_PREFIX.as_bytes()) {
            continue;
        }
        let full = if key.is_empty() { name.clone() } else { [key, b"/", &name].concat() };
        match metadata(root, &full) {
            Ok(m) if (m.is_file() || m.is_dir()) && name.len() <= NAME_MAX_BYTES => page.entries.push(names.entry(&name, &m)),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            // A name that could not be looked at is not a name that is gone.
            Err(e) if e.is_retryable() => {
                tracing::warn!(error = %e, name = %String::from_utf8_lossy(&name), "a name that cannot be looked at now");
                page.unknown.push(name);
            }
            _ => page.unshown += 1,
        }
    }
    Ok((page, At::Open(open)))
}

/// A range of a file in progress.
pub struct LocalPiece {
    file: Arc<File>,
    at: u64,
}

impl LocalPiece {
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let (file, offset) = (self.file.clone(), self.at);
        self.at += bytes.len() as u64;
        blocking(move || file.write_all_at(&bytes, offset).map_err(at("writing"))).await
    }

    pub async fn finish(self) -> Result<()> {
        blocking(move || self.file.sync_all().map_err(at("fsync"))).await
    }
}

struct WriterState {
    root: Arc<OwnedFd>,
    /// The folder of the target.
    parent: Vec<u8>,
    /// The folder of the temporary file.
    dir: OwnedFd,
    temporary: String,
    name: Vec<u8>,
    file: File,
}

/// A file being written under a temporary name; removed when dropped unclosed.
pub struct LocalWriter {
    state: Option<WriterState>,
    names: Arc<Names>,
}

impl LocalWriter {
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let state = self.state.take().ok_or_else(|| err!(Internal, "write after a failed write"))?;
        let (state, result) = tokio::task::spawn_blocking(move || {
            let result = (&state.file).write_all(&bytes).map_err(at("writing"));
            (state, result)
        })
        .await
        .map_err(|e| err!(Internal, "file store task: {e}"))?;
        self.state = Some(state);
        result
    }

    /// Has the bytes durable under the temporary name, so that publishing is a rename.
    pub async fn settle(&mut self) -> Result<()> {
        let state = self.state.as_ref().ok_or_else(|| err!(Internal, "settle after a failed write"))?;
        let file = state.file.try_clone().map_err(at("file"))?;
        blocking(move || file.sync_all().map_err(at("fsync"))).await
    }

    pub async fn close(&mut self) -> Result<UfsEntry> {
        let state = self.state.take().ok_or_else(|| err!(Internal, "close after a failed write"))?;
        let names = self.names.clone();
        blocking(move || {
            let published = state.publish();
            if published.is_err() {
                state.discard();
            }
            let m = published?;
            Ok(names.entry(&state.name, &m))
        })
        .await
    }

    pub async fn abort(mut self) {
        if let Some(state) = self.state.take() {
            let _ = tokio::task::spawn_blocking(move || state.discard()).await;
        }
    }
}

impl Drop for LocalWriter {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            state.discard();
        }
    }
}

impl WriterState {
    fn publish(&self) -> Result<Metadata> {
        self.file.sync_all().map_err(at("fsync"))?;
        make_folders(&self.root, &self.parent)?;
        let to = beneath(&self.root, &self.parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        nix::fcntl::renameat(self.dir.as_fd(), self.temporary.as_str(), to.as_fd(), os(&self.name)).map_err(|e| failed("publishing", e))?;
        sync(&to)?;
        self.file.metadata().map_err(at("stat"))
    }

    fn discard(&self) {
        if let Err(e) = unlink(&self.dir, self.temporary.as_bytes(), UnlinkatFlags::NoRemoveDir) {
            tracing::warn!(error = %e, name = self.temporary, "a temporary file stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &std::path::Path) -> LocalStore {
        LocalStore::open(dir.to_str().unwrap(), &BTreeMap::new(), Arc::default()).unwrap()
    }

    #[tokio::test]
    async fn no_link_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
        std::os::unix::fs::symlink("../../../etc/passwd", dir.path().join("up")).unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        std::os::unix::fs::symlink("in", dir.path().join("within")).unwrap();
        let store = open(dir.path());
        std::fs::write(dir.path().join("in/f"), "f").unwrap();
        for key in ["out/secret", "up", "out", "within", "within/f"] {
            assert_eq!(store.stat(key.as_bytes()).await.unwrap_err().kind(), ErrorKind::PermissionDenied, "{key}");
            assert!(store.read(key.as_bytes(), 0, 1, "").await.is_err());
        }
        assert!(store.writer(b"out/new").await.is_err());
        assert!(store.delete(b"out/secret", false).await.is_err());
        assert!(store.rename(b"in", b"out/in").await.is_err());
        let listing = store.lister(b"").next().await.unwrap().unwrap();
        assert_eq!(listing.unshown, 3);
        assert_eq!(listing.entries.len(), 1);
        assert!(store.delete(b"out", true).await.is_ok());
        assert!(outside.path().join("secret").exists());
    }

    #[tokio::test]
    async fn write_publishes_at_close_and_a_read_names_its_version() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut w = store.writer(b"a/b/f").await.unwrap();
        w.write(Bytes::from_static(b"hello")).await.unwrap();
        assert!(store.stat(b"a/b/f").await.is_err());
        assert!(store.lister(b"a/b").next().await.unwrap().unwrap().entries.is_empty());
        let entry = w.close().await.unwrap();
        assert_eq!(store.stat(b"a/b/f").await.unwrap(), entry);
        assert_eq!(&store.read(b"a/b/f", 1, 3, &entry.fingerprint).await.unwrap()[..], b"ell");
        assert_eq!(store.read(b"a/b/f", 1, 30, &entry.fingerprint).await.unwrap_err().kind(), ErrorKind::FileChanged);
        std::fs::write(dir.path().join("a/b/f"), "HELLO").unwrap();
        assert_eq!(store.read(b"a/b/f", 1, 3, &entry.fingerprint).await.unwrap_err().kind(), ErrorKind::FileChanged);
        drop(store.writer(b"a/b/g").await.unwrap());
        assert_eq!(std::fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        store.rename(b"a/b/f", b"c/f").await.unwrap();
        store.rename(b"a/b/f", b"c/f").await.unwrap();
        store.delete(b"c", true).await.unwrap();
        assert_eq!(store.stat(b"c/f").await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
