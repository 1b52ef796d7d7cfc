//! loadMetadata and checkConsistency: the namespace beside its under stores.

use crate::output::{self, Output, printable};
use forebay_client::FileSystem;
use forebay_common::{AbsPath, Result, err};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Differences and failures that are printed or told in JSON; all are counted.
const TOLD_MAX: usize = 10_000;

fn spinner(output: Output) -> ProgressBar {
    if output.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

#[derive(Default)]
struct Told {
    folders: u64,
    entries: u64,
    changes: u64,
    differences: Vec<(String, String)>,
    failures: Vec<(String, String)>,
}

async fn look(fs: &FileSystem, path: &AbsPath, recursive: bool, only_check: bool, output: Output) -> Result<Told> {
    let bar = spinner(output);
    let mut told = Told::default();
    fs.load_metadata(path, recursive, only_check, |news| {
        (told.folders, told.entries, told.changes) = (news.folders, news.entries, news.changes);
        bar.set_message(format!("{} folders, {} entries, {} differences", news.folders, news.entries, news.changes));
        let text = |raw: &[u8]| String::from_utf8_lossy(raw).into_owned();
        for d in news.differences {
            if told.differences.len() < TOLD_MAX {
                told.differences.push((text(&d.path), d.what));
            }
        }
        told.failures.extend(news.failures.into_iter().take(TOLD_MAX).map(|d| (text(&d.path), d.what)));
        Ok(())
    })
    .await?;
    bar.finish_and_clear();
    for (path, why) in &told.failures {
        eprintln!("forebay: {}: {why}", printable(path));
    }
    Ok(told)
}

pub async fn load(fs: &FileSystem, path: &AbsPath, recursive: bool, output: Output) -> Result<()> {
    let started = Instant::now();
    let told = look(fs, path, recursive, false, output).await?;
    let seconds = started.elapsed().as_secs_f64();
    let json =
        json!({ "folders": told.folders, "entries": told.entries, "changes": told.changes, "failed": told.failures.len(), "seconds": seconds });
    let rate = told.entries as f64 / seconds.max(1e-9);
    let text = format!(
        "looked at {} entries in {} folders in {seconds:.2} s ({rate:.0}/s): {} were new, changed or gone",
        told.entries, told.folders, told.changes
    );
    output.show(&json, || output::line(&text))?;
    failed(&told)
}

/// Exit: an error when something differs and is not mended.
pub async fn check(fs: &FileSystem, path: &AbsPath, repair: bool, output: Output) -> Result<()> {
    let told = look(fs, path, true, !repair, output).await?;
    let named: Vec<_> = told.differences.iter().map(|(path, what)| json!({ "path": path, "what": what })).collect();
    let json = json!({ "folders": told.folders, "entries": told.entries, "inconsistent": told.changes, "repaired": repair, "differences": named, "failed": told.failures.len() });
    output.show(&json, || {
        output::table(&[], &[], told.differences.iter().map(|(path, what)| vec![what.clone(), printable(path)]))?;
        let more = told.changes - told.differences.len() as u64;
        if more > 0 {
            output::line(&format!("and {more} more"))?;
        }
        let mended = if repair && told.changes > 0 { ", which are mended" } else { "" };
        output::line(&format!("{} differences in {} entries of {} folders{mended}", told.changes, told.entries, told.folders))
    })?;
    failed(&told)?;
    if told.changes > 0 && !repair {
        return Err(err!(FileChanged, "{} paths differ from their under store: --repair takes over what is there", told.changes));
    }
    Ok(())
}

fn failed(told: &Told) -> Result<()> {
    if told.failures.is_empty() { Ok(()) } else { Err(err!(Unavailable, "{} folders could not be looked at", told.failures.len())) }
}
