//! A plain client of Hadoop RPC: one connection, one call at a time, for the calls that no library makes for us.
//!
//! It states its user and knows no Kerberos. Called by the under store that listens to HDFS's own event stream, and by tests.

use crate::exception;
use crate::hadoop::common::{IpcConnectionContextProto, UserInformationProto, rpc_response_header_proto::RpcStatusProto};
use crate::ipc::{self, CallId, Preamble};
use bytes::Bytes;
use forebay_common::{Error, Result, err};
use prost::Message;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// The interface that clients of a NameNode call.
pub const CLIENT_PROTOCOL: &str = "org.apache.hadoop.hdfs.protocol.ClientProtocol";
/// Bytes of an answer, as Hadoop's clients have it (`ipc.maximum.response.length`).
const ANSWER_MAX_BYTES: usize = 128 << 20;

/// A connection to a NameNode.
pub struct IpcClient {
    stream: BufReader<TcpStream>,
    client_id: Bytes,
    next: i32,
    timeout: Duration,
}

impl IpcClient {
    /// Connects to `host:port` on behalf of a user. Each step, and each call later, may take `timeout`.
    pub async fn connect(address: &str, user: &str, timeout: Duration) -> Result<IpcClient> {
        let io = |e: std::io::Error| Error::io(format!("NameNode {address}"), &e);
        let late = |_| err!(Timeout, "NameNode {address} does not answer within {} ms", timeout.as_millis());
        let stream = tokio::time::timeout(timeout, TcpStream::connect(address)).await.map_err(late)?.map_err(io)?;
        Self::over(stream, user, timeout).await.map_err(|e| e.context(format!("NameNode {address}")))
    }

    /// Greets over a connection that is there.
    pub async fn over(mut stream: TcpStream, user: &str, timeout: Duration) -> Result<IpcClient> {
        let io = |e: std::io::Error| Error::io("greeting", &e);
        stream.set_nodelay(true).map_err(io)?;
        let client_id = Bytes::copy_from_slice(&rand::random::<[u8; 16]>());
        let context = IpcConnectionContextProto {
            user_info: Some(UserInformationProto { effective_user: Some(user.to_owned()), real_user: None }),
            protocol: Some(CLIENT_PROTOCOL.to_owned()),
        };
        stream.write_all(&Preamble::encode()).await.map_err(io)?;
        stream.write_all(&ipc::context(&client_id, &context)).await.map_err(io)?;
        Ok(IpcClient { stream: BufReader::new(stream), client_id, next: 0, timeout })
    }

    /// Calls a method. Errors: the remote exception as ours; after any other error the connection is of no use.
    pub async fn call<M: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<M> {
        let limit = self.timeout;
        match tokio::time::timeout(limit, self.call_now(method, request)).await {
            Ok(done) => done,
            Err(_) => Err(err!(Timeout, "{method} has no answer within {} ms", limit.as_millis())),
        }
    }

    async fn call_now<M: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<M> {
        let id = CallId { client_id: self.client_id.clone(), call_id: self.next, retry_count: 0 };
        self.next = self.next.wrapping_add(1) & i32::MAX;
        let frame = ipc::request(&id, method, CLIENT_PROTOCOL, request);
        self.stream.get_mut().write_all(&frame).await.map_err(|e| Error::io(method, &e))?;
        let frame = ipc::read_frame(&mut self.stream, ANSWER_MAX_BYTES).await?;
        let (header, rest) = ipc::parse_response(frame.ok_or_else(|| err!(Unavailable, "the NameNode ended the connection"))?)?;
        if header.status() != RpcStatusProto::Success {
            return Err(exception::error_of(header.exception_class_name(), header.error_msg()));
        }
        if header.call_id != id.call_id as u32 {
            return Err(err!(UnderStore, "the NameNode answers call {} instead of {}", header.call_id, id.call_id));
        }
        M::decode_length_delimited(rest).map_err(|e| err!(UnderStore, "answer of {method}: {e}"))
    }
}
