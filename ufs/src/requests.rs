//! How many requests a mount costs, by kind, as its store sees them: retries and pages count each.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attributes of one object (`HEAD`).
    Stat,
    /// One page of names.
    List,
    /// Bytes.
    Read,
    /// Bytes of an object, a part, or its completion.
    Write,
    /// A copy within the store.
    Copy,
    /// Moving, where the store can.
    Rename,
    /// A removal, of many objects at once where the store can.
    Delete,
    /// A folder made.
    Mkdir,
}

impl Request {
    /// All of them.
    pub const ALL: [Request; 8] =
        [Request::Stat, Request::List, Request::Read, Request::Write, Request::Copy, Request::Rename, Request::Delete, Request::Mkdir];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Request::Stat => "stat",
            Request::List => "list",
            Request::Read => "read",
            Request::Write => "write",
            Request::Copy => "copy",
            Request::Rename => "rename",
            Request::Delete => "delete",
            Request::Mkdir => "mkdir",
        }
    }
}

/// Counts of one mount in this process.
#[derive(Debug, Default)]
pub struct Requests {
    counts: [AtomicU64; Request::ALL.len()],
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Requests {
    /// One more.
    pub(crate) fn count(&self, request: Request) {
        self.counts[request as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, bytes: usize) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn written(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Name and count of each kind, then bytes read and written.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        let counts = Request::ALL.iter().map(|r| (r.name(), self.counts[*r as usize].load(Ordering::Relaxed)));
        let bytes = [("read_bytes", self.read_bytes.load(Ordering::Relaxed)), ("written_bytes", self.written_bytes.load(Ordering::Relaxed))];
        counts.chain(bytes).collect()
    }
}
