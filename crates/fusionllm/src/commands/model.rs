//! A trained model from a checkpoint, a run directory or a Hugging Face folder.

use std::path::Path;

use anyhow::Context;
use fusionllm_broker::{TensorSet, load_model_dir, open_checkpoint};
use fusionllm_compnode::{NamedTensor, Tokenizer, read_shard};
use fusionllm_graph::{Gpt2Config, OpDag};
use tempfile::NamedTempFile;

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
    let tensors = read_tensors(checkpoint.tensors(), &dag)?;
    let spec = &checkpoint.manifest().job;
    let tokenizer = Tokenizer::open(&spec.data.tokenizer).map_err(bad_input)?;
    Ok(TrainedModel { config: Gpt2Config::of(&dag), dag, tensors, tokenizer })
}

fn open_hugging_face(path: &Path) -> anyhow::Result<TrainedModel> {
    let model = load_model_dir(path).map_err(bad_input)?;
    let missing = || bad_input(format!("{}: no model.safetensors beside config.json", path.display()));
    let weights = model.weights.ok_or_else(missing)?;
    let tensors = TensorSet::of_hugging_face(&weights, &model.dag).map_err(bad_input)?;
    let tensors = read_tensors(&tensors, &model.dag)?;
    let tokenizer_file = path.join("tokenizer.json");
    let tokenizer = Tokenizer::open(tokenizer_file.to_str().context("the path is not UTF-8")?).map_err(bad_input)?;
    Ok(TrainedModel { dag: model.dag, config: model.config, tensors, tokenizer })
}

/// The parameters, by way of a file: element types are widened there.
fn read_tensors(tensors: &TensorSet, dag: &OpDag) -> anyhow::Result<Vec<NamedTensor>> {
    let names: Vec<String> = dag.params().iter().map(|p| p.name.clone()).collect();
    let file = NamedTempFile::new().context("cannot make a temporary file")?;
    tensors.write_part(&names, file.path()).map_err(bad_input)?;
    Ok(read_shard(&std::fs::read(file.path())?)?)
}
