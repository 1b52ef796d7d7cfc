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
pub mod mountpoint;
pub mod path;
pub mod telemetry;
pub mod token;
mod ufs_uri;

pub use abort_point::abort_point;
pub use error::{Error, ErrorKind, Result};
pub use id::{BlockId, InodeId, MountId, WorkerId};
pub use path::AbsPath;
pub use ufs_uri::{Service, UfsUri};

/// A future that is compiled with the crate that makes it. The body of an async function is compiled in each crate that awaits it, with all that it awaits in turn: what
/// many crates call, or what a whole role hangs on, is boxed where it is made. One allocation per call.
pub type Boxed<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The same, for a future that stays on its thread.
pub type LocalBoxed<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + 'a>>;
