//! Mounts: the table of opened under stores, and keeping the namespace in step with them.

mod options;
mod sync;
mod table;

pub use options::{MountOptions, raw, resolve};
pub use sync::{Resolved, Syncer};
pub use table::{MountTable, Mounted};
