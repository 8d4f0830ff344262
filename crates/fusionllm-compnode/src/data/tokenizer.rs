//! Text as token ids: bytes, or a Hugging Face tokenizer.

use std::path::Path;

use crate::DataError;

/// How text becomes token ids.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// Each UTF-8 byte is a token: a vocabulary of 256 and nothing to download.
    Bytes,
    /// A `tokenizer.json` of Hugging Face.
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// `bytes`, or the path of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the file cannot be read.
    pub fn open(name: &str) -> Result<Self, DataError> {
        if name == "bytes" {
            return Ok(Self::Bytes);
        }
        if !Path::new(name).is_file() {
            let reason = "no such file".to_owned();
            return Err(DataError::Tokenizer { path: name.to_owned(), reason });
        }
        match tokenizers::Tokenizer::from_file(name) {
            Ok(tokenizer) => Ok(Self::HuggingFace(Box::new(tokenizer))),
            Err(e) => Err(DataError::Tokenizer { path: name.to_owned(), reason: e.to_string() }),
        }
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer refuses it.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, DataError> {
        match self {
            Self::Bytes => Ok(text.bytes().map(i32::from).collect()),
            Self::HuggingFace(tokenizer) => {
                let fail = |reason: String| DataError::Tokenizer { path: "tokenizer.json".to_owned(), reason };
                let encoding = tokenizer.encode_fast(text, false).map_err(|e| fail(e.to_string()))?;
                let id = |&id: &u32| i32::try_from(id).map_err(|_| fail(format!("token id {id} is out of range")));
                encoding.get_ids().iter().map(id).collect()
            }
        }
    }

    /// The text of token ids; what is not valid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[i32]) -> String {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Self::HuggingFace(tokenizer) => {
                let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
                tokenizer.decode(&ids, false).unwrap_or_default()
            }
        }
    }

    /// The tokenizer as a `tokenizer.json`. For bytes: a byte-level BPE without merges, whose ids are the bytes.
    pub fn to_json(&self) -> String {
        match self {
            Self::Bytes => bytes_json(),
            Self::HuggingFace(tokenizer) => tokenizer.to_string(true).unwrap_or_default(),
        }
    }
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
        assert_eq!(Tokenizer::Bytes.decode(&ids), TEXT);
    }

    #[test]
    fn the_exported_tokenizer_gives_the_same_ids() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, Tokenizer::Bytes.to_json()).unwrap();
        let exported = Tokenizer::open(path.to_str().unwrap()).unwrap();
        assert_eq!(exported.encode(TEXT).unwrap(), Tokenizer::Bytes.encode(TEXT).unwrap());
        assert_eq!(exported.decode(&exported.encode(TEXT).unwrap()), TEXT);
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
