//! Everything below a path, in step with its under store: several folders at a time, in no order.
//!
//! Called by jobs (`entries`) and by `loadMetadata` and `checkConsistency` (`load_metadata`). Memory: the names of folders that
//! wait to be listed, and what the receiver has not taken yet.

use super::raw;
use super::sync::{Looked, Resolved};
use crate::core::Core;
use crate::namespace::{self, EXECUTE, READ, Who};
use crate::store::Reader;
use forebay_common::limits::LIST_BATCH_ENTRIES;
use forebay_common::{AbsPath, Error, ErrorKind, InodeId, Result};
use forebay_proto::store::Inode;
use forebay_proto::{Difference, LoadMetadataResponse};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;

/// Folders listed at a time.
const LISTED_AT_ONCE: usize = 8;

/// A file or folder below the path.
pub struct Entry {
    pub path: AbsPath,
    pub inode: Inode,
}

/// An entry, or what could not be looked at.
pub type Told = Result<Entry, (AbsPath, Error)>;

/// Calls `visit` for a folder and, with what it returns, for folders below, until there are none or it fails with `None`.
async fn walk<F>(core: &Arc<Core>, who: &Who, top: AbsPath, visit: impl Fn(AbsPath, Resolved) -> F) -> Vec<(AbsPath, Error)>
where
    F: Future<Output = Result<Option<Vec<AbsPath>>>>,
{
    let (mut folders, mut failures) = (vec![top.clone()], Vec::new());
    let mut under_way = FuturesUnordered::new();
    loop {
        while under_way.len() < LISTED_AT_ONCE
            && let Some(path) = folders.pop()
        {
            let visit = &visit;
            under_way.push(async move {
                let visited = async {
                    let resolved = core.syncer.resolve(core, who, &path).await?;
                    namespace::check(who, &resolved.found(&path)?.inode, READ | EXECUTE, &path)?;
                    visit(path.clone(), resolved).await
                };
                let visited = visited.await;
                (path, visited)
            });
        }
        match under_way.next().await {
            None => return failures,
            Some((_, Ok(Some(below)))) => folders.extend(below),
            Some((_, Ok(None))) => return failures,
            // Gone since its folder was listed.
            Some((path, Err(e))) if e.kind() == ErrorKind::NotFound && path != top => {}
            Some((path, Err(e))) => failures.push((path, e)),
        }
    }
}

/// Sends a file, or all that lies below a folder, as it is known once each folder was brought in step. Ends early when nobody
/// receives any more.
pub async fn entries(core: &Arc<Core>, who: &Who, top: AbsPath, sender: &mpsc::Sender<Told>) {
    let resolved = match core.syncer.resolve(core, who, &top).await.and_then(|r| r.found(&top).map(|f| f.inode.clone())) {
        Ok(inode) => inode,
        Err(e) => return drop(sender.send(Err((top, e))).await),
    };
    if !resolved.folder {
        return drop(sender.send(Ok(Entry { path: top, inode: resolved })).await);
    }
    let failures = walk(core, who, top, move |path: AbsPath, resolved: Resolved| async move {
        core.syncer.sync_folder(core, &path, &resolved).await?;
        let id = resolved.found(&path)?.id();
        let (mut below, mut after): (Vec<AbsPath>, Option<Vec<u8>>) = (Vec::new(), None);
        loop {
            let batch = core.store.view().children(id, after.as_deref(), LIST_BATCH_ENTRIES)?;
            let whole = batch.len() < LIST_BATCH_ENTRIES;
            after = batch.last().map(|(name, _)| name.clone());
            for (name, inode) in batch {
                let child = path.join(&name)?;
                if inode.folder {
                    below.push(child.clone());
                }
                if sender.send(Ok(Entry { path: child, inode })).await.is_err() {
                    return Ok(None);
                }
            }
            if whole {
                return Ok(Some(below));
            }
        }
    })
    .await;
    for failure in failures {
        let _ = sender.send(Err(failure)).await;
    }
}

/// Brings a folder, or all below it, in step now; with `only_check` tells what differs and changes nothing.
pub async fn load_metadata(
    core: &Arc<Core>,
    who: &Who,
    top: AbsPath,
    recursive: bool,
    only_check: bool,
    sender: &mpsc::Sender<LoadMetadataResponse>,
) {
    let (folders, entries, changes) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (folders, entries, changes) = (&folders, &entries, &changes);
    let told = |differences, failures| LoadMetadataResponse {
        folders: folders.load(Ordering::Relaxed),
        entries: entries.load(Ordering::Relaxed),
        changes: changes.load(Ordering::Relaxed),
        differences,
        failures,
    };
    let told = &told;
    let failures = walk(core, who, top, move |path: AbsPath, resolved: Resolved| async move {
        if !resolved.found(&path)?.inode.folder {
            entries.fetch_add(1, Ordering::Relaxed);
            return Ok(Some(Vec::new()));
        }
        let looked: Looked = core.syncer.look_at_folder(core, &path, &resolved, only_check).await?;
        folders.fetch_add(1, Ordering::Relaxed);
        entries.fetch_add(looked.entries, Ordering::Relaxed);
        changes.fetch_add(looked.changes, Ordering::Relaxed);
        let differences = looked.differences.iter().map(|(path, what)| Difference { path: raw(path), what: (*what).to_owned() }).collect();
        if sender.send(told(differences, Vec::new())).await.is_err() {
            return Ok(None);
        }
        if !recursive {
            return Ok(Some(Vec::new()));
        }
        subfolders(core, resolved.found(&path)?.id(), &path).map(Some)
    })
    .await;
    let failures = failures.iter().map(|(path, e)| Difference { path: raw(path), what: e.to_string() }).collect();
    let _ = sender.send(told(Vec::new(), failures)).await;
}

fn subfolders(core: &Core, id: InodeId, path: &AbsPath) -> Result<Vec<AbsPath>> {
    let (mut below, mut after): (Vec<AbsPath>, Option<Vec<u8>>) = (Vec::new(), None);
    loop {
        let batch = core.store.view().children(id, after.as_deref(), LIST_BATCH_ENTRIES)?;
        for (name, _) in batch.iter().filter(|(_, inode)| inode.folder) {
            below.push(path.join(name)?);
        }
        match batch.last() {
            Some((name, _)) if batch.len() == LIST_BATCH_ENTRIES => after = Some(name.clone()),
            _ => return Ok(below),
        }
    }
}
