//! `bench mount`: reads through a FUSE mount of this cluster, beside `pread` on the block's own file.

use crate::figure::{Report, Times, median, rate, short};
use crate::{MountOptions, cpu, references};
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::error::at;
use forebay_common::{AbsPath, Result, err};
use rand::Rng;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: f64 = (1 << 20) as f64;
/// Files of the folder whose names are looked up.
const NAMES: usize = 2_000;

/// Where a folder of the namespace is below a mount point. Errors: what is mounted there is not this cluster, or another folder of it.
async fn seen_at(fs: &FileSystem, mountpoint: &Path, dir: &AbsPath) -> Result<PathBuf> {
    let mark = format!("mark-{:016x}", rand::rng().random::<u64>());
    fs.touch(&dir.join(mark.as_bytes())?, &CreateOptions { write_type: "cache_only".into(), ..CreateOptions::default() }).await?;
    let mut below = PathBuf::from(String::from_utf8_lossy(dir.as_bytes()).trim_start_matches('/'));
    loop {
        let path = mountpoint.join(&below);
        if path.join(&mark).exists() {
            return Ok(path);
        }
        let mut rest = below.components();
        if rest.next().is_none() {
            return Err(err!(InvalidArgument, "{} shows no {dir} of this cluster: mount it there first (forebay mount)", mountpoint.display()));
        }
        below = rest.as_path().to_owned();
    }
}

fn write_file(path: &Path, size: u64, piece: &[u8]) -> Result<f64> {
    let began = Instant::now();
    let mut file = File::create(path).map_err(at(path.display()))?;
    let mut left = size;
    while left > 0 {
        let some = piece.len().min(usize::try_from(left).unwrap_or(piece.len()));
        file.write_all(&piece[..some]).map_err(at(path.display()))?;
        left -= some as u64;
    }
    file.sync_all().map_err(at(path.display()))?;
    Ok(size as f64 / MIB / began.elapsed().as_secs_f64())
}

/// One number of the mount's own.
fn metric(mountpoint: &Path, name: &str) -> u64 {
    let text = std::fs::read_to_string(mountpoint.join(".forebay-stats")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse::<f64>().ok()).map_or(0, |value| value as u64)
}

/// The kernel forgets what it read of a file.
fn drop_cache(file: &File) -> Result<()> {
    nix::fcntl::posix_fadvise(file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|e| err!(Internal, "posix_fadvise: {e}"))
}

pub async fn run(fs: &FileSystem, options: &MountOptions, report: &mut Report) -> Result<()> {
    fs.mkdir(&options.dir, true, true).await?;
    let folder = seen_at(fs, &options.mountpoint, &options.dir).await?;
    let size = options.size.as_u64();
    let mut piece = vec![0u8; 1 << 20];
    rand::rng().fill(&mut piece[..]);

    // Written through the mount, beside the same write to memory.
    let memory = Path::new("/dev/shm").join(format!("forebay-bench-{}", std::process::id()));
    let reference = write_file(&memory, size, &piece);
    let _ = std::fs::remove_file(&memory);
    let before = cpu::seconds();
    let written = write_file(&folder.join("written"), size, &piece)?;
    let cpu_s = (cpu::seconds() - before) * (1u64 << 30) as f64 / size as f64;
    report.add(rate("mount, write 1 MiB and fsync", written, Some(reference?), "write() to tmpfs (/dev/shm)", size, Some(cpu_s)))?;

    // One block, cached: read by the kernel itself where it can.
    let path = options.dir.join(b"one")?;
    let create = CreateOptions {
        overwrite: true,
        write_type: "cache_only".into(),
        block_size_bytes: size.next_multiple_of(1 << 20),
        ..CreateOptions::default()
    };
    let mut writer = fs.create(&path, &create).await?;
    for _ in 0..size.div_ceil(1 << 20) {
        writer.write(&piece).await?;
    }
    writer.close().await?;
    let reader = fs.open(&path).await?;
    let backing = reader
        .descriptor(0)
        .await
        .ok_or_else(|| err!(Unsupported, "no worker of this machine hands out descriptors (see `forebay fsadmin doctor`)"))?;
    let backing = File::from(backing);
    let file = File::open(folder.join("one")).map_err(at("the file on the mount"))?;
    // The statistics are read through the process as well.
    let reads = || metric(&options.mountpoint, "forebay_fuse_reads_total");
    let own = {
        let first = reads();
        reads() - first
    };
    let before = reads();
    let (mut through, mut direct) = (Vec::new(), Vec::new());
    for _ in 0..options.passes.max(1) {
        direct.push(references::pread_sequential(&backing, size)?);
        through.push(references::pread_sequential(&file, size)?);
    }
    let direct = median(direct);
    report.add(rate("mount, cached block, sequential 1 MiB", median(through), Some(direct), "pread on the backing file", size, None))?;
    let offsets: Vec<u64> = (0..options.operations).map(|_| rand::rng().random_range(0..size / 4096) * 4096).collect();
    let reference = references::pread_random(&backing, &offsets)?.p50_us();
    report.add(short(
        "mount, cached block, random 4 KiB",
        &references::pread_random(&file, &offsets)?,
        Some(reference),
        "pread on the backing file",
    ))?;
    eprintln!("reads that came to the mount's process for the cached block: {}", (reads() - before).saturating_sub(own));

    // Several blocks: through the process, with the kernel's cache dropped before each pass.
    let path = options.dir.join(b"several")?;
    let create = CreateOptions { block_size_bytes: 8 << 20, ..create };
    let mut writer = fs.create(&path, &create).await?;
    for _ in 0..size.div_ceil(1 << 20) {
        writer.write(&piece).await?;
    }
    writer.close().await?;
    let file = File::open(folder.join("several")).map_err(at("the file on the mount"))?;
    let (mut rates, mut spent) = (Vec::new(), Vec::new());
    for _ in 0..options.passes.max(1) {
        drop_cache(&file)?;
        let before = cpu::seconds();
        rates.push(references::pread_sequential(&file, size)?);
        spent.push((cpu::seconds() - before) * (1u64 << 30) as f64 / size as f64);
    }
    report.add(rate(
        "mount, blocks of 8 MiB, sequential 1 MiB",
        median(rates),
        Some(direct),
        "pread on the backing file",
        size,
        Some(median(spent)),
    ))?;
    names(&folder, options, report)?;
    small(&folder, options, report)
}

/// Attributes of names that the kernel knows, of others, and of what is not there.
fn names(folder: &Path, options: &MountOptions, report: &mut Report) -> Result<()> {
    let dir = folder.join("names");
    std::fs::create_dir(&dir).map_err(at(dir.display()))?;
    let all: Vec<PathBuf> = (0..NAMES).map(|i| dir.join(format!("{i:05}"))).collect();
    for path in &all {
        File::create(path).map_err(at(path.display()))?;
    }
    // What was told is trusted for a while.
    std::thread::sleep(Duration::from_millis(options.trusted_ms));
    let timed = |paths: &mut dyn Iterator<Item = &PathBuf>| {
        let mut times = Times::new();
        for path in paths {
            let began = Instant::now();
            std::hint::black_box(std::fs::metadata(path).is_ok());
            times.add(began.elapsed());
        }
        times
    };
    report.add(short("mount, stat, not known to the kernel", &timed(&mut all.iter()), None, ""))?;
    report.add(short("mount, stat, known to the kernel", &timed(&mut all[..100].iter().cycle().take(options.operations)), None, ""))?;
    let missing: Vec<PathBuf> = (0..NAMES).map(|i| dir.join(format!("no{i}"))).collect();
    report.add(short("mount, stat, missing name", &timed(&mut missing.iter()), None, ""))
}

/// Open, read, close of small cached files.
fn small(folder: &Path, options: &MountOptions, report: &mut Report) -> Result<()> {
    let dir = folder.join("small");
    std::fs::create_dir(&dir).map_err(at(dir.display()))?;
    let bytes = vec![7u8; 64 << 10];
    let mut create = Times::new();
    let paths: Vec<PathBuf> = (0..NAMES).map(|i| dir.join(format!("{i:05}"))).collect();
    for path in &paths {
        let began = Instant::now();
        std::fs::write(path, &bytes).map_err(at(path.display()))?;
        create.add(began.elapsed());
    }
    report.add(short("mount, create + write 64 KiB + close", &create, None, ""))?;
    let mut times = Times::new();
    let mut out = vec![0u8; 64 << 10];
    for path in paths.iter().cycle().take(options.operations.min(2 * NAMES)) {
        let began = Instant::now();
        let file = OpenOptions::new().read(true).open(path).map_err(at(path.display()))?;
        file.read_exact_at(&mut out, 0).map_err(at(path.display()))?;
        drop(file);
        times.add(began.elapsed());
    }
    report.add(short("mount, open + read 64 KiB + close", &times, None, ""))
}
