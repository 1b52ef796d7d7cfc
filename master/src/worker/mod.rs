//! What the master knows of workers: who is there, how they are reached, and the keys their tokens are signed with.

mod keys;
mod registry;

pub use keys::TokenKeys;
pub use registry::{Orders, Registry, WorkerView, fetch_order};
