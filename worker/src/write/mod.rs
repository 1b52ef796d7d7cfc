//! Taking a new file in: its bytes become blocks of the tier and, written through, an object of the under store.
//!
//! One `FileWrite` per file being written, owned by a session; when it is dropped uncommitted everything it made is
//! removed. Nothing is visible before commit: the blocks are sealed into the store and the object published then, and
//! the master is told by the client. Right before the object is published, and for as long as that takes, the master is asked
//! to hold the writer's lease: a writer that slept past it publishes nothing. Where a written-through file finds no room in the tier it is written to the under
//! store alone; a file for the cache only fails with `NoSpace`.

mod block_writer;
mod open_log;

use crate::core::Core;
use crate::master::{MASTER_ANSWER, MASTER_WAIT, Master};
pub use block_writer::BlockWriter;
use bytes::Bytes;
use forebay_common::token::Claims;
use forebay_common::{BlockId, ErrorKind, MountId, Result, checksum, counter, err};
use forebay_proto::Committed;
use forebay_ufs::{UfsEntry, UfsWriter};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

counter!(pub WRITTEN, "forebay_worker_written_bytes_total", "bytes taken in from writers");

counter!(pub WRITTEN_UFS, "forebay_worker_written_through_bytes_total", "bytes of files that are in an under store when their write was committed");

counter!(
    UNPUBLISHED,
    "forebay_worker_writes_unpublished_total",
    "files not published, because the store failed or their writer's lease was over or could not be asked for"
);

/// Pieces that may wait for a slow under store.
const UFS_QUEUE: usize = 8;

/// A file being written.
pub struct FileWrite {
    core: Arc<Core>,
    claims: Claims,
    length: u64,
    current: Option<BlockWriter>,
    sealed: Vec<BlockId>,
    done: Vec<(BlockId, u64)>,
    caching: bool,
    ufs: Option<UfsTask>,
}

struct UfsTask {
    queue: mpsc::Sender<Bytes>,
    done: JoinHandle<Result<UfsWriter>>,
}

impl FileWrite {
    /// Starts. Errors: the under store cannot be reached.
    pub async fn open(core: Arc<Core>, claims: Claims) -> Result<FileWrite> {
        let ufs = match &claims.ufs {
            Some(source) => {
                let writer = core.under_store(MountId(source.mount_id)).await?.writer(&source.key).await?;
                Some(UfsTask::start(writer))
            }
            None if claims.write_cached => None,
            None => return Err(err!(InvalidArgument, "a write that goes nowhere")),
        };
        let caching = claims.write_cached;
        Ok(FileWrite { core, claims, length: 0, current: None, sealed: Vec::new(), done: Vec::new(), caching, ufs })
    }

    /// The token was renewed with more blocks.
    pub fn extend(&mut self, claims: Claims) -> Result<()> {
        if claims.file_id != self.claims.file_id || claims.lease_id != self.claims.lease_id {
            return Err(err!(Unauthenticated, "block token of another file or lease"));
        }
        self.claims = claims;
        Ok(())
    }

    /// Takes the next bytes, which belong into `block`.
    pub async fn write(&mut self, block: BlockId, offset: u64, crc: u32, bytes: Bytes) -> Result<()> {
        if bytes.is_empty() {
            return Err(err!(InvalidArgument, "a piece without bytes"));
        }
        if checksum::crc32c(&bytes) != crc {
            return Err(err!(Corrupt, "written bytes arrived with a wrong checksum"));
        }
        if offset != self.length {
            return Err(err!(InvalidArgument, "written bytes are for offset {offset}, and {} are here", self.length));
        }
        if self.claims.write_cached {
            let start = self.claims.block_offset(block).ok_or_else(|| err!(Unauthenticated, "block token does not cover block {block}"))?;
            if offset < start || offset + bytes.len() as u64 > start + self.claims.block_size_bytes {
                return Err(err!(InvalidArgument, "written bytes do not lie inside block {block}"));
            }
        }
        WRITTEN.inc_by(bytes.len() as u64);
        self.length += bytes.len() as u64;
        if let Some(ufs) = &self.ufs
            && ufs.queue.send(bytes.clone()).await.is_err()
        {
            return Err(self.ufs_error().await);
        }
        if self.claims.write_cached {
            self.write_block(block, bytes).await?;
        }
        Ok(())
    }

    async fn write_block(&mut self, block: BlockId, bytes: Bytes) -> Result<()> {
        if self.current.as_ref().is_some_and(|c| c.block() != block) {
            self.seal().await?;
        }
        let current = match self.current.take() {
            Some(current) => current,
            None => BlockWriter::new(self.core.store.clone(), &self.claims, block, self.ufs.is_none()),
        };
        let caching = self.caching;
        let (current, result) = tokio::task::spawn_blocking(move || {
            let mut current = current;
            let appended = if caching { current.append(&bytes) } else { Ok(()) };
            // What is not kept counts: a written-through file goes on without the cache.
            if !caching || appended.is_err() {
                current.skip(bytes.len());
            }
            (current, appended)
        })
        .await
        .map_err(|e| err!(Internal, "write task: {e}"))?;
        self.current = Some(current);
        self.or_uncached(result)
    }

    /// A written-through file goes on without the cache.
    fn or_uncached(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Err(e) if self.ufs.is_some() && self.caching => {
                tracing::info!(error = %e, file = self.claims.file_id, "a file is written to the under store only");
                self.caching = false;
                Ok(())
            }
            other => other,
        }
    }

    async fn seal(&mut self) -> Result<()> {
        let Some(mut current) = self.current.take() else { return Ok(()) };
        let (block, length, caching, store) = (current.block(), current.length(), self.caching, self.core.store.clone());
        self.done.push((block, length));
        if !caching {
            return Ok(());
        }
        let sealed = tokio::task::spawn_blocking(move || current.seal().and_then(|file| store.insert(Arc::new(file)))).await;
        let sealed = sealed.map_err(|e| err!(Internal, "write task: {e}"))?;
        if sealed.is_ok() {
            self.sealed.push(block);
        }
        self.or_uncached(sealed)
    }

    async fn ufs_error(&mut self) -> forebay_common::Error {
        match self.ufs.take() {
            Some(task) => match task.done.await {
                Ok(Err(e)) => e,
                _ => err!(UnderStore, "the under store's writer ended early"),
            },
            None => err!(UnderStore, "the under store's writer ended early"),
        }
    }

    /// Seals the last block, publishes the object, and says what was written. Errors: nothing stays then.
    pub async fn commit(mut self, length: u64) -> Result<Committed> {
        if length != self.length {
            return Err(err!(InvalidArgument, "the writer says {length} bytes, and {} arrived", self.length));
        }
        self.seal().await?;
        let mut fingerprint = String::new();
        if let Some(task) = self.ufs.take() {
            let entry = publish(&self.core.master, self.claims.file_id, self.claims.lease_id, task.settle().await?).await?;
            if entry.length != length {
                return Err(err!(UnderStore, "the under store holds {} bytes instead of {length}", entry.length));
            }
            WRITTEN_UFS.inc_by(length);
            fingerprint = entry.fingerprint;
        }
        self.sealed.clear();
        Ok(Committed {
            length,
            block_ids: self.done.iter().map(|(id, _)| id.get()).collect(),
            block_lengths: self.done.iter().map(|(_, length)| *length).collect(),
            fingerprint,
        })
    }
}

impl Drop for FileWrite {
    fn drop(&mut self) {
        for block in &self.sealed {
            self.core.store.remove(*block);
        }
        if let Some(task) = self.ufs.take() {
            tokio::spawn(async move {
                drop(task.queue);
                if let Ok(Ok(writer)) = task.done.await {
                    writer.abort().await;
                }
            });
        }
    }
}

/// Publishes an object under a lease. While the lease is not known to hold, nothing is done about publishing; what was on its way
/// by then may still arrive.
pub async fn publish(master: &Master, file_id: u64, lease_id: u64, mut writer: UfsWriter) -> Result<UfsEntry> {
    let published = async {
        let mut held = master.hold_lease(file_id, lease_id, Instant::now() + MASTER_WAIT).await?;
        let mut close = std::pin::pin!(writer.close());
        loop {
            let remaining = held.saturating_duration_since(Instant::now());
            // The lease is looked at first: a worker that was stopped for a while goes on only after asking again.
            tokio::select! {
                biased;
                () = tokio::time::sleep(remaining / 2), if !remaining.is_zero() => {}
                published = &mut close, if !remaining.is_zero() => return published,
                else => {}
            }
            held = master.hold_lease(file_id, lease_id, held.max(Instant::now() + MASTER_ANSWER)).await?;
        }
    };
    let published = published.await;
    if published.is_err() {
        UNPUBLISHED.inc();
        writer.abort().await;
    }
    published
}

impl UfsTask {
    fn start(mut writer: UfsWriter) -> UfsTask {
        let (queue, mut waiting) = mpsc::channel::<Bytes>(UFS_QUEUE);
        let done = tokio::spawn(async move {
            while let Some(bytes) = waiting.recv().await {
                if let Err(e) = writer.write(bytes).await {
                    writer.abort().await;
                    return Err(e);
                }
            }
            Ok(writer)
        });
        UfsTask { queue, done }
    }

    /// All bytes are taken in; only publishing is left.
    async fn settle(self) -> Result<UfsWriter> {
        drop(self.queue);
        match self.done.await {
            Ok(Ok(mut writer)) => match writer.settle().await {
                Ok(()) => Ok(writer),
                Err(e) => {
                    writer.abort().await;
                    Err(e)
                }
            },
            Ok(Err(e)) => Err(e),
            Err(e) => Err(forebay_common::Error::new(ErrorKind::Internal, format!("under store task: {e}"))),
        }
    }
}
