//! The worker as a DataNode: DataTransferProtocol in front of the same block store.
//!
//! `server` takes connections and hands each request to `read` (with read-through of what is missing, in the stream), `write` (one block, on through its
//! `pipeline`), `transfer` (an unfinished block to another worker), `checksum` or, over a Unix socket, `short_circuit` with its `slots`. Invariants: nothing is done without a block token; a chunk leaves only after it
//! was compared with its CRC; a packet is acknowledged after its bytes were compared with their checksums and written; the last one
//! after the block was sealed and the master told.

mod checksum;
mod front;
mod open;
mod pipeline;
mod read;
mod replica;
mod server;
mod short_circuit;
mod slots;
mod transfer;
mod write;

pub use front::Front;
pub use open::OpenBlocks;
use server::Listener;
pub use short_circuit::GRANTED;
pub use slots::Slots;

use crate::core::Core;
use crate::ufs_read::Target;
use forebay_common::counter;
use forebay_common::token::Claims;
use forebay_common::{BlockId, Error, ErrorKind, Result};
use forebay_hdfs::hadoop::hdfs::{BaseHeaderProto, BlockOpResponseProto, Status};
use prost::Message;
use tokio::io::{AsyncWrite, AsyncWriteExt};

counter!(pub READ, "forebay_worker_hadoop_read_bytes_total", "bytes sent to Hadoop clients");
counter!(pub WRITTEN, "forebay_worker_hadoop_written_bytes_total", "bytes taken in from Hadoop clients");

/// Verifies the token of a request.
async fn verify(core: &Core, header: &BaseHeaderProto, right: u32) -> Result<Claims> {
    let token = header.token.as_ref().map(|t| t.identifier.clone()).unwrap_or_default();
    core.verify(&token, right).await
}

/// Where a block is in its file. Of a file that is being written the token does not know how long a block is: `length` does.
fn target_of(claims: &Claims, block: BlockId, length: Option<u64>) -> Result<Target> {
    let Some(length) = length else { return Target::of(claims, block) };
    let offset = claims.block_offset(block).unwrap_or(0);
    Target::of(&Claims { length_bytes: offset.saturating_add(length), ..claims.clone() }, block)
}

/// What a failure is called in an answer. A refused token has the client ask the master for another.
fn status_of(e: &Error) -> Status {
    match e.kind() {
        ErrorKind::Unauthenticated => Status::ErrorAccessToken,
        ErrorKind::Unsupported => Status::ErrorUnsupported,
        ErrorKind::Corrupt => Status::ErrorChecksum,
        ErrorKind::AlreadyExists => Status::ErrorExists,
        _ => Status::Error,
    }
}

fn refusal(e: &Error) -> BlockOpResponseProto {
    BlockOpResponseProto { status: status_of(e) as i32, message: Some(e.to_string()), ..BlockOpResponseProto::default() }
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), message: &impl Message) -> Result<()> {
    let raw = message.encode_length_delimited_to_vec();
    writer.write_all(&raw).await.map_err(|e| Error::io("answering a Hadoop client", &e))?;
    writer.flush().await.map_err(|e| Error::io("answering a Hadoop client", &e))
}
