//! `FileReader`: the bytes of one version of a file.
//!
//! Each block has its locations from the master, nearest first. A block granted by a worker of this machine is read from
//! its mapping with no call; others are streamed. `read_at` is for random access; `read` and `next_bytes` are sequential
//! and have bytes fetched ahead. When every source of a block failed, the file is looked up again (the same version
//! only) and tried on, until `client.call_timeout_ms`.

use crate::block::{Connection, LocalBlock, Source};
use crate::counters::add;
use crate::file_system::Inner;
use crate::pieces::Pieces;
use crate::prefetch::Window;
use bytes::{Bytes, BytesMut};
use forebay_common::layout::Layout;
use forebay_common::{AbsPath, BlockId, Error, ErrorKind, Result, checksum, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{BadChunk, BlockInfo, FileStatus, Fill, OpenResponse, ReadBlock, WorkerAddress};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};
use std::time::{Duration, Instant};

/// Bytes of one streamed request.
pub(crate) const REQUEST_BYTES: u64 = 2 << 20;
/// Bytes that `next_bytes` returns at most.
pub(crate) const PIECE_BYTES: usize = 1 << 20;
/// Bytes that one request of `load` asks for.
const LOAD_BYTES: u64 = 16 << 20;
/// Bytes that are compared with their checksums without a thread of their own.
const VERIFIED_HERE_BYTES: u64 = 1 << 20;
/// Bytes of a joined file for whose comparing an open waits.
const JOINED_VERIFIED_HERE_BYTES: u64 = 64 << 20;
/// Rounds over all sources in which the under store failed, before a read gives up.
const STORE_ROUNDS: u32 = 1;
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

pub(crate) struct Located {
    pub blocks: Vec<BlockInfo>,
    pub workers: HashMap<u64, (WorkerAddress, Bytes)>,
}

/// An open file. Reads through a shared reference may run at the same time.
pub struct FileReader {
    pub(crate) inner: Arc<Inner>,
    pub(crate) path: AbsPath,
    /// Where it is by now, where whoever reads has moved it.
    moved: RwLock<Option<AbsPath>>,
    status: FileStatus,
    located: RwLock<Arc<Located>>,
    local: Vec<RwLock<Weak<LocalBlock>>>,
    sequential: Mutex<Sequential>,
}

struct Sequential {
    position: u64,
    window: Window,
}

fn locate(answer: &mut OpenResponse) -> Located {
    let blocks = std::mem::take(&mut answer.blocks);
    let workers =
        std::mem::take(&mut answer.workers).into_iter().filter_map(|w| Some((w.address.as_ref()?.worker_id, (w.address?, w.token)))).collect();
    Located { blocks, workers }
}

impl FileReader {
    pub(crate) fn new(inner: Arc<Inner>, path: AbsPath, mut answer: OpenResponse) -> Result<FileReader> {
        let located = locate(&mut answer);
        let status = answer.status.ok_or_else(|| err!(Internal, "the master answered without a status"))?;
        let local = (0..located.blocks.len()).map(|_| RwLock::default()).collect();
        let sequential = Mutex::new(Sequential { position: 0, window: Window::growing(inner.config.readahead.as_u64()) });
        Ok(FileReader { inner, path, moved: RwLock::default(), status, local, located: RwLock::new(Arc::new(located)), sequential })
    }

    /// Bytes in the file.
    pub fn length(&self) -> u64 {
        self.status.length
    }

    /// Where the file is to be looked up from now on: it was moved by whoever reads it.
    pub fn note_moved(&self, path: AbsPath) {
        *self.moved.write().unwrap_or_else(|e| e.into_inner()) = Some(path);
    }

    /// Blocks of the file.
    pub fn block_count(&self) -> usize {
        self.local.len()
    }

    /// The status at opening.
    pub fn status(&self) -> &FileStatus {
        &self.status
    }

    pub(crate) fn located(&self) -> Arc<Located> {
        self.located.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Block number and range within it, for as much of `offset..offset + length` as lies in one block.
    pub(crate) fn within_block(&self, offset: u64, length: usize) -> (usize, Range<u64>) {
        let layout = Layout { block_size_bytes: self.status.block_size_bytes, length_bytes: self.status.length, short: &self.status.short_blocks };
        let (block, begins) = layout.block_at(offset);
        let (_, block_length) = layout.span(block);
        let start = offset - begins;
        (block as usize, start..(start + length as u64).min(block_length))
    }

    /// Fills `out` from `offset` on; returns how many bytes there were before the end of the file.
    pub async fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        let wanted = usize::try_from(self.status.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let mut done = 0;
        while done < wanted {
            let (block, range) = self.within_block(offset + done as u64, wanted - done);
            let length = (range.end - range.start) as usize;
            let part = &mut out[done..done + length];
            if !self.read_mapped(block, range.clone(), part)? {
                self.read_slowly(block, range, part).await?;
            }
            done += length;
        }
        Ok(wanted)
    }

    /// Bytes without a copy where the block is mapped here and the range lies in one block; else with one.
    pub async fn slice(&self, offset: u64, length: usize) -> Result<Bytes> {
        let wanted = usize::try_from(self.status.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(length);
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let (block, range) = self.within_block(offset, wanted);
        if (range.end - range.start) as usize == wanted {
            if self.held(block).is_none_or(|l| l.missing(range.clone()).is_some()) {
                // Whatever goes wrong here is met again, and tried on other ways, below.
                let _ = self.make_present(block, range.clone(), range.clone()).await;
            }
            if let Some(local) = self.held(block)
                && local.missing(range.clone()).is_none()
                && let Ok(bytes) = local.slice(range.start, wanted)
            {
                add(&self.inner.counters.read_domain, wanted);
                return Ok(bytes);
            }
        }
        let mut out = BytesMut::zeroed(wanted);
        self.read_at(offset, &mut out).await?;
        Ok(out.freeze())
    }

    /// The next bytes of the file in order, at most 1 MiB, without a copy where they are mapped here; empty at the end.
    pub async fn next_bytes(&self) -> Result<Bytes> {
        let position = self.sequential().position;
        if position >= self.status.length {
            return Ok(Bytes::new());
        }
        let (_, range) = self.within_block(position, PIECE_BYTES);
        let length = (range.end - range.start) as usize;
        self.prefetch(position, length).await;
        let bytes = self.slice(position, length).await?;
        self.sequential().position += bytes.len() as u64;
        Ok(bytes)
    }

    /// Reads on from where the last `read` ended; 0 at the end of the file.
    pub async fn read(&self, out: &mut [u8]) -> Result<usize> {
        let position = self.sequential().position;
        self.prefetch(position, out.len()).await;
        let read = self.read_at(position, out).await?;
        self.sequential().position += read as u64;
        Ok(read)
    }

    /// Moves where `read` and `next_bytes` go on.
    pub fn seek(&self, position: u64) {
        self.sequential().position = position;
    }

    /// The bytes of a range in order, piece by piece: the fastest way to all bytes. Streamed blocks are asked for ahead,
    /// mapped ones are handed out without a copy.
    pub fn pieces(&self, range: Range<u64>) -> Pieces<'_> {
        Pieces::new(self, range)
    }

    /// Bytes at `offset` without waiting for anybody: where they are in a block that is mapped here, present and verified before or now.
    /// `None` where `slice` has to be asked.
    pub fn slice_now(&self, offset: u64, length: usize) -> Option<Bytes> {
        let wanted = usize::try_from(self.status.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(length);
        if wanted == 0 {
            return Some(Bytes::new());
        }
        let (block, range) = self.within_block(offset, wanted);
        let local = self.held(block).filter(|local| (range.end - range.start) as usize == wanted && local.missing(range.clone()).is_none())?;
        let bytes = local.slice(range.start, wanted).ok()?;
        add(&self.inner.counters.read_domain, wanted);
        Some(bytes)
    }

    /// The same as `descriptor`, but only of a block that is whole by now: nothing is fetched for it.
    pub async fn whole_descriptor(&self, block: usize) -> Option<std::os::fd::OwnedFd> {
        let length = self.located().blocks.get(block)?.length;
        self.make_present(block, 0..0, 0..0).await.ok()?;
        let local = self.held(block)?;
        if local.missing(0..length).is_some() {
            return None;
        }
        if local.is_wholly_verified() {
            return local.descriptor().try_clone_to_owned().ok();
        }
        // Little is compared sooner than another thread would begin to.
        if length <= VERIFIED_HERE_BYTES {
            local.verify(0..length).ok()?;
            return local.descriptor().try_clone_to_owned().ok();
        }
        let verified = tokio::task::spawn_blocking(move || local.verify(0..length).map(|()| local));
        verified.await.ok()?.ok()?.descriptor().try_clone_to_owned().ok()
    }

    /// The same of a file of several blocks, where a worker of this machine has it in one piece. Asking often makes it have one. One whose bytes are not compared
    /// with their checksums yet is compared now, for whoever asks next.
    pub async fn joined_descriptor(&self) -> Option<std::os::fd::OwnedFd> {
        let located = self.located();
        let file = (BlockId(located.blocks.first()?.id), BlockId(located.blocks.last()?.id), self.length());
        let local = self.inner.local_ids().await;
        let (address, token) = local.iter().find_map(|id| located.workers.get(id))?;
        let joined = self.inner.pool.grant_joined(address, token, file).await.ok()?;
        if joined.missing(0..file.2).is_some() {
            return None;
        }
        if !joined.is_wholly_verified() {
            let inner = self.inner.clone();
            let verified = tokio::task::spawn_blocking(move || match joined.verify_once() {
                Ok(done) => done.then_some(joined),
                Err(e) => {
                    tracing::warn!(error = %e, "a joined file is not what it should be");
                    inner.pool.forget(joined.block());
                    None
                }
            });
            if file.2 > JOINED_VERIFIED_HERE_BYTES {
                return None;
            }
            return verified.await.ok()??.descriptor().try_clone_to_owned().ok();
        }
        joined.descriptor().try_clone_to_owned().ok()
    }

    /// A duplicate of the granted descriptor of a block that is whole on this machine; `None` where it is not. For those
    /// who read by themselves (FUSE passthrough, the bench's reference); such reads are counted by nobody.
    pub async fn descriptor(&self, block: usize) -> Option<std::os::fd::OwnedFd> {
        let length = self.located().blocks.get(block)?.length;
        self.make_present(block, 0..length, 0..length).await.ok()?;
        let local = self.held(block)?;
        local.verify(0..length).ok()?;
        local.descriptor().try_clone_to_owned().ok()
    }

    /// Whether every block was whole on some worker when the file was looked up.
    pub fn is_cached(&self) -> bool {
        self.located().blocks.iter().all(|block| block.locations.iter().any(|at| at.cached_bytes >= block.length))
    }

    /// Has every block of the file cached, on the worker that the master names first for it; `each` is told of bytes as
    /// they become present.
    pub async fn load(&self, mut each: impl FnMut(u64)) -> Result<()> {
        let located = self.located();
        for (block, info) in located.blocks.iter().enumerate() {
            let nearest = info.locations.first().ok_or_else(|| self.nowhere(block))?;
            let (address, token) = located.workers.get(&nearest.worker_id).ok_or_else(|| self.nowhere(block))?;
            let (connection, _) = self.stream_connection(address).await?;
            let mut at = 0;
            let mut asked = VecDeque::new();
            while at < info.length || !asked.is_empty() {
                while at < info.length && asked.len() < 2 {
                    let length = (info.length - at).min(LOAD_BYTES);
                    let fill = Fill { token: token.clone(), block_id: info.id, offset: at, length, wait: true };
                    asked.push_back((connection.request(Op::Fill(fill), &[], 1).await?, length));
                    at += length;
                }
                if let Some((mut answers, length)) = asked.pop_front() {
                    answers.next().await.map_err(|e| e.context(format!("loading {}", self.path)))?;
                    each(length);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn count(&self, source: Source, bytes: usize) {
        match source {
            Source::Descriptor | Source::Domain => add(&self.inner.counters.read_domain, bytes),
            Source::Network => add(&self.inner.counters.read_remote, bytes),
        }
    }

    pub(crate) fn held(&self, block: usize) -> Option<Arc<LocalBlock>> {
        self.local.get(block)?.read().unwrap_or_else(|e| e.into_inner()).upgrade()
    }

    fn let_go(&self, block: usize) {
        if let Some(slot) = self.local.get(block) {
            *slot.write().unwrap_or_else(|e| e.into_inner()) = Weak::new();
        }
    }

    /// Reads from the mapping when the block is held and the range present. Errors: none but those of the last source.
    fn read_mapped(&self, block: usize, range: Range<u64>, out: &mut [u8]) -> Result<bool> {
        let Some(local) = self.held(block) else { return Ok(false) };
        if local.missing(range.clone()).is_some() || local.read(range.start, out).is_err() {
            return Ok(false);
        }
        add(&self.inner.counters.read_domain, out.len());
        Ok(true)
    }

    /// Has a block granted if a worker of this machine can, and its missing pages of `now` fetched; those of `ahead` too,
    /// without waiting. Errors: `Unsupported` when the block is to be streamed.
    pub(crate) async fn make_present(&self, block: usize, now: Range<u64>, ahead: Range<u64>) -> Result<()> {
        let located = self.located();
        let info = located.blocks.get(block).ok_or_else(|| err!(Internal, "{} has no block {block}", self.path))?;
        // Only where the nearest source is on this machine: a full remote copy beats a fetch from the under store.
        let nearest = info.locations.first().ok_or_else(|| self.nowhere(block))?;
        let (address, token) = located.workers.get(&nearest.worker_id).ok_or_else(|| self.nowhere(block))?;
        let local = match self.held(block) {
            Some(local) => local,
            None => {
                let local = self.inner.pool.grant(address, token, BlockId(info.id), info.length).await?;
                if let Some(slot) = self.local.get(block) {
                    *slot.write().unwrap_or_else(|e| e.into_inner()) = Arc::downgrade(&local);
                }
                local
            }
        };
        let fill = |range: Range<u64>, wait| {
            Op::Fill(Fill { token: token.clone(), block_id: info.id, offset: range.start, length: range.end - range.start, wait })
        };
        if ahead.end > now.end
            && let Some(missing) = local.missing(now.end..ahead.end)
        {
            let end = ahead.end.min(missing.start + LOAD_BYTES);
            drop(local.connection().request(fill(missing.start..end, false), &[], 1).await?);
        }
        if let Some(missing) = local.missing(now.clone()) {
            let filled = local.connection().call(fill(missing.start..now.end.max(missing.end), true)).await;
            if filled.as_ref().is_err_and(|e| e.kind() != ErrorKind::FileChanged) {
                self.let_go(block);
                self.inner.pool.forget(BlockId(info.id));
            }
            filled?;
            // Evicted between: the grant shows the old files, which are not filled any more.
            if local.missing(now).is_some() {
                self.let_go(block);
                self.inner.pool.forget(BlockId(info.id));
                return Err(err!(Unavailable, "block {} was evicted while it was filled", info.id));
            }
        }
        Ok(())
    }

    fn sequential(&self) -> MutexGuard<'_, Sequential> {
        self.sequential.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Has bytes behind a read fetched, as far as this reader is trusted to come to them.
    async fn prefetch(&self, position: u64, length: usize) {
        let ahead = self.sequential().window.advance(position, length as u64, self.status.length);
        if let Some(ahead) = ahead {
            self.fill_ahead(ahead).await;
        }
    }

    /// Has pages fetched without waiting for them, where their blocks are read on this machine.
    pub(crate) async fn fill_ahead(&self, ahead: Range<u64>) {
        let mut at = ahead.start;
        while at < ahead.end {
            let (block, range) = self.within_block(at, (ahead.end - at) as usize);
            if self.held(block).is_some() || at != ahead.start {
                let ended = self.make_present(block, range.start..range.start, range.clone()).await;
                if ended.is_err() {
                    return;
                }
            }
            at += range.end - range.start;
        }
    }

    fn nowhere(&self, block: usize) -> Error {
        err!(Unavailable, "no worker has block {block} of {} and none can fetch it: is a worker running?", self.path)
    }

    /// Every source in turn, then the master again, until the time is over.
    async fn read_slowly(&self, block: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let deadline = Instant::now() + self.inner.master.timeout();
        let mut backoff = BACKOFF_MIN;
        let mut refused_by_store = 0;
        loop {
            let error = match self.try_sources(block, range.clone(), out).await {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            // What an under store could not give was tried often enough by the worker and by the store's own layers.
            refused_by_store += u32::from(error.kind() == ErrorKind::UnderStore);
            let over = Instant::now() + backoff >= deadline || refused_by_store >= STORE_ROUNDS;
            if matches!(error.kind(), ErrorKind::FileChanged) || !error.is_retryable() || over {
                return Err(error.context(format!("reading {}", self.path)));
            }
            tracing::debug!(error = %error, path = %self.path, "no source answered; the file is looked up again");
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
            self.inner.pool.forgive_all();
            self.locate_again().await?;
        }
    }

    async fn locate_again(&self) -> Result<()> {
        let moved = self.moved.read().unwrap_or_else(|e| e.into_inner()).clone();
        let mut answer = match self.inner.open(moved.as_ref().unwrap_or(&self.path)).await {
            Ok(answer) => answer,
            Err(e) if e.is_retryable() => return Ok(()),
            Err(e) => return Err(e.context(format!("reading {}", self.path))),
        };
        let same = answer.status.as_ref().is_some_and(|s| s.file_id == self.status.file_id && s.content_version == self.status.content_version);
        if !same {
            return Err(err!(FileChanged, "{} is another version than the one opened: open it again", self.path));
        }
        *self.located.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(locate(&mut answer));
        Ok(())
    }

    async fn try_sources(&self, block: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let located = self.located();
        let info = located.blocks.get(block).ok_or_else(|| self.nowhere(block))?;
        let mut tried: Vec<String> = Vec::new();
        let mut last = None;
        if self.inner.config.short_circuit {
            let error = match self.make_present(block, range.clone(), range.clone()).await {
                Ok(()) => match self.held(block).map(|l| l.read(range.start, out)) {
                    Some(Ok(())) => {
                        add(&self.inner.counters.read_domain, out.len());
                        return Ok(());
                    }
                    Some(Err(e)) => {
                        self.report_bad(&located, info, range.start).await;
                        self.let_go(block);
                        self.inner.pool.forget(BlockId(info.id));
                        e
                    }
                    None => err!(Unavailable, "the grant was revoked"),
                },
                Err(e) => e,
            };
            if error.kind() == ErrorKind::FileChanged {
                return Err(error);
            }
            tried.push(format!("descriptor: {error}"));
            last = Some(error);
        }
        for location in &info.locations {
            let Some((address, token)) = located.workers.get(&location.worker_id) else { continue };
            match self.stream(address, token, info.id, range.clone(), out).await {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == ErrorKind::FileChanged => return Err(e),
                Err(e) => {
                    tried.push(format!("worker {}:{}: {e}", address.host, address.data_port));
                    last = Some(e);
                }
            }
        }
        match last {
            None => Err(self.nowhere(block)),
            Some(e) => {
                let retryable =
                    e.is_retryable() || info.locations.is_empty() || e.kind() == ErrorKind::NotFound || e.kind() == ErrorKind::Unauthenticated;
                Err(Error::new(e.kind(), format!("block {block} of {}: every source failed: {}", self.path, tried.join("; ")))
                    .with_retryable(retryable))
            }
        }
    }

    /// Tells the worker that a chunk did not match, so that it drops the block.
    async fn report_bad(&self, located: &Located, info: &BlockInfo, offset: u64) {
        let Some((address, token)) = info.locations.first().and_then(|l| located.workers.get(&l.worker_id)) else { return };
        if let Ok(connection) = self.inner.pool.domain(address).await {
            let bad = BadChunk { token: token.clone(), block_id: info.id, offset };
            let _ = connection.call(Op::BadChunk(bad)).await;
        }
    }

    /// The Unix socket where the worker is on this machine, else the network.
    pub(crate) async fn stream_connection(&self, address: &WorkerAddress) -> Result<(Arc<Connection>, Source)> {
        match self.inner.pool.domain(address).await {
            Ok(connection) => Ok((connection, Source::Domain)),
            Err(_) => Ok((self.inner.pool.network(address).await?, Source::Network)),
        }
    }

    async fn stream(&self, address: &WorkerAddress, token: &Bytes, block: u64, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let (connection, source) = self.stream_connection(address).await?;
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min(at + REQUEST_BYTES);
            let mut answers = request_range(&connection, token, block, at..stop, 0).await?;
            while at < stop {
                let bytes = next_piece(&mut answers, at).await?;
                let from = (at - range.start) as usize;
                let target = out.get_mut(from..from + bytes.len()).ok_or_else(|| err!(Corrupt, "more bytes than asked for arrived"))?;
                target.copy_from_slice(&bytes);
                at += bytes.len() as u64;
            }
        }
        self.count(source, out.len());
        Ok(())
    }
}

pub(crate) async fn request_range(
    connection: &Connection,
    token: &Bytes,
    block: u64,
    range: Range<u64>,
    readahead: u64,
) -> Result<crate::block::Answers> {
    let length = range.end - range.start;
    let read = ReadBlock { token: token.clone(), block_id: block, offset: range.start, length, readahead };
    connection.request(Op::ReadBlock(read), &[], 4 + (length >> 16) as usize).await
}

/// The next piece of a streamed range, checked.
pub(crate) async fn next_piece(answers: &mut crate::block::Answers, at: u64) -> Result<Bytes> {
    let received = answers.next().await?;
    let Answer::ReadData(data) = received.answer else { return Err(err!(Unavailable, "the worker answered something else")) };
    if data.offset != at || received.body.is_empty() {
        return Err(err!(Corrupt, "bytes at {} arrived instead of {at}", data.offset));
    }
    checksum::check_pieces(at, &data.crcs, &received.body)?;
    Ok(received.body)
}
