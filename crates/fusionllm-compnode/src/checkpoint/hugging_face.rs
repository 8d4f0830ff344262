//! Export as the files that `transformers` loads: config.json, model.safetensors, tokenizer.json.

use std::collections::BTreeMap;
use std::io::Write;

use fusionllm_graph::{Model, OpDag, read_json};
use fusionllm_protocol::hugging_face::{CARRIED, CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS};
use serde_json::{Map, Value};

use super::export_folder::ExportFolder;
use super::shard::write_shard_to;
use crate::data::Tokenizer;
use crate::executor::{LazyTensor, NamedTensor, by_name};
use crate::{ExportError, ShardError};

/// Writes the Hugging Face layout of a model to a folder, in place of an earlier export of the same there; `of` says of
/// what. A model of images is written under torchvision's names, and has no tokenizer. What training did not change of the directory that the model came from is in `carried`, by file name, and stays
/// as it was.
///
/// # Errors
/// [`ExportError`] if the folder holds something else, a parameter of the graph is missing or a file cannot be written.
pub fn export_hugging_face(
    (folder, of): (&ExportFolder, &str),
    dag: &OpDag,
    model: &Model,
    tensors: Vec<NamedTensor>,
    tokenizer: &Tokenizer,
    carried: &BTreeMap<String, String>,
) -> Result<(), ExportError> {
    let mut by_name = by_name(tensors);
    let mut params = Vec::new();
    for param in dag.params() {
        let fail = |reason: String| ShardError::Tensor { name: param.name.clone(), reason };
        let tensor = by_name.remove(&param.name).ok_or_else(|| fail("not in the checkpoint".to_owned()))?;
        if tensor.shape != param.shape {
            return Err(fail(format!("shape {:?}, expected {:?}", tensor.shape, param.shape)).into());
        }
        params.push(tensor);
    }
    let mut out = folder.take(of)?;
    let weights = folder.path().join(WEIGHTS);
    out.write(WEIGHTS, |out| {
        write_shard_to(out, &weights, params.into_iter().map(LazyTensor::from).collect()).map(|_| ())
    })?;
    let mut write_text = |name: &'static str, text: &str| {
        let io = |source| ShardError::Io { path: folder.path().join(name), source };
        out.write(name, |out| out.write_all(text.as_bytes()).map_err(io))
    };
    if model.is_of_images() {
        let mut keys = model.keys();
        keys.insert("architectures".to_owned(), serde_json::json!([model.architecture()]));
        keys.insert("model_type".to_owned(), model.model_type().into());
        write_text(CONFIG, &format!("{:#}\n", Value::Object(keys)))?;
        return Ok(out.finish()?);
    }
    write_text(TOKENIZER, &tokenizer.to_json())?;
    let tokenizer_config = serde_json::json!({ "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.longest_sequence() });
    let kept = |name: &str| carried.get(name).cloned();
    let tokenizer_config = kept(TOKENIZER_CONFIG).unwrap_or_else(|| format!("{tokenizer_config:#}\n"));
    write_text(TOKENIZER_CONFIG, &tokenizer_config)?;
    for name in CARRIED.into_iter().filter(|name| ![CONFIG, TOKENIZER, TOKENIZER_CONFIG].contains(name)) {
        if let Some(text) = kept(name) {
            write_text(name, &text)?;
        }
    }
    let config = config_json(model, carried.get(CONFIG).map(String::as_str), tokenizer);
    write_text(CONFIG, &format!("{config:#}\n"))?;
    Ok(out.finish()?)
}

/// The config of the directory that the model came from, with what training may have changed; a new one if it came
/// from none.
fn config_json(model: &Model, source: Option<&str>, tokenizer: &Tokenizer) -> Value {
    let source = source.and_then(|text| read_json(text.as_bytes()).ok());
    let (mut keys, dtype) = match source {
        Some(Value::Object(keys)) => {
            let dtype = if keys.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            (keys, dtype)
        }
        _ => (new_config(model, tokenizer), "torch_dtype"),
    };
    // A decoder was built from these very keys; of a GPT-2 the folder may have said less.
    if let Model::Gpt2(_) = model {
        keys.extend(model.keys());
    }
    keys.insert("architectures".to_owned(), serde_json::json!([model.architecture()]));
    keys.insert("model_type".to_owned(), model.model_type().into());
    keys.insert(dtype.to_owned(), "float32".into());
    Value::Object(keys)
}

fn new_config(model: &Model, tokenizer: &Tokenizer) -> Map<String, Value> {
    let mut keys = model.keys();
    let more = match model {
        Model::Gpt2(config) => serde_json::json!({
            "activation_function": "gelu_new",
            "n_ctx": config.n_positions,
            "n_inner": null,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
            "resid_pdrop": config.dropout,
            "scale_attn_weights": true,
            "tie_word_embeddings": true,
        }),
        Model::Decoder(config) => serde_json::json!({
            "max_position_embeddings": config.max_position_embeddings,
            "attention_dropout": 0.0,
            "use_cache": true,
        }),
        // It has no more to say, see above.
        Model::Resnet(_) => Value::Null,
    };
    if let Value::Object(more) = more {
        keys.extend(more);
    }
    keys.insert("bos_token_id".to_owned(), tokenizer.begin_of_text().into());
    keys.insert("eos_token_id".to_owned(), tokenizer.end_of_text().into());
    keys
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::Gpt2Config;

    use super::*;

    fn config() -> Model {
        Model::Gpt2(Gpt2Config {
            vocab_size: 256,
            n_positions: 8,
            n_embd: 4,
            n_layer: 1,
            n_head: 2,
            layer_norm_epsilon: 1e-5,
            dropout: 0.0,
        })
    }

    #[test]
    fn a_config_keeps_what_training_did_not_change() {
        let source = "\u{feff}{\"model_type\":\"gpt2\",\"n_positions\":99,\"bos_token_id\":0,\"eos_token_id\":3,\
                      \"attn_pdrop\":0.1,\"dtype\":\"bfloat16\",\"custom\":\"kept\"}";
        let written = config_json(&config(), Some(source), &Tokenizer::Bytes);
        for (key, value) in [
            ("bos_token_id", Value::from(0)),
            ("eos_token_id", 3.into()),
            ("attn_pdrop", 0.1.into()),
            ("custom", "kept".into()),
            ("n_positions", 8.into()),
            ("dtype", "float32".into()),
        ] {
            assert_eq!(written[key], value, "{key}");
        }
        assert!(written.get("torch_dtype").is_none());
        assert!(Model::from_hugging_face(&written.to_string()).is_ok());
    }

    #[test]
    fn a_new_config_has_the_tokenizers_end_of_text() {
        let mut keys: Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        keys["added_tokens"] = serde_json::json!([{
            "id": 256, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }]);
        let tokenizer = Tokenizer::from_json(keys.to_string(), "tok.json").unwrap();
        let written = config_json(&config(), None, &tokenizer);
        assert_eq!((&written["bos_token_id"], &written["eos_token_id"]), (&256.into(), &256.into()));
        let written = config_json(&config(), None, &Tokenizer::Bytes);
        assert_eq!((&written["eos_token_id"], &written["torch_dtype"]), (&Value::Null, &"float32".into()));
        assert!(Model::from_hugging_face(&written.to_string()).is_ok());
    }

    #[test]
    fn a_new_decoder_is_read_as_the_same() {
        for name in ["llama-3.2-1b", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b"] {
            let model = Model::named(name).unwrap();
            let written = config_json(&model, None, &Tokenizer::Bytes);
            let read = Model::from_hugging_face(&written.to_string()).unwrap();
            assert_eq!((read.model, read.passed_over), (model, Vec::new()), "{name}");
        }
    }
}
