//! From files to tokens.

use fusionllm_protocol::{DataSpec, FileFingerprint, RowKind};
use fusionllm_transport::is_shortage;

use super::super::cache::{Found, Kept, NewEntry};
use super::super::files::shown;
use super::super::text::{TextContent, TextParts};
use super::super::tokenizer::{Coverage, Told, pieces};
use super::super::{ReadableData, Reading, Tokens};
use super::sources::{Source, entries, path_for_people};
use super::{Split, Tokenizing};
use crate::DataError;

/// A larger share of characters without a token is a mistake, not a stray sign.
const MOST_LOST: f64 = 1e-3;
/// A larger share of unknown tokens likewise.
const MOST_UNKNOWN: f64 = 0.5;

/// Tokens that are being made.
pub(super) struct Builder<'a> {
    pub(super) spec: &'a DataSpec,
    pub(super) by: Tokenizing<'a>,
    pub(super) readable: &'a ReadableData,
    pub(super) reading: &'a Reading,
    /// Where they will lie, if not in memory alone.
    entry: Option<NewEntry>,
    pub(super) train: Tokens,
    pub(super) eval: Tokens,
    /// Where conversations begin in them.
    pub(super) rows: [Vec<u64>; 2],
    pub(super) coverage: Coverage,
    pub(super) told: Told,
    files: Vec<FileFingerprint>,
    /// Tokens that stand for what the tokenizer does not know.
    pub(super) unknown: usize,
    /// Documents that have none.
    pub(super) without_text: u64,
    /// Conversations of which nothing would be learnt.
    pub(super) without_answer: u64,
    /// Conversations that are longer than a sequence.
    pub(super) shortened: u64,
    /// Files with a byte order mark.
    pub(super) marks: usize,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        spec: &'a DataSpec,
        by: Tokenizing<'a>,
        readable: &'a ReadableData,
        reading: &'a Reading,
        entry: Option<NewEntry>,
    ) -> Self {
        let in_memory = || Tokens::new(entries(spec, by.tokenizer));
        let (train, eval) = match &entry {
            Some(entry) => (entry.train.clone(), entry.eval.clone()),
            None => (in_memory(), in_memory()),
        };
        Self {
            spec,
            by,
            readable,
            reading,
            entry,
            train,
            eval,
            rows: [Vec::new(), Vec::new()],
            coverage: Coverage::default(),
            told: Told::default(),
            files: Vec::new(),
            unknown: 0,
            without_text: 0,
            without_answer: 0,
            shortened: 0,
            marks: 0,
        }
    }

    /// Reads all files.
    pub(super) fn build(mut self, sources: &[Source]) -> Result<Kept, DataError> {
        for source in sources {
            self.reading.holds(self.bytes());
            match &source.text {
                Some(text) => self.push_text(source, text)?,
                None => self.push_file(source)?,
            }
        }
        self.unknown = self.unknown_tokens()?;
        self.check_tokens()?;
        let text_bytes = self.coverage.bytes;
        let found = Found { told_bytes: self.told_bytes(), text_bytes, notes: self.notes() };
        let rows = (self.spec.rows == RowKind::Chat).then_some(self.rows);
        // What is not worth a sequence is an error, and not worth a place either.
        if let Some(entry) = self.entry.filter(|_| !self.train.is_empty() && !self.eval.is_empty()) {
            entry.finish(rows.as_ref(), &self.files, &found)?;
        }
        Ok(Kept { train: self.train, eval: self.eval, rows, files: self.files, found })
    }

    /// Bytes of memory of all tokens.
    pub(super) fn bytes(&self) -> u64 {
        let rows: usize = self.rows.iter().map(Vec::len).sum();
        self.train.bytes().saturating_add(self.eval.bytes()).saturating_add(8 * rows as u64)
    }

    pub(super) fn push_fingerprint(&mut self, file: FileFingerprint) {
        self.files.push(file);
    }

    fn push_text(&mut self, source: &Source, content: &TextContent) -> Result<(), DataError> {
        let (path, bytes) = (&source.file.path, content.bytes);
        let held_out = (bytes as f64 * self.spec.eval_fraction).ceil() as u64;
        let shown_path = path_for_people(&source.file, self.spec);
        let fail = |reason: String| DataError::Path { path: shown_path.clone(), reason };
        let mut parts = TextParts::open(path, content, self.readable).map_err(|error| match is_shortage(&error) {
            true => DataError::Unopened { what: "data.path", source: error },
            false => fail(error.to_string()),
        })?;
        let mut left = bytes.saturating_sub(held_out);
        for split in [Split::Train, Split::HeldOut] {
            let Self { by, reading, coverage, told, train, eval, .. } = self;
            let held = train.bytes().saturating_add(eval.bytes());
            let tokens = if split == Split::Train { train } else { eval };
            let before = tokens.bytes();
            let mut more = |text: &mut String| {
                let had = text.len();
                let any = parts.next(text, left).map_err(fail)?;
                left -= (text.len() - had) as u64;
                Ok(any)
            };
            by.tokenizer.encode_stream(&mut more, reading, &mut |piece, ids| {
                tokens.extend(ids)?;
                reading.holds(held + (tokens.bytes() - before));
                reading.fits(piece.len() as u64)?;
                look_at(piece, *by, coverage, told, reading)?;
                reading.became_tokens(piece.len() as u64);
                Ok(())
            })?;
            if split == Split::Train {
                let cut = bytes.saturating_sub(held_out) - left;
                let name = shown(&source.file.name, self.spec.private);
                self.files.push(FileFingerprint { name, bytes, train_bytes: cut, hash: content.hash.clone() });
                left = bytes - cut;
            }
        }
        parts.end(content).map_err(fail)?;
        self.marks += usize::from(content.had_mark);
        Ok(())
    }

    /// Adds the tokens of a document to one of the splits.
    pub(super) fn encode(&mut self, text: &str, split: Split) -> Result<(), DataError> {
        let held = self.bytes().saturating_add(text.len() as u64);
        let Self { by, reading, coverage, told, train, eval, .. } = self;
        let tokens = if split == Split::Train { train } else { eval };
        let before = tokens.bytes();
        by.tokenizer.encode_pieces(text, reading, |ids| {
            tokens.extend(ids)?;
            reading.holds(held.saturating_add(tokens.bytes() - before));
            reading.fits(0)
        })?;
        look_at(text, *by, coverage, told, reading)
    }

    pub(super) fn tokens_of(&mut self, split: Split) -> &mut Tokens {
        match split {
            Split::Train => &mut self.train,
            Split::HeldOut => &mut self.eval,
        }
    }

    /// Refuses a tokenizer that does not fit the text.
    fn check_tokens(&self) -> Result<(), DataError> {
        let tokenizer = self.by.tokenizer;
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

    fn unknown_tokens(&self) -> Result<usize, DataError> {
        let Some(unknown) = self.by.tokenizer.unknown() else { return Ok(0) };
        let is_chat = self.spec.rows == RowKind::Chat;
        let is_unknown = |id: i32| if is_chat { id & !super::ANSWER == unknown } else { id == unknown };
        let mut count = 0;
        for tokens in [&self.train, &self.eval] {
            tokens.each_part(&mut |ids| count += ids.iter().filter(|&&id| is_unknown(id)).count())?;
        }
        Ok(count)
    }
}

/// Takes in what of a text becomes tokens.
pub(super) fn look_at(
    text: &str,
    by: Tokenizing<'_>,
    coverage: &mut Coverage,
    told: &mut Told,
    reading: &Reading,
) -> Result<(), DataError> {
    for piece in pieces(text) {
        reading.moved(piece.len())?;
        coverage.add(&by.tokenizer.coverage(piece)?);
        by.tokenizer.tell(piece, told)?;
    }
    Ok(())
}
