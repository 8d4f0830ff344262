//! The `fusionllm` binary: parse, run, exit code.

mod cli;
mod client;
mod commands;
mod exit;
mod local;
mod paths;
mod progress;
mod render;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    let filter = EnvFilter::try_from_env("FUSIONLLM_LOG").unwrap_or_else(|_| EnvFilter::new(cli.default_log()));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failed(&anyhow::Error::new(error).context("cannot start the async runtime")),
    };
    let result = runtime.block_on(commands::run(cli));
    // Blocking threads may still sit in a read of standard input.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::failed(&error),
    }
}
