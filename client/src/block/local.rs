//! `LocalBlock`: a block granted by a worker of this machine, and after that no call per read. Of a block in memory both files
//! are mapped; one on a disk is read with `pread`, so that a disk's error is an error and not a signal, and so is a block of
//! a single chunk, for which making and unmaking mappings would cost more than reading it.
//!
//! Invariants: nothing is read where the page map's bit is clear; a chunk is compared with its CRC the first time this
//! grant touches it; the descriptors are read-only and so are the mappings. An evicted block stays intact for as long as
//! this exists: workers unlink, they never truncate or rewrite.

use super::connection::Connection;
use bytes::Bytes;
use forebay_common::block_header::{FIXED_BYTES, Header};
use forebay_common::error::at;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{BlockId, Error, Result, checksum, err};
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

/// A granted block.
pub struct LocalBlock {
    header: Header,
    data: File,
    how: How,
    verified: Vec<AtomicU64>,
    full: std::sync::atomic::AtomicBool,
    verifying: std::sync::atomic::AtomicBool,
    grant_id: u64,
    connection: Arc<Connection>,
}

enum How {
    /// In memory: data and header.
    Mapped { data: Mmap, head: Mmap },
    /// On a disk, or of one chunk.
    Read(RwLock<Known>),
}

/// The header as it was read last; its file until all pages are there.
struct Known {
    raw: Vec<u8>,
    head: Option<File>,
}

impl Known {
    fn read(header: &Header, head: File) -> std::io::Result<Known> {
        // The bits before the CRCs, which are written in the other order.
        let mut raw = vec![0; header.file_bytes()];
        let (bits, crcs) = raw.split_at_mut(header.crc_offset(0));
        head.read_exact_at(bits, 0)?;
        head.read_exact_at(crcs, bits.len() as u64)?;
        let all = (0..header.pages()).all(|page| word(bits, page / 64) & 1 << (page % 64) != 0);
        Ok(Known { raw, head: (!all).then_some(head) })
    }
}

/// A word of a header's page map.
fn word(header: &[u8], index: usize) -> u64 {
    header[FIXED_BYTES + index * 8..].first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw))
}

struct Slice {
    block: Arc<LocalBlock>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        match &self.block.how {
            How::Mapped { data, .. } => &data[self.range.clone()],
            How::Read(_) => &[],
        }
    }
}

/// SAFETY invariants of the mapping: the worker never truncates a block file and never rewrites a page whose bit is set;
/// only such pages are read. Only blocks of a MEM tier are mapped: tmpfs, where a present page cannot fail to be read.
#[allow(unsafe_code, reason = "a mapping of a file is unsafe by nature; the invariants are above")]
fn map(file: &File, length: usize) -> Result<Mmap> {
    let held = file.metadata().map_err(|e| Error::io("granted descriptor", &e))?.len();
    if held < length as u64 {
        return Err(err!(Corrupt, "a granted file of {held} bytes should have {length}"));
    }
    // SAFETY: see the list above this function.
    unsafe { MmapOptions::new().len(length).map(file) }.map_err(|e| Error::io("mapping a granted block", &e))
}

impl LocalBlock {
    /// Takes a grant. Errors: `Corrupt` when the files are not those of this block; `Unsupported` when they cannot be mapped.
    pub fn new(
        block: BlockId,
        length: u64,
        tier: &str,
        grant_id: u64,
        [data, head]: [OwnedFd; 2],
        connection: Arc<Connection>,
    ) -> Result<LocalBlock> {
        let (data, head) = (File::from(data), File::from(head));
        let mut fixed = [0; FIXED_BYTES];
        head.read_exact_at(&mut fixed, 0).map_err(at("reading a granted header"))?;
        let header = Header::decode(&fixed)?;
        if header.block != block || header.length_bytes != length {
            return Err(err!(Corrupt, "block {} of {} bytes was granted instead of block {block} of {length}", header.block, header.length_bytes));
        }
        let length = usize::try_from(length).map_err(|_| err!(Unsupported, "block of {length} bytes"))?;
        let how = if tier == "MEM" && length > CHUNK_SIZE_BYTES {
            How::Mapped { head: map(&head, header.file_bytes())?, data: map(&data, length)? }
        } else {
            How::Read(RwLock::new(Known::read(&header, head).map_err(at("reading a granted header"))?))
        };
        let verified = (0..header.chunks().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(LocalBlock { header, data, how, verified, full: false.into(), verifying: false.into(), grant_id, connection })
    }

    #[allow(unsafe_code, reason = "a word of a mapping that another process sets bits in is read as an atomic")]
    fn map_word(&self, index: usize) -> u64 {
        match &self.how {
            How::Mapped { head, .. } => {
                let offset = FIXED_BYTES + index * 8;
                assert!(offset + 8 <= head.len());
                // SAFETY: in bounds (asserted); 8-aligned, for a mapping is page-aligned and 64 is a multiple of 8; the other
                // process writes these bytes with `pwrite`, setting bits only, and reading them as an atomic is no data race.
                let atomic = unsafe { &*head.as_ptr().add(offset).cast::<AtomicU64>() };
                u64::from_le(atomic.load(Ordering::Acquire))
            }
            How::Read(known) => word(&known.read().unwrap_or_else(|e| e.into_inner()).raw, index),
        }
    }

    fn stored_crc(&self, chunk: usize) -> u32 {
        let at = self.header.crc_offset(chunk);
        let read = |raw: &[u8]| raw[at..].first_chunk().map_or(0, |raw| u32::from_le_bytes(*raw));
        match &self.how {
            How::Mapped { head, .. } => read(head),
            How::Read(known) => read(&known.read().unwrap_or_else(|e| e.into_inner()).raw),
        }
    }

    /// Reads the header again, for pages that have come since.
    fn refresh(&self) {
        let How::Read(known) = &self.how else { return };
        // Held over the read: an older reading never takes the place of a newer one.
        let mut known = known.write().unwrap_or_else(|e| e.into_inner());
        let again = known.head.as_ref().and_then(|head| head.try_clone().ok()).map(|head| Known::read(&self.header, head));
        if let Some(Ok(again)) = again {
            *known = again;
        }
    }

    /// The first part of a range that is not here, in whole pages; `None` when all of it is.
    pub fn missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        if self.full.load(Ordering::Acquire) {
            return None;
        }
        let size = self.header.page_size_bytes;
        let pages = range.start / size..range.end.div_ceil(size);
        if matches!(self.how, How::Read(_)) && !pages.clone().all(|page| self.map_word(page as usize / 64) & 1 << (page % 64) != 0) {
            self.refresh();
        }
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

    /// Compares all of it, unless somebody does so already: `false`. Errors: `Corrupt`.
    pub fn verify_once(&self) -> Result<bool> {
        if self.verifying.swap(true, Ordering::AcqRel) {
            return Ok(false);
        }
        let done = self.verify(0..self.header.length_bytes);
        self.verifying.store(false, Ordering::Release);
        done.map(|()| true)
    }

    fn verify_chunk(&self, chunk: usize) -> Result<()> {
        let word = &self.verified[chunk / 64];
        if word.load(Ordering::Relaxed) & 1 << (chunk % 64) != 0 {
            return Ok(());
        }
        let (offset, length) = self.header.chunk_span(chunk);
        let found = match &self.how {
            How::Mapped { data, .. } => checksum::crc32c(&data[offset as usize..offset as usize + length]),
            How::Read(_) => {
                let mut raw = vec![0; length];
                self.data.read_exact_at(&mut raw, offset).map_err(at("reading a granted block"))?;
                checksum::crc32c(&raw)
            }
        };
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
            self.copy(at, now)?;
            at += take;
            rest = later;
        }
        Ok(())
    }

    fn copy(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        match &self.how {
            How::Mapped { data, .. } => {
                out.copy_from_slice(&data[offset..offset + out.len()]);
                Ok(())
            }
            How::Read(_) => self.data.read_exact_at(out, offset as u64).map_err(at("reading a granted block")),
        }
    }

    fn is_verified(&self, chunk: usize) -> bool {
        self.verified[chunk / 64].load(Ordering::Relaxed) & 1 << (chunk % 64) != 0
    }

    /// Whether this grant has compared every chunk.
    pub fn is_wholly_verified(&self) -> bool {
        (0..self.header.chunks()).all(|chunk| self.is_verified(chunk))
    }

    /// Present bytes, out of memory without a copy; they stay valid whatever happens to the block.
    pub fn slice(self: &Arc<Self>, offset: u64, length: usize) -> Result<Bytes> {
        self.verify(offset..offset + length as u64)?;
        if matches!(self.how, How::Read(_)) {
            let mut out = vec![0; length];
            self.copy(offset as usize, &mut out)?;
            return Ok(out.into());
        }
        let range = offset as usize..offset as usize + length;
        assert!(range.end as u64 <= self.header.length_bytes);
        Ok(Bytes::from_owner(Slice { block: self.clone(), range }))
    }

    /// The granted data descriptor: read-only, of the whole block file. Only present pages may be read through it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// Which block, or joined file.
    pub fn block(&self) -> BlockId {
        self.header.block
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
