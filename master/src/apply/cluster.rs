//! Which cluster this is, and where its numbers go on: told by each master before it serves.
//!
//! Invariant: a number of a file, block or lease, or of a content of a file, is handed out once. Data that were put back to an earlier state do not know what was handed out
//! after it, and data that are begun anew know nothing; but workers, mounts and Hadoop's clients may. Hence numbers begin at a drawn place, and whenever a master
//! starts they go on a drawn distance behind the last that was used: what others know from a state that is lost is not met again. Those that were skipped and not used
//! are not lost: a master that starts again and again skips them again.

use super::context::Context;
use crate::store::{CLUSTER_KEY, Cf, Reader};
use forebay_common::{Result, err};
use forebay_proto::journal::OpenCluster;
use forebay_proto::store::{Cluster, Numbered};

/// No jump goes beyond it: what reads our JSON may keep numbers as doubles.
const JUMPS_END: u64 = 1 << 53;

pub fn open(c: &mut Context<'_, '_>, op: &OpenCluster) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "user {} is not a superuser: only a master opens a cluster", c.who.user));
    }
    let fresh = super::numbered_nothing(&c.counters);
    let known: Option<Cluster> = c.txn.record(Cf::Meta, CLUSTER_KEY)?;
    let mut cluster = known.unwrap_or_else(|| Cluster { id: op.cluster_id.clone(), older: !fresh, ..Cluster::default() });
    let counters = &mut c.counters;
    if fresh && op.first_id > counters.next_block_id {
        cluster.skipped_blocks.push(Numbered { used: counters.next_block_id, from: op.first_id });
    }
    let numbers = [
        (&mut counters.next_inode_id, &mut cluster.inodes),
        (&mut counters.next_block_id, &mut cluster.blocks),
        (&mut counters.next_lease_id, &mut cluster.leases),
    ];
    for (next, numbered) in numbers {
        let numbered = numbered.get_or_insert_default();
        if fresh {
            *next = op.first_id.max(*next);
            *numbered = Numbered { used: *next, from: *next };
        } else {
            go_on(next, numbered, op.step);
        }
    }
    skipped(&mut cluster);
    // A change gives a file one version more at most, and this one gives none.
    let versions = cluster.versions.get_or_insert_default();
    let mut next = versions.from + c.change.saturating_sub(cluster.opened_change + 1);
    if !fresh {
        go_on(&mut next, versions, op.step);
    }
    (counters.versions_from, cluster.opened_change) = (versions.from, c.change);
    c.txn.put(Cf::Meta, CLUSTER_KEY, &cluster);
    Ok(())
}

/// Notes which numbers of blocks nobody gets: what has one of these is of a later state that was lost, or of none (`block/orphans`).
fn skipped(cluster: &mut Cluster) {
    let Some(Numbered { used, from }) = cluster.blocks.filter(|blocks| blocks.from > blocks.used) else { return };
    match cluster.skipped_blocks.last_mut().filter(|last| last.used == used) {
        Some(last) => last.from = from,
        None => cluster.skipped_blocks.push(Numbered { used, from }),
    }
}

/// Has `next` go on `step` behind the last number that was used.
fn go_on(next: &mut u64, numbered: &mut Numbered, step: u64) {
    if *next != numbered.from {
        numbered.used = *next;
    }
    *next = numbered.used.checked_add(step).filter(|to| *to <= JUMPS_END).unwrap_or(*next);
    numbered.from = *next;
}

#[cfg(test)]
mod tests {
    use super::super::{AppliedRecord, Limits, apply_entry};
    use super::*;
    use crate::store::Store;
    use forebay_common::InodeId;
    use forebay_proto::journal::{Command, Complete, Create, Reopen, Reply, command::Op};
    use forebay_proto::store::Counters;

    struct Machine(Store, AppliedRecord, #[expect(dead_code, reason = "removed when it is dropped")] tempfile::TempDir);

    impl Machine {
        fn new() -> Machine {
            let dir = tempfile::tempdir().unwrap();
            Machine(Store::open(dir.path(), 1 << 20).unwrap(), AppliedRecord::default(), dir)
        }

        fn apply(&mut self, superuser: bool, op: Option<Op>) -> Result<Reply> {
            let command = Command { principal: "root".into(), superuser, now_ms: 1, op, ..Command::default() };
            let limits = Limits { replies_per_client: 8, clients_max: 8 };
            Ok(apply_entry(&self.0, &[command], &mut self.1, &limits)?.remove(0))
        }

        fn one(&mut self, op: Op) -> Reply {
            let reply = self.apply(true, Some(op)).unwrap();
            assert_eq!(reply.error_kind, 0, "{}", reply.error_message);
            reply
        }

        fn open(&mut self, id: &str, first_id: u64, step: u64) -> (Cluster, [u64; 4]) {
            let op = OpenCluster { cluster_id: id.into(), first_id, step };
            self.one(Op::OpenCluster(op));
            (self.0.view().cluster().unwrap(), numbers(&self.0.view().counters().unwrap()))
        }

        fn create(&mut self, path: &'static [u8]) -> Reply {
            let sizes = Create { block_size_bytes: 65_536, page_size_bytes: 65_536, block_count: 1, ..Create::default() };
            self.one(Op::Create(Create { path: path.into(), cached: true, lease_ttl_ms: 1, ..sizes }))
        }
    }

    fn numbers(counters: &Counters) -> [u64; 4] {
        [counters.next_inode_id, counters.next_block_id, counters.next_lease_id, counters.versions_from]
    }

    /// The first master gives the id and the place. Each later one goes on a drawn distance behind what was used: also where nothing was since the last start, because a
    /// state from before may have been put back; and no further, so that a master that starts again and again uses nothing up.
    #[test]
    fn a_cluster_is_founded_once_and_goes_on_elsewhere() {
        let mut machine = Machine::new();
        let (cluster, next) = machine.open("CID-1", 1_000, 50);
        assert_eq!((cluster.id.as_str(), cluster.older, next), ("CID-1", false, [1_000, 1_000, 1_000, 0]));
        assert_eq!(machine.open("CID-2", 7_000, 50).1, [1_050, 1_050, 1_050, 50]);
        assert_eq!(machine.open("CID-2", 7_000, 60).1, [1_060, 1_060, 1_060, 60]);
        machine.create(b"/f");
        let (cluster, next) = machine.open("CID-3", 7_000, 100);
        assert_eq!((cluster.id.as_str(), next), ("CID-1", [1_161, 1_161, 1_161, 161]));
        let skipped: Vec<(u64, u64)> = cluster.skipped_blocks.iter().map(|s| (s.used, s.from)).collect();
        assert_eq!(skipped, [(1, 1_000), (1_000, 1_060), (1_061, 1_161)]);
        for (id, never) in [(999, true), (1_000, true), (1_059, true), (1_060, false), (1_061, true), (1_160, true), (1_161, true), (1 << 52, true)] {
            assert_eq!(crate::cluster::never_numbered(&cluster, next[1], forebay_common::BlockId(id)), never, "{id}");
        }
        machine.create(b"/g");
        assert_eq!(machine.open("CID-3", 7_000, JUMPS_END).1, next.map(|n| n + 1), "there is no room for such a jump");
        machine.create(b"/h");
        assert_eq!(machine.open("CID-3", 7_000, 10).1, next.map(|n| n + 12));
    }

    /// One that was there before ids keeps its numbers, and blocks that name no cluster may be its own.
    #[test]
    fn an_older_cluster_gets_its_id_later() {
        let mut machine = Machine::new();
        for path in [&b"/f"[..], b"/g", b"/h"] {
            machine.create(path);
        }
        let [inodes, blocks, leases, _] = numbers(&machine.0.view().counters().unwrap());
        let (cluster, next) = machine.open("CID-1", 1_000, 50);
        assert_eq!((cluster.older, next), (true, [inodes + 50, blocks + 50, leases + 50, 53]));
        assert!(machine.open("CID-2", 1_000, 50).0.older);
    }

    /// A content that replaces another has a number of this start: mounts keep pages by file, version and length.
    #[test]
    fn versions_of_contents_go_on_elsewhere() {
        let mut machine = Machine::new();
        machine.open("CID-1", 1_000, 50);
        let made = machine.create(b"/f");
        let file = |machine: &Machine| machine.0.view().inode(InodeId(made.file_id)).unwrap().unwrap().1;
        let (block_ids, block_lengths) = (made.block_ids.clone(), vec![5]);
        machine.one(Op::Complete(Complete {
            file_id: made.file_id,
            lease_id: made.lease_id,
            length: 5,
            block_ids,
            block_lengths,
            ..Complete::default()
        }));
        assert_eq!(file(&machine).content_version, 1);
        let (_, [.., from]) = machine.open("CID-1", 1_000, 50);
        let changed_index = file(&machine).changed_index;
        let again = Reopen { path: b"/f"[..].into(), changed_index, lease_ttl_ms: 1, ..Reopen::default() };
        machine.one(Op::Reopen(again));
        assert_eq!(file(&machine).content_version, from);
    }

    #[test]
    fn nobody_else_opens_a_cluster() {
        let mut machine = Machine::new();
        assert_ne!(machine.apply(false, Some(Op::OpenCluster(OpenCluster::default()))).unwrap().error_kind, 0);
        assert!(machine.0.view().cluster().is_err());
    }

    /// A command of a newer version in the log ends the replay: passed over, it would be lost for good.
    #[test]
    fn a_command_that_is_not_known_is_not_passed_over() {
        let mut machine = Machine::new();
        let e = machine.apply(true, None).unwrap_err();
        assert!(e.kind() == forebay_common::ErrorKind::Unsupported && e.message().contains("newer version"), "{e}");
        assert_eq!(machine.0.view().counters().unwrap(), Counters::default(), "nothing was written");
    }
}
