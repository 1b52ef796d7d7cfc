//! `Mirror`: the worker after this one in a pipeline: what is sent on to it, and what it acknowledges.
//!
//! Called by `write`. Invariants: the request goes on with the client's own token, which names every worker of the pipeline; acknowledgements come in the
//! order of the packets, and one that does not is the end of the connection.

use forebay_common::{Error, Result, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{self, Op, read_delimited};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

counter!(MIRRORED, "forebay_worker_hadoop_pipelines_total", "blocks sent on to the next worker of a pipeline while they were written");

/// How long the next worker may take to be there.
const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// How long the last worker may take to begin a block, or to take a packet: a room that must be waited for included. Each before it waits longer, so that
/// the one that is blamed is the one that hangs.
const ANSWER_WAIT: Duration = Duration::from_secs(50);
const ANSWER_WAIT_MORE: Duration = Duration::from_secs(5);
const BUFFER_BYTES: usize = 128 << 10;

/// A packet to be acknowledged.
pub struct Ack {
    pub seqno: i64,
    pub status: wire::Status,
    /// Bytes of the block once it is.
    pub length: u64,
}

/// A connection to the next worker.
pub struct Mirror {
    reader: BufReader<OwnedReadHalf>,
    writer: BufWriter<OwnedWriteHalf>,
    wait: Duration,
}

/// What it acknowledges.
pub struct Acknowledgements {
    reader: BufReader<OwnedReadHalf>,
    wait: Duration,
}

/// Where a worker is reached, as its clients name it.
fn address(node: &wire::DatanodeInfoProto) -> String {
    format!("{}:{}", node.id.ip_addr, node.id.xfer_port)
}

impl Mirror {
    /// Begins the block on the next worker, which does so on those after it. `None`: this one is the last.
    ///
    /// Errors: which worker it is that fails, and why.
    pub async fn connect(op: &wire::OpWriteBlockProto) -> Result<Option<Mirror>, (String, Error)> {
        let Some((next, rest)) = op.targets.split_first() else { return Ok(None) };
        let request = wire::OpWriteBlockProto {
            targets: rest.to_vec(),
            target_storage_types: op.target_storage_types.get(1..).unwrap_or_default().to_vec(),
            target_pinnings: op.target_pinnings.get(1..).unwrap_or_default().to_vec(),
            target_storage_ids: op.target_storage_ids.get(1..).unwrap_or_default().to_vec(),
            ..op.clone()
        };
        MIRRORED.inc();
        Mirror::begin(next, &request).await.map(Some)
    }

    /// Begins a block on a worker.
    pub async fn begin(next: &wire::DatanodeInfoProto, request: &wire::OpWriteBlockProto) -> Result<Mirror, (String, Error)> {
        let name = address(next);
        let of_next = |e: Error| (name.clone(), e.context(&name));
        let connected = tokio::time::timeout(CONNECT_WAIT, TcpStream::connect(&name)).await;
        let connected = connected.map_err(|_| err!(Timeout, "no answer")).and_then(|c| c.map_err(|e| Error::io("connecting", &e)));
        let stream = connected.map_err(of_next)?;
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        let wait = ANSWER_WAIT + ANSWER_WAIT_MORE * u32::try_from(request.targets.len()).unwrap_or(0).min(8);
        let mut mirror = Mirror { reader: BufReader::new(reader), writer: BufWriter::with_capacity(BUFFER_BYTES, writer), wait };
        let answered = tokio::time::timeout(wait, async {
            let failed = |e: std::io::Error| Error::io("sending", &e);
            mirror.writer.write_all(&transfer::request(Op::WriteBlock, request)).await.map_err(failed)?;
            mirror.writer.flush().await.map_err(failed)?;
            read_delimited::<wire::BlockOpResponseProto>(&mut mirror.reader).await
        });
        let answer = answered.await.unwrap_or_else(|_| Err(err!(Timeout, "nothing came for {} s", wait.as_secs()))).map_err(of_next)?;
        if answer.status() == wire::Status::Success {
            return Ok(mirror);
        }
        // It may be one after it.
        let bad = answer.first_bad_link.clone().filter(|bad| !bad.is_empty()).unwrap_or(name);
        let e = err!(Unavailable, "{}: {}", answer.status().as_str_name(), answer.message());
        Err((bad.clone(), e.context(bad)))
    }

    pub fn split(self) -> (BufWriter<OwnedWriteHalf>, Acknowledgements) {
        (self.writer, Acknowledgements { reader: self.reader, wait: self.wait })
    }
}

impl Acknowledgements {
    /// What the workers after this one say to a packet. Errors: they say nothing, or answer another one.
    pub async fn next(&mut self, ack: &Ack) -> Result<Vec<i32>> {
        let came = tokio::time::timeout(self.wait, read_delimited::<wire::PipelineAckProto>(&mut self.reader)).await;
        let came = came.map_err(|_| err!(Timeout, "no acknowledgement for {} s", self.wait.as_secs()))??;
        if came.seqno != ack.seqno {
            return Err(err!(Unavailable, "packet {} was acknowledged instead of {}", came.seqno, ack.seqno));
        }
        Ok(came.reply)
    }
}
