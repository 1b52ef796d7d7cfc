//! HDFS's own event stream (inotify): what changed below a folder, in the order in which it did.
//!
//! The NameNode keeps its edits and tells them from a transaction on (`getEditsFromTxid`); whoever asks must be superuser there.
//! hdfs-native does not read it, so we ask ourselves (`namenodes`). Called by the master, one of these per mount
//! with the option `inotify_ms`. A transaction is told once; those that the NameNode has already thrown away are told as `Missed`.
//! Source: `org.apache.hadoop.hdfs.DFSInotifyEventInputStream` 3.4.1.

use crate::namenodes::Namenodes;
use bytes::Bytes;
use forebay_common::{Boxed, Result, err};
use forebay_hdfs::hadoop::hdfs::{self as wire, EventProto, EventType};
use prost::Message;
use std::time::Duration;

/// What came of one look.
#[derive(Debug, PartialEq, Eq)]
pub enum Happened {
    /// These keys below the mount's folder, and what lies below them, are not what they were.
    Changed(Vec<Vec<u8>>),
    /// Some of it is no longer told: anything may have changed.
    Missed,
}

/// A place in the event stream of one HDFS.
pub struct HdfsEvents {
    namenodes: Namenodes,
    root: String,
    /// The last transaction that was told; `None` before the first look.
    read: Option<i64>,
    /// The NameNode had more to tell.
    behind: bool,
    /// How long to wait between two looks.
    pub interval: Duration,
}

impl HdfsEvents {
    pub fn new(namenodes: Namenodes, root: &str, interval: Duration) -> HdfsEvents {
        HdfsEvents { namenodes, root: root.trim_end_matches('/').to_owned(), read: None, behind: false, interval }
    }

    /// What happened since the last look; the first one finds the place where to begin. Errors: no NameNode answers, the user is no
    /// superuser there; nothing is lost then.
    pub fn look(&mut self) -> Boxed<'_, Result<Happened>> {
        Box::pin(async move {
            let Some(read) = self.read else {
                let answer: wire::GetCurrentEditLogTxidResponseProto =
                    self.namenodes.call("getCurrentEditLogTxid", &wire::GetCurrentEditLogTxidRequestProto {}).await?;
                self.read = Some(answer.txid);
                // What happened before the first look was not told.
                return Ok(Happened::Missed);
            };
            let answer: wire::GetEditsFromTxidResponseProto =
                self.namenodes.call("getEditsFromTxid", &wire::GetEditsFromTxidRequestProto { txid: read + 1 }).await?;
            let list = answer.events_list;
            if list.last_txid < 0 {
                self.behind = false;
                return Ok(Happened::Changed(Vec::new()));
            }
            let behind = list.last_txid < list.sync_txid;
            if list.first_txid != read + 1 {
                (self.read, self.behind) = (Some(list.last_txid), behind);
                return Ok(Happened::Missed);
            }
            let last_txid = list.last_txid;
            let mut keys = Vec::new();
            for event in list.batch.into_iter().flat_map(|b| b.events).chain(list.events) {
                for path in paths_of(&event)? {
                    if let Some(key) = key_below(&self.root, &path) {
                        keys.push(key);
                    }
                }
            }
            keys.dedup();
            // Only now that all of it is understood.
            (self.read, self.behind) = (Some(last_txid), behind);
            Ok(Happened::Changed(keys))
        })
    }

    /// Whether there was more than one answer holds.
    pub fn is_behind(&self) -> bool {
        self.behind
    }
}

/// The paths that an event is about.
fn paths_of(event: &EventProto) -> Result<Vec<String>> {
    fn read<M: Message + Default>(contents: &Bytes) -> Result<M> {
        M::decode(contents.clone()).map_err(|e| err!(UnderStore, "event of HDFS: {e}"))
    }
    let raw = &event.contents;
    Ok(match EventType::try_from(event.r#type) {
        Ok(EventType::EventCreate) => vec![read::<wire::CreateEventProto>(raw)?.path],
        Ok(EventType::EventClose) => vec![read::<wire::CloseEventProto>(raw)?.path],
        Ok(EventType::EventAppend) => vec![read::<wire::AppendEventProto>(raw)?.path],
        Ok(EventType::EventMetadata) => vec![read::<wire::MetadataUpdateEventProto>(raw)?.path],
        Ok(EventType::EventUnlink) => vec![read::<wire::UnlinkEventProto>(raw)?.path],
        Ok(EventType::EventTruncate) => vec![read::<wire::TruncateEventProto>(raw)?.path],
        Ok(EventType::EventRename) => {
            let event: wire::RenameEventProto = read(raw)?;
            vec![event.src_path, event.dest_path]
        }
        // Of a newer HDFS.
        Err(_) => Vec::new(),
    })
}

/// The key of a path below the mount's folder. What lies above it has the whole folder looked at: its key is empty.
fn key_below(root: &str, path: &str) -> Option<Vec<u8>> {
    let below = |short: &str, long: &str| long.strip_prefix(short).filter(|rest| rest.is_empty() || rest.starts_with('/')).map(str::to_owned);
    if let Some(rest) = below(root, path) {
        return Some(rest.trim_matches('/').as_bytes().to_vec());
    }
    below(path.trim_end_matches('/'), root).map(|_| Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_keys_of_the_mount() {
        let key = |root, path| key_below(root, path).map(|k| String::from_utf8(k).unwrap());
        assert_eq!(key("/w", "/w/a/b"), Some("a/b".into()));
        assert_eq!((key("/w", "/w"), key("/w/x", "/w"), key("/w", "/")), (Some(String::new()), Some(String::new()), Some(String::new())));
        assert_eq!((key("/w", "/wide/a"), key("", "/a")), (None, Some("a".into())));
    }
}
