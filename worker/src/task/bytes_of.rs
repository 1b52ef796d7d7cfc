//! The bytes of a file in order, for a worker that writes it elsewhere: from its own blocks, other workers', or the under store.

use super::copy::Peer;
use crate::core::Core;
use crate::store::BlockFile;
use bytes::Bytes;
use forebay_common::token::{BlockRun, Claims, UfsSource};
use forebay_common::{BlockId, Result, err};
use forebay_proto::{BlockSource, FileBytes};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Bytes of one piece.
const PIECE_BYTES: u64 = 4 << 20;
/// Pieces that wait for whoever takes them.
const PIECES_AHEAD: usize = 4;

/// A file as a token would describe it.
pub fn claims(file: &FileBytes) -> Claims {
    let ufs = (file.mount_id > 0).then(|| UfsSource {
        mount_id: file.mount_id,
        key: file.key.to_vec(),
        fingerprint: file.fingerprint.clone(),
        previous_key: file.previous_key.to_vec(),
    });
    Claims {
        file_id: file.file_id,
        blocks: file.runs.chunks_exact(2).map(|run| BlockRun { first: run[0], count: run[1] }).collect(),
        block_size_bytes: file.block_size_bytes,
        short_blocks: file.short_blocks.clone(),
        length_bytes: file.length,
        page_size_bytes: file.page_size_bytes,
        ufs,
        ..Claims::default()
    }
}

/// Starts reading a range. What comes ends with an error, or with the last byte.
pub fn range(core: &Arc<Core>, file: FileBytes, range: Range<u64>) -> mpsc::Receiver<Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
    let core = core.clone();
    tokio::spawn(async move {
        let claims = claims(&file);
        let blocks = claims.blocks.iter().flat_map(|run| run.first..run.first + run.count);
        for id in blocks.map(BlockId) {
            if sender.is_closed() {
                return;
            }
            let read = match claims.block_span(id) {
                Some((start, length)) => {
                    let (from, to) = (range.start.saturating_sub(start), range.end.saturating_sub(start).min(length));
                    if from >= to {
                        continue;
                    }
                    block(&core, &file, &claims, id, from..to, &sender).await
                }
                None => Err(err!(InvalidArgument, "block {id} is not of this file")),
            };
            if let Err(e) = read {
                let _ = sender.send(Err(e)).await;
                return;
            }
        }
    });
    receiver
}

fn file_sources(file: &FileBytes, id: BlockId) -> Option<&BlockSource> {
    file.sources.iter().find(|s| s.block_id == id.get())
}

/// A range of a block's bytes.
async fn block(
    core: &Arc<Core>,
    file_of: &FileBytes,
    claims: &Claims,
    id: BlockId,
    range: Range<u64>,
    sender: &mpsc::Sender<Result<Bytes>>,
) -> Result<()> {
    let (file_offset, length) = claims.block_span(id).ok_or_else(|| err!(InvalidArgument, "block {id} is not of this file"))?;
    let store = core.store.clone();
    let here = tokio::task::spawn_blocking(move || store.peek_read(id).filter(|b| b.is_full()));
    let mut here: Option<Arc<BlockFile>> = here.await.map_err(|e| err!(Internal, "read task: {e}"))?.filter(|b| b.header.length_bytes == length);
    let mut peer = match file_sources(file_of, id).filter(|_| here.is_none()) {
        // With an under store to fall back on, a worker that does not answer is passed by.
        Some(source) => match Peer::connect(core, source).await {
            Err(e) if claims.ufs.is_none() => return Err(e),
            other => other.ok(),
        },
        None => None,
    };
    let mut at = range.start;
    while at < range.end {
        let piece = PIECE_BYTES.min(range.end - at);
        let bytes = if let Some(file) = here.clone() {
            let read = tokio::task::spawn_blocking(move || {
                let read = file.verify_range(at, piece as usize).and_then(|()| file.bytes(at, piece as usize));
                (file, read)
            });
            match read.await.map_err(|e| err!(Internal, "read task: {e}"))? {
                (_, Ok(bytes)) => bytes,
                // Damaged: dropped, and read from elsewhere where it is elsewhere.
                (file, Err(e)) => {
                    core.store.note_read_error(&file, &e);
                    here = None;
                    match file_sources(file_of, id) {
                        Some(source) => peer = Some(Peer::connect(core, source).await?),
                        None if claims.ufs.is_none() => return Err(e),
                        None => {}
                    }
                    continue;
                }
            }
        } else if let Some(from) = &mut peer {
            match from.read(at, range.end - at).await {
                Err(_) if claims.ufs.is_some() => {
                    peer = None;
                    continue;
                }
                other => other?,
            }
        } else if let Some(source) = &claims.ufs {
            crate::ufs_read::fetch(core, source, file_offset + at, piece as usize).await?
        } else {
            return Err(err!(Unavailable, "block {id} is neither here nor on another worker, and its file is in no under store"));
        };
        at += bytes.len() as u64;
        if sender.send(Ok(bytes)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
