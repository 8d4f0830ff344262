//! The `wan-emu` program: parse, do, exit code.

mod cli;
mod commands;
mod show;

use std::process::ExitCode;

use clap::Parser;
use wan_emu::Error;
use wan_emu::notice::notice;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Whoever closed the output does not want to know.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    commands::run(cli.command).unwrap_or_else(|error| {
        notice(format_args!("{error:#}"));
        let is_input = error.chain().any(|cause| cause.downcast_ref::<Error>().is_some_and(Error::is_input));
        ExitCode::from(if is_input { 2 } else { 1 })
    })
}
