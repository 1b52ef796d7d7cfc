//! Passive caching: a block that is read again and again where it is not gets a copy there, up to the mount's `passive_replicas`.
//!
//! Called with every open. Soft: how often what was opened is remembered for a while, in bounded memory.

use crate::core::Core;
use crate::mount::Mounted;
use crate::source;
use forebay_common::{BlockId, WorkerId, counter};
use forebay_proto::BlockInfo;
use forebay_proto::store::Inode;
use forebay_proto::task::What;
use moka::sync::Cache;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

counter!(ORDERED, "forebay_master_passive_copies_total", "copies of blocks ordered because they were read where they were not");

/// Opens of a block by clients beside one worker that are remembered.
const REMEMBERED: u64 = 100_000;
const WINDOW: Duration = Duration::from_secs(600);
/// The open that makes a copy.
const COPIED_AT: u32 = 2;
/// Blocks of one open that are looked at: a long file is copied where it is read, not whole at once.
const BLOCKS_LOOKED_AT: usize = 64;

static OPENS: LazyLock<Cache<(u64, WorkerId), Arc<AtomicU32>>> =
    LazyLock::new(|| Cache::builder().max_capacity(REMEMBERED).time_to_live(WINDOW).build());

/// A client beside `local` workers opens a file.
pub fn note_open(core: &Core, inode: &Inode, mount: Option<&Mounted>, local: &[u64], blocks: &[BlockInfo]) {
    let limit = mount.map_or(1, |m| m.options.passive_replicas) as usize;
    let Some(beside) = local.first().map(|id| WorkerId(*id)).filter(|_| limit > 1) else { return };
    let live = core.soft.workers.live();
    if live.iter().all(|w| w.id != beside || w.leaving) {
        return;
    }
    for block in blocks.iter().take(BLOCKS_LOOKED_AT) {
        let id = BlockId(block.id);
        let whole = source::whole_on(core, &live, id, block.length);
        if whole.is_empty() || whole.contains(&beside) || whole.len() >= limit {
            continue;
        }
        let opens = OPENS.get_with((block.id, beside), Arc::default).fetch_add(1, Ordering::Relaxed) + 1;
        if opens == COPIED_AT
            && let Some(holder) = live.iter().find(|w| w.id == whole[0])
            && let Ok(order) = source::copy_order(core, inode, id, block.length, holder)
        {
            ORDERED.inc();
            // Its outcome is seen in the worker's report.
            drop(core.soft.tasks.submit(beside, What::Copy(order)));
        }
    }
}
