//! `UnderStore`: the one face of every store, chosen by the address.

use crate::control::{self, Control};
use crate::hdfs::{HdfsLister, HdfsStore, HdfsWriter};
use crate::hdfs_events::HdfsEvents;
use crate::local::{LocalLister, LocalStore, LocalWriter};
use crate::object::{ObjectLister, ObjectStore, ObjectWriter};
use crate::requests::Requests;
use crate::{UfsUri, metrics};
use bytes::Bytes;
use forebay_common::{Boxed, Error, ErrorKind, Result, err};
use std::collections::hash_map::{Entry, RandomState};
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;

/// One file or folder of an under store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UfsEntry {
    /// Its name in its folder.
    pub name: Vec<u8>,
    /// A folder (or a common prefix).
    pub folder: bool,
    /// Bytes; 0 for a folder.
    pub length: u64,
    /// Unix milliseconds; 0 where the store does not say.
    pub modified_ms: u64,
    /// The version; empty for a folder.
    pub fingerprint: String,
    /// Owner, empty where the store has none.
    pub owner: String,
    /// Group, empty where the store has none.
    pub group: String,
    /// Permission bits, 0 where the store has none.
    pub mode: u32,
}

/// Some of what a folder holds: about `LIST_PAGE_ENTRIES` names, in the store's order.
#[derive(Debug, Default)]
pub struct Page {
    /// What can be shown.
    pub entries: Vec<UfsEntry>,
    /// Objects that cannot be: names with `//`, names too long, symbolic links.
    pub unshown: u64,
    /// Names that are there and could not be looked at this time: nothing is to be concluded about them.
    pub unknown: Vec<Vec<u8>>,
}

/// Names asked for at a time.
pub const LIST_PAGE_ENTRIES: usize = 1_000;

/// A folder being listed, page by page. Its memory is 24 bytes per name, whatever the names are.
pub struct Lister {
    store: UnderStore,
    key: Vec<u8>,
    inner: ListerInner,
    /// Hash of each name that came, and whether it was a file.
    seen: HashMap<u64, bool>,
    hasher: RandomState,
}

enum ListerInner {
    Local(LocalLister),
    Object(Box<ObjectLister>),
    Hdfs(HdfsLister),
}

impl Lister {
    /// The next page; `None` at the end. An object `a` beside objects `a/…` is shown as the file: what lies below it is not.
    pub fn next_page(&mut self) -> Boxed<'_, Result<Option<Page>>> {
        Box::pin(async move {
            self.store.control.admit(false).await?;
            let page = counted(match &mut self.inner {
                ListerInner::Local(l) => l.next().await,
                ListerInner::Object(l) => l.next().await,
                ListerInner::Hdfs(l) => l.next().await,
            })
            .map_err(self.store.name("listing", &self.key))?;
            let Some(mut page) = page else { return Ok(None) };
            for name in &page.unknown {
                self.seen.insert(self.hasher.hash_one(name), true);
            }
            let (seen, hasher, unshown) = (&mut self.seen, &self.hasher, &mut page.unshown);
            page.entries.retain(|e| match seen.entry(hasher.hash_one(&e.name)) {
                Entry::Vacant(slot) => {
                    slot.insert(!e.folder);
                    true
                }
                Entry::Occupied(mut slot) => {
                    *unshown += 1;
                    // The file counts, whichever comes first.
                    !e.folder && !slot.insert(true)
                }
            });
            Ok(Some(page))
        })
    }

    /// Ends the listing; what came is remembered.
    pub fn into_names(self) -> SeenNames {
        SeenNames { seen: self.seen, hasher: self.hasher }
    }
}

/// The names of a listing, by hash.
pub struct SeenNames {
    seen: HashMap<u64, bool>,
    hasher: RandomState,
}

impl SeenNames {
    /// Whether a name came in one of the pages. One that did not may be taken for one that did, once in 2^64 per name.
    pub fn saw(&self, name: &[u8]) -> bool {
        self.seen.contains_key(&self.hasher.hash_one(name))
    }
}

/// An opened under store. Cheap to clone.
#[derive(Clone)]
pub struct UnderStore {
    pub(crate) uri: UfsUri,
    pub(crate) inner: Inner,
    pub(crate) control: Control,
    pub(crate) requests: Arc<Requests>,
}

#[derive(Clone)]
pub(crate) enum Inner {
    Local(Arc<LocalStore>),
    Object(ObjectStore),
    Hdfs(Arc<HdfsStore>),
}

/// A write in progress; nothing is visible under its name before `close` answers.
pub struct UfsWriter {
    name: String,
    inner: WriterInner,
    control: Control,
    requests: Arc<Requests>,
}

enum WriterInner {
    Local(LocalWriter),
    Object(Box<ObjectWriter>),
    Hdfs(Box<HdfsWriter>),
}

/// Counts a call; a failure other than "no such object" is counted apart.
pub(crate) fn counted<T>(result: Result<T>) -> Result<T> {
    metrics::CALLS.inc();
    match &result {
        Err(e) if e.kind() == ErrorKind::FileChanged => metrics::CHANGED.inc(),
        Err(e) if e.kind() != ErrorKind::NotFound => metrics::ERRORS.inc(),
        _ => {}
    }
    result
}

impl UnderStore {
    /// Opens a store; no call is made yet. Errors: `InvalidArgument` naming the option, `NotFound` for a missing folder.
    pub fn open(uri: &UfsUri, options: &BTreeMap<String, String>) -> Result<Self> {
        Self::open_counting(uri, options, Arc::default())
    }

    /// `open`, with counts that go on from those of a store opened before.
    pub fn open_counting(uri: &UfsUri, options: &BTreeMap<String, String>, requests: Arc<Requests>) -> Result<Self> {
        let control = Control::parse(options)?;
        let mut own = options.clone();
        own.retain(|name, _| !control::OPTIONS.contains(&name.as_str()));
        let inner = match uri {
            UfsUri::File { root } => Inner::Local(Arc::new(LocalStore::open(root, &own, requests.clone())?)),
            UfsUri::Hdfs { authority, root } => Inner::Hdfs(Arc::new(HdfsStore::open(uri, authority, root, &own, requests.clone())?)),
            UfsUri::Object { service, container, prefix } => {
                Inner::Object(ObjectStore::open(uri, *service, container, prefix, &own, requests.clone())?)
            }
        };
        Ok(UnderStore { uri: uri.clone(), inner, control, requests })
    }

    /// The address.
    pub fn uri(&self) -> &UfsUri {
        &self.uri
    }

    /// What it cost so far.
    pub fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }

    /// The store's own event stream, where it has one and the mount asks for it.
    pub fn events(&self) -> Result<Option<HdfsEvents>> {
        match &self.inner {
            Inner::Hdfs(s) => s.events().map_err(self.name("listening to", b"")),
            Inner::Local(_) | Inner::Object(_) => Ok(None),
        }
    }

    /// Whether a listing may leave out a name that is replaced meanwhile; the others are sorted by name, or one answer.
    pub fn listing_may_miss(&self) -> bool {
        matches!(self.inner, Inner::Local(_))
    }

    pub(crate) fn name(&self, doing: &str, key: &[u8]) -> impl FnOnce(Error) -> Error + use<> {
        let what = format!("{doing} {}", self.uri.join(key));
        move |e| e.context(what)
    }

    /// Whether the store answers with these credentials. One that an operator has closed is not asked.
    pub fn check(&self) -> Boxed<'_, Result<()>> {
        Box::pin(async move {
            if self.control.admit(false).await.is_err() {
                return Ok(());
            }
            counted(match &self.inner {
                Inner::Local(s) => s.stat(b"").await.map(drop),
                Inner::Object(s) => s.check().await,
                Inner::Hdfs(s) => s.check().await,
            })
            .map_err(self.name("reaching", b""))
        })
    }

    /// One entry. Errors: `NotFound` only for a missing object.
    pub fn stat<'a>(&'a self, key: &'a [u8]) -> Boxed<'a, Result<UfsEntry>> {
        Box::pin(async move {
            self.control.admit(false).await.map_err(self.name("looking up", key))?;
            counted(match &self.inner {
                Inner::Local(s) => s.stat(key).await,
                Inner::Object(s) => s.stat(key).await,
                Inner::Hdfs(s) => s.stat(key).await,
            })
            .map_err(self.name("looking up", key))
        })
    }

    /// Starts listing a folder; a missing one has no pages.
    ///
    /// Errors: `Unsupported` for a store that cannot be listed.
    pub fn lister<'a>(&'a self, key: &'a [u8]) -> Boxed<'a, Result<Lister>> {
        Box::pin(async move {
            let inner = match &self.inner {
                Inner::Local(s) => Ok(ListerInner::Local(s.lister(key))),
                Inner::Object(s) => s.lister(key).await.map(|l| ListerInner::Object(Box::new(l))),
                Inner::Hdfs(s) => s.lister(key).map(ListerInner::Hdfs),
            };
            let inner = inner.map_err(self.name("listing", key))?;
            Ok(Lister { store: self.clone(), key: key.to_vec(), inner, seen: HashMap::new(), hasher: RandomState::new() })
        })
    }

    /// All pages of a folder in one, sorted by name.
    pub fn list<'a>(&'a self, key: &'a [u8]) -> Boxed<'a, Result<Page>> {
        Box::pin(async move {
            let mut lister = self.lister(key).await?;
            let mut all = Page::default();
            while let Some(page) = lister.next_page().await? {
                all.unshown += page.unshown;
                all.unknown.extend(page.unknown);
                for e in page.entries {
                    all.entries.retain(|old| !(old.folder && !e.folder && old.name == e.name));
                    all.entries.push(e);
                }
            }
            all.entries.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(all)
        })
    }

    /// `length` bytes at `offset`, all of them and all of the version `fingerprint`.
    ///
    /// Errors: `FileChanged` when the object is another version or shorter, `NotFound` when it is gone.
    pub fn read<'a>(&'a self, key: &'a [u8], offset: u64, length: usize, fingerprint: &'a str) -> Boxed<'a, Result<Bytes>> {
        Box::pin(async move {
            self.admit_read(key, length).await?;
            self.read_admitted(key, offset, length, fingerprint).await
        })
    }

    /// Waits until a mount's limits let a read through. Errors: an operator has closed the store.
    pub fn admit_read<'a>(&'a self, key: &'a [u8], length: usize) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            self.control.admit(false).await.map_err(self.name("reading", key))?;
            self.control.bytes(length).await;
            Ok(())
        })
    }

    /// `read`, once it was admitted.
    pub fn read_admitted<'a>(&'a self, key: &'a [u8], offset: u64, length: usize, fingerprint: &'a str) -> Boxed<'a, Result<Bytes>> {
        Box::pin(async move {
            let read = match &self.inner {
                Inner::Local(s) => s.read(key, offset, length, fingerprint).await,
                Inner::Object(s) => s.read(key, offset, length, fingerprint).await,
                Inner::Hdfs(s) => s.read(key, offset, length, fingerprint).await,
            };
            self.note_read(key, length, read)
        })
    }

    /// Whether reads are system calls, which whoever has a thread to block makes best itself.
    pub fn reads_block(&self) -> bool {
        matches!(self.inner, Inner::Local(_))
    }

    /// `read_admitted` on the caller's own thread. Errors: also `Unsupported`, where reads are not system calls.
    pub fn read_blocking(&self, key: &[u8], offset: u64, length: usize, fingerprint: &str) -> Result<Bytes> {
        match &self.inner {
            Inner::Local(s) => self.note_read(key, length, s.read_blocking(key, offset, length, fingerprint)),
            Inner::Object(_) | Inner::Hdfs(_) => Err(err!(Unsupported, "this store is read over a network")),
        }
    }

    /// Counts a read and looks at its length.
    fn note_read(&self, key: &[u8], length: usize, read: Result<Bytes>) -> Result<Bytes> {
        let bytes = counted(read).map_err(self.name("reading", key))?;
        if bytes.len() != length {
            return Err(err!(UnderStore, "{} bytes came instead of {length}", bytes.len())).map_err(self.name("reading", key));
        }
        metrics::BYTES_READ.inc_by(length as u64);
        self.requests.read(length);
        Ok(bytes)
    }

    /// Starts writing `key`, replacing what is there when closed.
    pub fn writer<'a>(&'a self, key: &'a [u8]) -> Boxed<'a, Result<UfsWriter>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("writing", key))?;
            let inner = counted(match &self.inner {
                Inner::Local(s) => s.writer(key).await.map(WriterInner::Local),
                Inner::Object(s) => s.writer(key).await.map(|w| WriterInner::Object(Box::new(w))),
                Inner::Hdfs(s) => s.writer(key).await.map(|w| WriterInner::Hdfs(Box::new(w))),
            })
            .map_err(self.name("writing", key))?;
            Ok(UfsWriter { name: format!("writing {}", self.uri.join(key)), inner, control: self.control.clone(), requests: self.requests.clone() })
        })
    }

    /// Makes a folder and those above it; one that is there is fine.
    pub fn mkdir<'a>(&'a self, key: &'a [u8]) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("making folder", key))?;
            counted(match &self.inner {
                Inner::Local(s) => s.mkdir(key).await,
                Inner::Object(s) => s.mkdir(key).await,
                Inner::Hdfs(s) => s.mkdir(key).await,
            })
            .map_err(self.name("making folder", key))
        })
    }

    /// Removes an object, or a folder with all below it; one that is gone is fine.
    pub fn delete<'a>(&'a self, key: &'a [u8], folder: bool) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("deleting", key))?;
            counted(match &self.inner {
                Inner::Local(s) => s.delete(key, folder).await,
                Inner::Object(s) => s.delete(key, folder).await,
                Inner::Hdfs(s) => s.delete(key, folder).await,
            })
            .map_err(self.name("deleting", key))
        })
    }

    /// Moves an object or a folder; may be repeated after a crash. A folder of an object store is copied object by object.
    pub fn rename<'a>(&'a self, source: &'a [u8], target: &'a [u8], folder: bool) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("renaming", source))?;
            counted(match &self.inner {
                Inner::Local(s) => s.rename(source, target).await,
                Inner::Object(s) => s.rename(source, target, folder).await,
                Inner::Hdfs(s) => s.rename(source, target).await,
            })
            .map_err(self.name("renaming", source))
        })
    }
}

impl UfsWriter {
    /// Appends.
    pub fn write(&mut self, bytes: Bytes) -> Boxed<'_, Result<()>> {
        Box::pin(async move {
            let length = bytes.len() as u64;
            self.control.bytes(bytes.len()).await;
            match &mut self.inner {
                WriterInner::Local(w) => w.write(bytes).await,
                WriterInner::Object(w) => w.write(bytes).await,
                WriterInner::Hdfs(w) => w.write(bytes).await,
            }
            .map_err(|e| e.context(&self.name))?;
            metrics::BYTES_WRITTEN.inc_by(length);
            self.requests.written(length);
            Ok(())
        })
    }

    /// Does what can be done before publishing, so that `close` takes little time where the store allows it.
    pub fn settle(&mut self) -> Boxed<'_, Result<()>> {
        Box::pin(async move {
            match &mut self.inner {
                WriterInner::Local(w) => w.settle().await,
                WriterInner::Object(_) => Ok(()),
                WriterInner::Hdfs(w) => w.settle().await,
            }
            .map_err(|e| e.context(&self.name))
        })
    }

    /// Publishes the object, durable in the store, and returns the entry it has now.
    /// Given up half-way, it may be there or not; `abort` then clears what can be cleared.
    pub fn close(&mut self) -> Boxed<'_, Result<UfsEntry>> {
        Box::pin(async move {
            counted(match &mut self.inner {
                WriterInner::Local(w) => w.close().await,
                WriterInner::Object(w) => w.close().await,
                WriterInner::Hdfs(w) => w.close().await,
            })
            .map_err(|e| e.context(&self.name))
        })
    }

    /// Gives up; nothing is published.
    pub fn abort(self) -> Boxed<'static, ()> {
        Box::pin(async move {
            match self.inner {
                WriterInner::Local(w) => w.abort().await,
                WriterInner::Object(w) => w.abort().await,
                WriterInner::Hdfs(w) => w.abort().await,
            }
        })
    }
}
