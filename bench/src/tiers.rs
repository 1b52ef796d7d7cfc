//! `bench tiers`: what each tier gives, what promotion changes, and what eviction costs writers; on a store of its own.
//!
//! Blocks are read as a worker does it (found by id, compared with their checksums at first touch). Pages of disk tiers are
//! dropped from the kernel's cache before they are read, so that the disk is measured and not the memory in front of it; the
//! reference reads the same file in the same state with `pread`.

use crate::figure::{Figure, Report, Times, median, rate, short};
use crate::own_store::{Folder, store_of};
use crate::references;
use bytesize::ByteSize;
use clap::Args;
use forebay_common::config::{EvictPolicy, Medium, TierConfig, TierDir};
use forebay_common::error::at;
use forebay_common::{BlockId, InodeId, Result, err};
use forebay_worker::store::{BlockFile, BlockStore, Header, paths};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `bench tiers`.
#[derive(Args)]
pub struct TiersOptions {
    /// The MEM tier
    #[arg(long, default_value = "256MiB")]
    mem: ByteSize,
    /// A folder for the SSD tier; without it a temporary one
    #[arg(long)]
    ssd_dir: Option<PathBuf>,
    /// A folder for an HDD tier below it
    #[arg(long)]
    hdd_dir: Option<PathBuf>,
    /// Bytes of each disk tier
    #[arg(long, default_value = "512MiB")]
    disk: ByteSize,
    /// Bytes per block
    #[arg(long, default_value = "8MiB")]
    block: ByteSize,
    /// Blocks read per tier
    #[arg(long, default_value_t = 8)]
    blocks: u64,
}

const PAGE_BYTES: u64 = 1 << 20;
const MIB: f64 = (1 << 20) as f64;
/// How long a block may take to move.
const MOVE_LIMIT: Duration = Duration::from_secs(60);

/// Measures and prints.
pub fn run(options: &TiersOptions, json: bool) -> Result<()> {
    if !options.block.as_u64().is_multiple_of(PAGE_BYTES) || options.block.as_u64() == 0 || options.blocks == 0 {
        return Err(err!(InvalidArgument, "bench tiers: --block in whole MiB, --blocks from 1 on"));
    }
    if options.blocks * options.block.as_u64() * 2 > options.mem.as_u64().min(options.disk.as_u64()) {
        return Err(err!(InvalidArgument, "bench tiers: twice --blocks x --block is more than a tier holds: make --mem and --disk larger"));
    }
    let mut report = Report::new(json);
    for medium in [Some(Medium::Mem), Some(Medium::Ssd), options.hdd_dir.as_ref().map(|_| Medium::Hdd)].into_iter().flatten() {
        one_tier(options, medium, &mut report)?;
    }
    promotion(options, &mut report)?;
    pressure(options, &mut report)?;
    report.finish()
}

fn header(id: u64, length: u64) -> Header {
    Header { block: BlockId(id), file: InodeId(1), length_bytes: length, page_size_bytes: PAGE_BYTES, flags: 0 }
}

fn tier(options: &TiersOptions, medium: Medium, folder: &Folder) -> TierConfig {
    let quota = if medium == Medium::Mem { options.mem } else { options.disk };
    let named = match medium {
        Medium::Mem => None,
        Medium::Ssd => options.ssd_dir.as_ref(),
        Medium::Hdd => options.hdd_dir.as_ref(),
    };
    let path = named.map_or_else(|| folder.path().join(medium.name()), |dir| folder.beside(dir, medium.name()));
    TierConfig { medium, dirs: vec![TierDir { path, quota, reserve: ByteSize::b(0) }] }
}

fn fill(store: &Arc<BlockStore>, id: u64, length: u64, page: &[u8]) -> Result<Arc<BlockFile>> {
    let file = store.get_or_create(header(id, length))?;
    for i in 0..file.header.pages() {
        store.fill_page(&file, i, page)?;
    }
    Ok(file)
}

/// Has the kernel forget the pages of a block's file.
fn forget_pages(file: &BlockFile) -> Result<File> {
    let (data, _) = paths(file.block.dir.path(), file.header.block);
    let data = File::open(&data).map_err(at(data.display()))?;
    data.sync_data().map_err(at("fsync"))?;
    posix_fadvise(&data, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|e| forebay_common::Error::io("fadvise", &e.into()))?;
    Ok(data)
}

/// Seconds to read a block whole, its checksums compared.
fn read(file: &BlockFile) -> Result<f64> {
    let began = Instant::now();
    for offset in (0..file.header.length_bytes).step_by(PAGE_BYTES as usize) {
        let length = PAGE_BYTES.min(file.header.length_bytes - offset) as usize;
        file.verify_range(offset, length)?;
        std::hint::black_box(&file.bytes(offset, length)?);
    }
    Ok(began.elapsed().as_secs_f64())
}

fn one_tier(options: &TiersOptions, medium: Medium, report: &mut Report) -> Result<()> {
    let folder = Folder::new("tiers")?;
    let store = store_of(&folder, vec![tier(options, medium, &folder)], EvictPolicy::S3Fifo, 0)?;
    let (length, page) = (options.block.as_u64(), vec![7u8; PAGE_BYTES as usize]);
    references::warm_memory();
    let began = Instant::now();
    let files = (1..=options.blocks).map(|id| fill(&store, id, length, &page)).collect::<Result<Vec<_>>>()?;
    let stored = (length * options.blocks) as f64 / MIB / began.elapsed().as_secs_f64();
    let (mut rates, mut plain, mut times, mut plain_times) = (Vec::new(), Vec::new(), Times::new(), Times::new());
    for file in &files {
        let data = forget_pages(file)?;
        plain.push(references::pread_sequential(&data, length)?);
        forget_pages(file)?;
        file.forget_verified();
        rates.push(length as f64 / MIB / read(file)?);
        let offsets: Vec<u64> = (0..64).map(|i| (i * 7919 % (length / 4096)) * 4096).collect();
        forget_pages(file)?;
        plain_times.merge(&references::pread_random(&data, &offsets)?);
        forget_pages(file)?;
        for offset in offsets {
            let began = Instant::now();
            std::hint::black_box(&file.bytes(offset, 4096)?);
            times.add(began.elapsed());
        }
    }
    let name = medium.name();
    let uncached = if medium == Medium::Mem { "pread of the same file" } else { "pread of the same file, neither cached" };
    report.add(rate(&format!("{name} tier, storing 1 MiB pages"), stored, None, "", length * options.blocks, None))?;
    report.add(rate(
        &format!("{name} tier, sequential, first touch"),
        median(rates),
        Some(median(plain)),
        uncached,
        length * options.blocks,
        None,
    ))?;
    report.add(short(&format!("{name} tier, random 4 KiB, verified"), &times, Some(plain_times.p50_us()), uncached))
}

/// A block at the bottom is read until it has moved up.
fn promotion(options: &TiersOptions, report: &mut Report) -> Result<()> {
    let lower = if options.hdd_dir.is_some() { Medium::Hdd } else { Medium::Ssd };
    let folder = Folder::new("promotion")?;
    let (length, page) = (options.block.as_u64(), vec![7u8; PAGE_BYTES as usize]);
    // Filled while there is no other tier, so that it is at the bottom.
    let below = tier(options, lower, &folder);
    drop(fill(&store_of(&folder, vec![below.clone()], EvictPolicy::S3Fifo, 0)?, 1, length, &page)?);
    let store = store_of(&folder, vec![tier(options, Medium::Mem, &folder), below], EvictPolicy::S3Fifo, 2)?;
    let file = store.get(BlockId(1)).ok_or_else(|| err!(Internal, "the block is gone"))?;
    forget_pages(&file)?;
    let before = length as f64 / MIB / read(&file)?;
    drop(file);
    let began = Instant::now();
    let moved = loop {
        let file = store.get(BlockId(1)).ok_or_else(|| err!(Internal, "the block is gone"))?;
        if file.block.dir.medium() == Medium::Mem {
            break file;
        }
        if began.elapsed() > MOVE_LIMIT {
            return Err(err!(Timeout, "the block was not promoted within {} s", MOVE_LIMIT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    report.add(Figure {
        name: format!("promotion of a block from {}", lower.name()),
        value: began.elapsed().as_secs_f64() * 1000.0,
        unit: "ms",
        threads: 1,
        ..Figure::default()
    })?;
    moved.forget_verified();
    let after = length as f64 / MIB / read(&moved)?;
    report.add(rate("read after promotion to MEM", after, Some(before), "the same block before it, uncached", length, None))
}

/// Four times the MEM tier is stored: everything older has to leave for it.
fn pressure(options: &TiersOptions, report: &mut Report) -> Result<()> {
    let (length, page) = (options.block.as_u64(), vec![7u8; PAGE_BYTES as usize]);
    let count = options.mem.as_u64() / length;
    let mut free_rate = None;
    for (name, media) in [("dropped", &[Medium::Mem][..]), ("moved to SSD", &[Medium::Mem, Medium::Ssd][..])] {
        let folder = Folder::new("pressure")?;
        let store = store_of(&folder, media.iter().map(|m| tier(options, *m, &folder)).collect(), EvictPolicy::S3Fifo, 0)?;
        let mut id = 0;
        let mut store_some = |blocks: u64| -> Result<f64> {
            references::warm_memory();
            let began = Instant::now();
            for _ in 0..blocks {
                id += 1;
                fill(&store, id, length, &page)?;
            }
            Ok((blocks * length) as f64 / MIB / began.elapsed().as_secs_f64())
        };
        let empty = store_some(count * 8 / 10)?;
        let reference = *free_rate.get_or_insert(empty);
        let full = store_some(count * 4)?;
        report.add(rate(
            &format!("storing under eviction, {name}"),
            full,
            Some(reference),
            "storing into the empty MEM tier",
            count * 4 * length,
            None,
        ))?;
    }
    Ok(())
}
