//! Slots of shared memory: how a Java client learns that a block it holds by descriptor is gone here.
//!
//! A client asks for a segment over the Unix socket (REQUEST_SHORT_CIRCUIT_SHM) and keeps that connection as long as it lives; it marks a slot valid and names
//! it when it asks for descriptors; before it uses them again it looks whether the slot is valid still. A block that is evicted, moved or dropped has its slots made
//! invalid. RELEASE_SHORT_CIRCUIT_FDS gives a slot back, the end of the connection all of a segment.
//!
//! Invariants: a segment can neither shrink nor grow (it is sealed), so that no access here is beyond its end whatever its client does; what a client writes
//! there is believed for nothing but its own slots; no slot is made anchorable: the client verifies checksums always.
//! Source: `org.apache.hadoop.hdfs.shortcircuit.ShortCircuitShm` and `server.datanode.ShortCircuitRegistry` 3.4.1.

use super::send;
use super::server::Peer;
use super::short_circuit::pass;
use crate::core::Core;
use forebay_common::error::at;
use forebay_common::{BlockId, Error, Result, counter, err, gauge};
use forebay_hdfs::hadoop::hdfs as wire;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::io::AsyncReadExt;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

gauge!(SEGMENTS, "forebay_worker_hadoop_segments", "segments of shared memory that Java clients hold");
gauge!(SLOTS, "forebay_worker_hadoop_slots", "blocks that Java clients hold by descriptor, with a slot of shared memory");
counter!(REVOKED, "forebay_worker_hadoop_slots_revoked_total", "slots made invalid because their block left");
counter!(REFUSED, "forebay_worker_hadoop_segments_refused_total", "segments refused because there were too many");

/// As HDFS's; a slot is 64 bytes.
const SEGMENT_BYTES: usize = 8_192;
const SLOT_BYTES: usize = 64;
const SLOTS_OF_SEGMENT: usize = SEGMENT_BYTES / SLOT_BYTES;
const VALID: u64 = 1 << 63;
const ANCHORABLE: u64 = 1 << 62;
/// Segments of all clients; each is a connection as well.
const SEGMENTS_MAX: usize = 4_096;

type SegmentId = (i64, i64);

/// All segments.
#[derive(Default)]
pub struct Slots(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    segments: HashMap<SegmentId, Segment>,
    of_block: HashMap<BlockId, Vec<Slot>>,
}

/// Which slot of which segment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    segment: SegmentId,
    index: usize,
}

struct Segment {
    map: MmapRaw,
    blocks: [Option<BlockId>; SLOTS_OF_SEGMENT],
}

impl Segment {
    #[allow(unsafe_code, reason = "words of a mapping that another process shares")]
    fn flags(&self, index: usize) -> &AtomicU64 {
        assert!(index < SLOTS_OF_SEGMENT);
        // SAFETY: within the mapping, which is as long as its sealed file, aligned to 64 bytes, and only ever accessed as atomics here.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(index * SLOT_BYTES).cast()) }
    }

    fn invalidate(&self, index: usize) {
        self.flags(index).fetch_and(!(VALID | ANCHORABLE), Ordering::AcqRel);
    }
}

impl Slot {
    /// As a client names it. Errors: there is no such slot.
    pub fn of(id: &wire::ShortCircuitShmSlotProto) -> Result<Slot> {
        let index = usize::try_from(id.slot_idx).ok().filter(|index| *index < SLOTS_OF_SEGMENT);
        let index = index.ok_or_else(|| err!(InvalidArgument, "slot {}: a segment has {SLOTS_OF_SEGMENT}", id.slot_idx))?;
        Ok(Slot { segment: (id.shm_id.hi, id.shm_id.lo), index })
    }
}

impl Inner {
    fn forget(&mut self, block: BlockId, slot: Slot) {
        if let Some(slots) = self.of_block.get_mut(&block) {
            slots.retain(|known| *known != slot);
            if slots.is_empty() {
                self.of_block.remove(&block);
            }
        }
        SLOTS.dec();
    }
}

impl Slots {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A new segment, and its file for the client.
    fn create(&self) -> Result<(SegmentId, OwnedFd)> {
        let failed = |e: nix::errno::Errno| Error::io("a segment of shared memory", &e.into());
        let file = memfd_create(c"forebay-slots", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(failed)?;
        let file = File::from(file);
        file.set_len(SEGMENT_BYTES as u64).map_err(at("a segment of shared memory"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
        let map = MmapOptions::new().len(SEGMENT_BYTES).map_raw(&file).map_err(at("a segment of shared memory"))?;
        let mut inner = self.lock();
        if inner.segments.len() >= SEGMENTS_MAX {
            REFUSED.inc();
            return Err(err!(LimitExceeded, "{SEGMENTS_MAX} segments of shared memory are in use"));
        }
        // Whoever knows it can give its slots back: it is not to be guessed.
        let id = (rand::random(), rand::random());
        inner.segments.insert(id, Segment { map, blocks: [None; SLOTS_OF_SEGMENT] });
        SEGMENTS.set(inner.segments.len() as i64);
        Ok((id, OwnedFd::from(file)))
    }

    /// The connection of a segment's client ended.
    fn remove(&self, id: SegmentId) {
        let mut inner = self.lock();
        let Some(segment) = inner.segments.remove(&id) else { return };
        for (index, block) in segment.blocks.iter().enumerate().filter_map(|(i, b)| Some((i, (*b)?))) {
            inner.forget(block, Slot { segment: id, index });
        }
        SEGMENTS.set(inner.segments.len() as i64);
    }

    /// A client holds a block, and looks at this slot. Errors: it is in use, or not marked valid by its client, or there is no such segment.
    pub fn register(&self, slot: Slot, block: BlockId) -> Result<()> {
        let mut inner = self.lock();
        let segment = inner.segments.get_mut(&slot.segment).ok_or_else(|| err!(InvalidArgument, "no such segment of shared memory"))?;
        if segment.blocks[slot.index].is_some() || segment.flags(slot.index).load(Ordering::Acquire) & VALID == 0 {
            return Err(err!(InvalidArgument, "slot {} is in use already, or was not marked as valid", slot.index));
        }
        segment.flags(slot.index).fetch_and(!ANCHORABLE, Ordering::AcqRel);
        segment.blocks[slot.index] = Some(block);
        inner.of_block.entry(block).or_default().push(slot);
        SLOTS.inc();
        Ok(())
    }

    /// A client is done with a slot. Errors: it has no such slot.
    pub fn release(&self, slot: Slot) -> Result<()> {
        let mut inner = self.lock();
        let segment = inner.segments.get_mut(&slot.segment).ok_or_else(|| err!(InvalidArgument, "no such segment of shared memory"))?;
        let block = segment.blocks[slot.index].take().ok_or_else(|| err!(InvalidArgument, "slot {} is not in use", slot.index))?;
        segment.invalidate(slot.index);
        inner.forget(block, slot);
        Ok(())
    }

    /// A block is not here any more as it was: its holders ask again.
    pub fn revoke(&self, block: BlockId) {
        let inner = self.lock();
        for slot in inner.of_block.get(&block).into_iter().flatten() {
            if let Some(segment) = inner.segments.get(&slot.segment) {
                segment.invalidate(slot.index);
                REVOKED.inc();
            }
        }
    }

    fn revoke_all(&self) {
        let inner = self.lock();
        for slot in inner.of_block.values().flatten() {
            if let Some(segment) = inner.segments.get(&slot.segment) {
                segment.invalidate(slot.index);
                REVOKED.inc();
            }
        }
    }
}

/// Takes slots back as blocks leave, until `shutdown`.
pub async fn follow_evictions(core: Arc<Core>, shutdown: CancellationToken) {
    let mut evictions = core.store.evictions();
    loop {
        let evicted = tokio::select! {
            () = shutdown.cancelled() => return,
            evicted = evictions.recv() => evicted,
        };
        match evicted {
            Ok(block) => core.slots.revoke(block),
            Err(RecvError::Lagged(_)) => core.slots.revoke_all(),
            Err(RecvError::Closed) => return,
        }
    }
}

/// Errors: the connection is over, as is its segment.
pub async fn request_shm(core: &Core, peer: &mut Peer, shutdown: &CancellationToken) -> Result<()> {
    let refused = |e: &Error| wire::ShortCircuitShmResponseProto { status: super::status_of(e) as i32, error: Some(e.to_string()), id: None };
    let Some(socket) = &peer.socket else {
        let e = err!(Unsupported, "segments of shared memory are passed over a Unix socket alone");
        return send(&mut peer.writer, &refused(&e)).await;
    };
    let (id, file) = match core.slots.create() {
        Ok(created) => created,
        Err(e) => return send(&mut peer.writer, &refused(&e)).await,
    };
    let answer = wire::ShortCircuitShmResponseProto {
        status: wire::Status::Success as i32,
        error: None,
        id: Some(wire::ShortCircuitShmIdProto { hi: id.0, lo: id.1 }),
    };
    let passed = match send(&mut peer.writer, &answer).await {
        Ok(()) => pass(socket, 0, &[file]).await,
        Err(e) => Err(e),
    };
    // It says nothing more on this connection; its end is the segment's.
    let ended = match passed {
        Ok(()) => tokio::select! {
            () = shutdown.cancelled() => err!(Unavailable, "this worker is stopping"),
            read = peer.reader.read_u8() => match read {
                Ok(_) => err!(InvalidArgument, "bytes on the connection of a segment of shared memory"),
                Err(_) => err!(Unavailable, "the client of a segment of shared memory ended"),
            },
        },
        Err(e) => e,
    };
    core.slots.remove(id);
    Err(ended)
}

/// A client gives a slot back.
pub fn release(core: &Core, request: &wire::ReleaseShortCircuitAccessRequestProto) -> wire::ReleaseShortCircuitAccessResponseProto {
    match Slot::of(&request.slot_id).and_then(|slot| core.slots.release(slot)) {
        Ok(()) => wire::ReleaseShortCircuitAccessResponseProto { status: wire::Status::Success as i32, error: None },
        Err(e) => wire::ReleaseShortCircuitAccessResponseProto { status: super::status_of(&e) as i32, error: Some(e.to_string()) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_and_go() {
        let slots = Slots::default();
        let (id, file) = slots.create().unwrap();
        let of_client = MmapOptions::new().len(SEGMENT_BYTES).map_raw(&file).unwrap();
        let theirs = Segment { map: of_client, blocks: [None; SLOTS_OF_SEGMENT] };
        let slot = |index| Slot { segment: id, index };
        assert!(slots.register(slot(3), BlockId(7)).is_err(), "not marked by its client");
        theirs.flags(3).store(VALID | ANCHORABLE, Ordering::Release);
        slots.register(slot(3), BlockId(7)).unwrap();
        assert_eq!(theirs.flags(3).load(Ordering::Acquire), VALID, "never anchorable");
        assert!(slots.register(slot(3), BlockId(8)).is_err(), "in use");
        slots.revoke(BlockId(8));
        assert_eq!(theirs.flags(3).load(Ordering::Acquire), VALID);
        slots.revoke(BlockId(7));
        assert_eq!(theirs.flags(3).load(Ordering::Acquire), 0);
        slots.release(slot(3)).unwrap();
        assert!(slots.release(slot(3)).is_err() && slots.release(Slot { segment: (1, 2), index: 0 }).is_err());
        // A client can neither cut nor lengthen it: no access of ours is ever beyond its end.
        let file = File::from(file);
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        theirs.flags(127).store(VALID, Ordering::Release);
        slots.register(slot(127), BlockId(9)).unwrap();
        slots.remove(id);
        assert!(slots.lock().of_block.is_empty() && slots.lock().segments.is_empty());
        assert!(slots.register(slot(1), BlockId(9)).is_err());
    }
}
