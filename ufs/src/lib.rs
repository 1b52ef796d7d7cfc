//! Under stores: where the data really lives.
//!
//! Called by the master (stat, list, and the changes that a command asks for) and by workers (ranged reads, writes).
//! Object stores go through opendal with timeout, retry and concurrency layers; `file://` is native, because opendal's
//! file service follows symbolic links out of the mounted folder (docs/decisions/2026-11-21-native-file-store.md).
//!
//! Invariants: `NotFound` is only ever a plain "no such object"; a read names the fingerprint it expects and never
//! returns bytes of another version; credentials appear in no message.

mod fingerprint;
mod local;
mod metrics;
mod object;
mod store;
mod uri;

pub use store::{Listing, UfsEntry, UfsWriter, UnderStore};
pub use uri::UfsUri;
