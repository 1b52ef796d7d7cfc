//! `forebay fsadmin report`.

use crate::args::{FsadminCommand, PathConfCommand, ReportKind};
use crate::doctor;
use crate::output::{self, Output, bytes, percent, time};
use forebay_client::FileSystem;
use forebay_common::config::Config;
use forebay_common::error::at;
use forebay_common::{AbsPath, ErrorKind, Result, err};
use forebay_proto::{AtRisk, AtRiskFile, DirUsage, FileLock, ListLocksResponse, LockedFile, NamedValue, ReportResponse, TierUsage, WorkerReport};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Between two looks at a worker that leaves.
const LOOK_AGAIN: Duration = Duration::from_millis(300);

pub async fn run(command: FsadminCommand, config: &Config, output: Output) -> Result<ExitCode> {
    let fs = FileSystem::connect(&config.client).await?;
    match command {
        FsadminCommand::GetBlockInfo { block } => block_info(&fs, block, output).await?,
        FsadminCommand::DecommissionWorker { worker, this, no_wait, timeout } => {
            let worker = match worker {
                Some(worker) => worker,
                None => this_worker(&config.worker.data_dir)?,
            };
            let limit = timeout.unwrap_or(Duration::MAX);
            let waited = tokio::time::timeout(limit, decommission(&fs, &worker, this, !no_wait, output)).await;
            waited
                .map_err(|_| err!(Timeout, "worker {worker} has not left within {} s: what is only there is not copied yet", limit.as_secs()))??;
        }
        FsadminCommand::EnableWorker { worker } => {
            let id = fs.set_worker(&worker, false, false).await?;
            let json = json!({ "worker": format!("{id:016x}"), "leaving": false });
            output.show(&json, || output::line(&format!("worker {worker} takes blocks again")))?;
        }
        FsadminCommand::DropOrphans { .. } => {
            let (blocks, dropped) = fs.drop_orphans().await?;
            output
                .show(&json!({ "blocks": blocks, "bytes": dropped }), || output::line(&format!("{blocks} blocks given up ({})", bytes(dropped))))?;
        }
        FsadminCommand::PathConf(command) => path_conf(&fs, command, output).await?,
        FsadminCommand::Ufs { path, mode } => {
            let set = BTreeMap::from([("ufs_mode".to_owned(), mode.clone())]);
            fs.update_mount(&AbsPath::parse(&path)?, None, set, Vec::new()).await?;
            output.show(&json!({ "path": path, "ufs_mode": mode }), || output::line(&format!("the under store of {path} is {mode} now")))?;
        }
        FsadminCommand::Doctor => return doctor::run(&fs, &config.client, output).await,
        FsadminCommand::Report { kind: ReportKind::Locks } => locks(&fs.list_locks().await?, output)?,
        FsadminCommand::Report { kind } => {
            let report = fs.report().await?;
            match kind {
                ReportKind::Summary => summary(&report, output)?,
                ReportKind::Capacity => capacity(&report, output)?,
                ReportKind::Metrics => metrics(&report, output)?,
                ReportKind::Ufs => ufs(&report, output)?,
                ReportKind::AtRisk => at_risk(&report, output)?,
                ReportKind::Locks => {}
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The id of the worker whose data folder this is.
fn this_worker(dir: &Path) -> Result<String> {
    let path = dir.join("worker-id");
    let id = std::fs::read_to_string(&path).map_err(at(format!("--this: {} (worker.data_dir)", path.display())))?;
    Ok(id.trim().to_owned())
}

/// Has a worker leave and waits until it has.
async fn decommission(fs: &FileSystem, worker: &str, until_gone: bool, wait: bool, output: Output) -> Result<()> {
    let mut id = None;
    let mut said = u64::MAX;
    let left = loop {
        // A process that is about to stop insists: the master may be starting, and not know the worker yet, or not have heard of this.
        let again =
            |e: &forebay_common::Error| until_gone && wait && (e.is_retryable() || matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Unavailable));
        if id.is_none() {
            match fs.set_worker(worker, true, until_gone).await {
                Ok(of) => id = Some(of),
                Err(e) if again(&e) => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                    continue;
                }
                Err(e) => return Err(e),
            }
        }
        let state = match fs.report().await {
            Ok(report) => report.workers.into_iter().find(|w| w.address.as_ref().is_some_and(|a| Some(a.worker_id) == id)),
            Err(e) if again(&e) => None,
            Err(e) => return Err(e),
        };
        match state {
            Some(state) if state.left || !wait => break state.left,
            Some(state) if state.lost && !until_gone => {
                return Err(err!(Unavailable, "worker {worker} is lost: what is only there is copied when it comes back"));
            }
            Some(state) if state.leaving => {
                if state.to_move != said && state.to_move != u64::MAX {
                    said = state.to_move;
                    eprintln!("{said} blocks and files under construction are only there");
                }
            }
            None if !until_gone => return Err(err!(Unavailable, "worker {worker} is not there any more: it is emptied when it comes back")),
            _ => id = None,
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    let json = json!({ "worker": id.map(|id| format!("{id:016x}")), "leaving": true, "left": left });
    let text = if left { "has left: it may be stopped" } else { "is to leave: see `forebay fsadmin report capacity`" };
    output.show(&json, || output::line(&format!("worker {worker} {text}")))
}

async fn block_info(fs: &FileSystem, id: u64, output: Output) -> Result<()> {
    let answer = fs.get_block(id).await?;
    let (Some(status), Some(block)) = (answer.status, answer.block) else {
        return Err(err!(Internal, "the master answered without a block"));
    };
    let mut value = crate::fs::blocks_json(&[block], &answer.workers)[0].take();
    value["path"] = String::from_utf8_lossy(&status.path).into();
    value["file_id"] = status.file_id.into();
    value["persisted"] = status.persisted.into();
    output.show(&value.clone(), || {
        let mut rows = vec![
            vec!["file".to_owned(), output::printable(value["path"].as_str().unwrap_or_default())],
            vec!["offset in it".to_owned(), value["offset"].to_string()],
            vec!["length".to_owned(), value["length"].to_string()],
            vec!["in an under store".to_owned(), if status.persisted { "yes" } else { "no" }.to_owned()],
        ];
        for at in value["locations"].as_array().into_iter().flatten() {
            let text = |key: &str| at[key].as_str().unwrap_or_default().to_owned();
            rows.push(vec!["on".to_owned(), format!("{} {}, {} bytes", text("host"), text("tier"), at["cached_bytes"])]);
        }
        output::table(&[], &[], rows)
    })
}

/// `host:port`, for people.
pub fn name(worker: &WorkerReport) -> String {
    worker.address.as_ref().map_or_else(String::new, |a| format!("{}:{}", a.host, a.data_port))
}

fn tiers_json(tiers: &[TierUsage]) -> Value {
    let dir = |d: &DirUsage| {
        json!({ "path": d.path, "total_bytes": d.total_bytes, "used_bytes": d.used_bytes, "zombie_bytes": d.zombie_bytes, "blocks": d.blocks,
                "healthy": d.trouble.is_empty(), "trouble": d.trouble })
    };
    let one = |t: &TierUsage| {
        json!({ "total_bytes": t.total_bytes, "used_bytes": t.used_bytes, "zombie_bytes": t.zombie_bytes, "blocks": t.blocks,
                "dirs": t.dirs.iter().map(dir).collect::<Vec<_>>() })
    };
    Value::Object(tiers.iter().map(|t| (t.tier.clone(), one(t))).collect::<Map<_, _>>())
}

fn sum_tiers(report: &ReportResponse) -> Vec<TierUsage> {
    let mut sums: BTreeMap<String, TierUsage> = BTreeMap::new();
    for tier in report.workers.iter().filter(|w| !w.lost).flat_map(|w| &w.tiers) {
        let sum = sums.entry(tier.tier.clone()).or_insert_with(|| TierUsage { tier: tier.tier.clone(), ..TierUsage::default() });
        sum.total_bytes += tier.total_bytes;
        sum.used_bytes += tier.used_bytes;
        sum.zombie_bytes += tier.zombie_bytes;
        sum.blocks += tier.blocks;
    }
    sums.into_values().collect()
}

/// What to say of only copies that the master's data know nothing of.
pub fn orphans(report: &ReportResponse) -> Option<String> {
    let (blocks, held) = (report.orphan_blocks, bytes(report.orphan_bytes));
    (blocks > 0).then(|| {
        format!(
            "{blocks} blocks ({held}) on workers are the only copies of what newer data of this master had: put these back (master.data_dir), \
             or give them up with `forebay fsadmin dropOrphans --yes`"
        )
    })
}

fn summary(report: &ReportResponse, output: Output) -> Result<()> {
    let tiers = sum_tiers(report);
    let live = report.workers.iter().filter(|w| !w.lost).count();
    let (total, used): (u64, u64) = (tiers.iter().map(|t| t.total_bytes).sum(), tiers.iter().map(|t| t.used_bytes).sum());
    let refused: Vec<(String, &str)> = report
        .refused_workers
        .iter()
        .map(|w| (w.address.as_ref().map_or_else(String::new, |a| format!("{}:{}", a.host, a.data_port)), w.reason.as_str()))
        .collect();
    let refused_json: Vec<Value> = refused.iter().map(|(name, reason)| json!({ "name": name, "reason": reason })).collect();
    let json = json!({
        "cluster": report.cluster_id, "refused_workers": refused_json,
        "version": report.version, "started_ms": report.started_ms, "live_workers": live, "lost_workers": report.workers.len() - live,
        "orphan_blocks": report.orphan_blocks, "orphan_bytes": report.orphan_bytes,
        "files": report.files, "folders": report.folders, "mounts": report.ufs.len(), "total_bytes": total, "used_bytes": used,
        "journal_index": report.applied_index, "pending_changes": report.pending_changes, "at_risk": at_risk_json(&report.at_risk.clone().unwrap_or_default()), "warnings": report.warnings,
    });
    output.show(&json, || {
        let row = |key: &str, value: String| vec![key.to_owned(), value];
        let mut rows = vec![
            row("Cluster", report.cluster_id.clone()),
            row("Version", report.version.clone()),
            row("Master up since", format!("{} UTC", time(report.started_ms))),
            row("Workers", format!("{live} live, {} lost", report.workers.len() - live)),
            row("Namespace", format!("{} files, {} folders, {} mounts", report.files, report.folders, report.ufs.len())),
            row("Cache", format!("{} of {} used ({}%)", bytes(used), bytes(total), if total == 0 { 0 } else { percent(used, total) })),
            row("Journal", format!("entry {} applied", report.applied_index)),
            row("Changes on their way to under stores", report.pending_changes.to_string()),
            row("Acknowledged, not in an under store yet", at_risk_text(report)),
        ];
        rows.extend(refused.iter().map(|(name, reason)| row("Worker not let in", format!("{name}: {reason}"))));
        rows.extend(orphans(report).map(|text| row("Warning", text)));
        rows.extend(report.warnings.iter().map(|w| row("Warning", w.clone())));
        output::table(&[], &[], rows)
    })
}

fn capacity(report: &ReportResponse, output: Output) -> Result<()> {
    let tiers = sum_tiers(report);
    let workers: Vec<Value> = report
        .workers
        .iter()
        .map(|w| {
            let id = w.address.as_ref().map_or(0, |a| a.worker_id);
            json!({ "name": name(w), "worker": format!("{id:016x}"), "lost": w.lost, "leaving": w.leaving, "left": w.left, "last_heartbeat_ms": w.last_heartbeat_ms, "silent_ms": w.silent_ms, "tiers": tiers_json(&w.tiers) })
        })
        .collect();
    let (total, used): (u64, u64) = (tiers.iter().map(|t| t.total_bytes).sum(), tiers.iter().map(|t| t.used_bytes).sum());
    let json = json!({ "total_bytes": total, "used_bytes": used, "tiers": tiers_json(&tiers), "workers": workers });
    output.show(&json, || {
        let row = |name: &str, heard: String, t: &TierUsage| {
            vec![name.to_owned(), heard, t.tier.clone(), bytes(t.total_bytes), bytes(t.used_bytes), bytes(t.zombie_bytes), t.blocks.to_string()]
        };
        let mut rows: Vec<Vec<String>> = tiers.iter().map(|t| row("all workers", String::new(), t)).collect();
        for worker in &report.workers {
            let heard = if worker.left {
                "has left".to_owned()
            } else if worker.leaving && !worker.lost {
                "is to leave".to_owned()
            } else if worker.lost {
                format!("LOST, {} s ago", worker.silent_ms / 1000)
            } else {
                format!("{} ms ago", worker.silent_ms)
            };
            for tier in &worker.tiers {
                rows.push(row(&name(worker), heard.clone(), tier));
                // A tier of one healthy folder is told by its own line.
                for dir in tier.dirs.iter().filter(|d| tier.dirs.len() > 1 || !d.trouble.is_empty()) {
                    let state = if dir.trouble.is_empty() { "takes blocks".to_owned() } else { format!("TAKEN OUT: {}", dir.trouble) };
                    let (total, used, held) = (bytes(dir.total_bytes), bytes(dir.used_bytes), bytes(dir.zombie_bytes));
                    rows.push(vec![format!("  {}", dir.path), state, tier.tier.clone(), total, used, held, dir.blocks.to_string()]);
                }
            }
        }
        output::table(&["WORKER", "LAST HEARTBEAT", "TIER", "SIZE", "USED", "HELD AFTER EVICTION", "BLOCKS"], &[3, 4, 5, 6], rows)
    })
}

fn metrics(report: &ReportResponse, output: Output) -> Result<()> {
    let map: Map<String, Value> = report.metrics.iter().map(|m| (m.name.clone(), m.value.into())).collect();
    output.show(&Value::Object(map), || {
        output::table(&["METRIC", "VALUE"], &[1], report.metrics.iter().map(|m| vec![m.name.clone(), m.value.to_string()]))
    })
}

async fn path_conf(fs: &FileSystem, command: PathConfCommand, output: Output) -> Result<()> {
    match command {
        PathConfCommand::Set { path, settings } => {
            let pair = |s: &String| s.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
            let set: Option<Vec<_>> = settings.iter().map(pair).collect();
            let set = set.ok_or_else(|| err!(InvalidArgument, "write KEY=VALUE, like sync_interval_ms=0"))?;
            fs.set_path_config(&AbsPath::parse(&path)?, &set, &[]).await?;
        }
        PathConfCommand::Unset { path, settings } => fs.set_path_config(&AbsPath::parse(&path)?, &[], &settings).await?,
        PathConfCommand::List => {}
    }
    let paths = fs.list_path_config().await?;
    let text = |raw: &[u8]| String::from_utf8_lossy(raw).into_owned();
    let json: Vec<Value> = paths
        .iter()
        .map(|p| json!({ "path": text(&p.path), "config": p.config.iter().map(|s| (s.name.clone(), Value::from(s.value.clone()))).collect::<Map<_, _>>() }))
        .collect();
    output.show(&json!(json), || {
        let settings = |p: &forebay_proto::FileStatus| p.config.iter().map(|s| format!("{}={}", s.name, s.value)).collect::<Vec<_>>().join(" ");
        output::table(&["PATH", "SETTINGS"], &[], paths.iter().map(|p| vec![output::printable(&text(&p.path)), settings(p)]))
    })
}

fn at_risk_json(risk: &AtRisk) -> Value {
    let file = |f: &AtRiskFile| json!({ "path": String::from_utf8_lossy(&f.path), "bytes": f.bytes, "since_ms": f.since_ms, "copies": f.copies, "missing": f.missing, "error": f.error });
    json!({ "files": risk.files, "bytes": risk.bytes, "oldest_ms": risk.oldest_ms, "oldest": risk.oldest.iter().map(file).collect::<Vec<_>>() })
}

fn at_risk_text(report: &ReportResponse) -> String {
    let risk = report.at_risk.clone().unwrap_or_default();
    if risk.files == 0 {
        return "nothing".to_owned();
    }
    let missing = risk.oldest.iter().filter(|f| f.missing).count();
    let age = report.now_ms.saturating_sub(risk.oldest_ms) / 1000;
    let lost = if missing > 0 { format!("; {missing} of them on NO LIVE WORKER: `report atRisk` names them") } else { String::new() };
    format!("{} files, {}, the oldest for {age} s{lost}", risk.files, bytes(risk.bytes))
}

fn at_risk(report: &ReportResponse, output: Output) -> Result<()> {
    let risk = report.at_risk.clone().unwrap_or_default();
    output.show(&at_risk_json(&risk), || {
        output::line(&at_risk_text(report))?;
        let row = |f: &AtRiskFile| {
            let age = report.now_ms.saturating_sub(f.since_ms) / 1000;
            let copies = if f.missing { "MISSING".to_owned() } else { f.copies.to_string() };
            vec![output::printable(&String::from_utf8_lossy(&f.path)), bytes(f.bytes), format!("{age} s"), copies, output::printable(&f.error)]
        };
        output::table(&["PATH", "BYTES", "SINCE", "COPIES", "WHY"], &[1, 2, 3], risk.oldest.iter().map(row))
    })
}

/// Which bytes, in the words of fcntl(2) and flock(2).
fn lock_range(lock: &FileLock) -> String {
    match (lock.whole, lock.end >= i64::MAX as u64) {
        (true, _) => "flock".to_owned(),
        (false, true) => format!("fcntl {}-", lock.start),
        (false, false) => format!("fcntl {}-{}", lock.start, lock.end),
    }
}

fn locks(all: &ListLocksResponse, output: Output) -> Result<()> {
    let path = |file: &LockedFile| {
        if file.path.is_empty() { format!("file {} (deleted)", file.file_id) } else { String::from_utf8_lossy(&file.path).into_owned() }
    };
    let holder = |lock: &FileLock| {
        all.holders.iter().find(|holder| holder.session_id == lock.session_id).map_or_else(String::new, |holder| holder.holder.clone())
    };
    let kind = |lock: &FileLock| if lock.exclusive { "exclusive" } else { "shared" };
    let json_of = |file: &LockedFile| {
        let locks: Vec<Value> = file
            .locks
            .iter()
            .map(|lock| json!({ "kind": kind(lock), "flock": lock.whole, "start": lock.start, "end": lock.end, "process": lock.process, "session": format!("{:016x}", lock.session_id), "holder": holder(lock) }))
            .collect();
        json!({ "path": String::from_utf8_lossy(&file.path), "file_id": file.file_id, "locks": locks })
    };
    let holders: Vec<Value> = all
        .holders
        .iter()
        .map(|h| json!({ "session": format!("{:016x}", h.session_id), "holder": h.holder, "principal": h.principal, "expires_at_ms": h.expires_at_ms }))
        .collect();
    let json = json!({ "files": all.files.iter().map(json_of).collect::<Vec<_>>(), "sessions": holders, "more": all.more });
    output.show(&json, || {
        if all.files.is_empty() {
            return output::line(&format!("no file is locked; {} mounts may hold locks", all.holders.len()));
        }
        let rows = all.files.iter().flat_map(|file| file.locks.iter().map(move |lock| (file, lock)));
        let row = |(file, lock): (&LockedFile, &FileLock)| {
            vec![output::printable(&path(file)), kind(lock).to_owned(), lock_range(lock), lock.process.to_string(), output::printable(&holder(lock))]
        };
        output::table(&["PATH", "KIND", "WHAT", "PROCESS", "MOUNT"], &[3], rows.map(row))?;
        if all.more { output::line("and more") } else { Ok(()) }
    })
}

fn ufs(report: &ReportResponse, output: Output) -> Result<()> {
    let path = |raw: &[u8]| String::from_utf8_lossy(raw).into_owned();
    let json: Vec<Value> = report
        .ufs
        .iter()
        .map(|u| json!({ "path": path(&u.path), "uri": u.uri, "read_only": u.read_only, "reachable": u.reachable, "error": u.error, "unshown_objects": u.unshown_objects, "requests": u.requests.iter().map(|r| (r.name.clone(), r.value.into())).collect::<Map<_, _>>() }))
        .collect();
    output.show(&json!(json), || {
        output::table(
            &["PATH", "UNDER STORE", "MODE", "STATE", "NOT SHOWN", "REQUESTS"],
            &[4],
            report.ufs.iter().map(|u| {
                let state = if u.reachable { "reachable".to_owned() } else { u.error.clone() };
                vec![
                    path(&u.path),
                    u.uri.clone(),
                    if u.read_only { "read-only" } else { "read-write" }.to_owned(),
                    state,
                    u.unshown_objects.to_string(),
                    requests_text(&u.requests),
                ]
            }),
        )
    })
}

/// `stat 3, list 2, read 10 (40 MiB)`.
fn requests_text(requests: &[NamedValue]) -> String {
    let value = |name: &str| requests.iter().find(|r| r.name == name).map_or(0, |r| r.value);
    let counts = requests.iter().filter(|r| r.value > 0 && !r.name.ends_with("_bytes"));
    let text = |r: &NamedValue| match r.name.as_str() {
        "read" => format!("read {} ({})", r.value, bytes(value("read_bytes"))),
        "write" => format!("write {} ({})", r.value, bytes(value("written_bytes"))),
        name => format!("{name} {}", r.value),
    };
    counts.map(text).collect::<Vec<_>>().join(", ")
}
