//! Whether a `tokenizer.json` gives each token an id of its own.

use std::collections::BTreeMap;

use serde_json::Value;

/// Refuses a file in which two tokens have one id: text would not come back as it was, and training could not tell them
/// apart.
pub(super) fn check(keys: &Value) -> Result<(), String> {
    let vocab = keys.pointer("/model/vocab").and_then(Value::as_object);
    let of_model = vocab.into_iter().flatten().map(|(token, id)| (token.as_str(), id.as_u64()));
    let added = keys.get("added_tokens").and_then(Value::as_array);
    let text = |token: &'_ Value| token.get("content").and_then(Value::as_str).map(str::to_owned);
    let added: Vec<(String, Option<u64>)> = added
        .into_iter()
        .flatten()
        .filter_map(|token| Some((text(token)?, token.get("id").and_then(Value::as_u64))))
        .collect();
    let mut by_id: BTreeMap<u64, &str> = BTreeMap::new();
    for (token, id) in of_model.chain(added.iter().map(|(token, id)| (token.as_str(), *id))) {
        let Some(id) = id else { continue };
        match by_id.insert(id, token) {
            Some(other) if other != token => {
                return Err(format!(
                    "the tokens {other:?} and {token:?} both have the id {id}: each needs one of its own"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    #[test]
    fn two_tokens_with_one_id_are_refused_and_named() {
        let whole: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        let added = |content: &str, id: u64| {
            serde_json::json!([{ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                                 "normalized": false, "special": true }])
        };
        let open = |keys: &Value| Tokenizer::from_json(keys.to_string(), "tok.json").map(|_| ());
        let error = |keys: &Value| open(keys).unwrap_err().to_string();
        let mut keys = whole.clone();
        keys["model"]["vocab"]["b"] = 97.into();
        assert!(error(&keys).contains("the tokens \"a\" and \"b\" both have the id 97"), "{}", error(&keys));
        let mut keys = whole.clone();
        keys["added_tokens"] = added("<end>", 97);
        assert!(error(&keys).contains("\"a\" and \"<end>\" both have the id 97"), "{}", error(&keys));
        // A token of the model that is listed once more is still one.
        keys["added_tokens"] = added("a", 97);
        open(&keys).unwrap();
        keys["added_tokens"] = added("<end>", 256);
        open(&keys).unwrap();
    }
}
