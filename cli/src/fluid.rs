//! `forebay fluid`: what Fluid runs in the pods of a CacheRuntime, since the image has no shell for scripts. It reads standard output as JSON, nothing else may be there.
//!
//! Called by Fluid's controllers through `kubectl exec` (mountUFS and reportSummary in the master's pod, again and again) and as a job (DataLoad). `mount` brings the mount table
//! to what the dataset says, so that it may be run at any time, and killed.

use crate::args::FluidCommand;
use crate::fs::{metadata, path};
use crate::job;
use crate::output::{self, Output};
use forebay_client::FileSystem;
use forebay_common::config::{ClientConfig, FluidMount, FluidRuntime};
use forebay_common::{AbsPath, Result, UfsUri, err};
use forebay_proto::{Job, MountPoint, ReportResponse};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Runs a `fluid` command.
pub async fn run(command: &FluidCommand, config: &ClientConfig, output: Output) -> Result<()> {
    match command {
        FluidCommand::Mount => {
            let runtime = runtime()?;
            let fs = FileSystem::connect(config).await?;
            output::line(&json!({ "mounted": mount(&fs, &runtime).await? }).to_string())
        }
        FluidCommand::Summary => {
            let fs = FileSystem::connect(config).await?;
            output::line(&summary(&fs.report().await?).to_string())
        }
        FluidCommand::Load => {
            let asked = asked(&variable("FLUID_DATALOAD_DATA_PATH"), &variable("FLUID_DATALOAD_PATH_REPLICAS"))?;
            let fs = FileSystem::connect(config).await?;
            // A connection is made by the first call.
            fs.list_mounts().await.map_err(|e| {
                e.context("Fluid does not tell a DataLoad where its runtime is: name the master in the class, `args: [fluid, load, --master, DATASET-master-0.svc-DATASET-master:19998]`")
            })?;
            if variable("FLUID_DATALOAD_METADATA") == "true" {
                for of in &asked {
                    metadata::load(&fs, &path(&of.0)?, true, output).await?;
                }
            }
            for (of, replicas) in asked {
                let load = Job { kind: "load".into(), paths: vec![path(&of)?.as_bytes().to_vec().into()], replicas, ..Job::default() };
                job::start(&fs, load, "loaded", true, output).await?;
            }
            Ok(())
        }
        FluidCommand::Check => crate::mount::check(&runtime()?.target_path, output).await,
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn runtime() -> Result<FluidRuntime> {
    FluidRuntime::from_environment()?.ok_or_else(|| {
        err!(
            InvalidArgument,
            "FLUID_RUNTIME_CONFIG_PATH names no file: Fluid runs this in the pods of a CacheRuntime; elsewhere there is `forebay fs mount`"
        )
    })
}

/// Paths, each with its copies: `/a:/b` and `1:2`.
fn asked(paths: &str, replicas: &str) -> Result<Vec<(String, u32)>> {
    let paths: Vec<_> = paths.split(':').filter(|path| !path.is_empty()).collect();
    if paths.is_empty() {
        return Err(err!(InvalidArgument, "FLUID_DATALOAD_DATA_PATH names no path: Fluid sets it for a DataLoad, from its spec.target"));
    }
    let mut replicas = replicas.split(':');
    let one = |raw: Option<&str>| match raw.unwrap_or_default() {
        "" => Ok(1),
        raw => raw.parse().map_err(|_| err!(InvalidArgument, "FLUID_DATALOAD_PATH_REPLICAS: {raw:?} is no number")),
    };
    paths.into_iter().map(|path| Ok((path.to_owned(), one(replicas.next())?))).collect()
}

/// One mount that a dataset wants, as the master writes it down.
struct Wanted<'a> {
    path: AbsPath,
    uri: String,
    mount: &'a FluidMount,
}

fn wanted(runtime: &FluidRuntime) -> Result<Vec<Wanted<'_>>> {
    fn one(mount: &FluidMount) -> Result<Wanted<'_>> {
        Ok(Wanted { path: path(&mount.path())?, uri: UfsUri::parse(&mount.mount_point)?.to_string(), mount })
    }
    let mut all = runtime.mounts.iter().filter(|mount| !mount.is_volume()).map(one).collect::<Result<Vec<_>>>()?;
    // What lies above first: it is made first, and taken away last.
    all.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// Brings the mount table to what the dataset says; returns its paths, as it writes them. What is at `/` was mounted when the master began (`FluidRuntime`), and stays.
async fn mount(fs: &FileSystem, runtime: &FluidRuntime) -> Result<Vec<String>> {
    let wanted = wanted(runtime)?;
    let mut there = Vec::new();
    for mount in fs.list_mounts().await? {
        there.push((AbsPath::parse(&mount.path)?, mount));
    }
    there.sort_by(|a, b| b.0.cmp(&a.0));
    let keeps = |at: &AbsPath, is: &MountPoint| wanted.iter().any(|wanted| wanted.path == *at && wanted.uri == is.uri);
    let goes: Vec<AbsPath> = there.iter().filter(|(at, is)| !at.is_root() && !keeps(at, is)).map(|(at, _)| at.clone()).collect();
    // Deepest first, with those below that stay otherwise: they are mounted again.
    for (at, is) in there.iter().filter(|(at, _)| goes.iter().any(|gone| at.starts_with(gone))) {
        tracing::info!(path = %at, uri = is.uri, "no mount of the dataset any more, or below one");
        fs.unmount(at).await?;
    }
    there.retain(|(at, _)| !goes.iter().any(|gone| at.starts_with(gone)));
    for Wanted { path: at, uri, mount } in &wanted {
        let options = mount.all_options()?;
        let Some((_, before)) = there.iter().find(|(is, _)| is == at) else {
            if let Some(above) = at.parent().filter(|above| !above.is_root()) {
                fs.mkdir(&above, true, true).await?;
            }
            fs.mount(at, uri, mount.read_only, options).await?;
            continue;
        };
        if before.uri != *uri {
            return Err(err!(
                InvalidArgument,
                "/ is {}, and the dataset wants {uri} there: what is at / is decided when a master begins with an empty data folder; give the mount a name or another path",
                before.uri
            ));
        }
        // Secrets are not shown, and may be new: they are given again.
        let old: BTreeMap<_, _> = before.options.iter().collect();
        let same = mount.encrypt_options.is_empty()
            && before.read_only == mount.read_only
            && options.iter().eq(old.iter().map(|(name, value)| (*name, *value)));
        if !same {
            let unset = old.keys().filter(|name| !options.contains_key(**name)).map(|name| (*name).clone()).collect();
            fs.update_mount(at, Some(mount.read_only), options, unset).await?;
        }
    }
    Ok(wanted.iter().map(|wanted| wanted.mount.path()).collect())
}

/// `CacheRuntimeReportSummary`. How much of the under stores that is, nobody knows without walking them: there is no `cachedPercentage`.
fn summary(report: &ReportResponse) -> Value {
    let tiers = || report.workers.iter().filter(|worker| !worker.lost).flat_map(|worker| &worker.tiers);
    let metric = |name: &str| report.metrics.iter().find(|metric| metric.name == name).map_or(0, |metric| metric.value);
    let read = metric("Cluster.BytesReadDomain") + metric("Cluster.BytesReadRemote");
    let mut summary = Map::new();
    summary.insert("cached".into(), quantity(tiers().map(|tier| tier.used_bytes).sum()).into());
    summary.insert("cacheCapacity".into(), quantity(tiers().map(|tier| tier.total_bytes).sum()).into());
    if read > 0 {
        let missed = metric("Cluster.BytesReadUfs").min(read);
        summary.insert("cacheHitRatio".into(), format!("{:.1}%", 100.0 * (read - missed) as f64 / read as f64).into());
    }
    Value::Object(summary)
}

/// Bytes, as Fluid shows them for other runtimes: `1.5GiB`.
fn quantity(bytes: u64) -> String {
    output::bytes(bytes).replace(' ', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_their_copies() {
        assert_eq!(asked("/a:/b/c", "1:2").unwrap(), [("/a".to_owned(), 1), ("/b/c".to_owned(), 2)]);
        assert_eq!(asked("/a:/b", "").unwrap(), [("/a".to_owned(), 1), ("/b".to_owned(), 1)]);
        assert!(asked("", "").unwrap_err().message().contains("spec.target"));
        assert!(asked("/a", "many").unwrap_err().message().contains("many"));
        assert_eq!((quantity(0), quantity(3 << 29)), ("0B".to_owned(), "1.5GiB".to_owned()));
    }
}
