//! A trained model from a checkpoint, a run directory or a Hugging Face folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use fusionllm_broker::{Checkpoint, ModelNote, TensorSet, load_model_dir, open_checkpoint};
use fusionllm_compnode::{AdapterOrigin, NamedTensor, Tokenizer, merge_adapters, read_shard};
use fusionllm_graph::{Model, OpDag, read_json};
use fusionllm_protocol::hugging_face::{ADAPTER_CONFIG, CONFIG, TOKENIZER, is_base};
use fusionllm_protocol::{DataSpec, JobSpec, TokenizerFingerprint};

use crate::exit::{bad_input, refused};

/// A model with its parameters.
pub(super) struct TrainedModel {
    pub(super) dag: OpDag,
    pub(super) config: Option<Model>,
    pub(super) tensors: Vec<NamedTensor>,
    pub(super) tokenizer: Tokenizer,
    /// Which run or folder it is of, in words.
    pub(super) origin: String,
    /// Steps that it was trained for, and where the checkpoint lies; nothing of a Hugging Face folder.
    pub(super) trained: Option<Trained>,
    /// What else lay in the Hugging Face folder that it came from.
    pub(super) carried: Arc<BTreeMap<String, String>>,
    /// What is known of its adapters, if it has any.
    pub(super) adapters: Option<AdapterOrigin>,
}

/// The checkpoint that a model is from.
pub(super) struct Trained {
    pub(super) step: u64,
    pub(super) folder: PathBuf,
}

impl TrainedModel {
    /// The same with its adapters added to its weights.
    pub(super) fn merged(self) -> anyhow::Result<Self> {
        let (dag, tensors) = merge_adapters(&self.dag, self.tensors)?;
        Ok(Self { dag, tensors, adapters: None, ..self })
    }
}

/// Reads whatever `path` is. A tokenizer that is given goes before the model's own.
pub(super) fn open(path: &Path, tokenizer: Option<&Path>) -> anyhow::Result<TrainedModel> {
    if path.join(ADAPTER_CONFIG).is_file() && !path.join(CONFIG).exists() {
        let path = path.display();
        return Err(bad_input(format!(
            "{path} holds adapters without the model that they are of: give the run that made them, or go on from them in a \
             job, with model.path and lora.adapter"
        )));
    }
    // Also where that is no regular file, which is said then.
    match path.join(CONFIG).symlink_metadata() {
        Ok(_) => open_hugging_face(path, tokenizer),
        Err(_) => open_trained(path, tokenizer),
    }
}

/// Reads a checkpoint, or a run directory's newest one.
pub(super) fn open_trained(path: &Path, tokenizer: Option<&Path>) -> anyhow::Result<TrainedModel> {
    let checkpoint = open_checkpoint(path).map_err(refused)?;
    let dag = checkpoint.dag().clone();
    let tensors = read_tensors(checkpoint.tensors(), &dag)?;
    let tokenizer = match tokenizer {
        Some(file) => given(file, checkpoint.manifest().data.as_ref().map(|data| &data.tokenizer))?,
        None => trained_with(&checkpoint)?,
    };
    let carried = Arc::new(checkpoint.carried().clone());
    let origin = match &checkpoint.manifest().run {
        Some(run) => format!("run {run}"),
        None => real(path),
    };
    let base = dag.without_lora();
    let adapters = base.as_ref().map(|_| adapter_origin(&checkpoint.manifest().job, &carried));
    let config = family(base.as_ref().unwrap_or(&dag), &carried);
    let trained = Some(Trained { step: checkpoint.manifest().step, folder: checkpoint.path().to_owned() });
    Ok(TrainedModel { config, dag, tensors, tokenizer, origin, trained, carried, adapters })
}

/// What is known of the adapters of a run: by the folder that they came from, else by the job.
fn adapter_origin(job: &JobSpec, carried: &BTreeMap<String, String>) -> AdapterOrigin {
    let told: Option<serde_json::Value> = carried.get(ADAPTER_CONFIG).and_then(|text| read_json(text.as_bytes()).ok());
    let told = |key: &str| told.as_ref().and_then(|keys| keys.get(key));
    // Those of another model are now of the one beside which they were trained last.
    let is_it = |base: &&str| job.model.path.as_ref().is_none_or(|path| is_base(base, path));
    let base = told("base_model_name_or_path").and_then(|base| base.as_str()).filter(is_it).map(str::to_owned);
    let path = || job.model.path.as_ref().map(|path| path.display().to_string());
    let rslora = told("use_rslora").and_then(serde_json::Value::as_bool).unwrap_or(job.lora.rslora);
    // A model by name began with weights of its own: others of that name are another base.
    AdapterOrigin { base: base.or_else(path), rslora }
}

/// The family and sizes of a trained model: by the config.json that it came with, where that is of this OP-DAG, since
/// graphs do not tell everything; else by the graph.
fn family(dag: &OpDag, carried: &BTreeMap<String, String>) -> Option<Model> {
    let told = carried.get(CONFIG).and_then(|text| Model::from_hugging_face(text).ok());
    let is_of = |model: &Model| {
        let built = dag.seq_len().and_then(|seq_len| model.build(seq_len).ok());
        built.is_some_and(|built| built.ops() == dag.ops() && built.params() == dag.params())
    };
    told.map(|read| read.model).filter(is_of).or_else(|| Model::of(dag))
}

/// The tokenizer that a checkpoint carries, or whose file it names.
fn trained_with(checkpoint: &Checkpoint) -> anyhow::Result<Tokenizer> {
    let manifest = checkpoint.manifest();
    let spec = &manifest.job.data;
    if spec.tokenizer == DataSpec::BYTES {
        return Ok(Tokenizer::Bytes);
    }
    if let Some(source) = checkpoint.carried().get(TOKENIZER) {
        return Tokenizer::from_json(source.clone(), "tokenizer.json of the checkpoint").map_err(refused);
    }
    let Some(file) = spec.tokenizer_file() else { return Ok(Tokenizer::Bytes) };
    if !file.is_file() {
        let file = file.display();
        return Err(bad_input(format!(
            "the model was trained with the tokenizer {file} on the data owner's machine, which is not here: \
             give it with --tokenizer FILE"
        )));
    }
    let tokenizer = Tokenizer::open(&spec.tokenizer).map_err(refused)?;
    if let Some(other) =
        manifest.data.as_ref().map(|data| &data.tokenizer).filter(|then| **then != named(&tokenizer, then))
    {
        return Err(bad_input(format!(
            "the tokenizer {} is not the one that the model was trained with: that one has {} entries and hash {}; \
             give it with --tokenizer FILE",
            file.display(),
            other.entries,
            other.hash
        )));
    }
    Ok(tokenizer)
}

/// The fingerprint of a tokenizer, under the name of another: where a file lies does not matter.
fn named(tokenizer: &Tokenizer, other: &TokenizerFingerprint) -> TokenizerFingerprint {
    TokenizerFingerprint { name: other.name.clone(), ..tokenizer.fingerprint() }
}

/// A tokenizer that the user gives, which may be another file of the same tokenizer.
fn given(file: &Path, then: Option<&TokenizerFingerprint>) -> anyhow::Result<Tokenizer> {
    let tokenizer =
        Tokenizer::open(file.to_str().context("the path of the tokenizer is not UTF-8")?).map_err(refused)?;
    if let Some(then) = then {
        let now = tokenizer.fingerprint();
        if now.entries != then.entries {
            let (file, entries) = (file.display(), now.entries);
            return Err(bad_input(format!(
                "--tokenizer {file} has {entries} entries, the one that the model was trained with has {}",
                then.entries
            )));
        }
        if now.hash != then.hash {
            tracing::warn!("--tokenizer {} is not the file that the model was trained with", file.display());
        }
    }
    Ok(tokenizer)
}

fn open_hugging_face(path: &Path, tokenizer: Option<&Path>) -> anyhow::Result<TrainedModel> {
    let model = load_model_dir(path).map_err(refused)?;
    for note in &model.notes {
        match note {
            ModelNote::Weights(_) => tracing::info!("{note}"),
            ModelNote::Unusual(_) => tracing::warn!("{note}"),
        }
    }
    let missing = || bad_input(format!("{}: there are no weights in it", path.display()));
    let weights = model.weights.ok_or_else(missing)?;
    let tensors = read_tensors(&weights, &model.dag)?;
    let tokenizer = match (tokenizer, model.carried.get(TOKENIZER)) {
        (Some(file), _) => given(file, None)?,
        (None, Some(source)) => {
            let name = path.join(TOKENIZER).display().to_string();
            Tokenizer::from_json(source.clone(), &name).map_err(refused)?
        }
        (None, None) => {
            let path = path.display();
            return Err(bad_input(format!("{path}: there is no tokenizer.json in it, give one with --tokenizer FILE")));
        }
    };
    let origin = real(path);
    let (dag, config, carried) = (model.dag, model.config, model.carried);
    Ok(TrainedModel { dag, config, tensors, tokenizer, origin, trained: None, carried, adapters: None })
}

/// A path without links, for people.
fn real(path: &Path) -> String {
    path.canonicalize().unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// The parameters; element types are widened.
fn read_tensors(tensors: &TensorSet, dag: &OpDag) -> anyhow::Result<Vec<NamedTensor>> {
    let names: Vec<String> = dag.params().iter().map(|p| p.name.clone()).collect();
    let mut bytes = Vec::new();
    tensors.write_part(&names, &mut bytes, Path::new("memory")).map_err(refused)?;
    Ok(read_shard(&bytes)?)
}
