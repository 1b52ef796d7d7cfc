//! `bench trace`: what each eviction policy keeps, on a store of its own (the worker's very code, real files) and in a
//! simulation of the policy alone.
//!
//! The reads follow Zipf's law over a set of blocks larger than the MEM tier and smaller than MEM and SSD together. In the
//! middle a scan of other blocks, each read once, comes between them. What is shown: hits per tier, how far the store is from
//! the simulation, and what the scan cost the hot set (the most popular blocks that fill half of MEM).

mod plot;
mod simulation;

use crate::own_store::{Folder, store_of};
use bytesize::ByteSize;
use clap::Args;
use forebay_common::config::{EvictPolicy, Medium, TierConfig, TierDir, WorkerConfig};
use forebay_common::{BlockId, ErrorKind, InodeId, Result, err};
use forebay_worker::store::{BlockStore, Header};
use rand::SeedableRng;
use rand::distr::Distribution;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `bench trace`.
#[derive(Args)]
pub struct TraceOptions {
    /// The MEM tier
    #[arg(long, default_value = "64MiB")]
    mem: ByteSize,
    /// The SSD tier
    #[arg(long, default_value = "384MiB")]
    ssd: ByteSize,
    /// Bytes of the blocks that are read, all together
    #[arg(long, default_value = "192MiB")]
    set: ByteSize,
    /// Bytes per block
    #[arg(long, default_value = "256KiB")]
    block: ByteSize,
    /// Reads, without those of the scan
    #[arg(long, default_value_t = 20_000)]
    operations: usize,
    /// Reads per second
    #[arg(long, default_value_t = 4_000)]
    rate: u64,
    /// Exponent of Zipf's law
    #[arg(long, default_value_t = 1.0)]
    zipf: f64,
    /// Bytes of the blocks of the scan; 0: no scan
    #[arg(long, default_value = "128MiB")]
    scan: ByteSize,
    /// The same number gives the same reads
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the tiers; a folder below it is made, and removed afterwards
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Draw hits per tier over time into this file
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// One read of the trace.
#[derive(Clone, Copy)]
struct Read {
    id: u64,
    scan: bool,
    hot: bool,
}

/// Where a read was served from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    Mem,
    Ssd,
    Missed,
}

/// Percentages of one policy.
#[derive(Serialize)]
struct Outcome {
    name: String,
    policy: &'static str,
    unit: &'static str,
    mem_hits: f64,
    mem_hits_simulated: f64,
    ssd_hits: f64,
    misses: f64,
    hot_mem_hits_before_scan: f64,
    hot_mem_hits_during_scan: f64,
    reads: usize,
    seed: u64,
}

/// A tier's folder holds a data and a header file per block.
const HEADER_FILE_BYTES: u64 = 4096;
/// Reads after the scan that count as during it.
const AFTERMATH: usize = 500;
/// The first reads fill the tiers and are not counted.
const WARM_UP_SHARE: usize = 5;
const ALL: [(EvictPolicy, &str); 3] = [(EvictPolicy::S3Fifo, "s3_fifo"), (EvictPolicy::Lru, "lru"), (EvictPolicy::Lfu, "lfu")];

/// Runs all policies and prints.
pub fn run(options: &TraceOptions, json: bool) -> Result<()> {
    if options.block.as_u64() < 4096 || options.set < options.block || options.operations < 100 || options.rate == 0 {
        return Err(err!(
            InvalidArgument,
            "bench trace: --block from 4 KiB on, --set at least one block, --operations from 100 on, --rate from 1 on"
        ));
    }
    let reads = trace(options)?;
    let mut plots = Vec::new();
    if !json {
        println!(
            "{:<8} {:>9} {:>10} {:>6} {:>9} {:>7}  {:>16} {:>11} {:>5}",
            "POLICY", "MEM HITS", "SIMULATED", "APART", "SSD HITS", "MISSES", "HOT SET IN MEM", "DURING SCAN", "LOST"
        );
    }
    for (policy, name) in ALL {
        eprintln!("  {name}: {} reads at {}/s", reads.len(), options.rate);
        let simulated = simulation::run(policy, options, &reads);
        let served = on_a_store(policy, options, &reads)?;
        let o = outcome(name, &reads, &served, &simulated, options.seed);
        if json {
            println!("{}", serde_json::to_string(&o).map_err(|e| err!(Internal, "figure: {e}"))?);
        } else {
            println!(
                "{name:<8} {:>8.1}% {:>9.1}% {:>6.1} {:>8.1}% {:>6.1}%  {:>15.1}% {:>10.1}% {:>5.1}",
                o.mem_hits,
                o.mem_hits_simulated,
                (o.mem_hits - o.mem_hits_simulated).abs(),
                o.ssd_hits,
                o.misses,
                o.hot_mem_hits_before_scan,
                o.hot_mem_hits_during_scan,
                o.hot_mem_hits_before_scan - o.hot_mem_hits_during_scan
            );
        }
        plots.push((name, served, simulated));
    }
    if let Some(path) = &options.svg {
        plot::draw(path, &reads, &plots)?;
        eprintln!("  drawn: {}", path.display());
    }
    Ok(())
}

/// The reads: ids below a million by popularity, those of the scan above.
fn trace(options: &TraceOptions) -> Result<Vec<Read>> {
    let blocks = options.set.as_u64() / options.block.as_u64();
    let hot = options.mem.as_u64() / 2 / options.block.as_u64();
    let scanned = options.scan.as_u64() / options.block.as_u64();
    let zipf = rand_distr::Zipf::new(blocks as f64, options.zipf).map_err(|e| err!(InvalidArgument, "--zipf {}: {e}", options.zipf))?;
    let mut random = rand::rngs::StdRng::seed_from_u64(options.seed);
    let mut reads = Vec::with_capacity(options.operations + scanned as usize);
    let mut left = 0..scanned;
    for i in 0..options.operations {
        let id = zipf.sample(&mut random) as u64;
        reads.push(Read { id, scan: false, hot: id <= hot });
        // From the middle on, every other read is the scan's.
        if i >= options.operations / 2
            && let Some(n) = left.next()
        {
            reads.push(Read { id: 1_000_000 + n, scan: true, hot: false });
        }
    }
    Ok(reads)
}

fn percent(part: usize, all: usize) -> f64 {
    part as f64 * 100.0 / all.max(1) as f64
}

fn outcome(policy: &'static str, reads: &[Read], served: &[Served], simulated: &[Served], seed: u64) -> Outcome {
    let from = reads.len() / WARM_UP_SHARE;
    let counted = || (from..reads.len()).filter(|i| !reads[*i].scan);
    let share = |of: &[Served], what: Served| percent(counted().filter(|i| of[*i] == what).count(), counted().count());
    let scan_from = reads.iter().position(|r| r.scan).unwrap_or(reads.len());
    let scan_to = reads.iter().rposition(|r| r.scan).map_or(reads.len(), |last| (last + AFTERMATH).min(reads.len()));
    let hot = |range: std::ops::Range<usize>| {
        let all: Vec<usize> = range.filter(|i| reads[*i].hot).collect();
        percent(all.iter().filter(|i| served[**i] == Served::Mem).count(), all.len())
    };
    Outcome {
        name: format!("trace, {policy}"),
        policy,
        unit: "% of reads",
        mem_hits: share(served, Served::Mem),
        mem_hits_simulated: share(simulated, Served::Mem),
        ssd_hits: share(served, Served::Ssd),
        misses: share(served, Served::Missed),
        hot_mem_hits_before_scan: hot(from..scan_from),
        hot_mem_hits_during_scan: hot(scan_from..scan_to),
        reads: reads.len(),
        seed,
    }
}

fn tiers(options: &TraceOptions, folder: &Folder) -> Vec<TierConfig> {
    let tier = |medium: Medium, quota| TierConfig {
        medium,
        dirs: vec![TierDir { path: folder.path().join(medium.name()), quota, reserve: ByteSize::b(0) }],
    };
    vec![tier(Medium::Mem, options.mem), tier(Medium::Ssd, options.ssd)]
}

/// The reads on a real store: what is missing is stored, what is there is read and compared.
fn on_a_store(policy: EvictPolicy, options: &TraceOptions, reads: &[Read]) -> Result<Vec<Served>> {
    let folder = match &options.dir {
        Some(parent) => Folder::below(parent, "trace")?,
        None => Folder::new("trace")?,
    };
    let store = store_of(&folder, tiers(options, &folder), policy, WorkerConfig::default().promote_after)?;
    let began = Instant::now();
    let mut served = Vec::with_capacity(reads.len());
    for (i, read) in reads.iter().enumerate() {
        let due = Duration::from_nanos(i as u64 * 1_000_000_000 / options.rate);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        served.push(read_one(&store, read.id, options.block.as_u64())?);
    }
    Ok(served)
}

fn read_one(store: &Arc<BlockStore>, id: u64, length: u64) -> Result<Served> {
    let expected = vec![id as u8; usize::try_from(length).unwrap_or(0)];
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(file) = store.get(BlockId(id)).filter(|f| f.is_full()) {
            let bytes = file.verify_all().and_then(|()| file.bytes(0, expected.len()))?;
            if bytes != expected {
                return Err(err!(Corrupt, "block {id} has other bytes than were stored"));
            }
            return Ok(if file.block.dir.medium() == Medium::Mem { Served::Mem } else { Served::Ssd });
        }
        let header = Header {
            block: BlockId(id),
            file: InodeId(1),
            length_bytes: length,
            page_size_bytes: length.next_power_of_two().max(64 << 10),
            flags: 0,
        };
        match store.get_or_create(header).and_then(|file| store.fill_page(&file, 0, &expected)) {
            Ok(()) => return Ok(Served::Missed),
            // On its way between the tiers.
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: TraceOptions,
    }

    /// The simulation alone, which is exact: the default policy keeps its hot set through a scan, LRU loses it; and all are in
    /// reach of what the popularity of the blocks allows.
    #[test]
    fn a_scan_does_not_flush_the_hot_set() {
        let options = Line::parse_from(["trace", "--operations", "20000"]).options;
        let reads = trace(&options).unwrap();
        let lost = |policy, name| {
            let served = simulation::run(policy, &options, &reads);
            let o = outcome(name, &reads, &served, &served, 1);
            assert!(o.mem_hits > 40.0 && o.mem_hits + o.ssd_hits > 95.0, "{name}: {} {}", o.mem_hits, o.ssd_hits);
            o.hot_mem_hits_before_scan - o.hot_mem_hits_during_scan
        };
        assert!(lost(EvictPolicy::S3Fifo, "s3_fifo") < 10.0);
        assert!(lost(EvictPolicy::S3Fifo, "s3_fifo") < lost(EvictPolicy::Lru, "lru"));
    }
}
