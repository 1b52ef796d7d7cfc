//! The CSI driver `csi.forebay.io`: a volume of a pod is a folder of the namespace, or the folder with the workers' sockets.
//!
//! `run` serves CSI and kubelet's plugin registration on sockets of the node, so that no sidecar is needed. `node` answers kubelet, `volumes` keeps what is published:
//! each volume of files is a `forebay mount` process of its own, begun anew when it ends by itself. `provision` is the controller part.
//!
//! Invariants: what kubelet was told is published is written down first, and is there again after the driver was started again; a volume's process is ended, and its mount
//! taken away, before kubelet is told that it is unpublished.

mod node;
pub mod provision;
mod volumes;

use forebay_common::error::at;
use forebay_common::{LocalBoxed, Result, err};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use volumes::Volumes;

#[allow(clippy::all, missing_docs, reason = "generated code")]
mod csi {
    tonic::include_proto!("csi.v1");
}
#[allow(clippy::all, missing_docs, reason = "generated code")]
mod registration {
    tonic::include_proto!("pluginregistration");
}

/// The driver's name.
pub const DRIVER: &str = "csi.forebay.io";

/// How the driver is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of the node, as Kubernetes calls it.
    pub node: String,
    /// Kubelet's folder on the node.
    pub kubelet_dir: PathBuf,
    /// The folder with the workers' sockets.
    pub socket_dir: PathBuf,
    /// Where the process answers `/healthz` and `/metrics`.
    pub web: std::net::SocketAddr,
    /// Inline volumes may be of files: whoever may make a pod may then read and write by the driver.
    pub inline_files: bool,
    /// The command that mounts: this binary, and what comes before its own words.
    pub mount: Vec<std::ffi::OsString>,
}

fn listen(path: &Path) -> Result<UnixListener> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).map_err(at(dir.display()))?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(forebay_common::Error::io(path.display(), &e)),
        _ => {}
    }
    UnixListener::bind(path).map_err(at(format!("binding {}", path.display())))
}

/// `/healthz` and `/metrics` of a process of a node.
pub fn pages() -> axum::Router {
    axum::Router::new()
        .route("/healthz", axum::routing::get(|| async { "ok\n" }))
        .route("/metrics", axum::routing::get(|| async { ([("content-type", "text/plain; version=0.0.4")], forebay_common::metrics::render()) }))
}

/// Mounts again what was published, and serves until `shutdown`. Errors: a socket or port that cannot be bound.
pub fn run(options: Options, shutdown: CancellationToken) -> LocalBoxed<'static, Result<()>> {
    Box::pin(run_here(options, shutdown))
}

async fn run_here(options: Options, shutdown: CancellationToken) -> Result<()> {
    if options.node.is_empty() {
        return Err(err!(InvalidArgument, "--node: which node is this? (spec.nodeName)"));
    }
    let plugin = options.kubelet_dir.join("plugins").join(DRIVER);
    let endpoint = plugin.join("csi.sock");
    let csi = listen(&endpoint)?;
    let web = tokio::net::TcpListener::bind(options.web).await.map_err(at(format!("binding {} (--web)", options.web)))?;
    let volumes = Arc::new(Volumes::open(plugin.join("volumes"), &options)?);
    volumes.resume().await;
    let stop = |token: &CancellationToken| token.clone().cancelled_owned();
    let driver = Server::builder()
        .add_service(csi::identity_server::IdentityServer::new(node::Identity))
        .add_service(csi::node_server::NodeServer::new(node::Node {
            volumes: volumes.clone(),
            node: options.node.clone(),
            inline_files: options.inline_files,
        }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(csi), stop(&shutdown));
    // Only now: kubelet calls as soon as it finds this socket. It sends the socket's path, escaped, as the request's `:authority`, and `http::uri` takes escapes in
    // what is before an `@` only: so the name has one.
    let registry = options.kubelet_dir.join("plugins_registry").join(format!("{DRIVER}@reg.sock"));
    let registration = listen(&registry)?;
    let own = std::fs::metadata(&registry).map(|metadata| metadata.ino()).ok();
    let registrar = Server::builder()
        .add_service(registration::registration_server::RegistrationServer::new(node::Registrar { endpoint }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(registration), stop(&shutdown));
    let pages = axum::serve(web, pages()).with_graceful_shutdown(stop(&shutdown));
    tracing::info!(node = options.node, kubelet_dir = %options.kubelet_dir.display(), "the CSI driver is up");
    let (driver, registrar, pages) = tokio::join!(driver, registrar, pages.into_future());
    // The next pod's driver may be there already.
    if std::fs::metadata(&registry).map(|metadata| metadata.ino()).ok() == own {
        let _ = std::fs::remove_file(&registry);
    }
    volumes.stop().await;
    let failed = |e: tonic::transport::Error| err!(Internal, "the CSI driver ended: {e}");
    driver.map_err(failed)?;
    registrar.map_err(failed)?;
    pages.map_err(at("web server"))
}
