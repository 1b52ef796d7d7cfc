//! `LocalBlock`: a block granted by a worker of this machine: two mappings, and after that no call per read.
//!
//! Invariants: nothing is read where the page map's bit is clear; a chunk is compared with its CRC the first time this
//! grant touches it; the descriptors are read-only and so are the mappings. An evicted block stays intact for as long as
//! this exists: workers unlink, they never truncate or rewrite.

use super::connection::Connection;
use bytes::Bytes;
use forebay_common::block_header::{FIXED_BYTES, Header};
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{BlockId, Error, Result, checksum, err};
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A granted block.
pub struct LocalBlock {
    header: Header,
    descriptor: OwnedFd,
    data: Mmap,
    head: Mmap,
    verified: Vec<AtomicU64>,
    full: std::sync::atomic::AtomicBool,
    grant_id: u64,
    connection: Arc<Connection>,
}

struct Slice {
    block: Arc<LocalBlock>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        &self.block.data[self.range.clone()]
    }
}

/// SAFETY invariants of the mapping: the worker never truncates a block file and never rewrites a page whose bit is set;
/// only such pages are read. The tier is tmpfs, where a present page cannot fail to be read.
#[allow(unsafe_code, reason = "a mapping of a file is unsafe by nature; the invariants are above")]
fn map(fd: OwnedFd, length: usize) -> Result<Mmap> {
    let file = File::from(fd);
    let held = file.metadata().map_err(|e| Error::io("granted descriptor", &e))?.len();
    if held < length as u64 {
        return Err(err!(Corrupt, "a granted file of {held} bytes should have {length}"));
    }
    // SAFETY: see the list above this function.
    unsafe { MmapOptions::new().len(length).map(&file) }.map_err(|e| Error::io("mapping a granted block", &e))
}

impl LocalBlock {
    /// Takes a grant. Errors: `Corrupt` when the files are not those of this block; `Unsupported` when they cannot be mapped.
    pub fn new(block: BlockId, length: u64, grant_id: u64, [data, head]: [OwnedFd; 2], connection: Arc<Connection>) -> Result<LocalBlock> {
        let fixed = map(head.try_clone().map_err(|e| Error::io("granted descriptor", &e))?, FIXED_BYTES)?;
        let header = Header::decode(&fixed)?;
        if header.block != block || header.length_bytes != length {
            return Err(err!(Corrupt, "block {} of {} bytes was granted instead of block {block} of {length}", header.block, header.length_bytes));
        }
        let head = map(head, header.file_bytes())?;
        let descriptor = data.try_clone().map_err(|e| Error::io("granted descriptor", &e))?;
        let data = map(data, usize::try_from(length).map_err(|_| err!(Unsupported, "block of {length} bytes"))?)?;
        let verified = (0..header.chunks().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(LocalBlock { header, descriptor, data, head, verified, full: false.into(), grant_id, connection })
    }

    #[allow(unsafe_code, reason = "a word of a mapping that another process sets bits in is read as an atomic")]
    fn map_word(&self, word: usize) -> u64 {
        let offset = FIXED_BYTES + word * 8;
        assert!(offset + 8 <= self.head.len());
        // SAFETY: in bounds (asserted); 8-aligned, for a mapping is page-aligned and 64 is a multiple of 8; the other
        // process writes these bytes with `pwrite`, setting bits only, and reading them as an atomic is no data race.
        let atomic = unsafe { &*self.head.as_ptr().add(offset).cast::<AtomicU64>() };
        u64::from_le(atomic.load(Ordering::Acquire))
    }

    fn stored_crc(&self, chunk: usize) -> u32 {
        let at = self.header.crc_offset(chunk);
        let mut raw = [0; 4];
        raw.copy_from_slice(&self.head[at..at + 4]);
        u32::from_le_bytes(raw)
    }

    /// The first part of a range that is not here, in whole pages; `None` when all of it is.
    pub fn missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        if self.full.load(Ordering::Acquire) {
            return None;
        }
        let size = self.header.page_size_bytes;
        let pages = range.start / size..range.end.div_ceil(size);
        let has = |page: u64| self.map_word(page as usize / 64) & 1 << (page % 64) != 0;
        let Some(first) = pages.clone().find(|p| !has(*p)) else {
            if (0..self.header.pages() as u64).all(has) {
                self.full.store(true, Ordering::Release);
            }
            return None;
        };
        let end = (first..pages.end).find(|p| has(*p)).unwrap_or(pages.end);
        Some(first * size..(end * size).min(self.header.length_bytes))
    }

    /// Compares the chunks of a present range with their CRCs, those this grant has not looked at. Errors: `Corrupt`.
    pub fn verify(&self, range: Range<u64>) -> Result<()> {
        for chunk in range.start as usize / CHUNK_SIZE_BYTES..(range.end as usize).div_ceil(CHUNK_SIZE_BYTES) {
            self.verify_chunk(chunk)?;
        }
        Ok(())
    }

    fn verify_chunk(&self, chunk: usize) -> Result<()> {
        let word = &self.verified[chunk / 64];
        if word.load(Ordering::Relaxed) & 1 << (chunk % 64) != 0 {
            return Ok(());
        }
        let (offset, length) = self.header.chunk_span(chunk);
        let found = checksum::crc32c(&self.data[offset as usize..offset as usize + length]);
        if found != self.stored_crc(chunk) {
            return Err(err!(Corrupt, "block {} chunk {chunk}: checksum {found:08x} instead of {:08x}", self.header.block, self.stored_crc(chunk)));
        }
        word.fetch_or(1 << (chunk % 64), Ordering::Relaxed);
        Ok(())
    }

    /// Copies present bytes, chunk by chunk: each is verified while it is still in the processor's cache.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut at = offset as usize;
        let mut rest = out;
        while !rest.is_empty() {
            let chunk = at / CHUNK_SIZE_BYTES;
            // Verified chunks are copied in one go.
            let mut stop = (chunk + 1) * CHUNK_SIZE_BYTES;
            self.verify_chunk(chunk)?;
            let end = at + rest.len();
            while stop < end && self.is_verified(stop / CHUNK_SIZE_BYTES) {
                stop += CHUNK_SIZE_BYTES;
            }
            let take = stop.min(end) - at;
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&self.data[at..at + take]);
            at += take;
            rest = later;
        }
        Ok(())
    }

    fn is_verified(&self, chunk: usize) -> bool {
        self.verified[chunk / 64].load(Ordering::Relaxed) & 1 << (chunk % 64) != 0
    }

    /// Present bytes without a copy; they stay valid whatever happens to the block.
    pub fn slice(self: &Arc<Self>, offset: u64, length: usize) -> Result<Bytes> {
        self.verify(offset..offset + length as u64)?;
        let range = offset as usize..offset as usize + length;
        assert!(range.end <= self.data.len());
        Ok(Bytes::from_owner(Slice { block: self.clone(), range }))
    }

    /// The granted data descriptor: read-only, of the whole block file. Only present pages may be read through it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// The connection it came by.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for LocalBlock {
    fn drop(&mut self) {
        self.connection.close_later(self.grant_id);
    }
}
