//! The state store: a RocksDB that holds the namespace, changed only by `apply` and read through snapshots.
//!
//! Its WAL is on but not synced per batch: after a crash it is an exact prefix of what was applied (point-in-time
//! recovery, one WAL for all column families), `Applied` says which, and the journal's log replays the rest.

mod cf;
mod keys;
mod reader;
mod txn;

pub use cf::Cf;
pub use keys::{LEAVING_PREFIX, dentry_key, id_key, leaving_key, locked_key, reply_key, split_dentry_key, ttl_key};
pub use reader::{Reader, View, parse_run};
pub use txn::Txn;

use forebay_common::{Error, ErrorKind, Result, err};
use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBRecoveryMode, Options, SliceTransform};
use std::path::Path;
use std::sync::Arc;

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
    /// Opens or creates the store in `dir`. Errors: `Corrupt` with RocksDB's words, `Busy` when another process has it.
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
            o.set_write_buffer_size(32 << 20);
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
        Ok(Store { db: Arc::new(db) })
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
