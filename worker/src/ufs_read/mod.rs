//! Read-through: pages that are missing are fetched from the under store, stored, and handed to whoever waits.
//!
//! Called by sessions. A page is fetched once however many ask: the first starts a fetch, the others wait for it.
//! Neighbouring missing pages of one request are fetched as one range, up to `fetch_range`. A fetch names the fingerprint
//! that its token carries, so that two versions never mix; on a mismatch nothing is stored. Storing never fails a read:
//! where there is no room, waiters get the bytes that were fetched.

use crate::core::Core;
use crate::store::{BlockFile, FLAG_ONLY_COPY, Header};
use bytes::Bytes;
use forebay_common::token::{Claims, UfsSource};
use forebay_common::{BlockId, Error, ErrorKind, InodeId, MountId, Result, counter, err};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokio::sync::{Semaphore, watch};

counter!(pub FETCHED, "forebay_worker_fetched_bytes_total", "bytes fetched from under stores");
counter!(COALESCED, "forebay_worker_fetch_coalesced_total", "page requests that joined a fetch under way");
counter!(UNSTORED, "forebay_worker_fetch_unstored_total", "pages served without being stored, for lack of room");

type Outcome = Option<Result<Bytes>>;
type Flights = Mutex<HashMap<(BlockId, usize), watch::Receiver<Outcome>>>;

/// The fetches under way.
pub struct Fetcher {
    flights: Flights,
    permits: Arc<Semaphore>,
}

/// A page to be waited for.
pub struct Awaited(watch::Receiver<Outcome>);

impl Awaited {
    /// The page's bytes. Errors: those of the under store, `FileChanged`.
    pub async fn bytes(mut self) -> Result<Bytes> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or_else(|| Err(err!(Internal, "a fetch ended without an outcome"))),
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
        let header = Header { block, file: InodeId(claims.file_id), length_bytes, page_size_bytes: claims.page_size_bytes, flags: 0 };
        if !header.page_size_bytes.is_power_of_two() || !forebay_common::limits::PAGE_SIZE_RANGE_BYTES.contains(&header.page_size_bytes) {
            return Err(err!(InvalidArgument, "page size {} is not possible", header.page_size_bytes));
        }
        Ok(Target { block, header, file_offset, source: claims.ufs.clone() })
    }
}

impl Fetcher {
    pub fn new(concurrency: usize) -> Self {
        Fetcher { flights: Flights::default(), permits: Arc::new(Semaphore::new(concurrency)) }
    }

    fn flights(&self) -> std::sync::MutexGuard<'_, HashMap<(BlockId, usize), watch::Receiver<Outcome>>> {
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
    let mut runs: Vec<Vec<(usize, watch::Sender<Outcome>)>> = Vec::new();
    {
        let mut flights = core.fetcher.flights();
        for page in pages {
            // Looked at under the lock: a fetch that ends between the two looks has set the bit before it left the table.
            if present(page) {
                out.push((page, None));
                continue;
            }
            if let Some(flight) = flights.get(&(target.block, page)) {
                COALESCED.inc();
                out.push((page, Some(Awaited(flight.clone()))));
                continue;
            }
            let (sender, receiver) = watch::channel(None);
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

async fn fetch_run(core: &Arc<Core>, block: Option<Arc<BlockFile>>, target: &Target, source: &UfsSource, run: Vec<(usize, watch::Sender<Outcome>)>) {
    let (first, last) = (run[0].0, run[run.len() - 1].0);
    let start = target.header.page_span(first).0;
    let end = target.header.page_span(last).0 + target.header.page_span(last).1 as u64;
    let fetched = fetch(core, source, target.file_offset + start, (end - start) as usize).await;
    let pages: Vec<usize> = run.iter().map(|(page, _)| *page).collect();
    let outcomes: Vec<Result<Bytes>> = match fetched {
        Ok(bytes) => {
            FETCHED.inc_by(bytes.len() as u64);
            let slices: Vec<Bytes> = pages
                .iter()
                .map(|page| {
                    let (offset, length) = target.header.page_span(*page);
                    let from = (offset - start) as usize;
                    bytes.slice(from..from + length)
                })
                .collect();
            if let Some(block) = block {
                store_pages(core, block, pages.clone(), slices.clone()).await;
            }
            slices.into_iter().map(Ok).collect()
        }
        Err(e) => {
            if e.kind() == ErrorKind::FileChanged {
                core.reporter.note_changed_file(target.header.file, &source.fingerprint);
            }
            pages.iter().map(|_| Err(e.clone())).collect()
        }
    };
    let mut flights = core.fetcher.flights();
    for ((page, sender), outcome) in run.into_iter().zip(outcomes) {
        sender.send_replace(Some(outcome));
        flights.remove(&(target.block, page));
    }
}

async fn store_pages(core: &Arc<Core>, block: Arc<BlockFile>, pages: Vec<usize>, slices: Vec<Bytes>) {
    let store = core.store.clone();
    let stored = tokio::task::spawn_blocking(move || {
        for (page, bytes) in pages.into_iter().zip(slices) {
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
async fn fetch(core: &Arc<Core>, source: &UfsSource, offset: u64, length: usize) -> Result<Bytes, Error> {
    let _permit = core.fetcher.permits.acquire().await.map_err(|_| err!(Unavailable, "the worker is stopping"))?;
    let store = core.under_store(MountId(source.mount_id)).await?;
    match store.read(&source.key, offset, length, &source.fingerprint).await {
        Err(e) if e.kind() == ErrorKind::NotFound && !source.previous_key.is_empty() => {
            store.read(&source.previous_key, offset, length, &source.fingerprint).await
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
        if block.header.flags & FLAG_ONLY_COPY == 0 {
            core.store.quarantine(target.block);
        }
    }
    same.then_some(block)
}
