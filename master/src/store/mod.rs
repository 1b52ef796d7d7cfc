//! The state store: a RocksDB that holds the namespace, changed only by `apply` and read through snapshots.
//!
//! Its WAL is on but not synced per batch: after a crash it is an exact prefix of what was applied (point-in-time
//! recovery, one WAL for all column families), `Applied` says which, and the journal's log replays the rest.

mod cf;
mod keys;
mod reader;
mod txn;

pub use cf::Cf;
pub use keys::{CLUSTER_KEY, LEAVING_PREFIX, dentry_key, id_key, leaving_key, locked_key, reply_key, split_dentry_key, ttl_key};
pub use reader::{RUN_SPAN, Reader, View, parse_run, run_floor, run_record, spans};
pub use txn::Txn;

use forebay_common::{Error, ErrorKind, InodeId, Result, err};
use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBRecoveryMode, IteratorMode, Options, SliceTransform, WriteBatch};
use std::path::Path;
use std::sync::Arc;

/// How the records are to be read. 2: no record of the family `Block` crosses a span. 1 is not written down.
const FORMAT: u32 = 2;
/// Its key, in the family `Format`.
const FORMAT_KEY: &[u8] = b"format";
/// Records rewritten in one batch.
const SPLIT_AT_ONCE: usize = 10_000;
/// Bytes of the families whose records come and go, before they are flushed: what is gone is walked over by whoever looks at what is there, until then.
const PASSING_BUFFER_BYTES: usize = 4 << 20;
/// A file of theirs in which so many of so many records in turn are deletions is compacted soon.
const PASSING_DELETIONS: (usize, usize) = (64, 128);

/// The opened store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pub(crate) db: Arc<DB>,
}

/// A RocksDB error while `doing`.
pub(crate) fn rocks(doing: &str) -> impl FnOnce(rocksdb::Error) -> Error + '_ {
    move |e| {
        let kind = match e.kind() {
            rocksdb::ErrorKind::Corruption => ErrorKind::Corrupt,
            rocksdb::ErrorKind::IOError if e.as_ref().contains("No space") => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        };
        Error::new(kind, format!("metadata store: {doing}: {e}"))
    }
}

impl Store {
    /// Opens or creates the store in `dir`; one of an earlier format is rewritten. Errors: `Corrupt` with RocksDB's words, `Busy` when another process has it, `Unsupported`
    /// for a later format.
    pub fn open(dir: &Path, cache_bytes: usize) -> Result<Self> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_max_total_wal_size(256 << 20);
        options.set_max_open_files(512);
        options.set_max_background_jobs(2);
        options.set_keep_log_file_num(4);
        let cache = Cache::new_lru_cache(cache_bytes);
        let families = Cf::ALL.iter().map(|cf| {
            let mut o = Options::default();
            let mut table = BlockBasedOptions::default();
            table.set_block_cache(&cache);
            table.set_bloom_filter(10.0, false);
            table.set_cache_index_and_filter_blocks(true);
            table.set_pin_l0_filter_and_index_blocks_in_cache(true);
            table.set_format_version(5);
            o.set_block_based_table_factory(&table);
            o.set_write_buffer_size(if cf.is_passing() { PASSING_BUFFER_BYTES } else { 32 << 20 });
            if cf.is_passing() {
                o.add_compact_on_deletion_collector_factory(PASSING_DELETIONS.1, PASSING_DELETIONS.0, 0.0);
            }
            if *cf == Cf::Dentry {
                o.set_prefix_extractor(SliceTransform::create_fixed_prefix(8));
            }
            ColumnFamilyDescriptor::new(cf.name(), o)
        });
        let db = DB::open_cf_descriptors(&options, dir, families).map_err(|e| {
            if e.as_ref().contains("lock") {
                return err!(Busy, "metadata in {} is in use by another process: stop it first", dir.display());
            }
            rocks("opening")(e)
        })?;
        let store = Store { db: Arc::new(db) };
        match store.format()? {
            FORMAT => {}
            earlier if earlier < FORMAT => store.split_runs()?,
            later => {
                return Err(err!(
                    Unsupported,
                    "metadata in {} are of format {later}, this version knows formats up to {FORMAT}: start the version that wrote them, or a later one",
                    dir.display()
                ));
            }
        }
        Ok(store)
    }

    fn format(&self) -> Result<u32> {
        let raw = self.db.get_cf(self.cf(Cf::Format), FORMAT_KEY).map_err(rocks("reading"))?;
        raw.map_or(Ok(1), |raw| {
            raw.try_into().map(u32::from_be_bytes).map_err(|raw| err!(Corrupt, "metadata store: its format {raw:02x?} is no number"))
        })
    }

    /// From format 1 to 2: run records spoke of any number of blocks. Done once, before anything is applied; killed in the middle, it is done again.
    fn split_runs(&self) -> Result<()> {
        let family = self.cf(Cf::Block);
        let (mut batch, mut split) = (WriteBatch::default(), 0_u64);
        for pair in self.db.iterator_cf(family, IteratorMode::Start) {
            let (key, raw) = pair.map_err(rocks("reading"))?;
            let (Ok(first), Some((count, owner))) = ((*key).try_into().map(u64::from_be_bytes), parse_run(&raw)) else {
                return Err(err!(Corrupt, "block run {key:02x?} does not decode"));
            };
            if run_floor(first).saturating_add(RUN_SPAN) >= first.saturating_add(count) {
                continue;
            }
            split += 1;
            for (first, count) in spans(first, count) {
                batch.put_cf(family, id_key(first), run_record(count, InodeId(owner)));
            }
            if batch.len() >= SPLIT_AT_ONCE {
                self.db.write(std::mem::take(&mut batch)).map_err(rocks("writing"))?;
            }
        }
        batch.put_cf(self.cf(Cf::Format), FORMAT_KEY, FORMAT.to_be_bytes());
        self.db.write(batch).map_err(rocks("writing"))?;
        if split > 0 {
            tracing::info!(runs = split, "records of an earlier version were rewritten");
        }
        Ok(())
    }

    /// A consistent view of one moment.
    pub fn view(&self) -> View<'_> {
        View::new(self)
    }

    pub(crate) fn cf(&self, cf: Cf) -> &rocksdb::ColumnFamily {
        match self.db.cf_handle(cf.name()) {
            Some(handle) => handle,
            None => unreachable!("column family {} is opened with the store", cf.name()),
        }
    }

    /// Makes everything applied so far durable.
    pub fn flush(&self) -> Result<()> {
        self.db.flush_wal(true).map_err(rocks("syncing"))?;
        let families: Vec<_> = Cf::ALL.iter().map(|cf| self.cf(*cf)).collect();
        self.db.flush_cfs_opt(&families, &rocksdb::FlushOptions::default()).map_err(rocks("flushing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_common::BlockId;
    use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};

    fn run(store: &Store, first: u64, count: u64, owner: u64) {
        store.db.put_cf(store.cf(Cf::Block), id_key(first), run_record(count, InodeId(owner))).unwrap();
    }

    /// Whose a block is costs no more because many below it are gone (a mount that wrote one file again and again had its master walk over all blocks that it ever had).
    #[test]
    fn blocks_that_are_gone_are_not_walked_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 1 << 20).unwrap();
        run(&store, 1, 1, 7);
        for id in 2..20_000 {
            run(&store, id, 1, 8);
            store.db.delete_cf(store.cf(Cf::Block), id_key(id)).unwrap();
        }
        set_perf_stats(PerfStatsLevel::EnableCount);
        let mut context = PerfContext::default();
        context.reset();
        assert_eq!(store.view().block_owner(BlockId(19_990)).unwrap(), None);
        assert!(context.metric(PerfMetric::InternalDeleteSkippedCount) <= RUN_SPAN, "{}", context.metric(PerfMetric::InternalDeleteSkippedCount));
        let txn = Txn::new(&store);
        assert_eq!(txn.at_or_below(Cf::Block, &id_key(19_990), &id_key(run_floor(19_990))).unwrap(), None);
        assert!(context.metric(PerfMetric::InternalDeleteSkippedCount) <= 2 * RUN_SPAN);
        set_perf_stats(PerfStatsLevel::Disable);
        assert_eq!(store.view().block_owner(BlockId(1)).unwrap(), Some(InodeId(7)));
    }

    /// A store of a version whose records spoke of whole runs.
    #[test]
    fn long_runs_of_earlier_versions_are_split() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 1 << 20).unwrap();
        let runs = [(1, 20), (40, 1_000_000), (1_000_040, 24), (1_000_064, 64), (1_000_200, 1)];
        for (owner, (first, count)) in (7..).zip(runs) {
            run(&store, first, count, owner);
        }
        store.db.delete_cf(store.cf(Cf::Format), FORMAT_KEY).unwrap();
        drop(store);
        for _ in 0..2 {
            let store = Store::open(dir.path(), 1 << 20).unwrap();
            let view = store.view();
            for (owner, (first, count)) in (7..).zip(runs) {
                for id in [first, first + count / 2, first + count - 1] {
                    assert_eq!(view.block_owner(BlockId(id)).unwrap(), Some(InodeId(owner)), "{id}");
                }
            }
            for id in [0, 21, 39, 1_000_128, 1_000_199, 1_000_201] {
                assert_eq!(view.block_owner(BlockId(id)).unwrap(), None, "{id}");
            }
        }
    }

    /// Neither this version with a later one's store, nor an earlier version (which has no family `Format`) with ours.
    #[test]
    fn a_store_of_a_later_format_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 1 << 20).unwrap();
        store.db.put_cf(store.cf(Cf::Format), FORMAT_KEY, (FORMAT + 1).to_be_bytes()).unwrap();
        drop(store);
        let e = Store::open(dir.path(), 1 << 20).err().unwrap();
        assert!(e.kind() == ErrorKind::Unsupported && e.message().contains("format 3") && e.message().contains("up to 2"), "{e}");
        let earlier = Cf::ALL.iter().filter(|cf| **cf != Cf::Format).map(|cf| ColumnFamilyDescriptor::new(cf.name(), Options::default()));
        let e = DB::open_cf_descriptors(&Options::default(), dir.path(), earlier).err().unwrap();
        assert!(e.as_ref().contains("not opened: format"), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn spans_are_the_run(first in 0u64..1_000, count in 0u64..500) {
            let parts: Vec<_> = spans(first, count).collect();
            proptest::prop_assert!(parts.iter().all(|(at, count)| *count > 0 && run_floor(*at) == run_floor(at + count - 1)));
            let ids: Vec<u64> = parts.iter().flat_map(|(at, count)| *at..at + count).collect();
            proptest::prop_assert_eq!(ids, (first..first + count).collect::<Vec<_>>());
        }
    }
}
