//! The journal's log: a RocksDB of its own, every append synced before it is reported.
//!
//! Keys: big-endian index -> `store::LogEntry`; `vote`, `committed`, `purged` in a family of their own. The newest
//! entries are kept in memory too, since apply reads each entry right after it was written.

use super::types::{Batch, TypeConfig};
use forebay_common::{Result, err};
use forebay_proto::store::{LogEntry, log_entry::Payload};
use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{CommittedLeaderId, Entry, EntryPayload, LogId, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote};
use prost::Message;
use rocksdb::{DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};
use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::{Arc, Mutex};

type NodeId = u64;
type Failure = StorageError<NodeId>;
const META: &str = "meta";
/// Entries kept in memory.
const RECENT_ENTRIES: usize = 64;

#[derive(Clone)]
pub struct LogStore {
    db: Arc<DB>,
    recent: Arc<Mutex<VecDeque<Entry<TypeConfig>>>>,
}

fn read_failed(e: impl std::fmt::Display) -> Failure {
    StorageIOError::read_logs(&std::io::Error::other(e.to_string())).into()
}

fn write_failed(e: impl std::fmt::Display) -> Failure {
    StorageIOError::write_logs(&std::io::Error::other(e.to_string())).into()
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn to_record(entry: &Entry<TypeConfig>) -> std::result::Result<LogEntry, serde_json::Error> {
    let payload = match &entry.payload {
        EntryPayload::Blank => Payload::Blank(true),
        EntryPayload::Normal(batch) => Payload::Batch(batch.to_record()),
        EntryPayload::Membership(m) => Payload::Membership(serde_json::to_vec(m)?.into()),
    };
    Ok(LogEntry { term: entry.log_id.leader_id.term, node_id: entry.log_id.leader_id.node_id, index: entry.log_id.index, payload: Some(payload) })
}

fn from_record(raw: &[u8]) -> std::result::Result<Entry<TypeConfig>, Failure> {
    let record = LogEntry::decode(raw).map_err(read_failed)?;
    let payload = match record.payload {
        Some(Payload::Blank(_)) => EntryPayload::Blank,
        Some(Payload::Batch(batch)) => EntryPayload::Normal(Batch::new(batch.commands)),
        Some(Payload::Membership(raw)) => EntryPayload::Membership(serde_json::from_slice(&raw).map_err(read_failed)?),
        None => return Err(read_failed(format!("log entry {} has no payload this version knows", record.index))),
    };
    Ok(Entry { log_id: log_id(record.term, record.node_id, record.index), payload })
}

pub fn log_id(term: u64, node_id: u64, index: u64) -> LogId<NodeId> {
    LogId::new(CommittedLeaderId::new(term, node_id), index)
}

impl LogStore {
    pub fn open(dir: &Path) -> Result<Self> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_keep_log_file_num(4);
        options.set_write_buffer_size(32 << 20);
        options.set_max_total_wal_size(128 << 20);
        options.set_max_background_jobs(2);
        // Every acknowledged append was synced, so anything but a torn tail is damage and must not be passed over.
        options.set_wal_recovery_mode(rocksdb::DBRecoveryMode::TolerateCorruptedTailRecords);
        let db = DB::open_cf(&options, dir, ["default", META]).map_err(|e| err!(Internal, "journal log in {}: {e}", dir.display()))?;
        Ok(LogStore { db: Arc::new(db), recent: Arc::default() })
    }

    fn meta(&self) -> &rocksdb::ColumnFamily {
        match self.db.cf_handle(META) {
            Some(cf) => cf,
            None => unreachable!("the meta family is opened with the log"),
        }
    }

    fn get_meta<T: serde::de::DeserializeOwned>(&self, key: &str) -> std::result::Result<Option<T>, Failure> {
        let raw = self.db.get_cf(self.meta(), key).map_err(read_failed)?;
        raw.map(|raw| serde_json::from_slice(&raw).map_err(read_failed)).transpose()
    }

    fn put_meta<T: serde::Serialize>(&self, key: &str, value: &T, sync: bool) -> std::result::Result<(), Failure> {
        let raw = serde_json::to_vec(value).map_err(write_failed)?;
        let options = if sync { synced() } else { WriteOptions::default() };
        self.db.put_cf_opt(self.meta(), key, raw, &options).map_err(write_failed)
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, VecDeque<Entry<TypeConfig>>> {
        self.recent.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> std::result::Result<Vec<Entry<TypeConfig>>, Failure> {
        let start = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(i) => i + 1,
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        {
            let recent = self.recent();
            if recent.front().is_some_and(|e| e.log_id.index <= start) && recent.back().is_some_and(|e| e.log_id.index + 1 >= end) {
                return Ok(recent.iter().filter(|e| (start..end).contains(&e.log_id.index)).cloned().collect());
            }
        }
        let mut out = Vec::new();
        for pair in self.db.iterator(IteratorMode::From(&start.to_be_bytes(), Direction::Forward)) {
            let (key, raw) = pair.map_err(read_failed)?;
            let index = key.first_chunk::<8>().map(|k| u64::from_be_bytes(*k)).unwrap_or(u64::MAX);
            if index >= end {
                break;
            }
            out.push(from_record(&raw)?);
        }
        Ok(out)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> std::result::Result<LogState<TypeConfig>, Failure> {
        let last_purged_log_id: Option<LogId<NodeId>> = self.get_meta("purged")?;
        let last = self.db.iterator(IteratorMode::End).next().transpose().map_err(read_failed)?;
        let last_log_id = match last {
            Some((_, raw)) => Some(from_record(&raw)?.log_id),
            None => last_purged_log_id,
        };
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> std::result::Result<(), Failure> {
        self.put_meta("vote", vote, true)
    }

    async fn read_vote(&mut self) -> std::result::Result<Option<Vote<NodeId>>, Failure> {
        self.get_meta("vote")
    }

    async fn save_committed(&mut self, committed: Option<LogId<NodeId>>) -> std::result::Result<(), Failure> {
        self.put_meta("committed", &committed, false)
    }

    async fn read_committed(&mut self) -> std::result::Result<Option<LogId<NodeId>>, Failure> {
        Ok(self.get_meta::<Option<LogId<NodeId>>>("committed")?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> std::result::Result<(), Failure>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = WriteBatch::default();
        {
            let mut recent = self.recent();
            for entry in entries {
                let record = to_record(&entry).map_err(write_failed)?;
                batch.put(entry.log_id.index.to_be_bytes(), record.encode_to_vec());
                recent.push_back(entry);
            }
            while recent.len() > RECENT_ENTRIES {
                recent.pop_front();
            }
        }
        let db = self.db.clone();
        tokio::task::spawn_blocking(move || {
            let result = db.write_opt(batch, &synced()).map_err(std::io::Error::other);
            callback.log_io_completed(result);
        });
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<NodeId>) -> std::result::Result<(), Failure> {
        self.recent().clear();
        let mut batch = WriteBatch::default();
        batch.delete_range(log_id.index.to_be_bytes(), u64::MAX.to_be_bytes());
        self.db.write_opt(batch, &synced()).map_err(write_failed)
    }

    async fn purge(&mut self, log_id: LogId<NodeId>) -> std::result::Result<(), Failure> {
        self.put_meta("purged", &log_id, true)?;
        self.recent().retain(|e| e.log_id.index > log_id.index);
        let mut batch = WriteBatch::default();
        batch.delete_range(0u64.to_be_bytes(), (log_id.index + 1).to_be_bytes());
        self.db.write(batch).map_err(write_failed)
    }
}
