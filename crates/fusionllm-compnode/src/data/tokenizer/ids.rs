//! Whether a `tokenizer.json` gives each token an id of its own.

use std::collections::BTreeMap;

use serde_json::Value;

/// Refuses a file in which two tokens have one id: text would not come back as it was, and training could not tell them
/// apart.
pub(super) fn check(keys: &Value) -> Result<(), String> {
    let vocab = keys.pointer("/model/vocab");
    let named = vocab.and_then(Value::as_object).into_iter().flatten();
    let named = named.map(|(token, id)| (token.as_str(), id.as_u64()));
    // Of Unigram each entry is a token and its score, and its place is its id.
    let listed = (0..).zip(vocab.and_then(Value::as_array).into_iter().flatten());
    let listed = listed.filter_map(|(id, entry)| Some((entry.get(0)?.as_str()?, Some(id))));
    let of_model = named.chain(listed);
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

    #[test]
    fn the_ids_of_a_list_are_its_places() {
        let keys = |content: &str, id: u64| {
            serde_json::json!({ "model": { "type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]] },
                                "added_tokens": [{ "id": id, "content": content }] })
        };
        let error = check(&keys("<end>", 2)).unwrap_err();
        assert!(error.contains("\"b\" and \"<end>\" both have the id 2"), "{error}");
        check(&keys("b", 2)).unwrap();
        check(&keys("<end>", 3)).unwrap();
    }
}
