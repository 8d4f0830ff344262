//! What a tokenizer's normalizer does to a text before it becomes tokens: some take characters away, some make others of
//! them.

use std::collections::BTreeMap;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::tokenizer::normalizer::Range;
use tokenizers::{NormalizedString, Normalizer};

/// A character that no normalizer is known to touch; others are looked at between two of it.
const PLAIN: char = 'x';
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

/// Normalizes a text.
pub(super) fn normalize(normalizer: &NormalizerWrapper, text: &str) -> tokenizers::Result<Normalized> {
    let mut normalized = NormalizedString::from(text);
    normalizer.normalize(&mut normalized)?;
    if normalized.get() == text {
        return Ok(Normalized { text: text.to_owned(), ..Normalized::default() });
    }
    let mut alone: BTreeMap<char, Option<String>> = BTreeMap::new();
    let mut changed = BTreeMap::new();
    for c in text.chars() {
        if let std::collections::btree_map::Entry::Vacant(entry) = alone.entry(c) {
            entry.insert(between(normalizer, &c.to_string())?);
        }
        if let Some(Some(other)) = alone.get(&c)
            && !other.is_empty()
            && other != SPACE
            && !is_char(other, c)
        {
            *changed.entry(c).or_default() += 1;
        }
    }
    // What goes on changing can be told from what it was made of, as bytes written as letters.
    for c in changed.keys().copied().collect::<Vec<char>>() {
        let Some(Some(other)) = alone.get(&c) else { continue };
        if between(normalizer, other)?.as_ref() != Some(other) {
            changed.remove(&c);
        }
    }
    let is_removed_anywhere = |c: char| alone.get(&c).is_some_and(|other| other.as_deref() == Some(""));
    let removed = removed(&normalized, is_removed_anywhere);
    Ok(Normalized { text: normalized.get().to_owned(), removed, changed })
}

/// What becomes of a text in the middle of another; nothing if that cannot be told.
fn between(normalizer: &NormalizerWrapper, text: &str) -> tokenizers::Result<Option<String>> {
    let normal = |text: String| {
        let mut normalized = NormalizedString::from(text);
        normalizer.normalize(&mut normalized).map(|()| normalized.get().to_owned())
    };
    let around = normal(format!("{PLAIN}{PLAIN}"))?;
    let Some((before, after)) = around.split_once(&format!("{PLAIN}{PLAIN}")) else { return Ok(None) };
    let whole = normal(format!("{PLAIN}{text}{PLAIN}"))?;
    let middle = whole.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
    let middle = middle.and_then(|rest| rest.strip_prefix(PLAIN)).and_then(|rest| rest.strip_suffix(PLAIN));
    Ok(middle.map(str::to_owned))
}

fn is_char(text: &str, c: char) -> bool {
    let mut chars = text.chars();
    chars.next() == Some(c) && chars.next().is_none()
}

/// The characters of which nothing is left. One beside a character that has become another may be part of that one, as
/// an accent is, unless it is removed wherever it stands.
fn removed(normalized: &NormalizedString, is_removed_anywhere: impl Fn(char) -> bool) -> BTreeMap<char, u64> {
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
    let (mut counts, mut run, mut before_is_same) = (BTreeMap::new(), Vec::new(), true);
    let mut close = |run: &mut Vec<char>, is_plain: bool| {
        for c in run.drain(..).filter(|&c| is_plain || is_removed_anywhere(c)) {
            *counts.entry(c).or_default() += 1;
        }
    };
    for (at, c) in original.char_indices() {
        match left.get(at).copied().flatten() {
            None => run.push(c),
            Some(is_same) => {
                close(&mut run, before_is_same && is_same);
                before_is_same = is_same;
            }
        }
    }
    close(&mut run, before_is_same);
    counts
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
        assert_eq!(normalize(&normalizer, text).unwrap(), expected, "{text}");
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
    fn what_can_be_read_back_is_not() {
        let spaces = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\u{2581}\"},\
                      {\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\u{2581}\"}]}";
        check(spaces, "a b", "\u{2581}a\u{2581}b", &[], &[]);
        check("{\"type\":\"NFC\"}", "e\u{301} a", "é a", &[], &[]);
        check("{\"type\":\"ByteLevel\"}", "a é", "aĠÃ©", &[], &[]);
    }
}
