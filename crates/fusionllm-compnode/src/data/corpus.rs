//! The text of a job, as tokens: a training split, and a held-out split at the end of every file.

mod forms;

use std::collections::BTreeMap;

use fusionllm_protocol::{
    DataFingerprint, DataFormat, DataReport, DataSpec, FileFingerprint, TokenizerFingerprint, content_hash,
};

use super::files::{Content, LeftOut, TextFile, read, shown, text_files};
use super::tokenizer::{Coverage, Told, pieces};
use super::{ReadableData, Reading, Tokenizer, Tokens};
use crate::DataError;
use forms::has_ending;

/// A larger share of characters without a token is a mistake, not a stray sign.
const MOST_LOST: f64 = 1e-3;
/// A larger share of unknown tokens likewise.
const MOST_UNKNOWN: f64 = 0.5;
/// Files that are remembered one by one.
const REMEMBERED_FILES: usize = 1000;
/// Bytes that their names may have, all together.
const REMEMBERED_NAME_BYTES: usize = 200_000;
/// Sentences that a report has at most.
const MOST_NOTES: usize = 24;

/// Bytes of text of which a tokenizer makes one token on average, at the most.
const LONG_TOKEN_BYTES: u64 = 8;

/// Before anything is read: whether there is memory for the files that the job names, as tokens, and for the text of the
/// largest one. What folders hold is known only when it is read.
fn check_room(
    files: &[TextFile],
    format: DataFormat,
    tokenizer: &Tokenizer,
    reading: &Reading,
) -> Result<(), DataError> {
    let named = files.iter().filter(|file| file.named).filter_map(|file| std::fs::metadata(&file.path).ok());
    let (sum, largest) =
        named.fold((0u64, 0), |(sum, largest), file| (sum.saturating_add(file.len()), file.len().max(largest)));
    let tokens = match tokenizer {
        _ if format == DataFormat::Tokens => sum / 4,
        Tokenizer::Bytes => sum,
        Tokenizer::HuggingFace(_) => sum / LONG_TOKEN_BYTES,
    };
    // Only text is held as a whole; the rest is read part by part.
    let held = if format == DataFormat::Text { largest } else { 0 };
    reading.fits(tokens.saturating_mul(Tokens::width(tokenizer.entries())).saturating_add(held))
}

/// The tokens of all files.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    train: Tokens,
    eval: Tokens,
    coverage: Coverage,
    told: Told,
    files: Vec<FileFingerprint>,
    tokenizer: TokenizerFingerprint,
    trained_entries: usize,
    /// Tokens that stand for what the tokenizer does not know.
    unknown: usize,
    /// Documents that have none.
    without_text: u64,
    notes: Vec<String>,
}

/// The two parts of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    Train,
    HeldOut,
}

impl Corpus {
    /// Reads all files and folders of `spec.path`, in the order of their names. In folders, files that are hidden,
    /// ignored by a `.gitignore`, not UTF-8, of another form than the job's or links are passed over, which the report
    /// says. The last `eval_fraction` of each file is held out; of files of documents, the documents there.
    ///
    /// # Errors
    /// [`DataError`] if there is too little text, something cannot be read, or the tokenizer drops much of it.
    pub fn read(spec: &DataSpec, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Self::read_within(spec, tokenizer, &ReadableData::everything(), &Reading::default())
    }

    /// The same for a job of somebody else, who may have read only what is `readable`, and may stop it.
    ///
    /// # Errors
    /// As [`Self::read`], and [`DataError::NotReadable`], [`DataError::Stopped`] or [`DataError::Memory`].
    pub(crate) fn read_within(
        spec: &DataSpec,
        tokenizer: &Tokenizer,
        readable: &ReadableData,
        reading: &Reading,
    ) -> Result<Self, DataError> {
        readable.check(spec)?;
        let mut corpus = Self::empty(tokenizer);
        let mut left_out = LeftOut::new(spec.private);
        let mut marks = 0;
        let files = text_files(&spec.path, &mut left_out, reading)?;
        check_room(&files, spec.format, tokenizer, reading)?;
        for file in files {
            reading.holds(corpus.bytes());
            if spec.format != DataFormat::Text {
                if file.named || has_ending(&file, spec.format) {
                    corpus.push_file(&file, spec, tokenizer, readable, reading)?;
                } else {
                    left_out.add("of another form than data.format", &file.name);
                }
                continue;
            }
            match read(&file.path, readable, reading)? {
                Content::Text { text, .. } if text.is_empty() => left_out.add("empty", &file.name),
                Content::Text { text, had_mark } => {
                    marks += usize::from(had_mark);
                    corpus.push(shown(&file.name, spec.private), &text, spec.eval_fraction, tokenizer, reading)?;
                }
                Content::Other { reason, .. } if file.named => return Err(DataError::Path { path: file.path, reason }),
                Content::Other { kind, .. } => left_out.add(kind, &file.name),
            }
        }
        let left_out = left_out.notes();
        if corpus.files.is_empty() {
            let mut paths: Vec<String> = spec.path.iter().map(|p| p.display().to_string()).collect();
            paths.extend(left_out);
            let what = match spec.format {
                DataFormat::Text => "UTF-8 text files".to_owned(),
                format => format!("files that end in .{}", format.endings().join(" or .")),
            };
            return Err(DataError::NoText { what, paths: paths.join("; ") });
        }
        corpus.unknown = corpus.unknown_tokens(tokenizer);
        corpus.check_tokens(tokenizer)?;
        let needed = spec.seq_len + 1;
        for (split, tokens) in [("training", corpus.train.len()), ("evaluation", corpus.eval.len())] {
            if tokens < needed {
                let left_out = left_out.iter().map(|note| format!("; {note}")).collect();
                return Err(DataError::TooShort { split, tokens, needed, left_out });
            }
        }
        corpus.notes = corpus.notes(spec.format, tokenizer, left_out, marks);
        Ok(corpus)
    }

    fn empty(tokenizer: &Tokenizer) -> Self {
        Self {
            train: Tokens::new(tokenizer.entries()),
            eval: Tokens::new(tokenizer.entries()),
            coverage: Coverage::default(),
            told: Told::default(),
            files: Vec::new(),
            tokenizer: tokenizer.fingerprint(),
            trained_entries: tokenizer.trained_entries(),
            unknown: 0,
            without_text: 0,
            notes: Vec::new(),
        }
    }

    /// Bytes of memory of all tokens.
    fn bytes(&self) -> u64 {
        self.train.bytes().saturating_add(self.eval.bytes())
    }

    fn push(
        &mut self,
        name: String,
        text: &str,
        eval_fraction: f64,
        tokenizer: &Tokenizer,
        reading: &Reading,
    ) -> Result<(), DataError> {
        let held_out = (text.len() as f64 * eval_fraction).ceil() as usize;
        let cut = text.floor_char_boundary(text.len().saturating_sub(held_out));
        let (train, eval) = text.split_at(cut);
        for (part, split) in [(train, Split::Train), (eval, Split::HeldOut)] {
            self.encode(part, split, text.len() as u64, tokenizer, reading)?;
        }
        let hash = content_hash(text.as_bytes());
        self.files.push(FileFingerprint { name, bytes: text.len() as u64, train_bytes: cut as u64, hash });
        Ok(())
    }

    /// Adds the tokens of a text to one of the splits; `held` bytes of text are in memory.
    fn encode(
        &mut self,
        text: &str,
        split: Split,
        held: u64,
        tokenizer: &Tokenizer,
        reading: &Reading,
    ) -> Result<(), DataError> {
        let mut held = self.bytes().saturating_add(held);
        let tokens = self.tokens_of(split);
        tokenizer.encode_pieces(text, reading, |ids| {
            let before = tokens.bytes();
            tokens.extend(ids);
            held = held.saturating_add(tokens.bytes() - before);
            reading.holds(held);
            reading.fits(0)
        })?;
        for piece in pieces(text) {
            reading.moved(piece.len())?;
            self.coverage.add(&tokenizer.coverage(piece)?);
            tokenizer.tell(piece, &mut self.told)?;
        }
        Ok(())
    }

    fn tokens_of(&mut self, split: Split) -> &mut Tokens {
        match split {
            Split::Train => &mut self.train,
            Split::HeldOut => &mut self.eval,
        }
    }

    /// Refuses a tokenizer that does not fit the text.
    fn check_tokens(&self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let (lost, chars) = (self.coverage.lost(), self.coverage.chars);
        if lost as f64 > MOST_LOST * chars as f64 {
            let (tokenizer, named) = (tokenizer.name().to_owned(), self.coverage.named());
            return Err(DataError::Dropped { tokenizer, lost, chars, named });
        }
        let (unknown, tokens) = (self.unknown, self.train.len() + self.eval.len());
        if unknown as f64 > MOST_UNKNOWN * tokens as f64 {
            return Err(DataError::Unknown { tokenizer: tokenizer.name().to_owned(), unknown, tokens });
        }
        Ok(())
    }

    fn unknown_tokens(&self, tokenizer: &Tokenizer) -> usize {
        let Some(unknown) = tokenizer.unknown() else { return 0 };
        self.train.iter().chain(self.eval.iter()).filter(|&token| token == unknown).count()
    }

    /// About how many bytes of the text can be had back from its tokens.
    fn told_bytes(&self) -> f64 {
        let tokens = (self.train.len() + self.eval.len()).max(1);
        let covered = self.coverage.covered_bytes.saturating_sub(self.coverage.changed_bytes());
        let known = covered as f64 * (1.0 - self.unknown as f64 / tokens as f64);
        known.min(self.coverage.bytes as f64 * (1.0 - self.told.lost_share()))
    }

    /// What the user must know.
    fn notes(&self, format: DataFormat, tokenizer: &Tokenizer, left_out: Vec<String>, marks: usize) -> Vec<String> {
        let mut notes = vec![format!("tokenizer: {} ({} entries)", tokenizer.name(), tokenizer.entries())];
        let mut settings = tokenizer.passed_over().to_vec();
        let (before, after) = tokenizer.around();
        let special = before.len() + after.len();
        if format == DataFormat::Text && special > 0 {
            settings.push(format!("{special} special tokens around each text (post_processor)"));
        }
        if matches!(format, DataFormat::Jsonl | DataFormat::Parquet) {
            let end = match tokenizer.end_of_text() {
                _ if !after.is_empty() => format!("the tokens that the tokenizer's file puts there ({after:?})"),
                Some(id) => format!("the tokenizer's end of a text (token {id})"),
                None => "an empty line: the tokenizer has no end of a text that is known here".to_owned(),
            };
            notes.push(format!("after each document stands {end}"));
        }
        if !settings.is_empty() {
            let settings = settings.join(", ");
            notes.push(format!("the tokenizer's {settings}: passed over, a corpus is read whole"));
        }
        let Coverage { chars, spaces, .. } = self.coverage;
        if self.coverage.lost() > 0 {
            let (lost, named) = (self.coverage.lost(), self.coverage.named());
            notes.push(format!(
                "the tokenizer has no token for {lost} of {chars} characters, they are left out: {named}"
            ));
        }
        if spaces > 0 {
            notes.push(format!(
                "the tokenizer gives no token for {spaces} white space characters of {chars} characters"
            ));
        }
        let changed = self.coverage.changed();
        if changed > 0 {
            let named = self.coverage.named_changed();
            let lost = match self.coverage.changed_bytes() {
                0 => "",
                _ => ": the model does not learn which they were",
            };
            notes.push(format!(
                "the tokenizer's normalizer makes others of {changed} of {chars} characters ({named}){lost}"
            ));
        }
        let unknown = self.unknown;
        if unknown > 0 {
            let tokens = self.train.len() + self.eval.len();
            notes.push(format!("{unknown} of {tokens} tokens are the one for what the tokenizer does not know"));
        }
        let (told, bytes) = (self.told_bytes(), self.coverage.bytes);
        if !DataReport::is_whole(told, bytes) {
            notes.push(format!(
                "{} of {bytes} bytes of the text cannot be had back from its tokens: there are no bits per byte, which \
                 would count them",
                bytes - (told as u64).min(bytes)
            ));
        }
        if marks > 0 {
            notes.push(format!("the byte order mark at the start of {marks} files is left out"));
        }
        if self.without_text > 0 {
            notes.push(format!("{} documents without a text are left out", self.without_text));
        }
        notes.extend(self.copies());
        notes.extend(left_out);
        notes.truncate(MOST_NOTES);
        notes
    }

    /// Files with one content, which count twice.
    fn copies(&self) -> Option<String> {
        let mut first: BTreeMap<(&str, u64), &str> = BTreeMap::new();
        let mut copies = Vec::new();
        for file in &self.files {
            match first.get(&(file.hash.as_str(), file.bytes)) {
                Some(original) => copies.push(format!("`{}` is `{original}` again", file.name)),
                None => drop(first.insert((&file.hash, file.bytes), &file.name)),
            }
        }
        let more = if copies.len() > 1 { format!(" (and {} more)", copies.len() - 1) } else { String::new() };
        copies.first().map(|copy| format!("{copy}{more}, by its content: it is trained on twice"))
    }

    /// Tokens to train on.
    pub fn train(&self) -> &Tokens {
        &self.train
    }

    /// Tokens held out.
    pub fn eval(&self) -> &Tokens {
        &self.eval
    }

    /// Holds the tokenizer and every token against the model's vocabulary. `can_grow` says whether the job may choose
    /// the vocabulary, which it may not of a model that it names by path. Says what must be known otherwise.
    ///
    /// # Errors
    /// [`DataError::Vocabulary`] with the largest id.
    pub fn check_vocabulary(&self, vocab: usize, can_grow: bool) -> Result<Option<String>, DataError> {
        let tokens = self.train.iter().chain(self.eval.iter());
        let largest = tokens.filter_map(|id| usize::try_from(id).ok()).max().unwrap_or(0);
        let id = largest.max(self.trained_entries.saturating_sub(1));
        if id >= vocab {
            let tokenizer = self.tokenizer.name.clone();
            let hint = if can_grow {
                format!("set model.vocab_size to at least {}", id + 1)
            } else {
                "give in data.tokenizer the tokenizer that the model was made with".to_owned()
            };
            return Err(DataError::Vocabulary { tokenizer, id, vocab, hint });
        }
        let entries = usize::try_from(self.tokenizer.entries).unwrap_or(usize::MAX);
        Ok(match entries.cmp(&vocab) {
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Less => Some(format!(
                "the tokenizer has {entries} entries, the model's vocabulary {vocab}: ids from {entries} on never come"
            )),
            std::cmp::Ordering::Greater => Some(format!(
                "the tokenizer has {entries} entries, more than the model's vocabulary of {vocab}; the text uses none of those beyond"
            )),
        })
    }

    /// Counts, and the loss of a unigram model of the training split (add-one smoothed) on the held-out tokens.
    pub fn report(&self, vocab: usize) -> DataReport {
        let mut counts = vec![1.0f64; vocab.max(1)];
        for token in self.train.iter() {
            if let Some(count) = usize::try_from(token).ok().and_then(|t| counts.get_mut(t)) {
                *count += 1.0;
            }
        }
        let total: f64 = counts.iter().sum();
        let nats = |token: i32| usize::try_from(token).ok().and_then(|t| counts.get(t)).map(|c| -(c / total).ln());
        let sum: f64 = self.eval.iter().filter_map(nats).sum();
        let tokens = (self.train.len() + self.eval.len()) as f64;
        DataReport {
            files: self.files.len() as u64,
            train_tokens: self.train.len() as u64,
            eval_tokens: self.eval.len() as u64,
            bytes_per_token: self.told_bytes() / tokens,
            unigram_loss: sum / self.eval.len() as f64,
            notes: self.notes.clone(),
            fingerprint: Some(self.fingerprint()),
        }
    }

    fn fingerprint(&self) -> DataFingerprint {
        let mut all = Vec::new();
        for file in &self.files {
            all.extend_from_slice(format!("{} {} {}\n", file.bytes, file.train_bytes, file.hash).as_bytes());
        }
        let mut room = REMEMBERED_NAME_BYTES;
        let fits = |file: &&FileFingerprint| {
            room = room.saturating_sub(file.name.len());
            room > 0
        };
        DataFingerprint {
            files: self.files.iter().take(REMEMBERED_FILES).take_while(fits).cloned().collect(),
            count: self.files.len() as u64,
            bytes: self.files.iter().map(|file| file.bytes).sum(),
            hash: content_hash(&all),
            tokenizer: self.tokenizer.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
