//! x
use forebay_common::config::ClientConfig;
#[derive(clap::Args)]
pub struct Options {}
pub async fn run(_: Options, _: &ClientConfig, _: bool) -> forebay_common::Result<()> { Ok(()) }
