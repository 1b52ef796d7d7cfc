//! Having a block cached, whole.

use super::bytes_of;
use crate::core::Core;
use crate::ufs_read::{Target, request};
use forebay_common::config::Medium;
use forebay_common::{BlockId, Result, err};
use forebay_proto::LoadBlock;
use std::sync::Arc;

/// What counts as small: such a block is written in one go.
const SMALL_BYTES: u64 = 1 << 20;
/// Tries of pages that were fetched and not kept, because others were being stored.
const TRIES: u32 = 3;

/// Whether an order is for a block of one page, wherever it is kept: those are loaded by the batch.
pub fn is_small(order: &LoadBlock) -> bool {
    let one_page =
        |file: &forebay_proto::FileBytes| file.length > 0 && file.length <= file.page_size_bytes.min(file.block_size_bytes).min(SMALL_BYTES);
    order.tier.is_empty() && order.file.as_ref().is_some_and(one_page)
}

/// Loads a batch of small blocks; an outcome for each, in order.
pub async fn load_small(core: &Arc<Core>, orders: Vec<LoadBlock>) -> Vec<Result<u64>> {
    let targets = orders.into_iter().map(|order| {
        let file = order.file.ok_or_else(|| err!(InvalidArgument, "an order without a file"))?;
        Target::of(&bytes_of::claims(&file), BlockId(order.block_id))
    });
    let (mut outcomes, mut good, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (place, target) in targets.enumerate() {
        outcomes.push(Ok(0));
        match target {
            Ok(target) => {
                good.push(target);
                places.push(place);
            }
            Err(e) => outcomes[place] = Err(e),
        }
    }
    for (place, outcome) in places.into_iter().zip(crate::ufs_read::load_small(core, good).await) {
        outcomes[place] = outcome;
    }
    outcomes
}

/// Returns the bytes that were fetched. Errors: `NoSpace` when the block cannot be kept here.
pub async fn load(core: &Arc<Core>, order: LoadBlock) -> Result<u64> {
    let file = order.file.ok_or_else(|| err!(InvalidArgument, "an order without a file"))?;
    let target = Target::of(&bytes_of::claims(&file), BlockId(order.block_id))?;
    let medium = if order.tier.is_empty() { None } else { Some(order.tier.parse::<Medium>()?) };
    let (store, header) = (core.store.clone(), target.header.clone());
    let block = tokio::task::spawn_blocking(move || store.get_or_create_in(header, medium));
    let block = block.await.map_err(|e| err!(Internal, "load task: {e}"))??;
    if block.header.length_bytes != target.header.length_bytes {
        return Err(err!(Corrupt, "block {} has another length than its file says", target.block));
    }
    let pages = target.header.pages();
    let per_run = usize::try_from(core.config.fetch_range.as_u64() / target.header.page_size_bytes).unwrap_or(1).max(1);
    let mut fetched = 0;
    for first in (0..pages).step_by(per_run) {
        let run = first..pages.min(first + per_run);
        for attempt in 1.. {
            for (page, awaited) in request(core, Some(&block), &target, run.clone())? {
                if let Some(awaited) = awaited {
                    awaited.settled().await?;
                    fetched += target.header.page_span(page).1 as u64;
                }
            }
            if run.clone().all(|page| block.has_page(page)) {
                break;
            }
            if attempt >= TRIES {
                return Err(err!(NoSpace, "block {} was fetched and could not be kept: there is no room", target.block));
            }
        }
    }
    if !core.store.is_current(&block.block) {
        return Err(err!(NoSpace, "block {} was evicted while it was loaded: more was to be loaded than there is room for", target.block));
    }
    core.store.note_changed(target.block);
    Ok(fetched)
}
