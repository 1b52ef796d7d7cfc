//! Forebay's own messages: services between clients, workers and masters, frames of the data plane, records on disk.
//!
//! Compiled from `proto/*.proto` by `build.rs` with protox, so no `protoc` is needed. Hand-written beside them: the frame
//! codec, the Unix socket of the data plane and the conversions of errors.

pub mod convert;
pub mod frame;
#[cfg(test)]
mod golden;
pub mod unix;

#[allow(clippy::all, missing_docs, reason = "generated code")]
mod generated {
    tonic::include_proto!("forebay");
}
pub use generated::*;

/// What the journal holds.
#[allow(clippy::all, missing_docs, reason = "generated code")]
pub mod journal {
    tonic::include_proto!("forebay.journal");
}

/// Records of the master's store.
#[allow(clippy::all, missing_docs, reason = "generated code")]
pub mod store {
    tonic::include_proto!("forebay.store");
}

/// What the process of a FUSE mount hands to its successor.
#[allow(clippy::all, missing_docs, reason = "generated code")]
pub mod mount {
    tonic::include_proto!("forebay.mount");
}

/// Version of the data-plane protocol; `Hello` with another one is refused with both numbers.
pub const DATA_PROTOCOL_VERSION: u32 = 1;
