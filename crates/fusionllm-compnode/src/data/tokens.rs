//! The token ids of a corpus, in memory.

use std::ops::Range;

/// Ids lie in parts of so many: a part never moves, so growing needs no second copy.
const PART: usize = 1 << 20;

/// Token ids in their order, of two bytes each where that is enough.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens(Parts);

#[derive(Clone, Debug, PartialEq)]
enum Parts {
    Narrow(Vec<Vec<u16>>),
    Wide(Vec<Vec<i32>>),
}

impl Tokens {
    /// None yet, of a tokenizer with so many entries.
    pub(super) fn new(entries: usize) -> Self {
        Self(if Self::width(entries) == 2 { Parts::Narrow(Vec::new()) } else { Parts::Wide(Vec::new()) })
    }

    /// Bytes of one id of a tokenizer with so many entries.
    pub(super) fn width(entries: usize) -> u64 {
        if entries <= 1 << 16 { 2 } else { 4 }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Parts::Narrow(parts) => count(parts),
            Parts::Wide(parts) => count(parts),
        }
    }

    /// Bytes of memory that they fill.
    pub(super) fn bytes(&self) -> u64 {
        let width = if matches!(self.0, Parts::Narrow(_)) { 2 } else { 4 };
        self.len() as u64 * width
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = i32> + '_ {
        let (narrow, wide): (&[Vec<u16>], &[Vec<i32>]) = match &self.0 {
            Parts::Narrow(parts) => (parts, &[]),
            Parts::Wide(parts) => (&[], parts),
        };
        narrow.iter().flatten().map(|&id| i32::from(id)).chain(wide.iter().flatten().copied())
    }

    /// Those at some places, all of which there must be.
    pub fn slice(&self, places: Range<usize>) -> impl Iterator<Item = i32> + '_ {
        places.map(|at| match &self.0 {
            Parts::Narrow(parts) => i32::from(parts[at / PART][at % PART]),
            Parts::Wide(parts) => parts[at / PART][at % PART],
        })
    }

    /// Adds ids at the end.
    pub(super) fn extend(&mut self, ids: &[i32]) {
        if let Parts::Narrow(parts) = &mut self.0 {
            let narrow: Option<Vec<u16>> = ids.iter().map(|&id| u16::try_from(id).ok()).collect();
            match narrow {
                Some(ids) => return append(parts, &ids),
                // More than the tokenizer says it has.
                None => self.0 = Parts::Wide(parts.iter().map(|part| widened(part)).collect()),
            }
        }
        if let Parts::Wide(parts) = &mut self.0 {
            append(parts, ids);
        }
    }
}

fn count<T>(parts: &[Vec<T>]) -> usize {
    parts.iter().map(Vec::len).sum()
}

fn widened(part: &[u16]) -> Vec<i32> {
    part.iter().map(|&id| i32::from(id)).collect()
}

/// Fills the last part, and begins others.
fn append<T: Copy>(parts: &mut Vec<Vec<T>>, mut ids: &[T]) {
    while !ids.is_empty() {
        if parts.last().is_none_or(|part| part.len() == PART) {
            parts.push(Vec::new());
        }
        let Some(part) = parts.last_mut() else { return };
        let (now, later) = ids.split_at(ids.len().min(PART - part.len()));
        part.extend_from_slice(now);
        ids = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_as_they_went_in_whatever_their_width() {
        for (entries, width, largest) in [(1 << 16, 2, 65_535), ((1 << 16) + 1, 4, 65_536), (256, 2, 70_000)] {
            assert_eq!(Tokens::width(entries), width);
            let mut tokens = Tokens::new(entries);
            assert!(tokens.is_empty());
            let ids: Vec<i32> = (0..PART as i32 + 10).map(|i| i % 250).chain([largest, 7]).collect();
            for some in ids.chunks(PART / 3 + 1) {
                tokens.extend(some);
            }
            assert_eq!(tokens.len(), ids.len());
            assert!(tokens.iter().eq(ids.iter().copied()));
            let across = PART - 5..PART + 12;
            assert!(tokens.slice(across.clone()).eq(ids[across].iter().copied()));
            assert_eq!(matches!(tokens.0, Parts::Narrow(_)), largest < 1 << 16 && width == 2);
        }
    }
}
