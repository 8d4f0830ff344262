//! What can be wrong with the job store.

use std::path::PathBuf;

use fusionllm_transport::io_reason;

/// Why the job store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The database refuses.
    #[error("job store {path}: {reason}; it may be damaged: move it away to start with no jobs")]
    Database {
        /// The store's file.
        path: PathBuf,
        /// The database's message.
        reason: String,
    },
    /// Its file cannot be read or written.
    #[error("job store {path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The store's file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Another broker has it.
    #[error("job store {path} is in use by another broker, stop it or give another --state")]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// It was written by another version.
    #[error(
        "job store {path} has schema version {got}, this build reads version {expected}: use {}",
        if got > expected { "a newer release" } else { "the older release that wrote it, or another --state" }
    )]
    Version {
        /// The store's file.
        path: PathBuf,
        /// Version in the file.
        got: u64,
        /// Version of this build.
        expected: u64,
    },
    /// One entry is unreadable.
    #[error("job store {path}: job {job} is not readable: {reason}")]
    Entry {
        /// The store's file.
        path: PathBuf,
        /// Number of the job.
        job: u64,
        /// The parser's message.
        reason: String,
    },
}
