//! The controller part: a claim of a storage class of ours gets a folder of the namespace and a PersistentVolume that names it; a volume that was released, and whose class
//! says so, loses its folder and goes.
//!
//! Run by `forebay csi --controller`, one process for a cluster, without a sidecar: it follows claims and volumes of the API server itself. Every step may come again and then
//! finds it done, so two processes do no harm, and one that was killed goes on where the other was.
//!
//! Invariants: the folder is there before the volume is; a folder is deleted only for a released volume that this driver made, whose name the folder's ends with, and before the
//! volume goes. What fails is tried again with growing pauses, and told in the object's events (`kubectl describe pvc`).

use crate::DRIVER;
use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_common::error::at;
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{AbsPath, Error, ErrorKind, LocalBoxed, Result, counter, err};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{CSIPersistentVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

counter!(PROVISIONED, "forebay_csi_volumes_provisioned_total", "volumes that were made for claims");
counter!(DELETED, "forebay_csi_volumes_deleted_total", "released volumes that were deleted with their folders");
counter!(FAILED, "forebay_csi_provisioning_failures_total", "claims and volumes that could not be looked after; they are tried again");

/// After a failure.
const AGAIN: Duration = Duration::from_secs(10);
/// Says who made a volume; read by Kubernetes' own controllers as well.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Set on a claim that somebody else than Kubernetes itself has to provide for: by whom.
const PROVISIONER: [&str; 2] = ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];
/// Set on a claim of a class that waits for its first pod, once that has a node.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// What folders are made in, where the class does not say.
const PARENT: &str = "/volumes";
/// What everybody may do in a folder, where the class does not say: pods run as whoever their image says.
const MODE: u32 = 0o777;

struct Provisioner {
    client: Client,
    fs: FileSystem,
    events: Recorder,
}

/// A class's parameters. Errors: one that is none, naming those there are.
#[derive(Debug, PartialEq, Eq)]
struct Parameters {
    parent: AbsPath,
    options: Option<String>,
    mode: u32,
}

fn parameters(class: &BTreeMap<String, String>) -> Result<Parameters> {
    if let Some(name) = class.keys().find(|name| !["path", "options", "mode"].contains(&name.as_str())) {
        return Err(err!(InvalidArgument, "{name} is no parameter of a storage class of {DRIVER}: there are path, options, mode"));
    }
    let mode = match class.get("mode") {
        Some(mode) => u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777 && *mode > 0),
        None => Some(MODE),
    };
    let mode = mode.ok_or_else(|| err!(InvalidArgument, "the storage class's mode is written like 0777"))?;
    Ok(Parameters { parent: class.get("path").map_or(PARENT, String::as_str).parse()?, options: class.get("options").cloned(), mode })
}

/// The folder of a claim's volume; it ends with the volume's name.
fn folder(parent: &AbsPath, namespace: &str, claim: &str, volume: &str) -> Result<AbsPath> {
    let spoken = format!("{namespace}-{claim}-{volume}");
    parent.join(if spoken.len() <= NAME_MAX_BYTES { &spoken } else { volume }.as_bytes())
}

/// The folder of a released volume that is to be deleted; `None` for any other volume. Errors: one that this driver cannot have made.
fn doomed(volume: &PersistentVolume) -> Result<Option<AbsPath>> {
    let (Some(spec), Some(status)) = (&volume.spec, &volume.status) else { return Ok(None) };
    let ours = volume.annotations().get(PROVISIONED_BY).is_some_and(|by| by == DRIVER);
    let Some(csi) = spec.csi.as_ref().filter(|csi| ours && csi.driver == DRIVER) else { return Ok(None) };
    let released = status.phase.as_deref() == Some("Released") && spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete");
    if !released || volume.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let name = volume.name_any();
    let path = csi.volume_attributes.as_ref().and_then(|attributes| attributes.get("path"));
    let path: AbsPath = path.ok_or_else(|| err!(InvalidArgument, "volume {name} has no path"))?.parse()?;
    if !path.name().is_some_and(|last| last.ends_with(name.as_bytes())) {
        return Err(err!(InvalidArgument, "the folder {path} of volume {name} was not made by this driver: it stays, delete it by hand"));
    }
    Ok(Some(path))
}

fn api_error(what: &str) -> impl FnOnce(kube::Error) -> Error + '_ {
    move |e| err!(Unavailable, "{what}: {e}")
}

impl Provisioner {
    async fn tell<K: Resource<DynamicType = ()>>(&self, object: &K, type_: EventType, reason: &str, note: String) {
        let mut note = note;
        note.truncate(note.floor_char_boundary(1_000));
        let event = Event { type_, reason: reason.to_owned(), note: Some(note), action: "Provision".to_owned(), secondary: None };
        if let Err(e) = self.events.publish(&event, &object.object_ref(&())).await {
            tracing::debug!(error = %e, "an event was not told");
        }
    }

    /// The class of a claim that waits for us.
    async fn class_of(&self, claim: &PersistentVolumeClaim) -> Result<Option<StorageClass>> {
        let waits = claim.status.as_ref().and_then(|status| status.phase.as_deref()).is_none_or(|phase| phase == "Pending");
        let asked = PROVISIONER.iter().any(|name| claim.annotations().get(*name).is_some_and(|by| by == DRIVER));
        let spec = claim.spec.as_ref().filter(|spec| spec.volume_name.as_ref().is_none_or(String::is_empty));
        let Some(spec) = spec.filter(|_| waits && asked && claim.metadata.deletion_timestamp.is_none()) else { return Ok(None) };
        let Some(name) = &spec.storage_class_name else { return Ok(None) };
        let class = Api::<StorageClass>::all(self.client.clone()).get_opt(name).await.map_err(api_error("the storage class"))?;
        let Some(class) = class.filter(|class| class.provisioner == DRIVER) else { return Ok(None) };
        let later = class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer") && !claim.annotations().contains_key(SELECTED_NODE);
        if later {
            return Ok(None);
        }
        if spec.volume_mode.as_deref() == Some("Block") {
            return Err(err!(InvalidArgument, "a Forebay volume is a file system, not a block device: volumeMode Filesystem"));
        }
        if spec.selector.is_some() || spec.data_source.is_some() || spec.data_source_ref.is_some() {
            return Err(err!(InvalidArgument, "a claim with a selector or a source is for volumes that are there already: none is made for it"));
        }
        Ok(Some(class))
    }

    async fn claim(&self, claim: &PersistentVolumeClaim) -> Result<()> {
        let Some(class) = self.class_of(claim).await? else { return Ok(()) };
        let (Some(uid), Some(namespace), Some(spec)) = (&claim.metadata.uid, claim.namespace(), &claim.spec) else { return Ok(()) };
        let parameters = parameters(&class.parameters.clone().unwrap_or_default())?;
        let volume = format!("pvc-{uid}");
        let path = folder(&parameters.parent, &namespace, &claim.name_any(), &volume)?;
        self.fs.mkdir_as(&path, true, true, parameters.mode).await?;
        let mut attributes = BTreeMap::from([("path".to_owned(), path.to_string())]);
        attributes.extend(parameters.options.map(|options| ("options".to_owned(), options)));
        let asked = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()).and_then(|requests| requests.get("storage")).cloned();
        let object = PersistentVolume {
            metadata: ObjectMeta {
                name: Some(volume.clone()),
                annotations: Some(BTreeMap::from([(PROVISIONED_BY.to_owned(), DRIVER.to_owned())])),
                ..ObjectMeta::default()
            },
            spec: Some(PersistentVolumeSpec {
                access_modes: spec.access_modes.clone(),
                capacity: asked.map(|size| BTreeMap::from([("storage".to_owned(), size)])),
                claim_ref: Some(ObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("PersistentVolumeClaim".to_owned()),
                    name: Some(claim.name_any()),
                    namespace: Some(namespace),
                    uid: Some(uid.clone()),
                    resource_version: claim.resource_version(),
                    field_path: None,
                }),
                csi: Some(CSIPersistentVolumeSource {
                    driver: DRIVER.to_owned(),
                    volume_handle: volume.clone(),
                    volume_attributes: Some(attributes),
                    ..CSIPersistentVolumeSource::default()
                }),
                mount_options: class.mount_options.clone(),
                persistent_volume_reclaim_policy: Some(class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned())),
                storage_class_name: Some(class.name_any()),
                volume_mode: Some("Filesystem".to_owned()),
                ..PersistentVolumeSpec::default()
            }),
            status: None,
        };
        match Api::<PersistentVolume>::all(self.client.clone()).create(&PostParams::default(), &object).await {
            Ok(_) => {
                PROVISIONED.inc();
                tracing::info!(volume, %path, claim = claim.name_any(), "a volume was made for a claim");
                self.tell(claim, EventType::Normal, "ProvisioningSucceeded", format!("volume {volume} is the folder {path}")).await;
                Ok(())
            }
            // Made before, or by another process: Kubernetes binds it.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(e) => Err(api_error("making the volume")(e)),
        }
    }

    async fn volume(&self, volume: &PersistentVolume) -> Result<()> {
        let Some(path) = doomed(volume)? else { return Ok(()) };
        match self.fs.delete(&path, true).await {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        match Api::<PersistentVolume>::all(self.client.clone()).delete(&volume.name_any(), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(e) => return Err(api_error("deleting the volume")(e)),
            Ok(_) => {
                DELETED.inc();
                tracing::info!(volume = volume.name_any(), %path, "a released volume was deleted with its folder");
            }
        }
        Ok(())
    }
}

/// Books the outcome of a look at one object; what failed comes again.
async fn told<K: Resource<DynamicType = ()> + ResourceExt>(of: &Provisioner, object: &K, reason: &str, done: Result<()>) -> Result<Action> {
    if let Err(e) = &done {
        FAILED.inc();
        tracing::warn!(object = object.name_any(), error = %e, "{reason}");
        of.tell(object, EventType::Warning, reason, e.to_string()).await;
    }
    done.map(|()| Action::await_change())
}

/// What one object came to was told with it; what the watch itself came to is told here.
fn watched<T>(done: std::result::Result<T, kube::runtime::controller::Error<Error, watcher::Error>>) {
    if let Err(kube::runtime::controller::Error::QueueError(e)) = done {
        FAILED.inc();
        tracing::warn!(error = %e, "the Kubernetes API server is not followed: it is tried again");
    }
}

/// Looks after claims and volumes until `shutdown`, and answers `/healthz` and `/metrics`. Errors: no API server, no master, a port that cannot be bound.
pub fn run(client: &ClientConfig, web: SocketAddr, shutdown: CancellationToken) -> LocalBoxed<'_, Result<()>> {
    Box::pin(run_here(client, web, shutdown))
}

async fn run_here(client: &ClientConfig, web: SocketAddr, shutdown: CancellationToken) -> Result<()> {
    // Several providers are linked, so none is the default by itself; where somebody has chosen one, that is it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind(web).await.map_err(at(format!("binding {web} (--web)")))?;
    let kubernetes = Client::try_default().await.map_err(|e| err!(Unavailable, "the Kubernetes API server is not found: {e}"))?;
    let reporter = Reporter { controller: DRIVER.to_owned(), instance: None };
    let events = Recorder::new(kubernetes.clone(), reporter);
    let all = Arc::new(Provisioner { client: kubernetes.clone(), fs: FileSystem::connect(client).await?, events });
    let stop = || shutdown.clone().cancelled_owned();
    let claims = Controller::new(Api::<PersistentVolumeClaim>::all(kubernetes.clone()), watcher::Config::default()).graceful_shutdown_on(stop()).run(
        |claim, all: Arc<Provisioner>| async move {
            let done = all.claim(&claim).await;
            told(&all, &*claim, "ProvisioningFailed", done).await
        },
        |_, _, _| Action::requeue(AGAIN),
        all.clone(),
    );
    let volumes = Controller::new(Api::<PersistentVolume>::all(kubernetes), watcher::Config::default()).graceful_shutdown_on(stop()).run(
        |volume, all: Arc<Provisioner>| async move {
            let done = all.volume(&volume).await;
            told(&all, &*volume, "VolumeFailedDelete", done).await
        },
        |_, _, _| Action::requeue(AGAIN),
        all,
    );
    let pages = axum::serve(listener, crate::pages()).with_graceful_shutdown(stop());
    tracing::info!("volumes are made for claims of storage classes of {DRIVER}");
    let claims = claims.for_each(|done| async { watched(done) });
    let volumes = volumes.for_each(|done| async { watched(done) });
    let (pages, (), ()) = tokio::join!(pages.into_future(), claims, volumes);
    pages.map_err(at("web server"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_ours_or_named() {
        let of = |pairs: &[(&str, &str)]| parameters(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
        assert_eq!(of(&[]).unwrap(), Parameters { parent: "/volumes".parse().unwrap(), options: None, mode: 0o777 });
        assert_eq!(of(&[("path", "/team"), ("mode", "2770")]).unwrap().mode, 0o2770);
        assert!(of(&[("folder", "/a")]).unwrap_err().message().contains("path, options, mode"));
        assert!(of(&[("mode", "rwx")]).is_err() && of(&[("mode", "10000")]).is_err() && of(&[("path", "relative")]).is_err());
    }

    /// (S-39)
    #[test]
    fn folders_end_with_their_volumes_name_and_only_those_are_deleted() {
        let parent: AbsPath = "/volumes".parse().unwrap();
        assert_eq!(folder(&parent, "ns", "claim", "pvc-1").unwrap().to_string(), "/volumes/ns-claim-pvc-1");
        assert_eq!(folder(&parent, "ns", &"c".repeat(250), "pvc-1").unwrap().to_string(), "/volumes/pvc-1");
        let volume = |path: &str, phase: &str, policy: &str, by: &str| -> PersistentVolume {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "pvc-1", "annotations": {PROVISIONED_BY: by}},
                "spec": {"persistentVolumeReclaimPolicy": policy, "csi": {"driver": DRIVER, "volumeHandle": "pvc-1", "volumeAttributes": {"path": path}}},
                "status": {"phase": phase}
            }))
            .unwrap()
        };
        let path = "/volumes/ns-claim-pvc-1";
        assert_eq!(doomed(&volume(path, "Released", "Delete", DRIVER)).unwrap().unwrap().to_string(), path);
        assert_eq!(doomed(&volume(path, "Bound", "Delete", DRIVER)).unwrap(), None);
        assert_eq!(doomed(&volume(path, "Released", "Retain", DRIVER)).unwrap(), None);
        assert_eq!(doomed(&volume(path, "Released", "Delete", "somebody.else")).unwrap(), None);
        for other in ["/", "/volumes", "/volumes/ns-claim-pvc-2"] {
            assert!(doomed(&volume(other, "Released", "Delete", DRIVER)).is_err(), "{other}");
        }
    }
}
