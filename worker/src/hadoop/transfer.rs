//! TRANSFER_BLOCK: what there is of a block that is being written goes to another worker, which takes the place of one that failed in its pipeline.
//!
//! Asked for by the client, whose token names both. Invariant: all that was acknowledged goes, and the other worker acknowledges it before the client is told.
//! Source: `DataXceiver.transferBlock` and `DataNode.DataTransfer` 3.4.1.

use super::pipeline::{Ack, Mirror};
use super::verify;
use crate::core::Core;
use forebay_common::token;
use forebay_common::{BlockId, Error, Result, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{Checksum, Packet};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use wire::op_write_block_proto::BlockConstructionStage::TransferRbw;

counter!(TRANSFERRED, "forebay_worker_hadoop_blocks_transferred_total", "unfinished blocks copied to another worker that takes a failed one's place");

/// A whole number of chunks of 512.
const PACKET_BYTES: u64 = 512 << 10;
/// How long the other worker may take to take one.
const PACKET_WAIT: Duration = Duration::from_secs(30);
const CHECKSUM: Checksum = Checksum { kind: wire::ChecksumTypeProto::ChecksumCrc32c, chunk_bytes: 512 };

pub async fn transfer_block(core: &Arc<Core>, op: &wire::OpTransferBlockProto) -> Result<wire::BlockOpResponseProto> {
    let header = &op.header.base_header;
    let claims = verify(core, header, token::WRITE).await?;
    let id = BlockId(header.block.block_id);
    if !claims.covers(id) || claims.lease_id == 0 {
        return Err(err!(Unauthenticated, "block token does not let block {id} be copied"));
    }
    let (next, rest) = op.targets.split_first().ok_or_else(|| err!(InvalidArgument, "a transfer without a target"))?;
    let open = tokio::task::block_in_place(|| core.open_blocks.get(id))?.ok_or_else(|| err!(NotFound, "block {id} is not open on this worker"))?;
    let request = wire::OpWriteBlockProto {
        header: op.header.clone(),
        targets: rest.to_vec(),
        stage: TransferRbw as i32,
        pipeline_size: u32::try_from(op.targets.len()).unwrap_or(1),
        latest_generation_stamp: header.block.generation_stamp,
        requested_checksum: CHECKSUM.to_proto(),
        ..wire::OpWriteBlockProto::default()
    };
    let mirror = Mirror::begin(next, &request).await.map_err(|(_, e)| e)?;
    let (mut to, mut from) = mirror.split();
    let failed = |e: std::io::Error| Error::io("sending a block on", &e);
    let (seqnos, mut sent) = tokio::sync::mpsc::unbounded_channel();
    let send = async {
        let (mut seqno, mut offset) = (0, 0);
        loop {
            let data = tokio::task::block_in_place(|| open.read_on(offset, PACKET_BYTES))?;
            let last = data.is_empty();
            let mut sums = bytes::BytesMut::with_capacity(CHECKSUM.sums_len(data.len()));
            CHECKSUM.put_sums(&data, &mut sums);
            let packet = Packet { offset, seqno, last, sync: false, sums: sums.freeze(), data };
            let head = packet.encode_head();
            let sent = tokio::time::timeout(PACKET_WAIT, async {
                to.write_all(&head).await?;
                to.write_all(&packet.data).await
            });
            sent.await.map_err(|_| err!(Timeout, "the other worker does not take a packet"))?.map_err(failed)?;
            let _ = seqnos.send(seqno);
            (seqno, offset) = (seqno + 1, offset + packet.data.len() as u64);
            if last {
                drop(seqnos);
                return to.flush().await.map_err(failed).map(|()| offset);
            }
        }
    };
    let receive = async {
        while let Some(seqno) = sent.recv().await {
            let reply = from.next(&Ack { seqno, status: wire::Status::Success, length: 0 }).await?;
            if reply.iter().any(|status| *status != wire::Status::Success as i32) {
                return Err(err!(Unavailable, "a worker did not take block {id}"));
            }
        }
        Ok(())
    };
    let (length, ()) = tokio::try_join!(send, receive)?;
    TRANSFERRED.inc();
    tracing::info!(block = %id, length, to = next.id.ip_addr, "an unfinished block is copied to another worker of its pipeline");
    Ok(wire::BlockOpResponseProto { status: wire::Status::Success as i32, ..wire::BlockOpResponseProto::default() })
}
