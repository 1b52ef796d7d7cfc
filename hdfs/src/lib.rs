//! Hadoop's wire formats, and nothing else: what they mean is the business of the master and the workers.
//!
//! `hadoop` holds the messages (compiled from Hadoop's own files), `ipc` the frames of Hadoop RPC version 9, `transfer` those of
//! DataTransferProtocol version 28, `server` one connection of a server, `client` a plain IPC client for the few calls that we make ourselves, `exception` the names by
//! which Hadoop's clients know errors.
//!
//! Invariants: nothing is allocated before a length was compared with its limit; no input makes a parser panic; a message that
//! cannot be understood is an error with what was wrong, never a guess.

pub mod client;
pub mod exception;
pub mod ipc;
pub mod replica;
pub mod server;
pub mod transfer;

/// Messages, by Hadoop's own packages.
#[allow(missing_docs, clippy::all, reason = "generated from Hadoop's files")]
pub mod hadoop {
    /// `hadoop.common`: headers of calls, tokens.
    pub mod common {
        include!(concat!(env!("OUT_DIR"), "/hadoop.common.rs"));
    }
    /// `hadoop.hdfs`: the namespace's and the data's messages.
    pub mod hdfs {
        include!(concat!(env!("OUT_DIR"), "/hadoop.hdfs.rs"));
    }
}
