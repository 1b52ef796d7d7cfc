//! Answers on their way out: one bounded queue per session, written with vectored writes, descriptors by `SCM_RIGHTS`.

use bytes::Bytes;
use forebay_common::{Error, Result, err};
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{DataResponse, ErrorInfo, frame, unix};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream, tcp};
use tokio::sync::mpsc;

/// Frames that may wait for a slow client; reads wait behind them.
const QUEUE_FRAMES: usize = 32;

/// A client's connection.
pub enum Socket {
    /// Over the network.
    Tcp(TcpStream),
    /// From this machine.
    Unix(UnixStream),
}

pub enum Writer {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::Writer),
}

pub struct Frame {
    head: Bytes,
    body: Vec<Bytes>,
    descriptors: Option<[OwnedFd; 2]>,
}

pub type Queue = mpsc::Receiver<Frame>;

/// The sending side. Cheap to clone.
#[derive(Clone)]
pub struct Outbox(mpsc::Sender<Frame>);

pub fn channel() -> (Outbox, Queue) {
    let (sender, receiver) = mpsc::channel(QUEUE_FRAMES);
    (Outbox(sender), receiver)
}

impl Socket {
    pub fn can_pass_descriptors(&self) -> bool {
        matches!(self, Socket::Unix(_))
    }

    pub fn split(self) -> Result<(Box<dyn AsyncRead + Send + Unpin>, Writer)> {
        Ok(match self {
            Socket::Tcp(s) => {
                let (r, w) = s.into_split();
                (Box::new(r), Writer::Tcp(w))
            }
            Socket::Unix(s) => {
                let (r, w) = unix::split(s, false).map_err(|e| Error::io("a client's socket", &e))?;
                (Box::new(r), Writer::Unix(w))
            }
        })
    }
}

impl Outbox {
    async fn put(&self, id: u64, answer: Answer, body: Vec<Bytes>, descriptors: Option<[OwnedFd; 2]>) -> bool {
        let length = body.iter().map(Bytes::len).sum();
        let head = frame::encode_head(&DataResponse { id, op: Some(answer) }, length);
        self.0.send(Frame { head, body, descriptors }).await.is_ok()
    }

    /// An answer without bytes.
    pub async fn send(&self, id: u64, answer: Answer) {
        self.put(id, answer, Vec::new(), None).await;
    }

    /// An answer with bytes. `false` when the session is over.
    pub async fn send_body(&self, id: u64, answer: Answer, body: Vec<Bytes>) -> bool {
        self.put(id, answer, body, None).await
    }

    /// An answer with two descriptors.
    pub async fn send_with_descriptors(&self, id: u64, answer: Answer, descriptors: [OwnedFd; 2]) {
        self.put(id, answer, Vec::new(), Some(descriptors)).await;
    }

    /// An error.
    pub async fn fail(&self, id: u64, e: &Error) {
        self.send(id, Answer::Error(ErrorInfo::from(e))).await;
    }
}

impl Writer {
    pub async fn write(&mut self, frame: Frame) -> Result<()> {
        let sent = match (&mut *self, &frame.descriptors) {
            (Writer::Unix(socket), Some(descriptors)) => {
                socket.send_with_descriptors(&frame.head, descriptors).await.map_err(|e| Error::io("passing descriptors", &e))?
            }
            (Writer::Tcp(_), Some(_)) => return Err(err!(Internal, "descriptors cannot be passed over the network")),
            (_, None) => 0,
        };
        let mut parts: Vec<IoSlice<'_>> = std::iter::once(&frame.head[sent..]).chain(frame.body.iter().map(|b| &b[..])).map(IoSlice::new).collect();
        let mut rest = &mut parts[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let written = match self {
                Writer::Tcp(w) => w.write_vectored(rest).await,
                Writer::Unix(w) => w.write_vectored(rest).await,
            }
            .map_err(|e| Error::io("writing", &e))?;
            if written == 0 {
                return Err(err!(Unavailable, "connection closed"));
            }
            IoSlice::advance_slices(&mut rest, written);
        }
        Ok(())
    }
}
