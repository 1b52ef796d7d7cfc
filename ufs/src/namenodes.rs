//! The NameNodes of one HDFS, for the calls that hdfs-native does not make: its event stream, and `concat`.
//!
//! Plain calls with a stated user, to whichever NameNode of the name service answers. Kerberos is not spoken here. Called by
//! `hdfs_events` and `hdfs`.

use forebay_common::{Error, Result, err};
use forebay_hdfs::client::IpcClient;
use prost::Message;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The port of a NameNode that is named without one.
const DEFAULT_PORT: u16 = 8020;
/// Bytes of a configuration file.
const FILE_MAX_BYTES: u64 = 16 << 20;

/// The NameNodes that an authority stands for, and a connection to the one that answered last.
pub struct Namenodes {
    /// That one first.
    addresses: Vec<String>,
    user: String,
    timeout: Duration,
    client: Option<IpcClient>,
}

/// What `Namenodes` are found with.
#[derive(Clone)]
pub struct NamenodesOf {
    pub authority: String,
    pub config_dir: Option<String>,
    /// Keys of Hadoop's configuration that the mount sets itself.
    pub hadoop: BTreeMap<String, String>,
    pub user: Option<String>,
    pub timeout: Duration,
}

impl Namenodes {
    /// Errors: a name service that the configuration does not know.
    pub fn find(of: &NamenodesOf) -> Result<Namenodes> {
        let folder = of.config_dir.clone().or_else(|| std::env::var("HADOOP_CONF_DIR").ok());
        let mut known = folder.map_or(Ok(BTreeMap::new()), |dir| properties(Path::new(&dir)))?;
        known.extend(of.hadoop.clone());
        Ok(Namenodes {
            addresses: namenodes(&of.authority, &known)?,
            user: of.user.clone().unwrap_or_else(own_user),
            timeout: of.timeout,
            client: None,
        })
    }

    /// Calls a method at the first NameNode that answers; a standby sends on to the next. Errors: the exception, as ours; no
    /// NameNode answers. A call whose answer was lost may have been carried out.
    pub async fn call<M: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<M> {
        let mut failed = None;
        for _ in 0..=self.addresses.len() {
            let client = match self.client.take() {
                Some(client) => Ok(client),
                None => IpcClient::connect(&self.addresses[0], &self.user, self.timeout).await,
            };
            let called = match client {
                Ok(mut client) => {
                    let called = client.call(method, request).await;
                    if called.is_ok() {
                        self.client = Some(client);
                    }
                    called
                }
                Err(e) => Err(e),
            };
            match called {
                Ok(answer) => return Ok(answer),
                Err(e) if !e.is_retryable() => return Err(e),
                Err(e) => {
                    self.addresses.rotate_left(1);
                    failed = Some(e);
                }
            }
        }
        Err(failed.unwrap_or_else(|| err!(Unavailable, "there is no NameNode")))
    }
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
}
