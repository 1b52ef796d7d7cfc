//! `ReadOut`: a range of a block in pieces, in order, each chunk compared with its CRC before it leaves; what is missing is fetched as it is reached, and ahead.
//!
//! Called by whatever sends blocks: our own sessions and the Hadoop front. Invariants: a piece is at most `PIECE_BYTES`, ends at a chunk boundary or
//! at the end of the range, and carries a CRC32C for each part that chunk boundaries cut it into; what is fetched for a reader that does not read on
//! is bounded by a window.

use crate::core::Core;
use crate::store::BlockFile;
use crate::ufs_read::{self, Awaited, Target};
use bytes::Bytes;
use forebay_common::config::Medium;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{Error, Result, checksum, err};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Bytes fetched for one request before its reader has taken what came before.
pub const WINDOW_BYTES: u64 = 16 << 20;
/// Bytes of one piece at most.
const PIECE_BYTES: u64 = 256 << 10;

/// The pages that a range of a block lies in.
pub fn pages(target: &Target, offset: u64, length: u64) -> Range<usize> {
    let end = (offset + length).min(target.header.length_bytes);
    (offset / target.header.page_size_bytes) as usize..end.div_ceil(target.header.page_size_bytes) as usize
}

/// A range in parts: what is fetched for a reader that does not read on is bounded.
pub fn windows(offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    (offset..offset + length).step_by(WINDOW_BYTES as usize).map(move |at| (at, WINDOW_BYTES.min(offset + length - at)))
}

/// Some of the bytes.
pub struct Piece {
    /// Where they begin in the block.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
    /// A CRC32C for each part that chunk boundaries cut them into.
    pub crcs: Vec<u32>,
}

/// A page at work: its bytes where it was fetched just now.
struct Page {
    number: usize,
    fetched: Option<Bytes>,
}

/// A range being read.
pub struct ReadOut<'a> {
    core: &'a Arc<Core>,
    target: &'a Target,
    block: Option<&'a Arc<BlockFile>>,
    at: u64,
    end: u64,
    ahead: u64,
    /// Pages of the window at work that were not reached yet.
    awaited: VecDeque<(usize, Option<Awaited>)>,
    page: Option<Page>,
}

impl<'a> ReadOut<'a> {
    /// The range must lie in the block. `ahead`: bytes that are fetched beyond it.
    pub fn new(core: &'a Arc<Core>, target: &'a Target, block: Option<&'a Arc<BlockFile>>, range: Range<u64>, ahead: u64) -> Self {
        assert!(range.end <= target.header.length_bytes, "a range lies in its block");
        ReadOut { core, target, block, at: range.start, end: range.end, ahead, awaited: VecDeque::new(), page: None }
    }

    /// The next piece; `None` at the end. Errors: those of the under store, of the disk, a wrong checksum.
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let begins = self.page.is_none();
        if begins {
            self.page = Some(self.next_page().await?);
        }
        let Some(page) = &self.page else { return Err(err!(Internal, "a page is at work")) };
        let (page_offset, page_length) = self.target.header.page_span(page.number);
        let page_end = self.end.min(page_offset + page_length as u64);
        // Pieces end at chunk boundaries, so that whole chunks go out with their stored CRCs.
        let stop = page_end.min((self.at / PIECE_BYTES + 1) * PIECE_BYTES);
        let (bytes, crcs) = match (&page.fetched, self.block) {
            (None, Some(block)) => {
                let counters = self.core.store.counters_of(&block.block.dir);
                if begins {
                    counters.hits.inc();
                }
                counters.bytes_out.inc_by(stop - self.at);
                checked(self.core, block, self.at..stop)?
            }
            (Some(fetched), _) => {
                let bytes = fetched.slice((self.at - page_offset) as usize..(stop - page_offset) as usize);
                let crcs = piece_crcs(&bytes, self.at);
                (bytes, crcs)
            }
            (None, None) => return Err(err!(Internal, "a page was neither here nor fetched")),
        };
        let offset = std::mem::replace(&mut self.at, stop);
        if stop == page_end {
            self.page = None;
        }
        Ok(Some(Piece { offset, bytes, crcs }))
    }

    async fn next_page(&mut self) -> Result<Page> {
        if self.awaited.is_empty() {
            let length = WINDOW_BYTES.min(self.end - self.at);
            let wanted = pages(self.target, self.at, length);
            self.awaited = ufs_read::request(self.core, self.block, self.target, wanted.clone())?.into();
            let beyond = pages(self.target, self.at, (length + self.ahead).min(self.target.header.length_bytes - self.at));
            if beyond.end > wanted.end && self.target.source.is_some() {
                drop(ufs_read::request(self.core, self.block, self.target, wanted.end..beyond.end)?);
            }
        }
        let (number, awaited) = self.awaited.pop_front().ok_or_else(|| err!(Internal, "a window has pages"))?;
        let fetched = match awaited {
            Some(awaited) => Some(awaited.bytes().await?),
            None => None,
        };
        Ok(Page { number, fetched })
    }
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
