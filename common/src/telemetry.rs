//! Logging set-up, once per process, by `main`.

use crate::{Result, err};
use std::io::IsTerminal;

/// Logs to standard error, filtered by `filter` (the syntax of `RUST_LOG`, which wins when set).
pub fn init(filter: &str) -> Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| filter.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter)
        .map_err(|e| err!(InvalidArgument, "log filter {filter:?}: {e}: use words like info or forebay_worker=debug"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(true)
        .try_init()
        .map_err(|e| err!(Internal, "logging is set up twice: {e}"))
}
