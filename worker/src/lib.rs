//! The worker: keeps blocks close to those who read them.
//!
//! `hadoop` is the same for Hadoop's clients. `store` keeps blocks as files of a tier; `ufs_read` has missing pages fetched; `write` takes new files in; `session`
//! serves clients over TCP and over the Unix socket (where it hands out descriptors); `task` does what the master asks for; `report`
//! tells the master.

mod cluster;
mod core;
mod hadoop;
mod master;
mod read_out;
mod report;
mod scrub;
mod server;
mod session;
pub mod store;
mod task;
mod ufs_read;
mod web;
mod write;

pub use server::{WorkerHandle, start};
