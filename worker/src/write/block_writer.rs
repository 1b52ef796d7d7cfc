//! `BlockWriter`: one block under construction.
//!
//! Its length is not known before it ends, so its header is written when it is sealed, and nobody can see it before.
//! The first page is kept in memory, so that a small file occupies what it needs and not a huge page. Where its folder runs
//! out of room and nothing there can be evicted, it goes on in the tier below, with what was written so far.

use crate::store::{BlockFile, BlockStore, Dir, Header, paths, remove_files};
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
        }
    }

    pub fn block(&self) -> BlockId {
        self.header.block
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
        let (length, chunks, open_chunk) = (self.length, self.crcs.len(), self.open_chunk);
        self.take_in(bytes).inspect_err(|_| {
            self.length = length;
            self.crcs.truncate(chunks);
            self.open_chunk = open_chunk;
        })
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

    /// What was appended is on the disk, where there is one, when this returns.
    pub fn sync(&mut self) -> Result<()> {
        match (&self.data, &self.dir) {
            (Some(file), Some(dir)) if dir.medium() != Medium::Mem => self.noted(file.sync_data().map_err(at("fsync of a block"))),
            // The first page is in memory until the block outgrows it.
            _ => Ok(()),
        }
    }

    /// A folder whose file system fails takes no new blocks. For its own errors, not for those of a quota.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|e| self.dir.iter().for_each(|dir| dir.note_error(e)))
    }

    fn take_in(&mut self, bytes: &[u8]) -> Result<()> {
        let before = self.length;
        self.length += bytes.len() as u64;
        self.sum(bytes);
        self.reserve(bytes.len() as u64, before)?;
        if self.data.is_none() && self.length <= self.header.page_size_bytes {
            self.first_page.extend_from_slice(bytes);
            return Ok(());
        }
        if self.data.is_none() {
            let file = self.noted(self.make(self.block_size_bytes))?;
            if let Err(e) = self.noted(file.write_all_at(&self.first_page, 0).map_err(at("writing a block"))) {
                self.unmake();
                return Err(e);
            }
            self.first_page = Vec::new();
            self.data = Some(file);
        }
        if let Some(file) = &self.data {
            self.noted(file.write_all_at(bytes, before).map_err(at("writing a block")))?;
        }
        Ok(())
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
            remove_files(from, self.header.block);
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

    /// Ends the block: its data get their final length, its header is written, and it may be seen.
    pub fn seal(mut self) -> Result<BlockFile> {
        if self.open_chunk.1 > 0 {
            self.crcs.push(self.open_chunk.0);
        }
        self.header.length_bytes = self.length;
        let file = match self.data.take() {
            Some(file) => file,
            None => {
                let file = self.make(self.length)?;
                file.write_all_at(&self.first_page, 0).map_err(at("writing a block"))?;
                file
            }
        };
        // Nobody has seen this file yet, so its length may still change.
        file.set_len(self.length).map_err(at("ending a block"))?;
        let block = BlockFile::seal(self.dir()?, self.header.clone(), file, &self.crcs)?;
        self.sealed = true;
        let reserved = std::mem::take(&mut self.reserved_bytes);
        self.dir()?.release(reserved);
        Ok(block)
    }
}

impl Drop for BlockWriter {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        dir.release(self.reserved_bytes);
        // Only files that this writer made: a block of this id that is there already is somebody's.
        if self.made.load(Ordering::Relaxed) && !self.sealed {
            remove_files(dir, self.header.block);
        }
    }
}
