//! Which cluster this master is of, and which workers are of it.
//!
//! Called when the master starts, and for each worker that registers. Invariant: no block is taken for a file's because its number is: a worker has blocks of this
//! cluster alone, or is not let in.

use crate::journal::Journal;
use crate::store::{Reader, Store};
use forebay_common::config::UNNAMED_CLUSTER;
use forebay_common::{BlockId, Result, clock, counter, err};
use forebay_proto::RegisterRequest;
use forebay_proto::journal::{Command, OpenCluster, command::Op};
use forebay_proto::store::Cluster;
use std::ops::Range;

counter!(REFUSED, "forebay_master_workers_refused_total", "registrations refused because the worker has blocks of another cluster");

/// Where numbers of a new cluster begin, and how far behind the last one they go on when its master starts again (`apply::cluster`). Two runs from one state that give out
/// k numbers each meet with a probability of 2k in 2^40, and never where one of them was not started again: that gives out less than the least step.
const FIRST_IDS: Range<u64> = 1 << 40..1 << 51;
const STEPS: Range<u64> = 1 << 36..1 << 40;

/// Opens the cluster whose data these are; where they are none yet, it is founded, with the id `given` unless that is empty. Errors: they are of another one than `given`.
pub async fn open(journal: &Journal, store: &Store, started_by: &str, given: &str) -> Result<Cluster> {
    let op = OpenCluster {
        cluster_id: if given.is_empty() { format!("CID-{:016x}", rand::random::<u64>()) } else { given.to_owned() },
        first_id: rand::random_range(FIRST_IDS),
        step: rand::random_range(STEPS),
    };
    let command =
        Command { principal: started_by.to_owned(), superuser: true, now_ms: clock::now_ms(), op: Some(Op::OpenCluster(op)), ..Command::default() };
    journal.propose(command).await?;
    let cluster = store.view().cluster()?;
    if !given.is_empty() && given != cluster.id {
        return Err(err!(InvalidArgument, "master.cluster_id is {given}, and these are the data of cluster {}: leave it empty", cluster.id));
    }
    tracing::info!(cluster = cluster.id, "the cluster is open");
    Ok(cluster)
}

/// Whether this master's data say that a block of this number was never made; `next` is the one that would be made next. A worker may have it nevertheless: from a later state of the data.
pub fn never_numbered(cluster: &Cluster, next: u64, block: BlockId) -> bool {
    let id = block.get();
    let after = cluster.skipped_blocks.partition_point(|skipped| skipped.used <= id);
    id >= next || after.checked_sub(1).and_then(|at| cluster.skipped_blocks.get(at)).is_some_and(|skipped| id < skipped.from)
}

/// Whose blocks a worker has; empty: blocks that name no cluster, as all of a version that knew none.
pub fn told(request: &RegisterRequest) -> Vec<String> {
    match &request.clusters {
        Some(told) => told.ids.clone(),
        None if request.tiers.iter().any(|tier| tier.used_bytes > 0) => vec![String::new()],
        None => Vec::new(),
    }
}

/// Whether a worker with blocks of `clusters` (empty: blocks that name none) may be let in. Errors: `WrongCluster`, naming both.
pub fn admit(cluster: &Cluster, clusters: &[String]) -> Result<()> {
    let Some(theirs) = clusters.iter().find(|theirs| **theirs != cluster.id && !(theirs.is_empty() && cluster.older)) else { return Ok(()) };
    REFUSED.inc();
    let (of, id) = match theirs.as_str() {
        "" => ("written by a version that knew no clusters, before this cluster began".to_owned(), UNNAMED_CLUSTER),
        id => (format!("of cluster {id}"), id),
    };
    Err(err!(
        WrongCluster,
        "the worker's blocks are {of}, and this master is of cluster {}: give the worker its own master (client.master), or give that cluster's data back to this one; \
         to give the blocks up, start it with worker.discard_blocks_of = [\"{id}\"]",
        cluster.id
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_tells_nothing_may_have_blocks() {
        use forebay_proto::{Clusters, TierUsage};
        let tiers = vec![TierUsage::default(), TierUsage { used_bytes: 1, ..TierUsage::default() }];
        let older = RegisterRequest { tiers, ..RegisterRequest::default() };
        assert_eq!(told(&older), [""]);
        assert!(told(&RegisterRequest { clusters: Some(Clusters::default()), ..older }).is_empty());
        assert!(told(&RegisterRequest::default()).is_empty());
    }

    #[test]
    fn only_workers_of_this_cluster_are_let_in() {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let new = Cluster { id: "CID-1".into(), ..Cluster::default() };
        let older = Cluster { older: true, ..new.clone() };
        for (cluster, clusters, refused) in [
            (&new, names(&[]), None),
            (&new, names(&["CID-1"]), None),
            (&new, names(&["CID-1", "CID-2"]), Some("[\"CID-2\"]")),
            (&new, names(&[""]), Some("[\"unnamed\"]")),
            (&older, names(&["", "CID-1"]), None),
            (&older, names(&["", "CID-2"]), Some("of cluster CID-2, and this master is of cluster CID-1")),
        ] {
            let answer = admit(cluster, &clusters);
            assert_eq!(answer.is_err(), refused.is_some(), "{clusters:?}");
            if let (Err(e), Some(word)) = (answer, refused) {
                assert!(e.message().contains(word) && !e.is_retryable(), "{e}");
            }
        }
    }
}
