//! One connection: the preamble, who it is for, then calls, answered in the order in which they are done.

use super::Hadoop;
use super::asker::{Asker, short_name};
use super::dispatch;
use super::exception::Thrown;
use bytes::Bytes;
use forebay_common::{Error, ErrorKind, Result, counter, err, gauge};
use forebay_hdfs::hadoop::common::{IpcConnectionContextProto, RpcSaslProto, rpc_sasl_proto::SaslState};
use forebay_hdfs::ipc::{self, Auth, Incoming, Opening, Preamble, Severity};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};

counter!(CALLS, "forebay_master_hadoop_calls_total", "calls of Hadoop clients");
counter!(FAILED, "forebay_master_hadoop_calls_failed_total", "calls of Hadoop clients that were answered with an exception");
counter!(WAITED, "forebay_master_hadoop_calls_limited_total", "calls that waited because master.hadoop_calls_max of their connection were under way");
gauge!(CONNECTIONS, "forebay_master_hadoop_connections", "connections of Hadoop clients");

/// Answers that may wait for a slow client; calls wait behind them.
const ANSWERS_QUEUE: usize = 64;
/// Bytes read from a connection at once.
const READ_BUFFER_BYTES: usize = 32 << 10;

/// Serves until the client ends. Errors: what it sent is no Hadoop RPC; it was told so where that is possible.
pub async fn serve(hadoop: Arc<Hadoop>, stream: TcpStream, ip: IpAddr) -> Result<()> {
    CONNECTIONS.inc();
    let served = serve_counted(&hadoop, stream, ip).await;
    CONNECTIONS.dec();
    served
}

async fn serve_counted(hadoop: &Arc<Hadoop>, stream: TcpStream, ip: IpAddr) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let mut raw = [0; Preamble::BYTES];
    reader.read_exact(&mut raw).await.map_err(|e| Error::io("reading the preamble", &e))?;
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
    let served = read_calls(hadoop, &mut reader, preamble, ip, &answers).await;
    if let Err(e) = &served
        && e.kind() != ErrorKind::Unavailable
    {
        let _ = answers.send(ipc::failure(&ipc::no_call(), Severity::Fatal, "java.io.IOException", e.message())).await;
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
        let written = match ready.as_slice() {
            [one] => writer.write_all(one).await,
            many => writer.write_all(&many.concat()).await,
        };
        if let Err(e) = written {
            tracing::debug!(error = %e, "a Hadoop client does not take its answers");
            return;
        }
        ready.clear();
    }
}

async fn read_calls(
    hadoop: &Arc<Hadoop>,
    reader: &mut BufReader<OwnedReadHalf>,
    preamble: Preamble,
    ip: IpAddr,
    answers: &mpsc::Sender<Bytes>,
) -> Result<()> {
    let config = &hadoop.core.config;
    let frame_max = usize::try_from(config.hadoop_frame_max.as_u64()).unwrap_or(usize::MAX);
    let under_way = Arc::new(Semaphore::new(config.hadoop_calls_max));
    let mut user: Option<String> = None;
    while let Some(frame) = ipc::read_frame(reader, frame_max).await? {
        match Incoming::parse(frame)? {
            Incoming::Context(context) => user = Some(effective_user(hadoop, &context)?),
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
                CALLS.inc();
                let Some(user) = user.clone() else {
                    return Err(err!(Unauthenticated, "a call came before the connection said whose it is"));
                };
                if under_way.available_permits() == 0 {
                    WAITED.inc();
                }
                let Ok(permit) = under_way.clone().acquire_owned().await else { return Ok(()) };
                let asker = Asker { user, ip, client_id: call.id.client_id.clone(), call_id: call.id.call_id };
                let (hadoop, answers) = (hadoop.clone(), answers.clone());
                tokio::spawn(async move {
                    let answer = match dispatch::answer(&hadoop, &asker, &call).await {
                        Ok(answer) => answer,
                        Err(thrown) => {
                            FAILED.inc();
                            tracing::debug!(method = call.method, class = thrown.class, message = thrown.message, "a call of a Hadoop client failed");
                            ipc::failure(&call.id, thrown.severity, thrown.class, &thrown.message)
                        }
                    };
                    let _ = answers.send(answer).await;
                    drop(permit);
                });
            }
        }
    }
    Ok(())
}

/// Whom a connection acts for. Errors: somebody acts for another who may not.
fn effective_user(hadoop: &Hadoop, context: &IpcConnectionContextProto) -> Result<String> {
    let info = context.user_info.clone().unwrap_or_default();
    let (effective, real) = (info.effective_user().to_owned(), info.real_user().to_owned());
    let (effective, real) = (short_name(&effective), short_name(&real));
    if effective.is_empty() {
        return Err(err!(Unauthenticated, "the connection does not say which user it is for"));
    }
    if !real.is_empty() && real != effective && !hadoop.core.security.proxy_users.iter().any(|user| user == real) {
        return Err(err!(PermissionDenied, "User: {real} is not allowed to impersonate {effective}: see security.proxy_users"));
    }
    Ok(effective.to_owned())
}

impl From<Thrown> for Error {
    fn from(thrown: Thrown) -> Error {
        Error::new(thrown.kind, thrown.message)
    }
}
