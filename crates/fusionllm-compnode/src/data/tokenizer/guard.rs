//! The tokenizers library panics on some contents of a file. That is an error of the file, and not of ours.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::FileTokenizer;
use crate::DataError;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread, now, will be told as an error of a file. For a panic hook.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Calls a library that may panic. What it may leave behind half changed must not be used after an error.
pub(in crate::data) fn guarded<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(format!("it cannot be used, what computes by it fails on something in it ({text})"))
    })
}

impl FileTokenizer {
    /// The same for a use of this file.
    pub(in crate::data) fn guarded<T>(&self, call: impl FnOnce() -> Result<T, DataError>) -> Result<T, DataError> {
        guarded(|| Ok(call())).map_err(|reason| self.fail(reason)).and_then(|result| result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokenizer;

    #[test]
    fn a_panic_of_the_library_names_the_file() {
        let bytes = Tokenizer::Bytes.to_json();
        let with = |key: &str, value: &str| {
            let mut keys: serde_json::Value = serde_json::from_str(&bytes).unwrap();
            keys[key] = serde_json::from_str(value).unwrap();
            Tokenizer::from_json(keys.to_string(), "tok.json")
        };
        let charsmap = with("normalizer", r#"{"type":"Precompiled","precompiled_charsmap":"AAAA"}"#);
        let error = charsmap.unwrap_err().to_string();
        assert!(error.contains("tok.json") && error.contains("cannot be used"), "{error}");
        for (key, value) in [
            ("normalizer", r#"{"type":"Replace","pattern":{"String":""},"content":"x"}"#),
            ("normalizer", r#"{"type":"Prepend","prepend":""}"#),
            ("pre_tokenizer", r#"{"type":"FixedLength","length":0}"#),
        ] {
            let used = with(key, value).and_then(|tokenizer| tokenizer.encode("a text").map(drop));
            // Whether it works or not, it ends nothing else.
            assert!(used.is_ok() || used.unwrap_err().to_string().contains("tok.json"), "{value}");
        }
        let strip = with("decoder", r#"{"type":"Strip","content":"e","start":5,"stop":5}"#).unwrap();
        let ids = strip.encode("eee").unwrap();
        assert!(strip.decode(&ids).is_ok_and(|text| text.len() < 3) || strip.decode(&ids).is_err());
        assert!(!is_guarded());
    }
}
