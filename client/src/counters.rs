//! Bytes by the way they took, reported to the master: descriptor reads are invisible to the worker.

use forebay_proto::NamedValue;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one `FileSystem`, since it was connected or last reported.
#[derive(Debug, Default)]
pub struct Counters {
    /// Read through a worker's Unix socket: by descriptor or streamed.
    pub read_domain: AtomicU64,
    /// Read over the network.
    pub read_remote: AtomicU64,
    /// Written through a worker's Unix socket.
    pub written_domain: AtomicU64,
    /// Written over the network.
    pub written_remote: AtomicU64,
}

impl Counters {
    fn all(&self) -> [(&'static str, &AtomicU64); 4] {
        [
            ("BytesReadDomain", &self.read_domain),
            ("BytesReadRemote", &self.read_remote),
            ("BytesWrittenDomain", &self.written_domain),
            ("BytesWrittenRemote", &self.written_remote),
        ]
    }

    /// Takes what was counted; what is not zero.
    pub(crate) fn take(&self) -> Vec<NamedValue> {
        let taken = self.all().map(|(name, value)| NamedValue { name: name.to_owned(), value: value.swap(0, Ordering::Relaxed) });
        taken.into_iter().filter(|v| v.value > 0).collect()
    }

    /// Puts back what could not be reported.
    pub(crate) fn put_back(&self, values: &[NamedValue]) {
        for (name, counter) in self.all() {
            for value in values.iter().filter(|v| v.name == name) {
                counter.fetch_add(value.value, Ordering::Relaxed);
            }
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}
