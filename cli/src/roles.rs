//! `forebay local`, `master`, `worker`: start, serve until a signal, stop.

use crate::args::{CsiArgs, KeeperArgs, LocalArgs};
use crate::output::{bytes, line};
use forebay_common::config::{ClientConfig, Config, TierDir};
use forebay_common::error::at;
use forebay_common::{Result, err};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Limit of a graceful stop; what is left then is cut off.
const DRAIN: Duration = Duration::from_secs(10);
/// How long `local` waits for its worker to register.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);

/// Until somebody asks for a stop. Errors: a role stopped by itself.
async fn until_signal(shutdown: &CancellationToken) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).map_err(at("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(at("signals"))?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = shutdown.cancelled() => return Err(err!(Internal, "stopped because of the error logged above")),
    }
    Ok(())
}

/// What Hadoop's clients call, in front of what else is said.
fn hdfs(address: Option<std::net::SocketAddr>) -> String {
    address.map_or_else(String::new, |address| format!("hdfs://{address}, "))
}

/// The master's half of WebHDFS: a client of its own.
fn names(config: &Config) -> forebay_master::Routes<'static> {
    let (client, proxy_users) = (config.client.clone(), config.security.proxy_users.clone());
    Box::new(move |mut address: SocketAddr| {
        // Bound to all addresses, it is here as well.
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        forebay_webhdfs::routes(forebay_webhdfs::Role::Master, &ClientConfig { master: address.to_string(), ..client }, &proxy_users)
    })
}

/// The master alone.
pub async fn master(config: Config) -> Result<()> {
    let shutdown = CancellationToken::new();
    let master = forebay_master::start(&config, names(&config), shutdown.clone()).await?;
    line(&format!("master is up at {}, {}metrics at http://{}/metrics", master.rpc_addr, hdfs(master.hadoop_addr), master.web_addr))?;
    let asked = until_signal(&shutdown).await;
    shutdown.cancel();
    drain(master.stopped()).await;
    asked
}

/// A worker alone.
pub async fn worker(config: Config) -> Result<()> {
    let shutdown = CancellationToken::new();
    let worker = forebay_worker::start(
        &config,
        forebay_webhdfs::routes(forebay_webhdfs::Role::Worker, &config.client, &config.security.proxy_users),
        shutdown.clone(),
    )
    .await?;
    line(&format!(
        "worker {:016x} is up at {}, socket {}, metrics at http://{}/metrics; it reports to {}",
        worker.id.get(),
        worker.data_addr,
        worker.socket_path.display(),
        worker.web_addr,
        config.client.master
    ))?;
    let asked = until_signal(&shutdown).await;
    shutdown.cancel();
    drain(worker.stopped()).await;
    asked
}

/// The CSI driver of a node, or its controller. Its mounts have the same configuration.
pub async fn csi(config: &Config, args: CsiArgs, file: Option<&std::path::Path>) -> Result<()> {
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let _ = until_signal(&stop).await;
        stop.cancel();
    });
    if args.controller {
        return forebay_csi::provision::run(&config.client, args.web, shutdown).await;
    }
    let mut mount = vec![std::env::current_exe().map_err(at("the path of this program"))?.into_os_string()];
    if let Some(file) = file {
        mount.extend(["--config".into(), file.as_os_str().to_owned()]);
    }
    let options = forebay_csi::Options {
        node: args.node,
        kubelet_dir: args.kubelet_dir,
        socket_dir: config.client.socket_dir.clone(),
        web: args.web,
        inline_files: args.inline_files,
        mount,
    };
    forebay_csi::run(options, shutdown).await
}

/// Has mounts while their processes are replaced.
pub async fn keeper(args: KeeperArgs) -> Result<()> {
    let shutdown = CancellationToken::new();
    let listener = tokio::net::TcpListener::bind(args.web).await.map_err(at(format!("binding {} (--web)", args.web)))?;
    let pages = axum::serve(listener, forebay_csi::pages()).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let pages = tokio::spawn(pages.into_future());
    let stop = async {
        let _ = until_signal(&shutdown).await;
        shutdown.cancel();
    };
    let options = forebay_fuse::keeper::Options { dirs: args.dirs, wait: args.wait };
    forebay_fuse::keeper::run(options, stop).await?;
    pages.await.map_err(|e| err!(Internal, "web server: {e}"))?.map_err(at("web server"))
}

async fn drain(stopped: impl Future<Output = ()>) {
    if tokio::time::timeout(DRAIN, stopped).await.is_err() {
        tracing::warn!("stopping took longer than {} s; what is left is cut off", DRAIN.as_secs());
    }
}

/// Both in one process.
pub async fn local(mut config: Config, args: LocalArgs) -> Result<()> {
    let started = Instant::now();
    config.mount.extend(args.mounts()?);
    let shutdown = CancellationToken::new();
    let master = forebay_master::start(&config, names(&config), shutdown.clone()).await?;
    config.client.master = master.rpc_addr.to_string();
    let mut worker = forebay_worker::start(
        &config,
        forebay_webhdfs::routes(forebay_webhdfs::Role::Worker, &config.client, &config.security.proxy_users),
        shutdown.clone(),
    )
    .await?;
    tokio::time::timeout(REGISTER_TIMEOUT, worker.registered())
        .await
        .map_err(|_| err!(Timeout, "the worker did not register within {} s", REGISTER_TIMEOUT.as_secs()))??;
    let address = master.rpc_addr;
    let tier = |medium: &str, dir: &TierDir| format!("{medium} tier {} in {}", bytes(dir.quota.as_u64()), dir.path.display());
    let tiers: Vec<String> = config.worker.tiers().iter().flat_map(|t| t.dirs.iter().map(|d| tier(t.medium.name(), d)).collect::<Vec<_>>()).collect();
    let flag = if address.port() == 19998 { String::new() } else { format!("--master {address} ") };
    line(&format!(
        "Forebay is up after {} ms: master {address}, {}{}\n\
         data in {}; blocks stay in the tiers when this stops (umount {mem} {mem}.ro frees the memory)\n\
         Try:\n\
         \x20 forebay {flag}fs ls /\n\
         \x20 forebay {flag}fs mount /s3 s3://BUCKET/PREFIX --option endpoint=URL --option region=REGION --option access_key_id=KEY --option secret_access_key=SECRET\n\
         \x20 forebay {flag}fs put README.md /readme && forebay {flag}fs stat /readme\n\
         \x20 forebay {flag}fsadmin report        forebay {flag}fsadmin doctor\n\
         Stop with ctrl-c.",
        started.elapsed().as_millis(),
        hdfs(master.hadoop_addr),
        tiers.join(", "),
        config.master.data_dir.display(),
        mem = worker.mem_dir.display(),
    ))?;
    let asked = until_signal(&shutdown).await;
    shutdown.cancel();
    drain(async {
        worker.stopped().await;
        master.stopped().await;
    })
    .await;
    asked
}
