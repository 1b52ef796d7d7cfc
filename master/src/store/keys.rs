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

/// Client id, then sequence.
pub fn reply_key(client_id: u64, sequence: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&client_id.to_be_bytes());
    key[8..].copy_from_slice(&sequence.to_be_bytes());
    key
}
