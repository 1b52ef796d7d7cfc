//! Block tokens: who may do what to which blocks on which worker, until when. The one thing a worker asks for.
//!
//! The master signs (HMAC-SHA256 over key id and claims), the worker verifies; no call between the two is needed. Keys
//! rotate and reach the workers by heartbeat. For a file that lives in an under store the claims also say where its
//! bytes are and which version was opened, so that the holder can have missing pages fetched, and nothing else.
//!
//! Invariants: the MAC is compared in constant time; claims are decoded only after the MAC held; a token is good for
//! the workers that it names only.

use crate::layout::Layout;
use crate::{BlockId, InodeId, MountId, Result, WorkerId, err};
use hmac::{Hmac, Mac};
use prost::Message;
use sha2::Sha256;
use std::sync::RwLock;

/// A run of block ids: `first`, `first + 1`, … `count` of them.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct BlockRun {
    /// The first id.
    #[prost(uint64, tag = "1")]
    pub first: u64,
    /// How many.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

/// Where a file's bytes are in an under store, and which version of them.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UfsSource {
    /// The mount whose credentials are to be used.
    #[prost(uint64, tag = "1")]
    pub mount_id: u64,
    /// The key below the mount's root.
    #[prost(bytes = "vec", tag = "2")]
    pub key: Vec<u8>,
    /// The version: an under store's fingerprint, compared for equality only.
    #[prost(string, tag = "3")]
    pub fingerprint: String,
    /// Where the bytes still are while a rename is on its way to the store; empty otherwise.
    #[prost(bytes = "vec", tag = "4")]
    pub previous_key: Vec<u8>,
}

/// What a token grants.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Claims {
    /// The file.
    #[prost(uint64, tag = "1")]
    pub file_id: u64,
    /// Its blocks in order, all of them or one.
    #[prost(message, repeated, tag = "2")]
    pub blocks: Vec<BlockRun>,
    /// Bytes in every block but the last, and `short_blocks`.
    #[prost(uint64, tag = "3")]
    pub block_size_bytes: u64,
    /// Bytes in the file; for a write token 0.
    #[prost(uint64, tag = "4")]
    pub length_bytes: u64,
    /// Bytes per page of its blocks.
    #[prost(uint64, tag = "5")]
    pub page_size_bytes: u64,
    /// `READ`, `WRITE` or both.
    #[prost(uint32, tag = "6")]
    pub rights: u32,
    /// On whose behalf.
    #[prost(string, tag = "7")]
    pub principal: String,
    /// The worker that takes this token, but for `other_workers`.
    #[prost(uint64, tag = "8")]
    pub worker_id: u64,
    /// Good until then, Unix milliseconds.
    #[prost(uint64, tag = "9")]
    pub expires_at_ms: u64,
    /// Where missing pages come from, or written bytes go to.
    #[prost(message, optional, tag = "10")]
    pub ufs: Option<UfsSource>,
    /// Written bytes are kept in the cache.
    #[prost(bool, tag = "11")]
    pub write_cached: bool,
    /// The lease this write happens under; 0 for a read.
    #[prost(uint64, tag = "12")]
    pub lease_id: u64,
    /// The mount that a written file lies in; in a token for reading `ufs` says it.
    #[prost(uint64, tag = "13")]
    pub mount_id: u64,
    /// Where in the file the first one of `blocks` begins.
    #[prost(uint64, tag = "14")]
    pub first_offset_bytes: u64,
    /// More workers that take this token: of a Hadoop client's block, which has one token for all of its replicas.
    #[prost(uint64, repeated, tag = "15")]
    pub other_workers: Vec<u64>,
    /// Shorter ones among `blocks`, counted from the first of them; as in `Layout`.
    #[prost(uint64, repeated, tag = "16")]
    pub short_blocks: Vec<u64>,
}

/// The right to read.
pub const READ: u32 = 1;
/// The right to write.
pub const WRITE: u32 = 2;

impl Claims {
    /// Whether the token covers `block`.
    pub fn covers(&self, block: BlockId) -> bool {
        self.block_index(block).is_some()
    }

    /// The position of `block` among `blocks`.
    fn block_index(&self, block: BlockId) -> Option<u64> {
        let mut before = 0;
        for run in &self.blocks {
            if let Some(i) = block.get().checked_sub(run.first)
                && i < run.count
            {
                return Some(before + i);
            }
            before += run.count;
        }
        None
    }

    /// Offset in the file and length of `block`, if the token covers it.
    pub fn block_span(&self, block: BlockId) -> Option<(u64, u64)> {
        let rest = Layout {
            block_size_bytes: self.block_size_bytes,
            length_bytes: self.length_bytes.saturating_sub(self.first_offset_bytes),
            short: &self.short_blocks,
        };
        let (offset, length) = rest.span(self.block_index(block)?);
        Some((self.first_offset_bytes + offset, length))
    }

    /// Where `block` begins in the file, if the token covers it; how long the file gets is not known while it is written.
    pub fn block_offset(&self, block: BlockId) -> Option<u64> {
        self.block_span(block).map(|(offset, _)| offset)
    }

    /// The file.
    pub fn file(&self) -> InodeId {
        InodeId(self.file_id)
    }

    /// The mount of the under store, if there is one.
    pub fn mount(&self) -> Option<MountId> {
        self.ufs.as_ref().map(|u| MountId(u.mount_id))
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Signed {
    #[prost(uint64, tag = "1")]
    key_id: u64,
    #[prost(bytes = "vec", tag = "2")]
    claims: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    mac: Vec<u8>,
}

/// A signing key. Its bytes appear in no log and no `Debug` output.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenKey {
    /// Random, names the key in a token.
    pub id: u64,
    /// 32 random bytes.
    pub secret: Vec<u8>,
}

impl TokenKey {
    /// A fresh random key.
    pub fn generate() -> Self {
        TokenKey { id: rand::random::<u64>() | 1, secret: rand::random::<[u8; 32]>().to_vec() }
    }

    fn mac(&self, claims: &[u8]) -> Result<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).map_err(|e| err!(Internal, "token key: {e}"))?;
        mac.update(&self.id.to_be_bytes());
        mac.update(claims);
        Ok(mac)
    }

    /// Signs `claims`.
    pub fn sign(&self, claims: &Claims) -> Result<Vec<u8>> {
        let claims = claims.encode_to_vec();
        let mac = self.mac(&claims)?.finalize().into_bytes().to_vec();
        Ok(Signed { key_id: self.id, claims, mac }.encode_to_vec())
    }
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenKey({:x})", self.id)
    }
}

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Signed with a key this worker has not heard of (yet).
    UnknownKey,
    /// Everything else; the text says which.
    Refused(String),
}

/// The keys a worker takes; filled by heartbeats.
#[derive(Debug, Default)]
pub struct KeyRing {
    keys: RwLock<Vec<TokenKey>>,
}

/// How far the clocks of master and worker may stand apart.
pub const CLOCK_SKEW_TOLERANCE_MS: u64 = 5_000;

impl KeyRing {
    /// Replaces the keys.
    pub fn set(&self, keys: Vec<TokenKey>) {
        *self.keys.write().unwrap_or_else(|e| e.into_inner()) = keys;
    }

    /// Verifies a token for `worker` and the `right` to be used now.
    pub fn verify(&self, token: &[u8], worker: WorkerId, right: u32, now_ms: u64) -> Result<Claims, Refusal> {
        let refuse = |why: &str| Refusal::Refused(why.to_owned());
        if token.is_empty() {
            return Err(refuse("no block token: open the file through the master first"));
        }
        let signed = Signed::decode(token).map_err(|_| refuse("malformed block token"))?;
        let keys = self.keys.read().unwrap_or_else(|e| e.into_inner());
        let key = keys.iter().find(|k| k.id == signed.key_id).ok_or(Refusal::UnknownKey)?;
        let mac = key.mac(&signed.claims).map_err(|e| refuse(e.message()))?;
        mac.verify_slice(&signed.mac).map_err(|_| refuse("block token with a wrong signature"))?;
        let claims = Claims::decode(signed.claims.as_slice()).map_err(|_| refuse("malformed block token"))?;
        if claims.worker_id != worker.get() && !claims.other_workers.contains(&worker.get()) {
            return Err(refuse("block token for another worker"));
        }
        if claims.expires_at_ms.saturating_add(CLOCK_SKEW_TOLERANCE_MS) < now_ms {
            return Err(refuse("block token is expired: open the file again"));
        }
        if claims.rights & right == 0 {
            return Err(refuse("block token does not carry this right"));
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        Claims {
            file_id: 7,
            blocks: vec![BlockRun { first: 10, count: 2 }, BlockRun { first: 40, count: 1 }],
            block_size_bytes: 100,
            length_bytes: 250,
            rights: READ,
            worker_id: 3,
            expires_at_ms: 1_000_000,
            ..Claims::default()
        }
    }

    /// A format on the wire: workers of one version take the tokens of a master of another.
    #[test]
    fn golden() {
        let key = TokenKey { id: 9, secret: vec![7; 32] };
        let ufs = UfsSource { mount_id: 1, key: b"k".to_vec(), fingerprint: "f".into(), previous_key: b"p".to_vec() };
        let all = Claims { page_size_bytes: 50, principal: "p".into(), ufs: Some(ufs), write_cached: true, lease_id: 6, ..claims() };
        let hex: String = key.sign(&all).unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0809123108071204080a1002120408281001186420fa01283230013a0170400348c0843d520b\
                    080112016b1a0166220170580160061a206ed72cf4168d85f10a41f281490c1e17069e7b1d2c6f47c589e8f85c9199423a"
        );
    }

    /// One block of a file, for several workers.
    #[test]
    fn a_block_alone_has_its_place_and_its_workers() {
        let one = Claims { blocks: vec![BlockRun { first: 40, count: 1 }], first_offset_bytes: 200, other_workers: vec![4, 5], ..claims() };
        assert_eq!((one.block_span(BlockId(40)), one.block_span(BlockId(10))), (Some((200, 50)), None));
        let hex: String = Claims { first_offset_bytes: 200, other_workers: vec![4, 5], ..Claims::default() }
            .encode_to_vec()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(hex, "70c8017a020405");
        // A block that is shorter than the others, in a token for it alone.
        let short = Claims { short_blocks: vec![0, 30], ..one.clone() };
        assert_eq!(short.block_span(BlockId(40)), Some((200, 30)));
        let key = TokenKey::generate();
        let token = key.sign(&one).unwrap();
        let ring = KeyRing::default();
        ring.set(vec![key]);
        for (worker, taken) in [(3, true), (4, true), (5, true), (6, false)] {
            assert_eq!(ring.verify(&token, WorkerId(worker), READ, 0).is_ok(), taken);
        }
    }

    #[test]
    fn spans_follow_the_runs() {
        let c = claims();
        assert_eq!(c.block_span(BlockId(11)), Some((100, 100)));
        assert_eq!(c.block_span(BlockId(40)), Some((200, 50)));
        assert_eq!(c.block_span(BlockId(12)), None);
        assert_eq!(c.block_span(BlockId(9)), None);
    }

    #[test]
    fn only_the_right_token_is_taken() {
        let (key, other) = (TokenKey::generate(), TokenKey::generate());
        let ring = KeyRing::default();
        let token = key.sign(&claims()).unwrap();
        assert_eq!(ring.verify(&token, WorkerId(3), READ, 0), Err(Refusal::UnknownKey));
        ring.set(vec![other, key]);
        assert_eq!(ring.verify(&token, WorkerId(3), READ, 0).unwrap(), claims());
        assert!(ring.verify(&token, WorkerId(4), READ, 0).is_err());
        assert!(ring.verify(&token, WorkerId(3), WRITE, 0).is_err());
        assert!(ring.verify(&token, WorkerId(3), READ, 2_000_000).is_err());
        assert!(ring.verify(b"", WorkerId(3), READ, 0).is_err());
        for i in 0..token.len() {
            let mut bad = token.clone();
            bad[i] ^= 1;
            assert!(ring.verify(&bad, WorkerId(3), READ, 0).is_err(), "flipped byte {i}");
        }
    }
}
