//! Streamed reads and fills.

use super::outbox::Outbox;
use crate::core::Core;
use crate::store::BlockFile;
use crate::ufs_read::{self, Target};
use bytes::Bytes;
use forebay_common::config::Medium;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::token::Claims;
use forebay_common::{BlockId, Error, ErrorKind, Result, checksum, err};
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{BadChunk, Fill, ReadBlock, ReadData};
use std::ops::Range;
use std::sync::Arc;

/// Bytes fetched for one request before its reader has taken what came before.
const WINDOW_BYTES: u64 = 16 << 20;
/// Bytes sent in one frame at most.
const FRAME_BYTES: u64 = 256 << 10;

fn check_range(target: &Target, offset: u64, length: u64) -> Result<()> {
    let end = offset.checked_add(length).filter(|end| *end <= target.header.length_bytes);
    if length == 0 || end.is_none() {
        return Err(err!(InvalidArgument, "range {offset}+{length} does not lie in block {} of {} bytes", target.block, target.header.length_bytes));
    }
    Ok(())
}

fn pages(target: &Target, offset: u64, length: u64) -> Range<usize> {
    let end = (offset + length).min(target.header.length_bytes);
    (offset / target.header.page_size_bytes) as usize..end.div_ceil(target.header.page_size_bytes) as usize
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
    for (offset, length) in windows(read.offset, read.length) {
        let last = offset + length == read.offset + read.length;
        let part = ReadBlock { offset, length, ..read.clone() };
        if !stream_window(core, outbox, id, &target, block.as_ref(), &part, last).await? {
            return Ok(());
        }
    }
    Ok(())
}

/// A range in parts: what is fetched for a reader that does not read on is bounded.
fn windows(offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    (offset..offset + length).step_by(WINDOW_BYTES as usize).map(move |at| (at, WINDOW_BYTES.min(offset + length - at)))
}

/// `false` when the session is over.
async fn stream_window(
    core: &Arc<Core>,
    outbox: &Outbox,
    id: u64,
    target: &Target,
    block: Option<&Arc<BlockFile>>,
    read: &ReadBlock,
    last: bool,
) -> Result<bool> {
    let ahead = read.readahead.min(core.config.fetch_readahead.as_u64());
    let wanted = pages(target, read.offset, read.length);
    let mut awaited = ufs_read::request(core, block, target, wanted.clone())?.into_iter();
    let beyond = pages(target, read.offset, (read.length + ahead).min(target.header.length_bytes - read.offset));
    if beyond.end > wanted.end && target.source.is_some() {
        drop(ufs_read::request(core, block, target, wanted.end..beyond.end)?);
    }
    let end = read.offset + read.length;
    for page in wanted {
        let fetched = match awaited.next().and_then(|(_, awaited)| awaited) {
            Some(page) => Some(page.bytes().await?),
            None => None,
        };
        let (page_offset, page_length) = target.header.page_span(page);
        let mut at = read.offset.max(page_offset);
        let page_end = end.min(page_offset + page_length as u64);
        while at < page_end {
            // Frames end at chunk boundaries, so that whole chunks go out with their stored CRCs.
            let next = (at / FRAME_BYTES + 1) * FRAME_BYTES;
            let stop = page_end.min(next);
            let (bytes, crcs) = match (&fetched, block) {
                (None, Some(block)) => {
                    let counters = core.store.counters_of(&block.block.dir);
                    if at == read.offset.max(page_offset) {
                        counters.hits.inc();
                    }
                    counters.bytes_out.inc_by(stop - at);
                    checked(core, block, at..stop)?
                }
                (Some(page), _) => {
                    let bytes = page.slice((at - page_offset) as usize..(stop - page_offset) as usize);
                    let crcs = piece_crcs(&bytes, at);
                    (bytes, crcs)
                }
                (None, None) => return Err(err!(Internal, "a page was neither here nor fetched")),
            };
            super::STREAMED.inc_by(bytes.len() as u64);
            let data = ReadData { offset: at, crcs, last: last && stop == end };
            if !outbox.send_body(id, Answer::ReadData(data), vec![bytes]).await {
                return Ok(false);
            }
            at = stop;
        }
    }
    Ok(true)
}

/// CRCs of the pieces that chunk boundaries cut a range into.
fn piece_crcs(bytes: &[u8], offset: u64) -> Vec<u32> {
    let first = (CHUNK_SIZE_BYTES - offset as usize % CHUNK_SIZE_BYTES).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    std::iter::once(checksum::crc32c(head)).chain(checksum::chunk_crcs(rest)).collect()
}

/// Bytes of present pages with the CRC of each piece: a whole chunk's is the stored one, which the receiver checks; a part
/// of a chunk is served after the chunk was compared with its stored CRC.
fn checked(core: &Core, block: &Arc<BlockFile>, range: Range<u64>) -> Result<(Bytes, Vec<u32>)> {
    let disk = block.block.dir.medium() != Medium::Mem;
    // A disk may take its time: others on this thread do not wait for it.
    if disk { tokio::task::block_in_place(|| checked_now(core, block, range)) } else { checked_now(core, block, range) }
}

fn checked_now(core: &Core, block: &Arc<BlockFile>, range: Range<u64>) -> Result<(Bytes, Vec<u32>)> {
    let failed = |e: &Error| core.store.note_read_error(block, e);
    let chunks = range.start as usize / CHUNK_SIZE_BYTES..(range.end as usize).div_ceil(CHUNK_SIZE_BYTES);
    let mut crcs = Vec::with_capacity(chunks.len());
    for chunk in chunks.clone() {
        block.verify_chunk(chunk).inspect_err(failed).map_err(retried)?;
    }
    let bytes = block.bytes(range.start, (range.end - range.start) as usize).inspect_err(failed).map_err(retried)?;
    for chunk in chunks {
        let (offset, length) = block.header.chunk_span(chunk);
        let whole = range.start <= offset && offset + length as u64 <= range.end;
        crcs.push(if whole {
            block.chunk_crc(chunk)
        } else {
            let from = range.start.max(offset) - range.start;
            let to = range.end.min(offset + length as u64) - range.start;
            checksum::crc32c(&bytes[from as usize..to as usize])
        });
    }
    Ok((bytes, crcs))
}

/// What a disk could not read may be elsewhere: the client looks there.
fn retried(e: Error) -> Error {
    if e.is_retryable() { e } else { err!(Unavailable, "{}", e.message()) }
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
