//! Ending a block that somebody was writing when the lease of its file was taken away.

use crate::core::Core;
use forebay_common::{BlockId, Result, err};
use forebay_proto::SealBlock;
use std::sync::Arc;

/// Returns its length; 0 for one that is not here, or is not what the others of its pipeline have.
pub async fn seal(core: &Arc<Core>, order: &SealBlock) -> Result<u64> {
    let (at_work, order) = (core.clone(), *order);
    let sealed = tokio::task::spawn_blocking(move || -> Result<u64> {
        let id = BlockId(order.block_id);
        let wanted = Some(order.length).filter(|length| *length > 0);
        if let Some(open) = at_work.open_blocks.get(id)?
            && let Some(length) = open.recover(&at_work, order.generation_stamp, wanted)?
        {
            return Ok(length);
        }
        let length = at_work.store.peek_read(id).map_or(0, |b| b.header.length_bytes);
        if length > 0 && wanted.is_some_and(|wanted| wanted != length) {
            tracing::warn!(block = %id, length, wanted, "a block has another length than on the other workers of its pipeline; it is dropped");
            at_work.store.remove(id);
            return Ok(0);
        }
        Ok(length)
    });
    let length = sealed.await.map_err(|e| err!(Internal, "seal task: {e}"))??;
    if length > 0 {
        core.reporter.report_now().await;
    }
    Ok(length)
}
