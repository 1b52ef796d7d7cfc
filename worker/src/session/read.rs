//! Streamed reads and fills.

use super::outbox::Outbox;
use crate::core::Core;
use crate::read_out::{ReadOut, WINDOW_BYTES, pages, windows};
use crate::ufs_read::{self, Target};
use forebay_common::token::Claims;
use forebay_common::{BlockId, ErrorKind, Result, err};
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{BadChunk, Fill, ReadBlock, ReadData};
use std::sync::Arc;

fn check_range(target: &Target, offset: u64, length: u64) -> Result<()> {
    let end = offset.checked_add(length).filter(|end| *end <= target.header.length_bytes);
    if length == 0 || end.is_none() {
        return Err(err!(InvalidArgument, "range {offset}+{length} does not lie in block {} of {} bytes", target.block, target.header.length_bytes));
    }
    Ok(())
}

/// Has pages fetched; waits for them when asked to. Returns the block's cached bytes.
pub async fn fill(core: &Arc<Core>, claims: &Claims, fill: &Fill) -> Result<u64> {
    let target = Target::of(claims, BlockId(fill.block_id))?;
    check_range(&target, fill.offset, fill.length)?;
    let block = ufs_read::block_of(core, &target);
    if !fill.wait && fill.length > WINDOW_BYTES {
        return Err(err!(LimitExceeded, "a fill that is not waited for may be of {WINDOW_BYTES} bytes at most"));
    }
    for (offset, length) in windows(fill.offset, fill.length) {
        let awaited = ufs_read::request(core, block.as_ref(), &target, pages(&target, offset, length))?;
        for (_, page) in awaited.into_iter().filter(|_| fill.wait) {
            if let Some(page) = page {
                page.settled().await?;
            }
        }
    }
    match block {
        Some(block) => Ok(block.cached_bytes()),
        None => Err(err!(NoSpace, "the pages of block {} were fetched, and there is no room to keep them: read by stream", target.block)),
    }
}

/// Sends a range in frames, each with a CRC per piece; missing pages are fetched as they are reached, and ahead.
pub async fn stream(core: &Arc<Core>, outbox: &Outbox, id: u64, claims: &Claims, read: &ReadBlock) -> Result<()> {
    let target = Target::of(claims, BlockId(read.block_id))?;
    check_range(&target, read.offset, read.length)?;
    let block = ufs_read::block_of(core, &target);
    let end = read.offset + read.length;
    let ahead = read.readahead.min(core.config.fetch_readahead.as_u64());
    let mut out = ReadOut::new(core, &target, block.as_ref(), read.offset..end, ahead);
    while let Some(piece) = out.next().await? {
        super::STREAMED.inc_by(piece.bytes.len() as u64);
        let data = ReadData { offset: piece.offset, crcs: piece.crcs, last: piece.offset + piece.bytes.len() as u64 == end };
        if !outbox.send_body(id, Answer::ReadData(data), vec![piece.bytes]).await {
            return Ok(());
        }
    }
    Ok(())
}

/// A client met a wrong checksum: look ourselves, and drop the block if it is true.
pub async fn check_reported_chunk(core: &Arc<Core>, claims: &Claims, bad: &BadChunk) -> Result<()> {
    let target = Target::of(claims, BlockId(bad.block_id))?;
    let Some(block) = core.store.get(target.block) else { return Ok(()) };
    let checked = tokio::task::spawn_blocking(move || block.verify_again()).await.map_err(|e| err!(Internal, "verify task: {e}"))?;
    match checked {
        Err(e) if e.kind() == ErrorKind::Corrupt => core.store.quarantine(target.block),
        _ => tracing::warn!(block = %target.block, "a client reported a wrong checksum that is right here"),
    }
    Ok(())
}
