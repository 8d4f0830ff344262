//! Spaces that a tokenizer puts before the pieces of a text, whether one stands there or not: its tokens do not tell.

use serde_json::Value;
use tokenizers::PreTokenizerWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

/// So many starts of pieces are looked at, then every second one, and after as many of these every fourth, and so on.
const STARTS: u64 = 4096;
/// Bytes at each side of a start that are held against what they give with the other text.
const AROUND_BYTES: usize = 48;
/// Texts that are tried, and bytes of one of them.
const MOST_TEXTS: usize = 8;
const MOST_BYTES: usize = 16;
/// SentencePiece writes a space so.
const SPACE: char = '\u{2581}';

/// How many bytes of a text may as well be there as not.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Implied {
    /// Starts of pieces, and how many of them were looked at.
    starts: u64,
    looked_at: u64,
    /// Bytes before these that may as well be there as not.
    bytes: u64,
}

impl Implied {
    /// Looks at the starts of the pieces of a text, which lie at `starts`: whether `ids` gives the same tokens with one of the
    /// `texts` before it and without. A text without tokens is none that could be meant.
    pub(super) fn add(
        &mut self,
        text: &str,
        starts: impl IntoIterator<Item = usize>,
        texts: &[String],
        mut ids: impl FnMut(&str) -> Option<Vec<u32>>,
    ) {
        for at in starts {
            let every =
                1u64.checked_shl(u32::try_from(self.looked_at / STARTS).unwrap_or(u32::MAX)).unwrap_or(u64::MAX);
            let is_due = self.starts.is_multiple_of(every);
            self.starts += 1;
            let Some((before, after)) = text.split_at_checked(at).filter(|_| is_due) else { continue };
            self.looked_at += 1;
            let before = before.get(before.ceil_char_boundary(at.saturating_sub(AROUND_BYTES))..).unwrap_or_default();
            let after = after.get(..after.floor_char_boundary(AROUND_BYTES)).unwrap_or_default();
            let as_it_is = ids(&format!("{before}{after}"));
            for text in texts {
                let other = match after.strip_prefix(text.as_str()) {
                    Some(rest) => format!("{before}{rest}"),
                    None => format!("{before}{text}{after}"),
                };
                if as_it_is.is_some() && ids(&other) == as_it_is {
                    self.bytes += text.len() as u64;
                    break;
                }
            }
        }
    }

    /// About how many there are before all starts.
    pub(super) fn bytes(&self) -> f64 {
        if self.looked_at == 0 { 0.0 } else { self.bytes as f64 * self.starts as f64 / self.looked_at as f64 }
    }
}

/// The texts that a tokenizer may put before the pieces of a text; none for most.
pub(super) fn texts_before(
    normalizer: Option<&NormalizerWrapper>,
    pre_tokenizer: Option<&PreTokenizerWrapper>,
) -> Vec<String> {
    let mut texts = Vec::new();
    if pre_tokenizer.is_some_and(puts_space) {
        texts.push(" ".to_owned());
    }
    if let Ok(keys) = serde_json::to_value(normalizer) {
        written(&keys, &mut texts);
    }
    texts.retain(|text| !text.is_empty() && text.len() <= MOST_BYTES);
    texts.sort();
    texts.dedup();
    texts.truncate(MOST_TEXTS);
    texts
}

fn puts_space(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::Sequence(all) => all.as_ref().iter().any(puts_space),
        PreTokenizerWrapper::ByteLevel(bytes) => bytes.add_prefix_space,
        PreTokenizerWrapper::Metaspace(spaces) => spaces.get_prepend_scheme() != PrependScheme::Never,
        _ => false,
    }
}

/// What a normalizer writes, with its spaces as they are in a text.
fn written(normalizer: &Value, texts: &mut Vec<String>) {
    for key in ["prepend", "content"] {
        if let Some(text) = normalizer.get(key).and_then(Value::as_str) {
            texts.extend([text.to_owned(), text.replace(SPACE, " ")]);
        }
    }
    let all = normalizer.get("normalizers").and_then(Value::as_array);
    all.into_iter().flatten().for_each(|one| written(one, texts));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;
    use crate::data::tokenizer::Told;

    fn tokenizer(change: impl FnOnce(&mut Value)) -> Tokenizer {
        let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        change(&mut keys);
        Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
    }

    fn lost_share(tokenizer: &Tokenizer, text: &str) -> f64 {
        let mut told = Told::default();
        tokenizer.tell(text, &mut told).unwrap();
        told.lost_share()
    }

    fn byte_level() -> Value {
        serde_json::json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false })
    }

    fn after(steps: Vec<Value>) -> impl FnOnce(&mut Value) {
        move |keys| keys["pre_tokenizer"] = serde_json::json!({ "type": "Sequence", "pretokenizers": steps })
    }

    fn split(pattern: &str) -> Value {
        serde_json::json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    }

    fn added(content: &str) -> Value {
        serde_json::json!([{ "id": 300, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                             "normalized": false, "special": false }])
    }

    const TEXT: &str = "one, two (three) 44 five; the man saw them,and then.\nwas it so?\n";

    #[test]
    fn a_space_that_may_as_well_be_there_is_lost() {
        let digits = serde_json::json!({ "type": "Digits", "individual_digits": true });
        let punctuation = serde_json::json!({ "type": "Punctuation", "behavior": "Isolated" });
        let cases = [
            tokenizer(after(vec![split("\\s?\\w+"), byte_level()])),
            tokenizer(after(vec![digits, byte_level()])),
            tokenizer(after(vec![punctuation, byte_level()])),
            tokenizer(|keys| {
                keys["pre_tokenizer"] = byte_level();
                keys["added_tokens"] = added("\n");
            }),
            tokenizer(|keys| {
                let pattern = serde_json::json!({ "Regex": "^(?=\\S)" });
                let letters: std::collections::BTreeSet<char> = TEXT.chars().collect();
                let vocab = (0..).zip(letters).map(|(id, c)| (c.to_string(), Value::from(id)));
                keys["model"]["vocab"] = Value::Object(vocab.collect());
                keys["pre_tokenizer"] = Value::Null;
                keys["normalizer"] = serde_json::json!({ "type": "Replace", "pattern": pattern, "content": " " });
                keys["added_tokens"] = added("the");
            }),
        ];
        for tokenizer in cases {
            assert!(lost_share(&tokenizer, TEXT) > 1e-3, "{}", tokenizer.to_json());
        }
    }

    #[test]
    fn what_tokens_tell_is_not() {
        let regex = serde_json::json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        let cases = [
            // As RoBERTa has it.
            tokenizer(|keys| keys["pre_tokenizer"] = regex),
            // Spaces are pieces of their own.
            tokenizer(after(vec![split(" "), byte_level()])),
            tokenizer(|keys| keys["added_tokens"] = added("the")),
        ];
        for tokenizer in cases {
            let share = lost_share(&tokenizer, TEXT);
            assert!(share == 0.0, "{share}: {}", tokenizer.to_json());
        }
    }

    #[test]
    fn of_many_starts_ever_fewer_are_looked_at() {
        let mut implied = Implied::default();
        let text = "a".repeat(200_000);
        implied.add(&text, 1..text.len(), &[" ".to_owned()], |_| Some(Vec::new()));
        assert!((4 * STARTS..8 * STARTS).contains(&implied.looked_at), "{}", implied.looked_at);
        assert!((implied.bytes() - 199_999.0).abs() < 1.0, "{}", implied.bytes());
    }
}
