//! Starting and stopping a worker: its id, its tier, its sockets, its heartbeat.

use crate::core::{Core, Mounts};
use crate::hadoop::{OpenBlocks, Slots};
use crate::master::Master;
use crate::report::{Heartbeat, Registration, Reporter};
use crate::scrub;
use crate::session::{self, Socket};
use crate::store::BlockStore;
use crate::ufs_read::Fetcher;
use crate::{hadoop, task, web};
use forebay_common::config::Config;
use forebay_common::error::at;
use forebay_common::token::KeyRing;
use forebay_common::{LocalBoxed, Result, WorkerId, counter, err};
use forebay_proto::WorkerAddress;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

counter!(REFUSED, "forebay_worker_sessions_refused_total", "connections refused because worker.sessions_max were open");

/// A running worker.
pub struct WorkerHandle {
    /// Its id.
    pub id: WorkerId,
    /// Block bytes over TCP.
    pub data_addr: SocketAddr,
    /// `/metrics`, `/healthz`.
    pub web_addr: SocketAddr,
    /// Block bytes for Hadoop's clients, where these are served.
    pub hadoop_addr: Option<SocketAddr>,
    hadoop_socket: Option<PathBuf>,
    /// The Unix socket.
    pub socket_path: PathBuf,
    /// The first folder of the first tier.
    pub mem_dir: PathBuf,
    registered: watch::Receiver<Registration>,
    tasks: Vec<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Waits until the master has answered once. Errors: `WrongCluster` when it does not let this worker in.
    pub async fn registered(&mut self) -> Result<()> {
        let answered = self.registered.wait_for(|r| !matches!(r, Registration::Unanswered)).await;
        match &*answered.map_err(|_| err!(Unavailable, "the worker stopped"))? {
            Registration::Refused(e) => Err(e.clone()),
            _ => Ok(()),
        }
    }

    /// Waits until everything stopped after the shutdown token was cancelled.
    pub async fn stopped(self) {
        for task in self.tasks {
            let _ = task.await;
        }
        for socket in self.hadoop_socket.iter().chain([&self.socket_path]) {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Prepares the tier, takes over its blocks, binds the sockets and reports to the master until `shutdown`. `more`: what its web port serves as well.
pub fn start(config: &Config, more: axum::Router, shutdown: CancellationToken) -> LocalBoxed<'_, Result<WorkerHandle>> {
    Box::pin(start_here(config, more, shutdown))
}

async fn start_here(config: &Config, more: axum::Router, shutdown: CancellationToken) -> Result<WorkerHandle> {
    let worker = config.worker.clone();
    raise_descriptor_limit();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&worker.data_dir)
        .map_err(at(format!("worker.data_dir {}", worker.data_dir.display())))?;
    let id = read_or_draw_id(&worker.data_dir)?;
    let tcp = bind(&worker.bind, worker.data_port, "worker.data_port").await?;
    let web = bind(&worker.bind, worker.web_port, "worker.web_port").await?;
    let front = hadoop::Front::bind(&worker).await?;
    let (data_addr, web_addr) = (tcp.local_addr().map_err(at("socket"))?, web.local_addr().map_err(at("socket"))?);
    let mem_dir = worker.tiers()[0].dirs[0].path.clone();
    let reporter = Reporter::default();
    let options = worker.clone();
    let store = tokio::task::spawn_blocking(move || BlockStore::open(&options)).await.map_err(|e| err!(Internal, "worker start: {e}"))??;
    store.warnings().into_iter().for_each(|w| reporter.warn(w));
    let socket_path = worker.socket_dir.join(format!("worker-{:016x}.sock", id.get()));
    let unix = bind_unix(&socket_path)?;
    let address = WorkerAddress {
        worker_id: id.get(),
        host: worker.host().to_owned(),
        data_port: u32::from(data_addr.port()),
        web_port: u32::from(web_addr.port()),
        socket_path: socket_path.to_string_lossy().into_owned(),
        host_id: host_id(),
        hadoop_port: front.as_ref().map_or(0, |f| u32::from(f.addr.port())),
        hadoop_ipc_port: front.as_ref().map_or(0, |f| u32::from(f.ipc_port)),
        ip: front.as_ref().map(|f| f.ip.clone()).unwrap_or_default(),
        hadoop_host: worker.hadoop_host.clone(),
        node: worker.node_name.clone(),
    };
    let core = Arc::new(Core {
        id,
        host_id: address.host_id.clone(),
        fetcher: Fetcher::new(worker.fetch_concurrency),
        config: worker,
        open_blocks: OpenBlocks::new(store.clone()),
        slots: Slots::default(),
        store,
        master: Master::new(&config.client.master, config.security.cluster_secret()?)?,
        keys: KeyRing::default(),
        mounts: Mounts::default(),
        reporter,
        leaving: watch::channel(false).0,
    });
    let incarnation = rand::random();
    let heartbeat = Heartbeat { core: core.clone(), address, incarnation };
    let (registered_sender, registered) = watch::channel(Registration::Unanswered);
    let (hadoop_addr, hadoop_socket) = (front.as_ref().map(|f| f.addr), front.as_ref().map(|f| f.socket.clone()));
    let mut tasks = vec![
        tokio::spawn(accept_tcp(core.clone(), tcp, shutdown.clone())),
        tokio::spawn(accept_unix(core.clone(), unix, shutdown.clone())),
        tokio::spawn(heartbeat.run(registered_sender, shutdown.clone())),
        tokio::spawn(task::run(core.clone(), incarnation, shutdown.clone())),
        tokio::spawn(scrub::run(core.clone(), shutdown.clone())),
        tokio::spawn(web::serve(web, more, registered.clone(), shutdown.clone())),
    ];
    tasks.extend(front.into_iter().flat_map(|front| front.serve(&core, &shutdown)));
    tracing::info!(worker = %id, %data_addr, socket = %socket_path.display(), "worker is up");
    Ok(WorkerHandle { id, data_addr, web_addr, hadoop_addr, hadoop_socket, socket_path, mem_dir, registered, tasks })
}

/// Each block keeps two descriptors: as many as the system lets us have.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        tracing::warn!(error = %e, "the limit of open files stays as it is");
    }
}

pub async fn bind(host: &str, port: u16, key: &str) -> Result<TcpListener> {
    TcpListener::bind((host, port)).await.map_err(|e| forebay_common::Error::io(format!("binding {host}:{port} ({key}; 0 takes any free port)"), &e))
}

/// The socket is reachable by every local user: what counts is the block token.
pub fn bind_unix(path: &Path) -> Result<UnixListener> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(at(format!("worker.socket_dir {}", dir.display())))?;
    // The worker's data folder is locked, or it has the port of this name: the socket is a dead one's.
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(forebay_common::Error::io(path.display(), &e)),
    }
    let listener = UnixListener::bind(path).map_err(at(format!("binding {}", path.display())))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(at(path.display()))?;
    Ok(listener)
}

/// The worker's id: drawn once, kept in its data folder.
fn read_or_draw_id(dir: &Path) -> Result<WorkerId> {
    let path = dir.join("worker-id");
    match std::fs::read_to_string(&path) {
        Ok(text) => u64::from_str_radix(text.trim(), 16)
            .map(WorkerId)
            .map_err(|_| err!(Corrupt, "{} does not hold a worker id: remove it to draw a new one", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let id = WorkerId(rand::random::<u64>() >> 1 | 1);
            let temporary = dir.join("worker-id.tmp");
            std::fs::write(&temporary, format!("{:016x}\n", id.get())).map_err(at(temporary.display()))?;
            std::fs::File::open(&temporary).and_then(|f| f.sync_all()).map_err(at(temporary.display()))?;
            std::fs::rename(&temporary, &path).map_err(at(path.display()))?;
            Ok(id)
        }
        Err(e) => Err(forebay_common::Error::io(path.display(), &e)),
    }
}

/// The machine as its processes see it: kernel boot and mount namespace. For people; locality is decided by the socket.
fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/mnt").map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{}/{}", boot.trim(), namespace.trim_matches(|c: char| !c.is_ascii_digit()))
}

async fn accept_tcp(core: Arc<Core>, listener: TcpListener, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.sessions_max));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Err(e) = stream.set_nodelay(true) {
                    tracing::debug!(error = %e, "TCP_NODELAY");
                }
                admit(&core, &permits, Socket::Tcp(stream), &shutdown);
            }
            Err(e) => refused_by_kernel(&e).await,
        }
    }
}

async fn accept_unix(core: Arc<Core>, listener: UnixListener, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.sessions_max));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => admit(&core, &permits, Socket::Unix(stream), &shutdown),
            Err(e) => refused_by_kernel(&e).await,
        }
    }
}

/// Out of descriptors, mostly: wait for some to come free instead of spinning.
async fn refused_by_kernel(e: &std::io::Error) {
    tracing::warn!(error = %e, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn admit(core: &Arc<Core>, permits: &Arc<Semaphore>, socket: Socket, shutdown: &CancellationToken) {
    let Ok(permit) = permits.clone().try_acquire_owned() else {
        REFUSED.inc();
        tracing::warn!("a connection is refused: worker.sessions_max are open");
        return;
    };
    let (core, shutdown) = (core.clone(), shutdown.clone());
    tokio::spawn(async move {
        session::serve(core, socket, shutdown).await;
        drop(permit);
    });
}
