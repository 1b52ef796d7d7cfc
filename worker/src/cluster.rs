//! Which cluster this worker is of: what it tells of its blocks when it registers, and what it does when it is not let in.
//!
//! Called by `report`. Invariant: blocks of another cluster are given up only as `worker.discard_blocks_of` says.

use crate::core::Core;
use forebay_common::config::{Discard, UNNAMED_CLUSTER};
use forebay_common::{Result, counter, err};

counter!(DISCARDED, "forebay_worker_discarded_blocks_total", "blocks of another cluster that were given up");

/// Whose blocks are here; empty: of those that name no cluster.
pub fn told(core: &Core) -> Vec<String> {
    let mut clusters: Vec<String> = core.store.dirs_with_blocks().iter().map(|dir| dir.cluster()).collect();
    clusters.sort();
    clusters.dedup();
    clusters
}

/// Drops what may be dropped of other clusters' blocks than `cluster`'s, which those without a name are where it says so; returns how many. Reads headers off disks.
///
/// Errors: `WrongCluster` where bytes are nowhere else and were not given up by their cluster's name. What is in other folders is dropped all the same.
pub fn give_up_others(core: &Core, cluster: &str, unnamed_too: bool) -> Result<usize> {
    let (mut dropped, mut kept) = (0, Ok(()));
    for dir in core.store.dirs_with_blocks() {
        let of = dir.cluster();
        if of == cluster || (of.is_empty() && unnamed_too) {
            continue;
        }
        let may = core.config.discards(&of);
        if may == Discard::Nothing {
            continue;
        }
        let of = if of.is_empty() { UNNAMED_CLUSTER } else { &of };
        let open = core.open_blocks.in_dir(&dir);
        let only = core.store.only_copies_in(&dir) + open.len();
        if may == Discard::Cached && only > 0 {
            kept = Err(err!(
                WrongCluster,
                "{} has {only} blocks whose bytes are nowhere else: give cluster {of} its worker back, or give them up with worker.discard_blocks_of = [\"{of}\"]",
                dir.path().display()
            ));
            continue;
        }
        let gone = core.store.empty_dir(&dir, may == Discard::Cached) + open.len();
        open.into_iter().for_each(|id| core.open_blocks.discard(id));
        DISCARDED.inc_by(gone as u64);
        tracing::warn!(dir = %dir.path().display(), cluster = of, blocks = gone, only_copies = only, "blocks of another cluster are given up");
        dropped += gone;
    }
    kept.map(|()| dropped)
}
