//! What can go wrong, and whose fault it is.

use std::io;
use std::path::PathBuf;

/// Why a network could not be read, built, reached or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user's file or arguments are wrong.
    #[error("{reason}")]
    Input {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A file cannot be parsed.
    #[error("{path}: {source}", path = path.display())]
    Parse {
        /// The file that was not read.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// The machine lacks something.
    #[error("{what} is missing: {cure}")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// What would help.
        cure: &'static str,
    },
    /// A program that was called failed.
    #[error("`{command}` failed: {output}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        output: String,
    },
    /// The operating system refused something.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system answered.
        source: io::Error,
    },
    /// A network of that name runs already.
    #[error("network `{net}` is up already: `wan-emu down --net {net}` takes it down")]
    InUse {
        /// Name of the network.
        net: String,
    },
    /// No such network runs.
    #[error("network `{net}` is not up")]
    NotUp {
        /// Name of the network.
        net: String,
    },
    /// The running network refused a request.
    #[error("{reason}")]
    Refused {
        /// What it said.
        reason: String,
    },
    /// The thread that carries the packets ended.
    #[error("the router ended: {reason}")]
    Router {
        /// What went wrong, in one line.
        reason: String,
    },
}

impl Error {
    /// An error of input.
    pub fn input(reason: impl Into<String>) -> Self {
        Self::Input { reason: reason.into() }
    }

    /// For `map_err`: puts what was tried before the operating system's answer.
    pub fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    /// Whether the user's input is to blame.
    pub fn is_input(&self) -> bool {
        matches!(self, Self::Input { .. } | Self::Parse { .. } | Self::NotUp { .. })
    }
}
