//! What Fluid tells the pods of a runtime (CNCF Fluid, `CacheRuntime`, v1.1): `runtime.json`, whose path is in `FLUID_RUNTIME_CONFIG_PATH`.
//!
//! The image has no shell that could turn it into a configuration, so the binary reads it itself: a layer between the defaults and the configuration
//! file. The format is `CacheRuntimeConfig` in Fluid's pkg/common/cacheruntime.go; keys that it gets later are passed over, as JSON is wont to be.
//! Read by `load`, and by `forebay fluid`, which does what Fluid has done in the master's pod.

use super::{Medium, MountConfig, OptionValue, TierConfig, TierDir, WorkerConfig};
use crate::{Result, err};
use bytesize::ByteSize;
use figment::value::Value;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where Fluid says that its file is.
const PATH: &str = "FLUID_RUNTIME_CONFIG_PATH";
/// Which part of a runtime a pod is: `master`, `worker`, `client`. Not there in pods that load data.
const PART: &str = "FLUID_RUNTIME_COMPONENT_TYPE";
/// The master's port, where `master.rpc_port` is no option.
const RPC_PORT: &str = "19998";
/// What a volume with a limit holds beside blocks, as in the chart: 2 % for heads and names, and room for a block that comes while another goes.
const BESIDE_PERCENT: u64 = 102;
const BESIDE_BYTES: u64 = 65 << 20;

/// A dataset and the parts of its runtime.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FluidRuntime {
    /// The dataset's under stores.
    pub mounts: Vec<FluidMount>,
    /// Where a client mounts the namespace.
    pub target_path: PathBuf,
    master: Option<Part>,
    worker: Option<Part>,
    client: Option<Part>,
}

/// One under store of a dataset.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FluidMount {
    /// `s3://bucket/prefix`; `local://` and `pvc://` are volumes of Fluid's own.
    pub mount_point: String,
    /// Options as they are.
    pub options: BTreeMap<String, String>,
    /// Options that are secrets: the files that hold them.
    pub encrypt_options: BTreeMap<String, PathBuf>,
    /// Its name in the dataset.
    pub name: String,
    /// Where it is to be; `/name` when empty.
    pub path: String,
    /// Refuse changes below it.
    pub read_only: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Part {
    name: String,
    options: BTreeMap<String, String>,
    replicas: u32,
    service: Service,
    tiered_store_levels: Vec<Level>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Service {
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Level {
    mount_paths: Vec<PathBuf>,
    medium_type: String,
    quotas: Vec<String>,
    high: String,
    low: String,
}

impl FluidMount {
    /// Its path in the namespace, where Fluid looks for it.
    pub fn path(&self) -> String {
        match self.path.is_empty() {
            true => format!("/{}", self.name),
            false => self.path.clone(),
        }
    }

    /// A volume that Fluid itself puts into pods, nothing of an under store.
    pub fn is_volume(&self) -> bool {
        ["local://", "pvc://"].iter().any(|scheme| self.mount_point.starts_with(scheme))
    }

    /// The same as a mount of the master's configuration, secrets by their files.
    fn config(&self) -> MountConfig {
        let plain = self.options.iter().map(|(name, value)| (name.clone(), OptionValue::Plain(value.clone())));
        let secret = self.encrypt_options.iter().map(|(name, file)| (name.clone(), OptionValue::File { file: file.clone() }));
        let mut options: BTreeMap<_, _> = plain.chain(secret).collect();
        if self.is_everybodys() {
            options.insert("shared".into(), OptionValue::Plain("true".into()));
        }
        MountConfig { path: self.path(), uri: self.mount_point.clone(), read_only: self.read_only, options }
    }

    fn is_everybodys(&self) -> bool {
        !["shared", "owner", "group", "mode"].iter().any(|name| self.options.contains_key(*name))
    }

    /// All options. A dataset is for whoever may mount its claim, which Kubernetes decides: unless options say otherwise everybody may read what is found in the store.
    ///
    /// Errors: a secret's file cannot be read.
    pub fn all_options(&self) -> Result<BTreeMap<String, String>> {
        let mut all = self.options.clone();
        for (name, file) in &self.encrypt_options {
            let value = OptionValue::File { file: file.clone() }.resolve();
            all.insert(name.clone(), value.map_err(|e| e.context(format!("the secret option {name} of {}", self.mount_point)))?);
        }
        if self.is_everybodys() {
            all.insert("shared".into(), "true".into());
        }
        Ok(all)
    }
}

impl FluidRuntime {
    /// The file that the environment names; `None` where it names none, or one that is not there: Fluid does not give it to pods that load data.
    pub fn from_environment() -> Result<Option<FluidRuntime>> {
        match std::env::var_os(PATH) {
            Some(path) if Path::new(&path).exists() => FluidRuntime::read(Path::new(&path)).map(Some),
            _ => Ok(None),
        }
    }

    /// Errors: `InvalidArgument`, it is no such file.
    pub fn read(path: &Path) -> Result<FluidRuntime> {
        let raw = std::fs::read(path).map_err(crate::error::at(format!("{PATH} {}", path.display())))?;
        serde_json::from_slice(&raw).map_err(|e| err!(InvalidArgument, "{PATH} {}: no runtime configuration of Fluid's: {e}", path.display()))
    }

    /// What it sets for this process, by the part that the environment says it is.
    pub(super) fn settings(&self) -> Result<Vec<(String, Value)>> {
        self.settings_of(&std::env::var(PART).unwrap_or_default())
    }

    fn settings_of(&self, part: &str) -> Result<Vec<(String, Value)>> {
        let mut settings = Vec::new();
        if let Some(master) = &self.master {
            if master.replicas > 1 {
                return Err(err!(InvalidArgument, "master.replicas of the CacheRuntime is {}: there is one master for now", master.replicas));
            }
            let port = master.options.get("master.rpc_port").map_or(RPC_PORT, String::as_str);
            settings.push(("client.master".to_owned(), Value::from(format!("{}-0.{}:{port}", master.name, master.service.name))));
        }
        let own = match part {
            "master" => &self.master,
            "worker" => &self.worker,
            "client" => &self.client,
            _ => return Ok(settings),
        };
        let Some(own) = own else { return Ok(settings) };
        match part {
            "worker" => {
                settings.extend(tiers(&own.tiered_store_levels)?);
                // A dataset that is deleted and made again has a new master; on the nodes is what the old one cached.
                settings.push(("worker.discard_blocks_of".to_owned(), Value::from(vec!["any"])));
            }
            // There is always something at `/`: the dataset's own, where it has that, from the beginning. All else is mounted when Fluid says so.
            "master" => {
                let root: Vec<MountConfig> =
                    self.mounts.iter().filter(|mount| !mount.is_volume() && mount.path() == "/").map(FluidMount::config).collect();
                settings.push(("mount".to_owned(), Value::serialize(&root).map_err(|e| err!(Internal, "mounts: {e}"))?));
            }
            _ => {}
        }
        for (key, value) in &own.options {
            if !key.contains('.') {
                return Err(err!(InvalidArgument, "option {key} of the CacheRuntime's {part}: write SECTION.KEY, as in `forebay config show`"));
            }
            // As in the environment: a number is one, and a list may be written.
            let value = value.parse().unwrap_or_else(|_| Value::from(value.as_str()));
            settings.push((key.clone(), value));
        }
        Ok(settings)
    }
}

/// The levels as tiers. Fluid knows two media and any number of levels; levels of one medium are folders of one tier.
fn tiers(levels: &[Level]) -> Result<Vec<(String, Value)>> {
    let mut tiers: Vec<TierConfig> = Vec::new();
    let mut settings = Vec::new();
    for level in levels {
        let medium: Medium = level.medium_type.parse()?;
        if level.mount_paths.len() != level.quotas.len() {
            return Err(err!(
                InvalidArgument,
                "a level of the CacheRuntime's tieredStore has {} paths and {} quotas",
                level.mount_paths.len(),
                level.quotas.len()
            ));
        }
        let mut dirs = Vec::new();
        for (path, quota) in level.mount_paths.iter().zip(&level.quotas) {
            let bytes = quota
                .parse::<ByteSize>()
                .map_err(|_| err!(InvalidArgument, "quota {quota:?} of a level of the CacheRuntime's tieredStore: write it like 512Mi or 100Gi"))?
                .as_u64();
            // A folder of the node has no limit; a volume is full, or its pod evicted, as soon as it holds the quota.
            let limited = !path.to_string_lossy().ends_with("-hostpath");
            let usable = if limited { (bytes / BESIDE_PERCENT * 100).saturating_sub(BESIDE_BYTES) } else { bytes };
            if usable < 4 << 20 {
                return Err(err!(
                    InvalidArgument,
                    "quota {quota} of a level of the CacheRuntime's tieredStore: at least 128Mi, of which 65 MiB and 2 % are room for what is no block"
                ));
            }
            dirs.push(TierDir { path: path.join("forebay"), quota: ByteSize::b(usable), reserve: ByteSize::b(0) });
        }
        match tiers.iter_mut().find(|tier| tier.medium == medium) {
            Some(tier) => tier.dirs.extend(dirs),
            None => tiers.push(TierConfig { medium, dirs }),
        }
    }
    if tiers.is_empty() {
        return Ok(settings);
    }
    tiers.sort_by_key(|tier| tier.medium);
    settings.push(("worker.tiers".to_owned(), Value::serialize(&tiers).map_err(|e| err!(Internal, "tiers: {e}"))?));
    // One pair for all tiers here: the first level's that has any, and what it does not say follows.
    if let Some(level) = levels.iter().find(|level| !level.high.is_empty() || !level.low.is_empty()) {
        let default = WorkerConfig::default();
        let (high, low) = (percent(&level.high)?, percent(&level.low)?);
        let high = high.unwrap_or_else(|| default.watermark_high_percent.max(low.unwrap_or(0)));
        settings.push(("worker.watermark_high_percent".to_owned(), Value::from(high)));
        settings.push(("worker.watermark_low_percent".to_owned(), Value::from(low.unwrap_or_else(|| default.watermark_low_percent.min(high)))));
    }
    Ok(settings)
}

fn percent(ratio: &str) -> Result<Option<u64>> {
    if ratio.is_empty() {
        return Ok(None);
    }
    let share = ratio.parse::<f64>().ok().filter(|share| (0.01..=1.0).contains(share));
    let share = share.ok_or_else(|| err!(InvalidArgument, "{ratio:?} in the CacheRuntime's tieredStore is no share: write it like 0.95"))?;
    Ok(Some((share * 100.0).round() as u64))
}

#[cfg(test)]
mod tests {
    use super::super::Discard;
    use super::*;

    /// As Fluid's engine writes it (`generateRuntimeConfigData`).
    const RUNTIME: &str = r#"{"mounts":[
        {"mountPoint":"s3://lake/a","options":{"region":"us-east-1"},"encryptOptions":{"access_key_id":"KEYS/id"},"name":"a","path":"/a","later":1},
        {"mountPoint":"s3://lake/b","name":"b","readOnly":true,"options":{"mode":"0755"}},{"mountPoint":"pvc://claim","name":"c"}],
        "accessModes":["ReadOnlyMany"],"targetPath":"/runtime-mnt/cache/default/d/cache-fuse",
        "master":{"enabled":true,"name":"d-master","replicas":1,"service":{"name":"svc-d-master"},"options":{"master.bind":"0.0.0.0","security.allow_insecure_bind":"true"}},
        "worker":{"enabled":true,"name":"d-worker","replicas":2,"options":{"worker.hadoop":"false","worker.node_name":"1001"},"service":{"name":"svc-d-worker"},
          "tieredStoreLevels":[
            {"mountPaths":["/etc/fluid/mount/tiered-store/level-0-index-0-hostpath","/etc/fluid/mount/tiered-store/level-0-index-1-hostpath"],"mediumType":"HDD","quotas":["100Gi","50Gi"]},
            {"mountPaths":["/dev/shm"],"mediumType":"MEM","quotas":["4Gi"],"high":"0.9","low":"0.8"}]},
        "client":{"enabled":true,"name":"d-client","options":{"fuse.threads":"2"}}}"#;

    fn loaded(runtime: &FluidRuntime, part: &str) -> Result<super::super::Config> {
        let mut figment = figment::Figment::from(figment::providers::Serialized::defaults(super::super::Config::default()));
        for (key, value) in runtime.settings_of(part)? {
            figment = figment.merge(figment::providers::Serialized::default(&key, value));
        }
        figment.extract().map_err(|e| err!(InvalidArgument, "{e}"))
    }

    #[test]
    fn each_part_of_a_runtime_gets_what_is_its_own() {
        let runtime: FluidRuntime = serde_json::from_str(RUNTIME).unwrap();
        for part in ["master", "worker", "client", ""] {
            assert_eq!(loaded(&runtime, part).unwrap().client.master, "d-master-0.svc-d-master:19998", "{part}");
        }
        let master = loaded(&runtime, "master").unwrap();
        assert!(master.master.bind == "0.0.0.0" && master.security.allow_insecure_bind && master.worker.tiers.is_empty());
        assert_eq!(loaded(&runtime, "client").unwrap().fuse.threads, 2);
        let worker = loaded(&runtime, "worker").unwrap().worker;
        assert!(!worker.hadoop && worker.node_name == "1001");
        assert_eq!(worker.discards("CID-1"), Discard::Cached);
        worker.check().unwrap();
        let [mem, hdd] = worker.tiers.as_slice() else { panic!("{:?}", worker.tiers) };
        assert_eq!((mem.medium, hdd.medium), (Medium::Mem, Medium::Hdd));
        assert_eq!(mem.dirs[0].path, Path::new("/dev/shm/forebay"));
        // 4 GiB less 2 % less 65 MiB.
        assert!((3_900 << 20..4_000 << 20).contains(&mem.dirs[0].quota.as_u64()), "{:?}", mem.dirs[0]);
        assert_eq!(hdd.dirs.iter().map(|dir| dir.quota.as_u64() >> 30).collect::<Vec<_>>(), [100, 50]);
        assert_eq!((worker.watermark_high_percent, worker.watermark_low_percent), (90, 80));
    }

    #[test]
    fn one_watermark_brings_the_other_with_it() {
        let of = |from: &str, to: &str| {
            let worker = loaded(&serde_json::from_str(&RUNTIME.replace(from, to)).unwrap(), "worker").unwrap().worker;
            worker.check().unwrap();
            (worker.watermark_high_percent, worker.watermark_low_percent)
        };
        assert_eq!(of(r#""high":"0.9","low":"0.8""#, r#""high":"0.6""#), (60, 60));
        assert_eq!(of(r#""high":"0.9","low":"0.8""#, r#""low":"0.98""#), (98, 98));
    }

    #[test]
    fn a_dataset_may_have_the_root() {
        let runtime: FluidRuntime = serde_json::from_str(&RUNTIME.replace(r#""path":"/a""#, r#""path":"/""#)).unwrap();
        let mounts = loaded(&runtime, "master").unwrap().mount;
        let [root] = mounts.as_slice() else { panic!("{mounts:?}") };
        assert_eq!((root.path.as_str(), root.uri.as_str()), ("/", "s3://lake/a"));
        assert!(matches!(&root.options["access_key_id"], OptionValue::File { file } if file.ends_with("id")));
    }

    #[test]
    fn mounts_have_their_paths_and_their_secrets() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("id"), "key\n").unwrap();
        let text = RUNTIME.replace("KEYS", dir.path().to_str().unwrap());
        let runtime: FluidRuntime = serde_json::from_str(&text).unwrap();
        assert_eq!(runtime.mounts.iter().map(FluidMount::path).collect::<Vec<_>>(), ["/a", "/b", "/c"]);
        assert_eq!(runtime.mounts.iter().map(FluidMount::is_volume).collect::<Vec<_>>(), [false, false, true]);
        let options = runtime.mounts[0].all_options().unwrap();
        assert_eq!(options["access_key_id"], "key");
        assert_eq!(options["shared"], "true");
        assert!(!runtime.mounts[1].all_options().unwrap().contains_key("shared"), "modes of its own");
        let missing: FluidRuntime = serde_json::from_str(RUNTIME).unwrap();
        assert!(missing.mounts[0].all_options().unwrap_err().message().contains("access_key_id"));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |from: &str, to: &str, part: &str, named: &str| {
            assert!(RUNTIME.contains(from), "{from}");
            let e = serde_json::from_str(&RUNTIME.replace(from, to))
                .map_err(|e| err!(InvalidArgument, "{e}"))
                .and_then(|runtime| loaded(&runtime, part))
                .unwrap_err();
            assert!(e.message().contains(named), "{named}: {e}");
        };
        refused("\"replicas\":1", "\"replicas\":3", "worker", "one master");
        refused("fuse.threads", "threads", "client", "threads");
        refused("fuse.threads", "fuse.thread", "client", "thread");
        refused("\"4Gi\"", "\"4 gigs\"", "worker", "4 gigs");
        refused("\"4Gi\"", "\"64Mi\"", "worker", "128Mi");
        refused("[\"100Gi\",\"50Gi\"]", "[\"100Gi\"]", "worker", "2 paths and 1 quotas");
        refused("\"0.9\"", "\"90\"", "worker", "0.95");
        refused("\"MEM\"", "\"NVME\"", "worker", "NVME");
        assert!(FluidRuntime::read(Path::new("/dev/null")).unwrap_err().message().contains("no runtime configuration of Fluid's"));
    }
}
