//! From an error to what the user sees: message, hint, exit code.
//!
//! 0 done, 1 failed, 2 bad usage or bad input.

use std::fmt;
use std::process::ExitCode;

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

/// Prints the error in one line and gives its exit code.
#[expect(clippy::print_stderr, reason = "the one place where errors reach the user")]
pub(crate) fn failed(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {error:#}");
    if error.chain().any(|e| e.is::<BadInput>()) { ExitCode::from(BAD_INPUT) } else { ExitCode::FAILURE }
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
