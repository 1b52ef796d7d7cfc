//! WRITE_BLOCK: one block, from its client, on through the workers named after this one; its bytes are nowhere else until its file is in an under store.
//!
//! Packets are passed on, compared with their checksums, written, and acknowledged in order: once what they brought outlives this process, and all workers
//! after this one say the same. A block is begun, and ended, only while the master says that its lease holds. What a client leaves behind in the middle of a
//! block stays open: the client comes back for it with a new stamp, without the worker that failed, or whoever recovers the lease has it sealed.
//! Source: `BlockReceiver` and `DataXceiver.writeBlock` 3.4.1.

use super::open::OpenBlock;
use super::pipeline::{Ack, Acknowledgements, Mirror};
use super::server::Peer;
use super::{WRITTEN, refusal, send, status_of, verify};
use crate::core::Core;
use crate::master::MASTER_WAIT;
use crate::write::BlockWriter;
use forebay_common::token;
use forebay_common::{BlockId, Error, ErrorKind, Result, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{Checksum, HEARTBEAT_SEQNO, Packet};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::op_write_block_proto::BlockConstructionStage as Stage;

counter!(
    LEFT,
    "forebay_worker_hadoop_blocks_left_total",
    "blocks whose client went away before their end; open until it comes back, or their lease is over"
);

/// A client sends something at least every 30 s.
const PACKET_WAIT: Duration = Duration::from_secs(120);
/// How long the next worker may take to take a packet.
const PASS_ON_WAIT: Duration = Duration::from_secs(30);
/// Packets that wait for the acknowledgement of the workers after this one: a client has 80 under way.
const UNACKNOWLEDGED: usize = 256;

struct Open {
    block: Arc<OpenBlock>,
    turn: u64,
    checksum: Checksum,
    block_size_bytes: u64,
    file_id: u64,
    lease_id: u64,
    /// Copied from another worker, for a client that goes on with it here: not ended with its last packet.
    transfer: bool,
}

/// What a request comes to.
enum Begun {
    /// Packets follow.
    Open(Open),
    /// The block is whole, and its client only wants to know that.
    Closed,
}

async fn open(core: &Arc<Core>, op: &wire::OpWriteBlockProto) -> Result<Begun> {
    let header = &op.header.base_header;
    let claims = verify(core, header, token::WRITE).await?;
    let block = BlockId(header.block.block_id);
    if !claims.covers(block) || claims.lease_id == 0 {
        return Err(err!(Unauthenticated, "block token does not let block {block} be written"));
    }
    let checksum = Checksum::of(&op.requested_checksum)?;
    // A token outlives its lease.
    hold(core, claims.file_id, claims.lease_id).await?;
    let (stamp, stage) = (op.latest_generation_stamp, op.stage());
    let (block, turn) = match stage {
        Stage::PipelineSetupCreate | Stage::TransferRbw => {
            if *core.leaving.borrow() {
                return Err(err!(Unavailable, "this worker is to leave: it takes nothing new"));
            }
            if core.store.has(block) {
                return Err(err!(AlreadyExists, "block {block} is on this worker already"));
            }
            let mut writer = BlockWriter::new(core.store.clone(), &claims, block, true);
            writer.set_stamp(stamp);
            core.open_blocks.begin(writer).map_err(|(_, e)| e)?
        }
        Stage::PipelineSetupAppend | Stage::PipelineSetupAppendRecovery | Stage::PipelineSetupStreamingRecovery => {
            let open = tokio::task::block_in_place(|| core.open_blocks.get(block))?;
            let open = open.ok_or_else(|| err!(NotFound, "block {block} is not open on this worker"))?;
            let turn = tokio::task::block_in_place(|| open.attach(stamp, op.min_bytes_rcvd))?;
            (open, turn)
        }
        Stage::PipelineCloseRecovery => {
            if let Some(open) = tokio::task::block_in_place(|| core.open_blocks.get(block))? {
                let turn = tokio::task::block_in_place(|| open.attach(stamp, op.min_bytes_rcvd))?;
                if let Err(e) = end(core, &open, true).await {
                    open.detach(turn);
                    return Err(e);
                }
            }
            let length = tokio::task::block_in_place(|| core.store.peek_read(block)).map(|b| b.header.length_bytes);
            if length != Some(op.min_bytes_rcvd) {
                return Err(err!(NotFound, "block {block} has {length:?} bytes on this worker instead of {}", op.min_bytes_rcvd));
            }
            return Ok(Begun::Closed);
        }
        other => return Err(err!(Unsupported, "{other:?} is no stage that a block is written in")),
    };
    let (file_id, lease_id, block_size_bytes) = (claims.file_id, claims.lease_id, claims.block_size_bytes);
    Ok(Begun::Open(Open { block, turn, checksum, block_size_bytes, file_id, lease_id, transfer: stage == Stage::TransferRbw }))
}

/// Errors: `Expired` when the lease is over.
async fn hold(core: &Core, file_id: u64, lease_id: u64) -> Result<()> {
    core.master.hold_lease(file_id, lease_id, Instant::now() + MASTER_WAIT).await.map(drop)
}

/// Errors: the connection is of no use any more; what was acknowledged stays.
pub async fn write_block(core: &Arc<Core>, peer: &mut Peer, op: wire::OpWriteBlockProto, shutdown: &CancellationToken) -> Result<()> {
    let answer = |answer: wire::BlockOpResponseProto, bad: String| wire::BlockOpResponseProto { first_bad_link: Some(bad), ..answer };
    let begun = match open(core, &op).await {
        Ok(begun) => begun,
        Err(e) => return send(&mut peer.writer, &answer(refusal(&e), String::new())).await,
    };
    let mirror = match Mirror::connect(&op).await {
        Ok(mirror) => mirror,
        Err((bad, e)) => {
            tracing::info!(block = op.header.base_header.block.block_id, next = bad, error = %e, "the next worker of a pipeline does not take a block");
            if let Begun::Open(open) = &begun {
                leave(open).await;
            }
            return send(&mut peer.writer, &answer(refusal(&e), bad)).await;
        }
    };
    let success = wire::BlockOpResponseProto { status: wire::Status::Success as i32, ..wire::BlockOpResponseProto::default() };
    let sent = send(&mut peer.writer, &answer(success, String::new())).await;
    let Begun::Open(open) = begun else { return sent };
    let written = match sent {
        Ok(()) => stream(core, peer, &open, mirror, shutdown).await,
        Err(e) => Err(e),
    };
    if let Err(e) = &written
        && let Some(length) = leave(&open).await
    {
        LEFT.inc();
        tracing::info!(file = open.file_id, length, error = %e, "a block is left in the middle: its client went away, or could not go on");
    }
    written
}

/// Whoever wrote it does not any more. Also one without a byte stays open: its client may have sent some to a worker that died before it passed them on, and
/// comes back. Where it does not, the master has it dropped with its file, or its lease. Returns how long it is, where it stays.
async fn leave(open: &Open) -> Option<u64> {
    let (block, turn) = (open.block.clone(), open.turn);
    tokio::task::spawn_blocking(move || block.detach(turn)).await.ok().flatten()
}

/// Takes packets, and acknowledges them.
async fn stream(core: &Arc<Core>, peer: &mut Peer, open: &Open, mirror: Option<Mirror>, shutdown: &CancellationToken) -> Result<()> {
    let (acks, waiting) = mpsc::channel(UNACKNOWLEDGED);
    let (to, from) = mirror.map(Mirror::split).unzip();
    let mut taken = std::pin::pin!(packets(core, &mut peer.reader, to, open, acks, shutdown));
    let mut acknowledged = std::pin::pin!(acknowledge(&mut peer.writer, from, open, waiting));
    tokio::select! {
        // All that is left is to acknowledge what was taken.
        taken = &mut taken => {
            let acknowledged = acknowledged.await;
            taken.and(acknowledged)
        }
        acknowledged = &mut acknowledged => match acknowledged {
            Ok(()) => taken.await,
            Err(e) => Err(e),
        }
    }
}

/// Takes packets until the last. Errors: nothing more comes, or can be taken; what was taken is on its way to be acknowledged.
async fn packets(
    core: &Arc<Core>,
    reader: &mut BufReader<impl AsyncRead + Unpin>,
    mut mirror: Option<BufWriter<impl AsyncWrite + Unpin>>,
    open: &Open,
    acks: mpsc::Sender<Ack>,
    shutdown: &CancellationToken,
) -> Result<()> {
    let mut pending = Vec::new();
    loop {
        // Together, when nothing more is at hand; a block that ends first needs no log.
        if (reader.buffer().is_empty() && !pending.is_empty()) || pending.len() >= UNACKNOWLEDGED {
            pass_on(&mut mirror, &[]).await;
            let_go(open, &mut pending, &acks).await?;
        }
        let packet = tokio::select! {
            () = shutdown.cancelled() => return Err(err!(Unavailable, "this worker is stopping")),
            packet = tokio::time::timeout(PACKET_WAIT, Packet::read(reader)) => packet,
        };
        let packet = packet.unwrap_or_else(|_| Err(err!(Timeout, "a Hadoop client is silent in the middle of a block")))?;
        if mirror.is_some() {
            pass_on(&mut mirror, &[&packet.encode_head(), &packet.data]).await;
        }
        let (seqno, last) = (packet.seqno, packet.last);
        let taken = if seqno == HEARTBEAT_SEQNO { Ok(0) } else { take(open, &packet) };
        let ended = match taken {
            Ok(length) if last => {
                pass_on(&mut mirror, &[]).await;
                finish(core, open).await.map(|()| length)
            }
            other => other,
        };
        let status = ended.as_ref().map_or_else(status_of, |_| wire::Status::Success);
        pending.push(Ack { seqno, status, length: ended.as_ref().copied().unwrap_or(0) });
        if last || ended.is_err() {
            let_go(open, &mut pending, &acks).await?;
            return ended.map(drop);
        }
    }
}

/// Has packets acknowledged whose bytes are here, once these outlive the process; of a block that was ended by then they do.
async fn let_go(open: &Open, pending: &mut Vec<Ack>, acks: &mpsc::Sender<Ack>) -> Result<()> {
    tokio::task::block_in_place(|| open.block.persist())?;
    for ack in pending.drain(..) {
        acks.send(ack).await.map_err(|_| err!(Unavailable, "acknowledgements are not sent any more"))?;
    }
    Ok(())
}

/// Sends bytes on to the next worker, or what is buffered of them. One that does not take them is given up: its acknowledgements are missing then, by which the
/// client learns which worker it is.
async fn pass_on(mirror: &mut Option<BufWriter<impl AsyncWrite + Unpin>>, parts: &[&[u8]]) {
    let Some(to) = mirror else { return };
    let sent = tokio::time::timeout(PASS_ON_WAIT, async {
        for part in parts {
            to.write_all(part).await?;
        }
        if parts.is_empty() { to.flush().await } else { Ok(()) }
    });
    if !matches!(sent.await, Ok(Ok(()))) {
        *mirror = None;
    }
}

/// The last packet is here. Errors: the block is not ended here.
async fn finish(core: &Arc<Core>, open: &Open) -> Result<()> {
    if open.transfer {
        tokio::task::block_in_place(|| open.block.persist())?;
        open.block.detach(open.turn);
        return Ok(());
    }
    match hold(core, open.file_id, open.lease_id).await {
        Ok(()) => match end(core, &open.block, true).await? {
            Some(_) => Ok(()),
            None => Err(err!(Expired, "the block was sealed before its end: its lease is over")),
        },
        // The file is completed, or gone: nobody wants the block.
        Err(e) if e.kind() == ErrorKind::Expired => end(core, &open.block, false).await.and(Err(e)),
        Err(e) => Err(e),
    }
}

/// Compares and writes. A packet after a flush begins with the chunk that was not full then, and after a recovery with what was not acknowledged: what of it
/// is here already is passed over. Returns the length then.
fn take(open: &Open, packet: &Packet) -> Result<u64> {
    let chunk = open.checksum.chunk_bytes as u64;
    let bytes = packet.data.len() as u64;
    if packet.offset.checked_add(bytes).is_none_or(|end| end > open.block_size_bytes) {
        return Err(err!(InvalidArgument, "a packet at {} of {bytes} bytes: a block has {}", packet.offset, open.block_size_bytes));
    }
    let first = (chunk - packet.offset % chunk) as usize;
    open.checksum.verify(&packet.data, &packet.sums, first)?;
    // Room may have to be waited for, and a disk takes its time.
    let length = tokio::task::block_in_place(|| open.block.append(open.turn, packet.offset, &packet.data, packet.sync))?;
    WRITTEN.inc_by(bytes);
    Ok(length)
}

/// Sends acknowledgements, each once the workers after this one have given theirs. Errors: the client is gone, or one of them.
async fn acknowledge(
    writer: &mut (impl AsyncWrite + Unpin),
    mut mirror: Option<Acknowledgements>,
    open: &Open,
    mut waiting: mpsc::Receiver<Ack>,
) -> Result<()> {
    let mut batch = Vec::new();
    let failed = |e: std::io::Error| Error::io("acknowledging", &e);
    while waiting.recv_many(&mut batch, UNACKNOWLEDGED).await > 0 {
        for ack in batch.drain(..) {
            let mut reply = vec![ack.status as i32];
            let mut broken = None;
            if let Some(mirror) = &mut mirror {
                match mirror.next(&ack).await {
                    Ok(after) => reply.extend(after),
                    // The client finds out by this which worker it is, and goes on without.
                    Err(e) => {
                        reply.push(wire::Status::Error as i32);
                        broken = Some(e);
                    }
                }
            }
            let flag = reply.iter().map(|status| *status as u32).collect();
            let good = reply.iter().all(|status| *status == wire::Status::Success as i32);
            if good {
                open.block.note_acknowledged(ack.length);
            }
            let message = wire::PipelineAckProto { seqno: ack.seqno, reply, downstream_ack_time_nanos: Some(0), flag };
            writer.write_all(&message.encode_length_delimited_to_vec()).await.map_err(failed)?;
            if !good {
                writer.flush().await.map_err(failed)?;
                return Err(broken.unwrap_or_else(|| err!(Unavailable, "a worker of the pipeline did not take a packet")));
            }
        }
        writer.flush().await.map_err(failed)?;
    }
    Ok(())
}

/// Ends a block, and has the master know of it. `None`: somebody else did.
pub async fn end(core: &Arc<Core>, block: &Arc<OpenBlock>, keep: bool) -> Result<Option<u64>> {
    let (at_work, block) = (core.clone(), block.clone());
    let ended = tokio::task::spawn_blocking(move || block.end(&at_work, keep)).await.map_err(|e| err!(Internal, "write task: {e}"))??;
    if ended.is_some_and(|length| length > 0) {
        core.reporter.report_now().await;
    }
    Ok(ended)
}
