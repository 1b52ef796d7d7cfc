//! WRITE_BLOCK: one block, from its client alone; its bytes are nowhere else until its file is in an under store.
//!
//! Packets are acknowledged in order once their bytes are written. A block is begun, and ended, only while the master says that its lease holds. What a client
//! leaves behind in the middle of a block is sealed as it is, and so is what is open when the worker stops: whoever recovers the lease finds what was
//! acknowledged.

use super::open::OpenBlock;
use super::server::Peer;
use super::{WRITTEN, refusal, send, verify};
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
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

counter!(ABANDONED, "forebay_worker_hadoop_blocks_cut_total", "blocks whose client went away before their end; sealed as they were");

/// A client sends something at least every 30 s.
const PACKET_WAIT: Duration = Duration::from_secs(120);

struct Open {
    block: Arc<OpenBlock>,
    checksum: Checksum,
    block_size_bytes: u64,
    file_id: u64,
    lease_id: u64,
}

async fn open(core: &Arc<Core>, op: &wire::OpWriteBlockProto) -> Result<Open> {
    use wire::op_write_block_proto::BlockConstructionStage::PipelineSetupCreate;
    let header = &op.header.base_header;
    let claims = verify(core, header, token::WRITE).await?;
    let block = BlockId(header.block.block_id);
    if claims.block_index(block).is_none() || claims.lease_id == 0 {
        return Err(err!(Unauthenticated, "block token does not let block {block} be written"));
    }
    if op.stage() != PipelineSetupCreate {
        return Err(err!(Unsupported, "{:?}: blocks are not gone on with yet, and pipelines not recovered", op.stage()));
    }
    if !op.targets.is_empty() {
        return Err(err!(Unsupported, "pipelines of several workers are not offered yet"));
    }
    if *core.leaving.borrow() {
        return Err(err!(Unavailable, "this worker is to leave: it takes nothing new"));
    }
    if core.store.has(block) {
        return Err(err!(AlreadyExists, "block {block} is on this worker already"));
    }
    let checksum = Checksum::of(&op.requested_checksum)?;
    // A token outlives its lease.
    hold(core, claims.file_id, claims.lease_id).await?;
    let writer = BlockWriter::new(core.store.clone(), &claims, block, true);
    let (file_id, lease_id, block_size_bytes) = (claims.file_id, claims.lease_id, claims.block_size_bytes);
    Ok(Open { block: core.open_blocks.begin(writer)?, checksum, block_size_bytes, file_id, lease_id })
}

/// Errors: `Expired` when the lease is over.
async fn hold(core: &Core, file_id: u64, lease_id: u64) -> Result<()> {
    core.master.hold_lease(file_id, lease_id, Instant::now() + MASTER_WAIT).await.map(drop)
}

/// Errors: the connection is of no use any more; what was acknowledged stays.
pub async fn write_block(core: &Arc<Core>, peer: &mut Peer, op: wire::OpWriteBlockProto, shutdown: &CancellationToken) -> Result<()> {
    let open = match open(core, &op).await {
        Ok(open) => open,
        Err(e) => return send(&mut peer.writer, &wire::BlockOpResponseProto { first_bad_link: Some(String::new()), ..refusal(&e) }).await,
    };
    let written = write_open(core, peer, &open, shutdown).await;
    if let Err(e) = &written {
        // Sealed already where it was ended, by the client or by whoever recovered the lease.
        if let Some(length @ 1..) = end(core, &open.block, true).await? {
            ABANDONED.inc();
            tracing::info!(file = open.file_id, length, error = %e, "a block is cut: its client went away, or could not go on");
        }
    }
    written
}

async fn write_open(core: &Arc<Core>, peer: &mut Peer, open: &Open, shutdown: &CancellationToken) -> Result<()> {
    let answer = wire::BlockOpResponseProto {
        status: wire::Status::Success as i32,
        first_bad_link: Some(String::new()),
        ..wire::BlockOpResponseProto::default()
    };
    send(&mut peer.writer, &answer).await?;
    let last = packets(peer, open, shutdown).await?;
    let ended = match hold(core, open.file_id, open.lease_id).await {
        Ok(()) => end(core, &open.block, true).await,
        // The file is completed, or gone: nobody wants the block.
        Err(e) if e.kind() == ErrorKind::Expired => end(core, &open.block, false).await.and(Err(e)),
        Err(e) => Err(e),
    };
    match ended {
        Ok(Some(_)) => acknowledge(peer, last, wire::Status::Success).await,
        Ok(None) => {
            acknowledge(peer, last, wire::Status::Error).await?;
            Err(err!(Expired, "the block was sealed before its end: its lease is over"))
        }
        Err(e) => {
            acknowledge(peer, last, wire::Status::Error).await?;
            Err(e)
        }
    }
}

/// Takes packets until the last; returns its number, not acknowledged yet.
async fn packets(peer: &mut Peer, open: &Open, shutdown: &CancellationToken) -> Result<i64> {
    loop {
        // Acknowledgements go out together when nothing more is at hand.
        if peer.reader.buffer().is_empty() {
            peer.writer.flush().await.map_err(|e| Error::io("acknowledging", &e))?;
        }
        let packet = tokio::select! {
            () = shutdown.cancelled() => return Err(err!(Unavailable, "this worker is stopping")),
            packet = tokio::time::timeout(PACKET_WAIT, Packet::read(&mut peer.reader)) => packet,
        };
        let packet = packet.unwrap_or_else(|_| Err(err!(Timeout, "a Hadoop client is silent in the middle of a block")))?;
        if packet.seqno != HEARTBEAT_SEQNO {
            if let Err(e) = take(open, &packet) {
                acknowledge(peer, packet.seqno, super::status_of(&e)).await?;
                return Err(e);
            }
            if packet.last {
                return Ok(packet.seqno);
            }
        }
        put_acknowledgement(peer, packet.seqno, wire::Status::Success).await?;
    }
}

/// Compares and writes. A packet after a flush begins with the chunk that was not full then: what of it is here already is passed over.
fn take(open: &Open, packet: &Packet) -> Result<()> {
    let length = open.block.acknowledged();
    let chunk = open.checksum.chunk_bytes as u64;
    let bytes = packet.data.len() as u64;
    if packet.offset > length || packet.offset + bytes > open.block_size_bytes {
        return Err(err!(
            InvalidArgument,
            "a packet at {} of {bytes} bytes: {length} are here, and a block has {}",
            packet.offset,
            open.block_size_bytes
        ));
    }
    let first = (chunk - packet.offset % chunk) as usize;
    open.checksum.verify(&packet.data, &packet.sums, first)?;
    let known = usize::try_from(length - packet.offset).unwrap_or(usize::MAX);
    let fresh = packet.data.get(known..).unwrap_or_default();
    // Room may have to be waited for, and a disk takes its time.
    tokio::task::block_in_place(|| open.block.append(fresh, packet.sync))?;
    WRITTEN.inc_by(fresh.len() as u64);
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

async fn put_acknowledgement(peer: &mut Peer, seqno: i64, status: wire::Status) -> Result<()> {
    let ack = wire::PipelineAckProto { seqno, reply: vec![status as i32], downstream_ack_time_nanos: Some(0), flag: vec![status as u32] };
    peer.writer.write_all(&ack.encode_length_delimited_to_vec()).await.map_err(|e| Error::io("acknowledging", &e))
}

async fn acknowledge(peer: &mut Peer, seqno: i64, status: wire::Status) -> Result<()> {
    put_acknowledgement(peer, seqno, status).await?;
    peer.writer.flush().await.map_err(|e| Error::io("acknowledging", &e))
}
