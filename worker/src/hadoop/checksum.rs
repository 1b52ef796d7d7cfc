//! BLOCK_CHECKSUM: what `-checksum` and distcp compare. MD5 of the CRC32Cs of each 512 bytes, as HDFS has it by default, or the CRC32C of all.
//!
//! Source: `org.apache.hadoop.hdfs.server.datanode.BlockChecksumHelper` 3.4.1.

use super::verify;
use crate::core::Core;
use crate::read_out::ReadOut;
use crate::ufs_read::{self, Target};
use forebay_common::token;
use forebay_common::{BlockId, Result, checksum, err};
use forebay_hdfs::hadoop::hdfs as wire;
use md5::{Digest, Md5};
use std::sync::Arc;

/// Bytes of one CRC, by which two clusters compare equal: HDFS's default.
const BYTES_PER_CRC: usize = 512;

pub async fn block_checksum(core: &Arc<Core>, op: &wire::OpBlockChecksumProto) -> Result<wire::BlockOpResponseProto> {
    let claims = verify(core, &op.header, token::READ).await?;
    let target = Target::of(&claims, BlockId(op.header.block.block_id))?;
    // Of a part from the start, where the client wants a part of the file.
    let length = match op.header.block.num_bytes() {
        0 => target.header.length_bytes,
        wanted => wanted.min(target.header.length_bytes),
    };
    let options = op.block_checksum_options.unwrap_or_default();
    let composite = options.block_checksum_type() == wire::BlockChecksumTypeProto::CompositeCrc;
    if composite && options.stripe_length() > 0 {
        return Err(err!(Unsupported, "striped checksums: there is no erasure coding here"));
    }
    let block = ufs_read::block_of(core, &target);
    let mut out = ReadOut::new(core, &target, block.as_ref(), 0..length, core.config.fetch_readahead.as_u64());
    let (mut sums, mut whole, mut crcs) = (Md5::new(), 0, 0u64);
    // Pieces end at chunks of 64 KiB, so that none of the small ones is cut.
    while let Some(piece) = out.next().await? {
        if composite {
            whole = checksum::append(whole, &piece.bytes);
        } else {
            piece.bytes.chunks(BYTES_PER_CRC).for_each(|chunk| sums.update(checksum::crc32c(chunk).to_be_bytes()));
        }
        crcs += piece.bytes.len().div_ceil(BYTES_PER_CRC) as u64;
    }
    let response = wire::OpBlockChecksumResponseProto {
        bytes_per_crc: BYTES_PER_CRC as u32,
        crc_per_block: crcs,
        block_checksum: if composite { whole.to_be_bytes().to_vec() } else { sums.finalize().to_vec() }.into(),
        crc_type: Some(wire::ChecksumTypeProto::ChecksumCrc32c as i32),
        block_checksum_options: Some(options),
    };
    Ok(wire::BlockOpResponseProto {
        status: wire::Status::Success as i32,
        checksum_response: Some(response),
        ..wire::BlockOpResponseProto::default()
    })
}
