//! `forebay fs …`

mod copy;
pub mod metadata;
mod show;

pub use show::blocks_json;

use crate::args::{FsCommand, JobArgs, TtlAction};
use crate::job;
use crate::output::{self, Output};
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::config::ClientConfig;
use forebay_common::error::at;
use forebay_common::{AbsPath, ErrorKind, Result, err};
use forebay_proto::{Job, SetAttributesRequest};
use serde_json::json;
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Runs one command, then reports what the client counted.
pub async fn run(command: FsCommand, config: &ClientConfig, output: Output) -> Result<ExitCode> {
    let fs = FileSystem::connect(config).await?;
    let result = dispatch(&fs, command, output).await;
    let flushed = fs.flush().await;
    if let (Ok(_), Err(e)) = (&result, flushed) {
        tracing::warn!(error = %e, "the bytes this command moved were not reported to the master");
    }
    result
}

pub fn path(raw: &str) -> Result<AbsPath> {
    AbsPath::parse(raw)
}

async fn dispatch(fs: &FileSystem, command: FsCommand, output: Output) -> Result<ExitCode> {
    match command {
        FsCommand::Ls { path: p, recursive, limit } => show::ls(fs, &path(&p)?, recursive, limit, output).await?,
        FsCommand::Stat { path: p } => show::stat(fs, &path(&p)?, output).await?,
        FsCommand::Location { path: p } => show::location(fs, &path(&p)?, output).await?,
        FsCommand::Du { path: p, summary } => show::du(fs, &path(&p)?, summary, output).await?,
        FsCommand::Df => show::df(fs, output).await?,
        FsCommand::Count { path: p } => show::count(fs, &path(&p)?, output).await?,
        FsCommand::Cat { path: p, offset, length } => copy::cat(fs, &path(&p)?, offset, length.unwrap_or(u64::MAX)).await?,
        FsCommand::Head { path: p, bytes } => copy::cat(fs, &path(&p)?, 0, bytes).await?,
        FsCommand::Tail { path: p, bytes } => copy::tail(fs, &path(&p)?, bytes).await?,
        FsCommand::Cp { source, target, force, r#move, job } => {
            let source = path(&source)?;
            let target = into_folder(fs, &source, path(&target)?).await?;
            if target == source {
                return Err(err!(InvalidArgument, "{source} and {target} are the same"));
            }
            let asked = Job { target: raw(&target), overwrite: force, r#move, ..job.job("copy", &[source])? };
            job::start(fs, asked, if r#move { "moved" } else { "copied" }, !job.no_wait, output).await?;
        }
        FsCommand::Load { paths, list, replicas, tier, job } => {
            let asked = Job { replicas, tier: tier.unwrap_or_default().to_uppercase(), ..job.job("load", &paths_of(&paths, list.as_deref())?)? };
            job::start(fs, asked, "loaded", !job.no_wait, output).await?;
        }
        FsCommand::Persist { paths, job } => {
            let asked = job.job("persist", &paths_of(&paths, None)?)?;
            job::start(fs, asked, "persisted", !job.no_wait, output).await?;
        }
        FsCommand::SetReplication { paths, min, max, job } => {
            let asked = Job { replicas: min, replicas_max: max, ..job.job("replicate", &paths_of(&paths, None)?)? };
            job::start(fs, asked, "set the copies of", !job.no_wait, output).await?;
        }
        FsCommand::LoadMetadata { path: p, recursive } => metadata::load(fs, &path(&p)?, recursive, output).await?,
        FsCommand::CheckConsistency { path: p, repair } => metadata::check(fs, &path(&p)?, repair, output).await?,
        FsCommand::UpdateMount { path: p, read_only, options, unset } => {
            fs.update_mount(&path(&p)?, read_only, parse_options(&options)?, unset).await?;
            done(output)?;
        }
        FsCommand::Put { source, target, force, write_type, replicas } => {
            let options =
                CreateOptions { overwrite: force, recursive: true, write_type: write_type.unwrap_or_default(), replicas, ..CreateOptions::default() };
            copy::put(fs, &source, &path(&target)?, &options, output).await?;
        }
        FsCommand::Get { source, target, force } => copy::get(fs, &path(&source)?, &target, force, output).await?,
        FsCommand::Mv { source, target, force } => {
            let (source, target) = (path(&source)?, into_folder(fs, &path(&source)?, path(&target)?).await?);
            fs.rename(&source, &target, force).await?;
            done(output)?;
        }
        FsCommand::Rm { paths, recursive } => {
            let paths = paths.iter().map(|p| path(p)).collect::<Result<Vec<_>>>()?;
            let mut failed = 0;
            for p in &paths {
                // The others are not left because of one.
                if let Err(e) = fs.delete(p, recursive).await {
                    if paths.len() == 1 {
                        return Err(e);
                    }
                    eprintln!("forebay: {e}");
                    failed += 1;
                }
            }
            if failed > 0 {
                return Err(err!(Unavailable, "{failed} of {} were not deleted", paths.len()));
            }
            done(output)?;
        }
        FsCommand::Mkdir { paths, parents } => {
            for p in paths {
                fs.mkdir(&path(&p)?, parents, parents).await?;
            }
            done(output)?;
        }
        FsCommand::Touch { path: p } => {
            touch(fs, &path(&p)?).await?;
            done(output)?;
        }
        FsCommand::Test { path: p, exists, directory, file, size, zero } => return test(fs, &path(&p)?, [exists, directory, file, size, zero]).await,
        FsCommand::Chmod { mode, path: p } => {
            let bits = u32::from_str_radix(&mode, 8).map_err(|_| err!(InvalidArgument, "mode {mode:?} is not an octal number like 0644"))?;
            fs.set_attributes(&path(&p)?, SetAttributesRequest { mode: Some(bits), ..Default::default() }).await?;
            done(output)?;
        }
        FsCommand::Chown { owner, path: p } => {
            let (owner, group) = owner.split_once(':').map_or((owner.as_str(), None), |(o, g)| (o, Some(g.to_owned())));
            let owner = (!owner.is_empty()).then(|| owner.to_owned());
            if owner.is_none() && group.as_ref().is_none_or(String::is_empty) {
                return Err(err!(InvalidArgument, "chown needs OWNER, OWNER:GROUP or :GROUP"));
            }
            fs.set_attributes(&path(&p)?, SetAttributesRequest { owner, group, ..Default::default() }).await?;
            done(output)?;
        }
        FsCommand::Mount { path: None, .. } => mounts(fs, output).await?,
        FsCommand::Mount { path: Some(p), uri: Some(uri), read_only, shared, options } => {
            let mut options = parse_options(&options)?;
            if shared {
                options.insert("shared".to_owned(), "true".to_owned());
            }
            fs.mount(&path(&p)?, &uri, read_only, options).await?;
            output.show(&json!({ "mounted": p, "uri": uri }), || output::line(&format!("mounted {uri} on {p}")))?;
        }
        FsCommand::Mount { path: Some(p), uri: None, .. } => {
            return Err(err!(InvalidArgument, "what is to be mounted on {p}? write: forebay fs mount {p} s3://BUCKET/PREFIX"));
        }
        FsCommand::Unmount { path: p } => {
            fs.unmount(&path(&p)?).await?;
            done(output)?;
        }
        FsCommand::Pin { path: p } => pin(fs, &path(&p)?, true, output).await?,
        FsCommand::Unpin { path: p } => pin(fs, &path(&p)?, false, output).await?,
        FsCommand::SetTtl { path: p, time, action } => {
            let ttl_ms = parse_time(&time)?;
            let request = SetAttributesRequest { ttl_ms: Some(ttl_ms), ttl_frees: action == TtlAction::Free, ..Default::default() };
            let status = fs.set_attributes(&path(&p)?, request).await?;
            let does = if status.ttl_frees { "dropped from the cache" } else { "deleted" };
            let json = json!({ "path": p, "ttl_ms": status.ttl_ms, "ttl_expires_at_ms": status.ttl_expires_at_ms });
            output.show(&json, || output::line(&format!("{p} is {does} at {} UTC", output::time(status.ttl_expires_at_ms))))?;
        }
        FsCommand::UnsetTtl { path: p } => {
            fs.set_attributes(&path(&p)?, SetAttributesRequest { ttl_ms: Some(0), ..Default::default() }).await?;
            done(output)?;
        }
        FsCommand::Free { paths, job } if paths.len() > 1 || paths[0].contains(['*', '?', '[', '{']) => {
            job::start(fs, job.job("free", &paths_of(&paths, None)?)?, "freed", !job.no_wait, output).await?;
        }
        FsCommand::Free { paths, .. } => {
            let p = &paths[0];
            let freed = fs.free(&path(p)?).await?;
            let mut text = format!("{} cached blocks of {} files are dropped", freed.blocks, freed.files);
            if freed.refused > 0 {
                text += &format!("; {} files and folders were left alone, for lack of permission", freed.refused);
            }
            if freed.kept > 0 {
                text += &format!("; {} files were kept: they are pinned, or in no under store", freed.kept);
            }
            let json = json!({ "files": freed.files, "blocks": freed.blocks, "refused": freed.refused, "kept": freed.kept });
            output.show(&json, || output::line(&text))?;
            if freed.refused > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn raw(path: &AbsPath) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(path.as_bytes())
}

/// The paths of a job, those of a list file (one per line) among them.
fn paths_of(paths: &[String], list: Option<&std::path::Path>) -> Result<Vec<AbsPath>> {
    let mut all: Vec<String> = paths.to_vec();
    if let Some(list) = list {
        let text = std::fs::read_to_string(list).map_err(at(list.display()))?;
        all.extend(text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned));
    }
    if all.is_empty() {
        return Err(err!(InvalidArgument, "no path was given"));
    }
    all.iter().map(|p| path(p)).collect()
}

impl JobArgs {
    fn job(&self, kind: &str, paths: &[AbsPath]) -> Result<Job> {
        let bandwidth = self.bandwidth.map_or(0, |b| b.as_u64());
        Ok(Job { kind: kind.to_owned(), paths: paths.iter().map(raw).collect(), bandwidth, ..Job::default() })
    }
}

/// Pins files, or lets them go.
async fn pin(fs: &FileSystem, path: &AbsPath, pinned: bool, output: Output) -> Result<()> {
    let mut files = 0;
    for entry in fs.list(path, true).await?.into_iter().filter(|e| !e.folder && e.pinned != pinned) {
        let request = SetAttributesRequest { pinned: Some(pinned), ..Default::default() };
        fs.set_attributes(&AbsPath::parse(&entry.path)?, request).await?;
        files += 1;
    }
    let text = format!("{files} files {}", if pinned { "pinned" } else { "let go" });
    output.show(&json!({ "files": files }), || output::line(&text))
}

/// Milliseconds of `7d`, `1h 30m`, or of a bare number of them.
fn parse_time(raw: &str) -> Result<u64> {
    let bad = || err!(InvalidArgument, "{raw:?} is no time to live: write 90m, 7d, \"1h 30m\" or a number of milliseconds above 0");
    let ms = match raw.parse::<u64>() {
        Ok(ms) => ms,
        Err(_) => humantime::parse_duration(raw).ok().and_then(|d| u64::try_from(d.as_millis()).ok()).ok_or_else(bad)?,
    };
    if ms == 0 { Err(bad()) } else { Ok(ms) }
}

/// A change that has nothing to tell but that it is done.
fn done(output: Output) -> Result<()> {
    if output.json { output::line(&json!({ "ok": true }).to_string()) } else { Ok(()) }
}

fn parse_options(raw: &[String]) -> Result<BTreeMap<String, String>> {
    raw.iter()
        .map(|o| o.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).ok_or_else(|| err!(InvalidArgument, "--option {o:?}: write KEY=VALUE")))
        .collect()
}

/// `mv a /folder` means `/folder/a`.
pub async fn into_folder(fs: &FileSystem, source: &AbsPath, target: AbsPath) -> Result<AbsPath> {
    match (fs.get_status(&target).await, source.name()) {
        (Ok(status), Some(name)) if status.folder => target.join(name),
        _ => Ok(target),
    }
}

async fn touch(fs: &FileSystem, path: &AbsPath) -> Result<()> {
    match fs.touch(path, &CreateOptions::default()).await {
        Err(e) if e.kind() == ErrorKind::AlreadyExists || e.kind() == ErrorKind::IsADirectory => {
            let request = SetAttributesRequest { modified_ms: Some(forebay_common::clock::now_ms()), ..Default::default() };
            fs.set_attributes(path, request).await.map(drop)
        }
        other => other.map(drop),
    }
}

async fn test(fs: &FileSystem, path: &AbsPath, [exists, directory, file, size, zero]: [bool; 5]) -> Result<ExitCode> {
    if !(exists || directory || file || size || zero) {
        return Err(err!(InvalidArgument, "say what to test: -e, -d, -f, -s or -z"));
    }
    let status = match fs.get_status(path).await {
        Ok(status) => status,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(ExitCode::FAILURE),
        // Not "no", but "not known".
        Err(e) => {
            eprintln!("forebay: {e}");
            return Ok(ExitCode::from(2));
        }
    };
    let filled = if status.folder { size && !fs.list(path, false).await?.is_empty() } else { status.length > 0 };
    let holds = (!directory || status.folder) && (!file || !status.folder) && (!size || filled) && (!zero || (!status.folder && status.length == 0));
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn mounts(fs: &FileSystem, output: Output) -> Result<()> {
    let mounts = fs.list_mounts().await?;
    let text = |raw: &[u8]| String::from_utf8_lossy(raw).into_owned();
    let json: Vec<_> = mounts
        .iter()
        .map(|m| json!({ "path": text(&m.path), "uri": m.uri, "read_only": m.read_only, "options": m.options.iter().collect::<BTreeMap<_, _>>() }))
        .collect();
    output.show(&json!(json), || {
        output::table(
            &["PATH", "UNDER STORE", "MODE", "OPTIONS"],
            &[],
            mounts.iter().map(|m| {
                let options: BTreeMap<_, _> = m.options.iter().collect();
                let options = options.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ");
                vec![text(&m.path), m.uri.clone(), if m.read_only { "read-only" } else { "read-write" }.to_owned(), options]
            }),
        )
    })
}
