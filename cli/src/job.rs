//! Jobs: starting them, watching them, `forebay job …`.

use crate::args::JobCommand;
use crate::output::{self, Output, bytes, printable, time};
use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_common::{Result, err};
use forebay_proto::Job;
use serde_json::{Value, json};
use std::time::Duration;

/// How often a job that is waited for is looked at: soon first, then at ease.
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(300);
/// Failures printed when a job is over; `job stat` shows more.
const FAILURES_SHOWN: usize = 10;

/// Runs a `job` command.
pub async fn run(command: JobCommand, config: &ClientConfig, output: Output) -> Result<()> {
    let fs = FileSystem::connect(config).await?;
    match command {
        JobCommand::Ls => {
            let jobs = fs.list_jobs(0).await?;
            output.show(&jobs.iter().map(to_json).collect(), || {
                let row = |j: &Job| {
                    let done = format!("{} of {}{}", j.files_done, j.files_found, if j.all_found { "" } else { "+" });
                    vec![
                        j.id.to_string(),
                        j.kind.clone(),
                        j.state.clone(),
                        done,
                        bytes(j.bytes_done),
                        j.files_failed.to_string(),
                        time(j.created_ms),
                        what(j),
                    ]
                };
                output::table(&["JOB", "KIND", "STATE", "FILES", "BYTES", "FAILED", "STARTED (UTC)", "WHAT"], &[0, 4, 5], jobs.iter().map(row))
            })
        }
        JobCommand::Stat { job } => {
            let job = one(&fs, job).await?;
            output.show(&to_json(&job), || {
                let row = |key: &str, value: String| vec![key.to_owned(), value];
                let mut rows = vec![
                    row("job", format!("{} {}", job.id, job.kind)),
                    row("of", job.principal.clone()),
                    row("what", what(&job)),
                    row("state", job.state.clone()),
                    row("started", format!("{} UTC", time(job.created_ms))),
                    row(
                        "files",
                        format!(
                            "{} of {}{} done, {} of them before",
                            job.files_done,
                            job.files_found,
                            if job.all_found { "" } else { " found so far" },
                            job.files_skipped
                        ),
                    ),
                    row("bytes", format!("{} of {}", bytes(job.bytes_done), bytes(job.bytes_found))),
                    row("failed", job.files_failed.to_string()),
                ];
                if !job.message.is_empty() {
                    rows.push(row("message", printable(&job.message)));
                }
                if job.finished_ms > 0 {
                    rows.push(row("ended", format!("{} UTC", time(job.finished_ms))));
                }
                rows.extend(job.failures.iter().map(|f| row("failure", printable(&format!("{}: {}", String::from_utf8_lossy(&f.path), f.error)))));
                output::table(&[], &[], rows)
            })
        }
        JobCommand::Cancel { job } => {
            fs.cancel_job(job).await?;
            output.show(&json!({ "job": job, "state": "cancelled" }), || output::line(&format!("job {job} is cancelled; what it has done stays")))
        }
    }
}

async fn one(fs: &FileSystem, id: u64) -> Result<Job> {
    fs.list_jobs(id).await?.into_iter().next().ok_or_else(|| err!(NotFound, "there is no job {id}"))
}

fn what(job: &Job) -> String {
    let path = |raw: &[u8]| printable(&String::from_utf8_lossy(raw));
    let paths: Vec<String> = job.paths.iter().take(3).map(|p| path(p)).collect();
    let more = if job.paths.len() > 3 { format!(" and {} more", job.paths.len() - 3) } else { String::new() };
    let target = if job.target.is_empty() { String::new() } else { format!(" to {}", path(&job.target)) };
    paths.join(" ") + &more + &target
}

fn to_json(job: &Job) -> Value {
    let path = |raw: &[u8]| String::from_utf8_lossy(raw).into_owned();
    json!({
        "job": job.id, "kind": job.kind, "state": job.state, "user": job.principal, "paths": job.paths.iter().map(|p| path(p)).collect::<Vec<_>>(),
        "target": path(&job.target), "started_ms": job.created_ms, "finished_ms": job.finished_ms, "files_found": job.files_found,
        "all_found": job.all_found, "files": job.files_done, "files_skipped": job.files_skipped, "failed": job.files_failed,
        "cached_in_part": job.files_partly, "bytes_found": job.bytes_found, "bytes": job.bytes_done, "message": job.message,
        "failures": job.failures.iter().map(|f| json!({ "path": path(&f.path), "error": f.error })).collect::<Vec<_>>(),
    })
}

/// Starts a job and, unless told otherwise, waits until it is over, with a progress bar where a person watches.
///
/// Errors: `Unavailable` when files failed.
pub async fn start(fs: &FileSystem, job: Job, did: &str, wait: bool, output: Output) -> Result<()> {
    let kind = job.kind.clone();
    let started = std::time::Instant::now();
    let id = fs.start_job(job).await?;
    if !wait {
        let json = json!({ "job": id });
        return output.show(&json, || output::line(&format!("job {id} has begun: `forebay job stat {id}` shows how far it is")));
    }
    let bar = output.progress(&kind, 0);
    let mut pause = LOOK_MIN;
    let job = loop {
        let job = one(fs, id).await?;
        bar.set_length(job.bytes_found);
        bar.set_position(job.bytes_done);
        let more = if job.all_found { "" } else { "+" };
        let trouble = if job.message.is_empty() { String::new() } else { format!(": {}", printable(&job.message)) };
        bar.set_message(format!("{kind} {}/{}{more}{trouble}", job.files_done, job.files_found));
        if job.state != "running" {
            break job;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(LOOK_MAX);
    };
    bar.finish_and_clear();
    for failure in job.failures.iter().take(FAILURES_SHOWN) {
        eprintln!("forebay: {}: {}", printable(&String::from_utf8_lossy(&failure.path)), failure.error);
    }
    let seconds = started.elapsed().as_secs_f64();
    let mut value = to_json(&job);
    value["seconds"] = seconds.into();
    let rate = bytes((job.bytes_done as f64 / seconds.max(1e-9)) as u64);
    let before = if job.files_skipped > 0 { format!(" ({} of them before)", job.files_skipped) } else { String::new() };
    let text = format!("{did} {} files{before}, {} in {seconds:.2} s ({rate}/s)", job.files_done, bytes(job.bytes_done));
    output.show(&value, || output::line(&text))?;
    match job.state.as_str() {
        "done" => Ok(()),
        "cancelled" => Err(err!(Unavailable, "job {id} was cancelled")),
        _ => Err(err!(Unavailable, "job {id}: {}", job.message)),
    }
}
