//! The text of a job, as tokens: a training split, and a held-out split at the end of every file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fusionllm_protocol::{DataReport, DataSpec};

use super::Tokenizer;
use crate::DataError;

/// Folders that hold no text worth learning, even where no ignore file says so.
const SKIPPED_FOLDERS: [&str; 3] = ["target", "node_modules", "runs"];

/// The tokens of all files.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    train: Vec<i32>,
    eval: Vec<i32>,
    files: u64,
    bytes: u64,
}

impl Corpus {
    /// Reads all files and folders of `spec.path`, in the order of their names. In folders, files that are hidden,
    /// ignored by a `.gitignore`, or not UTF-8 are passed over. The last `eval_fraction` of each file is held out.
    ///
    /// # Errors
    /// [`DataError`] if there is too little text or something cannot be read.
    pub fn read(spec: &DataSpec, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut corpus = Self { train: Vec::new(), eval: Vec::new(), files: 0, bytes: 0 };
        for file in text_files(&spec.path)? {
            let Some(text) = read_text(&file, spec.path.contains(&file))? else { continue };
            corpus.push(&text, spec.eval_fraction, tokenizer)?;
        }
        if corpus.bytes == 0 {
            let paths: Vec<String> = spec.path.iter().map(|p| p.display().to_string()).collect();
            return Err(DataError::NoText { paths: paths.join(", ") });
        }
        let needed = spec.seq_len + 1;
        for (split, tokens) in [("training", corpus.train.len()), ("evaluation", corpus.eval.len())] {
            if tokens < needed {
                return Err(DataError::TooShort { split, tokens, needed });
            }
        }
        Ok(corpus)
    }

    fn push(&mut self, text: &str, eval_fraction: f64, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let held_out = (text.len() as f64 * eval_fraction).ceil() as usize;
        let cut = text.floor_char_boundary(text.len().saturating_sub(held_out));
        let (train, eval) = text.split_at(cut);
        self.train.extend(tokenizer.encode(train)?);
        self.eval.extend(tokenizer.encode(eval)?);
        self.files += 1;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Tokens to train on.
    pub fn train(&self) -> &[i32] {
        &self.train
    }

    /// Tokens held out.
    pub fn eval(&self) -> &[i32] {
        &self.eval
    }

    /// Holds every token against the vocabulary.
    ///
    /// # Errors
    /// [`DataError::Vocabulary`] with the largest id.
    pub fn check_vocabulary(&self, vocab: usize) -> Result<(), DataError> {
        let largest = self.train.iter().chain(&self.eval).copied().max().unwrap_or(0);
        match usize::try_from(largest) {
            Ok(id) if id >= vocab => Err(DataError::Vocabulary { id, vocab, needed: id + 1 }),
            _ => Ok(()),
        }
    }

    /// Counts, and the loss of a unigram model of the training split (add-one smoothed) on the held-out tokens.
    pub fn report(&self, vocab: usize) -> DataReport {
        let mut counts = vec![1.0f64; vocab.max(1)];
        for &token in &self.train {
            if let Some(count) = usize::try_from(token).ok().and_then(|t| counts.get_mut(t)) {
                *count += 1.0;
            }
        }
        let total: f64 = counts.iter().sum();
        let nats = |&token: &i32| usize::try_from(token).ok().and_then(|t| counts.get(t)).map(|c| -(c / total).ln());
        let sum: f64 = self.eval.iter().filter_map(nats).sum();
        let tokens = (self.train.len() + self.eval.len()) as f64;
        DataReport {
            files: self.files,
            train_tokens: self.train.len() as u64,
            eval_tokens: self.eval.len() as u64,
            bytes_per_token: self.bytes as f64 / tokens,
            unigram_loss: sum / self.eval.len() as f64,
            notes: Vec::new(),
        }
    }
}

/// All files below the paths, each once, sorted.
fn text_files(paths: &[PathBuf]) -> Result<BTreeSet<PathBuf>, DataError> {
    let mut files = BTreeSet::new();
    for path in paths {
        let fail = |reason: String| DataError::Path { path: path.clone(), reason };
        let kind = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?;
        if kind.is_file() {
            files.insert(path.clone());
            continue;
        }
        let wanted = |entry: &ignore::DirEntry| {
            let is_folder = entry.file_type().is_some_and(|t| t.is_dir());
            !(is_folder && entry.file_name().to_str().is_some_and(|n| SKIPPED_FOLDERS.contains(&n)))
        };
        let walk = ignore::WalkBuilder::new(path).require_git(false).filter_entry(wanted).build();
        for entry in walk {
            let entry = entry.map_err(|e| fail(e.to_string()))?;
            if entry.file_type().is_some_and(|t| t.is_file()) {
                files.insert(entry.into_path());
            }
        }
    }
    Ok(files)
}

/// The text of a file; nothing if it is not UTF-8, unless it was `named` by the user.
fn read_text(path: &Path, named: bool) -> Result<Option<String>, DataError> {
    let fail = |reason: String| DataError::Path { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(Some(text)),
        Ok(_) | Err(_) if named => Err(fail("not UTF-8 text".to_owned())),
        Ok(_) | Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests;
