//! CRC32C (Castagnoli), the checksum of every chunk on every way; hardware-accelerated by the `crc32c` crate.

use crate::limits::CHUNK_SIZE_BYTES;
use crate::{Result, err};

/// CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// CRC32C of each chunk of `bytes`, which start at a chunk boundary; the last one may be short.
pub fn chunk_crcs(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks(CHUNK_SIZE_BYTES).map(crc32c)
}

/// CRC32C of `a ++ bytes` from that of `a`; 0 is that of nothing.
pub fn append(a: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(a, bytes)
}

/// Compares bytes at `offset` of a block with the checksums they were sent with, one per piece that chunk boundaries cut them into.
///
/// Errors: `Corrupt`.
pub fn check_pieces(offset: u64, crcs: &[u32], bytes: &[u8]) -> Result<()> {
    let first = (CHUNK_SIZE_BYTES - offset as usize % CHUNK_SIZE_BYTES).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    let parts = std::iter::once(head).filter(|h| !h.is_empty()).chain(rest.chunks(CHUNK_SIZE_BYTES));
    let mut crcs = crcs.iter();
    for part in parts {
        if crcs.next() != Some(&crc32c(part)) {
            return Err(err!(Corrupt, "bytes at {offset} of a block arrived with a wrong checksum"));
        }
    }
    match crcs.next() {
        None => Ok(()),
        Some(_) => Err(err!(Corrupt, "more checksums than bytes arrived")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the CRC-32C entry of the CRC catalogue.
    #[test]
    fn known_answer() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(append(append(0, b"12345"), b"6789"), 0xE306_9283);
    }
}
