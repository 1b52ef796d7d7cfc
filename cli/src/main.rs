//! `forebay`: one binary for every role and every command. Exit codes: 0, 1 (failed), 2 (usage).

mod args;
mod config_cmd;
mod doctor;
mod fluid;
mod fs;
mod job;
mod mount;
mod output;
mod prepare;
mod report;
mod roles;

use args::{Cli, Command};
use clap::Parser;
use forebay_common::{ErrorKind, Result, config, telemetry};
use std::process::ExitCode;

/// Frames of up to a few MiB come and go; glibc gives such memory back to the kernel each time and faults it in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse_from(mount::arguments());
    let json = cli.json;
    match run(cli) {
        Ok(code) => code,
        Err(e) => {
            if json {
                let _ = output::line(&serde_json::json!({ "error": { "kind": e.kind(), "message": e.message() } }).to_string());
            }
            eprintln!("forebay: {e}");
            // What was asked makes no sense: usage. Anything else was tried, and failed.
            if e.kind() == ErrorKind::InvalidArgument { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    telemetry::init(cli.log_filter())?;
    let loaded = config::load(cli.config.as_deref(), &cli.flags()?)?;
    let runtime = match cli.command {
        Command::Local(_) | Command::Master | Command::Worker(_) | Command::Mount(_) | Command::Csi(_) | Command::Keeper(_) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()
        }
        _ => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    };
    let runtime = runtime.map_err(forebay_common::error::at("starting the runtime"))?;
    let done = runtime.block_on(async {
        let output = output::Output { json: cli.json };
        match cli.command {
            Command::Local(args) => roles::local(loaded.config, args).await.map(|()| ExitCode::SUCCESS),
            Command::Master => roles::master(loaded.config).await.map(|()| ExitCode::SUCCESS),
            Command::Worker(_) => roles::worker(loaded.config).await.map(|()| ExitCode::SUCCESS),
            Command::Csi(args) => roles::csi(&loaded.config, args, cli.config.as_deref()).await.map(|()| ExitCode::SUCCESS),
            Command::Keeper(args) => roles::keeper(args).await.map(|()| ExitCode::SUCCESS),
            Command::Mount(args) => mount::run(args, &loaded.config, output).await.map(|()| ExitCode::SUCCESS),
            Command::Fs(command) => fs::run(command, &loaded.config.client, output).await,
            Command::Fsadmin(command) => report::run(command, &loaded.config, output).await,
            Command::Fluid(command) => fluid::run(&command, &loaded.config.client, output).await.map(|()| ExitCode::SUCCESS),
            Command::Job(command) => job::run(command, &loaded.config.client, output).await.map(|()| ExitCode::SUCCESS),
            Command::Prepare { owner, dirs } => prepare::run(&owner, &dirs).map(|()| ExitCode::SUCCESS),
            Command::Bench(options) => forebay_bench::run(options, &loaded.config.client, cli.json).await.map(|()| ExitCode::SUCCESS),
            Command::Config(command) => config_cmd::run(&command, &loaded, output).map(|()| ExitCode::SUCCESS),
        }
    });
    // A thread that hangs in a dead file system must not keep the process: everything that had to be on disk is.
    runtime.shutdown_timeout(STOP_WITHIN);
    done
}

/// How long threads have to end when all is done.
const STOP_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);
