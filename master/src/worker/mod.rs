//! What the master knows of workers: who is there, how they are reached, on which racks they are, and the keys their tokens are signed with.

mod keys;
mod racks;
mod registry;

pub use keys::TokenKeys;
pub use racks::run as run_racks;
pub use registry::{Orders, Registry, WorkerView, fetch_order};
