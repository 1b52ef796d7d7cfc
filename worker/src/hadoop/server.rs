//! Connections of Hadoop's clients, and the requests on each, one after the other.

use super::{checksum, read, refusal, send, short_circuit, slots, transfer as transfers, write};
use crate::core::Core;
use forebay_common::{Result, counter, err, gauge};
use forebay_hdfs::transfer::{self, Op};
use prost::Message;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, BufWriter};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

counter!(REQUESTS, "forebay_worker_hadoop_requests_total", "requests of Hadoop clients");
counter!(FAILED, "forebay_worker_hadoop_requests_failed_total", "requests of Hadoop clients that were refused, or failed");
counter!(REFUSED, "forebay_worker_hadoop_connections_refused_total", "connections refused because worker.hadoop_connections_max were open");
gauge!(CONNECTIONS, "forebay_worker_hadoop_connections", "connections of Hadoop clients");

/// How long a connection without a request is kept: clients keep theirs for 3 s.
const KEPT: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 128 << 10;

type Read = Box<dyn AsyncRead + Send + Unpin>;
type Write = Box<dyn AsyncWrite + Send + Unpin>;

/// Both halves of a connection.
pub struct Peer {
    pub reader: BufReader<Read>,
    pub writer: BufWriter<Write>,
    /// Over which descriptors can be passed.
    pub socket: Option<OwnedFd>,
}

impl Peer {
    fn new(reader: Read, writer: Write, socket: Option<OwnedFd>) -> Peer {
        Peer { reader: BufReader::with_capacity(BUFFER_BYTES, reader), writer: BufWriter::with_capacity(BUFFER_BYTES, writer), socket }
    }
}

/// Where clients come in.
pub enum Listener {
    /// Over the network.
    Tcp(TcpListener),
    /// From this machine: these can be passed descriptors.
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Peer> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                Ok(Peer::new(Box::new(reader), Box::new(writer), None))
            }
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let socket = stream.as_fd().try_clone_to_owned()?;
                let (reader, writer) = stream.into_split();
                Ok(Peer::new(Box::new(reader), Box::new(writer), Some(socket)))
            }
        }
    }
}

/// Serves until `shutdown`.
pub async fn serve(listener: Listener, core: Arc<Core>, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(core.config.hadoop_connections_max));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let peer = match accepted {
            Ok(peer) => peer,
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
            // What is being written is ended in order when the worker stops.
            if let Err(e) = requests(&core, peer, &shutdown).await {
                tracing::debug!(error = %e, "a connection of a Hadoop client ends");
            }
            CONNECTIONS.dec();
            drop(permit);
        });
    }
}

async fn requests(core: &Arc<Core>, mut peer: Peer, shutdown: &CancellationToken) -> Result<()> {
    loop {
        let next = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            next = tokio::time::timeout(KEPT, transfer::read_request(&mut peer.reader)) => match next {
                Ok(next) => next?,
                Err(_) => return Ok(()),
            },
        };
        let Some((op, message)) = next else { return Ok(()) };
        REQUESTS.inc();
        if let Err(e) = one(core, &mut peer, op, message, shutdown).await {
            FAILED.inc();
            return Err(e);
        }
    }
}

fn decode<M: Message + Default>(raw: bytes::Bytes) -> Result<M> {
    M::decode(raw).map_err(|e| err!(InvalidArgument, "request: {e}"))
}

/// Errors: the connection is of no use any more. A refusal is an answer, and no error.
async fn one(core: &Arc<Core>, peer: &mut Peer, op: Op, message: bytes::Bytes, shutdown: &CancellationToken) -> Result<()> {
    match op {
        Op::ReadBlock => {
            let op = decode(message)?;
            tokio::select! {
                () = shutdown.cancelled() => Err(err!(Unavailable, "this worker is stopping")),
                read = read::read_block(core, peer, op) => read,
            }
        }
        Op::WriteBlock => write::write_block(core, peer, decode(message)?, shutdown).await,
        Op::BlockChecksum => {
            let answer = match checksum::block_checksum(core, &decode(message)?).await {
                Ok(answer) => answer,
                Err(e) => refusal(&e),
            };
            send(&mut peer.writer, &answer).await
        }
        Op::RequestShortCircuitFds => short_circuit::request_fds(core, peer, decode(message)?).await,
        Op::RequestShortCircuitShm => slots::request_shm(core, peer, shutdown).await,
        Op::ReleaseShortCircuitFds => send(&mut peer.writer, &slots::release(core, &decode(message)?)).await,
        Op::TransferBlock => {
            let answer = match transfers::transfer_block(core, &decode(message)?).await {
                Ok(answer) => answer,
                Err(e) => refusal(&e),
            };
            send(&mut peer.writer, &answer).await
        }
    }
}
