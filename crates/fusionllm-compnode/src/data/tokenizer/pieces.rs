//! A large text as tokens, piece by piece: a tokenizer takes some hundred bytes of memory for each word that it is given,
//! and works for minutes without a pause.

use std::ops::Range;

use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizer};

use super::{FileTokenizer, Tokenizer};
use crate::DataError;
use crate::data::reading::Reading;

/// About the size of a piece.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes of the longest character.
const LONGEST_CHARACTER: usize = 4;
/// Text at each side of a cut that is held against what it gives without the cut.
const AROUND_BYTES: usize = 1 << 10;
/// Places of each kind that are tried before the piece grows.
const TRIES: usize = 32;
/// Where a text may be cut, by what there is after a place: behind a line end, else before a blank, else before another sign
/// that is of no word. Many texts have no line ends, and some no blanks.
const PLACES: [fn(&str) -> Option<usize>; 3] = [
    |text| text.find('\n').map(|at| at + 1),
    |text| before(text, char::is_whitespace),
    |text| before(text, |sign| !sign.is_alphanumeric()),
];

/// The next place before such a character, which is not the first.
fn before(text: &str, is_such: impl Fn(char) -> bool) -> Option<usize> {
    text.char_indices().skip(1).find(|&(_, sign)| is_such(sign)).map(|(at, _)| at)
}
/// Bytes of memory for a byte of text that is encoded: where each came from, twice, and what describes its word.
pub(super) const WORD_BYTES: u64 = 64;

/// Takes a piece of text and its tokens.
pub(crate) type Take<'a> = dyn FnMut(&str, &[i32]) -> Result<(), DataError> + 'a;

impl Tokenizer {
    /// Gives `take` a text piece by piece, each with its tokens: together what [`Self::encode`] gives. `more` adds what comes
    /// next of the text, and says whether there was anything.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses the text, [`DataError::Stopped`] if nobody wants it any more,
    /// [`DataError::Memory`] if there is none for it, and what `more` and `take` give.
    pub(crate) fn encode_stream(
        &self,
        more: &mut dyn FnMut(&mut String) -> Result<bool, DataError>,
        reading: &Reading,
        take: &mut Take<'_>,
    ) -> Result<(), DataError> {
        let (mut text, mut is_whole, mut tried) = (String::new(), false, PIECE_BYTES);
        loop {
            reading.check()?;
            let Some(at) = self.cut(&text, is_whole, &mut tried, reading)? else {
                is_whole = !more(&mut text)?;
                reading.fits(text.len() as u64)?;
                continue;
            };
            if at == 0 {
                return Ok(());
            }
            take(&text[..at], &self.piece(&text[..at], reading)?)?;
            text.drain(..at);
            tried = PIECE_BYTES;
        }
    }

    /// The same for a text that is there as a whole.
    ///
    /// # Errors
    /// As [`Self::encode_stream`].
    pub(crate) fn encode_pieces(
        &self,
        text: &str,
        reading: &Reading,
        mut take: impl FnMut(&[i32]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut rest = text;
        while !rest.is_empty() {
            reading.check()?;
            let at = self.cut(rest, true, &mut { PIECE_BYTES }, reading)?.unwrap_or(rest.len());
            take(&self.piece(&rest[..at], reading)?)?;
            rest = &rest[at..];
        }
        Ok(())
    }

    fn piece(&self, piece: &str, reading: &Reading) -> Result<Vec<i32>, DataError> {
        let ids = match self {
            Self::Bytes => self.encode(piece)?,
            Self::HuggingFace(tokenizer) => {
                reading.fits(WORD_BYTES.saturating_mul(piece.len() as u64))?;
                tokenizer.encode_watched(piece, reading)?
            }
        };
        reading.moved(piece.len())?;
        Ok(ids)
    }

    /// Where the first piece of a text ends, of which there may be more unless it is whole; nothing if more of it must be
    /// known. After a piece the tokens go on as if nothing had been cut: those around show it. Up to `tried` there is no such
    /// place.
    fn cut(
        &self,
        text: &str,
        is_whole: bool,
        tried: &mut usize,
        reading: &Reading,
    ) -> Result<Option<usize>, DataError> {
        // The end, if it is that of the whole text.
        let end = is_whole.then_some(text.len());
        if text.len() <= PIECE_BYTES || !is_whole && text.len() < PIECE_BYTES + LONGEST_CHARACTER {
            return Ok(end);
        }
        let Self::HuggingFace(tokenizer) = self else { return Ok(Some(text.ceil_char_boundary(PIECE_BYTES))) };
        while *tried < text.len() {
            let from = text.ceil_char_boundary(*tried);
            let until = from.saturating_add(PIECE_BYTES);
            if !is_whole && text.len() < until + AROUND_BYTES + LONGEST_CHARACTER {
                return Ok(None);
            }
            let until = text.ceil_char_boundary(until);
            for next in PLACES {
                let mut at = from;
                for _ in 0..TRIES {
                    let Some(after) = next(&text[at..until]) else { break };
                    at += after;
                    if tokenizer.may_cut(text, at, reading)? {
                        return Ok(Some(at));
                    }
                }
            }
            *tried = until;
        }
        Ok(end)
    }

    /// Token ids of a text, each with where in it lies what it stands for, in bytes.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses it.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<Vec<(i32, Range<usize>)>, DataError> {
        match self {
            Self::Bytes => Ok(text.bytes().enumerate().map(|(at, byte)| (i32::from(byte), at..at + 1)).collect()),
            Self::HuggingFace(tokenizer) => tokenizer.guarded(|| {
                tokenizer.check_growth(text, &Reading::default())?;
                let encoding = tokenizer.inner.encode(text, false).map_err(|e| tokenizer.fail(e.to_string()))?;
                let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
                tokens.map(|(&id, &(start, end))| Ok((tokenizer.id(id)?, start..end))).collect()
            }),
        }
    }
}

impl FileTokenizer {
    /// Whether the tokens around a place are the same with a cut there.
    fn may_cut(&self, text: &str, at: usize, reading: &Reading) -> Result<bool, DataError> {
        // Within a long run of one sign the tokens around say nothing of those further on.
        if text[..at].chars().next_back() == text[at..].chars().next() {
            return Ok(false);
        }
        let start = text.floor_char_boundary(at.saturating_sub(AROUND_BYTES));
        let end = text.ceil_char_boundary(at.saturating_add(AROUND_BYTES));
        let mut parts = self.encode_watched(&text[start..at], reading)?;
        parts.extend(self.encode_watched(&text[at..end], reading)?);
        Ok(parts == self.encode_watched(&text[start..end], reading)?)
    }

    /// As the library encodes a text, and can be stopped after each word.
    fn encode_watched(&self, text: &str, reading: &Reading) -> Result<Vec<i32>, DataError> {
        self.guarded(|| self.encode_words(text, reading))
    }

    fn encode_words(&self, text: &str, reading: &Reading) -> Result<Vec<i32>, DataError> {
        let fail = |error: tokenizers::Error| match reading.check() {
            Ok(()) => self.fail(error.to_string()),
            Err(stopped) => stopped,
        };
        self.check_growth(text, reading)?;
        let tokenizer = &self.inner;
        let mut words = tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
        if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words).map_err(fail)?;
        }
        let model = tokenizer.get_model();
        let word = |word: &tokenizers::NormalizedString| {
            reading.moved(word.get().len())?;
            model.tokenize(word.get())
        };
        words.tokenize(word).map_err(fail)?;
        let words = words.get_splits(OffsetReferential::Original, OffsetType::None);
        let ids = words.into_iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id));
        ids.map(|id| self.id(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer.json with this pre-tokenizer, whose tokens are some bytes and pairs of them.
    fn tokenizer(change: impl FnOnce(&mut serde_json::Value)) -> Tokenizer {
        let mut keys: serde_json::Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        for (id, (pair, merge)) in [("ab", "a b"), ("ĊĊ", "Ċ Ċ"), ("aĊ", "a Ċ"), ("Ġa", "Ġ a")].into_iter().enumerate()
        {
            keys["model"]["vocab"][pair] = (256 + id).into();
            keys["model"]["merges"].as_array_mut().unwrap().push(merge.into());
        }
        change(&mut keys);
        Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> (Vec<i32>, usize) {
        let (mut ids, mut count) = (Vec::new(), 0);
        let reading = Reading::default();
        let (mut rest, mut again) = (text, String::new());
        tokenizer
            .encode_stream(
                &mut |all| {
                    let (part, after) = rest.split_at(rest.ceil_char_boundary(1 << 18));
                    all.push_str(part);
                    rest = after;
                    Ok(!part.is_empty())
                },
                &reading,
                &mut |piece, some| {
                    again.push_str(piece);
                    ids.extend_from_slice(some);
                    count += 1;
                    Ok(())
                },
            )
            .unwrap();
        assert!(reading.progress() >= text.len() as u64);
        assert!(again == text);
        (ids, count)
    }

    #[test]
    fn pieces_give_the_tokens_of_the_whole() {
        let whole_words = |keys: &mut serde_json::Value| {
            keys["pre_tokenizer"]["use_regex"] = true.into();
        };
        let prepends = |keys: &mut serde_json::Value| {
            keys["normalizer"] = serde_json::json!({ "type": "Prepend", "prepend": "b" });
        };
        // Line ends that belong to what follows or goes before them, and some that do not; blanks alone; and neither.
        for text in ["ab a\n\nab\n a\nb b\n\n\n", "ab a ab  b a b", "ab,ab、b。a、"] {
            let text = text.repeat(3 * PIECE_BYTES / text.len());
            let cases = [
                (Tokenizer::Bytes, true),
                (tokenizer(whole_words), true),
                (tokenizer(|_| {}), true),
                (tokenizer(prepends), false),
            ];
            for (tokenizer, is_cut) in cases {
                let (ids, count) = pieces(&tokenizer, &text);
                assert!(ids == tokenizer.encode(&text).unwrap(), "{tokenizer:?}");
                assert_eq!(count > 1, is_cut, "{count} pieces");
            }
        }
    }

    #[test]
    fn a_text_that_nobody_wants_any_more_is_let_go() {
        let text = "ab a\n".repeat(10);
        for tokenizer in [Tokenizer::Bytes, tokenizer(|_| {})] {
            let stop = crate::stop::StopFlag::default();
            let reading = Reading::new(stop.clone());
            stop.set();
            let mut more = |all: &mut String| {
                all.push_str(&text);
                Ok(false)
            };
            let taken = tokenizer.encode_stream(&mut more, &reading, &mut |_, _| panic!("a piece came"));
            assert!(matches!(taken, Err(DataError::Stopped)));
            if let Tokenizer::HuggingFace(tokenizer) = &tokenizer {
                // In the middle of a piece, too.
                assert!(matches!(tokenizer.encode_watched(&text, &reading), Err(DataError::Stopped)));
            }
        }
    }
}
