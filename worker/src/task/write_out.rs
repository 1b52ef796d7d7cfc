//! Writing a file out to an under store: its bytes first, then a lease, then its name.
//!
//! A file that was acknowledged earlier is published under a lease that is asked for when all bytes are in the store: until then it
//! may be moved or deleted, and what was written is thrown away.

use super::bytes_of;
use crate::core::Core;
use crate::write::publish;
use forebay_common::{ErrorKind, MountId, Result, err};
use forebay_proto::{BeginPublishRequest, TaskOutcome, WriteOut};
use forebay_ufs::UfsWriter;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a worker with all bytes in the store waits for a change of the path to be over.
const BEGIN_WAIT: Duration = Duration::from_secs(5);
const BEGIN_AGAIN: Duration = Duration::from_millis(50);

/// Errors: `Expired` when the file is not to be there any more.
pub async fn write_out(core: &Arc<Core>, order: WriteOut) -> Result<TaskOutcome> {
    let from = order.from.clone().ok_or_else(|| err!(InvalidArgument, "an order without a file"))?;
    let length = from.length;
    let store = core.under_store(MountId(order.mount_id)).await?;
    let mut writer = store.writer(&order.key).await?;
    let lease_id = match fill(core, &order, from, &mut writer).await {
        Ok(lease_id) => lease_id,
        Err(e) => {
            writer.abort().await;
            return Err(e);
        }
    };
    let entry = publish(&core.master, order.file_id, lease_id, writer).await?;
    if entry.length != length {
        return Err(err!(UnderStore, "the under store holds {} bytes instead of {length}", entry.length));
    }
    crate::write::WRITTEN_UFS.inc_by(length);
    Ok(TaskOutcome { bytes: length, fingerprint: entry.fingerprint, lease_id, ..TaskOutcome::default() })
}

/// Hands all bytes to the store and returns the lease to publish under.
async fn fill(core: &Arc<Core>, order: &WriteOut, from: forebay_proto::FileBytes, writer: &mut UfsWriter) -> Result<u64> {
    let (length, mut written) = (from.length, 0);
    let mut pieces = bytes_of::range(core, from, 0..length);
    while let Some(piece) = pieces.recv().await {
        let piece = piece?;
        written += piece.len() as u64;
        writer.write(piece).await?;
    }
    if written != length {
        return Err(err!(Unavailable, "{written} of {length} bytes could be read"));
    }
    writer.settle().await?;
    if order.lease_id > 0 { Ok(order.lease_id) } else { begin(core, order).await }
}

async fn begin(core: &Arc<Core>, order: &WriteOut) -> Result<u64> {
    let deadline = Instant::now() + BEGIN_WAIT;
    loop {
        let request = BeginPublishRequest {
            cluster_secret: core.master.secret(),
            worker_id: core.id.get(),
            file_id: order.file_id,
            content_version: order.content_version,
            mount_id: order.mount_id,
            key: order.key.clone(),
        };
        match core.master.client().begin_publish(request).await {
            Ok(begun) => return Ok(begun.into_inner().lease_id),
            Err(status) => {
                let e = core.master.failed(&status);
                if e.kind() != ErrorKind::Busy || Instant::now() > deadline {
                    return Err(e);
                }
            }
        }
        tokio::time::sleep(BEGIN_AGAIN).await;
    }
}
