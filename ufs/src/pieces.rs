//! Files that several workers write at once: one process begins, each piece is written by whoever has its bytes, one process completes.
//!
//! On S3 a piece is some parts of a multipart upload, on HDFS a file of its own that `concat` joins, in a file system a range of the
//! temporary file. Nothing is visible under the file's name before `complete_pieces`. A piece may be written again, by another worker, as long as the bytes
//! are the same. Called by the master (begin, complete, abort) and by workers (the pieces).

use crate::hdfs::HdfsWriter;
use crate::local::LocalPiece;
use crate::s3_parts::S3Piece;
use crate::store::{Inner, UfsEntry, UnderStore, counted};
use crate::{Requests, control::Control, metrics};
use bytes::Bytes;
use forebay_common::{Boxed, Result, err};
use std::sync::Arc;

/// One piece being written.
pub struct PieceWriter {
    name: String,
    inner: PieceInner,
    control: Control,
    requests: Arc<Requests>,
}

enum PieceInner {
    Local(LocalPiece),
    S3(Box<S3Piece>),
    Hdfs(Box<HdfsWriter>),
}

fn one_writer() -> forebay_common::Error {
    err!(Unsupported, "a file of this store has one writer")
}

impl UnderStore {
    /// What the length of each piece but the last is a multiple of; `None` where a file has one writer.
    pub fn piece_granule(&self, key: &[u8], length: u64) -> Option<u64> {
        match &self.inner {
            Inner::Local(_) => Some(1),
            Inner::Object(s) => s.parts()?.part_bytes(std::str::from_utf8(key).ok()?, length),
            Inner::Hdfs(s) => s.can_concat().then_some(1),
        }
    }

    /// Begins a file of `length` bytes and returns what its pieces are handed in under.
    pub fn begin_pieces<'a>(&'a self, key: &'a [u8], length: u64) -> Boxed<'a, Result<String>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("writing", key))?;
            counted(match &self.inner {
                Inner::Local(s) => s.begin_pieces(key, length).await,
                Inner::Object(s) => s.begin_parts(key).await,
                Inner::Hdfs(s) => s.begin_pieces(key).await,
            })
            .map_err(self.name("writing", key))
        })
    }

    /// Piece `number` (from 0), the bytes from `offset` on of a file of `length`.
    pub fn piece_writer<'a>(&'a self, key: &'a [u8], upload: &'a str, number: u64, offset: u64, length: u64) -> Boxed<'a, Result<PieceWriter>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("writing", key))?;
            let inner = counted(match &self.inner {
                Inner::Local(s) => s.piece(key, upload, offset).await.map(PieceInner::Local),
                Inner::Object(s) => s.piece(key, upload, offset, length).map(|piece| PieceInner::S3(Box::new(piece))),
                Inner::Hdfs(s) => s.piece(upload, number).await.map(|piece| PieceInner::Hdfs(Box::new(piece))),
            })
            .map_err(self.name("writing", key))?;
            let name = format!("writing {} from {offset}", self.uri.join(key));
            Ok(PieceWriter { name, inner, control: self.control.clone(), requests: self.requests.clone() })
        })
    }

    /// Publishes the file, durable in the store. `tags` is what `finish` of all pieces returned, in their order.
    pub fn complete_pieces<'a>(&'a self, key: &'a [u8], upload: &'a str, tags: Vec<String>, length: u64) -> Boxed<'a, Result<UfsEntry>> {
        Box::pin(async move {
            self.control.admit(true).await.map_err(self.name("writing", key))?;
            let entry = counted(match &self.inner {
                Inner::Local(s) => s.complete_pieces(key, upload, length).await,
                Inner::Object(s) => s.complete_parts(key, upload, tags).await,
                Inner::Hdfs(s) => s.complete_pieces(key, upload, &tags, length).await,
            })
            .map_err(self.name("writing", key))?;
            if entry.length != length {
                return Err(err!(UnderStore, "{} bytes are there instead of {length}", entry.length)).map_err(self.name("writing", key));
            }
            Ok(entry)
        })
    }

    /// Gives a file up. What cannot be removed now stays in the store, hidden.
    pub fn abort_pieces<'a>(&'a self, key: &'a [u8], upload: &'a str) -> Boxed<'a, ()> {
        Box::pin(async move {
            let aborted = match &self.inner {
                Inner::Local(s) => s.abort_pieces(key, upload).await,
                Inner::Object(s) => match s.parts() {
                    Some(parts) => parts.abort(&String::from_utf8_lossy(key), upload).await,
                    None => Err(one_writer()),
                },
                Inner::Hdfs(s) => s.abort_pieces(upload).await,
            };
            if let Err(e) = aborted {
                tracing::warn!(error = %e, key = %String::from_utf8_lossy(key), "pieces of a file that was given up stay behind");
            }
        })
    }
}

impl PieceWriter {
    /// Appends.
    pub fn write(&mut self, bytes: Bytes) -> Boxed<'_, Result<()>> {
        Box::pin(async move {
            let length = bytes.len() as u64;
            self.control.bytes(bytes.len()).await;
            match &mut self.inner {
                PieceInner::Local(w) => w.write(bytes).await,
                PieceInner::S3(w) => w.write(bytes).await,
                PieceInner::Hdfs(w) => w.write(bytes).await,
            }
            .map_err(|e| e.context(&self.name))?;
            metrics::BYTES_WRITTEN.inc_by(length);
            self.requests.written(length);
            Ok(())
        })
    }

    /// Has all bytes durable in the store, not published. Returns the tags of the piece, of which there are none where none are needed.
    pub fn finish(self) -> Boxed<'static, Result<Vec<String>>> {
        Box::pin(async move {
            let name = self.name;
            counted(match self.inner {
                PieceInner::Local(w) => w.finish().await.map(|()| Vec::new()),
                PieceInner::S3(w) => w.finish().await,
                PieceInner::Hdfs(mut w) => match w.settle().await {
                    Ok(()) => Ok(vec![w.path().to_owned()]),
                    Err(e) => {
                        w.end_quietly().await;
                        Err(e)
                    }
                },
            })
            .map_err(|e| e.context(name))
        })
    }

    /// Gives this piece up: another worker may write it.
    pub fn abort(self) -> Boxed<'static, ()> {
        Box::pin(async move {
            if let PieceInner::Hdfs(w) = self.inner {
                w.end_quietly().await;
            }
        })
    }
}
