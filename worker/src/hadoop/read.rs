//! READ_BLOCK: a range of a block in packets, with a checksum per chunk, or with none where the client wants none.

use super::open::OpenBlock;
use super::server::Peer;
use super::{READ, refusal, send, target_of, verify};
use crate::core::Core;
use crate::read_out::ReadOut;
use crate::ufs_read::{self, Target};
use bytes::{Buf, BufMut, Bytes};
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::token;
use forebay_common::{BlockId, Error, Result, err};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{Checksum, Packet, read_delimited};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// How long a client may take to say that it has read all.
const STATUS_WAIT: Duration = Duration::from_secs(60);

/// Bytes of one packet of a block that is being written.
const OPEN_PACKET_BYTES: u64 = 256 << 10;
/// How long a client may take to take what it is sent, as `dfs.datanode.socket.write.timeout` there.
const WRITE_WAIT: Duration = Duration::from_secs(480);

struct Wanted {
    target: Target,
    /// It is being written.
    open: Option<Arc<OpenBlock>>,
    /// Rounded to chunks.
    range: Range<u64>,
    checksum: Checksum,
}

async fn wanted(core: &Arc<Core>, op: &wire::OpReadBlockProto) -> Result<Wanted> {
    let header = &op.header.base_header;
    let claims = verify(core, header, token::READ).await?;
    let id = BlockId(header.block.block_id);
    // Under a lease: how long it is by now is known here alone.
    let under_lease = claims.lease_id > 0;
    let open = if under_lease { tokio::task::block_in_place(|| core.open_blocks.get(id))? } else { None };
    let length = match &open {
        Some(open) => Some(open.acknowledged()),
        None if under_lease => core.store.peek_read(id).map(|b| b.header.length_bytes),
        None => None,
    };
    let target = target_of(&claims, id, length)?;
    let length = target.header.length_bytes;
    let end = op.offset.checked_add(op.len).filter(|end| *end <= length && op.offset <= *end);
    let end = end.ok_or_else(|| err!(InvalidArgument, "range {}+{} does not lie in block {} of {length} bytes", op.offset, op.len, target.block))?;
    let checksum = checksum_of(core, op.send_checksums());
    let chunk = checksum.chunk_bytes as u64;
    let range = op.offset / chunk * chunk..end.next_multiple_of(chunk).min(length);
    Ok(Wanted { target, open, range, checksum })
}

/// What a client's bytes are summed with.
fn checksum_of(core: &Core, wanted: bool) -> Checksum {
    use wire::ChecksumTypeProto::{ChecksumCrc32c, ChecksumNull};
    let kind = if wanted && core.config.hadoop_checksums { ChecksumCrc32c } else { ChecksumNull };
    Checksum { kind, chunk_bytes: usize::try_from(core.config.hadoop_chunk.as_u64()).unwrap_or(CHUNK_SIZE_BYTES) }
}

/// Errors: the stream broke, or the bytes could not be had in the middle of it: the client goes on elsewhere.
pub async fn read_block(core: &Arc<Core>, peer: &mut Peer, op: wire::OpReadBlockProto) -> Result<()> {
    let Wanted { target, open, range, checksum } = match wanted(core, &op).await {
        Ok(wanted) => wanted,
        Err(e) => {
            send(&mut peer.writer, &refusal(&e)).await?;
            return Ok(());
        }
    };
    let info = wire::ReadOpChecksumInfoProto { checksum: checksum.to_proto(), chunk_offset: range.start };
    let answer = wire::BlockOpResponseProto {
        status: wire::Status::Success as i32,
        read_op_checksum_info: Some(info),
        ..wire::BlockOpResponseProto::default()
    };
    send(&mut peer.writer, &answer).await?;
    let (mut seqno, end) = (0, range.end);
    if let Some(open) = open {
        let mut at = range.start;
        while at < end {
            let stop = end.min((at / OPEN_PACKET_BYTES + 1) * OPEN_PACKET_BYTES);
            let bytes = tokio::task::block_in_place(|| open.read(at..stop))?;
            let mut head = Packet::head(at, seqno, false, false, checksum.sums_len(bytes.len()), bytes.len());
            checksum.put_sums(&bytes, &mut head);
            READ.inc_by(bytes.len() as u64);
            put(peer, head.freeze(), bytes).await?;
            (seqno, at) = (seqno + 1, stop);
        }
        return finish(peer, &target, seqno, end).await;
    }
    let block = ufs_read::block_of(core, &target);
    let mut out = ReadOut::new(core, &target, block.as_ref(), range, core.config.fetch_readahead.as_u64());
    while let Some(piece) = out.next().await? {
        let mut head = Packet::head(piece.offset, seqno, false, false, checksum.sums_len(piece.bytes.len()), piece.bytes.len());
        // A piece begins at a chunk of ours, and ends at one or at the end of what is wanted.
        if checksum.kind == wire::ChecksumTypeProto::ChecksumCrc32c && checksum.chunk_bytes == CHUNK_SIZE_BYTES {
            piece.crcs.iter().for_each(|crc| head.put_u32(*crc));
        } else {
            checksum.put_sums(&piece.bytes, &mut head);
        }
        READ.inc_by(piece.bytes.len() as u64);
        put(peer, head.freeze(), piece.bytes).await?;
        seqno += 1;
    }
    finish(peer, &target, seqno, end).await
}

/// The last packet, which is empty, and what the client says to it.
async fn finish(peer: &mut Peer, target: &Target, seqno: i64, end: u64) -> Result<()> {
    let last = Packet::head(end, seqno, true, false, 0, 0).freeze();
    put(peer, last, Bytes::new()).await?;
    peer.writer.flush().await.map_err(|e| Error::io("sending a block", &e))?;
    // One that read less, or closed, has what it wanted.
    match tokio::time::timeout(STATUS_WAIT, read_delimited::<wire::ClientReadStatusProto>(&mut peer.reader)).await {
        Ok(Ok(said)) => {
            if said.status() == wire::Status::ErrorChecksum {
                tracing::warn!(block = %target.block, "a Hadoop client met a wrong checksum");
            }
            Ok(())
        }
        Ok(Err(e)) => Err(e),
        Err(_) => Err(err!(Timeout, "a Hadoop client does not say that it has read a block")),
    }
}

/// Head and data of a packet; large data go past the buffer, together with what is in it.
async fn put(peer: &mut Peer, head: Bytes, data: Bytes) -> Result<()> {
    let mut both = head.chain(data);
    match tokio::time::timeout(WRITE_WAIT, peer.writer.write_all_buf(&mut both)).await {
        Ok(written) => written.map_err(|e| Error::io("sending a block", &e)),
        Err(_) => Err(err!(Timeout, "a Hadoop client does not take what it is sent")),
    }
}
