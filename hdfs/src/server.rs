//! The server's side of one connection of Hadoop RPC: the preamble, who it is for, then calls, answered in the order in which they are done.
//!
//! What calls mean is its `Service`'s affair: the master's and the workers' fronts. Invariants: a call never waits for another one; calls under way, their bytes, and
//! answers that wait are bounded; a peer that is silent, or does not take its answers, is let go.

use crate::hadoop::common::{IpcConnectionContextProto, RpcSaslProto, rpc_sasl_proto::SaslState};
use crate::ipc::{self, Auth, Call, Incoming, Opening, Preamble, Severity};
use bytes::Bytes;
use forebay_common::{Error, ErrorKind, Result, err};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};

/// Answers that may wait for a slow client; calls wait behind them.
const ANSWERS_QUEUE: usize = 64;
/// Bytes read from a connection at once.
const READ_BUFFER_BYTES: usize = 32 << 10;
/// How long a client may take to say who it is.
const OPENING_WAIT: Duration = Duration::from_secs(30);
/// How long a connection without a call is kept: Java pings every minute while it waits, and closes an idle one after ten seconds.
const IDLE_WAIT: Duration = Duration::from_secs(600);
/// How long answers wait for a client that does not take them.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// Bytes of calls under way on one connection; one larger call goes alone.
const CALLS_KIB_MAX: u32 = 16 << 10;

/// Bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one call.
    pub frame_max_bytes: usize,
    /// Calls under way.
    pub calls_max: usize,
}

/// What calls mean.
pub trait Service: Send + Sync + 'static {
    /// The bounds of a connection.
    fn limits(&self) -> Limits;

    /// Whom a connection acts for. Errors: it may not; the connection ends.
    fn admit(&self, context: &IpcConnectionContextProto) -> Result<String>;

    /// The whole answer of a call.
    fn answer(&self, user: &str, ip: IpAddr, call: &Call) -> impl Future<Output = Bytes> + Send;
}

/// Serves until the client ends. Errors: what it sent is no Hadoop RPC; it was told so where that is possible.
pub async fn serve<S: Service>(service: Arc<S>, stream: TcpStream, ip: IpAddr) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let mut raw = [0; Preamble::BYTES];
    let opened = tokio::time::timeout(OPENING_WAIT, reader.read_exact(&mut raw)).await;
    opened.map_err(|_| err!(Timeout, "a connection that says nothing"))?.map_err(|e| Error::io("reading the preamble", &e))?;
    let preamble = match Preamble::parse(&raw) {
        Ok(Opening::Preamble(preamble)) => preamble,
        Ok(Opening::Http) => {
            let _ = writer.write_all(ipc::HTTP_ANSWER).await;
            return Err(err!(InvalidArgument, "an HTTP request on the port of Hadoop RPC"));
        }
        Err(e) => {
            let told = ipc::failure(&ipc::no_call(), Severity::Fatal, "org.apache.hadoop.ipc.RPC$VersionMismatch", e.message());
            let _ = writer.write_all(&told).await;
            return Err(e);
        }
    };
    let (answers, queue) = mpsc::channel(ANSWERS_QUEUE);
    let writing = tokio::spawn(write_all(writer, queue));
    let served = read_calls(&service, &mut reader, preamble, ip, &answers).await;
    if let Err(e) = &served
        && e.kind() != ErrorKind::Unavailable
    {
        let _ = answers.send(ipc::failure(&ipc::no_call(), Severity::Fatal, crate::exception::class_of(e.kind()), e.message())).await;
    }
    // Calls under way still hold the queue: what they answer is written.
    drop(answers);
    let _ = writing.await;
    served
}

async fn write_all(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Bytes>) {
    let mut ready = Vec::with_capacity(ANSWERS_QUEUE);
    while queue.recv_many(&mut ready, ANSWERS_QUEUE).await > 0 {
        // One system call for all that are ready.
        let all = match ready.as_slice() {
            [one] => one.clone(),
            many => Bytes::from(many.concat()),
        };
        ready.clear();
        if !matches!(tokio::time::timeout(ANSWER_WAIT, writer.write_all(&all)).await, Ok(Ok(()))) {
            return;
        }
    }
}

async fn read_calls<S: Service>(
    service: &Arc<S>,
    reader: &mut BufReader<OwnedReadHalf>,
    preamble: Preamble,
    ip: IpAddr,
    answers: &mpsc::Sender<Bytes>,
) -> Result<()> {
    let limits = service.limits();
    let under_way = Arc::new(Semaphore::new(limits.calls_max));
    let bytes_under_way = Arc::new(Semaphore::new(CALLS_KIB_MAX as usize));
    let mut user: Option<Arc<str>> = None;
    loop {
        let frame = match tokio::time::timeout(IDLE_WAIT, ipc::read_frame(reader, limits.frame_max_bytes)).await {
            Ok(frame) => frame?,
            // One whose calls take that long is not idle.
            Err(_) if under_way.available_permits() < limits.calls_max => continue,
            Err(_) => return Ok(()),
        };
        let Some(frame) = frame else { return Ok(()) };
        let kib = u32::try_from(frame.len() >> 10).unwrap_or(u32::MAX).clamp(1, CALLS_KIB_MAX);
        match Incoming::parse(frame)? {
            Incoming::Context(context) => user = Some(service.admit(&context)?.into()),
            Incoming::Ping => {}
            Incoming::Close => return Ok(()),
            Incoming::Sasl(message) => {
                if preamble.auth != Auth::Sasl || message.state() != SaslState::Negotiate {
                    return Err(err!(Unsupported, "SASL: this server takes the user that a client states (authentication is simple)"));
                }
                // "There is nothing to negotiate": the client goes on as with simple authentication.
                let answer = RpcSaslProto { state: SaslState::Success as i32, ..RpcSaslProto::default() };
                if answers.send(ipc::sasl(&answer)).await.is_err() {
                    return Ok(());
                }
            }
            Incoming::Call(call) => {
                let Some(user) = user.clone() else {
                    return Err(err!(Unauthenticated, "a call came before the connection said whose it is"));
                };
                let (Ok(permit), Ok(bytes)) = (under_way.clone().acquire_owned().await, bytes_under_way.clone().acquire_many_owned(kib).await) else {
                    return Ok(());
                };
                let (service, answers) = (service.clone(), answers.clone());
                tokio::spawn(async move {
                    let answer = service.answer(&user, ip, &call).await;
                    let _ = answers.send(answer).await;
                    drop((permit, bytes));
                });
            }
        }
    }
}
