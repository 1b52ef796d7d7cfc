//! `Racks`: on which rack a machine is, by Hadoop's own ways of saying it: a table file, or a script.
//!
//! Asked by whoever sorts a block's workers for a caller; kept up to date by `run`, so that asking never waits. A machine that nobody said anything about is
//! on `/default-rack`. Formats: `net.topology.table.file.name` (two words a line, a machine and its rack) and `net.topology.script.file.name` (machines as
//! arguments, a rack for each on standard output) of Hadoop 3.4.1.

use crate::core::Core;
use forebay_common::{Error, Result, counter, err};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

counter!(FAILED, "forebay_master_topology_failed_total", "times that the table or the script of racks could not be used");

/// Where everybody is whose rack is not known.
pub const DEFAULT_RACK: &str = "/default-rack";
/// Machines remembered, and asked for: beyond that they are on the default rack.
const MACHINES_MAX: usize = 65_536;
/// Machines given to one call of the script, as there.
const SCRIPT_ARGUMENTS: usize = 100;
const SCRIPT_WAIT: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// A machine that the script did not know is asked for again after this time.
const SCRIPT_AGAIN: u32 = 150;

#[derive(Default)]
pub struct Racks(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// Whether anybody says where machines are.
    known: bool,
    racks: HashMap<String, String>,
    /// Asked for, and not known.
    unknown: BTreeSet<String>,
}

impl Racks {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The rack of a machine with these names and addresses.
    pub fn of(&self, names: &[&str]) -> String {
        let mut inner = self.lock();
        if !inner.known {
            return DEFAULT_RACK.to_owned();
        }
        if let Some(rack) = names.iter().find_map(|name| inner.racks.get(*name)) {
            return rack.clone();
        }
        if let Some(name) = names.iter().find(|name| !name.is_empty())
            && inner.unknown.len() < MACHINES_MAX
        {
            inner.unknown.insert((*name).to_owned());
        }
        DEFAULT_RACK.to_owned()
    }

    fn set(&self, racks: HashMap<String, String>) {
        let mut inner = self.lock();
        inner.known = true;
        inner.racks = racks;
    }

    fn add(&self, racks: impl Iterator<Item = (String, String)>) {
        let mut inner = self.lock();
        for (name, rack) in racks {
            inner.unknown.remove(&name);
            if inner.racks.len() < MACHINES_MAX {
                inner.racks.insert(name, rack);
            }
        }
    }
}

/// A rack as Hadoop has it: a path. Errors: it is none.
fn rack(text: &str) -> Result<String> {
    let good = text.len() > 1 && text.starts_with('/') && !text.ends_with('/') && text.chars().all(|c| !c.is_whitespace());
    if good { Ok(text.to_owned()) } else { Err(err!(InvalidArgument, "{text:?} is no rack: /NAME is one")) }
}

/// The machines of a table. Errors: a line that says something else, with its number.
fn parse(text: &str) -> Result<HashMap<String, String>> {
    let mut racks = HashMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#')) {
        let mut words = line.split_whitespace();
        let (Some(machine), Some(named), None) = (words.next(), words.next(), words.next()) else {
            return Err(err!(InvalidArgument, "line {}: a machine and its rack are expected, two words: {line:?}", number + 1));
        };
        racks.insert(machine.to_owned(), rack(named).map_err(|e| e.context(format!("line {}", number + 1)))?);
    }
    Ok(racks)
}

/// Asks the script for some machines.
async fn ask(script: &Path, machines: &[String]) -> Result<Vec<String>> {
    let name = format!("master.topology_script {}", script.display());
    let run = tokio::process::Command::new(script).args(machines).stdin(std::process::Stdio::null()).kill_on_drop(true).output();
    let done = tokio::time::timeout(SCRIPT_WAIT, run).await.map_err(|_| err!(Timeout, "{name} has not ended after {} s", SCRIPT_WAIT.as_secs()))?;
    let done = done.map_err(|e| Error::io(&name, &e))?;
    let said: Vec<String> = String::from_utf8_lossy(&done.stdout).split_whitespace().map(str::to_owned).collect();
    if !done.status.success() || said.len() != machines.len() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        return Err(err!(
            InvalidArgument,
            "{name} ended with {} and named {} racks for {} machines: {}",
            done.status,
            said.len(),
            machines.len(),
            complaint.trim()
        ));
    }
    said.iter().map(|said| rack(said).map_err(|e| e.context(&name))).collect()
}

/// Keeps the racks up to date until shutdown; ends at once where nobody says any.
pub async fn run(core: Arc<Core>, shutdown: CancellationToken) {
    let (table, script) = (core.config.topology_file.clone(), core.config.topology_script.clone());
    if table.is_none() && script.is_none() {
        return;
    }
    let (racks, mut seen, mut complained, mut rounds) = (&core.soft.workers.racks, None::<SystemTime>, String::new(), 0);
    racks.set(HashMap::new());
    loop {
        let round = async {
            if let Some(table) = &table {
                let named = |e: std::io::Error| Error::io(format!("master.topology_file {}", table.display()), &e);
                let modified = std::fs::metadata(table).and_then(|m| m.modified()).map_err(named)?;
                if seen != Some(modified) {
                    let found = parse(&std::fs::read_to_string(table).map_err(named)?).map_err(|e| e.context(table.display()))?;
                    tracing::info!(machines = found.len(), "the table of racks is read");
                    racks.set(found);
                    seen = Some(modified);
                }
            }
            if let Some(script) = &script {
                let unknown: Vec<String> = racks.lock().unknown.iter().cloned().collect();
                for machines in unknown.chunks(SCRIPT_ARGUMENTS) {
                    let said = ask(script, machines).await?;
                    racks.add(machines.iter().cloned().zip(said));
                }
            } else if rounds % SCRIPT_AGAIN == 0 {
                racks.lock().unknown.clear();
            }
            Ok::<(), Error>(())
        };
        if let Err(e) = round.await {
            FAILED.inc();
            // Once, until it is another one.
            if complained != e.to_string() {
                complained = e.to_string();
                tracing::error!(error = %e, "racks are as they were known last");
            }
        }
        rounds = rounds.wrapping_add(1);
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_table_says_where_machines_are() {
        let racks = Racks::default();
        assert_eq!(racks.of(&["a"]), DEFAULT_RACK);
        racks.set(parse("# a comment\n\na  /row1/rack1\n10.0.0.2\t/row1/rack2\n").unwrap());
        assert_eq!((racks.of(&["x", "a"]), racks.of(&["10.0.0.2"])), ("/row1/rack1".to_owned(), "/row1/rack2".to_owned()));
        assert_eq!(racks.of(&["b"]), DEFAULT_RACK);
        assert_eq!(racks.lock().unknown.len(), 1);
        assert!(parse("a\n").is_err() && parse("a b\n").is_err() && parse("a /b c\n").unwrap_err().message().contains("line 1"));
    }

    #[tokio::test]
    async fn a_script_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("racks.sh");
        let write = |text: &str| {
            std::fs::write(&script, text).unwrap();
            std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("#!/bin/sh\nfor machine in \"$@\"; do echo /rack-of-$machine; done\n");
        let machines = ["a".to_owned(), "b".to_owned()];
        assert_eq!(ask(&script, &machines).await.unwrap(), ["/rack-of-a", "/rack-of-b"]);
        write("#!/bin/sh\necho /one\n");
        assert!(ask(&script, &machines).await.unwrap_err().message().contains("1 racks for 2 machines"));
        write("#!/bin/sh\necho oh >&2; exit 3\n");
        assert!(ask(&script, &machines).await.unwrap_err().message().contains("oh"));
    }
}
