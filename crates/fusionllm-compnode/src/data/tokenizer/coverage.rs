//! How much of a text becomes tokens: some tokenizers drop what they do not know, without a word.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{Model, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::normalizer::{Effects, Normalized, normalize};

/// Text is looked at in pieces of about this many bytes, cut at line ends.
const PIECE_BYTES: usize = 64 << 10;
/// Characters that are named in a sentence.
const NAMED: usize = 5;

/// What of a text gives no token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Coverage {
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// About how many of them can be had back from the tokens, but for those that are made others: they were not left out or
    /// merged.
    pub(crate) covered_bytes: u64,
    /// Its characters, as the tokenizer's normalizer leaves them, and those that it takes away.
    pub(crate) chars: u64,
    /// Of which white space is dropped, such as between words.
    pub(crate) spaces: u64,
    /// How often each other character is dropped.
    pub(crate) dropped: BTreeMap<char, u64>,
    /// How often the normalizer makes another one of a character.
    pub(crate) changed: BTreeMap<char, u64>,
    /// What it makes of these.
    made: BTreeMap<char, String>,
    /// All characters of the text.
    seen: BTreeSet<char>,
}

impl Coverage {
    /// A text of which everything becomes tokens.
    pub(super) fn whole(text: &str) -> Self {
        let bytes = text.len() as u64;
        Self { bytes, covered_bytes: bytes, ..Self::default() }
    }

    /// Takes another text in.
    pub(crate) fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.covered_bytes += other.covered_bytes;
        self.chars += other.chars;
        self.spaces += other.spaces;
        self.made.extend(other.made.iter().map(|(&c, made)| (c, made.clone())));
        self.seen.extend(&other.seen);
        for (mine, others) in [(&mut self.dropped, &other.dropped), (&mut self.changed, &other.changed)] {
            for (&c, count) in others {
                *mine.entry(c).or_default() += count;
            }
        }
    }

    /// Characters other than white space that give no token.
    pub(crate) fn lost(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// The most frequent of them.
    pub(crate) fn named(&self) -> String {
        Self::most_frequent(&self.dropped)
    }

    /// Whether nothing is made of two characters of the text: then they can be told, whatever they are made.
    fn is_one_to_one(&self) -> bool {
        let is_single = |(c, made): (&char, &String)| {
            !made.chars().any(|c| self.seen.contains(&c))
                && self.made.iter().all(|(other, of)| other == c || of != made)
        };
        self.made.iter().all(is_single)
    }

    /// Characters that are made others.
    pub(crate) fn changed(&self) -> u64 {
        self.changed.values().sum()
    }

    /// How many bytes of these nothing tells.
    pub(crate) fn changed_bytes(&self) -> u64 {
        if self.is_one_to_one() {
            return 0;
        }
        self.changed.iter().map(|(c, count)| c.len_utf8() as u64 * count).sum()
    }

    /// The most frequent of them.
    pub(crate) fn named_changed(&self) -> String {
        Self::most_frequent(&self.changed)
    }

    fn most_frequent(counts: &BTreeMap<char, u64>) -> String {
        let mut ranked: Vec<(char, u64)> = counts.iter().map(|(&c, &count)| (c, count)).collect();
        ranked.sort_by_key(|&(c, count)| (std::cmp::Reverse(count), c));
        let mut names: Vec<String> = ranked.iter().take(NAMED).map(|(c, _)| format!("{c:?}")).collect();
        if ranked.len() > NAMED {
            names.push(format!("{} others", ranked.len() - NAMED));
        }
        names.join(", ")
    }
}

/// Counts what `tokenizer` drops of a text; `effects` are its normalizer's.
pub(super) fn count(
    tokenizer: &tokenizers::Tokenizer,
    effects: &Mutex<Effects>,
    text: &str,
) -> tokenizers::Result<Coverage> {
    let mut sum = Coverage::default();
    for piece in pieces(text) {
        sum.add(&count_piece(tokenizer, effects, piece)?);
    }
    Ok(sum)
}

/// A text in pieces, each of which [`count`] looks at as a whole.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let least = rest.ceil_char_boundary(PIECE_BYTES);
        let line_end = rest.get(least..).and_then(|tail| tail.find('\n')).map(|at| least + at + 1);
        // A line without an end is cut all the same.
        let end = line_end.unwrap_or(rest.len()).min(rest.ceil_char_boundary(4 * PIECE_BYTES));
        let (piece, after) = rest.split_at(end);
        rest = after;
        Some(piece)
    })
}

/// Added tokens stand as they are; the rest goes through normalizer, words and model.
fn count_piece(
    tokenizer: &tokenizers::Tokenizer,
    effects: &Mutex<Effects>,
    piece: &str,
) -> tokenizers::Result<Coverage> {
    let mut sum = Coverage::default();
    let parts = tokenizer.get_added_vocabulary().extract_and_normalize(None::<&NormalizerWrapper>, piece);
    for (part, _, tokens) in parts.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
        if let Some(tokens) = tokens {
            sum.add(&added(tokenizer, tokens.first().map(|token| token.id), part));
        } else {
            sum.add(&count_words(tokenizer, effects, part)?);
        }
    }
    Ok(sum)
}

/// The text of an added token. Some take in the white space around them, and nothing tells how much that was.
fn added(tokenizer: &tokenizers::Tokenizer, id: Option<u32>, part: &str) -> Coverage {
    let chars = part.chars().count() as u64;
    let whole = Coverage { chars, ..Coverage::whole(part) };
    let added = tokenizer.get_added_tokens_decoder();
    let Some(token) = id.and_then(|id| added.get(&id)).filter(|token| token.lstrip || token.rstrip) else {
        return whole;
    };
    let blank = |from: &str| from.len() - from.trim_start().len();
    let reversed = |from: &str| from.len() - from.trim_end().len();
    let own = [blank(&token.content), reversed(&token.content)];
    let taken_in = [blank(part).saturating_sub(own[0]), reversed(part).saturating_sub(own[1])];
    let lost: usize = taken_in.into_iter().sum();
    Coverage { spaces: lost as u64, covered_bytes: part.len().saturating_sub(lost) as u64, ..whole }
}

fn count_words(
    tokenizer: &tokenizers::Tokenizer,
    effects: &Mutex<Effects>,
    piece: &str,
) -> tokenizers::Result<Coverage> {
    let mut made = BTreeMap::new();
    let Normalized { text, removed, changed } = match tokenizer.get_normalizer() {
        Some(normalizer) => {
            let mut effects = effects.lock().unwrap_or_else(PoisonError::into_inner);
            let normalized = normalize(normalizer, &mut effects, piece)?;
            made.extend(normalized.changed.keys().map(|&c| (c, effects.made_of(c).to_owned())));
            normalized
        }
        None => Normalized { text: piece.to_owned(), ..Normalized::default() },
    };
    let chars = text.chars().count() as u64 + removed.values().sum::<u64>();
    let lost_bytes: u64 = removed.iter().map(|(c, count)| c.len_utf8() as u64 * count).sum();
    let mut words = PreTokenizedString::from(NormalizedString::from(text.as_str()));
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    let seen = piece.chars().collect();
    let mut found = Coverage { bytes: piece.len() as u64, chars, changed, made, seen, ..Coverage::default() };
    for (c, count) in removed {
        if c.is_whitespace() {
            found.spaces += count;
        } else {
            found.dropped.insert(c, count);
        }
    }
    let mut covered = 0u64;
    let mut all = 0u64;
    let mut end = 0;
    let mut passed_over = |from: usize, to: usize, all: &mut u64| {
        for c in text.get(from..to).unwrap_or_default().chars() {
            *all += c.len_utf8() as u64;
            if c.is_whitespace() {
                found.spaces += 1;
            } else {
                *found.dropped.entry(c).or_default() += 1;
            }
        }
    };
    let mut words_dropped: BTreeMap<char, u64> = BTreeMap::new();
    for (word, (from, to), _) in words.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        passed_over(end, from, &mut all);
        end = end.max(to);
        all += word.len() as u64;
        covered += word.len() as u64;
        for c in unknown(tokenizer.get_model(), word) {
            covered -= c.len_utf8() as u64;
            *words_dropped.entry(c).or_default() += 1;
        }
    }
    passed_over(end, text.len(), &mut all);
    for (c, count) in words_dropped {
        *found.dropped.entry(c).or_default() += count;
    }
    let share = if all == 0 { 0.0 } else { covered as f64 / all as f64 };
    let kept = found.bytes.saturating_sub(lost_bytes);
    found.covered_bytes = if covered == all && all > 0 { kept } else { (kept as f64 * share) as u64 };
    Ok(found)
}

/// The characters of a word for which the model has neither a token nor anything instead. Only BPE has such: the other
/// models refuse the text.
fn unknown(model: &ModelWrapper, word: &str) -> Vec<char> {
    let ModelWrapper::BPE(bpe) = model else { return Vec::new() };
    if bpe.unk_token.is_some() {
        return Vec::new();
    }
    // A whole word that is a token needs no tokens of its characters.
    if bpe.ignore_merges && bpe.token_to_id(word).is_some() {
        return Vec::new();
    }
    let last = word.char_indices().next_back().map_or(0, |(at, _)| at);
    word.char_indices().filter(|&(at, c)| !is_known(bpe, c, at == 0, at == last)).map(|(_, c)| c).collect()
}

fn is_known(bpe: &BPE, c: char, is_first: bool, is_last: bool) -> bool {
    let mut token = c.to_string();
    if let Some(prefix) = bpe.continuing_subword_prefix.as_ref().filter(|_| !is_first) {
        token.insert_str(0, prefix);
    }
    if let Some(suffix) = bpe.end_of_word_suffix.as_ref().filter(|_| is_last) {
        token.push_str(suffix);
    }
    let bytes = || c.to_string().into_bytes();
    bpe.token_to_id(&token).is_some()
        || (bpe.byte_fallback && bytes().iter().all(|byte| bpe.token_to_id(&format!("<0x{byte:02X}>")).is_some()))
}
