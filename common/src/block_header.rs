//! The `.head` file of a block: its fixed part, its page map, the CRC32C of every chunk. Golden-tested: a format on disk.
//!
//! Written by workers, read by workers and, through a passed descriptor, by clients.
//!
//! ```text
//! 0    magic "FBAYHEAD"            8 bytes
//! 8    format version              u32     all numbers little-endian
//! 12   flags                       u32     bit 0: only copy; bits 8 to 31: the mount, 0 when not known
//! 16   block id                    u64
//! 24   length, bytes               u64
//! 32   page size, bytes            u64
//! 40   chunk size, bytes           u64     65,536
//! 48   file id                     u64
//! 56   page map offset             u32     64
//! 60   CRC32C of bytes 0..60       u32
//! 64   page map                    one bit per page, u64 words
//! …    chunk CRCs                  u32 per chunk
//! ```
//! A reader in another process loads a word of the page map with acquire ordering and then believes the CRCs of that
//! page. Writers set CRCs first, then the bit, with `pwrite`: bits are only ever set, so a word torn between two bytes
//! is still a true statement.

use crate::limits::CHUNK_SIZE_BYTES;
use crate::{BlockId, InodeId, MountId, Result, checksum, err};

const MAGIC: &[u8; 8] = b"FBAYHEAD";
/// The version this code writes and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes before the page map.
pub const FIXED_BYTES: usize = 64;
/// The bytes of this block are nowhere else: never evicted.
pub const FLAG_ONLY_COPY: u32 = 1;
/// Where the mount begins in `flags`.
const MOUNT_SHIFT: u32 = 8;

/// `flags` of a block of a mount. A mount whose number has more than 24 bits is not remembered.
pub fn flags_of(only_copy: bool, mount: MountId) -> u32 {
    let mount = u32::try_from(mount.get()).ok().filter(|id| *id < 1 << 24).unwrap_or(0);
    (u32::from(only_copy) * FLAG_ONLY_COPY) | (mount << MOUNT_SHIFT)
}

/// The fixed part, and where the rest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which block.
    pub block: BlockId,
    /// Of which file.
    pub file: InodeId,
    /// Bytes in the block.
    pub length_bytes: u64,
    /// Bytes per page.
    pub page_size_bytes: u64,
    /// `FLAG_*`.
    pub flags: u32,
}

impl Header {
    /// The mount that its file lay in when it was made; 0 when not known.
    pub fn mount(&self) -> MountId {
        MountId(u64::from(self.flags >> MOUNT_SHIFT))
    }

    /// Pages in the block.
    pub fn pages(&self) -> usize {
        self.length_bytes.div_ceil(self.page_size_bytes) as usize
    }

    /// Chunks in the block.
    pub fn chunks(&self) -> usize {
        self.length_bytes.div_ceil(CHUNK_SIZE_BYTES as u64) as usize
    }

    /// Words of the page map.
    pub fn map_words(&self) -> usize {
        self.pages().div_ceil(64)
    }

    /// Where the CRC of a chunk is.
    pub fn crc_offset(&self, chunk: usize) -> usize {
        FIXED_BYTES + self.map_words() * 8 + chunk * 4
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> usize {
        self.crc_offset(self.chunks())
    }

    /// Offset and length of a page within the block.
    pub fn page_span(&self, page: usize) -> (u64, usize) {
        let offset = page as u64 * self.page_size_bytes;
        (offset, self.page_size_bytes.min(self.length_bytes.saturating_sub(offset)) as usize)
    }

    /// Offset and length of a chunk within the block.
    pub fn chunk_span(&self, chunk: usize) -> (u64, usize) {
        let offset = (chunk * CHUNK_SIZE_BYTES) as u64;
        (offset, (CHUNK_SIZE_BYTES as u64).min(self.length_bytes.saturating_sub(offset)) as usize)
    }

    /// The fixed part as bytes.
    pub fn encode(&self) -> [u8; FIXED_BYTES] {
        let mut out = [0u8; FIXED_BYTES];
        out[0..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.flags.to_le_bytes());
        out[16..24].copy_from_slice(&self.block.get().to_le_bytes());
        out[24..32].copy_from_slice(&self.length_bytes.to_le_bytes());
        out[32..40].copy_from_slice(&self.page_size_bytes.to_le_bytes());
        out[40..48].copy_from_slice(&(CHUNK_SIZE_BYTES as u64).to_le_bytes());
        out[48..56].copy_from_slice(&self.file.get().to_le_bytes());
        out[56..60].copy_from_slice(&(FIXED_BYTES as u32).to_le_bytes());
        let crc = checksum::crc32c(&out[..60]);
        out[60..64].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Errors: `Corrupt` for what is not a header, `Unsupported` for another version, naming both.
    pub fn decode(raw: &[u8]) -> Result<Header> {
        let bad = |what: &str| err!(Corrupt, "block header: {what}");
        let fixed: &[u8; FIXED_BYTES] = raw.first_chunk().ok_or_else(|| bad("cut short"))?;
        let u32_at = |i: usize| u32::from_le_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        if &fixed[0..8] != MAGIC {
            return Err(bad("wrong magic number"));
        }
        // Every version keeps this checksum in its place, so that a flipped bit is not taken for a newer version.
        if checksum::crc32c(&fixed[..60]) != u32_at(60) {
            return Err(bad("wrong checksum"));
        }
        if u32_at(8) != FORMAT_VERSION {
            return Err(err!(
                Unsupported,
                "block header has format version {}, this worker reads {FORMAT_VERSION}: start the newer worker again, or clear the tier",
                u32_at(8)
            ));
        }
        let header = Header {
            block: BlockId(u64_at(16)),
            length_bytes: u64_at(24),
            page_size_bytes: u64_at(32),
            file: InodeId(u64_at(48)),
            flags: u32_at(12),
        };
        if u64_at(40) != CHUNK_SIZE_BYTES as u64 || !header.page_size_bytes.is_power_of_two() || header.page_size_bytes < CHUNK_SIZE_BYTES as u64 {
            return Err(bad("impossible page or chunk size"));
        }
        if header.length_bytes == 0 || !crate::limits::BLOCK_SIZE_RANGE_BYTES.contains(&header.length_bytes.max(CHUNK_SIZE_BYTES as u64)) {
            return Err(bad("impossible length"));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Header {
        Header { block: BlockId(0x0102), file: InodeId(9), length_bytes: (128 << 20) - 5, page_size_bytes: 1 << 20, flags: FLAG_ONLY_COPY }
    }

    #[test]
    fn golden() {
        let hex: String = example().encode().iter().map(|b| format!("{b:02x}")).collect();
        let golden = "46424159484541440100000001000000020100000000000\
                      0fbffff0700000000000010000000000000000100000000000900000000000000400000";
        assert!(hex.starts_with(golden), "{hex}");
        assert_eq!(&hex[..48], "464241594845414401000000010000000201000000000000");
        assert_eq!(Header::decode(&example().encode()).unwrap(), example());
        assert_eq!((example().pages(), example().chunks(), example().file_bytes()), (128, 2048, 64 + 16 + 8192));
    }

    #[test]
    fn the_mount_is_beside_the_flags() {
        let of = |only_copy, mount| Header { flags: flags_of(only_copy, MountId(mount)), ..example() };
        for mount in [0, 1, (1 << 24) - 1] {
            assert_eq!((of(true, mount).mount(), of(true, mount).flags & FLAG_ONLY_COPY), (MountId(mount), FLAG_ONLY_COPY));
            assert_eq!(of(false, mount).flags & FLAG_ONLY_COPY, 0);
            assert_eq!(Header::decode(&of(true, mount).encode()).unwrap(), of(true, mount));
        }
        assert_eq!(of(false, 1 << 24).mount(), MountId(0));
    }

    proptest! {
        /// (S-18) Any bit of the fixed part.
        #[test]
        fn every_flipped_bit_is_noticed(bit in 0usize..FIXED_BYTES * 8) {
            let mut raw = example().encode();
            raw[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&raw).is_err());
        }
    }
}
