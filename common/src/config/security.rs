//! Section `[security]`: identity is `simple` (the client states its user) until certificates come.

use crate::{Result, err};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Who may talk to whom.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecurityConfig {
    /// Bind other addresses than loopback although every client states its own user name unchecked.
    pub allow_insecure_bind: bool,
    /// File whose contents master and workers share; a worker without it is refused. Empty: any worker that can reach the port.
    pub cluster_secret_file: PathBuf,
    /// Users that may act for others, as Hadoop's services do for those who call them (`hadoop.proxyuser` there).
    pub proxy_users: Vec<String>,
    /// Members of this group are superusers, beside the user who started the master.
    pub superuser_group: String,
}

impl SecurityConfig {
    pub(super) fn check(&self, binds: &[(&str, &String)]) -> Result<()> {
        for (key, bind) in binds {
            let loopback = *bind == "localhost" || bind.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback());
            if !loopback && !self.allow_insecure_bind {
                return Err(err!(
                    InvalidArgument,
                    "{key} = {bind}: identity is 'simple' (clients state their own user), so anybody who reaches the port is whoever they say; bind loopback, or set security.allow_insecure_bind = true"
                ));
            }
        }
        Ok(())
    }

    /// The shared secret; empty when none is configured. Errors: the file cannot be read.
    pub fn cluster_secret(&self) -> Result<Vec<u8>> {
        if self.cluster_secret_file.as_os_str().is_empty() {
            return Ok(Vec::new());
        }
        let raw = std::fs::read(&self.cluster_secret_file)
            .map_err(crate::error::at(format!("security.cluster_secret_file {}", self.cluster_secret_file.display())))?;
        Ok(raw.trim_ascii().to_vec())
    }
}
