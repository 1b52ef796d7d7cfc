//! Counters and gauges of this process, kept in the `prometheus` crate's default registry and served at `/metrics`.
//!
//! A metric is declared once, as a static; `prometheus` refuses a second one of the same name, in which case the
//! static counts alone and the registry keeps the first.

use prometheus::{IntCounter, IntGauge};

/// A registered counter. Called through [`counter!`](crate::counter).
pub fn register_counter(name: &str, help: &str) -> IntCounter {
    match IntCounter::new(name, help) {
        Ok(counter) => {
            if let Err(e) = prometheus::register(Box::new(counter.clone())) {
                tracing::warn!(name, error = %e, "metric is not registered");
            }
            counter
        }
        Err(e) => {
            tracing::error!(name, error = %e, "metric has an impossible name");
            prometheus::IntCounter::new("forebay_misnamed_total", "a metric with an impossible name")
                .unwrap_or_else(|_| unreachable!("the name above is a valid one"))
        }
    }
}

/// A registered gauge. Called through [`gauge!`](crate::gauge).
pub fn register_gauge(name: &str, help: &str) -> IntGauge {
    match IntGauge::new(name, help) {
        Ok(gauge) => {
            if let Err(e) = prometheus::register(Box::new(gauge.clone())) {
                tracing::warn!(name, error = %e, "metric is not registered");
            }
            gauge
        }
        Err(e) => {
            tracing::error!(name, error = %e, "metric has an impossible name");
            IntGauge::new("forebay_misnamed", "a metric with an impossible name").unwrap_or_else(|_| unreachable!("the name above is a valid one"))
        }
    }
}

/// `counter!(READS, "forebay_worker_reads_total", "reads served")` declares a static counter.
#[macro_export]
macro_rules! counter {
    ($(#[$doc:meta])* $vis:vis $ident:ident, $name:literal, $help:literal) => {
        #[doc = $help]
        $vis static $ident: std::sync::LazyLock<prometheus::IntCounter> =
            std::sync::LazyLock::new(|| $crate::metrics::register_counter($name, $help));
    };
}

/// `gauge!(GRANTS, "forebay_worker_grants", "descriptors lent")` declares a static gauge.
#[macro_export]
macro_rules! gauge {
    ($(#[$doc:meta])* $vis:vis $ident:ident, $name:literal, $help:literal) => {
        #[doc = $help]
        $vis static $ident: std::sync::LazyLock<prometheus::IntGauge> =
            std::sync::LazyLock::new(|| $crate::metrics::register_gauge($name, $help));
    };
}

/// Everything registered in this process, in Prometheus' text format 0.0.4.
pub fn render() -> String {
    prometheus::TextEncoder::new().encode_to_string(&prometheus::gather()).unwrap_or_default()
}
