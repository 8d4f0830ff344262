//! The text of a job, as tokens: a training split, and a held-out split at the end of every file.

mod builder;
mod forms;
mod notes;
mod sources;

use std::collections::BTreeMap;

use fusionllm_protocol::{DataFormat, DataReport, DataSpec, TokenizerFingerprint};
use fusionllm_transport::{io_reason, is_shortage};

use super::cache::{Kept, TokenCache};
use super::files::{LeftOut, WITHOUT_TEXT, shown, text_files};
use super::fingerprint::fingerprint;
use super::{ChatTemplate, ReadableData, Reading, Tokenizer, Tokens};
use crate::DataError;
use builder::Builder;
use sources::{check_room, entries, key, no_text, sources};

/// Sentences that a report has at most.
const MOST_NOTES: usize = 24;
/// Set in the number of a token that is of an answer.
const ANSWER: i32 = 1 << 30;

/// What turns data into tokens.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizing<'a> {
    /// What text becomes tokens by.
    pub tokenizer: &'a Tokenizer,
    /// What conversations become text by, if the rows are such: see [`ChatTemplate::of_job`].
    pub template: Option<&'a ChatTemplate>,
}

impl<'a> From<&'a Tokenizer> for Tokenizing<'a> {
    fn from(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, template: None }
    }
}

/// The tokens of all files.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    kept: Kept,
    tokenizer: TokenizerFingerprint,
    trained_entries: usize,
    /// Whether the data has token ids instead of text.
    has_given_ids: bool,
    notes: Vec<String>,
    /// Why the cache's tokens were not used.
    made_anew: Option<String>,
}

/// The two parts of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    HeldOut,
}

impl Corpus {
    /// Reads all files and folders of `spec.path`, in the order of their names. In folders, files that are hidden,
    /// ignored by a `.gitignore`, not UTF-8, of another form than the job's or links are passed over, which the report
    /// says. The last `eval_fraction` of each file is held out; of files of documents, the documents there.
    ///
    /// # Errors
    /// [`DataError`] if there is too little text, something cannot be read, or the tokenizer drops much of it.
    pub fn read<'a>(spec: &DataSpec, by: impl Into<Tokenizing<'a>>) -> Result<Self, DataError> {
        Self::read_watched(spec, by.into(), &Reading::default())
    }

    /// The same while others watch how far it is.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_watched(spec: &DataSpec, by: Tokenizing<'_>, reading: &Reading) -> Result<Self, DataError> {
        Self::read_within(spec, by, &ReadableData::everything(), reading)
    }

    /// The same for a job of somebody else, who may have read only what is `readable`, and may stop it.
    ///
    /// # Errors
    /// As [`Self::read`], and [`DataError::NotReadable`], [`DataError::Stopped`] or [`DataError::Memory`].
    pub(crate) fn read_within(
        spec: &DataSpec,
        by: Tokenizing<'_>,
        readable: &ReadableData,
        reading: &Reading,
    ) -> Result<Self, DataError> {
        let in_memory = || Self::read_by(spec, by, readable, reading, None);
        if !spec.cache {
            return in_memory();
        }
        let read = |cache: TokenCache| match Self::read_by(spec, by, readable, reading, Some(&cache)) {
            // A folder that cannot be written, or a full disk.
            Err(DataError::Cache { path, source }) if !is_shortage(&source) => {
                Ok(Err(format!("{}: {}", path.display(), io_reason(&source))))
            }
            other => other.map(Ok),
        };
        match TokenCache::open().map_or_else(|reason| Ok(Err(reason)), read)? {
            Ok(corpus) => Ok(corpus),
            Err(reason) => {
                let mut corpus = in_memory()?;
                corpus.notes.push(format!("there is no token cache, so tokens are held in memory: {reason}"));
                Ok(corpus)
            }
        }
    }

    fn read_by(
        spec: &DataSpec,
        by: Tokenizing<'_>,
        readable: &ReadableData,
        reading: &Reading,
        cache: Option<&TokenCache>,
    ) -> Result<Self, DataError> {
        readable.check(spec)?;
        let mut left_out = LeftOut::new(spec.private);
        let files = text_files(&spec.path, WITHOUT_TEXT, &mut left_out, reading)?;
        check_room(&files, spec, by.tokenizer, cache.is_some(), reading)?;
        let sources = sources(files, spec, readable, reading, cache.is_some(), &mut left_out)?;
        let left_out = left_out.notes();
        if sources.is_empty() {
            return Err(no_text(spec, left_out));
        }
        let names: Vec<String> = sources.iter().map(|source| shown(&source.file.name, spec.private)).collect();
        let mut made_anew = None;
        let mut place = None;
        let mut kept = None;
        if let Some(cache) = cache {
            let key = key(spec, by, &sources);
            match cache.find(&key, reading)? {
                Ok(found) => kept = found,
                Err(reason) => made_anew = Some(format!("the token cache was damaged and is made anew: {reason}")),
            }
            place = Some((cache, key));
        }
        let mut kept = match kept {
            Some(kept) => kept,
            None => {
                let entry = place.map(|(cache, key)| cache.begin(&key, entries(spec, by.tokenizer))).transpose()?;
                Builder::new(spec, by, readable, reading, entry).build(&sources)?
            }
        };
        kept.files.iter_mut().zip(names).for_each(|(file, name)| file.name = name);
        let mut corpus = Self {
            kept,
            tokenizer: by.tokenizer.fingerprint(),
            trained_entries: by.tokenizer.trained_entries(),
            has_given_ids: spec.format == DataFormat::Tokens,
            notes: Vec::new(),
            made_anew,
        };
        corpus.check_size(spec, &left_out)?;
        corpus.notes = notes::of_tokenizer(spec, by);
        corpus.notes.extend(corpus.kept.found.notes.iter().cloned());
        corpus.notes.extend(corpus.copies());
        corpus.notes.extend(left_out);
        corpus.notes.extend(corpus.made_anew.clone());
        corpus.notes.truncate(MOST_NOTES);
        Ok(corpus)
    }

    fn check_size(&self, spec: &DataSpec, left_out: &[String]) -> Result<(), DataError> {
        let left_out = || left_out.iter().map(|note| format!("; {note}")).collect();
        for (split, name) in [(Split::Train, "training"), (Split::HeldOut, "evaluation")] {
            if let Some(rows) = self.rows(split) {
                if rows == 0 {
                    return Err(DataError::NoSample { split: name, left_out: left_out() });
                }
                continue;
            }
            let (tokens, needed) = (self.tokens(split).len(), spec.seq_len + 1);
            if tokens < needed {
                return Err(DataError::TooShort { split: name, tokens, needed, left_out: left_out() });
            }
        }
        Ok(())
    }

    /// Files with one content, which count twice.
    fn copies(&self) -> Option<String> {
        let mut first: BTreeMap<(&str, u64), &str> = BTreeMap::new();
        let mut copies = Vec::new();
        for file in &self.kept.files {
            match first.get(&(file.hash.as_str(), file.bytes)) {
                Some(original) => copies.push(format!("`{}` is `{original}` again", file.name)),
                None => drop(first.insert((&file.hash, file.bytes), &file.name)),
            }
        }
        let more = if copies.len() > 1 { format!(" (and {} more)", copies.len() - 1) } else { String::new() };
        copies.first().map(|copy| format!("{copy}{more}, by its content: it is trained on twice"))
    }

    /// That the cache was damaged and tokens were made anew, in a sentence, if so: a later reading does not say it again.
    pub fn made_anew(&self) -> Option<&str> {
        self.made_anew.as_deref()
    }

    /// Tokens to train on.
    pub fn train(&self) -> &Tokens {
        &self.kept.train
    }

    /// Tokens held out.
    pub fn eval(&self) -> &Tokens {
        &self.kept.eval
    }

    pub(super) fn tokens(&self, split: Split) -> &Tokens {
        match split {
            Split::Train => &self.kept.train,
            Split::HeldOut => &self.kept.eval,
        }
    }

    fn starts(&self, split: Split) -> Option<&[u64]> {
        let [train, eval] = self.kept.rows.as_ref()?;
        Some(if split == Split::Train { train } else { eval })
    }

    /// How many conversations there are, if the rows are such.
    pub fn rows(&self, split: Split) -> Option<usize> {
        self.starts(split).map(<[u64]>::len)
    }

    /// The tokens of a conversation, each with whether it is of an answer.
    ///
    /// # Errors
    /// [`DataError::Cache`] if they cannot be read.
    pub fn row(&self, split: Split, row: usize) -> Result<Vec<(i32, bool)>, DataError> {
        let (starts, tokens) = (self.starts(split).unwrap_or_default(), self.tokens(split));
        let start = starts.get(row).map_or(tokens.len(), |&start| start as usize);
        let end = starts.get(row + 1).map_or(tokens.len(), |&end| end as usize);
        Ok(tokens.slice(start..end)?.into_iter().map(|id| (id & !ANSWER, id & ANSWER != 0)).collect())
    }

    /// Gives each token that the model is to predict: of conversations those of answers.
    fn each_target(&self, split: Split, take: &mut dyn FnMut(i32)) -> Result<(), DataError> {
        let is_chat = self.kept.rows.is_some();
        self.tokens(split).each_part(&mut |ids| {
            for &id in ids {
                if !is_chat {
                    take(id);
                } else if id & ANSWER != 0 {
                    take(id & !ANSWER);
                }
            }
        })
    }

    /// Holds the tokenizer and every token against the model's vocabulary. `can_grow` says whether the job may choose
    /// the vocabulary, which it may not of a model that it names by path. Says what must be known otherwise.
    ///
    /// # Errors
    /// [`DataError::Vocabulary`] or [`DataError::Ids`] with the largest id.
    pub fn check_vocabulary(&self, vocab: usize, can_grow: bool) -> Result<Option<String>, DataError> {
        let mut largest = 0;
        let id = |id: i32| if self.kept.rows.is_some() { id & !ANSWER } else { id };
        for tokens in [&self.kept.train, &self.kept.eval] {
            tokens.each_part(&mut |ids| largest = ids.iter().map(|&i| id(i)).max().unwrap_or(0).max(largest))?;
        }
        let largest = usize::try_from(largest).unwrap_or(0);
        let entries = usize::try_from(self.tokenizer.entries).unwrap_or(usize::MAX);
        // `bytes` is the default, where nothing need be had back from ids.
        let is_bytes = self.tokenizer.name == DataSpec::BYTES;
        if self.has_given_ids && largest >= entries && is_bytes && largest < vocab {
            return Ok(None);
        }
        if self.has_given_ids && largest >= entries && !is_bytes {
            return Err(DataError::Ids { tokenizer: self.tokenizer.name.clone(), id: largest, entries });
        }
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

    /// Counts, and the loss of a unigram model of the training split (add-one smoothed) on the held-out tokens; of
    /// conversations, on those of answers.
    ///
    /// # Errors
    /// [`DataError::Cache`] if tokens cannot be read.
    pub fn report(&self, vocab: usize) -> Result<DataReport, DataError> {
        let mut counts = vec![1.0f64; vocab.max(1)];
        self.each_target(Split::Train, &mut |token| {
            if let Some(count) = usize::try_from(token).ok().and_then(|t| counts.get_mut(t)) {
                *count += 1.0;
            }
        })?;
        let total: f64 = counts.iter().sum();
        let nats = |token: i32| usize::try_from(token).ok().and_then(|t| counts.get(t)).map(|c| -(c / total).ln());
        let (mut sum, mut targets) = (0.0, 0u64);
        self.each_target(Split::HeldOut, &mut |token| {
            targets += 1;
            sum += nats(token).unwrap_or(0.0);
        })?;
        let [train, eval] = [&self.kept.train, &self.kept.eval].map(Tokens::len);
        Ok(DataReport {
            files: self.kept.files.len() as u64,
            train_tokens: train as u64,
            eval_tokens: eval as u64,
            bytes_per_token: self.kept.found.told_bytes / (train + eval) as f64,
            unigram_loss: sum / targets as f64,
            classes: None,
            notes: self.notes.clone(),
            fingerprint: Some(fingerprint(&self.kept.files, self.tokenizer.clone())),
        })
    }
}

#[cfg(test)]
mod tests;
