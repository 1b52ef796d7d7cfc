//! The master as a NameNode: Hadoop's ClientProtocol in front of the same namespace.
//!
//! `server` takes connections, `connection` reads calls and writes answers, `dispatch` finds a call's handler; `names` (what is
//! there), `attributes`, `writing` (files under construction), `recovery` (of what
//! failed in the middle), `reopen` (changes of complete files), `locate` (where blocks are, for whom) and `cluster` (what a client asks about the cluster) are the
//! handlers: they decode, make the call that our own clients make, and encode. No logic of the namespace lives here.
//!
//! Invariants: a call never waits for another one of its connection; what changes something is journaled under the client's id and
//! call number, so that a call which is sent again is done once; every located block carries a token, checked on every data path.

mod asker;
mod attributes;
mod cluster;
mod connection;
mod dispatch;
mod exception;
mod locate;
mod names;
mod recovery;
mod reopen;
mod server;
mod status;
mod writing;

pub use connection::CALLS;
pub use recovery::recover;
pub use server::serve;

use crate::core::Core;
use crate::mount::Resolved;
use crate::service::FileSystemService;
use crate::store::Reader;
use asker::Asker;
use exception::Thrown;
use forebay_common::{AbsPath, ErrorKind, InodeId};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What every handler has at hand.
pub struct Hadoop {
    core: Arc<Core>,
    /// Our own service, for the calls that are the same.
    fs: FileSystemService,
    /// Whether Hadoop's clients change nothing, by an operator's word; forgotten with this process.
    safe_mode: AtomicBool,
}

impl Hadoop {
    /// A path as Hadoop's clients send it; `/.reserved/.inodes/ID` is the file of that id, wherever it is now.
    fn path(&self, src: &str) -> Result<AbsPath, Thrown> {
        let named = |e| Thrown::from(e).named("org.apache.hadoop.fs.InvalidPathException");
        let Some(rest) = src.strip_prefix("/.reserved/.inodes/") else { return AbsPath::parse(src).map_err(named) };
        let (id, below) = rest.split_once('/').unwrap_or((rest, ""));
        let id = id.parse().map_err(|_| Thrown::not_found(format!("{src} names no inode")))?;
        let top = self.core.store.view().path_of(InodeId(id)).map_err(|_| Thrown::not_found(format!("{src} does not exist")))?;
        Ok(below.split('/').filter(|name| !name.is_empty()).try_fold(top, |at, name| at.join(name.as_bytes()))?)
    }

    /// Resolves a path in step with its under store.
    async fn resolve(&self, asker: &Asker, src: &str) -> Result<(AbsPath, Resolved), Thrown> {
        let path = self.path(src)?;
        let who = self.core.identity.who(&asker.user);
        match self.core.syncer.resolve(&self.core, &who, &path).await {
            Ok(resolved) => Ok((path, resolved)),
            Err(e) if e.kind() == ErrorKind::NotADirectory => Err(match self.file_above(&path)? {
                Some(file) => Thrown::parent_not_directory(format!("{file} (is not a directory)")),
                None => e.into(),
            }),
            Err(e) => Err(e.into()),
        }
    }

    /// The same of what must be there; what would lie below a file is not.
    async fn find(&self, asker: &Asker, src: &str) -> Result<(AbsPath, Resolved), Thrown> {
        let missing = |path: &dyn std::fmt::Display| Thrown::not_found(format!("File does not exist: {path}"));
        match self.resolve(asker, src).await {
            Ok((path, resolved)) if resolved.walk.is_complete() => Ok((path, resolved)),
            Ok((path, _)) => Err(missing(&path)),
            Err(e) if e.kind == ErrorKind::NotADirectory => Err(missing(&src)),
            Err(e) => Err(e),
        }
    }

    /// The same of what may be missing.
    async fn look(&self, asker: &Asker, src: &str) -> Result<Option<(AbsPath, Resolved)>, Thrown> {
        match self.find(asker, src).await {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.kind == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The file that a path leads through.
    fn file_above(&self, path: &AbsPath) -> Result<Option<AbsPath>, Thrown> {
        let (view, mut folder, mut at) = (self.core.store.view(), InodeId::ROOT, AbsPath::root());
        for name in path.components() {
            at = at.join(name)?;
            match view.child(folder, name)? {
                Some(inode) if inode.folder => folder = InodeId(inode.id),
                Some(_) => return Ok(Some(at).filter(|at| at != path)),
                None => return Ok(None),
            }
        }
        Ok(None)
    }
}
