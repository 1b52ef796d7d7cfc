//! Read-through: pages that are missing are fetched from the under store, stored, and handed to whoever waits.
//!
//! Called by sessions. A page is fetched once however many ask: the first starts a fetch, the others wait for it.
//! Neighbouring missing pages of one request are fetched as one range, up to `fetch_range`. A fetch names the fingerprint
//! that its token carries, so that two versions never mix; on a mismatch nothing is stored. Storing never fails a read, nor
//! slows it down: who reads by stream gets the bytes as soon as they are fetched, who reads the block's file waits until
//! they are stored. Where there is no room, or storing falls behind, they are served and not kept.

use crate::core::Core;
use crate::store::{BlockFile, Header};
use bytes::Bytes;
use forebay_common::block_header::flags_of;
use forebay_common::token::{Claims, UfsSource};
use forebay_common::{BlockId, Error, ErrorKind, InodeId, MountId, Result, counter, err};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokio::sync::{Semaphore, watch};

counter!(pub FETCHED, "forebay_worker_fetched_bytes_total", "bytes fetched from under stores");
counter!(COALESCED, "forebay_worker_fetch_coalesced_total", "page requests that joined a fetch under way");
counter!(UNSTORED, "forebay_worker_fetch_unstored_total", "pages served without being stored, for lack of room");

/// Runs that may wait for a slow tier; what comes beyond is not kept.
const STORING_MAX: usize = 32;

/// How far a page has come.
#[derive(Clone, Default)]
struct Progress {
    fetched: Option<Result<Bytes>>,
    /// It is stored, or will not be.
    settled: bool,
}

type Flights = Mutex<HashMap<(BlockId, usize), watch::Receiver<Progress>>>;

/// The fetches under way.
pub struct Fetcher {
    flights: Flights,
    permits: Arc<Semaphore>,
    storing: Arc<Semaphore>,
}

/// A page to be waited for.
pub struct Awaited(watch::Receiver<Progress>);

impl Awaited {
    /// The page's bytes. Errors: those of the under store, `FileChanged`.
    pub async fn bytes(mut self) -> Result<Bytes> {
        match self.0.wait_for(|p| p.fetched.is_some()).await {
            Ok(progress) => progress.fetched.clone().unwrap_or_else(|| Err(err!(Internal, "a fetch ended without an outcome"))),
            Err(_) => Err(err!(Unavailable, "the worker is stopping")),
        }
    }

    /// Waits until the page is stored, or will not be. Errors: as `bytes`.
    pub async fn settled(mut self) -> Result<()> {
        match self.0.wait_for(|p| p.settled).await {
            Ok(progress) => progress.fetched.clone().unwrap_or_else(|| Err(err!(Internal, "a fetch ended without an outcome"))).map(drop),
            Err(_) => Err(err!(Unavailable, "the worker is stopping")),
        }
    }
}

/// Where a block is in its file and under store.
#[derive(Clone)]
pub struct Target {
    pub block: BlockId,
    pub header: Header,
    pub file_offset: u64,
    pub source: Option<UfsSource>,
}

impl Target {
    /// Of a block that a token covers. Errors: `Unauthenticated` for one that it does not.
    pub fn of(claims: &Claims, block: BlockId) -> Result<Target> {
        let (file_offset, length_bytes) = claims
            .block_span(block)
            .filter(|(_, length)| *length > 0)
            .ok_or_else(|| err!(Unauthenticated, "block token does not cover block {block}"))?;
        let flags = flags_of(false, claims.mount().unwrap_or(MountId(0)));
        let header = Header { block, file: InodeId(claims.file_id), length_bytes, page_size_bytes: claims.page_size_bytes, flags };
        if !header.page_size_bytes.is_power_of_two() || !forebay_common::limits::PAGE_SIZE_RANGE_BYTES.contains(&header.page_size_bytes) {
            return Err(err!(InvalidArgument, "page size {} is not possible", header.page_size_bytes));
        }
        Ok(Target { block, header, file_offset, source: claims.ufs.clone() })
    }
}

impl Fetcher {
    pub fn new(concurrency: usize) -> Self {
        Fetcher { flights: Flights::default(), permits: Arc::new(Semaphore::new(concurrency)), storing: Arc::new(Semaphore::new(STORING_MAX)) }
    }

    fn flights(&self) -> std::sync::MutexGuard<'_, HashMap<(BlockId, usize), watch::Receiver<Progress>>> {
        self.flights.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Has the missing ones of `pages` fetched and returns what to wait for, page by page; `None` where a page is here.
///
/// Errors: `NotFound` when pages are missing and there is no under store to fetch them from.
pub fn request(core: &Arc<Core>, block: Option<&Arc<BlockFile>>, target: &Target, pages: Range<usize>) -> Result<Vec<(usize, Option<Awaited>)>> {
    let present = |page: usize| block.is_some_and(|b| b.has_page(page));
    if pages.clone().all(present) {
        return Ok(pages.map(|page| (page, None)).collect());
    }
    let Some(source) = &target.source else {
        return Err(err!(NotFound, "block {} is not on this worker, and its file is in no under store", target.block));
    };
    let per_run = usize::try_from(core.config.fetch_range.as_u64() / target.header.page_size_bytes).unwrap_or(1).max(1);
    let mut out = Vec::with_capacity(pages.len());
    let mut runs: Vec<Vec<(usize, watch::Sender<Progress>)>> = Vec::new();
    {
        let mut flights = core.fetcher.flights();
        for page in pages {
            // Looked at under the lock: a fetch that ends between the two looks has set the bit before it left the table.
            if present(page) {
                out.push((page, None));
                continue;
            }
            // One whose task died has no end to wait for.
            if let Some(flight) = flights.get(&(target.block, page)).filter(|f| f.has_changed().is_ok() || f.borrow().settled) {
                COALESCED.inc();
                out.push((page, Some(Awaited(flight.clone()))));
                continue;
            }
            let (sender, receiver) = watch::channel(Progress::default());
            flights.insert((target.block, page), receiver.clone());
            out.push((page, Some(Awaited(receiver))));
            match runs.last_mut() {
                Some(run) if run.len() < per_run && run.last().is_some_and(|(last, _)| last + 1 == page) => run.push((page, sender)),
                _ => runs.push(vec![(page, sender)]),
            }
        }
    }
    for run in runs {
        let (core, block, target, source) = (core.clone(), block.cloned(), target.clone(), source.clone());
        tokio::spawn(async move { fetch_run(&core, block, &target, &source, run).await });
    }
    Ok(out)
}

async fn fetch_run(core: &Arc<Core>, block: Option<Arc<BlockFile>>, target: &Target, source: &UfsSource, run: Vec<(usize, watch::Sender<Progress>)>) {
    let (first, last) = (run[0].0, run[run.len() - 1].0);
    let start = target.header.page_span(first).0;
    let end = target.header.page_span(last).0 + target.header.page_span(last).1 as u64;
    let fetched = fetch(core, source, target.file_offset + start, (end - start) as usize).await;
    match fetched {
        Ok(bytes) => {
            FETCHED.inc_by(bytes.len() as u64);
            let mut slices = Vec::with_capacity(run.len());
            for (page, sender) in &run {
                let (offset, length) = target.header.page_span(*page);
                let from = (offset - start) as usize;
                let slice = bytes.slice(from..from + length);
                sender.send_replace(Progress { fetched: Some(Ok(slice.clone())), settled: false });
                slices.push((*page, slice));
            }
            match (block, core.fetcher.storing.try_acquire()) {
                (Some(block), Ok(_permit)) => store_pages(core, block, slices).await,
                (None, _) => {}
                (Some(_), Err(_)) => UNSTORED.inc_by(slices.len() as u64),
            }
        }
        Err(e) => {
            if e.kind() == ErrorKind::FileChanged {
                core.reporter.note_changed_file(target.header.file, &source.fingerprint);
            }
            run.iter().for_each(|(_, sender)| drop(sender.send_replace(Progress { fetched: Some(Err(e.clone())), settled: false })));
        }
    }
    let mut flights = core.fetcher.flights();
    for (page, sender) in run {
        sender.send_modify(|progress| progress.settled = true);
        flights.remove(&(target.block, page));
    }
}

/// A block of one page that is to be fetched, by whoever has put it among the flights.
struct Small {
    index: usize,
    target: Target,
    source: UfsSource,
    sender: watch::Sender<Progress>,
}

/// Has many small blocks cached, each of one page, with as few changes of thread as possible: where the store is a file system, one
/// thread reads and stores them all. Returns the bytes fetched for each, or why it is not here.
pub async fn load_small(core: &Arc<Core>, targets: Vec<Target>) -> Vec<Result<u64>> {
    // What ends without a word of its own is not here.
    let mut outcomes: Vec<Result<u64>> = targets.iter().map(|t| Err(err!(Unavailable, "block {} was not loaded", t.block))).collect();
    let here: Vec<bool> = targets.iter().map(|t| core.store.has_bytes(t.block, t.header.length_bytes)).collect();
    let (mut own, mut others) = (Vec::new(), Vec::new());
    {
        let mut flights = core.fetcher.flights();
        for (index, target) in targets.into_iter().enumerate() {
            assert_eq!(target.header.pages(), 1, "small blocks have one page");
            let key = (target.block, 0);
            if here[index] {
                outcomes[index] = Ok(0);
                continue;
            }
            match (flights.get(&key).filter(|f| f.has_changed().is_ok() || f.borrow().settled), target.source.clone()) {
                (Some(flight), _) => others.push((index, target, Awaited(flight.clone()))),
                (None, None) => {
                    outcomes[index] = Err(err!(NotFound, "block {} is not on this worker, and its file is in no under store", target.block));
                }
                (None, Some(source)) => {
                    let (sender, receiver) = watch::channel(Progress::default());
                    flights.insert(key, receiver);
                    own.push(Small { index, target, source, sender });
                }
            }
        }
    }
    let fetched = fetch_small(core, own).await;
    for (index, outcome) in fetched {
        outcomes[index] = outcome;
    }
    for (index, target, awaited) in others {
        COALESCED.inc();
        outcomes[index] = match awaited.settled().await {
            Ok(()) if core.store.has_bytes(target.block, target.header.length_bytes) => Ok(0),
            // Served to whoever fetched it, and not kept: asked for again it may be.
            Ok(()) => Err(err!(Unavailable, "block {} was fetched and not kept", target.block)),
            Err(e) => Err(e),
        };
    }
    outcomes
}

async fn fetch_small(core: &Arc<Core>, own: Vec<Small>) -> Vec<(usize, Result<u64>)> {
    if own.is_empty() {
        return Vec::new();
    }
    // What is left in the table when this ends early would be waited for in vain: see `request`.
    let blocking = match core.under_store(MountId(own[0].source.mount_id)).await {
        Ok(store) if store.reads_block() && own.iter().all(|s| s.source.mount_id == own[0].source.mount_id) => Some(store),
        _ => None,
    };
    let length = |small: &Small| small.target.header.length_bytes as usize;
    let mut fetched = Vec::with_capacity(own.len());
    match &blocking {
        // Its limits are waited for here; reading itself is left to the thread that stores.
        Some(store) => {
            for small in &own {
                fetched.push(store.admit_read(&small.source.key, length(small)).await.map(|()| None));
            }
        }
        None => {
            let all = own.iter().map(|small| fetch(core, &small.source, small.target.file_offset, length(small)));
            fetched.extend(futures::future::join_all(all).await.into_iter().map(|bytes| bytes.map(Some)));
        }
    }
    let at_work = core.clone();
    let stored = tokio::task::spawn_blocking(move || {
        let take = |(small, fetched): (Small, Result<Option<Bytes>>)| {
            let bytes = match (fetched, &blocking) {
                (Ok(None), Some(store)) => read_small(store, &small),
                (Ok(bytes), _) => bytes.ok_or_else(|| err!(Internal, "a fetch ended without an outcome")),
                (Err(e), _) => Err(e),
            };
            (small.index, take_small(&at_work, &small, bytes))
        };
        own.into_iter().zip(fetched).map(take).collect()
    });
    stored.await.unwrap_or_else(|e| {
        tracing::error!(error = %e, "storing small blocks failed");
        Vec::new()
    })
}

fn read_small(store: &forebay_ufs::UnderStore, small: &Small) -> Result<Bytes> {
    let (source, length) = (&small.source, small.target.header.length_bytes as usize);
    match store.read_blocking(&source.key, small.target.file_offset, length, &source.fingerprint) {
        Err(e) if e.kind() == ErrorKind::NotFound && !source.previous_key.is_empty() => {
            store.read_blocking(&source.previous_key, small.target.file_offset, length, &source.fingerprint)
        }
        other => other,
    }
}

/// Tells who waits, stores, and ends the flight.
fn take_small(core: &Core, small: &Small, fetched: Result<Bytes>) -> Result<u64> {
    small.sender.send_replace(Progress { fetched: Some(fetched.clone()), settled: false });
    let outcome = fetched.and_then(|bytes| {
        FETCHED.inc_by(bytes.len() as u64);
        core.store.store_whole(small.target.header.clone(), &bytes).inspect_err(|_| UNSTORED.inc())?;
        Ok(bytes.len() as u64)
    });
    if let Err(e) = &outcome
        && e.kind() == ErrorKind::FileChanged
    {
        core.reporter.note_changed_file(small.target.header.file, &small.source.fingerprint);
    }
    small.sender.send_modify(|progress| progress.settled = true);
    core.fetcher.flights().remove(&(small.target.block, 0));
    outcome
}

async fn store_pages(core: &Arc<Core>, block: Arc<BlockFile>, slices: Vec<(usize, Bytes)>) {
    let store = core.store.clone();
    store.counters_of(&block.block.dir).misses.inc_by(slices.len() as u64);
    let stored = tokio::task::spawn_blocking(move || {
        for (page, bytes) in slices {
            if let Err(e) = store.fill_page(&block, page, &bytes) {
                UNSTORED.inc();
                tracing::debug!(error = %e, page, "a fetched page is served without being stored");
            }
        }
    });
    if let Err(e) = stored.await {
        tracing::error!(error = %e, "storing pages failed");
    }
}

/// One range of the file, of the token's version. While a rename is on its way to the store the old key is tried too.
pub async fn fetch(core: &Arc<Core>, source: &UfsSource, offset: u64, length: usize) -> Result<Bytes, Error> {
    let store = core.under_store(MountId(source.mount_id)).await?;
    // Before the permit: a mount that is held back must not hold back the others.
    store.admit_read(&source.key, length).await?;
    let _permit = core.fetcher.permits.acquire().await.map_err(|_| err!(Unavailable, "the worker is stopping"))?;
    match store.read_admitted(&source.key, offset, length, &source.fingerprint).await {
        Err(e) if e.kind() == ErrorKind::NotFound && !source.previous_key.is_empty() => {
            store.read_admitted(&source.previous_key, offset, length, &source.fingerprint).await
        }
        other => other,
    }
}

/// The block of a target, made when it is not here and there is room and a store to fill it from.
pub fn block_of(core: &Core, target: &Target) -> Option<Arc<BlockFile>> {
    let block = match &target.source {
        Some(_) => core.store.get_or_create(target.header.clone()).map_err(|e| tracing::debug!(error = %e, "reading through without a block")).ok(),
        None => core.store.get(target.block),
    }?;
    let same = block.header.length_bytes == target.header.length_bytes;
    if !same {
        tracing::error!(block = %target.block, "a block has another length than its file says; it is dropped");
        if !block.block.is_only_copy() {
            core.store.quarantine(target.block);
        }
    }
    same.then_some(block)
}
