//! The worker: keeps blocks close to those who read them.
//!
//! `store` keeps blocks as files of a tier; `ufs_read` has missing pages fetched; `write` takes new files in; `session`
//! serves clients over TCP and over the Unix socket (where it hands out descriptors); `report` tells the master.

mod copy_in;
mod core;
mod master;
mod report;
mod scrub;
mod server;
mod session;
pub mod store;
mod ufs_read;
mod web;
mod write;

pub use server::{WorkerHandle, start};
