//! openraft's view of the state store: apply entries, make checkpoints.
//!
//! A checkpoint is a RocksDB checkpoint (hard links) with a manifest of the CRC32C of every file; the log before it may
//! be dropped only when it is on disk. The newest one is kept. One that cannot be made (a full disk) is reported and tried
//! again; the log grows meanwhile, and nothing stops.

use super::log_store::log_id;
use super::types::{BatchReply, TypeConfig};
use crate::apply::{Applied, Limits, apply_entry, read_applied};
use crate::store::Store;
use forebay_common::config::MasterConfig;
use forebay_common::error::at;
use forebay_common::{ErrorKind, Result, checksum, counter, err, gauge};
use forebay_proto::store::Applied as AppliedRecord;
use openraft::storage::{RaftStateMachine, Snapshot, SnapshotMeta};
use openraft::{BasicNode, Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, StorageError, StorageIOError, StoredMembership};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

counter!(FAILED, "forebay_master_checkpoints_failed_total", "checkpoints that could not be made");
gauge!(FAILING, "forebay_master_checkpoint_failing", "1 while the last checkpoint could not be made: the journal's log grows");

/// How long after a failure a checkpoint is tried again.
const RETRY_AFTER: Duration = if cfg!(test) { Duration::from_millis(10) } else { Duration::from_secs(10) };

/// Between tries of an entry that the store could not take.
const APPLY_AGAIN_AFTER: [Duration; 4] = [Duration::from_millis(10), Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(5)];

type NodeId = u64;
type Failure = StorageError<NodeId>;

pub struct StateMachine {
    store: Store,
    checkpoints: PathBuf,
    on_applied: Arc<dyn Applied>,
    limits: Limits,
    applied: AppliedRecord,
}

fn failed(e: impl std::fmt::Display) -> Failure {
    StorageIOError::write_state_machine(&std::io::Error::other(e.to_string())).into()
}

fn last_applied(record: &AppliedRecord) -> Option<LogId<NodeId>> {
    (record.term > 0 || record.index > 0).then(|| log_id(record.term, record.node_id, record.index))
}

fn membership(record: &AppliedRecord) -> std::result::Result<StoredMembership<NodeId, BasicNode>, Failure> {
    if record.membership.is_empty() { Ok(StoredMembership::default()) } else { serde_json::from_slice(&record.membership).map_err(failed) }
}

impl StateMachine {
    pub fn open(store: Store, checkpoints: PathBuf, on_applied: Arc<dyn Applied>, config: &MasterConfig) -> Result<Self> {
        let applied = read_applied(&store)?;
        let limits = Limits { replies_per_client: config.reply_window_per_client, clients_max: config.reply_clients_max };
        Ok(StateMachine { store, checkpoints, on_applied, limits, applied })
    }
}

impl StateMachine {
    /// Applies an entry; a store that fails is tried again a few times, because giving up ends this master.
    async fn apply_patiently(&mut self, commands: &[forebay_proto::journal::Command]) -> Result<Vec<forebay_proto::journal::Reply>> {
        let before = self.applied.clone();
        for wait in APPLY_AGAIN_AFTER {
            match apply_entry(&self.store, commands, &mut self.applied, &self.limits) {
                Ok(replies) => return Ok(replies),
                Err(e) if e.kind() == ErrorKind::Unsupported => return Err(e),
                Err(e) => tracing::error!(error = %e, index = before.index, "an entry could not be applied; it is tried again"),
            }
            self.applied = before.clone();
            tokio::time::sleep(wait).await;
        }
        apply_entry(&self.store, commands, &mut self.applied, &self.limits)
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = Checkpointer;

    async fn applied_state(&mut self) -> std::result::Result<(Option<LogId<NodeId>>, StoredMembership<NodeId, BasicNode>), Failure> {
        Ok((last_applied(&self.applied), membership(&self.applied)?))
    }

    async fn apply<I>(&mut self, entries: I) -> std::result::Result<Vec<BatchReply>, Failure>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut out = Vec::new();
        for entry in entries {
            self.applied.term = entry.log_id.leader_id.term;
            self.applied.node_id = entry.log_id.leader_id.node_id;
            assert!(entry.log_id.index == 0 || entry.log_id.index > self.applied.index, "entries are applied once, in order");
            self.applied.index = entry.log_id.index;
            let commands = match &entry.payload {
                EntryPayload::Blank => &[],
                EntryPayload::Normal(batch) => batch.commands(),
                EntryPayload::Membership(m) => {
                    let stored = StoredMembership::new(Some(entry.log_id), m.clone());
                    self.applied.membership = serde_json::to_vec(&stored).map_err(failed)?.into();
                    &[]
                }
            };
            let replies = self.apply_patiently(commands).await.map_err(failed)?;
            for (command, reply) in commands.iter().zip(&replies) {
                self.on_applied.applied(command, reply);
            }
            out.push(BatchReply(replies));
        }
        Ok(out)
    }

    async fn get_snapshot_builder(&mut self) -> Checkpointer {
        Checkpointer { store: self.store.clone(), dir: self.checkpoints.clone(), applied: self.applied.clone() }
    }

    async fn begin_receiving_snapshot(&mut self) -> std::result::Result<Box<Cursor<Vec<u8>>>, Failure> {
        Err(failed("groups of several masters are not supported yet"))
    }

    async fn install_snapshot(&mut self, _: &SnapshotMeta<NodeId, BasicNode>, _: Box<Cursor<Vec<u8>>>) -> std::result::Result<(), Failure> {
        Err(failed("groups of several masters are not supported yet"))
    }

    async fn get_current_snapshot(&mut self) -> std::result::Result<Option<Snapshot<TypeConfig>>, Failure> {
        Ok(newest_checkpoint(&self.checkpoints).map(|(dir, meta)| snapshot(&dir, meta)))
    }
}

fn snapshot(dir: &Path, meta: SnapshotMeta<NodeId, BasicNode>) -> Snapshot<TypeConfig> {
    Snapshot { meta, snapshot: Box::new(Cursor::new(dir.to_string_lossy().into_owned().into_bytes())) }
}

const META: &str = "FOREBAY_CHECKPOINT.json";
const MANIFEST: &str = "FOREBAY_MANIFEST.json";

/// The newest folder whose description is there and decodes: it was written last, so the rest is whole.
fn newest_checkpoint(dir: &Path) -> Option<(PathBuf, SnapshotMeta<NodeId, BasicNode>)> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(dir).ok()?.filter_map(|e| e.ok().map(|e| e.path())).collect();
    folders.sort();
    folders.into_iter().rev().find_map(|folder| {
        let raw = std::fs::read(folder.join(META)).ok()?;
        match serde_json::from_slice(&raw) {
            Ok(meta) => Some((folder, meta)),
            Err(e) => {
                tracing::warn!(error = %e, path = %folder.display(), "a checkpoint is passed over: its description does not decode");
                None
            }
        }
    })
}

/// Makes checkpoints beside the running store.
pub struct Checkpointer {
    store: Store,
    dir: PathBuf,
    applied: AppliedRecord,
}

impl Checkpointer {
    /// The files, then their checksums, then (synced) the description that makes the checkpoint count, then the old ones go.
    fn write(&self, meta: &SnapshotMeta<NodeId, BasicNode>) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.dir).map_err(at("checkpoint folder"))?;
        let target = self.dir.join(format!("{:020}", self.applied.index));
        // What failed attempts left holds files that the store has dropped since.
        for folder in std::fs::read_dir(&self.dir).map_err(at("checkpoint folder"))?.flatten() {
            if folder.path() == target || !folder.path().join(META).exists() {
                std::fs::remove_dir_all(folder.path()).map_err(at("removing an unfinished checkpoint"))?;
            }
        }
        self.store.flush()?;
        rocksdb::checkpoint::Checkpoint::new(&self.store.db)
            .and_then(|c| c.create_checkpoint(&target))
            .map_err(|e| err!(Internal, "checkpoint: {e}"))?;
        let mut sums = serde_json::Map::new();
        for file in std::fs::read_dir(&target).map_err(at("checkpoint"))? {
            let path = file.map_err(at("checkpoint"))?.path();
            let bytes = std::fs::read(&path).map_err(at("checkpoint"))?;
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            sums.insert(name, serde_json::json!({ "bytes": bytes.len(), "crc32c": checksum::crc32c(&bytes) }));
        }
        write_synced(&target.join(MANIFEST), &serde_json::Value::Object(sums))?;
        write_synced(&target.join(META), &serde_json::to_value(meta).map_err(|e| err!(Internal, "checkpoint: {e}"))?)?;
        std::fs::File::open(&self.dir).and_then(|d| d.sync_all()).map_err(at("checkpoint folder"))?;
        for old in std::fs::read_dir(&self.dir).map_err(at("checkpoint folder"))?.flatten() {
            if old.path() < target {
                std::fs::remove_dir_all(old.path()).map_err(at("removing an old checkpoint"))?;
            }
        }
        Ok(target)
    }
}

fn write_synced(path: &Path, value: &serde_json::Value) -> Result<()> {
    // Under a temporary name first: a name that counts is never of a file that is not whole.
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, value.to_string()).map_err(at("checkpoint"))?;
    std::fs::File::open(&temporary).and_then(|f| f.sync_all()).map_err(at("checkpoint"))?;
    std::fs::rename(&temporary, path).map_err(at("checkpoint"))?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(parent).and_then(|d| d.sync_all()).map_err(at("checkpoint"))
}

impl RaftSnapshotBuilder<TypeConfig> for Checkpointer {
    async fn build_snapshot(&mut self) -> std::result::Result<Snapshot<TypeConfig>, Failure> {
        // The store may have applied more since: the checkpoint holds at least this, and replay skips what it holds.
        let meta = SnapshotMeta {
            last_log_id: last_applied(&self.applied),
            last_membership: membership(&self.applied)?,
            snapshot_id: format!("{}", self.applied.index),
        };
        let builder = Checkpointer { store: self.store.clone(), dir: self.dir.clone(), applied: self.applied.clone() };
        let for_task = meta.clone();
        match tokio::task::spawn_blocking(move || builder.write(&for_task)).await.map_err(failed)? {
            Ok(path) => {
                FAILING.set(0);
                tracing::info!(path = %path.display(), index = self.applied.index, "checkpoint made");
                Ok(snapshot(&path, meta))
            }
            Err(e) => {
                FAILED.inc();
                FAILING.set(1);
                tracing::error!(error = %e, "no checkpoint could be made: the journal's log grows until one can");
                let unfinished = self.dir.join(format!("{:020}", self.applied.index));
                if !unfinished.join(META).exists() {
                    let _ = std::fs::remove_dir_all(&unfinished);
                }
                // openraft asks again at the next entry: not before a while. An older checkpoint cuts nothing off the log.
                tokio::time::sleep(RETRY_AFTER).await;
                let (dir, meta) = newest_checkpoint(&self.dir).unwrap_or_default();
                Ok(snapshot(&dir, meta))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Applied for Nobody {
        fn applied(&self, _: &forebay_proto::journal::Command, _: &forebay_proto::journal::Reply) {}
    }

    /// Where no checkpoint can be made the older one stands, a torn one is passed over, and later ones are made again.
    #[tokio::test]
    async fn a_checkpoint_that_fails_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("meta"), 8 << 20).unwrap();
        let checkpoints = dir.path().join("checkpoints");
        let mut machine = StateMachine::open(store, checkpoints.clone(), Arc::new(Nobody), &MasterConfig::default()).unwrap();
        std::fs::write(&checkpoints, "a file where the folder should be").unwrap();
        let made = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        assert_eq!(made.meta.last_log_id, None);
        assert!(machine.get_current_snapshot().await.unwrap().is_none());
        std::fs::remove_file(&checkpoints).unwrap();
        machine.applied.index = 7;
        let made = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        assert_eq!(made.meta.last_log_id.unwrap().index, 7);
        let torn = checkpoints.join(format!("{:020}", 9));
        std::fs::create_dir(&torn).unwrap();
        std::fs::write(torn.join(META), "{").unwrap();
        assert_eq!(machine.get_current_snapshot().await.unwrap().unwrap().meta, made.meta);
    }
}
