//! The services: decode, say who is asking, one call inwards, encode. No logic of the namespace lives here.

mod admin;
mod encode;
mod file_system;
mod locks;
mod mounts;
mod names;
mod placement;
mod web;
mod worker;

pub use file_system::Service as FileSystemService;

use crate::cluster;
use crate::core::{Core, Soft};
use crate::driver::{self, PendingDriver};
use crate::hadoop;
use crate::identity::Identity;
use crate::job::Jobs;
use crate::journal::Journal;
use crate::kubernetes;
use crate::metrics::ClusterMetrics;
use crate::mount::{Syncer, raw, resolve, watch};
use crate::persist::{self, Persist};
use crate::store::{Reader, Store};
use crate::worker::TokenKeys;
use forebay_common::config::{Config, MountConfig};
use forebay_common::error::at;
use forebay_common::{AbsPath, LocalBoxed, Result, clock, err};
use forebay_proto::admin_server::AdminServer;
use forebay_proto::file_system_server::FileSystemServer;
use forebay_proto::journal::{AddMount, command::Op};
use forebay_proto::store::Mount;
use forebay_proto::worker_master_server::WorkerMasterServer;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What the web port serves besides, once it is known where clients call.
pub type Routes<'a> = Box<dyn FnOnce(SocketAddr) -> axum::Router + Send + 'a>;

/// A running master.
pub struct MasterHandle {
    /// Where clients and workers call it.
    pub rpc_addr: SocketAddr,
    /// `/metrics`, `/healthz`.
    pub web_addr: SocketAddr,
    /// Where Hadoop's clients call it, if they are served.
    pub hadoop_addr: Option<SocketAddr>,
    core: Arc<Core>,
    tasks: Vec<JoinHandle<()>>,
    _lock: fd_lock::RwLockWriteGuard<'static, std::fs::File>,
}

impl MasterHandle {
    /// Waits until everything stopped after the shutdown token was cancelled.
    pub async fn stopped(self) {
        for task in self.tasks {
            let _ = task.await;
        }
        self.core.journal.shutdown().await;
        if let Err(e) = self.core.store.flush() {
            tracing::warn!(error = %e, "metadata was not flushed; the journal has it");
        }
    }
}

/// Binds the ports, opens the store, replays the journal, mounts what the configuration names, and serves until `shutdown`. `more`: what its web port
/// serves as well, given where clients call it.
///
/// Errors: a port or folder in use, a damaged store, an under store that the configuration names and that cannot be opened.
pub fn start<'a>(config: &'a Config, more: Routes<'a>, shutdown: CancellationToken) -> LocalBoxed<'a, Result<MasterHandle>> {
    Box::pin(start_here(config, more, shutdown))
}

async fn start_here(config: &Config, more: Routes<'_>, shutdown: CancellationToken) -> Result<MasterHandle> {
    let master = config.master.clone();
    let dir = master.data_dir.clone();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(at(format!("master.data_dir {}", dir.display())))?;
    let lock = lock_dir(&dir)?;
    let rpc = bind(&master.bind, master.rpc_port, "master.rpc_port").await?;
    let web = bind(&master.bind, master.web_port, "master.web_port").await?;
    let hint = "where a NameNode has it, give another one, or set master.hadoop = false";
    let hadoop = match master.hadoop {
        true => Some(bind(&master.bind, master.hadoop_port, "master.hadoop_port").await.map_err(|e| e.context(hint))?),
        false => None,
    };
    let (rpc_addr, web_addr) = (rpc.local_addr().map_err(at("socket"))?, web.local_addr().map_err(at("socket"))?);
    let hadoop_addr = hadoop.as_ref().map(TcpListener::local_addr).transpose().map_err(at("socket"))?;
    let pages = web::Web::default();
    let mut tasks = vec![tokio::spawn(pages.clone().serve(web, shutdown.clone()))];
    let store = Store::open(&dir.join("meta"), usize::try_from(master.store_cache.as_u64()).unwrap_or(256 << 20))?;
    let soft = Arc::new(Soft::default());
    soft.workers.set_leaving(&store.view().leaving_workers()?);
    let journal = Journal::start(&dir, &master, store.clone(), soft.clone(), &pages.replay).await?;
    let identity = Identity::new(config.security.superuser_group.clone());
    let core = Arc::new(Core {
        keys: TokenKeys::open(&dir, &master)?,
        cluster: cluster::open(&journal, &store, identity.started_by(), &master.cluster_id).await?,
        identity,
        cluster_secret: config.security.cluster_secret()?,
        security: config.security.clone(),
        kubernetes_config: config.kubernetes.clone(),
        kubernetes: Arc::default(),
        config: master,
        store,
        journal,
        soft,
        syncer: Syncer::default(),
        metrics: ClusterMetrics::default(),
        pending: PendingDriver::default(),
        persist: Persist::default(),
        jobs: Jobs::default(),
        started_ms: clock::now_ms(),
        hadoop_port: hadoop_addr.map_or(0, |a| a.port()),
    });
    if config.security.allow_insecure_bind {
        tracing::warn!("security.allow_insecure_bind is on: every client is believed to be the user it says it is");
    }
    mount_root(&core, config).await?;
    mount_configured(&core, config).await?;
    tasks.extend([
        tokio::spawn(crate::worker::run_racks(core.clone(), shutdown.clone())),
        tokio::spawn(kubernetes::run(core.kubernetes_config.clone(), core.kubernetes.clone(), shutdown.clone())),
        tokio::spawn(driver::run(core.clone(), shutdown.clone())),
        tokio::spawn(driver::run_lives(core.clone(), shutdown.clone())),
    ]);
    tasks.push(tokio::spawn(persist::run(core.clone(), shutdown.clone())));
    tasks.push(tokio::spawn(watch::run(core.clone(), shutdown.clone())));
    core.jobs.resume(&core)?;
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(FileSystemServer::new(file_system::Service(core.clone())))
        .add_service(WorkerMasterServer::new(worker::Service(core.clone())))
        .add_service(AdminServer::new(admin::Service(core.clone())));
    let stop = shutdown.clone();
    tasks.push(tokio::spawn(async move {
        let incoming = tonic::transport::server::TcpIncoming::from(rpc).with_nodelay(Some(true));
        if let Err(e) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            tracing::error!(error = %e, "master RPC server ended");
        }
    }));
    tasks.extend(hadoop.map(|listener| tokio::spawn(hadoop::serve(listener, core.clone(), shutdown.clone()))));
    pages.open(more(rpc_addr), core.clone());
    tracing::info!(%rpc_addr, %web_addr, ?hadoop_addr, "master is up");
    Ok(MasterHandle { rpc_addr, web_addr, hadoop_addr, core, tasks, _lock: lock })
}

async fn bind(host: &str, port: u16, key: &str) -> Result<TcpListener> {
    TcpListener::bind((host, port)).await.map_err(|e| forebay_common::Error::io(format!("binding {host}:{port} ({key}; 0 takes any free port)"), &e))
}

/// One master per data folder; the lock lives as long as the process.
fn lock_dir(dir: &std::path::Path) -> Result<fd_lock::RwLockWriteGuard<'static, std::fs::File>> {
    let path = dir.join("lock");
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(at(path.display()))?;
    let lock: &'static mut fd_lock::RwLock<std::fs::File> = Box::leak(Box::new(fd_lock::RwLock::new(file)));
    lock.try_write().map_err(|_| err!(Busy, "{} belongs to a running master: stop it first", dir.display()))
}

/// `/` is a mount like the others; where the configuration does not say what is there, a folder under the data directory.
async fn mount_root(core: &Core, config: &Config) -> Result<()> {
    if core.store.view().root().is_ok_and(|root| root.mount_id > 0) {
        return Ok(());
    }
    if let Some(root) = config.mount.iter().find(|m| m.path == "/") {
        return mounts::mount(core, None, &AbsPath::root(), &root.uri, root.read_only, resolve(&root.options)?).await;
    }
    let folder = core.config.data_dir.join("root");
    std::fs::create_dir_all(&folder).map_err(at(folder.display()))?;
    let op = AddMount { path: raw(&AbsPath::root()), uri: format!("file://{}", folder.display()), ..AddMount::default() };
    core.own_change(Op::AddMount(op)).await.map(drop)
}

async fn mount_configured(core: &Core, config: &Config) -> Result<()> {
    for mount in &config.mount {
        let path = AbsPath::parse(&mount.path)?;
        let uri = forebay_ufs::UfsUri::parse(&mount.uri)?;
        let known = core.store.view().mounts()?.into_iter().find(|m| m.path == path.as_bytes());
        match known {
            Some(known) if known.uri == uri.to_string() => {
                // A store that is away must not keep the master, and all other mounts, from starting.
                if let Err(e) = take_options(core, &known, &path, &uri, mount).await {
                    tracing::error!(%path, error = %e, "the mount keeps the options it had: those of the configuration do not work now");
                }
                continue;
            }
            Some(known) => {
                return Err(err!(AlreadyExists, "the configuration mounts {uri} on {path}, where {} is mounted: unmount it first", known.uri));
            }
            None => {}
        }
        mounts::mount(core, None, &path, &mount.uri, mount.read_only, resolve(&mount.options)?).await?;
    }
    Ok(())
}

/// Gives a mount the options of the configuration, where they have changed.
async fn take_options(core: &Core, known: &Mount, path: &AbsPath, uri: &forebay_ufs::UfsUri, mount: &MountConfig) -> Result<()> {
    let options = resolve(&mount.options)?;
    if known.options == options && known.read_only == mount.read_only {
        return Ok(());
    }
    tracing::info!(%path, "the mount takes its options from the configuration again");
    mounts::update(core, path, uri, mount.read_only, options).await
}
