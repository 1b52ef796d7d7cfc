//! The one call of a DataNode's own RPC that clients of a plain cluster make: how much of a block that is being written can be read.

use crate::core::Core;
use bytes::Bytes;
use forebay_common::{BlockId, Result};
use forebay_hdfs::hadoop::common::IpcConnectionContextProto;
use forebay_hdfs::ipc::{self, Call, Severity};
use forebay_hdfs::replica::{CLIENT_DATANODE_PROTOCOL, GetReplicaVisibleLengthRequest, GetReplicaVisibleLengthResponse};
use forebay_hdfs::server::{Limits, Service};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

const LIMITS: Limits = Limits { frame_max_bytes: 64 << 10, calls_max: 16 };

struct Replicas(Arc<Core>);

impl Service for Replicas {
    fn limits(&self) -> Limits {
        LIMITS
    }

    /// A length tells nothing of what is in a block; whoever reads it needs a token.
    fn admit(&self, _: &IpcConnectionContextProto) -> Result<String> {
        Ok(String::new())
    }

    async fn answer(&self, _: &str, _: IpAddr, call: &Call) -> Bytes {
        let thrown = |class: &str, message: &str| ipc::failure(&call.id, Severity::Application, class, message);
        if call.protocol != CLIENT_DATANODE_PROTOCOL || call.method != "getReplicaVisibleLength" {
            let message = format!("{} of {} is not offered by this worker", call.method, call.protocol);
            return ipc::failure(&call.id, Severity::NoSuchMethod, "org.apache.hadoop.ipc.RpcNoSuchMethodException", &message);
        }
        let block = match call.decode::<GetReplicaVisibleLengthRequest>() {
            Ok(request) => BlockId(request.block.unwrap_or_default().block_id),
            Err(e) => return thrown("java.io.IOException", e.message()),
        };
        let open = match tokio::task::block_in_place(|| self.0.open_blocks.get(block)) {
            Ok(open) => open.map(|b| b.acknowledged()),
            Err(e) => return thrown("java.io.IOException", e.message()),
        };
        match open.or_else(|| self.0.store.peek_read(block).map(|b| b.header.length_bytes)) {
            Some(length) => ipc::success(&call.id, &GetReplicaVisibleLengthResponse { length }),
            None => thrown("org.apache.hadoop.hdfs.server.datanode.ReplicaNotFoundException", &format!("block {block} is not on this worker")),
        }
    }
}

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, core: Arc<Core>, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.hadoop_connections_max));
    let service = Arc::new(Replicas(core));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
        let (service, shutdown) = (service.clone(), shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                ended = forebay_hdfs::server::serve(service, stream, peer.ip()) => if let Err(e) = ended {
                    tracing::debug!(%peer, error = %e, "a connection of a Hadoop client ends");
                }
            }
            drop(permit);
        });
    }
}
