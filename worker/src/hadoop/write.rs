//! WRITE_BLOCK: one block, from its client alone; its bytes are nowhere else until its file is in an under store.
//!
//! Packets are acknowledged in order once their bytes are written. What a client leaves behind in the middle of a block is sealed as it
//! is: whoever recovers the lease finds what was acknowledged.

use super::server::Peer;
use super::{WRITTEN, refusal, send, verify};
use crate::core::Core;
use crate::write::BlockWriter;
use forebay_common::token;
use forebay_common::{BlockId, Error, Result, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{Checksum, HEARTBEAT_SEQNO, Packet};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

counter!(ABANDONED, "forebay_worker_hadoop_blocks_cut_total", "blocks whose client went away before their end; sealed as they were");

/// A client sends something at least every 30 s.
const PACKET_WAIT: Duration = Duration::from_secs(120);

struct Open {
    writer: BlockWriter,
    checksum: Checksum,
    block_size_bytes: u64,
}

async fn open(core: &Arc<Core>, op: &wire::OpWriteBlockProto) -> Result<Open> {
    use wire::op_write_block_proto::BlockConstructionStage::PipelineSetupCreate;
    let header = &op.header.base_header;
    let claims = verify(core, header, token::WRITE).await?;
    let block = BlockId(header.block.block_id);
    if claims.block_index(block).is_none() {
        return Err(err!(Unauthenticated, "block token does not cover block {block}"));
    }
    if op.stage() != PipelineSetupCreate {
        return Err(err!(Unsupported, "{:?}: blocks are not gone on with yet, and pipelines not recovered", op.stage()));
    }
    if !op.targets.is_empty() {
        return Err(err!(Unsupported, "pipelines of several workers are not offered yet"));
    }
    if core.store.has(block) {
        return Err(err!(AlreadyExists, "block {block} is on this worker already"));
    }
    let writer = BlockWriter::new(core.store.clone(), &claims, block, true);
    Ok(Open { writer, checksum: Checksum::of(&op.requested_checksum)?, block_size_bytes: claims.block_size_bytes })
}

/// Errors: the connection is of no use any more; what was acknowledged stays.
pub async fn write_block(core: &Arc<Core>, peer: &mut Peer, op: wire::OpWriteBlockProto) -> Result<()> {
    let mut open = match open(core, &op).await {
        Ok(open) => open,
        Err(e) => return send(&mut peer.writer, &wire::BlockOpResponseProto { first_bad_link: Some(String::new()), ..refusal(&e) }).await,
    };
    let answer = wire::BlockOpResponseProto {
        status: wire::Status::Success as i32,
        first_bad_link: Some(String::new()),
        ..wire::BlockOpResponseProto::default()
    };
    send(&mut peer.writer, &answer).await?;
    match packets(peer, &mut open).await {
        Ok(last) => {
            seal(core, open.writer).await?;
            acknowledge(peer, last, wire::Status::Success).await
        }
        Err(e) => {
            if open.writer.length() > 0 {
                ABANDONED.inc();
                tracing::info!(block = %open.writer.block(), length = open.writer.length(), error = %e, "a block is cut: its client went away");
                seal(core, open.writer).await?;
            }
            Err(e)
        }
    }
}

/// Takes packets until the last; returns its number, not acknowledged yet.
async fn packets(peer: &mut Peer, open: &mut Open) -> Result<i64> {
    loop {
        // Acknowledgements go out together when nothing more is at hand.
        if peer.reader.buffer().is_empty() {
            peer.writer.flush().await.map_err(|e| Error::io("acknowledging", &e))?;
        }
        let packet = match tokio::time::timeout(PACKET_WAIT, Packet::read(&mut peer.reader)).await {
            Ok(packet) => packet?,
            Err(_) => return Err(err!(Timeout, "a Hadoop client is silent in the middle of a block")),
        };
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
fn take(open: &mut Open, packet: &Packet) -> Result<()> {
    let length = open.writer.length();
    let chunk = open.checksum.chunk_bytes as u64;
    if packet.offset > length || packet.offset + packet.data.len() as u64 > open.block_size_bytes {
        return Err(err!(
            InvalidArgument,
            "a packet at {} of {} bytes: {length} are here, and a block has {}",
            packet.offset,
            packet.data.len(),
            open.block_size_bytes
        ));
    }
    let first = (chunk - packet.offset % chunk) as usize;
    open.checksum.verify(&packet.data, &packet.sums, first)?;
    let known = usize::try_from(length - packet.offset).unwrap_or(usize::MAX);
    let fresh = packet.data.get(known..).unwrap_or_default();
    // Room may have to be waited for, and a disk takes its time.
    tokio::task::block_in_place(|| {
        if !fresh.is_empty() {
            WRITTEN.inc_by(fresh.len() as u64);
            open.writer.append(fresh)?;
        }
        if packet.sync { open.writer.sync() } else { Ok(()) }
    })
}

/// Seals a block, takes it in, and has the master know.
async fn seal(core: &Arc<Core>, writer: BlockWriter) -> Result<()> {
    if writer.length() == 0 {
        return Ok(());
    }
    let store = core.store.clone();
    let sealed = tokio::task::spawn_blocking(move || writer.seal().and_then(|file| store.insert(Arc::new(file)))).await;
    sealed.map_err(|e| err!(Internal, "write task: {e}"))??;
    core.reporter.report_now().await;
    Ok(())
}

async fn put_acknowledgement(peer: &mut Peer, seqno: i64, status: wire::Status) -> Result<()> {
    let ack = wire::PipelineAckProto { seqno, reply: vec![status as i32], downstream_ack_time_nanos: Some(0), flag: vec![status as u32] };
    peer.writer.write_all(&ack.encode_length_delimited_to_vec()).await.map_err(|e| Error::io("acknowledging", &e))
}

async fn acknowledge(peer: &mut Peer, seqno: i64, status: wire::Status) -> Result<()> {
    put_acknowledgement(peer, seqno, status).await?;
    peer.writer.flush().await.map_err(|e| Error::io("acknowledging", &e))
}
