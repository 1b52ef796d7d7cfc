//! Section `[kubernetes]`: what a master that runs in a cluster looks at there. The chart sets it.

use crate::{Result, err};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Which names of a worker's machine Hadoop's schedulers are told, so that they place work there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// The worker's own; the cluster is not looked at.
    #[default]
    None,
    /// The name of its node: YARN, standalone.
    Node,
    /// Addresses of the asking Spark application's executors on its node. Spark compares these with a block's hosts, letter by letter.
    Spark,
    /// Addresses of the pods on its node that `pod_selector` selects: Trino, Flink.
    Pods,
}

/// Settings of the master in a Kubernetes cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// `none`, `node`, `spark`, `pods`.
    pub locality: Locality,
    /// Labels of pods that read, for `pods`: `app.kubernetes.io/name=trino,app.kubernetes.io/component in (worker)`.
    pub pod_selector: String,
    /// Namespaces whose pods are looked at; empty: all.
    pub namespaces: Vec<String>,
    /// Java clients in pods that mount `socket_dir` are told the worker on their node under their own address first: they try its socket for no other.
    pub java_short_circuit: bool,
    /// The folder of the nodes with the workers' sockets.
    pub socket_dir: PathBuf,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        KubernetesConfig {
            locality: Locality::None,
            pod_selector: String::new(),
            namespaces: Vec::new(),
            java_short_circuit: false,
            socket_dir: "/run/forebay".into(),
        }
    }
}

impl KubernetesConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.locality == Locality::Pods && self.pod_selector.is_empty() {
            return Err(err!(InvalidArgument, "kubernetes.locality = \"pods\" needs kubernetes.pod_selector, like app.kubernetes.io/name=trino"));
        }
        Ok(())
    }
}
