//! A Hugging Face directory: sizes, weights in one file or in shards, and the files beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::{HuggingFaceModel, Model, OpDag, read_json};
use fusionllm_protocol::WeightsChoice;
use fusionllm_protocol::hugging_face::{CARRIED, CONFIG, INDEX, WEIGHTS};
use fusionllm_transport::read_regular_text;
use serde_json::{Map, Value};

use super::{LoadedModel, ModelNote, graph_error, model_error};
use crate::BrokerError;
use crate::checkpoint::TensorSet;
use crate::files::named_error;

/// Names that are listed one by one in a sentence.
const LISTED: usize = 4;

/// What a directory is read for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The graph alone.
    Graph,
    /// Training or writing, from these weights; new ones are drawn from the seed.
    Weights { choice: WeightsChoice, seed: u64 },
}

/// Reads a directory. `dropout` and `seq_len` are functions of what its config says.
pub(super) fn read(
    folder: &Path,
    dropout: f64,
    seq_len: impl FnOnce(&Model) -> usize,
    purpose: Purpose,
) -> Result<LoadedModel, BrokerError> {
    let path = folder.join(CONFIG);
    let text = read_regular_text(&path).map_err(|e| {
        named_error(&path, e, |e| {
            model_error(&path, format!("not readable ({e}), expected a Hugging Face directory of a model"))
        })
    })?;
    let fail = |source| graph_error(&path.display().to_string(), source);
    let HuggingFaceModel { model, passed_over, keys } = Model::from_hugging_face(&text).map_err(fail)?;
    let mut notes = Vec::new();
    notes.extend(passed_over.iter().map(|what| ModelNote::Unusual(format!("of config.json is passed over: {what}"))));
    let model = model.with_dropout(dropout).map_err(fail)?;
    let seq_len = seq_len(&model);
    let dag = model.build(seq_len).map_err(fail)?;
    let weights = match purpose {
        Purpose::Graph => None,
        Purpose::Weights { choice: WeightsChoice::New, seed } => {
            notes.push(super::new_weights(seed));
            notes.extend(other_initial_values(&keys, &model).map(ModelNote::Unusual));
            None
        }
        Purpose::Weights { choice: WeightsChoice::Model, .. } => {
            let (weights, said) = read_weights(folder, &dag, &model)?;
            notes.extend(said);
            Some(Arc::new(weights))
        }
    };
    notes.extend(other_dropout(&keys, dropout).map(ModelNote::Unusual));
    let carried = Arc::new(carried(folder)?);
    Ok(LoadedModel { dag, config: Some(model), weights, carried, notes })
}

/// The files that training does not change, by name.
fn carried(folder: &Path) -> Result<BTreeMap<String, String>, BrokerError> {
    let mut files = BTreeMap::new();
    for name in CARRIED {
        let path = folder.join(name);
        match read_regular_text(&path) {
            Ok(text) => drop(files.insert(name.to_owned(), text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(named_error(&path, e, |e| model_error(&path, format!("not readable: {e}")))),
        }
    }
    Ok(files)
}

/// Dropout that the config asks for and the job does not.
fn other_dropout(keys: &Map<String, Value>, dropout: f64) -> Option<String> {
    let asked: Vec<String> = ["embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout"]
        .into_iter()
        .filter_map(|key| Some((key, keys.get(key)?.as_f64()?)))
        .filter(|&(key, p)| p != if key.starts_with("att") { 0.0 } else { dropout })
        .map(|(key, p)| format!("{key} = {p}"))
        .collect();
    (!asked.is_empty()).then(|| {
        format!(
            "dropout: {dropout} by model.dropout; what config.json says ({}) is passed over, and attention has none",
            asked.join(", ")
        )
    })
}

/// Initial values that the config asks for and new weights do not have.
fn other_initial_values(keys: &Map<String, Value>, model: &Model) -> Option<String> {
    let range = keys.get("initializer_range")?.as_f64()?;
    let drawn = model.initial_deviation();
    (range != drawn).then(|| {
        format!("initial values: standard deviation {drawn}, config.json's initializer_range = {range} is passed over")
    })
}

/// The weights, and what must be said of them.
fn read_weights(folder: &Path, dag: &OpDag, model: &Model) -> Result<(TensorSet, Vec<ModelNote>), BrokerError> {
    let mut unusual = Vec::new();
    let (files, index) = find_weights(folder, &mut unusual)?;
    let (set, unused) = TensorSet::of_hugging_face(&files, dag, model)?;
    if let Some(index) = &index {
        index.check(&set, dag)?;
    }
    let names: Vec<String> = files.iter().skip(1).filter_map(|f| Some(f.file_name()?.to_str()?.to_owned())).collect();
    let first = files.first().map(|f| f.display().to_string()).unwrap_or_default();
    let others = if names.is_empty() { String::new() } else { format!(", {}", listed(&names)) };
    if !unused.is_empty() {
        unusual.push(format!("tensors of these files that the model does not use: {}", listed(&backticked(&unused))));
    }
    set.check_head(dag, model)?;
    let notes = std::iter::once(ModelNote::Weights(format!("{first}{others}")));
    let notes = notes.chain(unusual.into_iter().map(ModelNote::Unusual)).collect();
    Ok((set, notes))
}

/// The files with the weights, and their index if there are several.
fn find_weights(folder: &Path, unusual: &mut Vec<String>) -> Result<(Vec<PathBuf>, Option<Index>), BrokerError> {
    let (whole, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    if whole.exists() {
        if index.exists() {
            unusual.push(format!("{INDEX} is passed over: {WEIGHTS} is there as a whole"));
        }
        return Ok((vec![whole], None));
    }
    if index.exists() {
        let index = Index::read(&index)?;
        let shards: BTreeSet<&String> = index.shard_of.values().collect();
        let files: Vec<PathBuf> = shards.into_iter().map(|shard| folder.join(shard)).collect();
        let missing: Vec<String> = files.iter().filter(|f| !f.is_file()).map(|f| f.display().to_string()).collect();
        if !missing.is_empty() {
            let what = if missing.len() == 1 { "a shard is missing" } else { "shards are missing" };
            return Err(model_error(&index.path, format!("{what}: {}", listed(&missing))));
        }
        return Ok((files, Some(index)));
    }
    let others = other_weights(folder);
    let begin = "model.weights = \"new\" begins anew";
    let reason = match others.first() {
        None => format!("there is no {WEIGHTS} and no {INDEX} in it, so no weights to start from; {begin}"),
        Some(first) if others.iter().all(|name| name.ends_with(".safetensors")) => format!(
            "there is no {WEIGHTS} and no {INDEX} that says what `{first}` belongs to, so no weights to start from; {begin}"
        ),
        Some(_) => format!(
            "its weights are in {}, expected {WEIGHTS} or {INDEX}: load it in transformers and save it with \
             `save_pretrained(..., safe_serialization=True)`; {begin}",
            listed(&backticked(&others))
        ),
    };
    Err(model_error(folder, reason))
}

/// Files that hold weights in forms that are not read.
fn other_weights(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    let ends = [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".bin.index.json", ".safetensors"];
    names.retain(|name| ends.iter().any(|end| name.ends_with(end)) && name != "training_args.bin");
    names.sort();
    names
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    /// Name of the file that has a tensor, by name of the tensor.
    shard_of: BTreeMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Self, BrokerError> {
        let fail = |reason: String| model_error(path, reason);
        let text = read_regular_text(path).map_err(|e| named_error(path, e, |e| fail(format!("not readable: {e}"))))?;
        let value: Value = read_json(text.as_bytes()).map_err(|e| fail(format!("not an index of shards: {e}")))?;
        let map = value.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty());
        let map = map.ok_or_else(|| fail("not an index of shards: it has no `weight_map` with tensors".to_owned()))?;
        let mut shard_of = BTreeMap::new();
        for (tensor, shard) in map {
            let plain = |s: &&str| !s.is_empty() && !s.contains(['/', '\\']) && !s.starts_with('.');
            let shard = shard.as_str().filter(plain).ok_or_else(|| {
                fail(format!("the shard of tensor `{tensor}` is {shard}, expected the name of a file beside it"))
            })?;
            shard_of.insert(tensor.clone(), shard.to_owned());
        }
        Ok(Self { path: path.to_owned(), shard_of })
    }

    /// Holds the index against the shards.
    fn check(&self, set: &TensorSet, dag: &OpDag) -> Result<(), BrokerError> {
        let fail = |reason: String| Err(model_error(&self.path, reason));
        for (tensor, shard) in &self.shard_of {
            if !set.file_has(shard, tensor) {
                return fail(format!("tensor `{tensor}` is to be in {shard}, but is not there"));
            }
        }
        for param in dag.params() {
            let stored = set.stored_name(&param.name).unwrap_or_default();
            if !self.shard_of.contains_key(stored) {
                return fail(format!("tensor `{stored}` is in a shard, but the index does not name it"));
            }
        }
        Ok(())
    }
}

fn backticked(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("`{name}`")).collect()
}

fn listed(names: &[String]) -> String {
    let mut text = names.get(..LISTED.min(names.len())).unwrap_or_default().join(", ");
    if names.len() > LISTED {
        text.push_str(&format!(" and {} more", names.len() - LISTED));
    }
    text
}

#[cfg(test)]
mod tests;
