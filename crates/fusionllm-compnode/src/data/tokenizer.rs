//! Text as token ids: bytes, or a Hugging Face tokenizer.

mod around;
mod coverage;
mod growth;
mod guard;
mod ids;
mod implied;
mod long_words;
mod normalizer;
mod pieces;
mod told;

use std::path::Path;
use std::sync::{Arc, Mutex};

use fusionllm_graph::{in_plain_words, read_json, without_byte_order_mark};
use fusionllm_protocol::{DataSpec, TokenizerFingerprint, content_hash};
use fusionllm_transport::{is_shortage, read_text};
use serde_json::Value;
use tokenizers::Model;
use tokenizers::models::ModelWrapper;

use super::{ReadableData, Reading};
use crate::DataError;
use around::{Around, for_a_corpus};
pub(crate) use coverage::{Coverage, pieces};
use growth::Growth;
pub(super) use guard::guarded;
pub use guard::is_guarded;
use normalizer::Effects;
pub(crate) use told::Told;

/// Where the tokenizer of a model's directory is said to lie.
const OF_MODEL: &str = "tokenizer.json of model.path";

/// Tokens that end a text, and those that begin one, by the names they usually have.
const END: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"];
const BEGIN: [&str; 5] = ["<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"];

/// How text becomes token ids.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// Each UTF-8 byte is a token: a vocabulary of 256 and nothing to download.
    Bytes,
    /// A `tokenizer.json` of Hugging Face.
    HuggingFace(Box<FileTokenizer>),
}

/// A `tokenizer.json`, ready to read a corpus.
#[derive(Clone, Debug)]
pub struct FileTokenizer {
    /// Without what is meant for single inputs of a model: truncation, padding, special tokens around the text, and
    /// merges left out at random.
    inner: tokenizers::Tokenizer,
    /// The file as it was read.
    source: String,
    name: String,
    passed_over: Vec<String>,
    /// The special tokens that the file puts before and after a text.
    around: Around,
    /// Id of the token that stands for what is not known.
    unknown: Option<i32>,
    /// Whether every byte of any text becomes tokens.
    keeps_everything: bool,
    /// What it may put before the pieces of a text.
    puts_before: Vec<String>,
    /// By how much a text may grow on its way.
    growth: Growth,
    /// What is known of what its normalizer does.
    effects: Arc<Mutex<Effects>>,
}

impl Tokenizer {
    /// `bytes`, or the path of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the file cannot be read.
    pub fn open(name: &str) -> Result<Self, DataError> {
        Self::open_within(name, &ReadableData::everything())
    }

    fn open_within(name: &str, readable: &ReadableData) -> Result<Self, DataError> {
        if name == DataSpec::BYTES {
            return Ok(Self::Bytes);
        }
        let fail = |reason: String| DataError::Tokenizer { path: name.to_owned(), reason };
        let unopened = |error: std::io::Error| match is_shortage(&error) {
            true => DataError::Unopened { what: "data.tokenizer", source: error },
            false => fail(error.to_string()),
        };
        match std::fs::metadata(name) {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Err(fail("no regular file".to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(fail("no such file".to_owned())),
            Err(e) => return Err(unopened(e)),
        }
        let file = readable.open(Path::new(name)).map_err(unopened)?;
        Self::from_json(read_text(file).map_err(unopened)?, name)
    }

    /// The tokenizer of a job. `of_model` is the content of the tokenizer.json in the model's directory, if it has one;
    /// an OP-DAG file has none and takes bytes.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the file cannot be read.
    pub fn of_job(spec: &DataSpec, of_model: Option<&str>) -> Result<Self, DataError> {
        Self::of_job_within(spec, of_model, &ReadableData::everything())
    }

    /// The same for a job of somebody else, who may have read only what is `readable`.
    ///
    /// # Errors
    /// As [`Self::of_job`], and [`DataError::NotReadable`].
    pub fn of_job_within(spec: &DataSpec, of_model: Option<&str>, readable: &ReadableData) -> Result<Self, DataError> {
        readable.check(spec)?;
        match of_model {
            Some(source) if spec.tokenizer == DataSpec::MODEL => Self::from_json(source.to_owned(), OF_MODEL),
            None if spec.tokenizer == DataSpec::MODEL => Ok(Self::Bytes),
            _ => Self::open_within(&spec.tokenizer, readable),
        }
    }

    /// A `tokenizer.json`, by its content; `name` says in messages where it lies.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if it is none.
    pub fn from_json(source: String, name: &str) -> Result<Self, DataError> {
        let fail = |reason: String| DataError::Tokenizer { path: name.to_owned(), reason };
        let text = without_byte_order_mark(&source);
        let keys: Value = read_json(text.as_bytes()).map_err(fail)?;
        // The library does not call it by its name.
        if keys.is_object() && keys.get("model").is_none() {
            return Err(fail("`model` is missing".to_owned()));
        }
        ids::check(&keys).map_err(fail)?;
        let tokenizer = guarded(|| {
            let mut inner: tokenizers::Tokenizer =
                text.parse().map_err(|e: tokenizers::Error| in_plain_words("", &e.to_string()))?;
            let (passed_over, around) = for_a_corpus(&mut inner).map_err(|e| e.to_string())?;
            let keeps_everything = keeps_everything(&inner, &keys);
            let unknown = unknown_token(&inner, &keys);
            growth::check_decoder(inner.get_decoder())?;
            let growth = Growth::of(inner.get_normalizer(), inner.get_pre_tokenizer())?;
            let puts_before = implied::texts_before(inner.get_normalizer(), inner.get_pre_tokenizer());
            let (name, source, effects) = (name.to_owned(), source.clone(), Arc::default());
            Ok(FileTokenizer {
                inner,
                source,
                name,
                passed_over,
                around,
                unknown,
                keeps_everything,
                puts_before,
                growth,
                effects,
            })
        });
        Ok(Self::HuggingFace(Box::new(tokenizer.map_err(fail)?)))
    }

    /// Token ids of a text, all of it, without special tokens around it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses it.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, DataError> {
        match self {
            Self::Bytes => Ok(text.bytes().map(i32::from).collect()),
            Self::HuggingFace(tokenizer) => tokenizer.guarded(|| {
                tokenizer.check_growth(text, &Reading::default())?;
                let encoding = tokenizer.inner.encode_fast(text, false).map_err(|e| tokenizer.fail(e.to_string()))?;
                encoding.get_ids().iter().map(|&id| tokenizer.id(id)).collect()
            }),
        }
    }

    /// What of a text gives no token.
    pub(crate) fn coverage(&self, text: &str) -> Result<Coverage, DataError> {
        match self {
            Self::HuggingFace(tokenizer) if !tokenizer.keeps_everything => tokenizer.guarded(|| {
                tokenizer.check_growth(text, &Reading::default())?;
                coverage::count(&tokenizer.inner, &tokenizer.effects, text).map_err(|e| tokenizer.fail(e.to_string()))
            }),
            Self::Bytes | Self::HuggingFace(_) => Ok(Coverage::whole(text)),
        }
    }

    /// Takes in what the tokens of a part of a text stand for.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses it.
    pub(crate) fn tell(&self, part: &str, told: &mut Told) -> Result<(), DataError> {
        let Self::HuggingFace(tokenizer) = self else { return Ok(()) };
        if (tokenizer.keeps_everything && tokenizer.puts_before.is_empty()) || !told.is_due() {
            return Ok(());
        }
        tokenizer.guarded(|| {
            tokenizer.check_growth(part, &Reading::default())?;
            let encode = |text: &str| tokenizer.inner.encode(text, false).map_err(|e| tokenizer.fail(e.to_string()));
            let encoding = encode(part)?;
            let offsets = encoding.get_offsets();
            let tokens = encoding.get_ids().iter().copied().zip(offsets.iter().copied());
            let added = tokenizer.inner.get_added_tokens_decoder();
            match tokenizer.keeps_everything {
                true => told.add_whole(part),
                false => told.add(part, &tokens.collect::<Vec<_>>(), |id| added.contains_key(&id)),
            }
            if tokenizer.puts_before.is_empty() {
                return Ok(());
            }
            let words = encoding.get_word_ids();
            let begins = words.iter().zip(words.iter().skip(1)).zip(offsets.iter().skip(1));
            let starts = begins.filter(|((before, word), _)| before != word).map(|(_, (at, _))| *at);
            told.add_starts(part, starts, &tokenizer.puts_before, |text| {
                let encoding = tokenizer.guarded(|| encode(text)).ok()?;
                Some(encoding.get_ids().to_vec())
            });
            Ok(())
        })
    }

    /// The characters of a text that give no token, for a message; nothing if all do.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses the text.
    pub fn dropped(&self, text: &str) -> Result<Option<String>, DataError> {
        let coverage = self.coverage(text)?;
        Ok((coverage.lost() > 0).then(|| coverage.named()))
    }

    /// The text of token ids; what is not valid UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[i32]) -> Result<String, DataError> {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::HuggingFace(tokenizer) => {
                let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
                let decode = || tokenizer.inner.decode(&ids, false).map_err(|e| tokenizer.fail(e.to_string()));
                tokenizer.guarded(decode)
            }
        }
    }

    /// The tokenizer as a `tokenizer.json`: the file as it was. For bytes: a byte-level BPE without merges, whose ids
    /// are the bytes.
    pub fn to_json(&self) -> String {
        match self {
            Self::Bytes => bytes_json(),
            Self::HuggingFace(tokenizer) => tokenizer.source.clone(),
        }
    }

    /// `bytes`, or where its file lies.
    pub fn name(&self) -> &str {
        match self {
            Self::Bytes => DataSpec::BYTES,
            Self::HuggingFace(tokenizer) => &tokenizer.name,
        }
    }

    /// Ids of the special tokens that the file itself puts before and after a text (`post_processor`). A corpus that is
    /// read whole has none.
    pub fn around(&self) -> (Vec<i32>, Vec<i32>) {
        match self {
            Self::Bytes => (Vec::new(), Vec::new()),
            Self::HuggingFace(tokenizer) => tokenizer.around.clone(),
        }
    }

    /// Entries of a vocabulary that has room for every id, added tokens included.
    pub fn entries(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::HuggingFace(tokenizer) => {
                let added = tokenizer.inner.get_added_tokens_decoder().keys().max().map_or(0, |&id| id as usize + 1);
                added.max(tokenizer.trained_entries())
            }
        }
    }

    /// The same without what a text need not hold: added tokens, and bytes that are none of its characters.
    pub(crate) fn trained_entries(&self) -> usize {
        match self {
            Self::Bytes => 0,
            Self::HuggingFace(tokenizer) => tokenizer.trained_entries(),
        }
    }

    /// Id of the token that stands for what is not known.
    pub(crate) fn unknown(&self) -> Option<i32> {
        match self {
            Self::Bytes => None,
            Self::HuggingFace(tokenizer) => tokenizer.unknown,
        }
    }

    /// Id of the token that begins a text.
    pub(crate) fn begin_of_text(&self) -> Option<u32> {
        BEGIN.iter().find_map(|name| self.special_id(name))
    }

    /// Id of the token that ends a text.
    pub(crate) fn end_of_text(&self) -> Option<u32> {
        END.iter().find_map(|name| self.special_id(name))
    }

    /// Id of a token that is special by the file.
    fn special_id(&self, token: &str) -> Option<u32> {
        let Self::HuggingFace(tokenizer) = self else { return None };
        let id = tokenizer.inner.token_to_id(token)?;
        tokenizer.inner.get_added_tokens_decoder().get(&id).filter(|token| token.special).map(|_| id)
    }

    /// What of the file does not touch a corpus, as sentences.
    pub(crate) fn passed_over(&self) -> &[String] {
        match self {
            Self::Bytes => &[],
            Self::HuggingFace(tokenizer) => &tokenizer.passed_over,
        }
    }

    /// What a later start is held against.
    pub fn fingerprint(&self) -> TokenizerFingerprint {
        let hash = match self {
            Self::Bytes => content_hash(DataSpec::BYTES.as_bytes()),
            Self::HuggingFace(tokenizer) => content_hash(tokenizer.source.as_bytes()),
        };
        TokenizerFingerprint { name: self.name().to_owned(), entries: self.entries() as u64, hash }
    }
}

impl FileTokenizer {
    fn fail(&self, reason: String) -> DataError {
        DataError::Tokenizer { path: self.name.clone(), reason }
    }

    fn id(&self, id: u32) -> Result<i32, DataError> {
        i32::try_from(id).map_err(|_| self.fail(format!("token id {id} is out of range")))
    }

    fn trained_entries(&self) -> usize {
        self.inner.get_vocab(false).values().max().map_or(0, |&id| id as usize + 1)
    }
}

/// Whether no character of any text can be dropped: byte-level, with a token for each byte, and nothing that takes text
/// away before.
fn keeps_everything(tokenizer: &tokenizers::Tokenizer, keys: &Value) -> bool {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return false };
    let steps = match keys.pointer("/pre_tokenizer/pretokenizers").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => keys.get("pre_tokenizer").cloned().into_iter().collect(),
    };
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let removes = |step: &Value| step.get("behavior").and_then(Value::as_str) == Some("Removed");
    let keeps = |step: &Value| ["ByteLevel", "Split", "Digits"].contains(&kind(step).as_str()) && !removes(step);
    tokenizer.get_normalizer().is_none()
        && tokenizer.get_added_tokens_decoder().values().all(|token| !token.lstrip && !token.rstrip)
        && steps.iter().all(keeps)
        && steps.iter().any(|step| kind(step) == "ByteLevel")
        && bpe.continuing_subword_prefix.is_none()
        && bpe.end_of_word_suffix.is_none()
        && byte_characters().iter().all(|c| bpe.token_to_id(&c.to_string()).is_some())
}

fn unknown_token(tokenizer: &tokenizers::Tokenizer, keys: &Value) -> Option<i32> {
    let named = keys.pointer("/model/unk_token").and_then(Value::as_str).and_then(|token| tokenizer.token_to_id(token));
    let numbered = keys.pointer("/model/unk_id").and_then(Value::as_u64);
    i32::try_from(numbered.or(named.map(u64::from))?).ok()
}

fn bytes_json() -> String {
    let vocab: serde_json::Map<String, serde_json::Value> =
        byte_characters().iter().enumerate().map(|(byte, c)| (c.to_string(), byte.into())).collect();
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let document = serde_json::json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    });
    format!("{document:#}\n")
}

/// GPT-2's table of a printable character for every byte: bytes that print stand for themselves, the others are
/// numbered upwards from U+0100.
fn byte_characters() -> [char; 256] {
    let mut table = ['\0'; 256];
    let mut next = 0x100u32;
    for (byte, slot) in table.iter_mut().enumerate() {
        let prints = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if prints {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        *slot = char::from_u32(code).unwrap_or('\u{fffd}');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn main() { let größe = \"日本\"; }\n\t\u{0}";

    #[test]
    fn bytes_round_trip() {
        let ids = Tokenizer::Bytes.encode(TEXT).unwrap();
        assert_eq!(ids.len(), TEXT.len());
        assert_eq!(Tokenizer::Bytes.decode(&ids).unwrap(), TEXT);
    }

    #[test]
    fn the_exported_tokenizer_gives_the_same_ids() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, Tokenizer::Bytes.to_json()).unwrap();
        let exported = Tokenizer::open(path.to_str().unwrap()).unwrap();
        assert_eq!(exported.encode(TEXT).unwrap(), Tokenizer::Bytes.encode(TEXT).unwrap());
        assert_eq!(exported.decode(&exported.encode(TEXT).unwrap()).unwrap(), TEXT);
    }

    #[test]
    fn what_a_tokenizer_does_to_single_inputs_does_not_touch_a_corpus() {
        let plain = Tokenizer::Bytes.to_json();
        let mut keys: Value = serde_json::from_str(&plain).unwrap();
        keys["truncation"] =
            serde_json::json!({ "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 });
        keys["padding"] = serde_json::json!({
            "strategy": { "Fixed": 99 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "x"
        });
        keys["post_processor"] = serde_json::json!({
            "type": "BertProcessing", "sep": ["a", 97], "cls": ["b", 98]
        });
        keys["model"]["dropout"] = serde_json::json!(0.5);
        let source = keys.to_string();
        let tokenizer = Tokenizer::from_json(format!("\u{feff}{source}"), "tok.json").unwrap();
        let (ids, expected) = (tokenizer.encode(TEXT).unwrap(), Tokenizer::Bytes.encode(TEXT).unwrap());
        assert_eq!(ids, expected);
        assert_eq!(tokenizer.passed_over(), ["truncation to 3 tokens", "padding", "dropout of merges (0.5)"]);
        // A corpus says what of this it passes over, too.
        assert_eq!(tokenizer.around(), (vec![98], vec![97]));
        // It goes on as it was.
        assert_eq!(tokenizer.to_json(), format!("\u{feff}{source}"));
        assert_eq!((tokenizer.entries(), tokenizer.trained_entries()), (256, 256));
        assert_eq!(tokenizer.dropped("größe").unwrap(), None);
    }

    #[test]
    fn a_job_takes_the_models_tokenizer_if_it_says_so() {
        let mut spec = fusionllm_protocol::JobSpec::from_toml("[model]\npath = \"m\"\n[data]\npath = \"x\"\n", &[]);
        let spec = &mut spec.as_mut().unwrap().data;
        let source = Tokenizer::Bytes.to_json();
        let tokenizer = Tokenizer::of_job(spec, Some(&source)).unwrap();
        assert_eq!(tokenizer.name(), "tokenizer.json of model.path");
        assert_eq!(Tokenizer::of_job(spec, None).unwrap().name(), "bytes");
        spec.tokenizer = "bytes".to_owned();
        assert_eq!(Tokenizer::of_job(spec, Some(&source)).unwrap().name(), "bytes");
        assert_ne!(tokenizer.fingerprint().hash, Tokenizer::Bytes.fingerprint().hash);
    }

    #[test]
    fn a_file_that_no_tokenizer_fills_is_not_read_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        let error = Tokenizer::open(file.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("it is longer than 256 MiB"), "{error}");
    }

    #[test]
    fn a_file_without_a_model_says_which_key_is_missing() {
        let error = Tokenizer::from_json("{}".to_owned(), "tok.json").unwrap_err().to_string();
        assert!(error.contains("`model` is missing"), "{error}");
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let error = Tokenizer::open("/nowhere/tokenizer.json").unwrap_err().to_string();
        assert_eq!(
            error,
            "data.tokenizer /nowhere/tokenizer.json: no such file; expected `bytes` or the path of a tokenizer.json"
        );
    }
}
