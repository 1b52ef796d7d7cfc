//! CRC32C (Castagnoli), the checksum of every chunk on every way; hardware-accelerated by the `crc32c` crate.

use crate::limits::CHUNK_SIZE_BYTES;

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
