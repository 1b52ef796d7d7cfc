//! Bytes of blocks: connections to workers, granted blocks of this machine.

mod connection;
mod local;
mod pool;

pub use connection::{Answers, Connection};
pub use local::LocalBlock;
pub use pool::Pool;

use bytes::Bytes;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::{Result, checksum, err};

/// The way bytes took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A descriptor passed by a worker of this machine.
    Descriptor,
    /// That worker's Unix socket, streamed.
    Domain,
    /// The network.
    Network,
}

/// Checks a streamed piece: a CRC for each part that chunk boundaries cut it into. Errors: `Corrupt`.
pub fn check_piece(offset: u64, crcs: &[u32], bytes: &Bytes) -> Result<()> {
    let first = (CHUNK_SIZE_BYTES - offset as usize % CHUNK_SIZE_BYTES).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    let parts = std::iter::once(head).filter(|h| !h.is_empty()).chain(rest.chunks(CHUNK_SIZE_BYTES));
    let mut crcs = crcs.iter();
    for part in parts {
        if crcs.next() != Some(&checksum::crc32c(part)) {
            return Err(err!(Corrupt, "bytes at {offset} of a block arrived with a wrong checksum"));
        }
    }
    match crcs.next() {
        None => Ok(()),
        Some(_) => Err(err!(Corrupt, "more checksums than bytes arrived")),
    }
}
