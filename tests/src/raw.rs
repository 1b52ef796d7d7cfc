//! The data plane and the master's services spoken directly: what a client other than ours, or a lying one, could send.

use bytes::Bytes;
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::file_system_client::FileSystemClient;
use forebay_proto::{Caller, DataRequest, DataResponse, WorkerAddress, frame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tonic::transport::Channel;

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection to a worker.
pub struct Raw {
    stream: Box<dyn Stream>,
    sent: u64,
}

impl Raw {
    /// To the data port (`"tcp"`) or the socket (`"unix"`).
    pub async fn connect(door: &str, address: &WorkerAddress) -> Raw {
        let stream: Box<dyn Stream> = match door {
            "tcp" => Box::new(tokio::net::TcpStream::connect((address.host.as_str(), address.data_port as u16)).await.expect("connect")),
            _ => Box::new(tokio::net::UnixStream::connect(&address.socket_path).await.expect("connect")),
        };
        Raw { stream, sent: 0 }
    }

    /// Sends a request and returns its id.
    pub async fn send(&mut self, op: Op, body: &[u8]) -> u64 {
        self.sent += 1;
        let head = frame::encode_head(&DataRequest { id: self.sent, op: Some(op) }, body.len());
        self.bytes(&head).await;
        self.bytes(body).await;
        self.sent
    }

    /// Sends bytes that need be no frame.
    pub async fn bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("send");
    }

    /// The next answer with the id it is for; `None` when the worker ended the connection.
    pub async fn next(&mut self) -> Option<(u64, Answer)> {
        let (answer, _) = frame::read::<DataResponse, _>(&mut self.stream).await.unwrap_or(None)?;
        Some((answer.id, answer.op.expect("op")))
    }

    /// One question, one answer.
    pub async fn ask(&mut self, op: Op) -> Answer {
        let id = self.send(op, &[]).await;
        let (of, answer) = self.next().await.expect("an answer");
        assert_eq!(of, id);
        answer
    }
}

/// The master's file system service.
pub async fn files(master: &str) -> FileSystemClient<Channel> {
    FileSystemClient::connect(format!("http://{master}")).await.expect("connect")
}

/// A call's caller.
pub fn caller(user: &str, client_id: u64, sequence: u64) -> Option<Caller> {
    Some(Caller { user: user.into(), client_id, sequence })
}

/// A path as the wire has it.
pub fn path(raw: &str) -> Bytes {
    Bytes::copy_from_slice(raw.as_bytes())
}
