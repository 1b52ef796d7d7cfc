//! Frames of Hadoop RPC, version 9.
//!
//! A connection begins with seven bytes (`Preamble`); each frame is a big-endian length, a delimited request header, and what
//! its call id says: a connection context, a SASL message, a ping, or a call (delimited header with method and protocol, delimited
//! request). An answer is a length, a delimited response header and, where all went well, the delimited response. Source: the
//! comments of Hadoop's RpcHeader.proto, and `org.apache.hadoop.ipc.Server` 3.4.1.

use crate::hadoop::common::{
    IpcConnectionContextProto, RequestHeaderProto, RpcKindProto, RpcRequestHeaderProto, RpcResponseHeaderProto, RpcSaslProto,
    rpc_request_header_proto,
    rpc_response_header_proto::{RpcErrorCodeProto, RpcStatusProto},
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use forebay_common::{Result, err};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The version of the frames.
pub const VERSION: u8 = 9;
/// The answer of a server to whoever speaks HTTP to it, as Hadoop has it.
pub const HTTP_ANSWER: &[u8] = b"HTTP/1.1 404 Not Found\r\nContent-type: text/plain\r\n\r\n\
It looks like you are making an HTTP request to a Hadoop IPC port. This is not the correct port for the web interface on this daemon.\r\n";

const CALL_CONTEXT: i32 = -3;
const CALL_PING: i32 = -4;
const CALL_SASL: i32 = -33;
const AUTH_SASL: u8 = 0xdf;

/// How a client means to say who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// It states its user.
    None,
    /// It asks what there is first; also one that only holds tokens.
    Sasl,
}

/// The first seven bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// How the client will say who it is.
    pub auth: Auth,
}

/// What the first bytes turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Opening {
    /// A client of ours.
    Preamble(Preamble),
    /// A browser.
    Http,
}

impl Preamble {
    /// Length in bytes.
    pub const BYTES: usize = 7;

    /// Errors: `InvalidArgument` for another protocol or version.
    pub fn parse(raw: &[u8; Preamble::BYTES]) -> Result<Opening> {
        if raw.starts_with(b"GET ") {
            return Ok(Opening::Http);
        }
        if !raw.starts_with(b"hrpc") {
            return Err(err!(InvalidArgument, "a connection does not begin with Hadoop's \"hrpc\""));
        }
        if raw[4] != VERSION {
            return Err(err!(Unsupported, "Hadoop RPC version {}: this server speaks {VERSION}", raw[4]));
        }
        match raw[6] {
            0 => Ok(Opening::Preamble(Preamble { auth: Auth::None })),
            AUTH_SASL => Ok(Opening::Preamble(Preamble { auth: Auth::Sasl })),
            other => Err(err!(Unsupported, "authentication {other} of Hadoop RPC is not known")),
        }
    }

    /// What a client that states its user sends.
    pub fn encode() -> [u8; Preamble::BYTES] {
        [b'h', b'r', b'p', b'c', VERSION, 0, 0]
    }
}

/// The next frame without its length; `None` when the peer has ended. Errors: one longer than `max_bytes`.
pub async fn read_frame(stream: &mut (impl AsyncRead + Unpin), max_bytes: usize) -> Result<Option<Bytes>> {
    let length = match stream.read_u32().await {
        Ok(length) => length as usize,
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(forebay_common::Error::io("reading a call", &e)),
    };
    if length > max_bytes {
        return Err(err!(LimitExceeded, "a frame of {length} bytes, {max_bytes} are allowed").with_retryable(false));
    }
    // Grows with what really comes: a length alone costs nothing.
    let mut frame = BytesMut::with_capacity(length.min(64 << 10));
    let mut limited = stream.take(length as u64);
    while frame.len() < length {
        if limited.read_buf(&mut frame).await.map_err(|e| forebay_common::Error::io("reading a call", &e))? == 0 {
            return Err(err!(Unavailable, "the connection ended within a frame"));
        }
    }
    Ok(Some(frame.freeze()))
}

/// What identifies a call to its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallId {
    /// Of the client, for all its connections.
    pub client_id: Bytes,
    /// Of the call; -33 for SASL.
    pub call_id: i32,
    /// How often it was sent before.
    pub retry_count: i32,
}

/// A call of a method.
#[derive(Clone, Debug)]
pub struct Call {
    /// Whose, and which.
    pub id: CallId,
    /// The method's name.
    pub method: String,
    /// The Java interface that it is of.
    pub protocol: String,
    /// The delimited request.
    pub request: Bytes,
}

/// A frame from a client.
#[derive(Debug)]
pub enum Incoming {
    /// Who it is for; no answer.
    Context(IpcConnectionContextProto),
    /// No answer.
    Ping,
    /// Asks what there is, or goes on.
    Sasl(RpcSaslProto),
    /// A call.
    Call(Call),
    /// The client is done.
    Close,
}

fn delimited<M: Message + Default>(frame: &mut Bytes, what: &str) -> Result<M> {
    M::decode_length_delimited(frame).map_err(|e| err!(InvalidArgument, "{what}: {e}"))
}

impl Incoming {
    /// Errors: `InvalidArgument`; the connection is of no use then.
    pub fn parse(mut frame: Bytes) -> Result<Incoming> {
        let header: RpcRequestHeaderProto = delimited(&mut frame, "call header")?;
        if header.rpc_op() == rpc_request_header_proto::OperationProto::RpcCloseConnection {
            return Ok(Incoming::Close);
        }
        match header.call_id {
            CALL_CONTEXT => delimited(&mut frame, "connection context").map(Incoming::Context),
            CALL_PING => Ok(Incoming::Ping),
            CALL_SASL => delimited(&mut frame, "SASL message").map(Incoming::Sasl),
            call_id if call_id >= 0 => {
                if header.rpc_kind() != RpcKindProto::RpcProtocolBuffer {
                    return Err(err!(Unsupported, "calls of kind {:?}: only protocol buffers are spoken", header.rpc_kind()));
                }
                let named: RequestHeaderProto = delimited(&mut frame, "request header")?;
                Ok(Incoming::Call(Call {
                    id: CallId { client_id: header.client_id, call_id, retry_count: header.retry_count.unwrap_or(-1) },
                    method: named.method_name,
                    protocol: named.declaring_class_protocol_name,
                    request: frame,
                }))
            }
            other => Err(err!(InvalidArgument, "call id {other} is not known")),
        }
    }
}

impl Call {
    /// The request. Errors: `InvalidArgument`.
    pub fn decode<M: Message + Default>(&self) -> Result<M> {
        M::decode_length_delimited(self.request.clone()).map_err(|e| err!(InvalidArgument, "request of {}: {e}", self.method))
    }
}

fn response_header(id: &CallId, status: RpcStatusProto) -> RpcResponseHeaderProto {
    RpcResponseHeaderProto {
        // Java's int, as an unsigned varint: a negative one comes out as it came in.
        call_id: id.call_id as u32,
        status: status as i32,
        server_ipc_version_num: Some(u32::from(VERSION)),
        client_id: Some(id.client_id.clone()),
        retry_count: Some(id.retry_count),
        ..RpcResponseHeaderProto::default()
    }
}

fn frame(header: &RpcResponseHeaderProto, body: Option<&dyn Encode>) -> Bytes {
    let header_bytes = prost::length_delimiter_len(header.encoded_len()) + header.encoded_len();
    let length = header_bytes + body.map_or(0, Encode::delimited_len);
    let mut out = BytesMut::with_capacity(4 + length);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    out.put_slice(&header.encode_length_delimited_to_vec());
    if let Some(body) = body {
        body.put(&mut out);
    }
    out.freeze()
}

/// A message of whatever type, as the body of an answer.
trait Encode {
    fn delimited_len(&self) -> usize;
    fn put(&self, out: &mut BytesMut);
}

impl<M: Message> Encode for M {
    fn delimited_len(&self) -> usize {
        prost::length_delimiter_len(self.encoded_len()) + self.encoded_len()
    }

    fn put(&self, out: &mut BytesMut) {
        self.encode_length_delimited(out).unwrap_or_else(|e| unreachable!("a growing buffer has room: {e}"));
    }
}

/// The answer of a call that went well.
pub fn success(id: &CallId, response: &impl Message) -> Bytes {
    frame(&response_header(id, RpcStatusProto::Success), Some(response))
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The call's own exception.
    Application,
    /// There is no such method: clients take it as "not supported here".
    NoSuchMethod,
    /// There is no such protocol.
    NoSuchProtocol,
    /// The connection ends.
    Fatal,
}

/// The answer of a call that failed: the Java class of its exception, and the text.
pub fn failure(id: &CallId, severity: Severity, class: &str, message: &str) -> Bytes {
    let (status, detail) = match severity {
        Severity::Application => (RpcStatusProto::Error, RpcErrorCodeProto::ErrorApplication),
        Severity::NoSuchMethod => (RpcStatusProto::Error, RpcErrorCodeProto::ErrorNoSuchMethod),
        Severity::NoSuchProtocol => (RpcStatusProto::Error, RpcErrorCodeProto::ErrorNoSuchProtocol),
        Severity::Fatal => (RpcStatusProto::Fatal, RpcErrorCodeProto::FatalInvalidRpcHeader),
    };
    let header = RpcResponseHeaderProto {
        exception_class_name: Some(class.to_owned()),
        error_msg: Some(message.to_owned()),
        error_detail: Some(detail as i32),
        ..response_header(id, status)
    };
    frame(&header, None)
}

/// The answer to a SASL message.
pub fn sasl(message: &RpcSaslProto) -> Bytes {
    let id = CallId { client_id: Bytes::new(), call_id: CALL_SASL, retry_count: -1 };
    frame(&response_header(&id, RpcStatusProto::Success), Some(message))
}

/// Whom an error of the connection itself is told to.
pub fn no_call() -> CallId {
    CallId { client_id: Bytes::new(), call_id: -1, retry_count: -1 }
}

/// A frame from a client: for `client`, and for tests.
pub fn request(id: &CallId, method: &str, protocol: &str, request: &impl Message) -> Bytes {
    let header = request_header(id);
    let named = RequestHeaderProto { method_name: method.to_owned(), declaring_class_protocol_name: protocol.to_owned(), client_protocol_version: 1 };
    framed(&[header.encode_length_delimited_to_vec(), named.encode_length_delimited_to_vec(), request.encode_length_delimited_to_vec()])
}

/// The frame that says who a connection is for.
pub fn context(client_id: &Bytes, context: &IpcConnectionContextProto) -> Bytes {
    let id = CallId { client_id: client_id.clone(), call_id: CALL_CONTEXT, retry_count: -1 };
    framed(&[request_header(&id).encode_length_delimited_to_vec(), context.encode_length_delimited_to_vec()])
}

fn request_header(id: &CallId) -> RpcRequestHeaderProto {
    RpcRequestHeaderProto {
        rpc_kind: Some(RpcKindProto::RpcProtocolBuffer as i32),
        rpc_op: Some(rpc_request_header_proto::OperationProto::RpcFinalPacket as i32),
        call_id: id.call_id,
        client_id: id.client_id.clone(),
        retry_count: Some(id.retry_count),
        ..RpcRequestHeaderProto::default()
    }
}

fn framed(parts: &[Vec<u8>]) -> Bytes {
    let length: usize = parts.iter().map(Vec::len).sum();
    let mut out = BytesMut::with_capacity(4 + length);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    parts.iter().for_each(|part| out.put_slice(part));
    out.freeze()
}

/// An answer, as a client reads it: its header, and what follows.
pub fn parse_response(mut frame: Bytes) -> Result<(RpcResponseHeaderProto, Bytes)> {
    let header = delimited(&mut frame, "answer header")?;
    let rest = frame.copy_to_bytes(frame.remaining());
    Ok((header, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hadoop::hdfs::GetFileInfoRequestProto;

    fn id() -> CallId {
        CallId { client_id: Bytes::from_static(&[7; 16]), call_id: 5, retry_count: 0 }
    }

    #[tokio::test]
    async fn a_call_comes_as_it_was_sent() {
        let sent = request(&id(), "getFileInfo", "p", &GetFileInfoRequestProto { src: "/ä".into() });
        let mut stream: &[u8] = &sent;
        let frame = read_frame(&mut stream, 1 << 20).await.unwrap().unwrap();
        let Incoming::Call(call) = Incoming::parse(frame).unwrap() else { panic!("a call") };
        assert_eq!((call.id.clone(), call.method.as_str(), call.protocol.as_str()), (id(), "getFileInfo", "p"));
        assert_eq!(call.decode::<GetFileInfoRequestProto>().unwrap().src, "/ä");
        assert!(read_frame(&mut stream, 1 << 20).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_frame_has_a_limit_and_an_end() {
        let mut long: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0];
        assert!(read_frame(&mut long, 1 << 20).await.is_err());
        let mut torn: &[u8] = &[0, 0, 0, 9, 1, 2];
        assert!(read_frame(&mut torn, 1 << 20).await.is_err());
    }

    #[test]
    fn what_is_not_a_call_is_an_error_and_no_panic() {
        for raw in [&b""[..], &[0], &[0xff; 32], &[3, 0x18, 0x01, 0x22]] {
            assert!(Incoming::parse(Bytes::copy_from_slice(raw)).is_err());
        }
        assert_eq!(Preamble::parse(b"GET / H").unwrap(), Opening::Http);
        assert!(Preamble::parse(b"hrpc\x08\0\0").is_err() && Preamble::parse(b"hrpc\x09\0\x50").is_err());
        assert_eq!(Preamble::parse(&Preamble::encode()).unwrap(), Opening::Preamble(Preamble { auth: Auth::None }));
    }

    #[test]
    fn an_answer_carries_its_call() {
        let frame = failure(&id(), Severity::Application, "java.io.IOException", "no");
        let (header, rest) = parse_response(frame.slice(4..)).unwrap();
        assert_eq!((header.call_id, header.client_id, rest.len()), (5, Some(id().client_id), 0));
        let (header, _) = parse_response(sasl(&RpcSaslProto::default()).slice(4..)).unwrap();
        assert_eq!(header.call_id as i32, -33);
    }
}
