//! REQUEST_SHORT_CIRCUIT_FDS: the descriptors of a block, passed over a Unix socket; a client then reads without us.
//!
//! The data file is opened afresh through the read-only mount of its tier; beside it goes a meta file of the client's own, made from the
//! block's checksums (CRC32C of 64 KiB), so that it verifies by itself. A block that is not here whole is answered "unsupported" *with* a
//! version, which has the client fall back for that file alone. A client that names a slot of shared memory (`slots`) learns by it that the block has left;
//! what it holds counts as used until it lets go, as the lease probe says. Source: `DataXceiver.requestShortCircuitFds` and `BlockMetadataHeader` 3.4.1.

use super::server::Peer;
use super::slots::Slot;
use super::{refusal, send, verify};
use crate::core::Core;
use crate::store::{Block, BlockFile};
use crate::ufs_read::{Target, block_of};
use forebay_common::error::at;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::token;
use forebay_common::{BlockId, Error, ErrorKind, Result, counter, err};
use forebay_hdfs::hadoop::hdfs as wire;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;

counter!(pub GRANTED, "forebay_worker_hadoop_grants_total", "blocks handed out to Hadoop clients by descriptor");
counter!(NOT_WHOLE, "forebay_worker_hadoop_grants_not_whole_total", "blocks that were asked for by descriptor, and were not here whole");

/// The version of what is passed: a data file and a meta file.
const VERSION: u32 = 1;
/// Of the meta file: its own version, and the type of its checksums.
const META_VERSION: u16 = 1;
const META_CRC32C: u8 = 2;
/// How long a client may take to say that the descriptors arrived.
const RECEIPT_WAIT: Duration = Duration::from_secs(30);
/// How long one byte waits for room in the client's socket.
const SEND_TRIES: u32 = 1_000;

/// Errors: the connection is of no use any more.
pub async fn request_fds(core: &Arc<Core>, peer: &mut Peer, op: wire::OpRequestShortCircuitAccessProto) -> Result<()> {
    let opened =
        if peer.socket.is_none() { Err(err!(Unsupported, "descriptors are passed over a Unix socket alone")) } else { open(core, &op).await };
    let (descriptors, block) = match opened {
        Ok(opened) => opened,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            NOT_WHOLE.inc();
            let answer = wire::BlockOpResponseProto { short_circuit_access_version: Some(VERSION), ..refusal(&err!(Unsupported, "{}", e.message())) };
            return send(&mut peer.writer, &answer).await;
        }
        Err(e) => return send(&mut peer.writer, &refusal(&e)).await,
    };
    let slot = match register(core, &op, &block) {
        Ok(slot) => slot,
        Err(e) => return send(&mut peer.writer, &refusal(&e)).await,
    };
    let handed = hand_over(peer, op.supports_receipt_verification(), descriptors).await;
    if let (Err(_), Some(slot)) = (&handed, slot) {
        // Its client may have given it back itself.
        let _ = core.slots.release(slot);
    }
    handed
}

async fn hand_over(peer: &mut Peer, receipt: bool, descriptors: [OwnedFd; 2]) -> Result<()> {
    let answer = wire::BlockOpResponseProto {
        status: wire::Status::Success as i32,
        short_circuit_access_version: Some(VERSION),
        ..wire::BlockOpResponseProto::default()
    };
    send(&mut peer.writer, &answer).await?;
    // In a message of their own: the answer is read without looking for descriptors.
    let Some(socket) = &peer.socket else { return Ok(()) };
    pass(socket, u8::from(receipt), &descriptors).await?;
    GRANTED.inc();
    if receipt {
        match tokio::time::timeout(RECEIPT_WAIT, peer.reader.read_u8()).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return Err(Error::io("a client took no descriptors", &e)),
            Err(_) => return Err(err!(Timeout, "a client does not say that descriptors arrived")),
        }
    }
    Ok(())
}

/// The block's slot, where the client has one: from now on it hears of its end. A block that left, or moved, in between has its slot invalid at once.
fn register(core: &Core, op: &wire::OpRequestShortCircuitAccessProto, block: &Arc<Block>) -> Result<Option<Slot>> {
    let Some(slot) = op.slot_id.as_ref().map(Slot::of).transpose()? else { return Ok(None) };
    core.slots.register(slot, block.header.block)?;
    if !core.store.is_current(block) {
        core.slots.revoke(block.header.block);
    }
    Ok(Some(slot))
}

/// Data and meta file of a block, and which one it is. Errors: `NotFound` for a block that is not here whole.
async fn open(core: &Arc<Core>, op: &wire::OpRequestShortCircuitAccessProto) -> Result<([OwnedFd; 2], Arc<Block>)> {
    if op.max_version < VERSION {
        return Err(err!(Unsupported, "version {} of short-circuit access: {VERSION} is offered", op.max_version));
    }
    let claims = verify(core, &op.header, token::READ).await?;
    let target = Target::of(&claims, BlockId(op.header.block.block_id))?;
    let (core, whole) = (core.clone(), format!("block {} is not here whole", target.block));
    let opened = tokio::task::spawn_blocking(move || {
        let block = block_of(&core, &target).filter(|b| b.is_full()).ok_or_else(|| err!(NotFound, "{whole}"))?;
        if *core.leaving.borrow() {
            return Err(err!(NotFound, "this worker is to leave"));
        }
        let meta = meta_file(&block)?;
        let (data, _) = core.store.open_for_grant(&block).map_err(|e| err!(NotFound, "{}", e.message()))?;
        core.store.counters_of(&block.block.dir).hits.inc();
        Ok(([data, meta], block.block.clone()))
    });
    opened.await.map_err(|e| err!(Internal, "grant task: {e}"))?
}

/// Version, type and chunk size of the checksums, then the checksums, as a file in memory that the client alone has.
fn meta_file(block: &BlockFile) -> Result<OwnedFd> {
    let file = memfd_create(c"forebay-meta", MFdFlags::MFD_CLOEXEC).map_err(|e| Error::io("a meta file", &e.into()))?;
    let mut raw = META_VERSION.to_be_bytes().to_vec();
    raw.push(META_CRC32C);
    raw.extend_from_slice(&(CHUNK_SIZE_BYTES as u32).to_be_bytes());
    (0..block.header.chunks()).for_each(|chunk| raw.extend_from_slice(&block.chunk_crc(chunk).to_be_bytes()));
    let mut file = File::from(file);
    file.write_all(&raw).map_err(at("writing a meta file"))?;
    Ok(OwnedFd::from(file))
}

/// Passes descriptors with a byte.
pub async fn pass<const N: usize>(socket: &OwnedFd, byte: u8, descriptors: &[OwnedFd; N]) -> Result<()> {
    let raw = descriptors.each_ref().map(AsRawFd::as_raw_fd);
    for _ in 0..SEND_TRIES {
        let sent = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[byte])], &[ControlMessage::ScmRights(&raw)], MsgFlags::MSG_NOSIGNAL, None);
        match sent {
            Ok(_) => return Ok(()),
            // The client has not read what was sent before.
            Err(nix::errno::Errno::EAGAIN) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(e) => return Err(Error::io("passing descriptors", &e.into())),
        }
    }
    Err(err!(Timeout, "a client does not read what it is sent"))
}
