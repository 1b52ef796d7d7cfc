//! Keys of the state store: big-endian, so that RocksDB's order is the order of numbers and names.

use forebay_common::InodeId;

/// Parent id, then the name. The root itself is the entry `""` of parent 0.
pub fn dentry_key(parent: InodeId, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(8 + name.len());
    key.extend_from_slice(&parent.get().to_be_bytes());
    key.extend_from_slice(name);
    key
}

/// The parts of a dentry key.
pub fn split_dentry_key(key: &[u8]) -> Option<(InodeId, &[u8])> {
    let (parent, name) = key.split_first_chunk::<8>()?;
    Some((InodeId(u64::from_be_bytes(*parent)), name))
}

/// An id alone.
pub fn id_key(id: u64) -> [u8; 8] {
    id.to_be_bytes()
}

/// Unix milliseconds, then inode id.
pub fn ttl_key(expires_at_ms: u64, inode_id: u64) -> [u8; 16] {
    pair_key(expires_at_ms, inode_id)
}

/// Where the cluster's record is in `Meta`.
pub const CLUSTER_KEY: &[u8] = b"cluster";

/// What the key of a leaving worker begins with.
pub const LEAVING_PREFIX: &[u8] = b"leaving/";

/// That a worker is to leave.
pub fn leaving_key(worker_id: u64) -> Vec<u8> {
    [LEAVING_PREFIX, &id_key(worker_id)].concat()
}

/// Client id, then sequence.
pub fn reply_key(client_id: u64, sequence: u64) -> [u8; 16] {
    pair_key(client_id, sequence)
}

/// Session id, then file id.
pub fn locked_key(session_id: u64, file_id: u64) -> [u8; 16] {
    pair_key(session_id, file_id)
}

fn pair_key(first: u64, second: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&first.to_be_bytes());
    key[8..].copy_from_slice(&second.to_be_bytes());
    key
}
