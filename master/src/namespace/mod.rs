//! Questions about the namespace, asked by services over a snapshot and by `apply` over the command being applied.

pub mod acl;
mod permission;
mod resolve;

pub use permission::{EXECUTE, READ, WRITE, Who, check, check_folder_of, check_owner, check_sticky, check_traverse};
pub use resolve::{Found, Walk, walk};

use forebay_common::BlockId;
use forebay_common::layout::Layout;
use forebay_common::token::BlockRun;
use forebay_proto::store::Inode;

/// The runs of block ids of a file, in order.
pub fn block_runs(inode: &Inode) -> Vec<BlockRun> {
    inode.block_runs.chunks_exact(2).map(|c| BlockRun { first: c[0], count: c[1] }).collect()
}

/// Every block id of a file, in order.
pub fn block_ids(inode: &Inode) -> impl Iterator<Item = BlockId> + '_ {
    inode.block_runs.chunks_exact(2).flat_map(|c| c[0]..c[0] + c[1]).map(BlockId)
}

/// Where the blocks of a file lie in it.
pub fn layout(inode: &Inode) -> Layout<'_> {
    Layout { block_size_bytes: inode.block_size_bytes, length_bytes: inode.length, short: &inode.short_blocks }
}

/// Every block of a file with its offset and length, in order.
pub fn blocks(inode: &Inode) -> impl Iterator<Item = (BlockId, (u64, u64))> + '_ {
    block_ids(inode).zip(layout(inode).spans())
}

/// Whether a block is one of a file's.
pub fn has_block(inode: &Inode, block: BlockId) -> bool {
    inode.block_runs.chunks_exact(2).any(|run| (run[0]..run[0] + run[1]).contains(&block.get()))
}

/// Blocks that `length` bytes take.
pub fn blocks_for(length: u64, block_size_bytes: u64) -> u64 {
    length.div_ceil(block_size_bytes.max(1))
}
