//! Words for which a tokenizer would take very long.

use tokenizers::models::ModelWrapper;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::FileTokenizer;
use crate::DataError;

/// Characters of the longest word that WordPiece takes apart: it tries all parts of a word, each as a whole, which takes time
/// with the third power of its length. Files have a hundred.
const MOST_CHARS: usize = 1000;

impl FileTokenizer {
    /// Before a text is taken apart: whether it has a word that would take too long.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] with its length.
    pub(super) fn check_words(&self, text: &str) -> Result<(), DataError> {
        let ModelWrapper::WordPiece(model) = self.inner.get_model() else { return Ok(()) };
        // Longer ones are unknown, and not looked at.
        let most = model.max_input_chars_per_word;
        if most <= MOST_CHARS {
            return Ok(());
        }
        let refuse = |error: tokenizers::Error| self.fail(error.to_string());
        let added = self.inner.get_added_vocabulary();
        let mut words: PreTokenizedString = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words).map_err(refuse)?;
        }
        let words = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let lengths = words.iter().filter(|(_, _, tokens)| tokens.is_none()).map(|(word, ..)| word.chars().count());
        match lengths.filter(|&length| length > MOST_CHARS && length <= most).max() {
            Some(length) => Err(self.fail(format!(
                "its WordPiece would take apart a word of {length} characters, which takes far too long: at most {MOST_CHARS} \
                 are taken, with a pre_tokenizer that cuts text into words, or a smaller max_input_chars_per_word"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Tokenizer;
    use crate::data::reading::Reading;

    #[test]
    fn a_word_that_would_take_too_long_is_refused_at_once() {
        let open = |most: usize, splitter: serde_json::Value| {
            let keys = serde_json::json!({
                "pre_tokenizer": splitter,
                "model": { "type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
                           "max_input_chars_per_word": most, "vocab": { "?": 0, "a": 1, "##a": 2, " ": 3, "## ": 4 } }
            });
            Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
        };
        let text = "aaaa ".repeat(10_000);
        let whole = open(1_000_000, serde_json::Value::Null);
        for result in [
            whole.encode(&text).map(drop),
            whole.coverage(&text).map(drop),
            whole.encode_pieces(&text, &Reading::default(), |_| Ok(())),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("a word of 50000 characters, which takes far too long"), "{error}");
        }
        let isolated = serde_json::json!({ "type": "Split", "pattern": { "String": " " }, "behavior": "Isolated", "invert": false });
        assert_eq!(open(1_000_000, isolated).encode(&text).unwrap().len(), text.len());
        assert_eq!(open(100, serde_json::Value::Null).encode(&text).unwrap(), [0]);
    }
}
