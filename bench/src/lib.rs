//! The bench: measures a running cluster, each figure beside a reference taken in the same run on the same machine.
//!
//! One JSON line per figure with `--json`, else a table. Figures are medians over several passes where a pass is long,
//! p50 and p99 where operations are short, CPU seconds per GiB of both ends where bytes cross a socket. Quote ratios:
//! machines are shared and noisy.

mod cpu;
mod figure;
mod metadata;
mod mount;
mod own_store;
mod raw;
mod read;
mod references;
mod start;
mod tiers;
mod trace;

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use figure::Report;
use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, LocalBoxed, Result};

/// What to measure.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Reads: short circuit, network, cold
    Read(ReadOptions),
    /// The namespace: create, getStatus, list, rename, delete
    Metadata(MetadataOptions),
    /// A FUSE mount of this cluster: cached blocks, larger files, names, small files
    Mount(MountOptions),
    /// How soon a worker with many blocks serves, on a store of its own; needs no cluster
    Start(start::StartOptions),
    /// Each tier, promotion, and storing under eviction, on a store of their own; needs no cluster
    Tiers(tiers::TiersOptions),
    /// Eviction policies, on a store of their own beside a simulation; needs no cluster
    Trace(trace::TraceOptions),
}

/// `bench read`.
#[derive(Args)]
pub struct ReadOptions {
    /// Folder for the bench's files; removed afterwards
    #[arg(long, default_value = "/.forebay-bench")]
    dir: AbsPath,
    /// Bytes of the large file
    #[arg(long, default_value = "256MiB")]
    size: ByteSize,
    /// Passes over the large file
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// Short operations of each kind
    #[arg(long, default_value_t = 5000)]
    operations: usize,
    /// Also read this file cold: it is freed before each pass, and read from its under store directly for reference
    #[arg(long)]
    cold: Option<AbsPath>,
    /// Options of that under store, for the direct reads; may be repeated
    #[arg(long = "ufs-option", value_name = "KEY=VALUE")]
    ufs_options: Vec<String>,
}

/// `bench mount`.
#[derive(Args)]
pub struct MountOptions {
    /// Where the cluster is mounted on this machine
    mountpoint: std::path::PathBuf,
    /// Folder for the bench's files; removed afterwards
    #[arg(long, default_value = "/.forebay-bench")]
    dir: AbsPath,
    /// Bytes of the large files
    #[arg(long, default_value = "128MiB")]
    size: ByteSize,
    /// Passes over the large files
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// Short operations of each kind
    #[arg(long, default_value_t = 5000)]
    operations: usize,
    /// How long the mount trusts names and attributes (its attr_ttl_ms and entry_ttl_ms)
    #[arg(long, default_value_t = 1100)]
    trusted_ms: u64,
}

/// `bench metadata`.
#[derive(Args)]
pub struct MetadataOptions {
    /// Folder for the bench's files; removed afterwards
    #[arg(long, default_value = "/.forebay-bench")]
    dir: AbsPath,
    /// Clients at once, each with a connection of its own
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Operations of each kind
    #[arg(long, default_value_t = 20_000)]
    operations: usize,
    /// Entries of the listed folder
    #[arg(long, default_value_t = 10_000)]
    entries: usize,
}

/// Measures and prints.
pub fn run(options: Options, config: &ClientConfig, json: bool) -> LocalBoxed<'_, Result<()>> {
    Box::pin(run_here(options, config, json))
}

async fn run_here(options: Options, config: &ClientConfig, json: bool) -> Result<()> {
    // Without a cluster, and without a runtime in the way.
    match options.what {
        What::Trace(options) => return alone(move || trace::run(&options, json)).await,
        What::Start(options) => return alone(move || start::run(&options, json)).await,
        What::Tiers(options) => return alone(move || tiers::run(&options, json)).await,
        What::Read(_) | What::Metadata(_) | What::Mount(_) => {}
    }
    let mut report = Report::new(json);
    let fs = FileSystem::connect(config).await?;
    match options.what {
        What::Read(options) => {
            let result = read::run(&fs, config, &options, &mut report).await;
            cleanup(&fs, &options.dir).await;
            result?;
        }
        What::Mount(options) => {
            let result = mount::run(&fs, &options, &mut report).await;
            cleanup(&fs, &options.dir).await;
            result?;
        }
        What::Metadata(options) => {
            let result = metadata::run(config, &options, &mut report).await;
            cleanup(&fs, &options.dir).await;
            result?;
        }
        What::Trace(_) | What::Tiers(_) | What::Start(_) => {}
    }
    fs.flush().await?;
    report.finish()
}

async fn alone(run: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(run).await.map_err(|e| forebay_common::err!(Internal, "bench: {e}"))?
}

async fn cleanup(fs: &FileSystem, dir: &AbsPath) {
    if let Err(e) = fs.delete(dir, true).await
        && e.kind() != forebay_common::ErrorKind::NotFound
    {
        eprintln!("forebay: {dir} stays behind: {e}");
    }
}
