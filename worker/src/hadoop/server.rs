//! Connections of Hadoop's clients, and the requests on each, one after the other.

use super::{checksum, read, refusal, send, write};
use crate::core::Core;
use forebay_common::{Error, ErrorKind, Result, counter, err, gauge};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{self, Op};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{BufReader, BufWriter};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

counter!(REQUESTS, "forebay_worker_hadoop_requests_total", "requests of Hadoop clients");
counter!(FAILED, "forebay_worker_hadoop_requests_failed_total", "requests of Hadoop clients that were refused, or failed");
counter!(REFUSED, "forebay_worker_hadoop_connections_refused_total", "connections refused because worker.hadoop_connections_max were open");
gauge!(CONNECTIONS, "forebay_worker_hadoop_connections", "connections of Hadoop clients");

/// How long a connection without a request is kept: clients keep theirs for 3 s.
const KEPT: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 128 << 10;

/// Both halves of a connection.
pub struct Peer {
    pub reader: BufReader<OwnedReadHalf>,
    pub writer: BufWriter<OwnedWriteHalf>,
}

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, core: Arc<Core>, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.hadoop_connections_max));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(error = %e, "a connection of a Hadoop client could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            REFUSED.inc();
            tracing::warn!("a connection of a Hadoop client is refused: worker.hadoop_connections_max are open");
            continue;
        };
        let (core, shutdown) = (core.clone(), shutdown.clone());
        tokio::spawn(async move {
            CONNECTIONS.inc();
            tokio::select! {
                () = shutdown.cancelled() => {}
                ended = requests(&core, stream) => if let Err(e) = ended {
                    tracing::debug!(error = %e, "a connection of a Hadoop client ends");
                }
            }
            CONNECTIONS.dec();
            drop(permit);
        });
    }
}

async fn requests(core: &Arc<Core>, stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true).map_err(|e| Error::io("TCP_NODELAY", &e))?;
    let (reader, writer) = stream.into_split();
    let mut peer = Peer { reader: BufReader::with_capacity(BUFFER_BYTES, reader), writer: BufWriter::with_capacity(BUFFER_BYTES, writer) };
    loop {
        let next = match tokio::time::timeout(KEPT, transfer::read_request(&mut peer.reader)).await {
            Ok(next) => next?,
            Err(_) => return Ok(()),
        };
        let Some((op, message)) = next else { return Ok(()) };
        REQUESTS.inc();
        if let Err(e) = one(core, &mut peer, op, message).await {
            FAILED.inc();
            return Err(e);
        }
    }
}

fn decode<M: Message + Default>(raw: bytes::Bytes) -> Result<M> {
    M::decode(raw).map_err(|e| err!(InvalidArgument, "request: {e}"))
}

/// Errors: the connection is of no use any more. A refusal is an answer, and no error.
async fn one(core: &Arc<Core>, peer: &mut Peer, op: Op, message: bytes::Bytes) -> Result<()> {
    match op {
        Op::ReadBlock => read::read_block(core, peer, decode(message)?).await,
        Op::WriteBlock => write::write_block(core, peer, decode(message)?).await,
        Op::BlockChecksum => {
            let answer = match checksum::block_checksum(core, &decode(message)?).await {
                Ok(answer) => answer,
                Err(e) => refusal(&e),
            };
            send(&mut peer.writer, &answer).await
        }
        Op::TransferBlock | Op::RequestShortCircuitFds | Op::ReleaseShortCircuitFds | Op::RequestShortCircuitShm => {
            let e = err!(Unsupported, "{op:?} is not offered by this worker");
            send(&mut peer.writer, &wire::BlockOpResponseProto { ..refusal(&e) }).await?;
            Err(Error::new(ErrorKind::Unsupported, e.message()))
        }
    }
}
