//! `Disk`: a file system in memory, mounted by FUSE, whose power can be cut: what was not fsynced is then lost in part.
//!
//! After a cut each 4 KiB page of a file holds what it held at the file's last fsync or anything written since, at random, and
//! so does its length; each name in a folder is as it was at the folder's last fsync, or as it was at the end. Nothing more is
//! promised by POSIX, and some file systems keep no more. It can also be slowed down, to stand for an SSD or an HDD.

use fuser::*;
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PAGE: usize = 4096;
/// What the disk says it can hold.
const SIZE_BYTES: u64 = 4 << 30;

type Names = BTreeMap<OsString, u64>;

#[derive(Clone, Default)]
struct Node {
    folder: bool,
    mode: u16,
    bytes: Vec<u8>,
    synced_bytes: Vec<u8>,
    names: Names,
    synced_names: Names,
}

struct State {
    nodes: HashMap<u64, Node>,
    next: u64,
    /// Time that each read and write takes, beside that of its bytes.
    latency: Duration,
    bytes_per_second: u64,
}

/// The disk; what it holds survives its being unmounted.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

/// A mounted disk. Unmounted when dropped, with what is mounted below it.
pub struct Mounted {
    session: Option<BackgroundSession>,
    at: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
        for below in points.filter(|point| point.starts_with(&self.at) && *point != self.at) {
            let _ = nix::mount::umount2(below, nix::mount::MntFlags::MNT_DETACH);
        }
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

impl Default for Disk {
    fn default() -> Self {
        let root = Node { folder: true, mode: 0o755, ..Node::default() };
        let nodes = HashMap::from([(1, root)]);
        Disk(Arc::new(Mutex::new(State { nodes, next: 2, latency: Duration::ZERO, bytes_per_second: 0 })))
    }
}

/// A list of things, some old and some new.
fn mixed(old: &Names, new: &Names, rng: &mut StdRng) -> Names {
    let names: BTreeSet<&OsString> = old.keys().chain(new.keys()).collect();
    let mut out = Names::new();
    for name in names {
        let (was, is) = (old.get(name), new.get(name));
        if let Some(node) = if was == is || rng.random() { is } else { was } {
            out.insert(name.clone(), *node);
        }
    }
    out
}

fn torn(old: &[u8], new: &[u8], rng: &mut StdRng) -> Vec<u8> {
    if old == new {
        return new.to_vec();
    }
    let length = if rng.random() { old.len() } else { new.len() };
    let mut out = vec![0; length];
    for at in (0..length).step_by(PAGE) {
        let from = if rng.random() { old } else { new };
        let end = length.min(at + PAGE).min(from.len());
        if at < end {
            out[at..end].copy_from_slice(&from[at..end]);
        }
    }
    out
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Mounts it.
    pub fn mount(&self, at: &Path) -> Mounted {
        std::fs::create_dir_all(at).expect("mount point");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("forebay-test-disk".into())];
        config.n_threads = Some(4);
        let session = spawn_mount(Layer(self.clone()), at, &config).expect("mounting a FUSE file system");
        Mounted { session: Some(session), at: at.to_owned() }
    }

    /// Slows it down: each read or write takes `latency`, and the time that its bytes take at `bytes_per_second` (0: none).
    pub fn slow_down(&self, latency: Duration, bytes_per_second: u64) {
        let mut state = self.state();
        (state.latency, state.bytes_per_second) = (latency, bytes_per_second);
    }

    /// Cuts the power: to be called while it is not mounted. Returns how many files lost something.
    pub fn cut(&self, rng: &mut StdRng) -> usize {
        let mut state = self.state();
        let mut ids: Vec<u64> = state.nodes.keys().copied().collect();
        // In a fixed order: the same seed tears the same pages.
        ids.sort_unstable();
        let mut torn_files = 0;
        for id in ids {
            let Some(node) = state.nodes.get_mut(&id) else { continue };
            if node.folder {
                node.names = mixed(&node.synced_names, &node.names, rng);
                node.synced_names = node.names.clone();
            } else {
                torn_files += usize::from(node.bytes != node.synced_bytes);
                node.bytes = torn(&node.synced_bytes, &node.bytes, rng);
                node.synced_bytes = node.bytes.clone();
            }
        }
        let mut reached = BTreeSet::from([1]);
        let mut folders = vec![1];
        while let Some(folder) = folders.pop() {
            let below: Vec<u64> = state.nodes.get(&folder).map(|n| n.names.values().copied().collect()).unwrap_or_default();
            for id in below {
                if reached.insert(id) {
                    folders.push(id);
                }
            }
        }
        state.nodes.retain(|id, _| reached.contains(id));
        torn_files
    }
}

struct Layer(Disk);

const TTL: Duration = Duration::from_secs(3600);

fn attributes(id: u64, node: &Node) -> FileAttr {
    FileAttr {
        ino: INodeNo(id),
        size: node.bytes.len() as u64,
        blocks: node.bytes.len().div_ceil(PAGE) as u64 * 8,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if node.folder { FileType::Directory } else { FileType::RegularFile },
        perm: node.mode,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PAGE as u32,
        flags: 0,
    }
}

impl Layer {
    fn take_time(&self, bytes: usize) {
        let time = {
            let state = self.0.state();
            let transfer = if state.bytes_per_second == 0 { 0.0 } else { bytes as f64 / state.bytes_per_second as f64 };
            state.latency + Duration::from_secs_f64(transfer)
        };
        if !time.is_zero() {
            std::thread::sleep(time);
        }
    }

    fn make(&self, parent: INodeNo, name: &OsStr, folder: bool, mode: u32) -> Result<FileAttr, Errno> {
        let mut state = self.0.state();
        let id = state.next;
        let above = state.nodes.get_mut(&parent.0).ok_or(Errno::ENOENT)?;
        if above.names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        above.names.insert(name.to_owned(), id);
        state.next += 1;
        let node = Node { folder, mode: (mode & 0o7777) as u16, ..Node::default() };
        let attr = attributes(id, &node);
        state.nodes.insert(id, node);
        Ok(attr)
    }

    fn take_name(&self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        // The node stays: somebody may have it open, and its name may come back with a cut.
        let mut state = self.0.state();
        state.nodes.get_mut(&parent.0).and_then(|n| n.names.remove(name)).map(drop).ok_or(Errno::ENOENT)
    }

    fn with<T>(&self, id: INodeNo, f: impl FnOnce(&mut Node) -> T) -> Result<T, Errno> {
        self.0.state().nodes.get_mut(&id.0).map(f).ok_or(Errno::ENOENT)
    }
}

fn done(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Layer {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.0.state();
        let found = state.nodes.get(&parent.0).and_then(|n| n.names.get(name)).and_then(|id| Some((*id, state.nodes.get(id)?)));
        match found {
            Some((id, node)) => reply.entry(&TTL, &attributes(id, node), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, id: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(id, |node| attributes(id.0, node)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        id: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.with(id, |node| {
            if let Some(size) = size {
                node.bytes.resize(size as usize, 0);
            }
            if let Some(mode) = mode {
                node.mode = (mode & 0o7777) as u16;
            }
            attributes(id.0, node)
        });
        match changed {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        match self.make(parent, name, true, mode) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.make(parent, name, false, mode) {
            Ok(attr) => reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::empty()),
            Err(e) => reply.error(e),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.take_name(parent, name), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let empty = {
            let state = self.0.state();
            let id = state.nodes.get(&parent.0).and_then(|n| n.names.get(name));
            id.and_then(|id| state.nodes.get(id)).is_none_or(|n| n.names.is_empty())
        };
        done(if empty { self.take_name(parent, name) } else { Err(Errno::ENOTEMPTY) }, reply);
    }

    fn rename(&self, _: &Request, parent: INodeNo, name: &OsStr, to: INodeNo, to_name: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        let mut state = self.0.state();
        let moved = state.nodes.get_mut(&parent.0).and_then(|n| n.names.remove(name));
        let above = state.nodes.get_mut(&to.0);
        match (moved, above) {
            (Some(id), Some(above)) => {
                above.names.insert(to_name.to_owned(), id);
                drop(state);
                reply.ok();
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn read(&self, _: &Request, id: INodeNo, _: FileHandle, offset: u64, size: u32, _: OpenFlags, _: Option<LockOwner>, reply: ReplyData) {
        self.take_time(size as usize);
        let read = self.with(id, |node| {
            let from = (offset as usize).min(node.bytes.len());
            node.bytes[from..(from + size as usize).min(node.bytes.len())].to_vec()
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _: &Request,
        id: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.take_time(data.len());
        let written = self.with(id, |node| {
            let (from, end) = (offset as usize, offset as usize + data.len());
            if node.bytes.len() < end {
                node.bytes.resize(end, 0);
            }
            node.bytes[from..end].copy_from_slice(data);
        });
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(e),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, id: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.with(id, |node| node.synced_bytes = node.bytes.clone()), reply);
    }

    fn fsyncdir(&self, _: &Request, id: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.with(id, |node| node.synced_names = node.names.clone()), reply);
    }

    fn readdir(&self, _: &Request, id: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.0.state();
        let Some(node) = state.nodes.get(&id.0) else { return reply.error(Errno::ENOENT) };
        let dots = [(OsString::from("."), id.0), (OsString::from(".."), 1)];
        let all = dots.iter().map(|(n, i)| (n, *i)).chain(node.names.iter().map(|(n, i)| (n, *i)));
        for (place, (name, child)) in all.enumerate().skip(offset as usize) {
            let folder = state.nodes.get(&child).is_some_and(|n| n.folder);
            let kind = if folder { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(child), place as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let used: usize = self.0.state().nodes.values().map(|n| n.bytes.len()).sum();
        let (all, free) = (SIZE_BYTES / PAGE as u64, (SIZE_BYTES - used as u64) / PAGE as u64);
        reply.statfs(all, free, free, 1 << 20, 1 << 20, PAGE as u32, 255, PAGE as u32);
    }
}
