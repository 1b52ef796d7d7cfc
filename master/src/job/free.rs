//! `free`: drops cached bytes of what an under store holds as well.

use super::{Done, Running, each};
use crate::core::Core;
use crate::free;
use crate::namespace::Found;
use forebay_common::{InodeId, Result, err};
use futures::FutureExt;
use std::sync::Arc;

pub async fn run(core: &Arc<Core>, running: &Arc<Running>) -> Result<()> {
    each(core, running, false, |path, inode| {
        let (core, running) = (core.clone(), running.clone());
        async move {
            let found = Found { parent: InodeId(0), name: Vec::new(), inode: inode.clone(), alias: None };
            let freed = free::below(&core, &running.who, &path, &found).await?;
            if freed.refused > 0 {
                return Err(err!(PermissionDenied, "user {} may not free {path}", running.who.user));
            }
            Ok(if freed.blocks == 0 { Done::Nothing } else { Done::Did(inode.length) })
        }
        .boxed()
    })
    .await
}
