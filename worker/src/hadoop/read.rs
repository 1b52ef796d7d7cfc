//! READ_BLOCK: a range of a block in packets, with a checksum per chunk, or with none where the client wants none.

use super::server::Peer;
use super::{READ, refusal, send, verify};
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

struct Wanted {
    target: Target,
    /// Rounded to chunks.
    range: Range<u64>,
    checksum: Checksum,
}

async fn wanted(core: &Arc<Core>, op: &wire::OpReadBlockProto) -> Result<Wanted> {
    let header = &op.header.base_header;
    let claims = verify(core, header, token::READ).await?;
    let target = Target::of(&claims, BlockId(header.block.block_id))?;
    let length = target.header.length_bytes;
    let end = op.offset.checked_add(op.len).filter(|end| *end <= length && op.offset <= *end);
    let end = end.ok_or_else(|| err!(InvalidArgument, "range {}+{} does not lie in block {} of {length} bytes", op.offset, op.len, target.block))?;
    let checksum = checksum_of(core, op.send_checksums());
    let chunk = checksum.chunk_bytes as u64;
    let range = op.offset / chunk * chunk..end.next_multiple_of(chunk).min(length);
    Ok(Wanted { target, range, checksum })
}

/// What a client's bytes are summed with.
fn checksum_of(core: &Core, wanted: bool) -> Checksum {
    use wire::ChecksumTypeProto::{ChecksumCrc32c, ChecksumNull};
    let kind = if wanted && core.config.hadoop_checksums { ChecksumCrc32c } else { ChecksumNull };
    Checksum { kind, chunk_bytes: usize::try_from(core.config.hadoop_chunk.as_u64()).unwrap_or(CHUNK_SIZE_BYTES) }
}

/// Errors: the stream broke, or the bytes could not be had in the middle of it: the client goes on elsewhere.
pub async fn read_block(core: &Arc<Core>, peer: &mut Peer, op: wire::OpReadBlockProto) -> Result<()> {
    let Wanted { target, range, checksum } = match wanted(core, &op).await {
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
    let block = ufs_read::block_of(core, &target);
    let (mut seqno, end) = (0, range.end);
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
    peer.writer.write_all_buf(&mut both).await.map_err(|e| Error::io("sending a block", &e))
}
