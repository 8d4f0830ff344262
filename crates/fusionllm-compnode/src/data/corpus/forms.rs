//! Files of other forms than text: documents, conversations, and tokens.

use std::fs::File;

use fusionllm_protocol::{ContentHasher, DataFormat, FileFingerprint, RowKind};
use fusionllm_transport::is_shortage;

use super::super::Tokenizer;
use super::super::chat::{KEYS, Unusable};
use super::super::documents::{Document, Failure, Part, each_document, each_part, each_row};
use super::builder::{Builder, look_at};
use super::sources::{Source, path_for_people};
use super::{ANSWER, Split};
use crate::DataError;

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

impl Builder<'_> {
    /// Adds a file that is no text.
    pub(super) fn push_file(&mut self, source: &Source) -> Result<(), DataError> {
        let file = &source.file;
        let path = path_for_people(file, self.spec);
        let fail = |reason: String| DataError::Path { path: path.clone(), reason };
        let opened = self.readable.open(&file.path).map_err(|source| match is_shortage(&source) {
            true => DataError::Unopened { what: "data.path", source },
            false => fail(source.to_string()),
        })?;
        let found = match (self.spec.format, self.spec.rows) {
            (DataFormat::Tokens, _) => self.push_tokens(opened),
            (_, RowKind::Documents) => self.push_documents(opened),
            (_, RowKind::Chat) => self.push_conversations(opened),
        };
        let fingerprint = found.map_err(|failure| match failure {
            Failure::File(reason) => fail(reason),
            Failure::Elsewhere(error) => error,
        })?;
        // Its tokens would be kept under the name of another content.
        if source.raw.as_ref().is_some_and(|raw| raw.is_old(file)) {
            return Err(fail("it changed while it was read".to_owned()));
        }
        self.push_fingerprint(fingerprint);
        Ok(())
    }

    /// Adds the documents of a file, each with what stands around it. The last one is held out, unless it is the first,
    /// which never is.
    fn push_documents(&mut self, file: File) -> Result<FileFingerprint, Failure> {
        let (spec, reading) = (self.spec, self.reading);
        let (begin, end) = around_document(self.by.tokenizer)?;
        let mut content = Content::default();
        let without = each_document(file, spec, reading, &mut |document| {
            let Document { text, end: at } = document;
            let split = content.split(at, spec.eval_fraction);
            self.tokens_of(split).extend(&begin)?;
            self.encode(text, split)?;
            self.tokens_of(split).extend(&end)?;
            content.add(text, split);
            Ok(())
        })?;
        self.without_text += without;
        Ok(content.fingerprint())
    }

    /// Adds the conversations of a file, and chooses those that are held out as documents.
    fn push_conversations(&mut self, file: File) -> Result<FileFingerprint, Failure> {
        let (spec, reading, by) = (self.spec, self.reading, self.by);
        let template = by.template.ok_or_else(|| Failure::File("there is no chat template".to_owned()))?;
        let mut content = Content::default();
        each_row(file, spec, &KEYS, reading, &mut |row| {
            let sample = template.sample(&row.keys, by.tokenizer, reading).map_err(|unusable| match unusable {
                Unusable::Row(reason) => Failure::File(format!("{}: {reason}", row.place)),
                Unusable::Other(error) => Failure::Elsewhere(error),
            })?;
            look_at(&sample.text, by, &mut self.coverage, &mut self.told, reading)?;
            let kept = sample.ids.len().min(spec.seq_len);
            // The first token is predicted by nothing.
            if !sample.answer[..kept].iter().skip(1).any(|&is_answer| is_answer) {
                self.without_answer += 1;
                return Ok(());
            }
            self.shortened += u64::from(kept < sample.ids.len());
            let split = content.split(row.end, spec.eval_fraction);
            content.add(&sample.text, split);
            let tokens = self.tokens_of(split);
            let start = tokens.len() as u64;
            let marked = sample.ids.iter().zip(&sample.answer).take(kept);
            let marked: Vec<i32> = marked.map(|(&id, &answer)| if answer { id | ANSWER } else { id }).collect();
            tokens.extend(&marked)?;
            self.rows[usize::from(split == Split::HeldOut)].push(start);
            reading.holds(self.bytes());
            reading.fits(0)?;
            Ok(())
        })?;
        Ok(content.fingerprint())
    }

    /// Adds the ids of a file of tokens.
    fn push_tokens(&mut self, file: File) -> Result<FileFingerprint, Failure> {
        let (eval_fraction, reading) = (self.spec.eval_fraction, self.reading);
        let mut hash = ContentHasher::default();
        let (mut bytes, mut train_bytes) = (0, 0);
        each_part(file, reading, &mut |part| {
            let Part { ids, before, count } = part;
            let held_out = (count as f64 * eval_fraction).ceil() as u64;
            let cut = count.saturating_sub(held_out).saturating_sub(before).min(ids.len() as u64);
            let (train, eval) = ids.split_at(cut as usize);
            self.train.extend(train)?;
            self.eval.extend(eval)?;
            for id in ids {
                hash.update(&id.to_le_bytes());
            }
            // As two bytes each, the usual width.
            (bytes, train_bytes) = (bytes + 2 * ids.len() as u64, train_bytes + 2 * cut);
            reading.holds(self.bytes());
            reading.fits(0)
        })?;
        Ok(FileFingerprint { name: String::new(), bytes, train_bytes, hash: hash.finish() })
    }
}

/// The texts of a file so far.
#[derive(Default)]
struct Content {
    hash: ContentHasher,
    bytes: u64,
    train_bytes: u64,
}

impl Content {
    /// Where a text belongs that ends at this share of the file.
    fn split(&self, end: f64, eval_fraction: f64) -> Split {
        if end > 1.0 - eval_fraction && self.bytes > 0 { Split::HeldOut } else { Split::Train }
    }

    fn add(&mut self, text: &str, split: Split) {
        let bytes = text.len() as u64;
        self.hash.update(&bytes.to_le_bytes());
        self.hash.update(text.as_bytes());
        self.bytes += bytes;
        self.train_bytes += if split == Split::HeldOut { 0 } else { bytes };
    }

    fn fingerprint(&self) -> FileFingerprint {
        let (bytes, train_bytes, hash) = (self.bytes, self.train_bytes, self.hash.finish());
        FileFingerprint { name: String::new(), bytes, train_bytes, hash }
    }
}
