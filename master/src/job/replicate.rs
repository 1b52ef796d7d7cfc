//! `replicate`: gives files a number of copies, and waits until they have them.

use super::{Done, Running, each};
use crate::core::Core;
use crate::namespace;
use crate::source;
use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, Result, err};
use forebay_proto::journal::{SetReplication, command::Op};
use forebay_proto::store::Inode;
use futures::FutureExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const LOOK_AGAIN: Duration = Duration::from_millis(100);

pub async fn run(core: &Arc<Core>, running: &Arc<Running>) -> Result<()> {
    let (min, max) = {
        let job = running.job();
        (job.replicas, job.replicas_max)
    };
    super::workers(core, min as usize).await?;
    each(core, running, false, |path, inode| file(core.clone(), running.clone(), path, inode, min, max).boxed()).await
}

async fn file(core: Arc<Core>, running: Arc<Running>, path: AbsPath, inode: Inode, min: u32, max: u32) -> Result<Done> {
    if !inode.completed {
        return Err(err!(Busy, "{path} is still being written"));
    }
    core.change_as(&running.who, Op::SetReplication(SetReplication { file_ids: vec![inode.id], min, max })).await?;
    core.soft.replicas_dirty.store(true, Ordering::Relaxed);
    loop {
        let Some((_, inode)) = core.store.view().inode(InodeId(inode.id))? else {
            return Err(err!(NotFound, "{path} was deleted meanwhile"));
        };
        // Of what is in no under store no copy is dropped.
        let max = if inode.persisted { max } else { 0 };
        let live = core.soft.workers.live();
        let enough = |whole: usize| whole >= min as usize && (max == 0 || whole <= max.max(min) as usize);
        let mut counts = namespace::blocks(&inode).map(|(b, (_, length))| source::whole_on(&core, &live, b, length).len());
        if counts.all(|whole| enough(whole) || (min == 0 && whole == 0)) {
            return Ok(Done::Did(inode.length));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
