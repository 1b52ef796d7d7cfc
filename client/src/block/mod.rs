//! Bytes of blocks: connections to workers, granted blocks of this machine.

mod connection;
mod local;
mod pool;

pub use connection::{Answers, Connection};
pub use local::LocalBlock;
pub use pool::Pool;

/// The way bytes took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A descriptor passed by a worker of this machine.
    Descriptor,
    /// That worker's Unix socket, streamed.
    Domain,
    /// The network.
    Network,
}
