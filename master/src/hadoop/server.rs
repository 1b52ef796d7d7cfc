//! Taking connections of Hadoop's clients.

use super::Hadoop;
use crate::core::Core;
use crate::service::FileSystemService;
use forebay_common::{counter, gauge};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

counter!(REFUSED, "forebay_master_hadoop_connections_refused_total", "connections refused because master.hadoop_connections_max were open");

gauge!(CONNECTIONS, "forebay_master_hadoop_connections", "connections of Hadoop clients");

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, core: Arc<Core>, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.hadoop_connections_max));
    let hadoop = Arc::new(Hadoop { fs: FileSystemService(core.clone()), core, safe_mode: AtomicBool::new(false) });
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of descriptors, mostly: wait for some to come free instead of spinning.
                tracing::warn!(error = %e, "a connection of a Hadoop client could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            REFUSED.inc();
            tracing::warn!(%peer, "a connection of a Hadoop client is refused: master.hadoop_connections_max are open");
            continue;
        };
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!(error = %e, "TCP_NODELAY");
        }
        let (hadoop, shutdown) = (hadoop.clone(), shutdown.clone());
        tokio::spawn(async move {
            CONNECTIONS.inc();
            tokio::select! {
                () = shutdown.cancelled() => {}
                ended = forebay_hdfs::server::serve(hadoop, stream, peer.ip()) => if let Err(e) = ended {
                    tracing::debug!(%peer, error = %e, "a connection of a Hadoop client ends");
                }
            }
            CONNECTIONS.dec();
            drop(permit);
        });
    }
}
