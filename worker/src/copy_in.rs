//! Taking over blocks from a worker that leaves, when the master says so.
//!
//! Called with each heartbeat's answer. A block is read over the network in pieces whose checksums are compared here, written
//! as a new block that counts as the only copy of its bytes, and reported like any other; the master then knows that it is
//! elsewhere. What fails is ordered again.

use crate::core::Core;
use crate::store::BlockFile;
use crate::write::BlockWriter;
use bytes::Bytes;
use forebay_common::token::Claims;
use forebay_common::{BlockId, Error, Result, checksum, counter, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{CopyBlock, DATA_PROTOCOL_VERSION, DataRequest, DataResponse, Hello, ReadBlock, frame};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

counter!(COPIED, "forebay_worker_blocks_taken_over_total", "blocks taken over from a worker that leaves");
counter!(FAILED, "forebay_worker_blocks_not_taken_over_total", "blocks that could not be taken over; the master orders them again");

/// Blocks taken over at once.
const AT_ONCE: usize = 4;
/// Bytes asked for at once.
const REQUEST_BYTES: u64 = 4 << 20;
/// How long the other worker may be silent.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What is under way.
pub struct CopyIn {
    known: Mutex<HashSet<u64>>,
    permits: Arc<Semaphore>,
}

impl Default for CopyIn {
    fn default() -> Self {
        CopyIn { known: Mutex::default(), permits: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl CopyIn {
    fn known(&self) -> std::sync::MutexGuard<'_, HashSet<u64>> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Starts what was ordered and is not under way.
    pub fn begin(core: &Arc<Core>, orders: Vec<CopyBlock>) {
        for order in orders {
            if !core.copy_in.known().insert(order.block_id) {
                continue;
            }
            let core = core.clone();
            tokio::spawn(async move {
                let _permit = core.copy_in.permits.clone().acquire_owned().await;
                match take_over(&core, &order).await {
                    Ok(()) => COPIED.inc(),
                    Err(e) => {
                        FAILED.inc();
                        tracing::warn!(block = order.block_id, error = %e, "a block was not taken over");
                    }
                }
                core.copy_in.known().remove(&order.block_id);
            });
        }
    }
}

async fn take_over(core: &Arc<Core>, order: &CopyBlock) -> Result<()> {
    let id = BlockId(order.block_id);
    let store = core.store.clone();
    let here = tokio::task::spawn_blocking(move || store.get(id).is_some_and(|b| b.is_full())).await;
    if here.map_err(|e| err!(Internal, "copy task: {e}"))? {
        core.store.note_changed(id);
        return Ok(());
    }
    let source = order.source.as_ref().ok_or_else(|| err!(InvalidArgument, "an order without a source"))?;
    let port = u16::try_from(source.data_port).map_err(|_| err!(InvalidArgument, "port {}", source.data_port))?;
    let doing = || format!("taking block {id} over from {}:{port}", source.host);
    let stream = tokio::time::timeout(TIMEOUT, TcpStream::connect((source.host.as_str(), port)))
        .await
        .map_err(|_| err!(Timeout, "{}: no answer", doing()))?
        .map_err(|e| Error::io(doing(), &e))?;
    let mut peer = Peer { stream: BufReader::with_capacity(64 << 10, stream), next: 1 };
    peer.send(Op::Hello(Hello { version: DATA_PROTOCOL_VERSION, client: format!("worker {}", core.id) })).await?;
    peer.answer().await.map_err(|e| e.context(doing()))?;
    let claims = Claims { file_id: order.file_id, page_size_bytes: order.page_size_bytes, block_size_bytes: order.length, ..Claims::default() };
    let mut writer = BlockWriter::new(core.store.clone(), &claims, id, true);
    let mut at = 0;
    while at < order.length {
        let stop = order.length.min(at + REQUEST_BYTES);
        let read = ReadBlock { token: order.token.clone(), block_id: id.get(), offset: at, length: stop - at, readahead: 0 };
        peer.send(Op::ReadBlock(read)).await?;
        while at < stop {
            let bytes = peer.piece(at).await.map_err(|e| e.context(doing()))?;
            at += bytes.len() as u64;
            writer =
                tokio::task::spawn_blocking(move || writer.append(&bytes).map(|()| writer)).await.map_err(|e| err!(Internal, "copy task: {e}"))??;
        }
    }
    let store = core.store.clone();
    let sealed = tokio::task::spawn_blocking(move || writer.seal().and_then(|file: BlockFile| store.insert(Arc::new(file)))).await;
    sealed.map_err(|e| err!(Internal, "copy task: {e}"))?
}

struct Peer {
    stream: BufReader<TcpStream>,
    next: u64,
}

impl Peer {
    async fn send(&mut self, op: Op) -> Result<()> {
        let head = frame::encode_head(&DataRequest { id: self.next, op: Some(op) }, 0);
        self.next += 1;
        self.stream.get_mut().write_all(&head).await.map_err(|e| Error::io("sending", &e))
    }

    async fn answer(&mut self) -> Result<(Answer, Bytes)> {
        let frame = tokio::time::timeout(TIMEOUT, frame::read::<DataResponse, _>(&mut self.stream)).await;
        let frame = frame.map_err(|_| err!(Timeout, "nothing came for {} s", TIMEOUT.as_secs()))??;
        let (response, body) = frame.ok_or_else(|| err!(Unavailable, "the connection ended"))?;
        match response.op {
            Some(Answer::Error(e)) => Err(e.into()),
            Some(answer) => Ok((answer, body)),
            None => Err(err!(Unavailable, "an answer of another version")),
        }
    }

    /// The next bytes, compared with their checksums.
    async fn piece(&mut self, at: u64) -> Result<Bytes> {
        let (Answer::ReadData(data), body) = self.answer().await? else { return Err(err!(Unavailable, "another answer came than was asked for")) };
        if data.offset != at || body.is_empty() {
            return Err(err!(Corrupt, "bytes at {} came instead of {at}", data.offset));
        }
        checksum::check_pieces(at, &data.crcs, &body)?;
        Ok(body)
    }
}
