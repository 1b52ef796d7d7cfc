//! The client library: `FileSystem` to find, make and change files, `FileReader` and `FileWriter` for their bytes.
//!
//! A read asks the master once (status, block locations, tokens) and then takes each block from the nearest source: a
//! descriptor passed by a worker of this machine (no call per read), that worker's Unix stream, the network, another
//! worker. Whatever goes wrong on one way is tried on the next, in the middle of the file; an error reaches the caller
//! only when no source is left, and names every one that was tried.
//!
//! ```no_run
//! # async fn f() -> forebay_common::Result<()> {
//! let fs = forebay_client::FileSystem::connect(&forebay_common::config::ClientConfig::default()).await?;
//! let file = fs.open(&"/s3/data.parquet".parse()?).await?;
//! let mut footer = [0u8; 8];
//! file.read_at(file.length() - 8, &mut footer).await?;
//! # Ok(()) }
//! ```

mod block;
mod counters;
mod file_system;
mod locks;
mod master;
mod pieces;
mod prefetch;
mod reader;
mod writer;

pub use block::Source;
pub use counters::Counters;
pub use file_system::{CreateOptions, FileSystem, Listing, LocalWorker};
pub use pieces::Pieces;
pub use reader::FileReader;
pub use writer::FileWriter;
