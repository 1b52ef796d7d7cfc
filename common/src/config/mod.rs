//! Configuration: one TOML file, environment variables `FOREBAY_SECTION__KEY` on top, flags of the command line on top; below them, in a pod of a Fluid
//! runtime, what Fluid says (`fluid`).
//!
//! Every value knows where it came from (`forebay config show`). An unknown key is an error that names it. Secrets are
//! never held here: a value `{ env = "NAME" }` or `{ file = "PATH" }` names where they are read from when used.

mod client;
mod fluid;
mod fuse;
mod kubernetes;
mod master;
mod mount;
mod scalar;
mod security;
mod tier;
mod worker;

pub use client::ClientConfig;
pub use fluid::{FluidMount, FluidRuntime};
pub use fuse::FuseConfig;
pub use kubernetes::{KubernetesConfig, Locality};
pub use master::MasterConfig;
pub use mount::{MountConfig, OptionValue, REDACTED, is_secret_option};
pub use security::SecurityConfig;
pub use tier::{AllocatePolicy, EvictPolicy, Medium, TierConfig, TierDir};
pub use worker::{Discard, MemMount, UNNAMED_CLUSTER, WorkerConfig};

use crate::{Result, err};
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Everything that can be configured, one section per role.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The master.
    pub master: MasterConfig,
    /// The worker.
    pub worker: WorkerConfig,
    /// Clients: the commands, the library, the mount.
    pub client: ClientConfig,
    /// Mounts by FUSE.
    pub fuse: FuseConfig,
    /// Who may talk to whom.
    pub security: SecurityConfig,
    /// A master in a Kubernetes cluster.
    pub kubernetes: KubernetesConfig,
    /// Under stores mounted when the master starts, unless mounted already.
    pub mount: Vec<MountConfig>,
}

/// One line of `config show`.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// `section.key`.
    pub key: String,
    /// The value as JSON.
    pub value: serde_json::Value,
    /// `default`, the file, the environment variable, `flag` or `Fluid's runtime.json`.
    pub source: String,
}

/// A loaded configuration together with where each value came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    figment: Figment,
    flags: Vec<String>,
    fluid: Vec<String>,
}

/// Loads: defaults, then Fluid's file where one is named, then `file` (or the first of the usual places that exists), then the environment, then `flags`.
///
/// Errors: `InvalidArgument` naming the key and where it was set.
pub fn load(file: Option<&Path>, flags: &[(&str, serde_json::Value)]) -> Result<Loaded> {
    let mut figment = Figment::from(Serialized::defaults(Config::default()));
    let mut from_fluid = Vec::new();
    if let Some(fluid) = FluidRuntime::from_environment()? {
        for (key, value) in fluid.settings()? {
            figment = figment.merge(Serialized::default(&key, value));
            from_fluid.push(key);
        }
    }
    let file = match file {
        Some(path) if !path.exists() => {
            return Err(err!(NotFound, "configuration file {} does not exist", path.display()));
        }
        Some(path) => Some(path.to_owned()),
        None => usual_places().into_iter().find(|p| p.exists()),
    };
    if let Some(path) = file {
        figment = figment.merge(Toml::file_exact(path));
    }
    let env = Env::prefixed("FOREBAY_").filter(|k| k.as_str().contains("__")).split("__");
    figment = figment.merge(env);
    if let Ok(master) = std::env::var("FOREBAY_MASTER") {
        figment = figment.merge(Serialized::default("client.master", master));
    }
    check_environment(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
    for (key, value) in flags {
        figment = figment.merge(Serialized::default(key, value));
    }
    let config: Config = figment.extract().map_err(|e| err!(InvalidArgument, "configuration: {e}"))?;
    config.check()?;
    Ok(Loaded { config, figment, flags: flags.iter().map(|(key, _)| (*key).to_owned()).collect(), fluid: from_fluid })
}

/// A variable that misses an underscore would be taken for somebody else's, and its command run as somebody else.
/// Errors: `InvalidArgument` naming it and the right one.
fn check_environment(names: impl Iterator<Item = String>) -> Result<()> {
    let known = serde_json::to_value(Config::default()).map_err(|e| err!(Internal, "configuration: {e}"))?;
    for name in names.filter(|n| !n.contains("__")) {
        let Some((section, key)) = name.strip_prefix("FOREBAY_").and_then(|rest| rest.split_once('_')) else { continue };
        let (section, key) = (section.to_lowercase(), key.to_lowercase());
        if known[&section].get(&key).is_some() {
            let right = format!("FOREBAY_{}__{}", section.to_uppercase(), key.to_uppercase());
            return Err(err!(InvalidArgument, "environment variable {name} is not read: did you mean {right} (two underscores)?"));
        }
    }
    Ok(())
}

fn usual_places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Ok(path) = std::env::var("FOREBAY_CONFIG") {
        places.push(PathBuf::from(path));
    }
    if let Some(dirs) = directories::ProjectDirs::from("io", "forebay", "forebay") {
        places.push(dirs.config_dir().join("forebay.toml"));
    }
    places.push(PathBuf::from("/etc/forebay/forebay.toml"));
    places
}

impl Loaded {
    /// Every value with its source, in the order of the sections.
    pub fn show(&self) -> Result<Vec<Shown>> {
        let mut tree = serde_json::to_value(&self.config).map_err(|e| err!(Internal, "configuration: {e}"))?;
        for mount in tree["mount"].as_array_mut().into_iter().flatten() {
            for (name, value) in mount["options"].as_object_mut().into_iter().flatten() {
                if mount::is_secret_option(name) && value.is_string() {
                    *value = mount::REDACTED.into();
                }
            }
        }
        let mut out = Vec::new();
        self.walk("", &tree, &mut out);
        Ok(out)
    }

    fn set_by(&self, key: &str) -> String {
        let among = |keys: &[String]| keys.iter().any(|set| key == set || key.starts_with(&format!("{set}.")));
        if among(&self.flags) {
            "flag".into()
        } else if key == "client.master" && std::env::var_os("FOREBAY_MASTER").is_some() {
            "environment FOREBAY_MASTER".into()
        } else if among(&self.fluid) {
            "Fluid's runtime.json".into()
        } else {
            "default".into()
        }
    }

    fn walk(&self, key: &str, value: &serde_json::Value, out: &mut Vec<Shown>) {
        match value {
            serde_json::Value::Object(map) if !map.is_empty() => {
                for (name, value) in map {
                    let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                    self.walk(&key, value, out);
                }
            }
            _ => {
                let source = self.figment.find_metadata(key).map_or("default".to_owned(), |m| match &m.source {
                    Some(figment::Source::File(path)) => path.display().to_string(),
                    _ if m.name.contains("environment") => format!("environment FOREBAY_{}", key.to_uppercase().replace('.', "__")),
                    _ if m.provide_location.is_some() && !m.name.contains("Config") => self.set_by(key),
                    _ => "default".to_owned(),
                });
                out.push(Shown { key: key.to_owned(), value: value.clone(), source });
            }
        }
    }
}

impl Config {
    /// Checks what types cannot say. Errors: `InvalidArgument` naming the key.
    pub fn check(&self) -> Result<()> {
        self.master.check()?;
        self.worker.check()?;
        self.fuse.check()?;
        self.kubernetes.check()?;
        self.security.check(&[("master.bind", &self.master.bind), ("worker.bind", &self.worker.bind)])
    }
}

/// The folder for data when none is configured: `$XDG_DATA_HOME/forebay`, `~/.local/share/forebay`.
pub fn default_data_dir() -> PathBuf {
    directories::ProjectDirs::from("io", "forebay", "forebay").map_or_else(|| PathBuf::from("/var/lib/forebay"), |d| d.data_dir().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_then_flags_and_each_value_knows_its_source() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.toml");
        std::fs::write(&path, "[master]\nrpc_port = 7\nweb_port = 8\n[worker]\nmem_quota = \"64MiB\"\n").unwrap();
        let loaded = load(Some(&path), &[("master.web_port", 9.into())]).unwrap();
        assert_eq!((loaded.config.master.rpc_port, loaded.config.master.web_port), (7, 9));
        assert_eq!(loaded.config.worker.mem_quota.as_u64(), 64 << 20);
        let shown = loaded.show().unwrap();
        let of = |key: &str| shown.iter().find(|s| s.key == key).unwrap().source.clone();
        assert!(of("master.rpc_port").ends_with("f.toml"));
        assert!(of("master.web_port").starts_with("flag"));
        assert_eq!(of("client.short_circuit"), "default");
    }

    #[test]
    fn an_unknown_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.toml");
        std::fs::write(&path, "[master]\nrpc_prot = 7\n").unwrap();
        assert!(load(Some(&path), &[]).unwrap_err().message().contains("rpc_prot"));
    }

    #[test]
    fn other_than_loopback_must_be_said_in_so_many_words() {
        let e = load(None, &[("master.bind", "0.0.0.0".into())]).unwrap_err();
        assert!(e.message().contains("security.allow_insecure_bind"), "{e}");
        assert!(load(None, &[("master.bind", "0.0.0.0".into()), ("security.allow_insecure_bind", true.into())]).is_ok());
    }

    /// A flag wins over the environment; a variable that misses an underscore is refused.
    #[test]
    fn flags_are_on_top() {
        // Other tests of this process do not look at this variable.
        let merged = Figment::from(Serialized::defaults(Config::default()))
            .merge(Serialized::default("client.master", "from-environment:1"))
            .merge(Serialized::default("client.master", "from-flag:1"));
        assert_eq!(merged.extract::<Config>().unwrap().client.master, "from-flag:1");
        let check = |name: &str| check_environment([name.to_owned()].into_iter());
        assert!(check("FOREBAY_CLIENT_USER").unwrap_err().message().contains("FOREBAY_CLIENT__USER"));
        for fine in ["FOREBAY_CLIENT__USER", "FOREBAY_MASTER", "FOREBAY_MASTER_PORT", "FOREBAY_MASTER_SERVICE_HOST", "FOREBAY_CACHE", "HOME"] {
            check(fine).unwrap();
        }
    }
}
