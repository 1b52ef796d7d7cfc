//! `bench read`.

use crate::figure::{Report, Times, median, rate, short};
use crate::{ReadOptions, cpu, references};
use forebay_client::{CreateOptions, FileReader, FileSystem};
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, err};
use forebay_ufs::{UfsUri, UnderStore};
use rand::Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::time::Instant;

const MIB: f64 = (1 << 20) as f64;

pub async fn run(fs: &FileSystem, config: &ClientConfig, options: &ReadOptions, report: &mut Report) -> Result<()> {
    let size = options.size.as_u64();
    fs.mkdir(&options.dir, true, true).await?;
    let path = options.dir.join(b"large")?;
    write_large(fs, &path, size, report).await?;
    let network = FileSystem::connect(&ClientConfig { short_circuit: false, ..config.clone() }).await?;
    match fs.open(&path).await?.descriptor(0).await {
        Some(descriptor) => local(config, options, &path, &File::from(descriptor), report).await?,
        None => eprintln!("forebay: no worker of this machine hands out descriptors (see `forebay fsadmin doctor`): short circuit is not measured"),
    }
    remote(&network, options, &path, report).await?;
    if let Some(path) = &options.cold {
        cold(fs, options, path, report).await?;
    }
    Ok(())
}

async fn write_large(fs: &FileSystem, path: &AbsPath, size: u64, report: &mut Report) -> Result<()> {
    let mut piece = vec![0u8; 1 << 20];
    rand::rng().fill(&mut piece[..]);
    let reference = {
        let dir = std::env::temp_dir().join(format!("forebay-bench-{}", std::process::id()));
        std::fs::create_dir_all("/dev/shm").ok();
        references::warm_memory();
        let target = std::path::Path::new("/dev/shm").join(dir.file_name().unwrap_or_default());
        let started = Instant::now();
        let mut file = File::create(&target).map_err(forebay_common::error::at(target.display()))?;
        for _ in 0..size >> 20 {
            std::io::Write::write_all(&mut file, &piece).map_err(forebay_common::error::at("reference write"))?;
        }
        let took = started.elapsed().as_secs_f64();
        let _ = std::fs::remove_file(&target);
        size as f64 / MIB / took
    };
    references::warm_memory();
    let before = cpu::seconds();
    let started = Instant::now();
    let options = CreateOptions { overwrite: true, write_type: "cache_only".into(), ..CreateOptions::default() };
    let mut writer = fs.create(path, &options).await?;
    for i in 0..size >> 20 {
        piece[..8].copy_from_slice(&i.to_le_bytes());
        writer.write(&piece).await?;
    }
    writer.close().await?;
    let took = started.elapsed().as_secs_f64();
    let cpu = (cpu::seconds() - before) * (1u64 << 30) as f64 / size as f64;
    report.add(rate("write, memory only, 1 MiB", size as f64 / MIB / took, Some(reference), "write() to tmpfs (/dev/shm)", size, Some(cpu)))
}

/// A client of its own, so that its grants and what it has verified are new.
async fn fresh(config: &ClientConfig, path: &AbsPath) -> Result<(FileSystem, FileReader)> {
    let fs = FileSystem::connect(config).await?;
    let file = fs.open(path).await?;
    Ok((fs, file))
}

fn random_offsets(size: u64, count: usize) -> Vec<u64> {
    (0..count).map(|_| rand::rng().random_range(0..size / 4096) * 4096).collect()
}

/// Places in chunks of their own, so that each read verifies one.
fn one_per_chunk(size: u64, count: usize) -> Vec<u64> {
    let chunk = forebay_common::limits::CHUNK_SIZE_BYTES as u64;
    let mut chunks: Vec<u64> = (1..size / chunk).collect();
    rand::seq::SliceRandom::shuffle(&mut chunks[..], &mut rand::rng());
    chunks.into_iter().take(count).map(|c| c * chunk + rand::rng().random_range(0..chunk / 4096) * 4096).collect()
}

async fn sequential(file: &FileReader, size: u64) -> Result<f64> {
    let mut buffer = vec![0u8; 1 << 20];
    let started = Instant::now();
    let mut at = 0;
    while at < size {
        at += file.read_at(at, &mut buffer).await? as u64;
        std::hint::black_box(&buffer);
    }
    Ok(size as f64 / MIB / started.elapsed().as_secs_f64())
}

async fn random(file: &FileReader, offsets: &[u64]) -> Result<Times> {
    let mut buffer = [0u8; 4096];
    let mut times = Times::new();
    for offset in offsets {
        let started = Instant::now();
        file.read_at(*offset, &mut buffer).await?;
        times.add(started.elapsed());
        std::hint::black_box(&buffer);
    }
    Ok(times)
}

async fn local(config: &ClientConfig, options: &ReadOptions, path: &AbsPath, reference: &File, report: &mut Report) -> Result<()> {
    let first_block = std::os::unix::fs::MetadataExt::size(&reference.metadata().map_err(forebay_common::error::at("reference"))?);
    let size = first_block.min(options.size.as_u64());
    let (mut references, mut first, mut again, mut slices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.passes.max(1) {
        references.push(references::pread_sequential(reference, size)?);
        let (_fs, file) = fresh(config, path).await?;
        // The grant itself is not what is measured here.
        file.read_at(0, &mut [0; 1]).await?;
        first.push(sequential(&file, size).await?);
        again.push(sequential(&file, size).await?);
        references.push(references::pread_sequential(reference, size)?);
        let started = Instant::now();
        let mut at = 0;
        while at < size {
            let bytes = file.slice(at, 1 << 20).await?;
            std::hint::black_box(sum(&bytes));
            at += bytes.len() as u64;
        }
        slices.push(size as f64 / MIB / started.elapsed().as_secs_f64());
    }
    let reference_rate = median(references);
    report.add(rate("short circuit, sequential 1 MiB, verified", median(again), Some(reference_rate), "pread on the same file", size, None))?;
    report.add(rate("short circuit, sequential 1 MiB, first touch", median(first), Some(reference_rate), "pread on the same file", size, None))?;
    report.add(rate("short circuit, slices summed, verified", median(slices), Some(reference_rate), "pread on the same file", size, None))?;

    let offsets = random_offsets(size, options.operations);
    let (_fs, file) = fresh(config, path).await?;
    file.read_at(0, &mut [0; 1]).await?;
    let first = random(&file, &one_per_chunk(size, options.operations)).await?;
    sequential(&file, size).await?;
    let again = random(&file, &offsets).await?;
    let reference_p50 = references::pread_random(reference, &offsets)?.p50_us();
    report.add(short("short circuit, random 4 KiB, verified", &again, Some(reference_p50), "pread on the same file"))?;
    report.add(short("short circuit, random 4 KiB, first touch", &first, Some(reference_p50), "pread on the same file"))?;
    open_read_close(config, options, report).await
}

/// One number from all bytes, so that they really are looked at.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0u64, |acc, word| acc ^ u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]))
}

async fn open_read_close(config: &ClientConfig, options: &ReadOptions, report: &mut Report) -> Result<()> {
    let count = (options.operations / 10).clamp(100, 1000);
    let fs = FileSystem::connect(config).await?;
    let write = CreateOptions { overwrite: true, write_type: "cache_only".into(), ..CreateOptions::default() };
    for i in 0..count {
        let mut file = fs.create(&options.dir.join(format!("small-{i}").as_bytes())?, &write).await?;
        file.write(&[i as u8; 4096]).await?;
        file.close().await?;
    }
    let (fs, _) = fresh(config, &options.dir.join(b"large")?).await?;
    let mut times = Times::new();
    let mut buffer = [0u8; 4096];
    for i in 0..count {
        let path = options.dir.join(format!("small-{i}").as_bytes())?;
        let started = Instant::now();
        let file = fs.open(&path).await?;
        file.read_at(0, &mut buffer).await?;
        drop(file);
        times.add(started.elapsed());
        if buffer[0] != i as u8 {
            return Err(err!(Corrupt, "small file {i} has other bytes than were written"));
        }
    }
    let reference = references::descriptor_round_trips(count)?.p50_us();
    report.add(short("short circuit, open + read 4 KiB + close", &times, Some(reference), "Unix socket round trip passing 2 descriptors"))
}

async fn remote(fs: &FileSystem, options: &ReadOptions, path: &AbsPath, report: &mut Report) -> Result<()> {
    let size = options.size.as_u64();
    let file = fs.open(path).await?;
    let (mut rates, mut cpus, mut tcp_rates, mut tcp_cpus) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.passes.max(1) {
        let (rate, cpu) = references::tcp_stream(size)?;
        tcp_rates.push(rate);
        tcp_cpus.push(cpu);
        let before = cpu::seconds();
        let started = Instant::now();
        let mut got = 0u64;
        let mut pieces = file.pieces(0..size);
        while let Some(piece) = pieces.next().await? {
            got += piece.len() as u64;
        }
        rates.push(got as f64 / MIB / started.elapsed().as_secs_f64());
        cpus.push((cpu::seconds() - before) * (1u64 << 30) as f64 / size as f64);
    }
    let (cpu, tcp_cpu) = (median(cpus), median(tcp_cpus));
    report.add(rate("network, sequential", median(rates), Some(median(tcp_rates)), "raw TCP stream over loopback", size, Some(cpu)))?;
    let mut figure = rate("network, sequential, CPU of both ends", cpu, Some(tcp_cpu), "raw TCP stream over loopback", size, Some(cpu));
    figure.unit = "s/GiB";
    figure.ratio = Some(tcp_cpu / cpu);
    report.add(figure)?;
    let offsets = random_offsets(size, options.operations);
    let times = random(&file, &offsets).await?;
    let reference = references::tcp_round_trips(options.operations)?.p50_us();
    report.add(short("network, random 4 KiB", &times, Some(reference), "TCP round trip of 4 KiB"))
}

/// The same object through us, freed before each pass, and straight from its store.
async fn cold(fs: &FileSystem, options: &ReadOptions, path: &AbsPath, report: &mut Report) -> Result<()> {
    let status = fs.get_status(path).await?;
    let parsed: BTreeMap<String, String> = options
        .ufs_options
        .iter()
        .map(|o| {
            o.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).ok_or_else(|| err!(InvalidArgument, "--ufs-option {o:?}: write KEY=VALUE"))
        })
        .collect::<Result<_>>()?;
    let (parent, name) = status.ufs_path.rsplit_once('/').ok_or_else(|| err!(InvalidArgument, "{path} is in no under store"))?;
    let store = UnderStore::open(&UfsUri::parse(parent)?, &parsed)?;
    let (mut ours, mut direct) = (Vec::new(), Vec::new());
    for _ in 0..options.passes.max(1) {
        let started = Instant::now();
        let mut at = 0;
        let mut flights = tokio::task::JoinSet::new();
        // As many ranges of the same size at once as a worker fetches.
        while at < status.length || !flights.is_empty() {
            while at < status.length && flights.len() < 4 {
                let length = (4u64 << 20).min(status.length - at);
                let (store, name, fingerprint) = (store.clone(), name.as_bytes().to_vec(), status.fingerprint.clone());
                flights.spawn(async move { store.read(&name, at, length as usize, &fingerprint).await });
                at += length;
            }
            if let Some(read) = flights.join_next().await {
                std::hint::black_box(read.map_err(|e| err!(Internal, "direct read: {e}"))??);
            }
        }
        direct.push(status.length as f64 / MIB / started.elapsed().as_secs_f64());
        fs.free(path).await?;
        wait_until_free(fs, path).await?;
        references::warm_memory();
        let started = Instant::now();
        let file = fs.open(path).await?;
        let mut got = 0u64;
        let mut pieces = file.pieces(0..u64::MAX);
        while let Some(piece) = pieces.next().await? {
            got += piece.len() as u64;
        }
        if got != status.length {
            return Err(err!(Corrupt, "{got} bytes came instead of {}", status.length));
        }
        ours.push(got as f64 / MIB / started.elapsed().as_secs_f64());
    }
    report.add(rate(
        "cold read, cached on the way",
        median(ours),
        Some(median(direct)),
        "the same object straight from its store",
        status.length,
        None,
    ))
}

/// Workers drop freed blocks at their next heartbeat.
async fn wait_until_free(fs: &FileSystem, path: &AbsPath) -> Result<()> {
    for _ in 0..100 {
        let used = fs.get_status_with_blocks(path, true).await?.status.map_or(0, |s| s.cached_bytes);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        if used == 0 {
            // The order to drop them goes out with the next heartbeat; a host that takes back free memory does so after two seconds.
            tokio::time::sleep(std::time::Duration::from_millis(3500)).await;
            return Ok(());
        }
    }
    Err(err!(Timeout, "{path} is still cached"))
}
