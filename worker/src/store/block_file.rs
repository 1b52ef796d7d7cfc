//! `BlockFile`: the two files of one block, open, with their page map.
//!
//! Who calls it: `BlockStore` (making, adopting, evicting), `ufs_read` and `write` (filling pages), `session` (reading,
//! granting). Invariants: bytes → their CRCs → the bit; a set bit is never cleared and its page never written again;
//! a chunk is served over the network only after it was compared with its CRC once since this process opened the block.

use super::block::Block;
use super::dir::Dir;
use bytes::{Bytes, BytesMut};
use forebay_common::block_header::{FIXED_BYTES, FLAG_ONLY_COPY, Header};
use forebay_common::config::Medium;
use forebay_common::error::at;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{Result, checksum, err};
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Paths of the two files of a block in a tier folder.
pub fn paths(dir: &Path, block: forebay_common::BlockId) -> (PathBuf, PathBuf) {
    let name = format!("{:016x}", block.get());
    let shard = dir.join(&name[13..]);
    (shard.join(format!("{name}.data")), shard.join(format!("{name}.head")))
}

/// The log of a block that is being written.
pub fn open_path(dir: &Path, block: forebay_common::BlockId) -> PathBuf {
    paths(dir, block).0.with_extension("open")
}

/// An open block.
pub struct BlockFile {
    /// What it is of.
    pub block: Arc<Block>,
    /// The fixed part of its header.
    pub header: Header,
    data: File,
    head: File,
    /// In MEM tiers alone: elsewhere a disk's error would be a signal.
    map: Option<Arc<Mmap>>,
    bits: Vec<AtomicU64>,
    crcs: Vec<AtomicU32>,
    verified: Vec<AtomicU64>,
    filling: Mutex<()>,
}

/// A slice of a mapping that keeps it alive.
struct Slice {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

fn words(bits: usize) -> Vec<AtomicU64> {
    (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

/// So many bits, all of them set.
fn full(bits: usize) -> Vec<AtomicU64> {
    let all = words(bits);
    for i in 0..bits {
        all[i / 64].fetch_or(1 << (i % 64), Ordering::Relaxed);
    }
    all
}

/// The header file of a block that is all there.
fn whole_head(header: &Header, chunk_crcs: &[u32]) -> Vec<u8> {
    let mut raw = header.encode().to_vec();
    full(header.pages()).iter().for_each(|w| raw.extend_from_slice(&w.load(Ordering::Relaxed).to_le_bytes()));
    chunk_crcs.iter().for_each(|c| raw.extend_from_slice(&c.to_le_bytes()));
    raw
}

fn bit(words: &[AtomicU64], i: usize) -> bool {
    words.get(i / 64).is_some_and(|w| w.load(Ordering::Acquire) & (1 << (i % 64)) != 0)
}

impl BlockFile {
    /// Makes both files of a new block, extended to their lengths; no page is present. Errors: `NoSpace`, `AlreadyExists`.
    pub fn create(dir: &Arc<Dir>, header: Header) -> Result<BlockFile> {
        let block = Block::new(header.clone(), dir.clone());
        let medium = dir.medium();
        let dir = dir.path();
        let (data_path, head_path) = paths(dir, header.block);
        let shard = data_path.parent().unwrap_or(dir);
        std::fs::create_dir_all(shard).map_err(at(shard.display()))?;
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(at(path.display()));
        let head = open(&head_path)?;
        let made = open(&data_path).and_then(|data| Self::lay_out(&header, medium, &data, &head).map(|map| (data, map)));
        let (data, map) = match made {
            Ok(made) => made,
            Err(e) => {
                let _ = std::fs::remove_file(&data_path);
                let _ = std::fs::remove_file(&head_path);
                return Err(e.context(format!("block {}", header.block)));
            }
        };
        Ok(BlockFile {
            bits: words(header.pages()),
            verified: words(header.chunks()),
            crcs: (0..header.chunks()).map(|_| AtomicU32::new(0)).collect(),
            filling: Mutex::new(()),
            block,
            header,
            data,
            head,
            map,
        })
    }

    /// Makes both files of a block whose bytes are all at hand, every page present, its chunks counted as verified. It is not mapped: it is
    /// opened anew when it is read. Errors: as `create`.
    pub fn create_whole(dir: &Arc<Dir>, header: Header, bytes: &[u8]) -> Result<BlockFile> {
        assert_eq!(bytes.len() as u64, header.length_bytes, "a whole block has all its bytes");
        let (data_path, head_path) = paths(dir.path(), header.block);
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
        let head = match open(&head_path) {
            // The first block of its shard.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let shard = head_path.parent().unwrap_or(dir.path());
                std::fs::create_dir_all(shard).map_err(at(shard.display()))?;
                open(&head_path)
            }
            other => other,
        };
        let head = head.map_err(at(head_path.display()))?;
        let crcs: Vec<u32> = checksum::chunk_crcs(bytes).collect();
        let written = open(&data_path).map_err(at(data_path.display())).and_then(|data| {
            data.write_all_at(bytes, 0).map_err(at("storing a block"))?;
            head.write_all_at(&whole_head(&header, &crcs), 0).map_err(at("writing a header"))?;
            Ok(data)
        });
        let data = written.inspect_err(|_| {
            let _ = (std::fs::remove_file(&data_path), std::fs::remove_file(&head_path));
        })?;
        Ok(BlockFile {
            block: Block::new(header.clone(), dir.clone()),
            bits: full(header.pages()),
            verified: full(header.chunks()),
            crcs: crcs.into_iter().map(AtomicU32::new).collect(),
            filling: Mutex::new(()),
            map: None,
            header,
            data,
            head,
        })
    }

    fn lay_out(header: &Header, medium: Medium, data: &File, head: &File) -> Result<Option<Arc<Mmap>>> {
        data.set_len(header.length_bytes).map_err(at("extending"))?;
        let head_bytes = header.file_bytes();
        match nix::fcntl::fallocate(head, nix::fcntl::FallocateFlags::empty(), 0, head_bytes as i64) {
            Ok(()) => {}
            // Not every file system knows how (NFS, most FUSE ones): zeros take the same room.
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {
                head.write_all_at(&vec![0; head_bytes], 0).map_err(at("allocating a header"))?;
            }
            Err(e) => return Err(forebay_common::Error::io("allocating a header", &e.into())),
        }
        head.write_all_at(&header.encode(), 0).map_err(at("writing a header"))?;
        map_data(medium, data, header.length_bytes)
    }

    /// Opens the files of a block that an earlier process left, or that were closed for a while. The bits and CRCs of the
    /// header are taken; nothing counts as verified. `known`: the block, where it is known already.
    ///
    /// Errors: `Corrupt`, `Unsupported`.
    pub fn adopt(dir: &Arc<Dir>, block: forebay_common::BlockId, known: Option<&Arc<Block>>) -> Result<BlockFile> {
        let (data_path, head_path) = paths(dir.path(), block);
        let open = |path: &Path| File::options().read(true).write(true).open(path).map_err(at(path.display()));
        let (data, head) = (open(&data_path)?, open(&head_path)?);
        let head_length = head.metadata().map_err(at("header"))?.len();
        if head_length > 64 << 20 {
            return Err(err!(Corrupt, "block header of {head_length} bytes"));
        }
        let mut raw = vec![0; head_length as usize];
        head.read_exact_at(&mut raw, 0).map_err(at("reading a header"))?;
        let header = Header::decode(&raw)?;
        if header.block != block {
            return Err(err!(Corrupt, "block header names block {}, its file block {block}", header.block));
        }
        let data_length = data.metadata().map_err(at("data"))?.len();
        if data_length != header.length_bytes || raw.len() < header.file_bytes() {
            return Err(err!(
                Corrupt,
                "block {block} has files of {data_length} and {} bytes instead of {} and {}",
                raw.len(),
                header.length_bytes,
                header.file_bytes()
            ));
        }
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&raw[FIXED_BYTES + i * 8..FIXED_BYTES + i * 8 + 8]);
            AtomicU64::new(u64::from_le_bytes(w))
        };
        let crc = |i: usize| {
            let mut c = [0; 4];
            c.copy_from_slice(&raw[header.crc_offset(i)..header.crc_offset(i) + 4]);
            AtomicU32::new(u32::from_le_bytes(c))
        };
        let bits: Vec<AtomicU64> = (0..header.map_words()).map(word).collect();
        let beyond = header.pages() % 64;
        if beyond != 0 && bits.last().is_some_and(|w| w.load(Ordering::Relaxed) >> beyond != 0) {
            return Err(err!(Corrupt, "block {block} has pages beyond its end in its page map"));
        }
        let unused = || {
            let block = Block::new(header.clone(), dir.clone());
            block.used_as(None);
            block
        };
        let block = known.cloned().unwrap_or_else(unused);
        let same = |flags| Header { flags, ..header.clone() } == Header { flags, ..block.header.clone() };
        // Whether it is the only copy may have changed; what it is has not.
        if !same(0) || (header.flags | FLAG_ONLY_COPY) != (block.header.flags | FLAG_ONLY_COPY) {
            return Err(err!(Corrupt, "block {} has another header than it had", header.block));
        }
        Ok(BlockFile {
            block,
            bits,
            verified: words(header.chunks()),
            crcs: (0..header.chunks()).map(crc).collect(),
            filling: Mutex::new(()),
            map: map_data(dir.medium(), &data, header.length_bytes)?,
            header,
            data,
            head,
        })
    }

    /// Whether files that cannot be believed may be the only copy of their bytes: the header says so, or says nothing.
    pub fn may_be_only_copy(dir: &Dir, block: forebay_common::BlockId) -> bool {
        let (_, head_path) = paths(dir.path(), block);
        let mut raw = [0; FIXED_BYTES];
        let read = File::open(&head_path).and_then(|head| head.read_exact_at(&mut raw, 0));
        read.is_err() || Header::decode(&raw).map_or(true, |header| header.flags & FLAG_ONLY_COPY != 0)
    }

    /// Ends a block under construction: writes its header, with every page present. Its CRCs were taken from the bytes as
    /// they came, so its chunks count as verified.
    /// Bytes that are nowhere else are on the disk, where there is one, when this returns.
    pub fn seal(dir: &Arc<Dir>, header: Header, data: File, chunk_crcs: &[u32]) -> Result<BlockFile> {
        assert_eq!(chunk_crcs.len(), header.chunks(), "a sealed block has a checksum for each chunk");
        let (_, head_path) = paths(dir.path(), header.block);
        let raw = whole_head(&header, chunk_crcs);
        let head = File::options().read(true).write(true).create_new(true).mode(0o600).open(&head_path).map_err(at(head_path.display()))?;
        let block = Block::new(header.clone(), dir.clone());
        let written = head.write_all_at(&raw, 0).map_err(at("writing a header")).and_then(|()| {
            if dir.medium() == Medium::Mem || !block.is_only_copy() {
                return Ok(());
            }
            data.sync_data().and_then(|()| head.sync_data()).map_err(at("fsync of a block"))?;
            dir.sync_names_of(header.block)
        });
        let mapped = written.and_then(|()| map_data(dir.medium(), &data, header.length_bytes));
        // It was no block before, and is none now.
        let map = mapped.inspect_err(|_| drop(std::fs::remove_file(&head_path)))?;
        Ok(BlockFile {
            bits: full(header.pages()),
            verified: full(header.chunks()),
            crcs: chunk_crcs.iter().map(|c| AtomicU32::new(*c)).collect(),
            filling: Mutex::new(()),
            map,
            block,
            header,
            data,
            head,
        })
    }

    /// Writes down whether its bytes are in an under store. A crash before leaves the block as it was: the master says it again.
    pub fn write_flags(dir: &Dir, header: &Header) -> Result<()> {
        let (_, head_path) = paths(dir.path(), header.block);
        let head = File::options().write(true).open(&head_path).map_err(at(head_path.display()))?;
        // One sector: it is there as a whole or not at all.
        head.write_all_at(&header.encode(), 0).map_err(at("writing a header"))
    }

    /// What it has is on the disk, where there is one, when this returns.
    pub fn sync(&self) -> Result<()> {
        if self.block.dir.medium() == Medium::Mem {
            return Ok(());
        }
        self.data.sync_data().and_then(|()| self.head.sync_data()).map_err(at("fsync of a block"))?;
        self.block.dir.sync_names_of(self.header.block)
    }

    /// Whether a page is here.
    pub fn has_page(&self, page: usize) -> bool {
        bit(&self.bits, page)
    }

    /// Whether every page is here.
    pub fn is_full(&self) -> bool {
        (0..self.header.pages()).all(|p| self.has_page(p))
    }

    /// Bytes of the pages that are here.
    pub fn cached_bytes(&self) -> u64 {
        (0..self.header.pages()).filter(|p| self.has_page(*p)).map(|p| self.header.page_span(p).1 as u64).sum()
    }

    /// The pages that cover a range of the block.
    pub fn pages_of(&self, offset: u64, length: u64) -> Range<usize> {
        let first = (offset / self.header.page_size_bytes) as usize;
        let end = (offset + length).min(self.header.length_bytes).div_ceil(self.header.page_size_bytes) as usize;
        first..end.max(first)
    }

    /// Stores a whole page. A page that is here already is left alone. Errors: `NoSpace`; nothing is present then.
    pub fn fill_page(&self, page: usize, bytes: &[u8]) -> Result<()> {
        let (offset, length) = self.header.page_span(page);
        assert_eq!(bytes.len(), length, "a page is stored whole");
        let crcs: Vec<u32> = checksum::chunk_crcs(bytes).collect();
        let _filling = self.filling.lock().unwrap_or_else(|e| e.into_inner());
        if self.has_page(page) {
            return Ok(());
        }
        self.data.write_all_at(bytes, offset).map_err(at("storing a page"))?;
        self.publish(page, offset, &crcs)
    }

    fn publish(&self, page: usize, offset: u64, crcs: &[u32]) -> Result<()> {
        let first = offset as usize / CHUNK_SIZE_BYTES;
        let raw: Vec<u8> = crcs.iter().flat_map(|c| c.to_le_bytes()).collect();
        self.head.write_all_at(&raw, self.header.crc_offset(first) as u64).map_err(at("writing checksums"))?;
        for (i, crc) in crcs.iter().enumerate() {
            self.crcs[first + i].store(*crc, Ordering::Relaxed);
            self.verified[(first + i) / 64].fetch_or(1 << ((first + i) % 64), Ordering::Relaxed);
        }
        let word = self.bits[page / 64].load(Ordering::Relaxed) | 1 << (page % 64);
        std::sync::atomic::fence(Ordering::Release);
        self.head.write_all_at(&word.to_le_bytes(), (FIXED_BYTES + page / 64 * 8) as u64).map_err(at("writing a page map"))?;
        self.bits[page / 64].store(word, Ordering::Release);
        Ok(())
    }

    /// The stored CRC of a chunk.
    pub fn chunk_crc(&self, chunk: usize) -> u32 {
        self.crcs[chunk].load(Ordering::Relaxed)
    }

    /// Compares a chunk with its CRC, unless that was done since this process opened the block. Errors: `Corrupt`.
    pub fn verify_chunk(&self, chunk: usize) -> Result<()> {
        if bit(&self.verified, chunk) {
            return Ok(());
        }
        let (offset, length) = self.header.chunk_span(chunk);
        let found = match &self.map {
            Some(map) => checksum::crc32c(&map[offset as usize..offset as usize + length]),
            None => checksum::crc32c(&self.read(offset, length)?),
        };
        if found != self.chunk_crc(chunk) {
            return Err(err!(Corrupt, "block {} chunk {chunk} has checksum {found:08x} instead of {:08x}", self.header.block, self.chunk_crc(chunk)));
        }
        self.verified[chunk / 64].fetch_or(1 << (chunk % 64), Ordering::Relaxed);
        Ok(())
    }

    /// Compares the chunks of a range with their CRCs that were not compared yet.
    pub fn verify_range(&self, offset: u64, length: usize) -> Result<()> {
        let chunks = offset as usize / CHUNK_SIZE_BYTES..(offset as usize + length).div_ceil(CHUNK_SIZE_BYTES);
        chunks.into_iter().try_for_each(|chunk| self.verify_chunk(chunk))
    }

    /// Has every chunk compared with its CRC again before it is served.
    pub fn forget_verified(&self) {
        self.verified.iter().for_each(|w| w.store(0, Ordering::Relaxed));
    }

    /// Compares every present chunk with its CRC, those verified before included.
    pub fn verify_again(&self) -> Result<()> {
        self.forget_verified();
        self.verify_all()
    }

    /// Compares every present chunk with its CRC that was not compared yet.
    pub fn verify_all(&self) -> Result<()> {
        for page in (0..self.header.pages()).filter(|p| self.has_page(*p)) {
            let (offset, length) = self.header.page_span(page);
            let first = offset as usize / CHUNK_SIZE_BYTES;
            (first..first + length.div_ceil(CHUNK_SIZE_BYTES)).try_for_each(|chunk| self.verify_chunk(chunk))?;
        }
        Ok(())
    }

    /// Bytes of pages that are here, out of memory without a copy, off a disk with one; the pages must be present and the
    /// chunks verified by the caller. Errors: the disk's.
    pub fn bytes(&self, offset: u64, length: usize) -> Result<Bytes> {
        let range = offset as usize..offset as usize + length;
        assert!(
            range.end as u64 <= self.header.length_bytes && self.pages_of(offset, length as u64).all(|p| self.has_page(p)),
            "only present pages are read"
        );
        match &self.map {
            Some(map) => Ok(Bytes::from_owner(Slice { map: map.clone(), range })),
            None => self.read(offset, length),
        }
    }

    fn read(&self, offset: u64, length: usize) -> Result<Bytes> {
        let mut out = BytesMut::zeroed(length);
        self.data.read_exact_at(&mut out, offset).map_err(at(format!("reading block {}", self.header.block)))?;
        Ok(out.freeze())
    }

    /// Bytes the two files take by the file system's own count (a huge page counts whole).
    pub fn occupied_bytes(&self) -> u64 {
        [&self.data, &self.head].iter().map(|f| f.metadata().map_or(0, |m| m.blocks() * 512)).sum()
    }
}

/// SAFETY invariants of the mapping:
/// - the file is never truncated or punched while it exists (blocks leave by `unlink`), so no access is beyond its end;
/// - only pages whose bit is set are read, and a set page is never written again, so no byte changes under a reader;
/// - only files of MEM tiers are mapped: tmpfs has no read errors, which would be signals.
#[allow(unsafe_code, reason = "a mapping of a file is unsafe by nature; the invariants are above")]
fn map_data(medium: Medium, data: &File, length: u64) -> Result<Option<Arc<Mmap>>> {
    if medium != Medium::Mem {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| err!(InvalidArgument, "block of {length} bytes"))?;
    // SAFETY: see the list above this function.
    unsafe { MmapOptions::new().len(length).map(data) }.map(|map| Some(Arc::new(map))).map_err(at("mapping a block"))
}
