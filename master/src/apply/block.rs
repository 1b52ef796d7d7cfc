//! Block ids: drawn in runs, never twice; the family `Block` says whose each run is, a run that crosses a multiple of `RUN_SPAN` in several records.

use super::context::Context;
use crate::store::{Cf, id_key, run_floor, run_record, spans};
use forebay_common::{InodeId, Result, err};
use forebay_proto::store::Inode;

/// Draws `count` ids for a file and returns the first.
pub fn allocate(c: &mut Context<'_, '_>, owner: InodeId, count: u64) -> Result<u64> {
    let first = c.counters.next_block_id;
    c.counters.next_block_id =
        first.checked_add(count).filter(|next| *next <= i64::MAX as u64).ok_or_else(|| err!(LimitExceeded, "block ids are used up"))?;
    if count > 0 {
        put_run(c, first, count, owner);
    }
    Ok(first)
}

/// Appends a run to a file's list, joining it to the last one where they touch.
pub fn append_run(inode: &mut Inode, first: u64, count: u64) {
    if count == 0 {
        return;
    }
    if let [.., last_first, last_count] = inode.block_runs.as_mut_slice()
        && *last_first + *last_count == first
    {
        *last_count += count;
        return;
    }
    inode.block_runs.extend([first, count]);
}

/// Writes down whose the ids are.
pub fn put_run(c: &mut Context<'_, '_>, first: u64, count: u64, owner: InodeId) {
    for (first, count) in spans(first, count) {
        c.txn.put_raw(Cf::Block, &id_key(first), run_record(count, owner));
    }
}

/// Gives up all blocks of a file: workers are told to drop them.
pub fn free_all(c: &mut Context<'_, '_>, inode: &mut Inode) {
    for run in std::mem::take(&mut inode.block_runs).chunks_exact(2) {
        free_run(c, run[0], run[1]);
    }
}

/// Gives up the last id of a run of a file, of which `left` before it stay. Runs joined in a file's list may be several records.
pub fn free_last(c: &mut Context<'_, '_>, owner: InodeId, first: u64, left: u64) {
    use crate::store::Reader;
    let last = first + left;
    let record = c.txn.at_or_below(Cf::Block, &id_key(last), &id_key(run_floor(last))).ok().flatten();
    let start = record.and_then(|(key, _)| key.try_into().ok()).map_or(last, u64::from_be_bytes);
    c.txn.delete_id(Cf::Block, start);
    if start < last {
        put_run(c, start, last - start, owner);
    }
    c.reply.freed_first.push(last);
    c.reply.freed_count.push(1);
}

/// Gives up ids `first..first + count`. The records of runs inside them go; those that only overlap are the caller's to rewrite.
pub fn free_run(c: &mut Context<'_, '_>, first: u64, count: u64) {
    if count == 0 {
        return;
    }
    drop_records(c, first, count);
    c.reply.freed_first.push(first);
    c.reply.freed_count.push(count);
}

/// Ids `first..first + count`, which are whole runs of somebody, are another file's from now on.
pub fn give_run(c: &mut Context<'_, '_>, first: u64, count: u64, owner: InodeId) {
    if count > 0 {
        drop_records(c, first, count);
        put_run(c, first, count, owner);
    }
}

/// Of all ids that a file had, `runs`, it keeps `kept`; the rest is given up.
pub fn keep_only(c: &mut Context<'_, '_>, owner: InodeId, runs: &[u64], kept: &[u64]) {
    let ids = |runs: &[u64]| runs.chunks_exact(2).flat_map(|run| run[0]..run[0] + run[1]).collect::<Vec<u64>>();
    runs.chunks_exact(2).for_each(|run| drop_records(c, run[0], run[1]));
    kept.chunks_exact(2).for_each(|run| put_run(c, run[0], run[1], owner));
    let kept: std::collections::BTreeSet<u64> = ids(kept).into_iter().collect();
    for id in ids(runs).into_iter().filter(|id| !kept.contains(id)) {
        c.reply.freed_first.push(id);
        c.reply.freed_count.push(1);
    }
}

fn drop_records(c: &mut Context<'_, '_>, first: u64, count: u64) {
    use crate::store::Reader;
    // Runs joined in a file's list may be several records.
    let mut at = first;
    while at < first + count {
        let step = match c.txn.get(Cf::Block, &id_key(at)) {
            Ok(Some(raw)) => {
                c.txn.delete_id(Cf::Block, at);
                crate::store::parse_run(&raw).map_or(1, |(count, _)| count.max(1))
            }
            _ => 1,
        };
        at += step;
    }
}
