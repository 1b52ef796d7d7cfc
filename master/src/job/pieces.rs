//! A large file of a copy, written by all workers at once: each piece by the worker that has its block, or by the next in turn.
//!
//! Called by `copy`. The upload is begun and completed here, on the master, under the file's lease; a piece whose worker fails is written
//! again by another one. Whatever ends this early (an error, a cancelled job) has the upload aborted. One that a killed master was at stays in
//! the store, hidden, until the store's own expiry removes it; the resumed job begins anew.

use super::{Running, may_pass};
use crate::core::Core;
use crate::mount::Mounted;
use crate::namespace;
use crate::source;
use crate::worker::WorkerView;
use forebay_common::token::UfsSource;
use forebay_common::{Result, counter, err};
use forebay_proto::WritePiece;
use forebay_proto::journal::Reply;
use forebay_proto::store::Inode;
use forebay_proto::task::What;
use futures::{StreamExt, TryStreamExt};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::Semaphore;

counter!(PIECES, "forebay_master_copied_pieces_total", "pieces of large files that workers wrote to an under store");

/// The least bytes of a piece.
const PIECE_MIN_BYTES: u64 = 8 << 20;
/// Pieces of one job on their way at once: per worker, and together; fewer than the tasks that one worker takes.
const PIECES_PER_WORKER: usize = 4;
const PIECES_MAX: usize = 256;
/// Workers that a piece is tried with.
const TRIES: usize = 4;

/// Where a file goes, and from where.
pub struct Split {
    mounted: Arc<Mounted>,
    key: Vec<u8>,
    /// Bytes of each piece but the last.
    piece_bytes: u64,
}

fn ready(core: &Core) -> Vec<WorkerView> {
    core.soft.workers.live().into_iter().filter(|w| !w.leaving).collect()
}

/// Pieces of one job on their way at once, with so many workers.
pub fn at_once(workers: usize) -> usize {
    (PIECES_PER_WORKER * workers).min(PIECES_MAX)
}

/// `None` where one writer is as good, or the store takes no other way.
pub fn split(core: &Core, mounted: &Arc<Mounted>, key: &[u8], inode: &Inode) -> Option<Split> {
    let granule = mounted.ufs.piece_granule(key, inode.length)?;
    let piece_bytes = inode.block_size_bytes.max(PIECE_MIN_BYTES).next_multiple_of(granule);
    let worth_it = inode.length > piece_bytes && ready(core).len() > 1;
    worth_it.then(|| Split { mounted: mounted.clone(), key: key.to_vec(), piece_bytes })
}

/// An upload that is aborted unless it was completed.
pub struct Upload {
    split: Split,
    id: String,
    open: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.open {
            let (mounted, key, id) = (self.split.mounted.clone(), std::mem::take(&mut self.split.key), std::mem::take(&mut self.id));
            tokio::spawn(async move { mounted.ufs.abort_pieces(&key, &id).await });
        }
    }
}

/// `None`: the store does not take it in pieces after all, and the file has one writer.
pub async fn begin(split: Split, inode: &Inode) -> Option<Upload> {
    let (mounted, key, length) = (split.mounted.clone(), split.key.clone(), inode.length);
    // Not given up half-way: what was begun is aborted by whoever holds it.
    let begun = tokio::spawn(async move {
        let id = mounted.ufs.begin_pieces(&key, length).await?;
        Ok::<Upload, forebay_common::Error>(Upload { split, id, open: true })
    });
    match begun.await {
        Ok(Ok(upload)) => Some(upload),
        Ok(Err(e)) => {
            tracing::warn!(error = %e, "a file is copied by one worker, because its store does not take pieces");
            None
        }
        Err(e) => {
            tracing::error!(error = %e, "beginning an upload");
            None
        }
    }
}

/// Writes the bytes of `inode` and publishes them as the file that `made` created; its lease is kept alive by the caller. Returns the version
/// it has in the store.
pub async fn write(
    core: &Arc<Core>,
    running: &Running,
    at_once: &Semaphore,
    mut upload: Upload,
    inode: &Inode,
    ufs: Option<UfsSource>,
    made: &Reply,
) -> Result<String> {
    let counted = Counted { running, bytes: std::sync::atomic::AtomicU64::new(0) };
    let count = inode.length.div_ceil(upload.split.piece_bytes);
    let tags: Vec<Vec<String>> = futures::stream::iter(0..count)
        .map(|number| {
            let (counted, upload, ufs) = (&counted, &upload, ufs.clone());
            async move {
                let _turn = at_once.acquire().await;
                let start = number * upload.split.piece_bytes;
                piece(core, counted, upload, inode, ufs, number, start..inode.length.min(start + upload.split.piece_bytes)).await
            }
        })
        .buffered(PIECES_MAX)
        .try_collect()
        .await?;
    let tags = tags.into_iter().flatten().collect();
    core.hold_lease(made.file_id, made.lease_id).await?;
    let entry = upload.split.mounted.ufs.complete_pieces(&upload.split.key, &upload.id, tags, inode.length).await?;
    upload.open = false;
    Ok(entry.fingerprint)
}

/// Bytes told to the job's progress; taken back at the end, when the whole file is counted, or is not there.
struct Counted<'a> {
    running: &'a Running,
    bytes: std::sync::atomic::AtomicU64,
}

impl Counted<'_> {
    fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        self.running.job().bytes_done += bytes;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut job = self.running.job();
        job.bytes_done = job.bytes_done.saturating_sub(*self.bytes.get_mut());
    }
}

async fn piece(
    core: &Arc<Core>,
    counted: &Counted<'_>,
    upload: &Upload,
    inode: &Inode,
    ufs: Option<UfsSource>,
    number: u64,
    range: Range<u64>,
) -> Result<Vec<String>> {
    let length = range.end - range.start;
    counted.running.bandwidth.take(length).await;
    let holders = holders_of(core, inode, range.start);
    for attempt in 0..TRIES {
        let workers = ready(core);
        let holder = workers.iter().find(|w| attempt == 0 && holders.contains(&w.id));
        let turn = usize::try_from(number).unwrap_or(0) + attempt;
        let Some(worker) = holder.or_else(|| workers.get(turn % workers.len().max(1))) else {
            return Err(err!(Unavailable, "no worker is there to copy with"));
        };
        let order = WritePiece {
            from: Some(source::range_bytes(core, inode, ufs.clone(), worker.id, &range)?),
            mount_id: upload.split.mounted.id.get(),
            key: upload.split.key.clone().into(),
            upload: upload.id.clone(),
            number,
            offset: range.start,
            length,
        };
        match core.soft.tasks.submit(worker.id, What::WritePiece(order)).outcome().await {
            Ok(done) => {
                PIECES.inc();
                counted.add(length);
                return Ok(done.tags);
            }
            Err(e) if may_pass(&e) && attempt + 1 < TRIES => {
                tracing::warn!(error = %e, worker = worker.id.get(), number, "a piece of a copy is given to another worker");
            }
            Err(e) => return Err(e),
        }
    }
    Err(err!(Unavailable, "no worker could write the piece from {}", range.start))
}

/// Workers that have the block whole in which a range begins.
fn holders_of(core: &Core, inode: &Inode, start: u64) -> Vec<forebay_common::WorkerId> {
    let live = core.soft.workers.live();
    let block = namespace::blocks(inode).find(|(_, (at, length))| start >= *at && start < at + length);
    block.map_or_else(Vec::new, |(id, (_, length))| source::whole_on(core, &live, id, length))
}
