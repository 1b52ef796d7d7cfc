//! `persist`: has files of the cache alone, or on their way, in their under store.

use super::{Done, Running, each};
use crate::core::Core;
use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{QueuePersist, command::Op};
use forebay_proto::store::Inode;
use futures::FutureExt;
use std::sync::Arc;
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(50);

pub async fn run(core: &Arc<Core>, running: &Arc<Running>) -> Result<()> {
    each(core, running, false, |path, inode| file(core.clone(), running.clone(), path, inode).boxed()).await
}

async fn file(core: Arc<Core>, running: Arc<Running>, path: AbsPath, inode: Inode) -> Result<Done> {
    // A link or a pipe is in no store.
    if inode.persisted || inode.kind > 0 {
        return Ok(Done::Nothing);
    }
    if !inode.completed {
        return Err(err!(Busy, "{path} is still being written"));
    }
    core.change_as(&running.who, Op::QueuePersist(QueuePersist { file_ids: vec![inode.id] })).await?;
    core.persist.wake();
    loop {
        let now = core.store.view().inode(InodeId(inode.id))?;
        match now {
            None => return Err(err!(NotFound, "{path} was deleted meanwhile")),
            Some((_, now)) if now.persisted => return Ok(Done::Did(inode.length)),
            // It is tried for ever: what is in the way is shown, and mended or cancelled by whoever looks.
            Some((_, now)) => {
                if let Some(trouble) = core.persist.trouble(now.persist_id) {
                    running.job().message = trouble;
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
