//! Ending a block that somebody was writing when the lease of its file was taken away.

use crate::core::Core;
use crate::hadoop;
use forebay_common::{BlockId, Result};
use forebay_proto::SealBlock;
use std::sync::Arc;

/// Returns its length; 0 for one that is not here.
pub async fn seal(core: &Arc<Core>, order: &SealBlock) -> Result<u64> {
    let id = BlockId(order.block_id);
    if let Some(open) = core.open_blocks.get(id) {
        hadoop::end(core, &open, true).await?;
    }
    let store = core.store.clone();
    let there = tokio::task::spawn_blocking(move || store.peek_read(id).map_or(0, |b| b.header.length_bytes)).await;
    there.map_err(|e| forebay_common::err!(Internal, "seal task: {e}"))
}
