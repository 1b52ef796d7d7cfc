//! Joined files: the blocks of a file of several blocks, once more, as one contiguous file, so that the kernel of a FUSE mount can read all of it by itself.
//!
//! Asked for by a session on behalf of a client that opens such a file. One is made in the background when it was asked for `worker.join_after` times and is not too large for
//! its folder, of blocks that are all here and whole; to the store it is a block like the others (room, eviction, grants, zombies), under a number that no master draws. Invariants: it is
//! named by a keyed hash of the token's block ids, so that it is the bytes of those blocks in that order and nothing else; it is reported to nobody, moved to no other tier, and not taken over by the
//! next process; when a block of it is removed by order it goes too.

use super::{BlockFile, BlockStore, Header, lock};
use bytes::BytesMut;
use forebay_common::block_header::flags_of;
use forebay_common::limits::{BLOCK_SIZE_RANGE_BYTES, CHUNK_SIZE_BYTES};
use forebay_common::token::Claims;
use forebay_common::{BlockId, InodeId, Result, checksum, counter, err};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

counter!(JOINED, "forebay_worker_joined_files_total", "files of several blocks that were joined, to be read by kernels in one piece");
counter!(FAILED, "forebay_worker_joined_failures_total", "files of several blocks that were to be joined and could not");

/// The bit of a block's number that says that it is joined; no master draws so many.
const JOINED_BIT: u64 = 1 << 63;
/// Bytes per page of a joined file: what is copied at once.
const PAGE_BYTES: u64 = 4 << 20;
/// The part of its folder's quota that one joined file may have.
const SHARE: u64 = 4;
/// And that all of them may have.
const ALL_SHARE: u64 = 2;
/// How long it is remembered that a file was asked for.
const ASKED_FOR: Duration = Duration::from_secs(600);
/// Files of which that is remembered, and blocks of which it is known that they are part of a joined file.
const REMEMBERED: usize = 65_536;

/// Whether a number is a joined file's.
pub fn is_joined(id: BlockId) -> bool {
    id.get() & JOINED_BIT != 0
}

#[derive(Default)]
pub struct Joins {
    key: RandomState,
    /// Since when, and how often; `None`: it could not be joined then.
    asked: Mutex<HashMap<BlockId, (Instant, Option<u32>)>>,
    parts: Mutex<HashMap<BlockId, BlockId>>,
    /// One at a time.
    at_work: AtomicBool,
}

struct AtWork<'a>(&'a AtomicBool);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Joins {
    fn id(&self, claims: &Claims) -> BlockId {
        let runs: Vec<(u64, u64)> = claims.blocks.iter().map(|run| (run.first, run.count)).collect();
        BlockId(self.key.hash_one((runs, claims.length_bytes)) | JOINED_BIT)
    }

    /// Counts a question; returns how many there were lately.
    fn ask(&self, id: BlockId) -> u32 {
        let mut asked = lock(&self.asked);
        if asked.len() >= REMEMBERED {
            asked.retain(|_, (at, _)| at.elapsed() < ASKED_FOR);
            if asked.len() >= REMEMBERED {
                asked.clear();
            }
        }
        let entry = asked.entry(id).or_insert((Instant::now(), Some(0)));
        if entry.0.elapsed() > ASKED_FOR {
            *entry = (Instant::now(), Some(0));
        }
        entry.1 = entry.1.map(|count| count + 1);
        entry.1.unwrap_or(0)
    }

    /// It could not be joined: not tried again for a while.
    fn fail(&self, id: BlockId) {
        lock(&self.asked).insert(id, (Instant::now(), None));
    }

    /// The joined file that a block is part of; asked once.
    pub fn take_part(&self, id: BlockId) -> Option<BlockId> {
        lock(&self.parts).remove(&id)
    }
}

/// Bytes of a block as they are read now, each chunk compared with the checksum that it was stored with. Errors: `Corrupt`.
fn copy_verified(from: &BlockFile, at: u64, length: usize, out: &mut BytesMut) -> Result<()> {
    const CHUNK: u64 = CHUNK_SIZE_BYTES as u64;
    let begins = at / CHUNK * CHUNK;
    let end = (at + length as u64).next_multiple_of(CHUNK).min(from.header.length_bytes);
    let bytes = from.bytes(begins, (end - begins) as usize)?;
    for (i, chunk) in bytes.chunks(CHUNK_SIZE_BYTES).enumerate() {
        let number = (begins / CHUNK) as usize + i;
        if checksum::crc32c(chunk) != from.chunk_crc(number) {
            return Err(err!(Corrupt, "block {} chunk {number} is not what was stored", from.header.block));
        }
    }
    out.extend_from_slice(&bytes[(at - begins) as usize..][..length]);
    Ok(())
}

impl BlockStore {
    /// The joined form of the file that a token is for, whole. Where there is none, it may be made for whoever asks later.
    pub fn joined(self: &Arc<Self>, claims: &Claims, join_after: u32) -> Option<Arc<BlockFile>> {
        let count: u64 = claims.blocks.iter().map(|run| run.count).sum();
        if count < 2 || join_after == 0 || claims.length_bytes > *BLOCK_SIZE_RANGE_BYTES.end() {
            return None;
        }
        let id = self.joins.id(claims);
        if self.index.get(id).is_some() {
            return self.get(id).filter(|file| file.is_full());
        }
        if self.joins.ask(id) >= join_after && !self.joins.at_work.swap(true, Ordering::SeqCst) {
            let (store, claims) = (self.clone(), claims.clone());
            tokio::task::spawn_blocking(move || {
                let _at_work = AtWork(&store.joins.at_work);
                let began = Instant::now();
                match store.join(id, &claims) {
                    Ok(()) => {
                        JOINED.inc();
                        tracing::debug!(
                            file = claims.file_id,
                            bytes = claims.length_bytes,
                            ms = began.elapsed().as_millis() as u64,
                            "a file is joined"
                        );
                    }
                    Err(e) => {
                        FAILED.inc();
                        store.joins.fail(id);
                        store.remove(id);
                        tracing::debug!(file = claims.file_id, error = %e, "a file is not joined");
                    }
                }
            });
        }
        None
    }

    /// Makes it. Blocks the thread. Errors: a block that is not here whole; `NoSpace`.
    fn join(&self, id: BlockId, claims: &Claims) -> Result<()> {
        let parts: Vec<BlockId> = claims.blocks.iter().flat_map(|run| run.first..run.first.saturating_add(run.count)).map(BlockId).collect();
        let here = |part: &BlockId| {
            let length = claims.block_span(*part).map_or(0, |(_, length)| length);
            self.has_bytes(*part, length).then_some(length).ok_or_else(|| err!(NotFound, "block {part} is not here whole"))
        };
        let length = parts.iter().map(here).sum::<Result<u64>>()?;
        if length != claims.length_bytes {
            return Err(err!(Corrupt, "blocks of {length} bytes are not a file of {}", claims.length_bytes));
        }
        let first = self.index.get(parts[0]).ok_or_else(|| err!(NotFound, "block {} is gone", parts[0]))?;
        let quota = first.share().map_or(u64::MAX, |share| share.quota_bytes()).min(first.dir.quota_bytes());
        let all: HashSet<BlockId> = lock(&self.joins.parts).values().copied().collect();
        let joined: u64 = all
            .iter()
            .filter_map(|id| self.index.get(*id))
            .filter(|block| Arc::ptr_eq(&block.dir, &first.dir))
            .map(|block| block.charged_bytes())
            .sum();
        if length > quota / SHARE || joined + length > quota / ALL_SHARE {
            return Err(err!(NoSpace, "a joined file of {length} bytes, with {joined} of others, is too much for {}", first.dir.path().display()));
        }
        let header = Header {
            block: id,
            file: InodeId(claims.file_id),
            length_bytes: length,
            page_size_bytes: PAGE_BYTES,
            flags: flags_of(false, first.header.mount()),
        };
        {
            let mut known = lock(&self.joins.parts);
            if known.len() + parts.len() > REMEMBERED {
                known.retain(|_, joined| self.index.get(*joined).is_some());
            }
            if known.len() + parts.len() > REMEMBERED {
                return Err(err!(LimitExceeded, "{REMEMBERED} blocks are parts of joined files, which is the limit"));
            }
            known.extend(parts.iter().map(|part| (*part, id)));
        }
        let file = self.get_or_create_in(header, Some(first.dir.medium()))?;
        let mut parts = parts.into_iter();
        let mut part: Option<(Arc<BlockFile>, u64)> = None;
        for page in 0..file.header.pages() {
            let (_, wanted) = file.header.page_span(page);
            let mut bytes = BytesMut::with_capacity(wanted);
            while bytes.len() < wanted {
                let (from, at) = match part.take().filter(|(from, at)| *at < from.header.length_bytes) {
                    Some(part) => part,
                    None => {
                        let next = parts.next().ok_or_else(|| err!(Corrupt, "the blocks end before their file"))?;
                        (self.peek(next).filter(|from| from.is_full()).ok_or_else(|| err!(NotFound, "block {next} is gone"))?, 0)
                    }
                };
                let take = (wanted - bytes.len()).min(usize::try_from(from.header.length_bytes - at).unwrap_or(usize::MAX));
                copy_verified(&from, at, take, &mut bytes)?;
                part = Some((from, at + take as u64));
            }
            self.fill_page(&file, page, &bytes)?;
        }
        // A block that was removed by order meanwhile has taken its entry with it.
        let whole = claims
            .blocks
            .iter()
            .flat_map(|run| run.first..run.first.saturating_add(run.count))
            .all(|part| lock(&self.joins.parts).contains_key(&BlockId(part)));
        if whole { Ok(()) } else { Err(err!(FileChanged, "a block was removed meanwhile")) }
    }
}
