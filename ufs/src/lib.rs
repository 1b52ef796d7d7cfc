//! Under stores: where the data really lives.
//!
//! Called by the master (stat, list, and the changes that a command asks for) and by workers (ranged reads, writes).
//! Object stores go through opendal with timeout, retry and concurrency layers. `file://` is native, because opendal's
//! file service follows symbolic links out of the mounted folder (docs/decisions/2026-11-21-native-file-store.md), and `hdfs://`
//! is hdfs-native itself, because opendal's service on top of it does not rename whole (docs/decisions/2026-11-24-hdfs-under-store.md).
//!
//! Invariants: `NotFound` is only ever a plain "no such object"; a read names the fingerprint it expects and never
//! returns bytes of another version; credentials appear in no message; what an operator forbids or limits holds for every store.

mod control;
mod fingerprint;
mod hdfs;
mod hdfs_events;
mod local;
mod metrics;
mod namenodes;
mod object;
mod pieces;
mod requests;
mod s3_parts;
mod store;

pub use control::{Bandwidth, Mode, OPTIONS as COMMON_OPTIONS};
pub use forebay_common::UfsUri;
pub use hdfs_events::{Happened, HdfsEvents};
pub use pieces::PieceWriter;
pub use requests::{Request, Requests};
pub use store::{LIST_PAGE_ENTRIES, Lister, Page, SeenNames, UfsEntry, UfsWriter, UnderStore};
