//! Blocks whose file is about to be in no under store: kept whole, and as the only copies of their bytes; and the block that takes the place of one of them.

use super::copy::Peer;
use super::load;
use crate::core::Core;
use crate::write::BlockWriter;
use bytes::Bytes;
use forebay_common::token::Claims;
use forebay_common::{BlockId, ErrorKind, Result, err};
use forebay_proto::{LoadBlock, RewriteBlock};
use std::sync::Arc;

/// Bytes taken from the older block at once.
const PIECE_BYTES: u64 = 4 << 20;
/// Tries of a block that is gone when it was just loaded.
const TRIES: u32 = 4;

/// Returns the bytes that were fetched for it. Errors: `NoSpace` when the block cannot be kept here.
pub async fn hold(core: &Arc<Core>, order: LoadBlock) -> Result<u64> {
    let id = BlockId(order.block_id);
    let mut fetched = 0;
    for attempt in 1.. {
        let store = core.store.clone();
        let held = tokio::task::spawn_blocking(move || store.hold(id)).await.map_err(|e| err!(Internal, "hold task: {e}"))?;
        match held {
            Err(e) if e.kind() == ErrorKind::NotFound && attempt < TRIES => {}
            held => return held.map(|()| fetched),
        }
        match load::load(core, order.clone()).await {
            Ok(bytes) => fetched += bytes,
            // An order to drop it, given before, may have come in between.
            Err(e) if e.kind() == ErrorKind::NoSpace && attempt < TRIES - 1 => {}
            Err(e) => return Err(e),
        }
    }
    Ok(fetched)
}

/// Makes a block that begins with the first bytes of another: whole, or open for its file's writer. One that is there already stays as it is. Returns its length.
pub async fn rewrite(core: &Arc<Core>, order: RewriteBlock) -> Result<u64> {
    let id = BlockId(order.block_id);
    let (at_work, seal) = (core.clone(), order.seal);
    let there = tokio::task::spawn_blocking(move || -> Result<Option<u64>> {
        match at_work.open_blocks.get(id)? {
            // It was begun after all, and may hold more by now.
            Some(open) if seal => open.end(&at_work, true)?,
            Some(open) => return Ok(Some(open.acknowledged())),
            None => None,
        };
        Ok(at_work.store.peek_read(id).map(|b| b.header.length_bytes))
    });
    if let Some(length) = there.await.map_err(|e| err!(Internal, "rewrite task: {e}"))?? {
        return Ok(length);
    }
    let source = order.source.ok_or_else(|| err!(InvalidArgument, "an order without a source"))?;
    let old = BlockId(source.block_id);
    let here = core.store.clone();
    let here = tokio::task::spawn_blocking(move || here.peek_read(old).filter(|b| b.is_full())).await;
    let here = here.map_err(|e| err!(Internal, "rewrite task: {e}"))?.filter(|b| b.header.length_bytes >= order.length);
    let mut peer = match here {
        Some(_) => None,
        None => Some(Peer::connect(core, &source).await?),
    };
    let claims = Claims {
        file_id: order.file_id,
        lease_id: order.lease_id,
        page_size_bytes: order.page_size_bytes,
        block_size_bytes: order.capacity,
        mount_id: order.mount_id,
        ..Claims::default()
    };
    let mut writer = BlockWriter::new(core.store.clone(), &claims, id, true);
    let mut at = 0;
    while at < order.length {
        let left = order.length - at;
        let bytes: Option<Bytes> = match &mut peer {
            Some(peer) => Some(peer.read(at, left).await?),
            None => None,
        };
        let here = here.clone();
        let appended = tokio::task::spawn_blocking(move || {
            let bytes = match (bytes, here) {
                (Some(bytes), _) => bytes,
                (None, Some(file)) => {
                    let piece = usize::try_from(left.min(PIECE_BYTES)).unwrap_or(0);
                    file.verify_range(at, piece)?;
                    file.bytes(at, piece)?
                }
                (None, None) => return Err(err!(Internal, "block {old} is nowhere")),
            };
            writer.append(&bytes).map(|()| (writer, bytes.len() as u64))
        });
        let (back, taken) = appended.await.map_err(|e| err!(Internal, "rewrite task: {e}"))??;
        (writer, at) = (back, at + taken);
    }
    let core_of_task = core.clone();
    let made = tokio::task::spawn_blocking(move || {
        if order.seal {
            let file = writer.seal()?;
            return core_of_task.store.insert(Arc::new(file));
        }
        // Without leaving files that nobody in this process knows.
        if let Err(e) = writer.sync() {
            writer.discard();
            return Err(e);
        }
        match core_of_task.open_blocks.begin(writer) {
            Ok((open, turn)) => drop(open.detach(turn)),
            Err((writer, e)) => {
                writer.discard();
                return Err(e);
            }
        }
        Ok(())
    });
    made.await.map_err(|e| err!(Internal, "rewrite task: {e}"))??;
    if seal {
        core.reporter.report_now().await;
    }
    Ok(order.length)
}
