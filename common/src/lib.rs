//! What every role shares and nothing else: ids, paths, errors, limits, configuration, checksums, tokens, telemetry.
//!
//! Called by every crate of the workspace; depends on none of them. Nothing here does network I/O.

mod abort_point;
pub mod block_header;
pub mod checksum;
pub mod clock;
pub mod config;
pub mod error;
pub mod id;
pub mod layout;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod path;
pub mod telemetry;
pub mod token;
mod ufs_uri;

pub use abort_point::abort_point;
pub use error::{Error, ErrorKind, Result};
pub use id::{BlockId, InodeId, MountId, WorkerId};
pub use path::AbsPath;
pub use ufs_uri::{Service, UfsUri};
