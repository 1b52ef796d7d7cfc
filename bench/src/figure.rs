//! Figures and how they are printed.

use forebay_common::Result;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// One figure beside its reference.
#[derive(Debug, Default, Serialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// The same thing done without us.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<f64>,
    /// `value / reference` for rates, `reference / value` for times: more is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    pub reference_name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_s_per_gib: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<f64>,
    pub threads: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// Gathers figures; JSON lines go out at once.
pub struct Report {
    json: bool,
    figures: Vec<Figure>,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Report { json, figures: Vec::new() }
    }

    pub fn add(&mut self, figure: Figure) -> Result<()> {
        if self.json {
            let line = serde_json::to_string(&figure).map_err(|e| forebay_common::err!(Internal, "figure: {e}"))?;
            println!("{line}");
        } else {
            eprintln!("  measured {}", figure.name);
        }
        self.figures.push(figure);
        Ok(())
    }

    pub fn finish(&self) -> Result<()> {
        if self.json {
            return Ok(());
        }
        println!(
            "{:<44} {:>12} {:<8} {:>12} {:>6}  {:>9} {:>9} {:>8}  REFERENCE IS",
            "FIGURE", "VALUE", "UNIT", "REFERENCE", "RATIO", "P50 µs", "P99 µs", "CPU/GiB"
        );
        for f in &self.figures {
            let show = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
            println!(
                "{:<44} {:>12.1} {:<8} {:>12} {:>6}  {:>9} {:>9} {:>8}  {}",
                f.name,
                f.value,
                f.unit,
                show(f.reference, 1),
                show(f.ratio, 2),
                show(f.p50_us, 1),
                show(f.p99_us, 1),
                show(f.cpu_s_per_gib, 2),
                f.reference_name
            );
        }
        Ok(())
    }
}

/// The middle of some measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Times of many short operations.
pub struct Times(Histogram<u64>);

impl Times {
    pub fn new() -> Self {
        Times(Histogram::new_with_max(60_000_000_000, 3).unwrap_or_else(|_| unreachable!("the bounds are valid")))
    }

    pub fn add(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn merge(&mut self, other: &Times) {
        self.0 += &other.0;
    }

    pub fn p50_us(&self) -> f64 {
        self.0.value_at_quantile(0.5) as f64 / 1000.0
    }

    pub fn p99_us(&self) -> f64 {
        self.0.value_at_quantile(0.99) as f64 / 1000.0
    }
}

/// A figure of short operations, lower being better.
pub fn short(name: &str, times: &Times, reference: Option<f64>, reference_name: &'static str) -> Figure {
    let p50 = times.p50_us();
    Figure {
        name: name.to_owned(),
        value: p50,
        unit: "µs p50",
        reference,
        ratio: reference.map(|r| r / p50),
        reference_name,
        p50_us: Some(p50),
        p99_us: Some(times.p99_us()),
        threads: 1,
        ..Figure::default()
    }
}

/// A figure of throughput in MiB/s.
pub fn rate(name: &str, mib_per_s: f64, reference: Option<f64>, reference_name: &'static str, bytes: u64, cpu_s_per_gib: Option<f64>) -> Figure {
    Figure {
        name: name.to_owned(),
        value: mib_per_s,
        unit: "MiB/s",
        reference,
        ratio: reference.map(|r| mib_per_s / r),
        reference_name,
        cpu_s_per_gib,
        threads: 1,
        bytes: Some(bytes),
        ..Figure::default()
    }
}
