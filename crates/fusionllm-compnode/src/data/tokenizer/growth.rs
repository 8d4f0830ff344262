//! How much a tokenizer makes of a text before it becomes tokens, and of tokens that become text: one that makes too much
//! could fill memory, and is refused before.

use data_encoding::BASE64;
use serde_json::Value;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::FileTokenizer;
use super::pieces::WORD_BYTES;
use crate::DataError;
use crate::data::reading::Reading;

/// Bytes that a normalizer may write in the place of one match. No language needs nearly as many.
const MOST_WRITTEN: usize = 8 << 10;
/// Bytes that may become of one byte of a text. NFKC makes eleven, and some write each of them as two.
const MOST_GROWTH: u64 = 40;
/// Bytes that pre-tokenizers may make of one byte without being looked at: a step that writes bytes as letters makes two,
/// one that marks spaces four at the most.
const MOST_OF_WORDS: u64 = 8;
/// Bytes that a decoder may make of one byte of a token. None needs nearly as many.
const MOST_DECODED: u64 = 4 << 10;
/// A text is looked at in slices of so many bytes, of which little can become at a time.
const SLICE_BYTES: usize = 1 << 10;

/// How many bytes may become of one, at the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Growth {
    /// In the normalizer.
    normalizer: u64,
    /// In all pre-tokenizers together.
    words: u64,
}

impl Growth {
    /// By the kinds of a normalizer and of pre-tokenizers.
    ///
    /// # Errors
    /// That the normalizer writes too much in the place of a match.
    pub(super) fn of(
        normalizer: Option<&NormalizerWrapper>,
        pre_tokenizer: Option<&PreTokenizerWrapper>,
    ) -> Result<Self, String> {
        Ok(Self { normalizer: of_normalizer(normalizer)?, words: of_words(pre_tokenizer) })
    }
}

/// By how much a text may grow at the most, by the kind of its normalizer.
fn of_normalizer(normalizer: Option<&NormalizerWrapper>) -> Result<u64, String> {
    match serde_json::to_value(normalizer) {
        Ok(Value::Null) => Ok(1),
        Ok(keys) => factor(&keys),
        Err(error) => Err(error.to_string()),
    }
}

/// By how much words may grow at the most, by the kinds of the pre-tokenizers.
fn of_words(pre_tokenizer: Option<&PreTokenizerWrapper>) -> u64 {
    match pre_tokenizer {
        Some(PreTokenizerWrapper::Sequence(all)) => {
            all.as_ref().iter().fold(1, |product, one| product.saturating_mul(of_words(Some(one))))
        }
        // A space before a word that is a byte, and each byte as a letter of two.
        Some(PreTokenizerWrapper::ByteLevel(bytes)) => 2 << u32::from(bytes.add_prefix_space),
        Some(PreTokenizerWrapper::Metaspace(_)) => 4,
        _ => 1,
    }
}

/// Refuses a decoder that could make too much of a token.
///
/// # Errors
/// By how much it could.
pub(super) fn check_decoder(decoder: Option<&DecoderWrapper>) -> Result<(), String> {
    match decoded(&serde_json::to_value(decoder).map_err(|error| error.to_string())?)? {
        factor if factor > MOST_DECODED => {
            Err(format!("its decoder may make {factor} bytes of one byte of a token, expected at most {MOST_DECODED}"))
        }
        _ => Ok(()),
    }
}

fn decoded(decoder: &Value) -> Result<u64, String> {
    match decoder.get("type").and_then(Value::as_str) {
        Some("Replace") => factor(decoder).map_err(|error| error.replace("normalizer", "decoder")),
        Some("Sequence") => {
            let all = decoder.get("decoders").and_then(Value::as_array);
            let mut factors = all.into_iter().flatten().map(decoded);
            factors.try_fold(1u64, |product, factor| Ok(product.saturating_mul(factor?)))
        }
        _ => Ok(1),
    }
}

fn factor(normalizer: &Value) -> Result<u64, String> {
    let text = |key: &str| normalizer.get(key).and_then(Value::as_str).unwrap_or_default();
    Ok(match text("type") {
        "Strip" | "StripAccents" | "Nmt" => 1,
        "ByteLevel" => 2,
        "Lowercase" => 3,
        "NFC" | "NFD" => 4,
        "BertNormalizer" => 6,
        "NFKC" | "NFKD" => 12,
        // Once for each part between added tokens, of which each byte may be one.
        "Prepend" => written(text("prepend").len())?.saturating_add(1),
        "Replace" => {
            let content = written(text("content").len())?;
            match normalizer.pointer("/pattern/String").and_then(Value::as_str) {
                Some(pattern) if !pattern.is_empty() => content.div_ceil(pattern.len() as u64).max(1),
                // What matches nothing at all writes between any two characters.
                _ => content.saturating_add(1),
            }
        }
        "Precompiled" => written(longest_of_map(text("precompiled_charsmap")))?.max(1),
        "Sequence" => {
            let all = normalizer.get("normalizers").and_then(Value::as_array);
            let mut factors = all.into_iter().flatten().map(factor);
            factors.try_fold(1u64, |product, factor| Ok::<u64, String>(product.saturating_mul(factor?)))?
        }
        _ => u64::MAX,
    })
}

fn written(bytes: usize) -> Result<u64, String> {
    if bytes > MOST_WRITTEN {
        return Err(format!("its normalizer writes {bytes} bytes in one place, expected at most {MOST_WRITTEN}"));
    }
    Ok(bytes as u64)
}

/// The longest text that a map of SentencePiece writes: the size of a trie, the trie, and texts that end with a NUL.
fn longest_of_map(map: &str) -> usize {
    let map = BASE64.decode(map.as_bytes()).unwrap_or_default();
    let Some((size, rest)) = map.split_first_chunk::<4>() else { return 0 };
    let texts = rest.get(u32::from_le_bytes(*size) as usize..).unwrap_or_default();
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0)
}

/// Cuts a short text into words step by step.
///
/// # Errors
/// What a pre-tokenizer says, or that a step makes more than `most` bytes.
fn cut_within(
    pre_tokenizer: &PreTokenizerWrapper,
    words: &mut PreTokenizedString,
    (of, most): (usize, usize),
) -> tokenizers::Result<u64> {
    if let PreTokenizerWrapper::Sequence(all) = pre_tokenizer {
        return all.as_ref().iter().try_fold(of as u64, |_, one| cut_within(one, words, (of, most)));
    }
    pre_tokenizer.pre_tokenize(words)?;
    let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
    let got: usize = splits.iter().map(|(word, ..)| word.len()).sum();
    if got > most {
        return Err(format!("its pre-tokenizers make {got} bytes of {of}, expected at most {most}").into());
    }
    Ok(got as u64)
}

/// Normalizes a short text step by step.
///
/// # Errors
/// What the normalizer says, or that a step makes more than `most` bytes.
pub(super) fn normalize_within(
    normalizer: &NormalizerWrapper,
    normalized: &mut NormalizedString,
    most: usize,
) -> tokenizers::Result<()> {
    if let NormalizerWrapper::Sequence(all) = normalizer {
        return all.as_ref().iter().try_for_each(|one| normalize_within(one, normalized, most));
    }
    normalizer.normalize(normalized)?;
    let (got, of) = (normalized.get().len(), normalized.get_original().len());
    if got > most {
        return Err(too_much(got, of, most));
    }
    Ok(())
}

impl FileTokenizer {
    /// Before a text is normalized and cut as a whole: whether too much would become of it, or more than there is memory
    /// for.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Memory`], or [`DataError::Stopped`].
    pub(super) fn check_growth(&self, text: &str, reading: &Reading) -> Result<(), DataError> {
        self.check_size(text, reading)?;
        self.check_words(text)
    }

    fn check_size(&self, text: &str, reading: &Reading) -> Result<(), DataError> {
        let Growth { normalizer: growth, words } = self.growth;
        // What memory a byte of ordinary words takes is in `WORD_BYTES`.
        let words = if words > MOST_OF_WORDS { words } else { 1 };
        if growth == 1 && words == 1 {
            return Ok(());
        }
        let most = WORD_BYTES.saturating_mul(growth).saturating_mul(words).saturating_mul(text.len() as u64);
        if growth <= MOST_GROWTH && words == 1 && reading.fits(most).is_ok() {
            return Ok(());
        }
        self.measure(text, reading)
    }

    fn measure(&self, text: &str, reading: &Reading) -> Result<(), DataError> {
        let most = MOST_GROWTH as usize * SLICE_BYTES;
        let pre_tokenizer = self.inner.get_pre_tokenizer().filter(|_| self.growth.words > MOST_OF_WORDS);
        let (mut rest, mut grown) = (text, 0u64);
        while !rest.is_empty() {
            reading.check()?;
            let (slice, after) = rest.split_at(rest.ceil_char_boundary(SLICE_BYTES));
            let measured = self.normalized(slice).and_then(|text| match pre_tokenizer {
                Some(pre_tokenizer) => {
                    let mut words = PreTokenizedString::from(NormalizedString::from(text.as_str()));
                    cut_within(pre_tokenizer, &mut words, (slice.len(), most))
                }
                None => Ok(text.len() as u64),
            });
            grown = grown.saturating_add(measured.map_err(|e| self.fail(e.to_string()))?);
            reading.fits(WORD_BYTES.saturating_mul(grown))?;
            rest = after;
        }
        Ok(())
    }
}

impl FileTokenizer {
    /// What becomes of a short text. As when it is encoded, each part between added tokens is normalized by itself.
    fn normalized(&self, slice: &str) -> tokenizers::Result<String> {
        let Some(normalizer) = self.inner.get_normalizer() else { return Ok(slice.to_owned()) };
        let most = MOST_GROWTH as usize * SLICE_BYTES;
        let parts = self.inner.get_added_vocabulary().extract_and_normalize::<NormalizerWrapper>(None, slice);
        let mut text = String::new();
        for (part, _, tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::None) {
            if tokens.is_some() {
                continue;
            }
            let mut normalized = NormalizedString::from(part);
            normalize_within(normalizer, &mut normalized, most)?;
            text.push_str(normalized.get());
            if text.len() > most {
                return Err(too_much(text.len(), slice.len(), most));
            }
        }
        Ok(text)
    }
}

fn too_much(got: usize, of: usize, most: usize) -> tokenizers::Error {
    format!("its normalizer makes {got} bytes of {of}, expected at most {most}").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    fn with(normalizer: Value) -> Result<Tokenizer, DataError> {
        let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        keys["normalizer"] = normalizer;
        Tokenizer::from_json(keys.to_string(), "tok.json")
    }

    fn replace(pattern: &str, content: &str) -> Value {
        serde_json::json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content })
    }

    #[test]
    fn a_normalizer_says_by_how_much_a_text_may_grow() {
        let spaces =
            serde_json::json!({ "type": "Sequence", "normalizers": [replace(" ", "\u{2581}"), { "type": "NFC" }] });
        let regex = serde_json::json!({ "type": "Replace", "pattern": { "Regex": "\\s*" }, "content": "ab" });
        for (keys, growth) in [(Value::Null, 1), (spaces, 12), (regex, 3), (replace("abc", "0123"), 2)] {
            let Tokenizer::HuggingFace(tokenizer) = with(keys).unwrap() else { panic!() };
            assert_eq!(tokenizer.growth.normalizer, growth);
        }
        let error = with(replace("x", &"a".repeat(MOST_WRITTEN + 1))).unwrap_err().to_string();
        assert!(error.contains("writes 8193 bytes in one place"), "{error}");
        // A trie of four bytes, and two texts.
        let map = BASE64.encode(&[&[4u8, 0, 0, 0, 9, 9, 9, 9][..], b"abc\0de\0"].concat());
        assert_eq!((longest_of_map(&map), longest_of_map("AAAA"), longest_of_map("!")), (3, 0, 0));
    }

    /// Each writes every byte beyond ASCII and every space as two.
    #[test]
    fn pre_tokenizers_that_double_a_text_are_bounded_before_it_is_made() {
        let byte_level = |add_prefix_space: bool| {
            serde_json::json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true,
                                "use_regex": false })
        };
        let with = |pre_tokenizers: Vec<Value>| {
            let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
            keys["pre_tokenizer"] = serde_json::json!({ "type": "Sequence", "pretokenizers": pre_tokenizers });
            Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
        };
        let chars = serde_json::json!({ "type": "Split", "pattern": { "Regex": "." }, "behavior": "Isolated", "invert": false });
        let nested = serde_json::json!({ "type": "Sequence", "pretokenizers": vec![byte_level(false); 40] });
        for steps in [vec![byte_level(false); 40], vec![chars, byte_level(true), byte_level(true), nested]] {
            let tokenizer = with(steps);
            for text in ["gr\u{f6}\u{df}e ".repeat(100), "\u{65e5}".to_owned()] {
                for result in [
                    tokenizer.encode_pieces(&text, &Reading::default(), |_| Ok(())),
                    tokenizer.encode(&text).map(drop),
                    // Where every byte has a token, nothing is to be looked at.
                    tokenizer.coverage(&text).and_then(|_| tokenizer.encode(&text)).map(drop),
                ] {
                    let error = result.unwrap_err().to_string();
                    assert!(error.contains("tok.json: its pre-tokenizers make"), "{error}");
                }
            }
        }
        // One is what files have; a text that two or three leave small is read.
        for count in 1..=5 {
            let ids = with(vec![byte_level(false); count]).encode("abc").unwrap();
            assert_eq!(ids.len(), 3);
        }
    }

    #[test]
    fn a_decoder_that_doubles_a_text_is_refused() {
        let with = |decoders: Vec<Value>| {
            let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
            keys["decoder"] = serde_json::json!({ "type": "Sequence", "decoders": decoders });
            Tokenizer::from_json(keys.to_string(), "tok.json").map_err(|e| e.to_string())
        };
        // As Llama has it.
        let plain = vec![
            replace("\u{2581}", " "),
            serde_json::json!({ "type": "ByteFallback" }),
            serde_json::json!({ "type": "Fuse" }),
            serde_json::json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }),
        ];
        with(plain).unwrap();
        let error = with(vec![replace("a", "aa"); 40]).unwrap_err();
        assert!(error.contains("its decoder may make 1099511627776 bytes of one byte of a token"), "{error}");
        let error = with(vec![replace("a", &"b".repeat(MOST_WRITTEN + 1))]).unwrap_err();
        assert!(error.contains("its decoder writes 8193 bytes in one place"), "{error}");
    }

    #[test]
    fn what_becomes_of_a_text_is_bounded_before_it_is_made() {
        let doublings: Vec<Value> = (0..40).map(|_| replace("a", "aa")).collect();
        let doublings = serde_json::json!({ "type": "Sequence", "normalizers": doublings });
        for keys in [replace("bc", &"a".repeat(5000)), replace("b", &"a".repeat(5000)), doublings] {
            let tokenizer = with(keys).unwrap();
            let text = "a bc".repeat(100);
            for result in [
                tokenizer.encode_pieces(&text, &Reading::default(), |_| Ok(())),
                tokenizer.encode(&text).map(drop),
                tokenizer.coverage(&text).map(drop),
            ] {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("its normalizer makes"), "{error}");
            }
        }
        // What is put before a text is put before each part between added tokens.
        let prepend = |text: &str| serde_json::json!({ "type": "Prepend", "prepend": text });
        let added = serde_json::json!([{ "id": 113, "content": "q", "single_word": false, "lstrip": false, "rstrip": false,
                                         "normalized": false, "special": false }]);
        let parts = |prepended: &str| {
            let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
            keys["normalizer"] = prepend(prepended);
            keys["added_tokens"] = added.clone();
            Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
        };
        let text = "aq".repeat(1000);
        let error = parts(&"a".repeat(5000)).encode(&text).unwrap_err().to_string();
        assert!(error.contains("its normalizer makes"), "{error}");
        assert_eq!(parts("bb").encode(&text).unwrap().len(), 4000);
        assert_eq!(with(prepend("bb")).unwrap().encode(&text).unwrap().len(), 2002);
        // Here and there it may write much.
        let rare = with(replace("rare", &"a".repeat(5000))).unwrap();
        assert_eq!(rare.encode(&format!("rare {}", "b".repeat(4000))).unwrap().len(), 9001);
        let reading = Reading::default();
        reading.limit(WORD_BYTES * 20_000);
        let grows = with(replace("b", &"a".repeat(30))).unwrap();
        grows.encode_pieces("cb", &reading, |_| Ok(())).unwrap();
        let result = grows.encode_pieces(&"b".repeat(1000), &reading, |_| Ok(()));
        assert!(matches!(result, Err(DataError::Memory { .. })), "{result:?}");
    }
}
