//! From an error to what the user sees: message, hint, exit code.
//!
//! 0 done, 1 failed, 2 bad usage or bad input.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use fusionllm_compnode::CompNodeError;
use fusionllm_protocol::is_deceptive;
use fusionllm_transport::{io_reason, is_of_path, is_shortage};

/// Exit code of bad usage and bad input.
const BAD_INPUT: u8 = 2;

/// Marks an error as the user's input's fault.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// An error that is the input's fault.
pub(crate) fn bad_input(error: impl fmt::Display) -> anyhow::Error {
    anyhow::Error::new(BadInput(error.to_string()))
}

/// An error that is the input's fault, unless the process or the machine had run out of something.
pub(crate) fn refused(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    let is_short = error.chain().any(|cause| cause.downcast_ref().is_some_and(is_shortage));
    if is_short { error } else { bad_input(error) }
}

/// An error of a CompNode or a command that was to start, with its exit code.
pub(crate) fn started(error: CompNodeError) -> anyhow::Error {
    if error.is_bad_start() { bad_input(error) } else { error.into() }
}

/// Whether the input is at fault: it was found to be, or a path that was given cannot be used as it was to be.
fn is_bad_input(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<BadInput>() || cause.downcast_ref().is_some_and(is_of_path))
}

/// Prints the error in one line and gives its exit code. For a command that `only_tells` something it is none that nobody
/// reads on.
pub(crate) fn failed(error: &anyhow::Error, only_tells: bool) -> ExitCode {
    if only_tells && error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    // Where nobody can be told, the exit code says it.
    let _ = writeln!(std::io::stderr(), "error: {}", in_one_line(&message(error)));
    if is_bad_input(error) { ExitCode::from(BAD_INPUT) } else { ExitCode::FAILURE }
}

/// The error and its causes. Many errors have their cause in their own text already; it is not said twice.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let plain = cause.to_string();
        let said = cause.downcast_ref().map_or_else(|| plain.clone(), |error| io_reason(error).to_string());
        if text.is_empty() {
            text = said;
        } else if !text.contains(plain.trim()) {
            text = format!("{text}: {said}");
        }
    }
    text
}

/// Text with its line breaks as blanks, and written out what a terminal would act on or nobody sees: much of it is names and
/// paths that others chose.
fn in_one_line(text: &str) -> String {
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let shown = |c: char| if is_deceptive(c) { c.escape_default().to_string() } else { c.to_string() };
    line.chars().map(shown).collect()
}

/// Whoever read our output has seen enough.
fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints what clap has to say, which may be help.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // Nothing is left to do if the terminal is gone.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(BAD_INPUT) } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let silent = anyhow::Error::new(missing()).context("cannot read a.toml");
        assert_eq!(message(&silent), "cannot read a.toml: entity not found");
        let telling = anyhow::Error::new(missing()).context("a.toml: entity not found");
        assert_eq!(message(&telling), "a.toml: entity not found");
    }

    #[test]
    fn an_error_is_a_line_that_a_terminal_only_shows() {
        assert_eq!(in_one_line("a\n  b\r\n\n\tc"), "a b c");
        assert_eq!(in_one_line("\u{1b}]0;x\u{7}täglich"), "\\u{1b}]0;x\\u{7}täglich");
        assert_eq!(in_one_line("a\u{202e}txt.exe"), "a\\u{202e}txt.exe");
    }
}
