//! What can go wrong with the data.

use std::path::{Path, PathBuf};

use fusionllm_planner::format_bytes;
use fusionllm_transport::io_reason;

/// Why data could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder could not be read.
    #[error("data.path {path}: {reason}")]
    Path {
        /// The file or folder.
        path: PathBuf,
        /// Why it cannot be read.
        reason: String,
    },
    /// A file or folder could not be opened, for a reason that says nothing of it, such as too many open files.
    #[error("{what} cannot be read: {}", io_reason(source))]
    Unopened {
        /// What was to be read, by its key.
        what: &'static str,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// What jobs may read is not there.
    #[error("{path}: {}", io_reason(source), path = path.display())]
    Unlisted {
        /// The file or folder that `--data` names.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The machine's owner does not let jobs read it.
    #[error(
        "{key} {path} is nothing that jobs may read on this machine: its owner starts `fusionllm join` with `--data DIR` \
         to let them"
    )]
    NotReadable {
        /// The job's key.
        key: &'static str,
        /// The file or folder that the key names.
        path: PathBuf,
    },
    /// There is no text.
    #[error("data.path holds no {what}: {paths}")]
    NoText {
        /// What there should be, by the job's `data.format`.
        what: String,
        /// What was searched.
        paths: String,
    },
    /// The text is shorter than one sequence.
    #[error(
        "the {split} split has {tokens} tokens, but one sequence needs {needed}: give more text, or a smaller data.seq_len\
         {left_out}"
    )]
    TooShort {
        /// `training` or `evaluation`.
        split: &'static str,
        /// Tokens there are.
        tokens: usize,
        /// Tokens needed: the sequence and one more for the last label.
        needed: usize,
        /// What was left out of the data, as `; left out …`; empty if nothing was.
        left_out: String,
    },
    /// No conversation is in one of the splits.
    #[error(
        "the {split} split has no conversation with an answer: give more data, a larger data.seq_len, or messages of the role `assistant` that the chat template writes{left_out}"
    )]
    NoSample {
        /// `training` or `evaluation`.
        split: &'static str,
        /// What was left out of the data, as `; left out …`; empty if nothing was.
        left_out: String,
    },
    /// There is no usable chat template.
    #[error("chat template {name}: {reason}; data.chat_template may name a Jinja file")]
    ChatTemplate {
        /// Where it lies.
        name: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Tokens on the disk cannot be written or read.
    #[error("the token cache {path}: {}; data.cache = false holds tokens in memory instead", io_reason(.source))]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The tokenizer file is unusable.
    #[error("data.tokenizer {path}: {reason}; expected `bytes` or the path of a tokenizer.json")]
    Tokenizer {
        /// The tokenizer file.
        path: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// The tokenizer drops much of the text.
    #[error(
        "data.tokenizer {tokenizer} has no token for {lost} of {chars} characters of the text ({named}), and would drop them: \
         give one with an unknown token or byte fallback, or one made for this text"
    )]
    Dropped {
        /// The job's `data.tokenizer`: a path, or `bytes`.
        tokenizer: String,
        /// Characters without a token.
        lost: u64,
        /// Characters in all.
        chars: u64,
        /// The most frequent of them.
        named: String,
    },
    /// The tokenizer does not know the text.
    #[error(
        "data.tokenizer {tokenizer} does not know {unknown} of {tokens} tokens of the text: give one made for this text"
    )]
    Unknown {
        /// The job's `data.tokenizer`: a path, or `bytes`.
        tokenizer: String,
        /// Tokens that stand for something unknown.
        unknown: usize,
        /// Tokens in all.
        tokens: usize,
    },
    /// A token id lies outside the model's vocabulary.
    #[error("data.tokenizer {tokenizer} has token id {id}, but the model's vocabulary ends at {vocab}: {hint}")]
    Vocabulary {
        /// The job's `data.tokenizer`: a path, or `bytes`.
        tokenizer: String,
        /// The largest id.
        id: usize,
        /// The model's vocabulary.
        vocab: usize,
        /// What would do.
        hint: String,
    },
    /// A token id of the data is none of its tokenizer's.
    #[error(
        "the data has token id {id}, but data.tokenizer {tokenizer} has {entries} entries: give the one that made the ids; a \
         file of four bytes an id needs llm.c's header"
    )]
    Ids {
        /// The job's `data.tokenizer`: a path, or `bytes`.
        tokenizer: String,
        /// The largest id.
        id: usize,
        /// Entries of the tokenizer.
        entries: usize,
    },
    /// The data has more classes than the model tells apart.
    #[error("data.path has images of {found} classes, the model tells {classes} apart: set model.classes = {found}")]
    Classes {
        /// Classes of the data.
        found: usize,
        /// Classes of the model.
        classes: usize,
    },
    /// There is no memory for text and tokens, which is known before it is filled.
    #[error("the data's text and tokens take at least {}, there is room for {}", format_bytes(*.needed as f64), format_bytes(*.room as f64))]
    Memory {
        /// Bytes that they need.
        needed: u64,
        /// Bytes that may be filled.
        room: u64,
    },
    /// The data is not wanted any more.
    #[error("stopped before the data was read")]
    Stopped,
}

impl DataError {
    /// Of tokens on the disk, at this file or folder.
    pub(crate) fn cache(path: &Path, source: std::io::Error) -> Self {
        Self::Cache { path: path.to_owned(), source }
    }
}
