//! One connection to a worker, on TCP or on its Unix socket: requests are multiplexed by id; descriptors come with answers.
//!
//! A request's answers have a queue of their own, large enough for all of them, so that the reading task never waits for
//! one caller while another's answers are behind.

use bytes::Bytes;
use forebay_common::{Error, Result, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::unix::{self, Descriptors};
use forebay_proto::{CloseGrant, DATA_PROTOCOL_VERSION, DataRequest, DataResponse, Hello, HelloOk, frame};
use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;

const READ_BUFFER_BYTES: usize = 64 << 10;

/// One answer.
pub struct Received {
    pub answer: Answer,
    pub body: Bytes,
    pub descriptors: Option<[OwnedFd; 2]>,
}

/// Who is told of evicted blocks.
pub type OnRevoke = Arc<dyn Fn(u64) + Send + Sync>;

/// A connection. Dropping the last handle closes it.
pub struct Connection {
    shared: Arc<Shared>,
    writer: tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    next_id: AtomicU64,
    closes: Mutex<Vec<u64>>,
    timeout: Duration,
    domain: bool,
    hello: HelloOk,
    reading: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<HashMap<u64, mpsc::Sender<Received>>>,
    closed: AtomicBool,
}

impl Shared {
    /// Nothing is sent any more, and whoever waits for an answer is told.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Received>>> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Answers to one request.
pub struct Answers {
    receiver: mpsc::Receiver<Received>,
    shared: Arc<Shared>,
    id: u64,
    timeout: Duration,
}

impl Answers {
    /// The next answer. Errors: what the worker said; `Unavailable` when the connection broke; `Timeout`.
    pub async fn next(&mut self) -> Result<Received> {
        match tokio::time::timeout(self.timeout, self.receiver.recv()).await {
            Ok(Some(Received { answer: Answer::Error(e), .. })) => Err(e.into()),
            Ok(Some(received)) => Ok(received),
            Ok(None) => Err(err!(Unavailable, "the connection to the worker broke")),
            Err(_) => Err(err!(Timeout, "the worker sent nothing for {} ms", self.timeout.as_millis())),
        }
    }

    /// An error that came before it was waited for.
    pub fn try_error(&mut self) -> Option<Error> {
        match self.receiver.try_recv() {
            Ok(Received { answer: Answer::Error(e), .. }) => Some(e.into()),
            Err(mpsc::error::TryRecvError::Disconnected) => Some(err!(Unavailable, "the connection to the worker broke")),
            _ => None,
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.shared.waiting().remove(&self.id);
    }
}

impl Connection {
    /// Over the network.
    pub async fn tcp(host: &str, port: u16, connect: Duration, timeout: Duration) -> Result<Connection> {
        let stream = tokio::time::timeout(connect, TcpStream::connect((host, port)))
            .await
            .map_err(|_| err!(Timeout, "{host}:{port} did not accept within {} ms", connect.as_millis()))?
            .map_err(|e| Error::io(format!("connecting to {host}:{port}"), &e))?;
        stream.set_nodelay(true).map_err(|e| Error::io("TCP_NODELAY", &e))?;
        let (reader, writer) = stream.into_split();
        Self::start(Box::new(reader), Box::new(writer), Arc::default(), timeout, false, Arc::new(|_| {})).await
    }

    /// Through a Unix socket; answers may carry descriptors.
    pub async fn unix(path: &Path, connect: Duration, timeout: Duration, on_revoke: OnRevoke) -> Result<Connection> {
        let stream = tokio::time::timeout(connect, UnixStream::connect(path))
            .await
            .map_err(|_| err!(Timeout, "{} did not accept within {} ms", path.display(), connect.as_millis()))?
            .map_err(|e| Error::io(format!("connecting to {}", path.display()), &e))?;
        let (reader, writer) = unix::split(stream, true).map_err(|e| Error::io(path.display(), &e))?;
        let descriptors = reader.descriptors();
        Self::start(Box::new(reader), Box::new(writer), descriptors, timeout, true, on_revoke).await
    }

    async fn start(
        reader: Box<dyn AsyncRead + Send + Unpin>,
        writer: Box<dyn AsyncWrite + Send + Unpin>,
        descriptors: Descriptors,
        timeout: Duration,
        domain: bool,
        on_revoke: OnRevoke,
    ) -> Result<Connection> {
        let shared: Arc<Shared> = Arc::default();
        let reading = tokio::spawn(read_answers(reader, shared.clone(), descriptors, on_revoke));
        let mut connection = Connection {
            shared,
            writer: tokio::sync::Mutex::new(writer),
            next_id: AtomicU64::new(1),
            closes: Mutex::default(),
            timeout,
            domain,
            hello: HelloOk::default(),
            reading,
        };
        let hello = Hello { version: DATA_PROTOCOL_VERSION, client: format!("pid {}", std::process::id()) };
        match connection.call(Op::Hello(hello)).await?.answer {
            Answer::HelloOk(hello) => connection.hello = hello,
            _ => return Err(err!(Unavailable, "the worker did not say hello")),
        }
        Ok(connection)
    }

    /// What the worker said of itself.
    pub fn hello(&self) -> &HelloOk {
        &self.hello
    }

    /// Whether this is a Unix socket.
    pub fn is_domain(&self) -> bool {
        self.domain
    }

    /// Whether it broke.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Sends a request; at most `answers` are kept for it.
    pub async fn request(&self, op: Op, body: &[u8], answers: usize) -> Result<Answers> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel(answers.max(1));
        self.shared.waiting().insert(id, sender);
        let answers = Answers { receiver, shared: self.shared.clone(), id, timeout: self.timeout };
        if self.is_closed() {
            return Err(err!(Unavailable, "the connection to the worker broke"));
        }
        self.send(id, op, body).await?;
        Ok(answers)
    }

    /// Sends without an answer being waited for.
    pub async fn send_only(&self, op: Op, body: &[u8]) -> Result<()> {
        if self.is_closed() {
            return Err(err!(Unavailable, "the connection to the worker broke"));
        }
        self.send(self.next_id.fetch_add(1, Ordering::Relaxed), op, body).await
    }

    async fn send(&self, id: u64, op: Op, body: &[u8]) -> Result<()> {
        let head = frame::encode_head(&DataRequest { id, op: Some(op) }, body.len());
        let mut parts = [IoSlice::new(&head), IoSlice::new(body)];
        let mut rest = &mut parts[..];
        let mut writer = self.writer.lock().await;
        // Whoever wrote before may have left half a frame.
        if self.is_closed() {
            return Err(err!(Unavailable, "the connection to the worker broke"));
        }
        let mut frame = Frame { shared: &self.shared, whole: true };
        while !rest.is_empty() {
            let written = tokio::time::timeout(self.timeout, writer.write_vectored(rest))
                .await
                .map_err(|_| err!(Timeout, "the worker takes no bytes"))?
                .map_err(|e| Error::io("sending to the worker", &e))?;
            if written == 0 {
                return Err(err!(Unavailable, "the connection to the worker broke"));
            }
            frame.whole = false;
            IoSlice::advance_slices(&mut rest, written);
        }
        frame.whole = true;
        Ok(())
    }

    /// One question, one answer.
    pub async fn call(&self, op: Op) -> Result<Received> {
        self.request(op, &[], 1).await?.next().await
    }

    /// The id of a request, for those that name it again.
    pub fn id_of(answers: &Answers) -> u64 {
        answers.id
    }

    /// Notes a grant that is no longer used; sent with `flush_closes`.
    pub fn close_later(&self, grant_id: u64) {
        self.closes.lock().unwrap_or_else(|e| e.into_inner()).push(grant_id);
    }

    /// Tells the worker of grants that are no longer used.
    pub async fn flush_closes(&self) {
        let closes = std::mem::take(&mut *self.closes.lock().unwrap_or_else(|e| e.into_inner()));
        for grant_id in closes {
            if self.send_only(Op::CloseGrant(CloseGrant { grant_id }), &[]).await.is_err() {
                return;
            }
        }
    }
}

/// A frame on its way. One that ends early (an error, a cancelled call) may be half sent: nothing can follow it, so the
/// connection is closed.
struct Frame<'a> {
    shared: &'a Shared,
    whole: bool,
}

impl Drop for Frame<'_> {
    fn drop(&mut self) {
        if !self.whole {
            self.shared.close();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

async fn read_answers(reader: Box<dyn AsyncRead + Send + Unpin>, shared: Arc<Shared>, descriptors: Descriptors, on_revoke: OnRevoke) {
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    loop {
        let (response, body) = match frame::read::<DataResponse, _>(&mut reader).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(e) => {
                tracing::debug!(error = %e, "a worker's connection ends");
                break;
            }
        };
        let Some(answer) = response.op else { continue };
        if let Answer::Revoke(revoke) = &answer {
            on_revoke(revoke.block_id);
            continue;
        }
        let descriptors = match answer {
            Answer::Granted(_) => {
                let mut queue = descriptors.lock().unwrap_or_else(|e| e.into_inner());
                queue.pop_front().zip(queue.pop_front()).map(|(data, head)| [data, head])
            }
            _ => None,
        };
        let sender = shared.waiting().get(&response.id).cloned();
        if let Some(sender) = sender
            && sender.try_send(Received { answer, body, descriptors }).is_err()
        {
            tracing::debug!(id = response.id, "an answer that nobody waits for");
        }
    }
    shared.close();
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_common::ErrorKind;
    use forebay_proto::{DataResponse, WriteData};
    use tokio::net::TcpListener;

    /// A call that is given up half-way through its frame closes the connection: nothing may follow half a frame.
    #[tokio::test]
    async fn half_a_frame_closes_the_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (hello, _) = frame::read::<DataRequest, _>(&mut stream).await.unwrap().unwrap();
            let answer = DataResponse { id: hello.id, op: Some(Answer::HelloOk(HelloOk { version: DATA_PROTOCOL_VERSION, ..HelloOk::default() })) };
            stream.write_all(&frame::encode_head(&answer, 0)).await.unwrap();
            // Takes nothing more.
            std::future::pending::<()>().await;
        });
        let second = Duration::from_secs(1);
        let connection = Connection::tcp("127.0.0.1", port, second, Duration::from_secs(60)).await.unwrap();
        let body = vec![0; 64 << 20];
        let sending = connection.send_only(Op::WriteData(WriteData::default()), &body);
        assert!(tokio::time::timeout(Duration::from_millis(100), sending).await.is_err(), "the server takes nothing");
        assert!(connection.is_closed());
        let refused = connection.call(Op::CloseGrant(CloseGrant { grant_id: 1 })).await.map(drop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
        server.abort();
    }
}
