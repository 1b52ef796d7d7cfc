//! The scrubber: blocks of an earlier start are taken over and compared with their checksums, and then all blocks again and
//! again, at a limited rate. A block with a bad chunk is dropped, so that its bytes are fetched again.

use crate::core::Core;
use crate::store::{BlockFile, BlockStore};
use forebay_common::{ErrorKind, Result, counter};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

counter!(SCRUBBED, "forebay_worker_scrubbed_bytes_total", "bytes that the scrubber compared with their checksums");

/// Runs until shutdown.
pub async fn run(core: Arc<Core>, shutdown: CancellationToken) {
    let (adopted, stop) = (core.store.clone(), shutdown.clone());
    let adopt = tokio::task::spawn_blocking(move || while !stop.is_cancelled() && adopted.adopt_some() > 0 {});
    tokio::select! {
        () = shutdown.cancelled() => return,
        _ = adopt => {}
    }
    let mut first = true;
    loop {
        let all = core.store.ids();
        tracing::debug!(blocks = all.len(), first, "scrubbing");
        for id in all {
            // Not a use of the block: what nobody reads is not kept for having been looked at.
            let Some(file) = core.store.peek(id) else { continue };
            let began = Instant::now();
            let store = core.store.clone();
            let bytes = file.block.cached_bytes();
            let scrubbed = tokio::task::spawn_blocking(move || scrub(&store, &file, first));
            if !matches!(scrubbed.await, Ok(Ok(()))) {
                continue;
            }
            SCRUBBED.inc_by(bytes);
            let due = Duration::from_secs_f64(bytes as f64 / core.config.scrub_rate.as_u64().max(1) as f64);
            if stopped(&shutdown, due.saturating_sub(began.elapsed())).await {
                return;
            }
        }
        first = false;
        if stopped(&shutdown, Duration::from_millis(core.config.scrub_interval_ms)).await {
            return;
        }
    }
}

async fn stopped(shutdown: &CancellationToken, wait: Duration) -> bool {
    tokio::select! {
        () = shutdown.cancelled() => true,
        () = tokio::time::sleep(wait) => false,
    }
}

fn scrub(store: &BlockStore, file: &BlockFile, first: bool) -> Result<()> {
    let checked = if first { file.verify_all() } else { file.verify_again() };
    checked.inspect_err(|e| {
        if e.kind() == ErrorKind::Corrupt {
            tracing::error!(error = %e, "the scrubber found a damaged block");
        }
        store.note_read_error(file, e);
    })
}
