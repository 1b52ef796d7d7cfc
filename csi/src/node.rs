//! What kubelet asks: who this is, and that volumes are published and unpublished. Every call may come again, and then finds it done.

use crate::DRIVER;
use crate::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, ProbeRequest, ProbeResponse, identity_server, node_server,
    volume_capability::AccessType,
};
use crate::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse, registration_server};
use crate::volumes::{Kind, Volume, Volumes};
use forebay_common::{AbsPath, ErrorKind, Result, err};
use std::path::PathBuf;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Who the driver is.
pub struct Identity;

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse { name: DRIVER.to_owned(), vendor_version: env!("CARGO_PKG_VERSION").to_owned() }))
    }
    async fn get_plugin_capabilities(&self, _: Request<GetPluginCapabilitiesRequest>) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse {}))
    }
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse {}))
    }
}

/// How kubelet finds the driver.
pub struct Registrar {
    pub endpoint: PathBuf,
}

#[tonic::async_trait]
impl registration_server::Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }
    async fn notify_registration_status(&self, r: Request<RegistrationStatus>) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = r.into_inner();
        if status.plugin_registered {
            tracing::info!("kubelet has registered the driver");
        } else {
            tracing::error!(error = status.error, "kubelet does not register the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Volumes on this node.
pub struct Node {
    pub volumes: Arc<Volumes>,
    pub node: String,
    pub inline_files: bool,
}

/// What a volume's attributes say. `path`: a folder of the namespace; `master`: `HOST:PORT` of another master; `options`: as `forebay mount -o`;
/// `sockets: "true"`: the workers' sockets instead. Errors: an attribute that is none, naming those there are.
/// An inline volume is written by whoever may make a pod, not by an administrator: `inline_files` says whether it may be of files, and it has neither `master` nor `options`.
fn kind(request: &NodePublishVolumeRequest, inline_files: bool) -> Result<Kind> {
    let context = &request.volume_context;
    for name in context.keys().filter(|name| !name.starts_with("csi.storage.k8s.io/") && !name.starts_with("storage.kubernetes.io/")) {
        if !["path", "master", "options", "sockets"].contains(&name.as_str()) {
            return Err(err!(InvalidArgument, "{name} is no attribute of a Forebay volume: there are path, master, options, sockets"));
        }
    }
    if context.get("sockets").is_some_and(|v| v == "true") {
        return Ok(Kind::Sockets);
    }
    if context.get("csi.storage.k8s.io/ephemeral").is_some_and(|v| v == "true") {
        if !inline_files {
            return Err(err!(InvalidArgument, "an inline volume may be of sockets alone (csi.inlineFiles of the chart): use a PersistentVolume"));
        }
        if let Some(name) = ["master", "options"].into_iter().find(|name| context.contains_key(*name)) {
            return Err(err!(InvalidArgument, "an inline volume has no attribute {name}: use a PersistentVolume"));
        }
    }
    let path: AbsPath = context.get("path").map_or("/", String::as_str).parse()?;
    let mut options: Vec<String> = context.get("options").map(|o| o.split(',').map(str::to_owned).collect()).unwrap_or_default();
    match request.volume_capability.as_ref().and_then(|c| c.access_type.as_ref()) {
        Some(AccessType::Block(_)) => return Err(err!(InvalidArgument, "a Forebay volume is a file system, not a block device")),
        Some(AccessType::Mount(mount)) => options.extend(mount.mount_flags.iter().cloned()),
        None => {}
    }
    let read_only = request.readonly;
    Ok(Kind::Files { path: path.to_string(), master: context.get("master").cloned(), options, read_only })
}

fn status(e: &forebay_common::Error) -> Status {
    match e.kind() {
        ErrorKind::InvalidArgument => Status::invalid_argument(e.to_string()),
        ErrorKind::NotFound => Status::not_found(e.to_string()),
        ErrorKind::Busy => Status::aborted(e.to_string()),
        ErrorKind::Timeout => Status::deadline_exceeded(e.to_string()),
        _ => Status::internal(e.to_string()),
    }
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_publish_volume(&self, r: Request<NodePublishVolumeRequest>) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let r = r.into_inner();
        let published = async {
            if r.target_path.is_empty() || r.volume_id.is_empty() {
                return Err(err!(InvalidArgument, "a volume is published with its id and a target path"));
            }
            let volume = Volume { id: r.volume_id.clone(), target: PathBuf::from(&r.target_path), kind: kind(&r, self.inline_files)? };
            self.volumes.publish(volume).await
        };
        match published.await {
            Ok(()) => Ok(Response::new(NodePublishVolumeResponse {})),
            Err(e) => {
                tracing::error!(volume = r.volume_id, target = r.target_path, error = %e, "a volume is not published");
                Err(status(&e))
            }
        }
    }

    async fn node_unpublish_volume(&self, r: Request<NodeUnpublishVolumeRequest>) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let r = r.into_inner();
        match self.volumes.unpublish(&PathBuf::from(&r.target_path)).await {
            Ok(()) => Ok(Response::new(NodeUnpublishVolumeResponse {})),
            Err(e) => {
                tracing::error!(volume = r.volume_id, target = r.target_path, error = %e, "a volume is not unpublished");
                Err(status(&e))
            }
        }
    }

    async fn node_get_capabilities(&self, _: Request<NodeGetCapabilitiesRequest>) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse {}))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.node.clone(), max_volumes_per_node: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(context: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let volume_context = context.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        NodePublishVolumeRequest { volume_id: "v".into(), target_path: "/t".into(), volume_context, ..NodePublishVolumeRequest::default() }
    }

    #[test]
    fn attributes_are_ours_or_named_and_pods_choose_little() {
        let of = |context: &[(&str, &str)]| kind(&request(context), false);
        assert!(
            matches!(of(&[("path", "/a"), ("options", "ro,threads=2")]).unwrap(), Kind::Files { path, options, .. } if path == "/a" && options.len() == 2)
        );
        assert!(of(&[("folder", "/a")]).unwrap_err().message().contains("path, master, options, sockets"));
        let inline = ("csi.storage.k8s.io/ephemeral", "true");
        assert_eq!(of(&[inline, ("sockets", "true")]).unwrap(), Kind::Sockets);
        assert!(of(&[inline, ("path", "/a")]).unwrap_err().message().contains("inlineFiles"));
        assert!(kind(&request(&[inline, ("path", "/a")]), true).is_ok());
        assert!(kind(&request(&[inline, ("master", "elsewhere:1")]), true).is_err());
    }
}
