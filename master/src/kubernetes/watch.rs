//! Keeps the view in step with the API server: one watch of pods per namespace that is looked at, one of nodes, and one of what the selector selects.
//!
//! A watch that ends or fails is begun anew with growing pauses; until it is back what was seen stays, and the error is told by `doctor`.

use super::view::{PodFacts, View};
use forebay_common::config::{KubernetesConfig, Locality};
use forebay_common::{counter, gauge};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{CSIVolumeSource, Node, Pod};
use kube::api::PartialObjectMeta;
use kube::runtime::watcher as watch;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

counter!(EVENTS, "forebay_master_kubernetes_events_total", "events of pods and nodes that were taken from the API server");
counter!(ERRORS, "forebay_master_kubernetes_errors_total", "watches of the API server that failed");
counter!(BEYOND, "forebay_master_kubernetes_pods_beyond_total", "pods that were not kept because there are too many");
gauge!(PODS, "forebay_master_kubernetes_pods", "running pods that are known");

/// Pauses after a failure: this, doubled each time, up to half a minute.
const PAUSE: Duration = Duration::from_millis(250);
const FAILURES_MAX: u32 = 7;
/// Between two tries to reach an API server whose address or credentials cannot be found.
const AGAIN: Duration = Duration::from_secs(10);

const APP_LABEL: &str = "spark-app-selector";
const ROLE_LABEL: &str = "spark-role";
/// See `forebay-csi`.
const CSI_DRIVER: &str = "csi.forebay.io";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Whether an inline volume of our CSI driver is the folder of sockets.
fn is_of_sockets(csi: &CSIVolumeSource) -> bool {
    csi.driver == CSI_DRIVER && csi.volume_attributes.as_ref().and_then(|a| a.get("sockets")).is_some_and(|v| v == "true")
}

/// What locality needs of a pod; `None`: it has ended, or is nowhere yet.
fn facts(pod: &Pod, socket_dir: &Path) -> Option<PodFacts> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    // Its address is somebody else's from now on.
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let label = |name: &str| pod.labels().get(name).cloned();
    let sockets: HashSet<&str> = spec
        .volumes
        .iter()
        .flatten()
        .filter(|v| v.host_path.as_ref().is_some_and(|h| Path::new(&h.path) == socket_dir) || v.csi.as_ref().is_some_and(is_of_sockets))
        .map(|v| v.name.as_str())
        .collect();
    // Where clients look for it, at the same path as on the node.
    let mounts = |c: &k8s_openapi::api::core::v1::Container| {
        c.volume_mounts.iter().flatten().any(|m| sockets.contains(m.name.as_str()) && Path::new(&m.mount_path) == socket_dir)
    };
    Some(PodFacts {
        ip: status.pod_ip.as_ref()?.parse().ok()?,
        node: spec.node_name.as_deref()?.into(),
        host_network: spec.host_network.unwrap_or(false),
        app: label(APP_LABEL).map(Into::into),
        executor: label(ROLE_LABEL).as_deref() == Some("executor"),
        owner: pod.owner_references().iter().find(|owner| owner.kind == "Pod").map(|owner| owner.uid.as_str().into()),
        mounts_sockets: spec.containers.iter().any(mounts),
    })
}

/// Follows one watch: `key` is what an object is known by, `set` takes what there is, `gone` the key of what is not there any more.
async fn follow<K: Resource<DynamicType = ()> + Clone>(
    what: &str,
    view: &View,
    stream: impl Stream<Item = watcher::Result<Event<K>>>,
    key: impl Fn(&K) -> String,
    set: impl Fn(&K),
    gone: impl Fn(&str),
    shutdown: &CancellationToken,
) {
    let mut stream = std::pin::pin!(stream);
    let (mut known, mut listing) = (HashSet::new(), HashSet::new());
    let mut failures = 0;
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            event = stream.next() => event,
        };
        let Some(event) = event else { return };
        match event {
            Ok(event) => {
                EVENTS.inc();
                // A listing that begins says nothing yet; one that ended does.
                if !matches!(event, Event::Init) {
                    failures = 0;
                    if view.set_error(what, None) {
                        tracing::info!(what, "the Kubernetes API server is followed again");
                    }
                }
                match event {
                    // What a listing named that did not come to its end may be gone by now.
                    Event::Init => known.extend(listing.drain()),
                    Event::InitApply(object) => {
                        listing.insert(key(&object));
                        set(&object);
                    }
                    Event::InitDone => {
                        // What went away while nobody looked.
                        known.difference(&listing).for_each(|key| gone(key));
                        known = std::mem::take(&mut listing);
                        tracing::info!(what, objects = known.len(), "the Kubernetes API server is followed");
                    }
                    Event::Apply(object) => {
                        known.insert(key(&object));
                        set(&object);
                    }
                    Event::Delete(object) => {
                        known.remove(&key(&object));
                        gone(&key(&object));
                    }
                }
            }
            Err(e) => {
                ERRORS.inc();
                let why = format!("{what} cannot be followed: {e}");
                if view.set_error(what, Some(why)) {
                    tracing::error!(what, error = %e, "the Kubernetes API server is not followed: locality is as it was known last");
                }
                // A watch that failed is begun anew when it is asked for its next event.
                failures = (failures + 1).min(FAILURES_MAX);
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(PAUSE * 2u32.pow(failures)) => {}
                }
            }
        }
        PODS.set(i64::try_from(view.summary().0).unwrap_or(i64::MAX));
    }
}

fn uid<K: Resource>(object: &K) -> String {
    object.uid().unwrap_or_default()
}

/// In which namespace something is looked at, for people.
fn named(what: &str, namespace: &str) -> String {
    if namespace.is_empty() { what.to_owned() } else { format!("{what} of {namespace}") }
}

/// Objects of one namespace, or of all.
fn within<K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>>(client: &Client, namespace: &str) -> Api<K> {
    if namespace.is_empty() { Api::all(client.clone()) } else { Api::namespaced(client.clone(), namespace) }
}

async fn pods(api: Api<Pod>, namespace: &str, config: &KubernetesConfig, view: &View, shutdown: &CancellationToken) {
    let set = |pod: &Pod| {
        if !view.set_pod(&uid(pod), facts(pod, &config.socket_dir)) {
            BEYOND.inc();
        }
    };
    let gone = |uid: &str| {
        view.set_pod(uid, None);
    };
    follow(&named("pods", namespace), view, watch(api, watcher::Config::default()), uid, set, gone, shutdown).await;
}

async fn selected(api: Api<PartialObjectMeta<Pod>>, namespace: &str, selector: &str, view: &View, shutdown: &CancellationToken) {
    let set = |pod: &PartialObjectMeta<Pod>| view.set_selected(&uid(pod), true);
    let gone = |uid: &str| view.set_selected(uid, false);
    let stream = watch(api, watcher::Config::default().labels(selector));
    follow(&named("selected pods", namespace), view, stream, uid, set, gone, shutdown).await;
}

async fn nodes(client: Client, view: &View, shutdown: &CancellationToken) {
    let set = |node: &PartialObjectMeta<Node>| view.set_node(&node.name_any(), Some(node.labels().get(ZONE_LABEL).cloned()));
    let stream = watch(Api::<PartialObjectMeta<Node>>::all(client), watcher::Config::default());
    follow("nodes", view, stream, ResourceExt::name_any, set, |name| view.set_node(name, None), shutdown).await;
}

/// Follows the cluster until `shutdown`; ends at once where it is not to be looked at.
pub async fn run(config: KubernetesConfig, view: Arc<View>, shutdown: CancellationToken) {
    if config.locality == Locality::None {
        return;
    }
    // Several providers are linked, so none is the default by itself; where somebody has chosen one, that is it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = loop {
        match Client::try_default().await {
            Ok(client) => break client,
            Err(e) => {
                ERRORS.inc();
                if view.set_error("the API server", Some(format!("the Kubernetes API server is not found: {e}"))) {
                    tracing::error!(error = %e, "kubernetes.locality is set, and the API server is not found");
                }
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(AGAIN) => {}
        }
    };
    view.set_error("the API server", None);
    // An empty name stands for all of them.
    let all = [String::new()];
    let namespaces = if config.namespaces.is_empty() { &all[..] } else { &config.namespaces };
    let all_pods = namespaces.iter().map(|namespace| pods(within(&client, namespace), namespace, &config, &view, &shutdown));
    let mut all_selected = Vec::new();
    if config.locality == Locality::Pods {
        all_selected
            .extend(namespaces.iter().map(|namespace| selected(within(&client, namespace), namespace, &config.pod_selector, &view, &shutdown)));
    }
    let (all_pods, all_selected) = (futures::future::join_all(all_pods), futures::future::join_all(all_selected));
    tokio::join!(all_pods, all_selected, nodes(client.clone(), &view, &shutdown));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_of_a_pod() {
        let json = |phase: &str, path: &str| {
            serde_json::json!({
                "metadata": {"name": "p", "uid": "u", "labels": {"spark-app-selector": "spark-1", "spark-role": "executor"}},
                "spec": {"nodeName": "n1", "volumes": [{"name": "s", "hostPath": {"path": path}}],
                         "containers": [{"name": "c", "volumeMounts": [{"name": "s", "mountPath": "/run/forebay", "readOnly": true}]}]},
                "status": {"phase": phase, "podIP": "10.0.0.7"}
            })
        };
        let of = |json| facts(&serde_json::from_value(json).unwrap(), Path::new("/run/forebay"));
        let pod = of(json("Running", "/run/forebay")).unwrap();
        assert_eq!(
            (pod.ip.to_string(), &*pod.node, pod.app.as_deref(), pod.executor, pod.mounts_sockets),
            ("10.0.0.7".to_owned(), "n1", Some("spark-1"), true, true)
        );
        assert!(!of(json("Running", "/elsewhere")).unwrap().mounts_sockets);
        assert!(of(json("Succeeded", "/run/forebay")).is_none() && of(json("Failed", "/run/forebay")).is_none());
        let mut inline = json("Running", "/elsewhere");
        inline["spec"]["volumes"] = serde_json::json!([{"name": "s", "csi": {"driver": "csi.forebay.io", "volumeAttributes": {"sockets": "true"}}}]);
        assert!(of(inline).unwrap().mounts_sockets);
        let mut unplaced = json("Pending", "/run/forebay");
        unplaced["status"] = serde_json::json!({"phase": "Pending"});
        assert!(of(unplaced).is_none());
    }
}
