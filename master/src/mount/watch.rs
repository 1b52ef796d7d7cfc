//! Listening to the event streams of under stores: what they tell is looked at again at its next access.
//!
//! Run by the service: one task per mount that asks for it, looked for every second, so that mounts come and go. Invariant: an event
//! is only ever a reason to ask the store once more; a stream that is silent or torn costs freshness, down to the sync interval, and
//! no correctness.

use super::{Mounted, events};
use crate::core::Core;
use crate::store::Reader;
use forebay_common::{MountId, Result, counter};
use forebay_proto::store::Mount;
use forebay_ufs::{Happened, HdfsEvents};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

counter!(TOLD, "forebay_master_store_events_total", "paths that the event streams of under stores told of");
counter!(MISSED, "forebay_master_store_events_missed_total", "times that an event stream had lost some: all of its mount is looked at again");
counter!(FAILED, "forebay_master_store_events_failed_total", "looks at an event stream that failed");

/// How often mounts that came or went are looked for.
const LOOK_FOR_MOUNTS: Duration = Duration::from_secs(1);
/// After a look that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Runs until shutdown.
pub async fn run(core: Arc<Core>, shutdown: CancellationToken) {
    let mut listening: HashMap<MountId, (Mount, Option<JoinHandle<()>>)> = HashMap::new();
    let mut tick = tokio::time::interval(LOOK_FOR_MOUNTS);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            _ = tick.tick() => {}
        }
        let Ok(mounts) = core.store.view().mounts() else { continue };
        // One that is gone, or has other options, is another one.
        listening.retain(|_, (record, task)| {
            let stays = mounts.iter().any(|m| m == record);
            if !stays && let Some(task) = task {
                task.abort();
            }
            stays
        });
        for record in mounts {
            let id = MountId(record.id);
            if listening.contains_key(&id) {
                continue;
            }
            let Ok(mounted) = core.soft.mounts.get(&core.store, &core.config, id) else { continue };
            let task = match mounted.ufs.events() {
                Ok(events) => events.map(|events| tokio::spawn(listen(core.clone(), mounted.clone(), events))),
                Err(e) => {
                    tracing::error!(path = %mounted.path, error = %e, "the event stream of a mount cannot be read");
                    None
                }
            };
            listening.insert(id, (record, task));
        }
    }
    listening.into_values().filter_map(|(_, task)| task).for_each(|task| task.abort());
}

async fn listen(core: Arc<Core>, mounted: Arc<Mounted>, mut events: HdfsEvents) {
    let mut failing = false;
    loop {
        let wait = match events.look().await {
            Ok(Happened::Changed(keys)) => {
                failing = false;
                TOLD.inc_by(keys.len() as u64);
                for key in &keys {
                    if let Err(e) = take(&core, &mounted, key).await {
                        tracing::warn!(path = %mounted.path, error = %e, "an event could not be taken; all is looked at again");
                        core.syncer.invalidate_all();
                    }
                }
                // What happens faster than it is told is asked for at once.
                if events.is_behind() { Duration::ZERO } else { events.interval }
            }
            Ok(Happened::Missed) => {
                failing = false;
                MISSED.inc();
                core.syncer.invalidate_all();
                events.interval
            }
            Err(e) => {
                FAILED.inc();
                if !failing {
                    tracing::warn!(path = %mounted.path, error = %e, "the event stream of a mount is not told; it is asked for on and on");
                }
                failing = true;
                AFTER_FAILURE
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// A folder that went away, moved, or was made again is told once, and not what was in it: nothing below it is believed any more, and it is looked
/// at now, so that all below it goes with it.
async fn take(core: &Core, mounted: &Mounted, key: &[u8]) -> Result<()> {
    if events::invalidate(core, &mounted.path, key)? {
        core.syncer.invalidate_all();
        let names = key.split(|b| *b == b'/').filter(|name| !name.is_empty());
        let path = names.into_iter().try_fold(mounted.path.clone(), |at, name| at.join(name))?;
        core.syncer.resolve(core, &core.own_identity(), &path).await?;
    }
    Ok(())
}
