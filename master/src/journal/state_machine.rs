//! openraft's view of the state store: apply entries, make checkpoints.
//!
//! A checkpoint is a RocksDB checkpoint (hard links) with a manifest of the CRC32C of every file; the log before it may
//! be dropped only when it is on disk. The newest one is kept.

use super::log_store::log_id;
use super::types::{BatchReply, TypeConfig};
use crate::apply::{Applied, Limits, apply_entry, read_applied};
use crate::store::Store;
use forebay_common::config::MasterConfig;
use forebay_common::error::at;
use forebay_common::{Result, checksum, err};
use forebay_proto::store::Applied as AppliedRecord;
use openraft::storage::{RaftStateMachine, Snapshot, SnapshotMeta};
use openraft::{BasicNode, Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, StorageError, StorageIOError, StoredMembership};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
            let replies = apply_entry(&self.store, commands, &mut self.applied, &self.limits).map_err(failed)?;
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
        let newest = newest_checkpoint(&self.checkpoints).map_err(failed)?;
        let Some(dir) = newest else { return Ok(None) };
        let raw = std::fs::read(dir.join(META)).map_err(failed)?;
        let meta: SnapshotMeta<NodeId, BasicNode> = serde_json::from_slice(&raw).map_err(failed)?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(dir.to_string_lossy().into_owned().into_bytes())) }))
    }
}

const META: &str = "FOREBAY_CHECKPOINT.json";
const MANIFEST: &str = "FOREBAY_MANIFEST.json";

fn newest_checkpoint(dir: &Path) -> Result<Option<PathBuf>> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(None) };
    let mut whole: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.join(META).exists()).collect();
    whole.sort();
    Ok(whole.pop())
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
        if target.exists() {
            std::fs::remove_dir_all(&target).map_err(at("removing an unfinished checkpoint"))?;
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
        let path = tokio::task::spawn_blocking(move || builder.write(&for_task)).await.map_err(failed)?.map_err(failed)?;
        tracing::info!(path = %path.display(), index = self.applied.index, "checkpoint made");
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(path.to_string_lossy().into_owned().into_bytes())) })
    }
}
