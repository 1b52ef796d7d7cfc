//! `Front`: the ports and the socket of the Hadoop front, bound together, served together.

use super::{Listener, replica, server, slots};
use crate::core::Core;
use crate::server::{bind, bind_unix};
use forebay_common::config::WorkerConfig;
use forebay_common::error::at;
use forebay_common::{Result, err};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Bound, and not served yet.
pub struct Front {
    tcp: TcpListener,
    ipc: TcpListener,
    unix: UnixListener,
    /// Block bytes over TCP.
    pub addr: SocketAddr,
    /// Where clients ask how much of a block can be read.
    pub ipc_port: u16,
    /// For those on this machine: `hadoop__PORT` in their `dfs.domain.socket.path` is this one.
    pub socket: PathBuf,
    /// The number that clients are told beside the name.
    pub ip: String,
}

impl Front {
    /// `None` where it is switched off, or where this machine does not know its own address.
    ///
    /// Errors: a port is in use, by a DataNode of this machine as a rule.
    pub async fn bind(config: &WorkerConfig) -> Result<Option<Front>> {
        if !config.hadoop {
            return Ok(None);
        }
        let ip = match ip_of(config.host()).await {
            Ok(ip) => ip,
            Err(e) => {
                tracing::warn!(error = %e, "Hadoop's clients are not served: they want a number beside the name");
                return Ok(None);
            }
        };
        let hint = "where a DataNode has it, give another one, or set worker.hadoop = false";
        let tcp = bind(&config.bind, config.hadoop_port, "worker.hadoop_port").await.map_err(|e| e.context(hint))?;
        let ipc = bind(&config.bind, config.hadoop_ipc_port, "worker.hadoop_ipc_port").await.map_err(|e| e.context(hint))?;
        let (addr, ipc_port) = (tcp.local_addr().map_err(at("socket"))?, ipc.local_addr().map_err(at("socket"))?.port());
        let socket = config.socket_dir.join(format!("hadoop_{}", addr.port()));
        let unix = bind_unix(&socket)?;
        Ok(Some(Front { tcp, ipc, unix, addr, ipc_port, socket, ip }))
    }

    /// Serves until `shutdown`.
    pub fn serve(self, core: &Arc<Core>, shutdown: &CancellationToken) -> [JoinHandle<()>; 4] {
        [
            tokio::spawn(server::serve(Listener::Tcp(self.tcp), core.clone(), shutdown.clone())),
            tokio::spawn(server::serve(Listener::Unix(self.unix), core.clone(), shutdown.clone())),
            tokio::spawn(slots::follow_evictions(core.clone(), shutdown.clone())),
            tokio::spawn(replica::serve(self.ipc, core.clone(), shutdown.clone())),
        ]
    }
}

/// The address that others reach this worker by.
async fn ip_of(host: &str) -> Result<String> {
    if let Ok(ip) = host.parse::<std::net::IpAddr>() {
        return Ok(ip.to_string());
    }
    let found = tokio::net::lookup_host((host, 0)).await.map_err(at(format!("worker.advertise_host {host}")))?;
    let all: Vec<SocketAddr> = found.collect();
    // Hadoop's clients are at home in IPv4.
    let best = all.iter().find(|a| a.is_ipv4()).or(all.first());
    best.map(|a| a.ip().to_string()).ok_or_else(|| err!(NotFound, "worker.advertise_host {host} has no address"))
}
