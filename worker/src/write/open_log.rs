//! `OpenLog`: the `.open` file beside the data of a block that is being written: what the block is, its checksums as it grows, how long it is.
//!
//! Written by `BlockWriter` before what it has is acknowledged, read by the same when the worker was started again. A format on disk, golden-tested:
//!
//! ```text
//! 0    magic "FBAYOPEN"            8 bytes
//! 8    format version              u32     all numbers little-endian
//! 12   flags                       u32     as in `.head`
//! 16   block id                    u64
//! 24   capacity, bytes             u64     what the block may grow to
//! 32   page size, bytes            u64
//! 40   chunk size, bytes           u64     65,536
//! 48   file id                     u64
//! 56   lease id                    u64     under which it is written
//! 64   reserved                    u32
//! 68   CRC32C of bytes 0..68       u32
//! 128  tail as it was last         length u64, stamp u64, CRC32C of the bytes after the last whole chunk u32, CRC32C of these u32
//! 192  tail as it was synced last  the same
//! 256  chunk CRCs                  u32 per whole chunk
//! ```
//! Invariants: data are written before their checksums, these before the tail that counts them; a tail is written whole (one sector), and the synced one only
//! between two fsyncs, so that a power cut leaves one that what was synced agrees with. Which tail holds is found out by reading the data.

use crate::store::open_path;
use forebay_common::error::at;
use forebay_common::limits::{BLOCK_SIZE_RANGE_BYTES, CHUNK_SIZE_BYTES};
use forebay_common::{BlockId, InodeId, Result, checksum, err};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: &[u8; 8] = b"FBAYOPEN";
const FORMAT_VERSION: u32 = 1;
const FIXED_BYTES: usize = 72;
const TAIL_BYTES: usize = 24;
const LAST_TAIL: u64 = 128;
const SYNCED_TAIL: u64 = 192;
const CRCS: u64 = 256;

/// What a block is that is being written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenHeader {
    pub block: BlockId,
    pub file: InodeId,
    pub lease_id: u64,
    pub capacity_bytes: u64,
    pub page_size_bytes: u64,
    /// As in a header.
    pub flags: u32,
}

/// How far a block has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    pub length: u64,
    /// Raised by each recovery of its pipeline.
    pub stamp: u64,
    /// Of the bytes after the last whole chunk.
    pub crc: u32,
}

impl OpenHeader {
    fn encode(&self) -> [u8; FIXED_BYTES] {
        let mut out = [0; FIXED_BYTES];
        out[0..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.flags.to_le_bytes());
        let numbers = [self.block.get(), self.capacity_bytes, self.page_size_bytes, CHUNK_SIZE_BYTES as u64, self.file.get(), self.lease_id];
        for (i, number) in numbers.iter().enumerate() {
            out[16 + i * 8..24 + i * 8].copy_from_slice(&number.to_le_bytes());
        }
        let crc = checksum::crc32c(&out[..68]);
        out[68..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Errors: `Corrupt` for what is none, `Unsupported` for another version.
    fn decode(raw: &[u8]) -> Result<OpenHeader> {
        let bad = |what: &str| err!(Corrupt, "log of an open block: {what}");
        let fixed: &[u8; FIXED_BYTES] = raw.first_chunk().ok_or_else(|| bad("cut short"))?;
        if &fixed[0..8] != MAGIC {
            return Err(bad("wrong magic number"));
        }
        if checksum::crc32c(&fixed[..68]) != u32_at(fixed, 68) {
            return Err(bad("wrong checksum"));
        }
        if u32_at(fixed, 8) != FORMAT_VERSION {
            return Err(err!(
                Unsupported,
                "log of an open block has format version {}, this worker reads {FORMAT_VERSION}: start the newer worker again",
                u32_at(fixed, 8)
            ));
        }
        let number = |i: usize| u64_at(fixed, 16 + i * 8);
        let header = OpenHeader {
            block: BlockId(number(0)),
            capacity_bytes: number(1),
            page_size_bytes: number(2),
            file: InodeId(number(4)),
            lease_id: number(5),
            flags: u32_at(fixed, 12),
        };
        let pages = header.page_size_bytes.is_power_of_two() && header.page_size_bytes >= CHUNK_SIZE_BYTES as u64;
        if number(3) != CHUNK_SIZE_BYTES as u64 || !pages || header.capacity_bytes > *BLOCK_SIZE_RANGE_BYTES.end() {
            return Err(bad("impossible sizes"));
        }
        Ok(header)
    }
}

impl Tail {
    fn encode(&self) -> [u8; TAIL_BYTES] {
        let mut out = [0; TAIL_BYTES];
        out[0..8].copy_from_slice(&self.length.to_le_bytes());
        out[8..16].copy_from_slice(&self.stamp.to_le_bytes());
        out[16..20].copy_from_slice(&self.crc.to_le_bytes());
        let crc = checksum::crc32c(&out[..20]);
        out[20..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(raw: &[u8]) -> Option<Tail> {
        let raw: &[u8; TAIL_BYTES] = raw.first_chunk()?;
        let good = checksum::crc32c(&raw[..20]) == u32_at(raw, 20);
        good.then(|| Tail { length: u64_at(raw, 0), stamp: u64_at(raw, 8), crc: u32_at(raw, 16) })
    }
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    raw.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    raw.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The open file.
pub struct OpenLog {
    file: File,
    /// Chunk checksums that are in it.
    written: usize,
}

/// What an earlier process left.
pub struct Left {
    pub log: OpenLog,
    pub header: OpenHeader,
    /// Of chunks; those beyond what the tail counts say nothing.
    pub crcs: Vec<u32>,
    /// The longest first.
    pub tails: Vec<Tail>,
}

impl OpenLog {
    /// Errors: the disk's; `AlreadyExists`.
    pub fn create(dir: &Path, header: &OpenHeader) -> Result<OpenLog> {
        let path = open_path(dir, header.block);
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(at(path.display()))?;
        let written = file.write_all_at(&header.encode(), 0).map_err(at("writing the log of an open block"));
        written.inspect_err(|_| drop(std::fs::remove_file(&path)))?;
        Ok(OpenLog { file, written: 0 })
    }

    /// Writes down the checksums that are new, and how far the block has come.
    pub fn write(&mut self, crcs: &[u32], tail: Tail) -> Result<()> {
        let error = |e| at("writing the log of an open block")(e);
        let fresh = crcs.get(self.written..).unwrap_or_default();
        if !fresh.is_empty() {
            let raw: Vec<u8> = fresh.iter().flat_map(|crc| crc.to_le_bytes()).collect();
            self.file.write_all_at(&raw, CRCS + self.written as u64 * 4).map_err(error)?;
        }
        self.written = crcs.len();
        self.file.write_all_at(&tail.encode(), LAST_TAIL).map_err(error)
    }

    /// The data are on the disk: so is this, when it returns.
    pub fn sync(&self, tail: Tail) -> Result<()> {
        // The checksums first: the tail counts them.
        self.file.sync_data().map_err(at("fsync of the log of an open block"))?;
        self.file.write_all_at(&tail.encode(), SYNCED_TAIL).map_err(at("writing the log of an open block"))?;
        self.file.sync_data().map_err(at("fsync of the log of an open block"))
    }

    /// Opens what an earlier process left. Errors: `Corrupt`, `Unsupported`, the disk's.
    pub fn open(dir: &Path, block: BlockId) -> Result<Left> {
        let path = open_path(dir, block);
        let file = File::options().read(true).write(true).open(&path).map_err(at(path.display()))?;
        let mut head = [0; CRCS as usize];
        let length = file.metadata().map_err(at(path.display()))?.len();
        let there = usize::try_from(length.min(CRCS)).unwrap_or(0);
        file.read_exact_at(&mut head[..there], 0).map_err(at(path.display()))?;
        let header = OpenHeader::decode(&head[..there])?;
        if header.block != block {
            return Err(err!(Corrupt, "log of an open block names block {}, its file block {block}", header.block));
        }
        let most = header.capacity_bytes / CHUNK_SIZE_BYTES as u64 * 4;
        let mut raw = vec![0; usize::try_from(length.saturating_sub(CRCS).min(most)).unwrap_or(0)];
        file.read_exact_at(&mut raw, CRCS).map_err(at(path.display()))?;
        let crcs: Vec<u32> = raw.chunks_exact(4).map(|c| u32_at(c, 0)).collect();
        let tail = |offset: u64| Tail::decode(head.get(offset as usize..)?).filter(|t| t.length <= header.capacity_bytes);
        let mut tails: Vec<Tail> = [LAST_TAIL, SYNCED_TAIL].into_iter().filter_map(tail).collect();
        tails.sort_unstable_by_key(|t| std::cmp::Reverse((t.length, t.stamp)));
        let written = crcs.len();
        Ok(Left { log: OpenLog { file, written }, header, crcs, tails })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> OpenHeader {
        OpenHeader { block: BlockId(0x0102), file: InodeId(9), lease_id: 7, capacity_bytes: 128 << 20, page_size_bytes: 1 << 20, flags: 1 }
    }

    #[test]
    fn golden() {
        let hex = |raw: &[u8]| raw.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let golden = "464241594f50454e0100000001000000020100000000000000000008000000000000100000000000\
                      00000100000000000900000000000000070000000000000000000000";
        assert!(hex(&example().encode()).starts_with(golden), "{}", hex(&example().encode()));
        assert_eq!(OpenHeader::decode(&example().encode()).unwrap(), example());
        let tail = Tail { length: 70_000, stamp: 1_001, crc: 0x0102_0304 };
        assert!(hex(&tail.encode()).starts_with("7011010000000000e90300000000000004030201"), "{}", hex(&tail.encode()));
        assert_eq!(Tail::decode(&tail.encode()), Some(tail));
        for bit in 0..TAIL_BYTES * 8 {
            let mut raw = tail.encode();
            raw[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Tail::decode(&raw), None);
        }
        for bit in 0..FIXED_BYTES * 8 {
            let mut raw = example().encode();
            raw[bit / 8] ^= 1 << (bit % 8);
            assert!(OpenHeader::decode(&raw).is_err());
        }
    }
}
