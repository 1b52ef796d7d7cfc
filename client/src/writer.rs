//! `FileWriter`: a new file on its way to a worker. It appears whole when `close` returns, and not at all before.

use crate::block::{Answers, Connection};
use crate::counters::add;
use crate::file_system::{CreateOptions, Inner};
use bytes::{Bytes, BytesMut};
use forebay_common::{AbsPath, Error, Result, checksum, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::*;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes gathered before they are sent.
const PIECE_BYTES: usize = 1 << 20;
/// Block ids asked for at once, at most.
const BLOCKS_AHEAD_MAX: u32 = 64;

/// A file being written. Dropped without `close`, it is abandoned.
pub struct FileWriter {
    inner: Arc<Inner>,
    path: AbsPath,
    status: FileStatus,
    target: WriteTarget,
    connection: Connection,
    write: Answers,
    cached: bool,
    buffer: BytesMut,
    sent: u64,
    blocks: VecDeque<u64>,
    next_blocks: u32,
    fresh_token: Bytes,
    finished: bool,
    broken: bool,
    renewed: Instant,
}

impl FileWriter {
    pub(crate) async fn create(inner: Arc<Inner>, path: &AbsPath, options: &CreateOptions) -> Result<FileWriter> {
        let local_workers = inner.local_ids().await;
        let write_type = if options.write_type.is_empty() { inner.config.write_type.clone() } else { options.write_type.clone() };
        let m = &inner.master;
        let created = m
            .change(|caller| {
                let request = CreateRequest {
                    caller,
                    path: Bytes::copy_from_slice(path.as_bytes()),
                    overwrite: options.overwrite,
                    recursive: options.recursive,
                    mode: options.mode,
                    block_size_bytes: options.block_size_bytes,
                    write_type: write_type.clone(),
                    local_workers: local_workers.clone(),
                    avoid_workers: Vec::new(),
                    replicas: options.replicas,
                    replace: options.replace,
                    only_file: options.only_file,
                    only_content: options.only_content,
                    node: inner.config.node_name.clone(),
                };
                let mut files = m.files.clone();
                async move { files.create(request).await }
            })
            .await?;
        let missing = || err!(Internal, "the master answered a creation without a target");
        let (status, target) = (created.status.ok_or_else(missing)?, created.target.ok_or_else(missing)?);
        inner.keep_lease(target.lease_id, target.lease_ttl_ms);
        let opened = open_on_worker(&inner, &target).await;
        let (connection, write) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                abandon(&inner, target.file_id, target.lease_id).await;
                return Err(e.context(format!("writing {path}")));
            }
        };
        Ok(FileWriter {
            path: path.clone(),
            blocks: target.block_ids.iter().copied().collect(),
            // Without blocks the bytes go to the under store alone.
            cached: !target.block_ids.is_empty(),
            inner,
            status,
            target,
            connection,
            write,
            buffer: BytesMut::new(),
            sent: 0,
            next_blocks: 1,
            fresh_token: Bytes::new(),
            finished: false,
            broken: false,
            renewed: Instant::now(),
        })
    }

    /// The file as it was made: empty, and not complete.
    pub fn status(&self) -> &FileStatus {
        &self.status
    }

    /// Appends. Errors: the worker or the under store failed; the file must be written again.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            // A piece never crosses a block's end.
            let position = self.sent + self.buffer.len() as u64;
            let room = (self.status.block_size_bytes - position % self.status.block_size_bytes) as usize;
            let take = bytes.len().min(room).min(PIECE_BYTES - self.buffer.len());
            if self.buffer.is_empty() && take == PIECE_BYTES.min(room) {
                // A whole piece goes out as it is.
                self.send(&bytes[..take]).await?;
            } else {
                self.buffer.extend_from_slice(&bytes[..take]);
                if self.buffer.len() == PIECE_BYTES || take == room {
                    let piece = self.buffer.split();
                    self.send(&piece).await?;
                }
            }
            bytes = &bytes[take..];
        }
        Ok(())
    }

    /// Once a piece was lost (an error, a cancelled call) nothing may follow it.
    async fn send(&mut self, piece: &[u8]) -> Result<()> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(err!(Expired, "{} lost bytes in an earlier write that failed: write it again", self.path));
        }
        self.send_piece(piece).await?;
        self.broken = false;
        Ok(())
    }

    async fn send_piece(&mut self, piece: &[u8]) -> Result<()> {
        if let Some(e) = self.write.try_error() {
            return Err(self.failed(e));
        }
        let block_id = if self.cached { self.block_for(self.sent).await? } else { 0 };
        let data = WriteData {
            write_id: Connection::id_of(&self.write),
            block_id,
            offset: self.sent,
            crc: checksum::crc32c(piece),
            token: std::mem::take(&mut self.fresh_token),
        };
        if let Err(e) = self.connection.send_only(Op::WriteData(data), piece).await {
            return Err(self.failed(e));
        }
        self.sent += piece.len() as u64;
        let counters = &self.inner.counters;
        add(if self.connection.is_domain() { &counters.written_domain } else { &counters.written_remote }, piece.len());
        Ok(())
    }

    async fn block_for(&mut self, offset: u64) -> Result<u64> {
        let starts = offset.is_multiple_of(self.status.block_size_bytes);
        if starts && offset > 0 {
            self.blocks.pop_front();
        }
        if self.blocks.is_empty() {
            let count = self.next_blocks;
            self.next_blocks = (self.next_blocks * 2).min(BLOCKS_AHEAD_MAX);
            let m = &self.inner.master;
            let (file_id, lease_id) = (self.target.file_id, self.target.lease_id);
            let more = m
                .change(|caller| {
                    let mut files = m.files.clone();
                    async move { files.add_blocks(AddBlocksRequest { caller, file_id, lease_id, count }).await }
                })
                .await?;
            self.blocks.extend(more.block_ids);
            self.fresh_token = more.token;
        }
        self.blocks.front().copied().ok_or_else(|| err!(Internal, "the master gave no block"))
    }

    fn failed(&self, e: Error) -> Error {
        e.context(format!("writing {} (write it again)", self.path))
    }

    /// Has the last bytes written, the file published, and the master told: then it is there.
    pub async fn close(self) -> Result<FileStatus> {
        self.close_as_of(0, 0).await
    }

    /// The same for bytes that were written earlier: milliseconds since 1970 and nanoseconds beyond; 0: now.
    pub async fn close_as_of(mut self, modified_ms: u64, modified_ns: u32) -> Result<FileStatus> {
        let piece = self.buffer.split();
        if !piece.is_empty() {
            self.send(&piece).await?;
        }
        if self.broken {
            return Err(err!(Expired, "{} lost bytes in an earlier write that failed: write it again", self.path));
        }
        // A writer that slept past its lease must not publish over what somebody else wrote since.
        if self.renewed.elapsed() > Duration::from_millis(self.target.lease_ttl_ms / 3) {
            self.inner.renew_lease(self.target.lease_id).await.map_err(|e| self.failed(e))?;
        }
        let commit = CommitWrite { write_id: Connection::id_of(&self.write), length: self.sent };
        let answer = match self.connection.call(Op::CommitWrite(commit)).await {
            Ok(received) => received.answer,
            Err(e) => {
                // The reason came as an answer to the write itself, where it failed before the commit.
                let e = self.write.try_error().unwrap_or(e);
                return Err(self.failed(e));
            }
        };
        let Answer::Committed(committed) = answer else { return Err(self.failed(err!(Unavailable, "the worker answered something else"))) };
        let blocks = committed
            .block_ids
            .iter()
            .zip(&committed.block_lengths)
            .map(|(id, length)| WrittenBlock { id: *id, length: *length })
            .collect::<Vec<_>>();
        let m = &self.inner.master;
        let completed = m
            .change(|caller| {
                let request = CompleteRequest {
                    caller,
                    file_id: self.target.file_id,
                    lease_id: self.target.lease_id,
                    length: committed.length,
                    blocks: blocks.clone(),
                    fingerprint: committed.fingerprint.clone(),
                    modified_ms,
                    modified_ns,
                };
                let mut files = m.files.clone();
                async move { files.complete(request).await }
            })
            .await?;
        self.finished = true;
        self.inner.end_lease(self.target.lease_id);
        completed.status.ok_or_else(|| err!(Internal, "the master answered without a status"))
    }

    /// Gives up: nothing of the file stays.
    pub async fn abort(mut self) {
        self.finished = true;
        let _ = self.connection.send_only(Op::AbortWrite(AbortWrite { write_id: Connection::id_of(&self.write) }), &[]).await;
        abandon(&self.inner, self.target.file_id, self.target.lease_id).await;
    }
}

async fn open_on_worker(inner: &Inner, target: &WriteTarget) -> Result<(Connection, Answers)> {
    let address = target.worker.as_ref().ok_or_else(|| err!(Internal, "the master named no worker"))?;
    let connection = inner.pool.dedicated(address).await?;
    let mut write = connection.request(Op::OpenWrite(OpenWrite { token: target.token.clone() }), &[], 4).await?;
    match write.next().await?.answer {
        Answer::Ack(_) => Ok((connection, write)),
        _ => Err(err!(Unavailable, "the worker answered something else")),
    }
}

async fn abandon(inner: &Inner, file_id: u64, lease_id: u64) {
    inner.end_lease(lease_id);
    let m = &inner.master;
    let abandoned = m
        .change(|caller| {
            let mut files = m.files.clone();
            async move { files.abandon(AbandonRequest { caller, file_id, lease_id }).await }
        })
        .await;
    if let Err(e) = abandoned {
        tracing::warn!(error = %e, file_id, "an unfinished file stays until its lease runs out");
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.inner.end_lease(self.target.lease_id);
        let (inner, file_id, lease_id) = (self.inner.clone(), self.target.file_id, self.target.lease_id);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { abandon(&inner, file_id, lease_id).await });
        }
    }
}
