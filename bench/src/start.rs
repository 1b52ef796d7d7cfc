//! `bench start`: how soon a worker with many blocks serves, on a store of its own.
//!
//! The blocks hold one small page each. Measured are the time until the first block is served (names read), and until the
//! headers of all are, in the background.

use crate::figure::{Figure, Report};
use crate::own_store::{Folder, store_of};
use bytesize::ByteSize;
use clap::Args;
use forebay_common::config::{EvictPolicy, Medium, TierConfig, TierDir};
use forebay_common::{BlockId, InodeId, Result, err};
use forebay_worker::store::Header;
use std::path::PathBuf;
use std::time::Instant;

/// `bench start`.
#[derive(Args)]
pub struct StartOptions {
    /// Blocks in the tier
    #[arg(long, default_value_t = 100_000)]
    blocks: u64,
    /// Folder for the tier; a folder below it is made, and removed afterwards
    #[arg(long)]
    dir: Option<PathBuf>,
}

const BLOCK_BYTES: u64 = 512;

/// Measures and prints.
pub fn run(options: &StartOptions, json: bool) -> Result<()> {
    let mut report = Report::new(json);
    let folder = match &options.dir {
        Some(parent) => Folder::below(parent, "start")?,
        None => Folder::new("start")?,
    };
    let quota = ByteSize::b((options.blocks * 16_384).max(64 << 20));
    let tier = TierConfig { medium: Medium::Ssd, dirs: vec![TierDir { path: folder.path().join("SSD"), quota, reserve: ByteSize::b(0) }] };
    let open = || store_of(&folder, vec![tier.clone()], EvictPolicy::S3Fifo, 2);
    {
        let store = open()?;
        let bytes = vec![1u8; BLOCK_BYTES as usize];
        for id in 1..=options.blocks {
            let header = Header { block: BlockId(id), file: InodeId(1), length_bytes: BLOCK_BYTES, page_size_bytes: 64 << 10, flags: 0 };
            let file = store.get_or_create(header)?;
            store.fill_page(&file, 0, &bytes)?;
            if id % 100_000 == 0 {
                eprintln!("  {id} blocks made");
            }
        }
    }
    let began = Instant::now();
    let store = open()?;
    let middle = store.get(BlockId(options.blocks / 2 + 1)).ok_or_else(|| err!(Internal, "a block was not found after the start"))?;
    middle.verify_all()?;
    drop(middle);
    let figure = |name: &str, seconds: f64| Figure {
        name: format!("{name}, {} blocks", options.blocks),
        value: seconds,
        unit: "s",
        threads: 1,
        ..Figure::default()
    };
    report.add(figure("start to the first block served", began.elapsed().as_secs_f64()))?;
    while store.adopt_some() > 0 {}
    let found = store.ids().len() as u64;
    if found != options.blocks {
        return Err(err!(Corrupt, "{found} blocks were found again instead of {}", options.blocks));
    }
    report.add(figure("start until all headers are read", began.elapsed().as_secs_f64()))?;
    report.finish()
}
