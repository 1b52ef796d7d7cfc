//! The Kubernetes cluster that the master is in: who is on which node, so that work and bytes meet.
//!
//! `watch` follows the API server, `view` holds what was seen, `crate::locality` asks it. Nothing waits for the API server: what is not known is answered
//! without it. Why so: docs/decisions/2026-11-28-kubernetes.md.

mod view;
mod watch;

pub use view::{Asker, View};
pub use watch::run;
