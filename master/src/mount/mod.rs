//! Mounts: the table of opened under stores, and keeping the namespace in step with them.

mod appearance;
mod events;
mod options;
mod sync;
mod table;
mod tree;
pub mod watch;

pub use appearance::Appearance;
pub use events::take_event;
pub use options::{MountOptions, PathConfig, WriteType, raw, resolve};
pub use sync::{Resolved, Syncer};
pub use table::{MountTable, Mounted};
pub use tree::{Entry, Told, entries, load_metadata};

use crate::store::Reader;
use forebay_common::{MountId, Result};

/// Where the bytes of a key still are while a rename is on its way to the store; empty mostly.
pub fn previous_key<R: Reader>(view: &R, mount: Option<(MountId, usize)>, key: &[u8]) -> Result<Vec<u8>> {
    for pending in view.pending()? {
        if pending.kind == "rename" && mount.is_some_and(|(id, _)| id.get() == pending.mount_id) {
            let rest = key.strip_prefix(&pending.target_key[..]);
            if let Some(rest) = rest.filter(|r| r.is_empty() || r.starts_with(b"/")) {
                return Ok([&pending.source_key[..], rest].concat());
            }
        }
    }
    Ok(Vec::new())
}
