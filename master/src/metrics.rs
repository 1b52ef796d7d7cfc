//! `Cluster.*`: totals over all workers and clients since this master started, and their rate per minute.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Samples kept for rates: one every ten seconds at most.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
const SAMPLES_MAX: usize = 8;
/// Names that may be counted; a lying client cannot grow the table.
const NAMES_MAX: usize = 4_096;
/// What is shown even when nothing was counted yet.
const ALWAYS: &[&str] = &[
    "BytesReadDomain",
    "BytesReadRemote",
    "BytesReadUfs",
    "BytesWrittenDomain",
    "BytesWrittenRemote",
    "BytesWrittenUfs",
    "BlocksEvicted",
    "BlocksQuarantined",
    "HadoopBytesRead",
    "HadoopBytesWritten",
    "HadoopGrants",
];

#[derive(Default)]
struct Inner {
    totals: BTreeMap<String, u64>,
    samples: VecDeque<(Instant, BTreeMap<String, u64>)>,
}

#[derive(Default)]
pub struct ClusterMetrics(Mutex<Inner>);

impl ClusterMetrics {
    /// Adds an increment.
    pub fn add(&self, name: &str, by: u64) {
        let mut inner = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let room = inner.totals.len() < NAMES_MAX && name.len() <= 64;
        match inner.totals.get_mut(name) {
            Some(total) => *total = total.saturating_add(by),
            None if room => drop(inner.totals.insert(name.to_owned(), by)),
            None => {}
        }
    }

    /// One total.
    pub fn total(&self, name: &str) -> u64 {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).totals.get(name).copied().unwrap_or(0)
    }

    /// Remembers the totals of now, for rates. Called every few seconds.
    pub fn sample(&self) {
        let mut inner = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if inner.samples.back().is_none_or(|(at, _)| at.elapsed() >= SAMPLE_EVERY) {
            let totals = inner.totals.clone();
            inner.samples.push_back((Instant::now(), totals));
            while inner.samples.len() > SAMPLES_MAX {
                inner.samples.pop_front();
            }
        }
    }

    /// `Cluster.X` and `Cluster.XPerMinute` for every name, the rate over the last minute or since the start.
    pub fn report(&self) -> Vec<(String, u64)> {
        let inner = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let minute = inner.samples.iter().rev().find(|(at, _)| at.elapsed() >= Duration::from_secs(60)).or(inner.samples.front());
        // What mounts cost is told by mount, in `report ufs`.
        let shown = inner.totals.keys().map(String::as_str).filter(|name| !name.starts_with("Ufs."));
        let mut names: Vec<&str> = shown.chain(ALWAYS.iter().copied()).collect();
        names.sort_unstable();
        names.dedup();
        let mut out = Vec::new();
        for name in names {
            let total = inner.totals.get(name).copied().unwrap_or(0);
            let (before, seconds) =
                minute.map_or((0, 60.0), |(at, then)| (then.get(name).copied().unwrap_or(0), at.elapsed().as_secs_f64().max(1.0)));
            out.push((format!("Cluster.{name}"), total));
            out.push((format!("Cluster.{name}PerMinute"), (total.saturating_sub(before) as f64 * 60.0 / seconds.max(60.0)) as u64));
        }
        out
    }
}
