//! The `fusionllm` binary: parse, run, exit code.

mod cli;
mod client;
mod commands;
mod environment;
mod exit;
mod local;
mod outputs;
mod paths;
mod progress;
mod render;
mod secrets;
mod values;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: fusionllm_compnode::Allocator = fusionllm_compnode::Allocator;

/// Files that the runtime opens at its start: two to wait for events, three for signals.
#[cfg(unix)]
const RUNTIME_FILES: usize = 5;

fn main() -> ExitCode {
    fusionllm_compnode::keep_freed_memory();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    let filter = match environment::log_filter(cli.default_log()) {
        Ok(filter) => filter,
        Err(error) => return exit::failed(&error, false),
    };
    // Where a line cannot be written, on a full disk or to a reader that has gone, the work goes on without it.
    let log = tracing_subscriber::fmt().log_internal_errors(false);
    log.with_env_filter(filter).with_writer(std::io::stderr).with_target(false).with_ansi(false).init();
    std::panic::set_hook(Box::new(report_panic));
    let runtime = match start_runtime() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failed(&anyhow::Error::new(error).context("cannot start the async runtime"), false),
    };
    let only_tells = cli.command.only_tells();
    let result = runtime.block_on(async {
        outlive_file_limit();
        let result = commands::run(cli).await;
        fusionllm_transport::close_all().await;
        result
    });
    // Blocking threads may still sit in a read of standard input.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::failed(&error, only_tells),
    }
}

/// Without the few open files that it needs, the runtime would panic.
fn start_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    #[cfg(unix)]
    {
        use std::os::fd::AsFd;
        let stderr = std::io::stderr();
        let needed = (0..RUNTIME_FILES).map(|_| stderr.as_fd().try_clone_to_owned());
        needed.collect::<std::io::Result<Vec<_>>>()?;
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// A file that may not grow any more, by `ulimit -f`, is an error for whoever writes it, as a full disk is. Without a handler
/// the signal that comes with it would end the process.
fn outlive_file_limit() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Err(error) = signal(SignalKind::from_raw(libc::SIGXFSZ)) {
            tracing::debug!(%error, "a limit to the size of files would end the process");
        }
    }
}

/// A panic is a defect of ours: one line to report, and no backtrace. Whatever waits for the thread fails by itself.
fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let is_probe = std::thread::current().name() == Some(fusionllm_compnode::PROBE_THREAD);
    if !is_probe && !fusionllm_compnode::is_guarded() {
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        tracing::error!(place, message = panic.payload_as_str(), "internal error, please report it");
    }
}
