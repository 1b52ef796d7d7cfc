//! What the kernel knows by number: nodes, where each is, how often it was handed out.
//!
//! A node is one folder at one place, or one file under all of its names that the kernel knows. Its number is the file's own id where that is free; a file that has another content than the one
//! which is open under that number, or is open in a way that the kernel does not let it be mixed with, gets a number of its own (the id with a count above bit 53, where no master's numbers are).
//! Invariants: a name leads to one node at most; a node lives until the kernel has given back every lookup; what was deleted or replaced
//! leads nowhere any more, and stays usable for whoever has it open.

use crate::attributes::Version;
use crate::device::Backing;
use crate::staged::Staged;
use forebay_common::{AbsPath, Result, err, gauge};
use forebay_proto::FileStatus;
use forebay_proto::mount as wire;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

gauge!(pub NODES, "forebay_fuse_nodes", "files and folders that the kernel knows by number");

pub const ROOT: u64 = 1;
/// Entries of the order beside those of nodes that are there, before these are sorted out.
const ORDER_SLACK: usize = 1_024;
/// Tables with room for fewer are not made smaller.
const TABLES_LEAST: usize = 16_384;
/// Where the count of a number begins.
const COUNT_BIT: u32 = 53;

/// How a node is open. Guarded by a lock that is held over calls: one opening, handing over or cutting at a time.
#[derive(Default)]
pub struct Opened {
    /// Handles of any kind.
    pub handles: u32,
    /// Handles that read through the kernel's page cache, not those of `staged`.
    pub readers: u32,
    /// What they, or those that read the backing file, read.
    pub version: Version,
    /// The kernel reads the block's file itself.
    pub backing: Option<Arc<Backing>>,
    pub staged: Option<Arc<Staged>>,
    /// What the page cache holds bytes of, where that is known.
    pub cached: Option<Version>,
    /// Under which name a file that was deleted while it was read is kept until its last handle is closed.
    pub hidden: Option<AbsPath>,
}

/// What of `Opened` a lookup needs, without waiting for its lock.
#[derive(Clone, Default)]
pub enum Use {
    #[default]
    Free,
    Reads(Version),
    Staged(Arc<Staged>),
}

pub struct Node {
    pub id: u64,
    pub folder: bool,
    status: Mutex<FileStatus>,
    pub opened: tokio::sync::Mutex<Opened>,
    in_use: Mutex<Use>,
    gone: AtomicBool,
    /// Since it was last looked at for who may be forgotten.
    used: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A status to be kept: its bytes are slices of the whole answer that they came in, 8 KiB of memory for each node otherwise.
fn own(status: FileStatus) -> FileStatus {
    let (path, target) = (bytes::Bytes::copy_from_slice(&status.path), bytes::Bytes::copy_from_slice(&status.target));
    FileStatus { path, target, ..status }
}

impl Node {
    fn new(id: u64, status: &FileStatus) -> Arc<Node> {
        NODES.inc();
        Arc::new(Node {
            id,
            folder: status.folder,
            status: Mutex::new(own(status.clone())),
            opened: tokio::sync::Mutex::default(),
            in_use: Mutex::default(),
            gone: AtomicBool::new(false),
            used: AtomicBool::new(true),
        })
    }

    /// What was last known of it; of a file that is being written here, as it stands here.
    pub fn status(&self) -> FileStatus {
        let mut status = lock(&self.status).clone();
        if let Use::Staged(staged) = self.in_use() {
            status.length = staged.length();
            if let Some((modified, changed)) = staged.times() {
                (status.modified_ms, status.modified_ns, status.changed_ms) = (modified.ms, modified.ns, changed.ms);
            }
        }
        status
    }

    pub fn set_status(&self, status: FileStatus) {
        *lock(&self.status) = own(status);
    }

    pub fn in_use(&self) -> Use {
        lock(&self.in_use).clone()
    }

    /// What is being written of it, or was and is still here.
    pub fn staged(&self) -> Option<Arc<Staged>> {
        match self.in_use() {
            Use::Staged(staged) => Some(staged),
            _ => None,
        }
    }

    /// Called with `opened` locked, after a change of it.
    pub fn note_use(&self, opened: &Opened) {
        self.used.store(true, Ordering::Relaxed);
        *lock(&self.in_use) = match &opened.staged {
            Some(staged) => Use::Staged(staged.clone()),
            None if opened.readers > 0 || opened.backing.is_some() => Use::Reads(opened.version),
            None => Use::Free,
        };
    }

    /// Deleted, or replaced by something else.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    /// Whether nobody has it open. One that is being opened or closed is not.
    fn is_idle(&self) -> bool {
        let idle = |opened: &Opened| opened.handles == 0 && opened.staged.is_none() && opened.backing.is_none() && opened.hidden.is_none();
        self.opened.try_lock().is_ok_and(|opened| idle(&opened))
    }

    /// Whether what the namespace shows now may be shown under this number.
    fn stands_for(&self, status: &FileStatus) -> bool {
        if self.is_gone() || self.folder != status.folder || lock(&self.status).kind != status.kind {
            return false;
        }
        match self.in_use() {
            // A copy that nobody writes is that of one content.
            Use::Staged(staged) => staged.settled().is_none_or(|version| version == Version::of(status)),
            Use::Reads(version) => version == Version::of(status),
            Use::Free => self.folder || lock(&self.status).file_id == status.file_id,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        NODES.dec();
    }
}

struct Place {
    node: Arc<Node>,
    /// Folder and name; never none. What is gone keeps its last one, which leads elsewhere or nowhere.
    names: Vec<(u64, Vec<u8>)>,
    lookups: u64,
    /// That of its entry in `Inner::order`.
    turn: u64,
}

/// A node that another process had, with what belongs to it.
pub struct Saved {
    pub node: wire::Node,
    pub backing: Option<Arc<Backing>>,
    pub staged: Option<Arc<Staged>>,
}

#[derive(Default)]
struct Inner {
    places: HashMap<u64, Place>,
    names: HashMap<(u64, Vec<u8>), u64>,
    /// Files of several names: the node of each file's id.
    shared: HashMap<u64, u64>,
    /// Nodes by when they were looked at last for who may be forgotten, each with its turn; entries of others are of nodes that were given back.
    order: VecDeque<(u64, u64)>,
    turns: u64,
}

impl Inner {
    /// A new node, and its place in the order.
    fn enter(&mut self, id: u64, node: Arc<Node>, names: Vec<(u64, Vec<u8>)>, lookups: u64) {
        self.turns += 1;
        self.places.insert(id, Place { node, names, lookups, turn: self.turns });
        self.order.push_back((id, self.turns));
        if self.order.len() > ORDER_SLACK + 2 * self.places.len() {
            let places = &self.places;
            self.order.retain(|(id, turn)| places.get(id).is_some_and(|place| place.turn == *turn));
        }
    }

    /// Gives the memory of tables back that had many more nodes once.
    fn shrink(&mut self) {
        let room = 2 * self.places.len();
        if self.places.capacity() > TABLES_LEAST && room < self.places.capacity() / 2 {
            self.places.shrink_to(room);
            self.names.shrink_to(room);
            self.shared.shrink_to(room);
            let places = &self.places;
            self.order.retain(|(id, turn)| places.get(id).is_some_and(|place| place.turn == *turn));
            self.order.shrink_to(room);
        }
    }

    /// The names from a folder up to the root; `None` where one of them was given back.
    fn names_to(&self, folder: u64) -> Option<Vec<&[u8]>> {
        let (mut names, mut at) = (Vec::new(), folder);
        while at != ROOT {
            let (parent, name) = &self.places.get(&at)?.names[0];
            names.push(name.as_slice());
            at = *parent;
        }
        Some(names)
    }

    /// Whether a node is another one, or below it.
    fn is_below(&self, id: u64, top: u64) -> bool {
        id == top || self.places.get(&id).is_some_and(|place| id != ROOT && place.names.iter().any(|(parent, _)| self.is_below(*parent, top)))
    }

    /// A name leads to a node, and to none other any more.
    fn take_name(&mut self, parent: u64, name: &[u8], id: u64) {
        let before = self.names.insert((parent, name.to_vec()), id).filter(|before| *before != id);
        if let Some(place) = before.and_then(|before| self.places.get_mut(&before)).filter(|place| place.names.len() > 1) {
            place.names.retain(|(of, other)| *of != parent || other != name);
        }
    }

    fn lead_nowhere(&mut self, names: &[(u64, Vec<u8>)], id: u64) {
        for name in names {
            if self.names.get(name) == Some(&id) {
                self.names.remove(name);
            }
        }
    }
}

pub struct Nodes {
    inner: Mutex<Inner>,
    top: AbsPath,
}

fn stale() -> forebay_common::Error {
    err!(NotFound, "this file is not there any more")
}

impl Nodes {
    /// `top`: the folder of the namespace that is mounted.
    pub fn new(top: AbsPath, status: &FileStatus) -> Nodes {
        let mut inner = Inner::default();
        // Never given back.
        inner.enter(ROOT, Node::new(ROOT, status), vec![(0, Vec::new())], 1);
        Nodes { inner: Mutex::new(inner), top }
    }

    /// All of them as another process goes on with them, and what is being written, in the order of the nodes. Errors: somebody is at one just now.
    pub fn save(&self) -> Result<(Vec<wire::Node>, Vec<Arc<Staged>>)> {
        let inner = lock(&self.inner);
        let (mut out, mut files) = (Vec::with_capacity(inner.places.len()), Vec::new());
        for (id, place) in &inner.places {
            let node = &place.node;
            let opened = node.opened.try_lock().map_err(|_| err!(Busy, "a file is being opened or closed"))?;
            files.extend(opened.staged.clone());
            out.push(wire::Node {
                id: *id,
                names: place.names.iter().map(|(parent, name)| wire::Name { parent: *parent, name: name.clone().into() }).collect(),
                lookups: place.lookups,
                status: Some(lock(&node.status).clone()),
                gone: node.is_gone(),
                named: place.names.iter().any(|name| inner.names.get(name) == Some(id)),
                handles: opened.handles,
                readers: opened.readers,
                version: Some(opened.version.save()),
                backing: opened.backing.as_ref().map_or(0, |backing| backing.id()),
                cached: opened.cached.map(Version::save),
                hidden: opened.hidden.as_ref().map(|path| path.as_bytes().to_vec().into()).unwrap_or_default(),
                staged: opened.staged.as_ref().map(|staged| staged.save()),
            });
        }
        Ok((out, files))
    }

    /// What `save` saved.
    pub fn restore(top: AbsPath, saved: Vec<Saved>) -> Result<Nodes> {
        let mut inner = Inner::default();
        for Saved { node: saved, backing, staged } in saved {
            let status = saved.status.unwrap_or_default();
            let node = Node::new(saved.id, &status);
            node.gone.store(saved.gone, Ordering::SeqCst);
            let opened = Opened {
                handles: saved.handles,
                readers: saved.readers,
                version: saved.version.as_ref().map(Version::restore).unwrap_or_default(),
                backing,
                staged,
                cached: saved.cached.as_ref().map(Version::restore),
                hidden: if saved.hidden.is_empty() { None } else { Some(AbsPath::parse(&saved.hidden)?) },
            };
            node.note_use(&opened);
            *node.opened.try_lock().map_err(|_| err!(Internal, "a new node is in use"))? = opened;
            let names: Vec<(u64, Vec<u8>)> = saved.names.into_iter().map(|name| (name.parent, name.name.to_vec())).collect();
            if saved.named {
                inner.names.extend(names.iter().map(|name| (name.clone(), saved.id)));
            }
            if status.other_names > 0 {
                inner.shared.insert(status.file_id, saved.id);
            }
            inner.enter(saved.id, node, names, saved.lookups);
        }
        if !inner.places.contains_key(&ROOT) || inner.places.values().any(|place| place.names.is_empty()) {
            return Err(err!(Corrupt, "a hand-over without a root, or with a node without a name"));
        }
        Ok(Nodes { inner: Mutex::new(inner), top })
    }

    /// Errors: `NotFound`, of a number that was given back.
    pub fn get(&self, id: u64) -> Result<Arc<Node>> {
        let node = lock(&self.inner).places.get(&id).map(|place| place.node.clone()).ok_or_else(stale)?;
        node.used.store(true, Ordering::Relaxed);
        Ok(node)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.inner).places.len()
    }

    /// At most `most` nodes that nobody has open and that were not used for longest, out of the next `looks` in turn.
    pub fn idle(&self, most: usize, looks: usize) -> Vec<u64> {
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        let (mut idle, mut looked) = (Vec::new(), 0);
        while looked < looks && idle.len() < most {
            let Some((id, turn)) = inner.order.pop_front() else { break };
            let Some(place) = inner.places.get(&id).filter(|place| place.turn == turn) else { continue };
            looked += 1;
            inner.order.push_back((id, turn));
            if id != ROOT && !place.node.used.swap(false, Ordering::Relaxed) && place.node.is_idle() {
                idle.push(id);
            }
        }
        idle
    }

    /// The node that a name leads to, as far as the kernel knows one.
    pub fn named(&self, parent: u64, name: &[u8]) -> Option<Arc<Node>> {
        let inner = lock(&self.inner);
        let id = inner.names.get(&(parent, name.to_vec()))?;
        inner.places.get(id).map(|place| place.node.clone())
    }

    /// Where a node is in the namespace.
    pub fn path(&self, id: u64) -> Result<AbsPath> {
        let inner = lock(&self.inner);
        if id == ROOT {
            return Ok(self.top.clone());
        }
        // The folder of a name that nobody has open may have been given back.
        let place = inner.places.get(&id).ok_or_else(stale)?;
        place.names.iter().find_map(|(parent, name)| Some((inner.names_to(*parent)?, name))).ok_or_else(stale).and_then(|(above, name)| {
            let above = above.into_iter().rev().try_fold(self.top.clone(), |path, name| path.join(name))?;
            above.join(name)
        })
    }

    /// The folder that a node is in, by the name that it is known to be there under.
    pub fn folder_of(&self, id: u64) -> Option<u64> {
        lock(&self.inner).places.get(&id)?.names.first().map(|(folder, _)| *folder)
    }

    /// Where a name below a node is.
    pub fn path_below(&self, parent: u64, name: &[u8]) -> Result<AbsPath> {
        self.path(parent)?.join(name)
    }

    /// What the namespace shows under a name, as a node that is handed to the kernel once more.
    pub fn show(&self, parent: u64, name: &[u8], status: FileStatus) -> Arc<Node> {
        let mut inner = lock(&self.inner);
        let known = inner.names.get(&(parent, name.to_vec())).copied();
        let other = if status.other_names > 0 { Some(inner.shared.get(&status.file_id).copied().unwrap_or(status.file_id)) } else { None };
        for id in [known, other].into_iter().flatten() {
            let Some(place) = inner.places.get_mut(&id).filter(|place| place.node.stands_for(&status)) else { continue };
            if known != Some(id) && lock(&place.node.status).file_id != status.file_id {
                continue;
            }
            place.lookups += 1;
            place.node.used.store(true, Ordering::Relaxed);
            // First the one that is known to be there.
            place.names.retain(|(of, other)| *of != parent || other != name);
            place.names.insert(0, (parent, name.to_vec()));
            let (node, shared) = (place.node.clone(), (status.other_names > 0).then_some(status.file_id));
            node.set_status(status);
            inner.take_name(parent, name, id);
            inner.shared.extend(shared.map(|file| (file, id)));
            return node;
        }
        let id = (0u64..).map(|count| status.file_id | count << COUNT_BIT).find(|id| *id != ROOT && !inner.places.contains_key(id));
        let id = id.unwrap_or(status.file_id);
        let node = Node::new(id, &status);
        inner.enter(id, node.clone(), vec![(parent, name.to_vec())], 1);
        inner.take_name(parent, name, id);
        if status.other_names > 0 {
            inner.shared.insert(status.file_id, id);
        }
        node
    }

    /// A node has one more name now.
    pub fn linked(&self, node: &Node, status: FileStatus) {
        lock(&self.inner).shared.insert(status.file_id, node.id);
        node.set_status(status);
    }

    /// The kernel gives lookups back.
    pub fn forget(&self, id: u64, lookups: u64) {
        if id == ROOT {
            return;
        }
        let mut inner = lock(&self.inner);
        let Some(place) = inner.places.get_mut(&id) else { return };
        place.lookups = place.lookups.saturating_sub(lookups);
        if place.lookups > 0 {
            return;
        }
        let Some(place) = inner.places.remove(&id) else { return };
        let file = lock(&place.node.status).file_id;
        if inner.shared.get(&file) == Some(&id) {
            inner.shared.remove(&file);
        }
        inner.lead_nowhere(&place.names, id);
        inner.shrink();
    }

    /// Its names lead to this node no more: the next lookup gets another one.
    pub fn detach(&self, node: &Node) {
        let mut inner = lock(&self.inner);
        let Some(names) = inner.places.get(&node.id).map(|place| place.names.clone()) else { return };
        inner.lead_nowhere(&names, node.id);
        inner.shared.retain(|_, id| *id != node.id);
    }

    /// What was under a name is gone, unless it is known under another one.
    pub fn removed(&self, parent: u64, name: &[u8]) {
        let mut inner = lock(&self.inner);
        let Some(id) = inner.names.remove(&(parent, name.to_vec())) else { return };
        let Some(place) = inner.places.get_mut(&id) else { return };
        if place.names.len() == 1 {
            return place.node.gone.store(true, Ordering::SeqCst);
        }
        place.names.retain(|(of, other)| *of != parent || other != name);
        let mut status = lock(&place.node.status);
        status.other_names = status.other_names.saturating_sub(1);
    }

    /// The name that `path` told is not there any more: another one is told from now on. `false`: there is none.
    pub fn drop_name(&self, node: &Node) -> bool {
        let mut inner = lock(&self.inner);
        let Some(place) = inner.places.get_mut(&node.id).filter(|place| place.names.len() > 1) else { return false };
        let name = place.names.remove(0);
        inner.lead_nowhere(&[name], node.id);
        true
    }

    /// Where else than at `path` a node is known to be.
    pub fn other_paths(&self, node: &Node, path: &AbsPath) -> Vec<AbsPath> {
        let inner = lock(&self.inner);
        let Some(place) = inner.places.get(&node.id) else { return Vec::new() };
        let whole = |(parent, name): &(u64, Vec<u8>)| {
            let above = inner.names_to(*parent)?.into_iter().rev().try_fold(self.top.clone(), |path, name| path.join(name)).ok()?;
            above.join(name).ok().filter(|other| other != path)
        };
        place.names.iter().filter_map(whole).collect()
    }

    /// Whether the kernel knows a node under several names.
    pub fn has_others(&self, node: &Node) -> bool {
        lock(&self.inner).places.get(&node.id).is_some_and(|place| place.names.len() > 1)
    }

    /// What was under one name is under another one; what was there is gone.
    pub fn moved(&self, parent: u64, name: &[u8], new_parent: u64, new_name: &[u8]) {
        self.removed(new_parent, new_name);
        let mut inner = lock(&self.inner);
        let Some(id) = inner.names.remove(&(parent, name.to_vec())) else { return };
        if let Some(place) = inner.places.get_mut(&id) {
            for place in place.names.iter_mut().filter(|(of, other)| *of == parent && other == name) {
                *place = (new_parent, new_name.to_vec());
            }
            inner.names.insert((new_parent, new_name.to_vec()), id);
        }
    }

    /// Nodes of a file that are being written.
    pub fn written_of(&self, file_id: u64) -> Vec<Arc<Node>> {
        let inner = lock(&self.inner);
        let its = |node: &Node| lock(&node.status).file_id == file_id && matches!(node.in_use(), Use::Staged(_));
        inner.places.values().filter(|place| its(&place.node)).map(|place| place.node.clone()).collect()
    }

    /// Nodes at or below one that are being written.
    pub fn written_below(&self, top: u64) -> Vec<Arc<Node>> {
        let inner = lock(&self.inner);
        let written = inner.places.values().filter(|place| matches!(place.node.in_use(), Use::Staged(_)) && inner.is_below(place.node.id, top));
        written.map(|place| place.node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(file_id: u64, content_version: u64) -> FileStatus {
        FileStatus { file_id, content_version, ..FileStatus::default() }
    }

    fn nodes() -> Nodes {
        Nodes::new("/top".parse().unwrap(), &FileStatus { file_id: 9, folder: true, ..FileStatus::default() })
    }

    #[tokio::test]
    async fn a_number_stands_for_what_is_open_under_it() {
        let nodes = nodes();
        let first = nodes.show(ROOT, b"f", status(7, 1));
        assert_eq!((first.id, nodes.path(first.id).unwrap().to_string()), (7, "/top/f".to_owned()));
        assert_eq!(nodes.show(ROOT, b"f", status(7, 2)).id, 7, "nobody has it open");
        {
            let mut opened = first.opened.lock().await;
            (opened.readers, opened.version) = (1, Version { file_id: 7, content: 2, length: 0 });
            first.note_use(&opened);
        }
        assert_eq!(nodes.show(ROOT, b"f", status(7, 2)).id, 7);
        let second = nodes.show(ROOT, b"f", status(7, 3));
        assert_eq!(second.id, 7 | 1 << COUNT_BIT);
        assert_eq!(nodes.named(ROOT, b"f").unwrap().id, second.id);
        nodes.forget(7, 3);
        assert!(nodes.get(7).is_err());
        assert_eq!(nodes.named(ROOT, b"f").unwrap().id, second.id, "the older number's end takes nothing from the newer one");
    }

    #[test]
    fn a_file_is_one_node_under_all_its_names() {
        let nodes = nodes();
        let shared = FileStatus { other_names: 1, ..status(7, 1) };
        let first = nodes.show(ROOT, b"a", shared.clone());
        let folder = nodes.show(ROOT, b"d", FileStatus { folder: true, ..status(3, 1) });
        assert_eq!(nodes.show(folder.id, b"b", shared.clone()).id, first.id);
        assert!(nodes.has_others(&first));
        nodes.removed(ROOT, b"a");
        assert!(!first.is_gone() && !nodes.has_others(&first));
        assert_eq!((nodes.path(first.id).unwrap().to_string(), first.status().other_names), ("/top/d/b".to_owned(), 0));
        nodes.moved(folder.id, b"b", ROOT, b"c");
        assert_eq!(nodes.named(ROOT, b"c").unwrap().id, first.id);
        nodes.forget(7, 2);
        assert!(nodes.named(ROOT, b"c").is_none());
    }

    #[test]
    fn names_move_with_what_is_below_them() {
        let nodes = nodes();
        let folder = nodes.show(ROOT, b"d", FileStatus { folder: true, ..status(3, 1) });
        let file = nodes.show(folder.id, b"f", status(4, 1));
        let other = nodes.show(ROOT, b"e", FileStatus { folder: true, ..status(5, 1) });
        nodes.moved(ROOT, b"d", ROOT, b"e");
        assert_eq!(nodes.path(file.id).unwrap().to_string(), "/top/e/f");
        assert!(other.is_gone() && !folder.is_gone() && nodes.named(ROOT, b"d").is_none());
        nodes.removed(folder.id, b"f");
        assert!(file.is_gone());
        assert_ne!(nodes.show(folder.id, b"f", status(4, 1)).id, 4, "deleted, and made again while somebody has the old one");
    }
}
