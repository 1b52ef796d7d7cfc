//! Copying blocks from other workers: whole, as the order says, and reading them without keeping them.
//!
//! A block is read over the network in pieces whose checksums are compared here, written as a new block (the only copy of its bytes,
//! if the order says so) and reported like any other.

use crate::core::Core;
use crate::store::{BlockFile, Header};
use crate::write::BlockWriter;
use bytes::{Bytes, BytesMut};
use forebay_common::block_header::flags_of;
use forebay_common::token::Claims;
use forebay_common::{BlockId, Error, InodeId, MountId, Result, checksum, counter, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{BlockSource, CopyBlock, DATA_PROTOCOL_VERSION, DataRequest, DataResponse, Hello, ReadBlock, frame};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

counter!(COPIED, "forebay_worker_blocks_taken_over_total", "blocks copied from other workers");

/// Bytes asked for at once.
const REQUEST_BYTES: u64 = 4 << 20;
/// How long the other worker may be silent.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Copies a block and returns its bytes; one that is here whole already is reported again.
pub async fn copy(core: &Arc<Core>, order: &CopyBlock) -> Result<u64> {
    let id = BlockId(order.block_id);
    let (store, length) = (core.store.clone(), order.length);
    let here = tokio::task::spawn_blocking(move || {
        let known = store.peek_read(id);
        let same = known.as_ref().is_some_and(|b| b.header.length_bytes == length);
        if known.is_some() && !same {
            tracing::error!(block = %id, "a block has another length than its file says; it is dropped");
            store.remove(id);
        }
        same && known.is_some_and(|b| b.is_full())
    });
    if here.await.map_err(|e| err!(Internal, "copy task: {e}"))? {
        core.store.note_changed(id);
        return Ok(0);
    }
    let source = BlockSource { block_id: order.block_id, worker: order.source.clone(), token: order.token.clone() };
    let peer = Peer::connect(core, &source).await?;
    if order.only_copy { only_copy(core, order, peer).await } else { pages(core, order, peer).await }
}

/// A new block that counts as the only copy of its bytes.
async fn only_copy(core: &Arc<Core>, order: &CopyBlock, mut peer: Peer) -> Result<u64> {
    let claims = Claims {
        file_id: order.file_id,
        page_size_bytes: order.page_size_bytes,
        block_size_bytes: order.length,
        mount_id: order.mount_id,
        ..Claims::default()
    };
    let mut writer = BlockWriter::new(core.store.clone(), &claims, BlockId(order.block_id), true);
    let mut at = 0;
    while at < order.length {
        let bytes = peer.read(at, order.length - at).await?;
        at += bytes.len() as u64;
        writer =
            tokio::task::spawn_blocking(move || writer.append(&bytes).map(|()| writer)).await.map_err(|e| err!(Internal, "copy task: {e}"))??;
    }
    let store = core.store.clone();
    let seal = move || {
        let file: BlockFile = writer.seal()?;
        // A copy is no use of it.
        file.block.used_as(None);
        store.insert(Arc::new(file))
    };
    let sealed = tokio::task::spawn_blocking(seal).await;
    sealed.map_err(|e| err!(Internal, "copy task: {e}"))??;
    COPIED.inc();
    Ok(order.length)
}

/// The pages that are missing of a block that may be here in part, and be read through meanwhile.
async fn pages(core: &Arc<Core>, order: &CopyBlock, mut peer: Peer) -> Result<u64> {
    let header = Header {
        block: BlockId(order.block_id),
        file: InodeId(order.file_id),
        length_bytes: order.length,
        page_size_bytes: order.page_size_bytes,
        flags: flags_of(false, MountId(order.mount_id)),
    };
    let store = core.store.clone();
    let make = move || {
        let known = store.has(header.block);
        store.get_or_create(header).inspect(|block| {
            if !known {
                block.block.used_as(None);
            }
        })
    };
    let block = tokio::task::spawn_blocking(make).await.map_err(|e| err!(Internal, "copy task: {e}"))??;
    let mut copied = 0;
    for page in 0..block.header.pages() {
        if block.has_page(page) {
            continue;
        }
        let (offset, length) = block.header.page_span(page);
        peer.awaited = 0;
        let mut bytes = BytesMut::with_capacity(length);
        while bytes.len() < length {
            let at = bytes.len() as u64;
            bytes.extend_from_slice(&peer.read(offset + at, length as u64 - at).await?);
        }
        let (store, block, bytes) = (core.store.clone(), block.clone(), bytes.freeze());
        copied += length as u64;
        let stored = tokio::task::spawn_blocking(move || store.fill_page(&block, page, &bytes)).await;
        stored.map_err(|e| err!(Internal, "copy task: {e}"))??;
    }
    core.store.note_changed(block.header.block);
    COPIED.inc();
    Ok(copied)
}

/// A connection to another worker, for one block.
pub struct Peer {
    stream: BufReader<TcpStream>,
    next: u64,
    name: String,
    block_id: u64,
    token: Bytes,
    /// Bytes asked for that have not come yet.
    awaited: u64,
}

impl Peer {
    pub async fn connect(core: &Core, source: &BlockSource) -> Result<Peer> {
        let worker = source.worker.as_ref().ok_or_else(|| err!(InvalidArgument, "an order without a source"))?;
        let port = u16::try_from(worker.data_port).map_err(|_| err!(InvalidArgument, "port {}", worker.data_port))?;
        let name = format!("reading block {} from {}:{port}", source.block_id, worker.host);
        let stream = tokio::time::timeout(TIMEOUT, TcpStream::connect((worker.host.as_str(), port)))
            .await
            .map_err(|_| err!(Timeout, "{name}: no answer"))?
            .map_err(|e| Error::io(&name, &e))?;
        let stream = BufReader::with_capacity(64 << 10, stream);
        let mut peer = Peer { stream, next: 1, name, block_id: source.block_id, token: source.token.clone(), awaited: 0 };
        peer.send(Op::Hello(Hello { version: DATA_PROTOCOL_VERSION, client: format!("worker {}", core.id) })).await?;
        peer.answer().await.map_err(|e| e.context(&peer.name))?;
        Ok(peer)
    }

    /// The next bytes from `at` on, in order, of `left` that are wanted in all.
    pub async fn read(&mut self, at: u64, left: u64) -> Result<Bytes> {
        if self.awaited == 0 {
            self.awaited = left.min(REQUEST_BYTES);
            let read = ReadBlock { token: self.token.clone(), block_id: self.block_id, offset: at, length: self.awaited, readahead: 0 };
            self.send(Op::ReadBlock(read)).await?;
        }
        let bytes = self.piece(at).await.map_err(|e| e.context(&self.name))?;
        self.awaited = self.awaited.saturating_sub(bytes.len() as u64);
        Ok(bytes)
    }

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
