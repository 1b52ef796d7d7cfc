//! `forebay fsadmin doctor`: what is wrong, and how to mend it. Exit code 1 when something failed.

use crate::output::{self, Output, bytes, percent};
use crate::report::name;
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, clock, err};
use forebay_proto::{ReportResponse, WorkerReport};
use serde_json::json;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Clocks further apart than this make tokens and leases unreliable.
const SKEW_WARN_MS: i64 = 2_000;
/// A master's disk fuller than this is warned of.
const DISK_WARN_PERCENT: u64 = 90;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

struct Finding {
    verdict: Verdict,
    check: String,
    detail: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, verdict: Verdict, check: impl Into<String>, detail: impl Into<String>) {
        self.0.push(Finding { verdict, check: check.into(), detail: detail.into() });
    }
}

pub async fn run(fs: &FileSystem, config: &ClientConfig, output: Output) -> Result<ExitCode> {
    let mut found = Findings::default();
    if check_master(fs, config, &mut found).await {
        match fs.report().await {
            Ok(report) => {
                check_workers(fs, &report, &mut found).await;
                check_short_circuit(fs, config, &report, &mut found).await;
                check_hadoop(config, &report, &mut found).await;
                check_kubernetes(&report, &mut found);
                check_stores(&report, &mut found);
                check_disk(&report, &mut found);
                if let Some(text) = crate::report::orphans(&report) {
                    found.add(Verdict::Warn, "orphans", text);
                }
                report.warnings.iter().for_each(|w| found.add(Verdict::Warn, "security", w));
            }
            Err(e) => found.add(Verdict::Fail, "report", e.to_string()),
        }
    }
    match forebay_fuse::able() {
        Ok(Ok(())) => found.add(Verdict::Ok, "mount", "cached files of one block are read by the kernel itself"),
        Ok(Err(why)) => found.add(Verdict::Warn, "mount", format!("every file is read through the mount's process: {why}")),
        Err(why) => found.add(Verdict::Warn, "mount", format!("this machine cannot mount: {why}")),
    }
    let word = |v: Verdict| match v {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let json: Vec<_> = found.0.iter().map(|f| json!({ "verdict": word(f.verdict).to_lowercase(), "check": f.check, "detail": f.detail })).collect();
    output.show(&json!(json), || {
        output::table(&[], &[], found.0.iter().map(|f| vec![word(f.verdict).to_owned(), f.check.clone(), f.detail.clone()]))
    })?;
    let failed = found.0.iter().any(|f| f.verdict == Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether the master sees the pods and nodes that locality needs, and the workers say where they are.
fn check_kubernetes(report: &ReportResponse, found: &mut Findings) {
    const CHECK: &str = "locality";
    let Some(seen) = &report.kubernetes else { return };
    let (pods, nodes) = (seen.pods, seen.nodes);
    if !seen.error.is_empty() {
        let mend = "give the master's service account get, list and watch of pods and nodes (the chart's rbac.create), or set kubernetes.locality = \"none\"";
        found.add(Verdict::Warn, CHECK, format!("{}: {mend}", seen.error));
    } else {
        found.add(Verdict::Ok, CHECK, format!("by {}: {pods} pods on {nodes} nodes are known", seen.locality));
    }
    for worker in report.workers.iter().filter(|w| !w.lost && w.address.as_ref().is_some_and(|a| a.node.is_empty())) {
        found.add(Verdict::Warn, CHECK, format!("worker {} does not say which node it is on: set worker.node_name (spec.nodeName)", name(worker)));
    }
}

/// How long a port of the Hadoop front may take to answer.
const HADOOP_WAIT: Duration = Duration::from_secs(3);
/// What the RPC port says to whoever speaks HTTP to it.
const HADOOP_SAYS: &str = "Hadoop IPC port";

/// Whether `hdfs://` can be used from here: the master's RPC port, and each worker's data port.
async fn check_hadoop(config: &ClientConfig, report: &ReportResponse, found: &mut Findings) {
    if report.hadoop_port == 0 {
        return found.add(Verdict::Ok, "hdfs", "switched off (master.hadoop)");
    }
    let host = config.master.rsplit_once(':').map_or(config.master.as_str(), |(host, _)| host);
    let master = format!("{host}:{}", report.hadoop_port);
    let asked = tokio::time::timeout(HADOOP_WAIT, async {
        let mut stream = tokio::net::TcpStream::connect(&master).await?;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await?;
        std::io::Result::Ok(said.contains(HADOOP_SAYS))
    });
    match asked.await {
        Ok(Ok(true)) => found.add(Verdict::Ok, "hdfs", format!("hdfs://{master} answers")),
        Ok(Ok(false)) => found.add(Verdict::Fail, "hdfs", format!("{master} does not speak Hadoop RPC: something else listens there")),
        Ok(Err(e)) => found.add(Verdict::Fail, "hdfs", format!("{master}: {e}: Hadoop's clients cannot reach the master")),
        Err(_) => found.add(Verdict::Fail, "hdfs", format!("{master} does not answer within {} s", HADOOP_WAIT.as_secs())),
    }
    for worker in report.workers.iter().filter(|w| !w.lost && !w.left) {
        let at = worker.address.as_ref().map_or_else(String::new, |a| format!("{}:{}", a.ip, a.hadoop_port));
        match tokio::time::timeout(HADOOP_WAIT, tokio::net::TcpStream::connect(&at)).await {
            Ok(Ok(_)) => found.add(Verdict::Ok, format!("hdfs data of {}", name(worker)), format!("{at} takes connections")),
            Ok(Err(e)) => {
                found.add(Verdict::Fail, format!("hdfs data of {}", name(worker)), format!("{at}: {e}: Hadoop's clients are told this address"))
            }
            Err(_) => found.add(
                Verdict::Fail,
                format!("hdfs data of {}", name(worker)),
                format!("{at} does not answer: Hadoop's clients are told this address"),
            ),
        }
    }
}

async fn check_master(fs: &FileSystem, config: &ClientConfig, found: &mut Findings) -> bool {
    match fs.ping().await {
        Ok((answer, took)) => {
            found.add(
                Verdict::Ok,
                "master",
                format!("{} answers in {} µs, version {}, {}", config.master, took.as_micros(), answer.version, answer.state),
            );
            let skew = answer.now_ms as i64 - clock::now_ms() as i64;
            let verdict = if skew.abs() > SKEW_WARN_MS { Verdict::Warn } else { Verdict::Ok };
            found.add(verdict, "clock of the master", format!("{skew} ms ahead of this machine's"));
            true
        }
        Err(e) => {
            found.add(Verdict::Fail, "master", format!("{e}: start it with `forebay master` or `forebay local`, or name another with --master"));
            false
        }
    }
}

async fn check_workers(fs: &FileSystem, report: &ReportResponse, found: &mut Findings) {
    for refused in &report.refused_workers {
        let address = refused.address.clone().unwrap_or_default();
        found.add(Verdict::Fail, format!("worker {}:{}", address.host, address.data_port), format!("it is not let in: {}", refused.reason));
    }
    if report.workers.is_empty() && report.refused_workers.is_empty() {
        found.add(Verdict::Fail, "workers", "none has registered: start one with `forebay worker --master HOST:PORT`");
    }
    for worker in &report.workers {
        let check = format!("worker {}", name(worker));
        let Some(address) = &worker.address else { continue };
        if worker.lost {
            found.add(Verdict::Fail, check, format!("silent for {} s: is it running, can it reach the master?", worker.silent_ms / 1000));
            continue;
        }
        match fs.ping_worker(address).await {
            Ok(took) => found.add(Verdict::Ok, &check, format!("its data port answers in {} µs", took.as_micros())),
            Err(e) => found.add(Verdict::Fail, &check, format!("it reports to the master, and its data port cannot be reached from here: {e}")),
        }
        if worker.clock_skew_ms.abs() > SKEW_WARN_MS {
            found.add(Verdict::Warn, &check, format!("its clock is {} ms ahead of the master's", worker.clock_skew_ms));
        }
        worker.warnings.iter().for_each(|w| found.add(Verdict::Warn, &check, w));
    }
}

async fn check_short_circuit(fs: &FileSystem, config: &ClientConfig, report: &ReportResponse, found: &mut Findings) {
    const CHECK: &str = "short circuit";
    if !config.short_circuit {
        return found.add(Verdict::Warn, CHECK, "switched off: client.short_circuit = false (FOREBAY_CLIENT__SHORT_CIRCUIT)");
    }
    let local = fs.local_workers().await;
    if local.is_empty() {
        let mut why = Vec::new();
        for address in report.workers.iter().filter(|w| !w.lost).filter_map(|w| w.address.as_ref()) {
            if let Err(e) = fs.try_socket(address).await {
                why.push(format!("{}: {e}", address.host));
            }
        }
        let why = if why.is_empty() { "no worker is live".to_owned() } else { why.join("; ") };
        return found.add(
            Verdict::Warn,
            CHECK,
            format!("no worker's socket in {} answers here, so reads go over the network ({why})", config.socket_dir.display()),
        );
    }
    // Writing waits for a worker for as long as a client is patient.
    let takes = |w: &WorkerReport| !w.lost && !w.leaving && w.address.as_ref().is_some_and(|a| local.iter().any(|l| l.id.get() == a.worker_id));
    if !report.workers.iter().any(takes) {
        return found.add(Verdict::Warn, CHECK, "a worker's socket answers here, and the master gives it nothing: see above".to_owned());
    }
    match try_descriptor(fs).await {
        Ok(()) => {
            found.add(Verdict::Ok, CHECK, format!("a test file was read through a passed descriptor; {} worker(s) on this machine", local.len()))
        }
        Err(e) => found.add(Verdict::Warn, CHECK, format!("a worker's socket answers, and a test read did not go through a descriptor: {e}")),
    }
    for worker in local {
        if !worker.read_only_mount {
            found.add(
                Verdict::Warn,
                CHECK,
                format!(
                    "worker {:016x} has no read-only mount of its tier: a client of its own user could re-open a descriptor for writing",
                    worker.id.get()
                ),
            );
        }
    }
}

/// Writes a small file into the cache, reads it, and looks which way the bytes took.
async fn try_descriptor(fs: &FileSystem) -> Result<()> {
    let path: AbsPath = format!("/.forebay-doctor-{:016x}", clock::now_ms() ^ u64::from(std::process::id()) << 32).parse()?;
    let options = CreateOptions { write_type: "cache_only".into(), ..CreateOptions::default() };
    let mut file = fs.create(&path, &options).await?;
    file.write(b"doctor").await?;
    file.close().await?;
    let read = async {
        let before = fs.counters().read_domain.load(Ordering::Relaxed);
        let file = fs.open(&path).await?;
        let bytes = file.slice(0, 6).await?;
        let domain = fs.counters().read_domain.load(Ordering::Relaxed) - before;
        match (&bytes[..], domain) {
            (b"doctor", 6..) => Ok(()),
            (b"doctor", _) => Err(err!(Unavailable, "the bytes came over the network")),
            _ => Err(err!(Corrupt, "other bytes came back than were written")),
        }
    }
    .await;
    fs.delete(&path, false).await?;
    read
}

fn check_stores(report: &ReportResponse, found: &mut Findings) {
    for store in &report.ufs {
        let check = format!("under store {}", String::from_utf8_lossy(&store.path));
        match store.reachable {
            true => found.add(Verdict::Ok, &check, format!("{} answers", store.uri)),
            false => found.add(Verdict::Fail, &check, store.error.clone()),
        }
        if store.unshown_objects > 0 {
            found.add(Verdict::Warn, &check, format!("{} objects cannot be shown (see docs/SEMANTICS.md on names)", store.unshown_objects));
        }
    }
}

fn check_disk(report: &ReportResponse, found: &mut Findings) {
    let used = report.data_dir_total_bytes.saturating_sub(report.data_dir_free_bytes);
    let share = percent(used, report.data_dir_total_bytes);
    let verdict = if share >= DISK_WARN_PERCENT { Verdict::Warn } else { Verdict::Ok };
    found.add(
        verdict,
        "disk of the master",
        format!("{} free of {} ({share}% used)", bytes(report.data_dir_free_bytes), bytes(report.data_dir_total_bytes)),
    );
}
