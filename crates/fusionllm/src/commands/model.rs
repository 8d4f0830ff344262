//! A trained model from a checkpoint, a run directory or a Hugging Face folder.

use std::path::Path;

use anyhow::Context;
use fusionllm_broker::{load_model_dir, open_checkpoint};
use fusionllm_compnode::{NamedTensor, Tokenizer, read_shard};
use fusionllm_graph::OpDag;
use fusionllm_graph::Gpt2Config;

use crate::exit::bad_input;

/// A model with its parameters.
pub(super) struct TrainedModel {
    pub(super) dag: OpDag,
    pub(super) config: Option<Gpt2Config>,
    pub(super) tensors: Vec<NamedTensor>,
    pub(super) tokenizer: Tokenizer,
}

/// Reads whatever `path` is.
pub(super) fn open(path: &Path) -> anyhow::Result<TrainedModel> {
    if path.join("config.json").is_file() { open_hugging_face(path) } else { open_trained(path) }
}

/// Reads a checkpoint, or a run directory's newest one.
pub(super) fn open_trained(path: &Path) -> anyhow::Result<TrainedModel> {
    let checkpoint = open_checkpoint(path).map_err(bad_input)?;
    let dag = checkpoint.dag().clone();
    let names: Vec<String> = dag.params().iter().map(|p| p.name.clone()).collect();
    let tensors = read_shard(&checkpoint.weights_blob(&names).map_err(bad_input)?)?;
    let spec = &checkpoint.manifest().job;
    let tokenizer = Tokenizer::open(&spec.data.tokenizer).map_err(bad_input)?;
    let config = match &spec.model.path {
        None => spec.gpt2_config(),
        Some(dir) if dir.join("config.json").is_file() => Some(load_model_dir(dir, spec.data.seq_len)?.config),
        Some(_) => None,
    };
    Ok(TrainedModel { dag, config, tensors, tokenizer })
}

fn open_hugging_face(path: &Path) -> anyhow::Result<TrainedModel> {
    let config = fusionllm_broker::read_gpt2_config(path).map_err(bad_input)?;
    let model = load_model_dir(path, config.n_positions).map_err(bad_input)?;
    let weights = model.weights.as_deref().ok_or_else(|| {
        bad_input(format!("{}: no model.safetensors beside config.json", path.display()))
    })?;
    let names: Vec<String> = model.dag.params().iter().map(|p| p.name.clone()).collect();
    let blob = fusionllm_broker::weights_blob(weights, &names).map_err(bad_input)?;
    let tensors = read_shard(&blob)?;
    let tokenizer_file = path.join("tokenizer.json");
    let tokenizer = Tokenizer::open(tokenizer_file.to_str().context("the path is not UTF-8")?).map_err(bad_input)?;
    Ok(TrainedModel { dag: model.dag, config: Some(config), tensors, tokenizer })
}
