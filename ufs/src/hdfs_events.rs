//! HDFS's own event stream (inotify): what changed below a folder, in the order in which it did.
//!
//! The NameNode keeps its edits and tells them from a transaction on (`getEditsFromTxid`); whoever asks must be superuser there.
//! hdfs-native does not read it, so we ask with the plain client of `forebay_hdfs`. Called by the master, one of these per mount
//! with the option `inotify_ms`. A transaction is told once; those that the NameNode has already thrown away are told as `Missed`.
//! Source: `org.apache.hadoop.hdfs.DFSInotifyEventInputStream` 3.4.1.

use bytes::Bytes;
use forebay_common::{Error, ErrorKind, Result, err};
use forebay_hdfs::client::IpcClient;
use forebay_hdfs::hadoop::hdfs::{self as wire, EventProto, EventType};
use prost::Message;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The port of a NameNode that is named without one.
const DEFAULT_PORT: u16 = 8020;
/// Bytes of a configuration file.
const FILE_MAX_BYTES: u64 = 16 << 20;

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
    namenodes: Vec<String>,
    user: String,
    root: String,
    timeout: Duration,
    client: Option<IpcClient>,
    /// The last transaction that was told; `None` before the first look.
    read: Option<i64>,
    /// The NameNode had more to tell.
    behind: bool,
    /// How long to wait between two looks.
    pub interval: Duration,
}

/// The properties of a Hadoop configuration folder.
fn properties(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for name in ["core-site.xml", "hdfs-site.xml"] {
        let path = dir.join(name);
        let length = match std::fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(path.display(), &e)),
        };
        if length > FILE_MAX_BYTES {
            return Err(err!(InvalidArgument, "{} has {length} bytes", path.display()));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(path.display(), &e))?;
        let tree = roxmltree::Document::parse(&text).map_err(|e| err!(InvalidArgument, "{}: {e}", path.display()))?;
        for property in tree.descendants().filter(|n| n.has_tag_name("property")) {
            let text = |tag| property.children().find(|n| n.has_tag_name(tag)).and_then(|n| n.text()).map(|t| t.trim().to_owned());
            if let (Some(name), Some(value)) = (text("name"), text("value")) {
                all.insert(name, value);
            }
        }
    }
    Ok(all)
}

fn with_port(address: &str) -> String {
    if address.contains(':') { address.to_owned() } else { format!("{address}:{DEFAULT_PORT}") }
}

/// The NameNodes that an authority stands for.
fn namenodes(authority: &str, properties: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let default = || properties.get("fs.defaultFS").and_then(|uri| uri.strip_prefix("hdfs://")).map(|rest| rest.trim_end_matches('/'));
    let authority = if authority.is_empty() { default().unwrap_or_default() } else { authority };
    if authority.is_empty() {
        return Err(err!(InvalidArgument, "no NameNode is named, and there is no fs.defaultFS in the configuration"));
    }
    let Some(ids) = properties.get(&format!("dfs.ha.namenodes.{authority}")) else { return Ok(vec![with_port(authority)]) };
    let address = |id: &str| properties.get(&format!("dfs.namenode.rpc-address.{authority}.{}", id.trim())).map(|a| with_port(a));
    let all: Vec<String> = ids.split(',').filter_map(address).collect();
    if all.is_empty() {
        return Err(err!(InvalidArgument, "name service {authority} has no dfs.namenode.rpc-address in the configuration"));
    }
    Ok(all)
}

fn own_user() -> String {
    std::env::var("HADOOP_USER_NAME")
        .ok()
        .or_else(|| nix::unistd::User::from_uid(nix::unistd::getuid()).ok().flatten().map(|u| u.name))
        .unwrap_or_else(|| "root".to_owned())
}

impl HdfsEvents {
    /// `hadoop`: keys that the mount sets itself. Errors: a name service that the configuration does not know.
    pub fn new(
        authority: &str,
        root: &str,
        config_dir: Option<&str>,
        hadoop: BTreeMap<String, String>,
        user: Option<&str>,
        timeout: Duration,
        interval: Duration,
    ) -> Result<HdfsEvents> {
        let folder = config_dir.map(str::to_owned).or_else(|| std::env::var("HADOOP_CONF_DIR").ok());
        let mut known = folder.map_or(Ok(BTreeMap::new()), |dir| properties(Path::new(&dir)))?;
        known.extend(hadoop);
        Ok(HdfsEvents {
            namenodes: namenodes(authority, &known)?,
            user: user.map_or_else(own_user, str::to_owned),
            root: root.trim_end_matches('/').to_owned(),
            timeout,
            client: None,
            read: None,
            behind: false,
            interval,
        })
    }

    /// What happened since the last look; the first one finds the place where to begin. Errors: no NameNode answers, the user is no
    /// superuser there; nothing is lost then.
    pub async fn look(&mut self) -> Result<Happened> {
        let mut failed = None;
        // The one that answered last time first; a standby sends on to the next.
        for _ in 0..=self.namenodes.len() {
            let client = match self.client.take() {
                Some(client) => Ok(client),
                None => IpcClient::connect(&self.namenodes[0], &self.user, self.timeout).await,
            };
            let looked = match client {
                Ok(mut client) => {
                    let looked = self.look_with(&mut client).await;
                    if looked.is_ok() {
                        self.client = Some(client);
                    }
                    looked
                }
                Err(e) => Err(e),
            };
            match looked {
                Ok(happened) => return Ok(happened),
                Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(e),
                Err(e) => {
                    self.namenodes.rotate_left(1);
                    failed = Some(e);
                }
            }
        }
        Err(failed.unwrap_or_else(|| err!(Unavailable, "there is no NameNode")))
    }

    /// Whether there was more than one answer holds.
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    async fn look_with(&mut self, client: &mut IpcClient) -> Result<Happened> {
        let Some(read) = self.read else {
            let answer: wire::GetCurrentEditLogTxidResponseProto =
                client.call("getCurrentEditLogTxid", &wire::GetCurrentEditLogTxidRequestProto {}).await?;
            self.read = Some(answer.txid);
            // What happened before the first look was not told.
            return Ok(Happened::Missed);
        };
        let answer: wire::GetEditsFromTxidResponseProto =
            client.call("getEditsFromTxid", &wire::GetEditsFromTxidRequestProto { txid: read + 1 }).await?;
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
    fn a_name_service_is_its_namenodes() {
        let of = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>();
        let known = of(&[
            ("fs.defaultFS", "hdfs://ns/"),
            ("dfs.ha.namenodes.ns", "a, b"),
            ("dfs.namenode.rpc-address.ns.a", "one:1"),
            ("dfs.namenode.rpc-address.ns.b", "two"),
        ]);
        assert_eq!(namenodes("", &known).unwrap(), ["one:1", "two:8020"]);
        assert_eq!(namenodes("host:9", &known).unwrap(), ["host:9"]);
        assert!(namenodes("", &of(&[])).is_err() && namenodes("ns", &of(&[("dfs.ha.namenodes.ns", "a")])).is_err());
    }

    #[test]
    fn paths_become_keys_of_the_mount() {
        let key = |root, path| key_below(root, path).map(|k| String::from_utf8(k).unwrap());
        assert_eq!(key("/w", "/w/a/b"), Some("a/b".into()));
        assert_eq!((key("/w", "/w"), key("/w/x", "/w"), key("/w", "/")), (Some(String::new()), Some(String::new()), Some(String::new())));
        assert_eq!((key("/w", "/wide/a"), key("", "/a")), (None, Some("a".into())));
    }
}
