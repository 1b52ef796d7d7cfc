//! Sections `[[mount]]`: under stores mounted when the master starts.

use crate::{Result, err};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What stands in place of a secret wherever options are printed.
pub const REDACTED: &str = "(hidden)";

/// Whether the value of this option must never be printed or logged.
pub fn is_secret_option(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["secret", "token", "password", "credential", "access_key", "account_key", "encryption_key", "customer_key", "delegation", "sas"]
        .iter()
        .any(|s| name.contains(s))
}

/// An option's value, or where a secret is read from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    /// The value itself.
    Plain(String),
    /// The value of an environment variable of the master.
    Env {
        /// Its name.
        env: String,
    },
    /// The contents of a file, white space trimmed.
    File {
        /// Its path.
        file: std::path::PathBuf,
    },
}

impl OptionValue {
    /// The value. Errors: the variable is not set, the file cannot be read.
    pub fn resolve(&self) -> Result<String> {
        match self {
            OptionValue::Plain(v) => Ok(v.clone()),
            OptionValue::Env { env } => std::env::var(env).map_err(|_| err!(InvalidArgument, "environment variable {env} is not set")),
            OptionValue::File { file } => {
                std::fs::read_to_string(file).map(|s| s.trim().to_owned()).map_err(crate::error::at(format!("reading {}", file.display())))
            }
        }
    }
}

/// One under store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    /// Where it appears in the namespace.
    pub path: String,
    /// `s3://bucket/prefix`, `file:///folder`.
    pub uri: String,
    /// Refuse changes below it.
    #[serde(default)]
    pub read_only: bool,
    /// Options of the under store and of the mount.
    #[serde(default)]
    pub options: BTreeMap<String, OptionValue>,
}
