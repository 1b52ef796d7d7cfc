//! `UnderStore`: the one face of every store, chosen by the address.

use crate::local::{LocalStore, LocalWriter};
use crate::object::{ObjectStore, ObjectWriter};
use crate::{UfsUri, metrics};
use bytes::Bytes;
use forebay_common::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One file or folder of an under store.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// What one folder holds.
#[derive(Debug, Default)]
pub struct Listing {
    /// What can be shown, sorted by name.
    pub entries: Vec<UfsEntry>,
    /// Objects that cannot be: names with `//`, names too long, symbolic links.
    pub unshown: u64,
    /// Names that are there and could not be looked at this time: nothing is to be concluded about them.
    pub unknown: Vec<Vec<u8>>,
}

/// An opened under store. Cheap to clone.
#[derive(Clone)]
pub struct UnderStore {
    uri: UfsUri,
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    Local(Arc<LocalStore>),
    Object(ObjectStore),
}

/// A write in progress; nothing is visible under its name before `close` answers.
pub struct UfsWriter(WriterInner);

enum WriterInner {
    Local(LocalWriter),
    Object(Box<ObjectWriter>),
}

/// Counts a call; a failure other than "no such object" is counted apart.
fn counted<T>(result: Result<T>) -> Result<T> {
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
        let inner = match uri {
            UfsUri::File { root } => Inner::Local(Arc::new(LocalStore::open(root, options)?)),
            UfsUri::S3 { bucket, prefix } => Inner::Object(ObjectStore::s3(uri, bucket, prefix, options)?),
        };
        Ok(UnderStore { uri: uri.clone(), inner })
    }

    /// The address.
    pub fn uri(&self) -> &UfsUri {
        &self.uri
    }

    fn name(&self, doing: &str, key: &[u8]) -> impl FnOnce(Error) -> Error {
        let what = format!("{doing} {}", self.uri.join(key));
        move |e| e.context(what)
    }

    /// Whether the store answers with these credentials.
    pub async fn check(&self) -> Result<()> {
        counted(match &self.inner {
            Inner::Local(s) => s.stat(b"").await.map(drop),
            Inner::Object(s) => s.check().await,
        })
        .map_err(self.name("reaching", b""))
    }

    /// One entry. Errors: `NotFound` only for a missing object.
    pub async fn stat(&self, key: &[u8]) -> Result<UfsEntry> {
        counted(match &self.inner {
            Inner::Local(s) => s.stat(key).await,
            Inner::Object(s) => s.stat(key).await,
        })
        .map_err(self.name("looking up", key))
    }

    /// The entries of a folder; of a missing folder none.
    pub async fn list(&self, key: &[u8]) -> Result<Listing> {
        let mut listing = counted(match &self.inner {
            Inner::Local(s) => s.list(key).await,
            Inner::Object(s) => s.list(key).await,
        })
        .map_err(self.name("listing", key))?;
        listing.entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listing)
    }

    /// `length` bytes at `offset`, all of them and all of the version `fingerprint`.
    ///
    /// Errors: `FileChanged` when the object is another version or shorter, `NotFound` when it is gone.
    pub async fn read(&self, key: &[u8], offset: u64, length: usize, fingerprint: &str) -> Result<Bytes> {
        let bytes = counted(match &self.inner {
            Inner::Local(s) => s.read(key, offset, length, fingerprint).await,
            Inner::Object(s) => s.read(key, offset, length, fingerprint).await,
        })
        .map_err(self.name("reading", key))?;
        assert_eq!(bytes.len(), length, "an under store returned another length than it checked");
        metrics::BYTES_READ.inc_by(length as u64);
        Ok(bytes)
    }

    /// Starts writing `key`, replacing what is there when closed.
    pub async fn writer(&self, key: &[u8]) -> Result<UfsWriter> {
        counted(match &self.inner {
            Inner::Local(s) => s.writer(key).await.map(|w| UfsWriter(WriterInner::Local(w))),
            Inner::Object(s) => s.writer(key).await.map(|w| UfsWriter(WriterInner::Object(Box::new(w)))),
        })
        .map_err(self.name("writing", key))
    }

    /// Makes a folder and those above it; one that is there is fine.
    pub async fn mkdir(&self, key: &[u8]) -> Result<()> {
        counted(match &self.inner {
            Inner::Local(s) => s.mkdir(key).await,
            Inner::Object(s) => s.mkdir(key).await,
        })
        .map_err(self.name("making folder", key))
    }

    /// Removes an object, or a folder with all below it; one that is gone is fine.
    pub async fn delete(&self, key: &[u8], folder: bool) -> Result<()> {
        counted(match &self.inner {
            Inner::Local(s) => s.delete(key, folder).await,
            Inner::Object(s) => s.delete(key, folder).await,
        })
        .map_err(self.name("deleting", key))
    }

    /// Moves an object or a folder; may be repeated after a crash. A folder of an object store is copied object by object.
    pub async fn rename(&self, source: &[u8], target: &[u8], folder: bool) -> Result<()> {
        counted(match &self.inner {
            Inner::Local(s) => s.rename(source, target).await,
            Inner::Object(s) => s.rename(source, target, folder).await,
        })
        .map_err(self.name("renaming", source))
    }
}

impl UfsWriter {
    /// Appends.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let length = bytes.len() as u64;
        match &mut self.0 {
            WriterInner::Local(w) => w.write(bytes).await,
            WriterInner::Object(w) => w.write(bytes).await,
        }?;
        metrics::BYTES_WRITTEN.inc_by(length);
        Ok(())
    }

    /// Does what can be done before publishing, so that `close` takes little time where the store allows it.
    pub async fn settle(&mut self) -> Result<()> {
        match &mut self.0 {
            WriterInner::Local(w) => w.settle().await,
            WriterInner::Object(_) => Ok(()),
        }
    }

    /// Publishes the object, durable in the store, and returns the entry it has now.
    /// Given up half-way, it may be there or not; `abort` then clears what can be cleared.
    pub async fn close(&mut self) -> Result<UfsEntry> {
        counted(match &mut self.0 {
            WriterInner::Local(w) => w.close().await,
            WriterInner::Object(w) => w.close().await,
        })
    }

    /// Gives up; nothing is published.
    pub async fn abort(self) {
        match self.0 {
            WriterInner::Local(w) => w.abort().await,
            WriterInner::Object(w) => w.abort().await,
        }
    }
}
