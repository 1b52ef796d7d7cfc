//! `BlockWriter`: one block under construction.
//!
//! Its length is not known before it ends, so its header is written when it is sealed, and nobody can see it before.
//! The first page is kept in memory, so that a small file occupies what it needs and not a huge page. Where its folder runs
//! out of room and nothing there can be evicted, it goes on in the tier below, with what was written so far.
//!
//! A writer that was told to `persist` keeps a log beside its data (`OpenLog`): the block outlives the process as it was then, and is gone on with by
//! `resume`. Dropping such a writer leaves its files; `discard` removes them.

use super::open_log::{Left, OpenHeader, OpenLog, Tail};
use crate::store::{BlockFile, BlockStore, Dir, Header, LeftOpen, open_path, paths, remove_files};
use bytes::{Bytes, BytesMut};
use forebay_common::block_header::flags_of;
use forebay_common::config::Medium;
use forebay_common::error::at;
use forebay_common::limits::CHUNK_SIZE_BYTES;
use forebay_common::token::Claims;
use forebay_common::{BlockId, Error, InodeId, MountId, Result, checksum, err};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub struct BlockWriter {
    store: Arc<BlockStore>,
    /// Chosen with the first bytes.
    dir: Option<Arc<Dir>>,
    header: Header,
    block_size_bytes: u64,
    first_page: Vec<u8>,
    data: Option<File>,
    reserved_bytes: u64,
    length: u64,
    crcs: Vec<u32>,
    open_chunk: (u32, usize),
    made: AtomicBool,
    sealed: bool,
    lease_id: u64,
    stamp: u64,
    log: Option<OpenLog>,
    /// Whether the names of its files are on the disk.
    names_synced: bool,
    /// Whether anything of it was promised to be on a disk.
    synced: bool,
}

impl BlockWriter {
    pub fn new(store: Arc<BlockStore>, claims: &Claims, block: BlockId, only_copy: bool) -> Self {
        let header = Header {
            block,
            file: InodeId(claims.file_id),
            length_bytes: 0,
            page_size_bytes: claims.page_size_bytes,
            flags: flags_of(only_copy, MountId(claims.mount_id)),
        };
        BlockWriter {
            dir: None,
            store,
            header,
            block_size_bytes: claims.block_size_bytes,
            first_page: Vec::new(),
            data: None,
            reserved_bytes: 0,
            length: 0,
            crcs: Vec::new(),
            open_chunk: (0, 0),
            made: AtomicBool::new(false),
            sealed: false,
            lease_id: claims.lease_id,
            stamp: 0,
            log: None,
            names_synced: false,
            synced: false,
        }
    }

    /// Takes a block over that an earlier process was writing: as much of it as its checksums agree with. Reads all of it.
    ///
    /// Errors: `Corrupt` when that is less than what it counted last; the disk's.
    pub fn resume(store: Arc<BlockStore>, left: &LeftOpen, block: BlockId) -> Result<Self> {
        let dir = left.dir.clone();
        let (path, _) = paths(dir.path(), block);
        let Left { log, header, mut crcs, tails } = OpenLog::open(dir.path(), block)?;
        let data = File::options().read(true).write(true).open(&path).map_err(at(path.display()))?;
        let there = data.metadata().map_err(at(path.display()))?.len();
        let mut good = None;
        for tail in tails {
            if tail.length <= there && agrees(&data, &crcs, tail)? {
                good = Some(tail);
                break;
            }
        }
        let tail = good.ok_or_else(|| err!(Corrupt, "open block {block} has other bytes than were acknowledged"))?;
        crcs.truncate(tail.length as usize / CHUNK_SIZE_BYTES);
        dir.charge(tail.length);
        Ok(BlockWriter {
            store,
            dir: Some(dir),
            header: Header { block, file: header.file, length_bytes: 0, page_size_bytes: header.page_size_bytes, flags: header.flags },
            block_size_bytes: header.capacity_bytes,
            first_page: Vec::new(),
            data: Some(data),
            reserved_bytes: tail.length,
            length: tail.length,
            open_chunk: (tail.crc, tail.length as usize % CHUNK_SIZE_BYTES),
            crcs,
            made: AtomicBool::new(true),
            sealed: false,
            lease_id: header.lease_id,
            stamp: tail.stamp,
            log: Some(log),
            names_synced: false,
            // It may have been.
            synced: true,
        })
    }

    /// What its pipeline was recovered to last.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Its pipeline was recovered, or begun; written down with the next `persist`.
    pub fn set_stamp(&mut self, stamp: u64) {
        self.stamp = stamp;
    }

    pub fn block(&self) -> BlockId {
        self.header.block
    }

    /// Whether what is written of it is in this folder.
    pub fn is_in(&self, dir: &Arc<Dir>) -> bool {
        self.dir.as_ref().is_some_and(|own| Arc::ptr_eq(own, dir))
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Counts bytes that are not kept.
    pub fn skip(&mut self, bytes: usize) {
        self.length += bytes as u64;
    }

    /// Errors: `NoSpace`, the disk's; the block is then as it was before.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let (before, added) = (self.length, bytes.len() as u64);
        self.reserve(added, before)?;
        if self.data.is_none() && before + added <= self.header.page_size_bytes {
            self.first_page.extend_from_slice(bytes);
        } else {
            self.spill()?;
            if let Some(file) = &self.data {
                self.noted(file.write_all_at(bytes, before).map_err(at("writing a block")))?;
            }
        }
        self.sum(bytes);
        self.length += added;
        Ok(())
    }

    /// Bytes that were appended.
    pub fn read(&self, range: Range<u64>) -> Result<Bytes> {
        let (start, end) = (range.start as usize, range.end as usize);
        match &self.data {
            None => self.first_page.get(start..end).map(Bytes::copy_from_slice).ok_or_else(|| err!(InvalidArgument, "no such range")),
            Some(file) => {
                let mut out = BytesMut::zeroed(end - start);
                file.read_exact_at(&mut out, range.start).map_err(at("reading a block"))?;
                Ok(out.freeze())
            }
        }
    }

    fn tail(&self) -> Tail {
        Tail { length: self.length, stamp: self.stamp, crc: self.open_chunk.0 }
    }

    /// What was appended outlives this process when this returns.
    pub fn persist(&mut self) -> Result<()> {
        if self.length == 0 {
            return Ok(());
        }
        self.spill()?;
        let mut log = match self.log.take() {
            Some(log) => log,
            None => {
                let header = OpenHeader {
                    block: self.header.block,
                    file: self.header.file,
                    lease_id: self.lease_id,
                    capacity_bytes: self.block_size_bytes,
                    page_size_bytes: self.header.page_size_bytes,
                    flags: self.header.flags,
                };
                self.noted(OpenLog::create(self.dir()?.path(), &header))?
            }
        };
        let written = log.write(&self.crcs, self.tail());
        self.log = Some(log);
        self.noted(written)
    }

    /// What was appended is on the disk, where there is one, when this returns.
    pub fn sync(&mut self) -> Result<()> {
        self.persist()?;
        let (Some(file), Some(log), Some(dir)) = (&self.data, &self.log, &self.dir) else { return Ok(()) };
        if dir.medium() == Medium::Mem {
            return Ok(());
        }
        let synced = file
            .sync_data()
            .map_err(at("fsync of a block"))
            .and_then(|()| log.sync(self.tail()))
            .and_then(|()| if self.names_synced { Ok(()) } else { dir.sync_names_of(self.header.block) });
        self.noted(synced)?;
        (self.names_synced, self.synced) = (true, true);
        Ok(())
    }

    /// Writes the first page, where that is in memory still.
    fn spill(&mut self) -> Result<()> {
        if self.data.is_some() {
            return Ok(());
        }
        let file = self.noted(self.make(self.block_size_bytes))?;
        if let Err(e) = self.noted(file.write_all_at(&self.first_page, 0).map_err(at("writing a block"))) {
            self.unmake();
            return Err(e);
        }
        self.first_page = Vec::new();
        self.data = Some(file);
        Ok(())
    }

    /// A folder whose file system fails takes no new blocks. For its own errors, not for those of a quota.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|e| self.dir.iter().for_each(|dir| dir.note_error(e)))
    }

    fn dir(&self) -> Result<&Arc<Dir>> {
        self.dir.as_ref().ok_or_else(|| err!(NoSpace, "block {} has no folder", self.header.block))
    }

    /// Room for the next bytes; `written` are in the file already. Errors: `NoSpace` in this tier and all below.
    fn reserve(&mut self, bytes: u64, written: u64) -> Result<()> {
        self.store.make_share_room(self.header.mount(), written + bytes)?;
        let mut dir = match &self.dir {
            Some(dir) => dir.clone(),
            // How long the block gets is not known: a small file belongs into the first tier, however small that is.
            None => self.store.choose(self.header.page_size_bytes)?,
        };
        while let Err(e) = self.store.reserve(&dir, bytes) {
            dir = self.store.choose_below(&dir, written + bytes).ok_or(e)?;
        }
        self.reserved_bytes += bytes;
        match self.dir.replace(dir.clone()) {
            Some(from) if !Arc::ptr_eq(&from, &dir) => self.go_on_in(&from, &dir, bytes, written),
            _ => Ok(()),
        }
    }

    /// Goes on in another folder, where room for the newest `bytes` is reserved, with what was written so far. Errors: it is where it was.
    fn go_on_in(&mut self, from: &Arc<Dir>, to: &Arc<Dir>, bytes: u64, written: u64) -> Result<()> {
        let earlier = self.reserved_bytes - bytes;
        let back = |writer: &mut Self, reserved: u64, e: Error| {
            to.release(reserved);
            writer.reserved_bytes = earlier;
            writer.dir = Some(from.clone());
            Err(e)
        };
        if let Err(e) = self.store.reserve(to, earlier) {
            return back(self, bytes, e);
        }
        if let Some(mut old) = self.data.take() {
            self.made.store(false, Ordering::Relaxed);
            let copied = self.make(self.block_size_bytes).and_then(|mut new| {
                old.seek(SeekFrom::Start(0)).and_then(|_| std::io::copy(&mut (&old).take(written), &mut new)).map_err(at("moving a block"))?;
                Ok(new)
            });
            match copied {
                Ok(new) => self.data = Some(new),
                Err(e) => {
                    self.unmake();
                    self.data = Some(old);
                    self.made.store(true, Ordering::Relaxed);
                    return back(self, bytes + earlier, e);
                }
            }
            if let Some(log) = self.log.take() {
                // In both places for a moment: the faster one is believed then, which is as good.
                self.names_synced = false;
                let kept = if self.synced { self.sync() } else { self.persist() };
                if let Err(e) = kept {
                    self.remove_from(to);
                    (self.data, self.log) = (Some(old), Some(log));
                    return back(self, bytes + earlier, e);
                }
            }
            self.remove_from(from);
            // It is not to come back after a power cut, beside a newer one.
            if self.synced && from.medium() != Medium::Mem {
                let _ = from.sync_names_of(self.header.block);
            }
        }
        from.release(earlier);
        Ok(())
    }

    /// Removes what `make` made in the folder.
    fn unmake(&self) {
        if self.made.swap(false, Ordering::Relaxed)
            && let Some(dir) = &self.dir
        {
            remove_files(dir, self.header.block);
        }
    }

    fn sum(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (crc, filled) = self.open_chunk;
            let take = bytes.len().min(CHUNK_SIZE_BYTES - filled);
            let crc = checksum::append(crc, &bytes[..take]);
            self.open_chunk = (crc, filled + take);
            if filled + take == CHUNK_SIZE_BYTES {
                self.crcs.push(crc);
                self.open_chunk = (0, 0);
            }
            bytes = &bytes[take..];
        }
    }

    fn make(&self, length: u64) -> Result<File> {
        let dir = self.dir()?;
        let (path, _) = paths(dir.path(), self.header.block);
        let shard = path.parent().unwrap_or(dir.path());
        std::fs::create_dir_all(shard).map_err(at(shard.display()))?;
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(at(path.display()))?;
        self.made.store(true, Ordering::Relaxed);
        file.set_len(length).map_err(at("extending"))?;
        Ok(file)
    }

    /// Gives up what is beyond `length`. Errors: the disk's; it is as it was.
    pub fn cut(&mut self, length: u64) -> Result<()> {
        if length >= self.length {
            return Ok(());
        }
        let (chunks, rest) = (length as usize / CHUNK_SIZE_BYTES, length % CHUNK_SIZE_BYTES as u64);
        let open = self.read(length - rest..length)?;
        self.crcs.truncate(chunks);
        self.open_chunk = (checksum::crc32c(&open), open.len());
        self.length = length;
        if self.data.is_none() {
            self.first_page.truncate(length as usize);
        }
        self.persist()
    }

    fn remove_from(&self, dir: &Dir) {
        remove_files(dir, self.header.block);
        let _ = std::fs::remove_file(open_path(dir.path(), self.header.block));
    }

    /// Ends the block: its data get their final length, its header is written, and it may be seen. Errors: it is as it was, and may be ended again.
    pub fn seal(&mut self) -> Result<BlockFile> {
        let dir = self.dir()?.clone();
        let (_, open_bytes) = self.open_chunk;
        let crcs: Vec<u32> = self.crcs.iter().copied().chain((open_bytes > 0).then_some(self.open_chunk.0)).collect();
        self.header.length_bytes = self.length;
        let file = match &self.data {
            Some(file) => file.try_clone().map_err(at("ending a block"))?,
            None => {
                let file = self.noted(self.make(self.length))?;
                if let Err(e) = self.noted(file.write_all_at(&self.first_page, 0).map_err(at("writing a block"))) {
                    self.unmake();
                    return Err(e);
                }
                let own = file.try_clone().map_err(at("ending a block"))?;
                (self.data, self.first_page) = (Some(own), Vec::new());
                file
            }
        };
        // Nobody has seen this file yet, so its length may still change.
        let ended = file.set_len(self.length).map_err(at("ending a block"));
        let block = self.noted(ended.and_then(|()| BlockFile::seal(&dir, self.header.clone(), file, &crcs)))?;
        if self.log.take().is_some() {
            let _ = std::fs::remove_file(open_path(dir.path(), self.header.block));
        }
        self.sealed = true;
        dir.release(std::mem::take(&mut self.reserved_bytes));
        Ok(block)
    }

    /// Ends it so that nothing of it stays.
    pub fn discard(mut self) {
        if self.log.take().is_some()
            && let Some(dir) = &self.dir
        {
            self.remove_from(dir);
        }
    }
}

/// Whether what is in a file is what a tail counts.
fn agrees(data: &File, crcs: &[u32], tail: Tail) -> Result<bool> {
    let chunks = tail.length as usize / CHUNK_SIZE_BYTES;
    if crcs.len() < chunks {
        return Ok(false);
    }
    let mut chunk = vec![0; CHUNK_SIZE_BYTES];
    for (i, crc) in crcs.iter().take(chunks).enumerate() {
        data.read_exact_at(&mut chunk, (i * CHUNK_SIZE_BYTES) as u64).map_err(at("reading an open block"))?;
        if checksum::crc32c(&chunk) != *crc {
            return Ok(false);
        }
    }
    let rest = &mut chunk[..tail.length as usize % CHUNK_SIZE_BYTES];
    data.read_exact_at(rest, (chunks * CHUNK_SIZE_BYTES) as u64).map_err(at("reading an open block"))?;
    Ok(checksum::crc32c(rest) == tail.crc)
}

impl Drop for BlockWriter {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        dir.release(self.reserved_bytes);
        // Only files that this writer made: a block of this id that is there already is somebody's. With a log they are the next process's.
        if self.made.load(Ordering::Relaxed) && !self.sealed && self.log.is_none() {
            self.remove_from(dir);
        }
    }
}
