//! Moving bytes: cat, tail, put, get.

use crate::output::{self, Output, bytes};
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::error::at;
use forebay_common::{AbsPath, ErrorKind, Result, err};
use indicatif::ProgressBar;
use serde_json::json;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes read from a local file at once.
const LOCAL_PIECE_BYTES: usize = 1 << 20;

pub async fn cat(fs: &FileSystem, path: &AbsPath, offset: u64, length: u64) -> Result<()> {
    let file = fs.open(path).await?;
    let mut pieces = file.pieces(offset..offset.saturating_add(length));
    // Not through `Stdout`, which looks for the last newline of every piece.
    let mut out = std::fs::File::from(std::io::stdout().as_fd().try_clone_to_owned().map_err(at("printing"))?);
    let mut print = async || {
        while let Some(piece) = pieces.next().await? {
            out.write_all(&piece).map_err(at("printing"))?;
        }
        Ok::<(), forebay_common::Error>(())
    };
    match print().await {
        // `forebay fs cat … | head` has read enough.
        Err(e) if e.kind() == ErrorKind::Unavailable && e.message().starts_with("printing") => Ok(()),
        other => other,
    }
}

pub async fn tail(fs: &FileSystem, path: &AbsPath, bytes: u64) -> Result<()> {
    let length = fs.get_status(path).await?.length;
    cat(fs, path, length.saturating_sub(bytes), bytes).await
}

/// What a copy did, for its last line.
struct Tally {
    started: Instant,
    files: u64,
    bytes: u64,
}

impl Tally {
    fn new() -> Self {
        Tally { started: Instant::now(), files: 0, bytes: 0 }
    }

    fn show(&self, did: &str, output: Output) -> Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        let text = format!(
            "{did} {} files, {} in {seconds:.2} s ({}/s)",
            self.files,
            bytes(self.bytes),
            bytes((self.bytes as f64 / seconds.max(1e-9)) as u64)
        );
        output.show(&json!({ "files": self.files, "bytes": self.bytes, "seconds": seconds }), || output::line(&text))
    }
}

/// Name relative to the top, whether it is a folder, length.
type LocalEntry = (PathBuf, bool, u64);

/// Local files below a path, with their names relative to it; folders before what is in them.
///
/// Links are followed. What is neither file nor folder (a pipe, a device) is named in the second list and left out, unless it is
/// `top` itself: then it is read to its end.
fn walk_local(top: &Path) -> Result<(Vec<LocalEntry>, Vec<PathBuf>)> {
    let meta = std::fs::metadata(top).map_err(at(top.display()))?;
    let mut left_out = Vec::new();
    let mut out = vec![(PathBuf::new(), meta.is_dir(), meta.len())];
    let mut folders = if meta.is_dir() { vec![PathBuf::new()] } else { Vec::new() };
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(top.join(&folder)).map_err(at(folder.display()))? {
            let entry = entry.map_err(at(folder.display()))?;
            let relative = folder.join(entry.file_name());
            let meta = std::fs::metadata(entry.path()).map_err(at(entry.path().display()))?;
            if meta.is_dir() {
                folders.push(relative.clone());
            }
            if meta.is_dir() || meta.is_file() {
                out.push((relative, meta.is_dir(), meta.len()));
            } else {
                left_out.push(entry.path());
            }
        }
    }
    Ok((out, left_out))
}

fn join_relative(base: &AbsPath, relative: &Path) -> Result<AbsPath> {
    relative.components().try_fold(base.clone(), |path, part| path.join(part.as_os_str().as_bytes()))
}

pub async fn put(fs: &FileSystem, source: &Path, target: &AbsPath, options: &CreateOptions, output: Output) -> Result<()> {
    let (all, left_out) = walk_local(source)?;
    let name = source.file_name().map(|n| n.as_bytes().to_vec());
    let target = match (fs.get_status(target).await, name) {
        (Ok(status), Some(name)) if status.folder => target.join(&name)?,
        _ => target.clone(),
    };
    let bar = output.progress("put", all.iter().filter(|(_, folder, _)| !folder).map(|(.., length)| length).sum());
    let mut tally = Tally::new();
    for (relative, folder, _) in all {
        let to = join_relative(&target, &relative)?;
        if folder {
            fs.mkdir(&to, true, true).await?;
            continue;
        }
        tally.bytes += put_one(fs, &source.join(&relative), &to, options, &bar).await?;
        tally.files += 1;
    }
    bar.finish_and_clear();
    tally.show("put", output)?;
    for path in &left_out {
        eprintln!("forebay: {} is neither a file nor a folder and was left out", path.display());
    }
    if left_out.is_empty() { Ok(()) } else { Err(err!(Unsupported, "{} were left out", left_out.len())) }
}

async fn put_one(fs: &FileSystem, source: &Path, target: &AbsPath, options: &CreateOptions, bar: &ProgressBar) -> Result<u64> {
    // `join("")` of a single file leaves a trailing slash, which the kernel refuses for a file.
    let source: PathBuf = source.components().collect();
    let mut file = tokio::fs::File::open(&source).await.map_err(at(source.display()))?;
    let mut writer = fs.create(target, options).await?;
    let mut buffer = vec![0; LOCAL_PIECE_BYTES];
    let mut copied = 0;
    loop {
        let read = file.read(&mut buffer).await.map_err(at(source.display()))?;
        if read == 0 {
            break;
        }
        writer.write(&buffer[..read]).await?;
        copied += read as u64;
        bar.inc(read as u64);
    }
    writer.close().await?;
    Ok(copied)
}

pub async fn get(fs: &FileSystem, source: &AbsPath, target: &Path, force: bool, output: Output) -> Result<()> {
    let status = fs.get_status(source).await?;
    let target = match source.name() {
        Some(name) if target.is_dir() => target.join(std::ffi::OsStr::from_bytes(name)),
        _ => target.to_owned(),
    };
    let entries = if status.folder { fs.list(source, true).await? } else { vec![status.clone()] };
    let bar = output.progress("get", entries.iter().map(|e| e.length).sum());
    let mut tally = Tally::new();
    if status.folder {
        std::fs::create_dir_all(&target).map_err(at(target.display()))?;
    }
    for entry in entries {
        let from = AbsPath::parse(&entry.path)?;
        let relative = from.strip_prefix(source).unwrap_or_default();
        let to: PathBuf = target.join(std::ffi::OsStr::from_bytes(relative)).components().collect();
        if entry.folder {
            std::fs::create_dir_all(&to).map_err(at(to.display()))?;
            continue;
        }
        get_one(fs, &from, &to, force, &bar).await?;
        tally.files += 1;
        tally.bytes += entry.length;
    }
    bar.finish_and_clear();
    tally.show("got", output)
}

/// Into a temporary name, then renamed: a half-copied file never has the real name.
async fn get_one(fs: &FileSystem, source: &AbsPath, target: &Path, force: bool, bar: &ProgressBar) -> Result<()> {
    if !force && target.exists() {
        return Err(err!(AlreadyExists, "{} exists already: use -f to replace it", target.display()));
    }
    let mut temporary = target.as_os_str().to_owned();
    temporary.push(".forebay-part");
    let temporary = PathBuf::from(temporary);
    let file = fs.open(source).await?;
    let mut out = tokio::fs::File::create(&temporary).await.map_err(at(temporary.display()))?;
    let copied = async {
        let mut pieces = file.pieces(0..u64::MAX);
        while let Some(piece) = pieces.next().await? {
            bar.inc(piece.len() as u64);
            out.write_all(&piece).await.map_err(at("writing"))?;
        }
        Ok(())
    }
    .await;
    let flushed = out.flush().await.map_err(at(temporary.display()));
    if let Err(e) = copied.and(flushed) {
        let _ = std::fs::remove_file(&temporary);
        return Err(e);
    }
    std::fs::rename(&temporary, target).map_err(at(target.display()))
}
