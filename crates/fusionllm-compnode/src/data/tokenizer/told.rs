//! What of a text its tokens tell: where one token stands now for this and now for that, nobody can say for what.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::implied::Implied;

/// Tokens of which it is remembered what they stand for.
const MOST_UNITS: usize = 1 << 18;
/// Texts for one of them that are told apart.
const MOST_TEXTS: usize = 1 << 10;

/// So many parts of a text are looked at, then every second one, and after as many of these every fourth, and so on.
const PARTS: u64 = 256;

/// What the tokens of a text stand for in it. A unit is one token, or several that stand for one character together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Told {
    /// Parts of the text, and how many of them were looked at.
    parts: u64,
    looked_at: u64,
    /// Bytes that were looked at.
    bytes: u64,
    /// Bytes that are of no unit.
    left_out: u64,
    /// By a hash of a unit's ids.
    units: HashMap<u64, Texts>,
    /// What stands before pieces.
    implied: Implied,
}

/// The texts for which a unit stands.
#[derive(Clone, Debug, Default, PartialEq)]
struct Texts {
    /// By a hash of a text: bytes of all its occurrences.
    bytes: BTreeMap<u64, u64>,
    /// Bytes of those that are not told apart.
    others: u64,
}

impl Texts {
    fn add(&mut self, text: &str) {
        let (hash, bytes) = (hash_of(text), text.len() as u64);
        if self.bytes.len() < MOST_TEXTS || self.bytes.contains_key(&hash) {
            *self.bytes.entry(hash).or_default() += bytes;
        } else {
            self.others += bytes;
        }
    }

    /// Bytes of all texts but the one that a reader would take it for.
    fn ambiguous(&self) -> u64 {
        let all: u64 = self.bytes.values().sum();
        all - self.bytes.values().max().copied().unwrap_or(0) + self.others
    }
}

impl Told {
    /// Whether the next part of the text is to be taken in: of a long text not all are.
    pub(super) fn is_due(&mut self) -> bool {
        let every = 1u64.checked_shl(u32::try_from(self.looked_at / PARTS).unwrap_or(u32::MAX)).unwrap_or(u64::MAX);
        let is_due = self.parts.is_multiple_of(every);
        self.parts += 1;
        self.looked_at += u64::from(is_due);
        is_due
    }

    /// Takes in a text with its token ids and the bytes for which each stands. After a token that stands by itself, as at the
    /// start, a tokenizer may put something before the text.
    pub(super) fn add(&mut self, text: &str, tokens: &[(u32, (usize, usize))], stands_alone: impl Fn(u32) -> bool) {
        self.bytes += text.len() as u64;
        let mut end = 0;
        let mut is_first = true;
        let mut rest = tokens;
        while let Some((&(id, (from, to)), mut after)) = rest.split_first() {
            // Bytes of one character may be several tokens.
            let mut until = to;
            while let Some((&(_, (next, to)), others)) = after.split_first()
                && next < until
            {
                (until, after) = (until.max(to), others);
            }
            let unit = rest.get(..rest.len() - after.len()).unwrap_or_default();
            self.left_out += from.saturating_sub(end) as u64;
            end = end.max(until);
            let mut hasher = DefaultHasher::new();
            is_first.hash(&mut hasher);
            unit.iter().for_each(|(id, _)| id.hash(&mut hasher));
            let key = hasher.finish();
            if self.units.len() < MOST_UNITS || self.units.contains_key(&key) {
                self.units.entry(key).or_default().add(text.get(from..until).unwrap_or_default());
            }
            is_first = stands_alone(id);
            rest = after;
        }
        self.left_out += text.len().saturating_sub(end) as u64;
    }

    /// Takes in a text of which every byte becomes tokens.
    pub(super) fn add_whole(&mut self, text: &str) {
        self.bytes += text.len() as u64;
    }

    /// Looks at the starts of the pieces of a text, before which the tokenizer may put one of `texts`.
    pub(super) fn add_starts(
        &mut self,
        text: &str,
        starts: impl IntoIterator<Item = usize>,
        texts: &[String],
        ids: impl FnMut(&str) -> Option<Vec<u32>>,
    ) {
        self.implied.add(text, starts, texts, ids);
    }

    /// Bytes that cannot be had back from the tokens, of those that were looked at.
    fn lost(&self) -> u64 {
        self.left_out + self.units.values().map(Texts::ambiguous).sum::<u64>()
    }

    /// The share of the text that cannot be had back from its tokens.
    pub(crate) fn lost_share(&self) -> f64 {
        let lost = self.lost() as f64 + self.implied.bytes();
        if self.bytes == 0 { 0.0 } else { lost / self.bytes as f64 }
    }
}

fn hash_of(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(text: &str, tokens: &[(u32, (usize, usize))]) -> u64 {
        let mut told = Told::default();
        told.add(text, tokens, |id| id == 9);
        told.lost()
    }

    #[test]
    fn what_stands_for_two_texts_or_for_none_is_lost() {
        assert_eq!(lost("ab", &[(1, (0, 1)), (2, (1, 2))]), 0);
        assert_eq!(lost("xabab", &[(0, (0, 1)), (1, (1, 2)), (2, (2, 3)), (1, (3, 4)), (1, (4, 5))]), 1);
        assert_eq!(lost("a b", &[(1, (0, 1)), (2, (2, 3))]), 1);
        assert_eq!(lost("ab ", &[(1, (0, 1))]), 2);
        assert_eq!(lost("ab", &[]), 2);
    }

    #[test]
    fn of_a_long_text_ever_fewer_parts_are_looked_at() {
        let mut told = Told::default();
        assert_eq!((0..PARTS).filter(|_| told.is_due()).count() as u64, PARTS);
        let later = (0..1_000_000).filter(|_| told.is_due()).count() as u64;
        assert!((8 * PARTS..14 * PARTS).contains(&later), "{later}");
    }

    /// As byte tokens do for a character that is none itself.
    #[test]
    fn tokens_of_one_character_stand_for_it_together() {
        let tokens = [(0, (0, 1)), (1, (1, 3)), (2, (1, 3)), (1, (3, 5)), (3, (3, 5))];
        assert_eq!(lost("xéè", &tokens), 0);
    }

    /// What a tokenizer puts before a text is no loss of it, and neither is it behind a token that stands by itself.
    #[test]
    fn the_start_of_a_text_is_looked_at_by_itself() {
        assert_eq!(lost("a a", &[(1, (0, 1)), (1, (1, 3))]), 0);
        assert_eq!(lost("aEa a", &[(1, (0, 1)), (9, (1, 2)), (1, (2, 3)), (1, (3, 5))]), 0);
    }
}
