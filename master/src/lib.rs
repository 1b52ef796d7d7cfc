//! The master: the namespace, its journal, the mount table, and what is known of workers and blocks.
//!
//! Layers, from the outside in: `service` (decode, authorise, one call, encode) → `journal` → `apply` (the only way state
//! changes) → `store`. Beside them soft state that a restart rebuilds: `block`, `worker`, `mount::sync`'s freshness. The
//! drivers in `driver` do what a command left to be done in an under store.

pub mod apply;
mod block;
mod cluster;
mod core;
mod drain;
mod driver;
mod free;
mod hadoop;
mod held;
mod identity;
mod job;
pub mod journal;
mod kubernetes;
mod locality;
mod locks;
mod metrics;
mod mount;
pub mod namespace;
mod passive;
mod persist;
mod replicate;
mod service;
mod source;
pub mod store;
mod tasks;
mod worker;

pub use service::{MasterHandle, Routes, start};
