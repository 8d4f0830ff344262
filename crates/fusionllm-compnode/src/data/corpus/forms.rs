//! Files of other forms than text: documents, and tokens.

use std::fs::File;

use fusionllm_protocol::{ContentHasher, DataFormat, DataSpec, FileFingerprint};
use fusionllm_transport::is_shortage;

use super::super::documents::{Document, Failure, Part, each_document, each_part};
use super::super::files::{TextFile, shown};
use super::super::{ReadableData, Reading, Tokenizer};
use super::{Corpus, Split};
use crate::DataError;

/// Whether a file's name is one of a form.
pub(super) fn has_ending(file: &TextFile, format: DataFormat) -> bool {
    let ending = file.path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    format.endings().iter().any(|of| ending.eq_ignore_ascii_case(of))
}

/// What stands before and after each document: the special tokens that the tokenizer's own file puts around a text, and at
/// the end the one that ends a text, or else an empty line.
fn around_document(tokenizer: &Tokenizer) -> Result<(Vec<i32>, Vec<i32>), DataError> {
    let (begin, mut end) = tokenizer.around();
    if end.is_empty() {
        end = match tokenizer.end_of_text().and_then(|id| i32::try_from(id).ok()) {
            Some(id) => vec![id],
            None => tokenizer.encode("\n\n")?,
        };
    }
    Ok((begin, end))
}

impl Corpus {
    /// Adds a file that is no text.
    pub(super) fn push_file(
        &mut self,
        file: &TextFile,
        spec: &DataSpec,
        tokenizer: &Tokenizer,
        readable: &ReadableData,
        reading: &Reading,
    ) -> Result<(), DataError> {
        // Of private data only what the job names is called by its name.
        let hidden = spec.private && !file.named;
        let path = if hidden { shown(&file.name, true).into() } else { file.path.clone() };
        let fail = |reason: String| DataError::Path { path: path.clone(), reason };
        let opened = readable.open(&file.path).map_err(|source| match is_shortage(&source) {
            true => DataError::Unopened { what: "data.path", source },
            false => fail(source.to_string()),
        })?;
        let found = match spec.format {
            DataFormat::Tokens => self.push_tokens(opened, spec.eval_fraction, reading),
            _ => self.push_documents(opened, spec, tokenizer, reading),
        };
        let (fingerprint, without) = found.map_err(|failure| match failure {
            Failure::File(reason) => fail(reason),
            Failure::Elsewhere(error) => error,
        })?;
        self.without_text += without;
        self.files.push(FileFingerprint { name: shown(&file.name, spec.private), ..fingerprint });
        Ok(())
    }

    /// Adds the documents of a file, each with what stands around it, and says how many have no text. The last one is held
    /// out, unless it is the first, which never is.
    fn push_documents(
        &mut self,
        file: File,
        spec: &DataSpec,
        tokenizer: &Tokenizer,
        reading: &Reading,
    ) -> Result<(FileFingerprint, u64), Failure> {
        let (begin, end) = around_document(tokenizer)?;
        let mut hash = ContentHasher::default();
        let (mut bytes, mut train_bytes) = (0, 0);
        let without = each_document(file, spec, reading, &mut |document| {
            let Document { text, end: at } = document;
            let held_out = at > 1.0 - spec.eval_fraction && bytes > 0;
            let split = if held_out { Split::HeldOut } else { Split::Train };
            self.tokens_of(split).extend(&begin);
            self.encode(text, split, text.len() as u64, tokenizer, reading)?;
            self.tokens_of(split).extend(&end);
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
            bytes += text.len() as u64;
            train_bytes += if held_out { 0 } else { text.len() as u64 };
            Ok(())
        })?;
        Ok((FileFingerprint { name: String::new(), bytes, train_bytes, hash: hash.finish() }, without))
    }

    /// Adds the ids of a file of tokens.
    fn push_tokens(
        &mut self,
        file: File,
        eval_fraction: f64,
        reading: &Reading,
    ) -> Result<(FileFingerprint, u64), Failure> {
        let mut hash = ContentHasher::default();
        let (mut bytes, mut train_bytes) = (0, 0);
        each_part(file, reading, &mut |part| {
            let Part { ids, before, count } = part;
            let held_out = (count as f64 * eval_fraction).ceil() as u64;
            let cut = count.saturating_sub(held_out).saturating_sub(before).min(ids.len() as u64);
            let (train, eval) = ids.split_at(cut as usize);
            self.train.extend(train);
            self.eval.extend(eval);
            for id in ids {
                hash.update(&id.to_le_bytes());
            }
            // As two bytes each, the usual width.
            (bytes, train_bytes) = (bytes + 2 * ids.len() as u64, train_bytes + 2 * cut);
            reading.holds(self.bytes());
            reading.fits(0)
        })?;
        Ok((FileFingerprint { name: String::new(), bytes, train_bytes, hash: hash.finish() }, 0))
    }
}
