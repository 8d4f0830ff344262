//! Why a model cannot be exported.

use std::path::PathBuf;

use fusionllm_transport::io_reason;

use super::ShardError;

/// Why a model cannot be exported to a folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The path, or a part of it, is something else.
    #[error("{path} is no folder, give another one to export to", path = path.display())]
    NoFolder {
        /// What is no folder.
        path: PathBuf,
    },
    /// The folder is not free.
    #[error(
        "{path} holds `{what}`, which is of no export: give a folder that is new or empty, or holds an export of the same",
        path = path.display()
    )]
    Holds {
        /// The folder that was to be exported to.
        path: PathBuf,
        /// Name of something in it that no export writes.
        what: String,
    },
    /// Another export writes to the folder.
    #[error("another export writes to {path}: wait for it, or give another folder", path = path.display())]
    Busy {
        /// The folder that was to be exported to.
        path: PathBuf,
    },
    /// The folder has another model.
    #[error("{path} holds the export of {other}, not of {of}: give another folder, or remove it", path = path.display())]
    Other {
        /// The folder that was to be exported to.
        path: PathBuf,
        /// The model whose export it holds.
        other: String,
        /// The model that was to be exported.
        of: String,
    },
    /// The folder cannot be read or written.
    #[error("{path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The model's files cannot be written.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

impl ExportError {
    /// Whether another folder would do.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::NoFolder { .. } | Self::Holds { .. } | Self::Other { .. } => true,
            Self::Busy { .. } | Self::Io { .. } | Self::Shard(_) => false,
        }
    }
}
