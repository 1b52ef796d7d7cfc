//! The master as a NameNode: Hadoop's ClientProtocol in front of the same namespace.
//!
//! `server` takes connections, `connection` reads calls and writes answers, `dispatch` finds a call's handler; `names` (what is
//! there), `attributes`, `writing` (files under construction), `locate` (where blocks are, for whom) and `cluster` (what a client asks about the cluster) are the
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
mod server;
mod status;
mod writing;

pub use server::serve;
pub use writing::recover;

use crate::core::Core;
use crate::mount::Resolved;
use crate::namespace::Walk;
use crate::service::FileSystemService;
use crate::store::Reader;
use asker::Asker;
use exception::Thrown;
use forebay_common::{AbsPath, InodeId};
use std::sync::Arc;

/// What every handler has at hand.
pub struct Hadoop {
    core: Arc<Core>,
    /// Our own service, for the calls that are the same.
    fs: FileSystemService,
}

impl Hadoop {
    /// A path as Hadoop's clients send it; `/.reserved/.inodes/ID` is the file of that id, wherever it is now.
    fn path(&self, src: &str) -> Result<AbsPath, Thrown> {
        let Some(rest) = src.strip_prefix("/.reserved/.inodes/") else { return Ok(AbsPath::parse(src)?) };
        let (id, below) = rest.split_once('/').unwrap_or((rest, ""));
        let id = id.parse().map_err(|_| Thrown::not_found(format!("{src} names no inode")))?;
        let top = self.core.store.view().path_of(InodeId(id)).map_err(|_| Thrown::not_found(format!("{src} does not exist")))?;
        Ok(below.split('/').filter(|name| !name.is_empty()).try_fold(top, |at, name| at.join(name.as_bytes()))?)
    }

    /// Resolves a path in step with its under store.
    async fn resolve(&self, asker: &Asker, src: &str) -> Result<(AbsPath, Resolved), Thrown> {
        let path = self.path(src)?;
        let who = self.core.identity.who(&asker.user);
        let resolved = self.core.syncer.resolve(&self.core, &who, &path).await?;
        check_no_file_above(&resolved.walk, &path)?;
        Ok((path, resolved))
    }

    /// The same of what must be there.
    async fn find(&self, asker: &Asker, src: &str) -> Result<(AbsPath, Resolved), Thrown> {
        let (path, resolved) = self.resolve(asker, src).await?;
        if !resolved.walk.is_complete() {
            return Err(Thrown::not_found(format!("File does not exist: {path}")));
        }
        Ok((path, resolved))
    }
}

/// A path that leads through a file is refused, not missing, as in HDFS.
fn check_no_file_above(walk: &Walk, path: &AbsPath) -> Result<(), Thrown> {
    let deepest = walk.deepest();
    if walk.is_complete() || deepest.inode.folder {
        return Ok(());
    }
    let above = path.components().take(walk.chain.len() - 1).try_fold(AbsPath::root(), |at, name| at.join(name))?;
    Err(Thrown::parent_not_directory(format!("{above} (is not a directory)")))
}
