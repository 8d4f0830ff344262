//! Export as the files that `transformers` loads: config.json, model.safetensors, tokenizer.json.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use fusionllm_graph::Gpt2Config;
use fusionllm_graph::OpDag;

use super::shard::write_shard;
use crate::ShardError;
use crate::data::Tokenizer;
use crate::executor::NamedTensor;

/// Writes the Hugging Face layout of a GPT-2 to `folder`, which is made if it is not there.
///
/// # Errors
/// [`ShardError`] if a parameter of the graph is missing or a file cannot be written.
pub fn export_hugging_face(
    folder: &Path,
    dag: &OpDag,
    config: &Gpt2Config,
    tensors: Vec<NamedTensor>,
    tokenizer: &Tokenizer,
) -> Result<(), ShardError> {
    let mut by_name: HashMap<String, NamedTensor> = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
    let mut params = Vec::new();
    for param in dag.params() {
        let fail = |reason: String| ShardError::Tensor { name: param.name.clone(), reason };
        let tensor = by_name.remove(&param.name).ok_or_else(|| fail("not in the checkpoint".to_owned()))?;
        if tensor.shape != param.shape {
            return Err(fail(format!("shape {:?}, expected {:?}", tensor.shape, param.shape)));
        }
        params.push(tensor);
    }
    let io = |source| ShardError::Io { path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    write_atomic(&folder.join("model.safetensors"), &write_shard(&params)?)?;
    write_atomic(&folder.join("tokenizer.json"), tokenizer.to_json().as_bytes())?;
    let tokenizer_config =
        serde_json::json!({ "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.n_positions });
    write_atomic(&folder.join("tokenizer_config.json"), format!("{tokenizer_config:#}\n").as_bytes())?;
    // config.json last: a folder without it is not taken for a model.
    write_atomic(&folder.join("config.json"), format!("{:#}\n", config_json(config)).as_bytes())
}

fn config_json(config: &Gpt2Config) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": null,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": true,
        "tie_word_embeddings": true,
        "bos_token_id": null,
        "eos_token_id": null,
        "torch_dtype": "float32"
    })
}

/// Writes to a temporary name, syncs, renames.
fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), ShardError> {
    let io = |source| ShardError::Io { path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let temporary = path.with_file_name(name);
    let mut file = File::create(&temporary).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
    std::fs::rename(&temporary, path).map_err(io)
}
