//! An open folder: names as they come from the master, in batches, however many there are.
//!
//! The place of an entry is its number in the listing. The kernel asks from a place on; the batches around it are kept, and for a place further
//! back the listing begins anew. Names added or removed meanwhile may be seen or not, as POSIX has it.

use forebay_client::{FileSystem, Listing};
use forebay_common::{AbsPath, Result};
use forebay_proto::FileStatus;
use std::collections::VecDeque;

/// Entries kept behind the place that was asked for last.
const KEPT_BEHIND: usize = 2_000;

#[derive(Default)]
pub struct Folder {
    listing: Option<Listing>,
    /// Entries, the first of them number `first`.
    window: VecDeque<FileStatus>,
    first: u64,
    ended: bool,
}

impl Folder {
    /// The entry at a place; `None` behind the last one.
    pub async fn entry(&mut self, fs: &FileSystem, path: &AbsPath, place: u64) -> Result<Option<FileStatus>> {
        if place < self.first || (self.listing.is_none() && !self.ended) {
            *self = Folder { listing: Some(fs.listing(path, false).await?), ..Folder::default() };
        }
        while place >= self.first + self.window.len() as u64 && !self.ended {
            let batch = match &mut self.listing {
                Some(listing) => listing.next().await?,
                None => None,
            };
            match batch {
                Some(batch) => self.window.extend(batch),
                None => (self.ended, self.listing) = (true, None),
            }
            while self.window.len() > KEPT_BEHIND && self.first + (KEPT_BEHIND as u64) < place {
                self.window.pop_front();
                self.first += 1;
            }
        }
        let index = usize::try_from(place - self.first).unwrap_or(usize::MAX);
        Ok(self.window.get(index).cloned())
    }

    /// All that is left of a listing that was begun, with the place of the first of it.
    pub async fn rest(&mut self) -> Result<(u64, Vec<FileStatus>)> {
        while let Some(listing) = &mut self.listing {
            match listing.next().await? {
                Some(batch) => self.window.extend(batch),
                None => (self.ended, self.listing) = (true, None),
            }
        }
        Ok((self.first, self.window.iter().cloned().collect()))
    }

    /// What `rest` told.
    pub fn taken_over(first: u64, entries: &[FileStatus]) -> Folder {
        Folder { listing: None, window: entries.iter().cloned().collect(), first, ended: first > 0 || !entries.is_empty() }
    }

    /// The next reader wants to see what is there now.
    pub fn rewind(&mut self) {
        *self = Folder::default();
    }
}
