//! What a tokenizer's normalizer does to a text before it becomes tokens: some take characters away, some make others of
//! them.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::tokenizer::normalizer::Range;
use tokenizers::{NormalizedString, Normalizer};

use super::growth::normalize_within;

/// Characters of which a normalizer leaves one alone, mostly; others are looked at between two of that.
const PLAIN: [char; 6] = ['x', '7', '+', 'X', '\u{4e00}', '\u{e000}'];
/// Bytes that may become of one character. No language needs as many, and a normalizer that makes more could fill memory.
const MOST_BYTES: usize = 256;
/// Texts of which it is remembered whether a part of them counts: so many, of at most so many bytes.
const MOST_KNOWN: usize = 1 << 14;
const SHORT_BYTES: usize = 64;
/// SentencePiece writes a space so, and reads it back.
const SPACE: &str = "\u{2581}";

/// What became of a text's characters.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Normalized {
    /// What is left.
    pub(super) text: String,
    /// How often each character was taken away.
    pub(super) removed: BTreeMap<char, u64>,
    /// How often each was made another one, so that nothing tells which it was.
    pub(super) changed: BTreeMap<char, u64>,
}

/// What a normalizer does to a character in the middle of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It can be told from what is left of it, or that is not known.
    Kept,
    Removed,
    /// It is another one, and nothing tells which it was.
    Changed,
}

/// What is known of a normalizer. It is learnt from the texts, for each character once.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// What texts are looked at between; nothing if it leaves no character alone. Not looked at yet if empty.
    around: OnceCell<Option<Around>>,
    of: BTreeMap<char, Effect>,
    /// What is made of those that are changed.
    into: BTreeMap<char, String>,
    /// By a short text: whether it becomes the same without what stands between its first and its last character.
    nothing: BTreeMap<String, bool>,
}

/// A character that a normalizer leaves alone, and what it puts before and after any text.
#[derive(Debug)]
struct Around {
    plain: char,
    before: String,
    after: String,
}

impl Around {
    fn of(normalizer: &NormalizerWrapper) -> tokenizers::Result<Option<Self>> {
        for plain in PLAIN {
            let two = format!("{plain}{plain}");
            if let Some((before, after)) = normal(normalizer, two.clone())?.split_once(&two) {
                return Ok(Some(Self { plain, before: before.to_owned(), after: after.to_owned() }));
            }
        }
        Ok(None)
    }
}

impl Effects {
    fn learn(&mut self, normalizer: &NormalizerWrapper, c: char) -> tokenizers::Result<Effect> {
        if let Some(effect) = self.of.get(&c) {
            return Ok(*effect);
        }
        let effect = match self.between(normalizer, &c.to_string())? {
            None => Effect::Kept,
            Some(other) if other.is_empty() => Effect::Removed,
            Some(other) if other == SPACE || is_char(&other, c) => Effect::Kept,
            // What goes on changing can be told from what it was made of, as bytes written as letters.
            Some(other) if self.between(normalizer, &other)?.as_ref() == Some(&other) => {
                self.into.insert(c, other);
                Effect::Changed
            }
            Some(_) => Effect::Kept,
        };
        self.of.insert(c, effect);
        Ok(effect)
    }

    /// What is made of a character that is changed, once it was learnt.
    pub(super) fn made_of(&self, c: char) -> &str {
        self.into.get(&c).map_or("", String::as_str)
    }

    /// Whether what comes of `before` and `after` is the same with `run` between them and without it, as of a row of
    /// spaces that becomes one.
    fn adds_nothing(
        &mut self,
        normalizer: &NormalizerWrapper,
        before: &str,
        run: &str,
        after: &str,
    ) -> tokenizers::Result<bool> {
        let whole = format!("{before}{run}{after}");
        if let Some(&known) = self.nothing.get(&whole) {
            return Ok(known);
        }
        let spaced = |text: Option<String>| text.map(|text| text.replace(SPACE, " "));
        let with = spaced(self.between(normalizer, &whole)?);
        let is_so = with.is_some() && with == spaced(self.between(normalizer, &format!("{before}{after}"))?);
        if whole.len() <= SHORT_BYTES && self.nothing.len() < MOST_KNOWN {
            self.nothing.insert(whole, is_so);
        }
        Ok(is_so)
    }

    /// What becomes of a text in the middle of another; nothing if that cannot be told.
    fn between(&self, normalizer: &NormalizerWrapper, text: &str) -> tokenizers::Result<Option<String>> {
        if self.around.get().is_none() {
            // Another thread may have been faster, with the same result.
            let _ = self.around.set(Around::of(normalizer)?);
        }
        let Some(Around { plain, before, after }) = self.around.get().and_then(Option::as_ref) else {
            // It makes others of all characters, so nothing is around them.
            return normal(normalizer, text.to_owned()).map(Some);
        };
        let whole = normal(normalizer, format!("{plain}{text}{plain}"))?;
        let middle = whole.strip_prefix(before.as_str()).and_then(|rest| rest.strip_suffix(after.as_str()));
        let middle = middle.and_then(|rest| rest.strip_prefix(*plain)).and_then(|rest| rest.strip_suffix(*plain));
        Ok(middle.map(str::to_owned))
    }
}

/// What becomes of a short text.
fn normal(normalizer: &NormalizerWrapper, text: String) -> tokenizers::Result<String> {
    let most = MOST_BYTES * text.len();
    let mut normalized = NormalizedString::from(text);
    normalize_within(normalizer, &mut normalized, most)?;
    Ok(normalized.get().to_owned())
}

/// Normalizes a text.
pub(super) fn normalize(
    normalizer: &NormalizerWrapper,
    effects: &mut Effects,
    text: &str,
) -> tokenizers::Result<Normalized> {
    let mut changed = BTreeMap::new();
    for c in text.chars() {
        if effects.learn(normalizer, c)? == Effect::Changed {
            *changed.entry(c).or_default() += 1;
        }
    }
    let mut normalized = NormalizedString::from(text);
    normalizer.normalize(&mut normalized)?;
    if normalized.get() == text {
        return Ok(Normalized { text: text.to_owned(), ..Normalized::default() });
    }
    let removed = removed(normalizer, effects, &normalized)?;
    Ok(Normalized { text: normalized.get().to_owned(), removed, changed })
}

fn is_char(text: &str, c: char) -> bool {
    let mut chars = text.chars();
    chars.next() == Some(c) && chars.next().is_none()
}

/// The characters of which nothing is left. Some beside a character that has become another may be part of that one, as
/// an accent is: they count only if what is around them becomes the same without them.
fn removed(
    normalizer: &NormalizerWrapper,
    effects: &mut Effects,
    normalized: &NormalizedString,
) -> tokenizers::Result<BTreeMap<char, u64>> {
    let original = normalized.get_original();
    // By the byte at which a character begins: whether something is left of it, and whether that is itself.
    let mut left: Vec<Option<bool>> = vec![None; original.len()];
    for (at, c) in normalized.get().char_indices() {
        let Some(range) = normalized.convert_offsets(Range::Normalized(at..at + c.len_utf8())) else { continue };
        let is_same = original.get(range.clone()).is_some_and(|of| is_char(of, c));
        for slot in left.get_mut(range).into_iter().flatten() {
            *slot = Some(is_same || *slot == Some(true));
        }
    }
    let mut counts = BTreeMap::new();
    let mut close = |before: &str, run: &str, after: &str, is_plain: bool| {
        if run.is_empty() {
            return Ok(());
        }
        let is_lost = is_plain || effects.adds_nothing(normalizer, before, run, after)?;
        for c in run.chars() {
            let effect = effects.of.get(&c);
            if (is_lost && (is_plain || effect != Some(&Effect::Changed))) || effect == Some(&Effect::Removed) {
                *counts.entry(c).or_default() += 1;
            }
        }
        tokenizers::Result::Ok(())
    };
    // The last character of which something is left, what came after it, and whether that character is still itself.
    let (mut before, mut from, mut before_is_same) = ("", 0, true);
    for (at, c) in original.char_indices() {
        let Some(is_same) = left.get(at).copied().flatten() else { continue };
        let end = at + c.len_utf8();
        let this = original.get(at..end).unwrap_or_default();
        close(before, original.get(from..at).unwrap_or_default(), this, before_is_same && is_same)?;
        (before, from, before_is_same) = (this, end, is_same);
    }
    close(before, original.get(from..).unwrap_or_default(), "", before_is_same)?;
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(normalizer: &str, text: &str, left: &str, removed: &[(char, u64)], changed: &[(char, u64)]) {
        let normalizer: NormalizerWrapper = serde_json::from_str(normalizer).unwrap();
        let expected = Normalized {
            text: left.to_owned(),
            removed: removed.iter().copied().collect(),
            changed: changed.iter().copied().collect(),
        };
        let mut effects = Effects::default();
        for known in [false, true] {
            assert_eq!(!effects.of.is_empty(), known);
            assert_eq!(normalize(&normalizer, &mut effects, text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_taken_away_or_made_another_is_counted() {
        let digits = "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"[0-9]\"},\"content\":\"\"}";
        check(digits, "a1b22 c", "ab c", &[('1', 1), ('2', 2)], &[]);
        let tags = "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"<[^>]*>\"},\"content\":\"\"}";
        check(tags, "a<b>c b", "ac b", &[('<', 1), ('>', 1), ('b', 1)], &[]);
        check("{\"type\":\"Lowercase\"}", "AbA", "aba", &[], &[('A', 2)]);
        let both = format!("{{\"type\":\"Sequence\",\"normalizers\":[{{\"type\":\"Lowercase\"}},{digits}]}}");
        check(&both, "A1b", "ab", &[('1', 1)], &[('A', 1)]);
        let strip = "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true}";
        check(strip, " a b ", "a b", &[(' ', 2)], &[]);
        let accents = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFD\"},{\"type\":\"StripAccents\"}]}";
        check(accents, "é e\u{301}", "e e", &[('\u{301}', 1)], &[('é', 1)]);
    }

    #[test]
    fn what_is_merged_or_taken_away_beside_a_change_is_counted() {
        let sequence = |all: &[&str]| format!("{{\"type\":\"Sequence\",\"normalizers\":[{}]}}", all.join(","));
        let replace = |pattern: &str, content: &str| {
            format!("{{\"type\":\"Replace\",\"pattern\":{{\"Regex\":\"{pattern}\"}},\"content\":\"{content}\"}}")
        };
        let (lower, spaces) = ("{\"type\":\"Lowercase\"}", replace("\\\\s+", " "));
        check(&spaces, "a   b", "a b", &[(' ', 2)], &[]);
        // As T5 has it.
        check(&replace(" {2,}", "\u{2581}"), "a   b c", "a\u{2581}b c", &[(' ', 2)], &[]);
        check(&sequence(&[&spaces, lower]), "A   B", "a b", &[(' ', 2)], &[('A', 1), ('B', 1)]);
        check(
            &sequence(&[lower, &replace("<[^>]*>", "")]),
            "A<x>C",
            "ac",
            &[('<', 1), ('>', 1), ('x', 1)],
            &[('A', 1), ('C', 1)],
        );
        check(&replace("[0-9]+", "0"), "a123 b", "a0 b", &[], &[('1', 1), ('2', 1), ('3', 1)]);
        check("{\"type\":\"NFC\"}", "e\u{301}E\u{301}", "\u{e9}\u{c9}", &[], &[]);
    }

    #[test]
    fn a_normalizer_that_leaves_little_alone_is_seen_through() {
        let letters = "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"[a-z]\"},\"content\":\"a\"}";
        check(letters, "axb", "aaa", &[], &[('b', 1), ('x', 1)]);
        let all = "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"[\\\\s\\\\S]\"},\"content\":\"a\"}";
        check(all, "axb", "aaa", &[], &[('b', 1), ('x', 1)]);
        let grows =
            format!("{{\"type\":\"Replace\",\"pattern\":{{\"Regex\":\"b\"}},\"content\":\"{}\"}}", "a".repeat(5000));
        let grows: NormalizerWrapper = serde_json::from_str(&grows).unwrap();
        let error = normalize(&grows, &mut Effects::default(), &"ab".repeat(1000)).unwrap_err().to_string();
        assert!(error.starts_with("its normalizer makes 5002 bytes of"), "{error}");
    }

    #[test]
    fn what_can_be_read_back_is_not() {
        let spaces = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\u{2581}\"},\
                      {\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\u{2581}\"}]}";
        check(spaces, "a b", "\u{2581}a\u{2581}b", &[], &[]);
        check("{\"type\":\"NFC\"}", "e\u{301} a", "é a", &[], &[]);
        check("{\"type\":\"ByteLevel\"}", "a é", "aĠÃ©", &[], &[]);
    }
}
