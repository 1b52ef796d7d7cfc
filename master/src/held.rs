//! `Held`: files whose blocks are being made the only copies of their bytes, because a change is about to take them out of their under store.
//!
//! Between the first block that is held and the change in the journal the file still counts as persisted: meanwhile nobody tells workers to settle its blocks, or to
//! drop them. Soft: after a restart of the master the change was not made, and what was held is settled again.

use forebay_common::InodeId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

#[derive(Default)]
pub struct Held(Mutex<HashMap<InodeId, usize>>);

/// While it lives its file is held.
pub struct Hold<'a> {
    held: &'a Held,
    file: InodeId,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HashMap<InodeId, usize>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Holds a file.
    pub fn hold(&self, file: InodeId) -> Hold<'_> {
        *self.lock().entry(file).or_default() += 1;
        Hold { held: self, file }
    }

    /// Whether somebody holds it.
    pub fn is_held(&self, file: InodeId) -> bool {
        self.lock().contains_key(&file)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&self.file) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.file);
            }
        }
    }
}
