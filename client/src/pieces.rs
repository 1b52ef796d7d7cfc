//! `Pieces`: a range of a file in order, kept ahead of its reader.
//!
//! Made by `FileReader::pieces`. Where a block is mapped here its bytes are handed out without a copy, and its missing
//! pages are filled ahead; where it is streamed, requests worth `client.readahead` are under way. A range that was asked
//! for ahead and does not come is read in the ordinary way, from every source in turn.

use crate::block::{Answers, Source};
use crate::prefetch::Window;
use crate::reader::{FileReader, PIECE_BYTES, REQUEST_BYTES, next_piece, request_range};
use bytes::Bytes;
use forebay_common::{ErrorKind, Result};
use std::collections::VecDeque;
use std::ops::Range;

/// A range asked for and not wholly read yet; `rest` is within its block.
struct Ahead {
    rest: Range<u64>,
    answers: Answers,
    source: Source,
}

/// The pieces.
pub struct Pieces<'a> {
    reader: &'a FileReader,
    position: u64,
    end: u64,
    ahead: VecDeque<Ahead>,
    asked_to: u64,
    window: Window,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(reader: &'a FileReader, range: Range<u64>) -> Self {
        let window = Window::whole(range.start, reader.inner.config.readahead.as_u64());
        Pieces { reader, position: range.start, end: range.end.min(reader.length()), ahead: VecDeque::new(), asked_to: range.start, window }
    }

    /// The next bytes, at most 1 MiB; `None` at the end. Errors: when every source of the bytes failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.position >= self.end {
            return Ok(None);
        }
        if self.ahead.is_empty() {
            let (block, range) = self.reader.within_block(self.position, self.piece_length());
            let length = range.end - range.start;
            let ahead = self.window.advance(self.position, length, self.end);
            if self.reader.held(block).is_some() {
                if let Some(ahead) = ahead {
                    self.reader.fill_ahead(ahead).await;
                }
                return self.directly(length as usize).await;
            }
            let in_block = ahead.map_or(0, |a| self.reader.within_block(self.position, (a.end - self.position) as usize).1.end);
            // Whatever goes wrong is met again on the other ways, where there are any: an under store that fails this worker
            // after all its retries is not asked through the same worker again.
            let made = self.reader.make_present(block, range.clone(), range.start..in_block.max(range.end)).await;
            if let Err(e) = made
                && e.kind() == ErrorKind::UnderStore
                && self.reader.located().blocks.get(block).is_some_and(|b| b.locations.len() <= 1)
            {
                return Err(e.context(format!("reading {}", self.reader.path)));
            }
            if self.reader.held(block).is_some() {
                return self.directly(length as usize).await;
            }
            self.asked_to = self.asked_to.max(self.position);
        }
        self.ask_ahead().await;
        let Some(front) = self.ahead.front_mut() else { return self.directly(self.piece_length()).await };
        match next_piece(&mut front.answers, front.rest.start).await {
            Ok(bytes) => {
                front.rest.start += bytes.len() as u64;
                self.reader.count(front.source, bytes.len());
                if front.rest.is_empty() {
                    self.ahead.pop_front();
                }
                self.position += bytes.len() as u64;
                Ok(Some(bytes))
            }
            Err(e) if e.kind() == ErrorKind::FileChanged => Err(e.context(&self.reader.path)),
            Err(e) => {
                tracing::debug!(error = %e, "a range asked for ahead did not come");
                self.ahead.clear();
                self.asked_to = self.position;
                self.directly(self.piece_length()).await
            }
        }
    }

    fn piece_length(&self) -> usize {
        PIECE_BYTES.min(usize::try_from(self.end - self.position).unwrap_or(PIECE_BYTES))
    }

    async fn directly(&mut self, length: usize) -> Result<Option<Bytes>> {
        let bytes = self.reader.slice(self.position, length).await?;
        self.position += bytes.len() as u64;
        self.asked_to = self.asked_to.max(self.position);
        Ok(Some(bytes))
    }

    /// Keeps as many requests under way as the window allows.
    async fn ask_ahead(&mut self) {
        let window = self.reader.inner.config.readahead.as_u64().max(REQUEST_BYTES);
        while self.asked_to < self.end && self.asked_to - self.position < window {
            let length = REQUEST_BYTES.min(self.end - self.asked_to) as usize;
            let (block, range) = self.reader.within_block(self.asked_to, length);
            let beyond = self.end - self.asked_to - (range.end - range.start);
            let Some(request) = self.ask(block, range.clone(), beyond).await else { return };
            self.ahead.push_back(request);
            self.asked_to += range.end - range.start;
        }
    }

    /// Asks the best source without waiting; of the file, `beyond` bytes more will be read. `None`: read in the ordinary way.
    async fn ask(&self, block: usize, rest: Range<u64>, beyond: u64) -> Option<Ahead> {
        let located = self.reader.located();
        let info = located.blocks.get(block)?;
        let (address, token) = located.workers.get(&info.locations.first()?.worker_id)?;
        let (connection, source) = self.reader.stream_connection(address).await.ok()?;
        let readahead = self.reader.inner.config.readahead.as_u64().min(beyond);
        let answers = request_range(&connection, token, info.id, rest.clone(), readahead).await.ok()?;
        Some(Ahead { rest, answers, source })
    }
}
