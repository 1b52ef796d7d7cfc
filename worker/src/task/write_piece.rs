//! Writing a range of a file to an under store, as one piece of an object whose other pieces are written elsewhere.
//!
//! Nothing is published: whoever ordered the pieces does that when all are there, under the lease of the file.

use super::bytes_of;
use crate::core::Core;
use forebay_common::{MountId, Result, err};
use forebay_proto::{TaskOutcome, WritePiece};
use forebay_ufs::PieceWriter;
use std::sync::Arc;

pub async fn write_piece(core: &Arc<Core>, order: WritePiece) -> Result<TaskOutcome> {
    let from = order.from.clone().ok_or_else(|| err!(InvalidArgument, "an order without a file"))?;
    if order.offset.checked_add(order.length).is_none_or(|end| end > from.length) {
        return Err(err!(InvalidArgument, "a piece beyond the end of its file"));
    }
    let store = core.under_store(MountId(order.mount_id)).await?;
    let mut writer = store.piece_writer(&order.key, &order.upload, order.number, order.offset, from.length).await?;
    if let Err(e) = fill(core, &order, from, &mut writer).await {
        writer.abort().await;
        return Err(e);
    }
    let tags = writer.finish().await?;
    crate::write::WRITTEN_UFS.inc_by(order.length);
    Ok(TaskOutcome { bytes: order.length, tags, ..TaskOutcome::default() })
}

async fn fill(core: &Arc<Core>, order: &WritePiece, from: forebay_proto::FileBytes, writer: &mut PieceWriter) -> Result<()> {
    let mut written = 0;
    let mut bytes = bytes_of::range(core, from, order.offset..order.offset + order.length);
    while let Some(some) = bytes.recv().await {
        let some = some?;
        written += some.len() as u64;
        writer.write(some).await?;
    }
    if written != order.length {
        return Err(err!(Unavailable, "{written} of {} bytes could be read", order.length));
    }
    Ok(())
}
