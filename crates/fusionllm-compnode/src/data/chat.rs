//! Conversations as samples: written out by the model's chat template, with the answers marked, which alone are learnt.

mod conversation;
mod marks;
mod python;
mod template;

use std::ops::Range;

use serde_json::{Map, Value};

use super::{Reading, Tokenizer};
use crate::DataError;

pub(super) use conversation::KEYS;
pub use template::ChatTemplate;

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    text: String,
    /// Where in it answers lie, in bytes and in order, each with what ends it.
    answers: Vec<Range<usize>>,
}

/// A conversation as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) ids: Vec<i32>,
    /// Which of them are of an answer.
    pub(super) answer: Vec<bool>,
    pub(super) text: String,
}

/// Why a row gives no sample.
#[derive(Debug)]
pub(super) enum Unusable {
    /// What is wrong with it, without a word of it: it may be private.
    Row(String),
    /// What is wrong besides, such as with the tokenizer.
    Other(DataError),
}

impl ChatTemplate {
    /// The tokens of a row that has a conversation.
    ///
    /// # Errors
    /// [`Unusable`], also if the data is not wanted any more.
    pub(super) fn sample(
        &self,
        row: &Map<String, Value>,
        tokenizer: &Tokenizer,
        reading: &Reading,
    ) -> Result<Sample, Unusable> {
        let conversation = conversation::of_row(row).map_err(Unusable::Row)?;
        let written = self.write(&conversation, reading)?;
        let tokens = tokenizer.encode_with_offsets(&written.text).map_err(Unusable::Other)?;
        let mut sample = Sample::default();
        let mut answers = written.answers.iter().peekable();
        for (id, place) in tokens {
            while answers.next_if(|answer| answer.end <= place.start && !place.is_empty()).is_some() {}
            // A token that has the beginning of an answer and what is before it is of the answer, as in `transformers`.
            let is_answer = answers.peek().is_some_and(|answer| place.start < answer.end && answer.start < place.end);
            sample.ids.push(id);
            sample.answer.push(is_answer);
        }
        sample.text = written.text;
        Ok(sample)
    }
}

#[cfg(test)]
mod tests;
