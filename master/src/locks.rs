//! `Waiting`: calls that wait until a lock of a file may be taken. Woken by `Soft` after a command that gave locks back; soft, and bounded.

use forebay_common::{Result, counter, err, gauge};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

counter!(pub TAKEN, "forebay_master_file_locks_total", "locks of files that were taken or given back");
counter!(pub CONFLICTS, "forebay_master_file_lock_conflicts_total", "locks of files that somebody else was in the way of");
gauge!(WAITERS, "forebay_master_file_lock_waiters", "calls that wait for a lock of a file");
gauge!(pub SESSIONS, "forebay_master_file_lock_sessions", "mounts that hold, or held, locks of files");

/// Calls that may wait.
const WAITERS_MAX: i64 = 65_536;

#[derive(Default)]
pub struct Waiting(Mutex<HashMap<u64, Arc<Notify>>>);

/// A place among those that wait for a file; left when it is dropped.
pub struct Place<'a> {
    waiting: &'a Waiting,
    file: u64,
    /// Told when a lock of the file was given back.
    pub given_back: Arc<Notify>,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Errors: `LimitExceeded` while too many wait.
    pub fn join(&self, file: u64) -> Result<Place<'_>> {
        if WAITERS.get() >= WAITERS_MAX {
            return Err(err!(LimitExceeded, "{WAITERS_MAX} calls wait for locks, which is the limit").with_retryable(false));
        }
        WAITERS.inc();
        Ok(Place { waiting: self, file, given_back: self.lock().entry(file).or_default().clone() })
    }

    /// Something of the file may be taken now.
    pub fn wake(&self, file: u64) {
        if let Some(given_back) = self.lock().get(&file) {
            given_back.notify_waiters();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        WAITERS.dec();
        let mut all = self.waiting.lock();
        // The table's alone is left: nobody else gets one but by the table.
        self.given_back = Arc::default();
        if all.get(&self.file).is_some_and(|given_back| Arc::strong_count(given_back) == 1) {
            all.remove(&self.file);
        }
    }
}
