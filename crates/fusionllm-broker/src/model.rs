//! The model of a job: one by name, a Hugging Face directory, or an OP-DAG file.

mod adapters;
mod fingerprint;
mod folder;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::{Model, OpDag, OpKind};
use fusionllm_protocol::hugging_face::TOKENIZER;
use fusionllm_protocol::{DataSpec, JobSpec, WeightsChoice};
use fusionllm_transport::read_regular_text;

use crate::BrokerError;
use crate::checkpoint::TensorSet;
use crate::files::named_error;
pub(crate) use fingerprint::ModelFingerprint;
use folder::Purpose;

/// What a job trains.
#[derive(Clone, Debug)]
pub struct LoadedModel {
    /// The model's OP-DAG, with the loss.
    pub dag: OpDag,
    /// Its sizes and settings, if it is of a family by name or from a Hugging Face directory.
    pub config: Option<Model>,
    /// Its parameters, if it has been trained before.
    pub weights: Option<Arc<TensorSet>>,
    /// What else lies in its Hugging Face directory and training does not change, by file name: `tokenizer.json`,
    /// `config.json` and the like.
    pub carried: Arc<BTreeMap<String, String>>,
    /// What the user must know of it.
    pub notes: Vec<ModelNote>,
}

/// What the user must know of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelNote {
    /// Where its weights come from: there is one of these where there are weights.
    Weights(String),
    /// What is out of the ordinary, such as a file that is passed over.
    Unusual(String),
}

impl std::fmt::Display for ModelNote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Weights(from) => write!(f, "weights: {from}"),
            Self::Unusual(text) => f.write_str(text),
        }
    }
}

impl LoadedModel {
    fn new(dag: OpDag, config: Option<Model>) -> Self {
        Self { dag, config, weights: None, carried: Arc::default(), notes: Vec::new() }
    }

    /// Content of its tokenizer.json, if it has one.
    pub fn tokenizer(&self) -> Option<&str> {
        self.carried.get(TOKENIZER).map(String::as_str)
    }
}

/// Reads the model that a job names, and holds it against the job.
///
/// # Errors
/// [`BrokerError`] that names the file or key; each is bad input.
pub fn load_model(spec: &JobSpec) -> Result<LoadedModel, BrokerError> {
    let choice = spec.model.weights;
    let mut model = read(spec, Purpose::Weights { choice, seed: spec.train.seed })?;
    check_trainable(&model.dag, spec)?;
    if let Some(adapter) = spec.lora.adapter.as_ref().filter(|_| model.weights.is_none()) {
        let reason = "its adapters fit the weights that they were trained beside: expected model.path with its weights";
        return Err(BrokerError::Adapter { path: adapter.clone(), reason: reason.to_owned() });
    }
    if model.config.is_none() || spec.model.path.is_none() {
        model.notes.push(new_weights(spec.train.seed));
    }
    if let Some(path) = &spec.model.path {
        let is_folder = path.is_dir();
        let has_tokenizer = model.carried.contains_key(TOKENIZER);
        if is_folder && spec.data.tokenizer == DataSpec::MODEL && !has_tokenizer {
            let other = if path.join("vocab.json").is_file() {
                " (vocab.json is not read: load the tokenizer in transformers as a fast one, and save it)"
            } else {
                ""
            };
            let reason = format!(
                "there is no tokenizer.json in it{other}: give data.tokenizer, the path of the one that the model was \
                 trained with, or `bytes` if each byte is to be a token"
            );
            return Err(model_error(path, reason));
        }
        if is_folder && spec.data.private && spec.model.weights == WeightsChoice::Model {
            let note = "data.private: who else has these weights can look up tokens by the first activations, see \
                        docs/privacy.md";
            model.notes.push(ModelNote::Unusual(note.to_owned()));
        }
        if has_tokenizer && spec.data.tokenizer == DataSpec::BYTES {
            let note = "the model has a tokenizer.json, but data.tokenizer = \"bytes\" feeds bytes as token ids";
            model.notes.push(ModelNote::Unusual(note.to_owned()));
        }
    }
    Ok(model)
}

/// Reads the model that a job names, which need not be one that can be trained.
///
/// # Errors
/// [`BrokerError`] that names the file or key; each is bad input.
pub fn read_model(spec: &JobSpec) -> Result<LoadedModel, BrokerError> {
    read(spec, Purpose::Graph)
}

fn read(spec: &JobSpec, purpose: Purpose) -> Result<LoadedModel, BrokerError> {
    let model = match &spec.model.path {
        Some(path) if path.is_dir() => folder::read(path, spec.model.dropout, |_| spec.data.seq_len, purpose)?,
        Some(path) => {
            let text = read_regular_text(path)
                .map_err(|e| named_error(path, e, |e| model_error(path, format!("not readable: {e}"))))?;
            let dag = OpDag::from_json(&text).map_err(|source| graph_error(&path.display().to_string(), source))?;
            LoadedModel::new(dag, None)
        }
        None => {
            let name = spec.model.name.clone().unwrap_or_else(|| "model.family".to_owned());
            let Some(model) = spec.named_model() else {
                spec.validate()?;
                return Err(model_error(Path::new(&name), "not a model known by name".to_owned()));
            };
            let fail = |source| graph_error(&name, source);
            let model = model.with_dropout(spec.model.dropout).map_err(fail)?;
            let dag = model.build(spec.data.seq_len).map_err(fail)?;
            LoadedModel::new(dag, Some(model))
        }
    };
    adapters::adapt(model, spec)
}

/// Whether the graph can be trained by this job.
pub(crate) fn check_trainable(dag: &OpDag, spec: &JobSpec) -> Result<(), BrokerError> {
    let path = spec.model.path.clone().unwrap_or_else(|| PathBuf::from(dag.name()));
    for (what, op) in [("input", dag.input()), ("label", dag.label()), ("cross_entropy", dag.loss())] {
        if op.is_none() {
            return Err(model_error(&path, format!("the OP-DAG has no {what} op, training needs one")));
        }
    }
    if dag.image_size().is_some() || spec.data.format.is_images() {
        return check_images(dag, spec).map_err(|reason| model_error(&path, reason));
    }
    match dag.seq_len() {
        Some(seq_len) if seq_len == spec.data.seq_len => Ok(()),
        Some(seq_len) => {
            let asked = spec.data.seq_len;
            Err(model_error(&path, format!("its input op takes sequences of {seq_len}, but data.seq_len = {asked}")))
        }
        None => Err(model_error(&path, "its input op takes no sequence, expected shape [B, S]".to_owned())),
    }
}

/// Whether a graph can be trained on the images of this job; why not.
fn check_images(dag: &OpDag, spec: &JobSpec) -> Result<(), String> {
    let Some(size) = dag.image_size() else {
        return Err("its input op takes no images, expected f32 [B, 3, H, H] for the job's data.format".to_owned());
    };
    if !spec.data.format.is_images() {
        return Err("its input op takes images: expected data.format = \"images\" or \"cifar10\"".to_owned());
    }
    let label = dag.label().map(|op| dag.op(op).output.shape.resolve(1));
    if size[0] != 3 || size[1] != size[2] || label.is_none_or(|shape| shape != [1, 1]) {
        let reason = "expected an input op of f32 [B, 3, H, H] and a label op of [B, 1]";
        return Err(format!("its images or labels have another shape: {reason}"));
    }
    // Of one value there is no variance.
    let batch = spec.micro_batch_size() as usize;
    let single = |op: &&fusionllm_graph::Op| match op.kind {
        OpKind::BatchNorm2d { channels, .. } => op.output.shape.elements(batch) <= channels as u64,
        _ => false,
    };
    dag.ops().iter().find(single).map_or(Ok(()), |op| {
        let reason = "which batch norm cannot train on: expected larger images, or more of them in a micro-batch";
        Err(format!("op `{}` has one value for each channel in a micro-batch, {reason}", op.name))
    })
}

/// Content of the tokenizer.json in the job's `model.path`, if the job takes that one; nothing for an OP-DAG file.
///
/// # Errors
/// [`BrokerError`] if it is not there or not readable.
pub fn model_tokenizer(spec: &JobSpec) -> Result<Option<String>, BrokerError> {
    let Some(folder) =
        spec.model.path.as_deref().filter(|path| spec.data.tokenizer == DataSpec::MODEL && path.is_dir())
    else {
        return Ok(None);
    };
    let path = folder.join(TOKENIZER);
    read_regular_text(&path).map(Some).map_err(|e| {
        let hint = "give data.tokenizer, the path of the one that the model was trained with";
        named_error(&path, e, |e| model_error(&path, format!("not readable: {e}; {hint}")))
    })
}

/// Longest sequences that a model is read for, to go on with a prompt: many are made for longer ones than a prompt has.
const LONGEST_PROMPT: usize = 4096;

/// Reads a Hugging Face directory with its weights, as a model for its longest sequences, or those of 4096 tokens.
///
/// # Errors
/// [`BrokerError`] that names the file; each is bad input.
pub fn load_model_dir(folder: &Path) -> Result<LoadedModel, BrokerError> {
    let purpose = Purpose::Weights { choice: WeightsChoice::Model, seed: 0 };
    folder::read(folder, 0.0, |model| model.longest_sequence().min(LONGEST_PROMPT), purpose)
}

fn new_weights(seed: u64) -> ModelNote {
    ModelNote::Weights(format!("new (seed {seed})"))
}

fn model_error(path: &Path, reason: String) -> BrokerError {
    BrokerError::Model { path: path.to_owned(), reason }
}

fn graph_error(model: &str, source: fusionllm_graph::GraphError) -> BrokerError {
    BrokerError::Graph { model: model.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn error(spec: &JobSpec) -> String {
        let error = load_model(spec).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    }

    #[test]
    fn a_named_model_takes_the_jobs_sizes() {
        let model = load_model(&testing::spec(&[])).unwrap();
        assert_eq!((model.dag.seq_len(), model.dag.vocab()), (Some(8), Some(256)));
        assert!(model.weights.is_none());
    }

    #[test]
    fn a_model_of_images_needs_images() {
        let mut spec = testing::spec(&[]);
        spec.model = fusionllm_protocol::ModelSpec { name: Some("resnet101".to_owned()), ..Default::default() };
        assert_eq!(read_model(&spec).unwrap().dag.param_elements(), 44_549_160);
        let end = "its input op takes images: expected data.format = \"images\" or \"cifar10\"";
        assert!(error(&spec).ends_with(end), "{}", error(&spec));
        spec.data.format = fusionllm_protocol::DataFormat::Images;
        let model = load_model(&spec).unwrap();
        assert_eq!(model.dag.image_size(), Some([3, 224, 224]));
        spec.data.format = fusionllm_protocol::DataFormat::Cifar10;
        let model = load_model(&spec).unwrap();
        assert_eq!((model.dag.image_size(), model.dag.vocab()), (Some([3, 32, 32]), Some(10)));
        // Five halvings leave one pixel, and a micro-batch may have one image.
        (spec.model.image_size, spec.train.batch, spec.train.micro_batches) = (Some(8), 4, 4);
        let end = "expected larger images, or more of them in a micro-batch";
        assert!(error(&spec).ends_with(end), "{}", error(&spec));
        spec.train.batch = 8;
        load_model(&spec).unwrap();
        let text = fusionllm_protocol::ModelSpec { name: Some("gpt2".to_owned()), ..Default::default() };
        let spec = JobSpec { model: text, ..spec };
        assert!(
            error(&spec).ends_with("its input op takes no images, expected f32 [B, 3, H, H] for the job's data.format")
        );
    }

    #[test]
    fn a_graph_file_is_read_and_held_against_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("graph.json");
        let dag = load_model(&testing::spec(&[])).unwrap().dag;
        std::fs::write(&path, dag.to_json()).unwrap();
        let mut spec = testing::spec(&[]);
        spec.model = fusionllm_protocol::ModelSpec { path: Some(path.clone()), ..Default::default() };
        assert_eq!(load_model(&spec).unwrap().dag, dag);
        spec.data.seq_len = 4;
        assert!(error(&spec).ends_with("its input op takes sequences of 8, but data.seq_len = 4"));
        std::fs::write(&path, "{").unwrap();
        assert!(error(&spec).contains("not an OP-DAG in JSON"));
        spec.model.path = Some(folder.path().join("none.json"));
        assert!(error(&spec).contains("not readable"));
    }

    #[test]
    fn a_hugging_face_folder_needs_a_config_of_a_family() {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(&[]);
        spec.model = fusionllm_protocol::ModelSpec { path: Some(folder.path().to_owned()), ..Default::default() };
        assert!(error(&spec).contains("expected a Hugging Face directory"));
        let config = |kind: &str| {
            format!(
                "{{\"model_type\":\"{kind}\",\"vocab_size\":256,\"n_positions\":8,\"n_embd\":8,\"n_layer\":1,\"n_head\":2}}"
            )
        };
        std::fs::write(folder.path().join("config.json"), config("bert")).unwrap();
        assert!(error(&spec).contains("model_type is \"bert\", expected `gpt2`, `llama`"));
        std::fs::write(folder.path().join("config.json"), config("gpt2")).unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        let model = read_model(&spec).unwrap();
        assert!(model.weights.is_none());

        // Keys without the prefix, and a tied head that is stored twice, as files in the wild have them.
        let mut tensors: Vec<(String, Vec<usize>)> = model
            .dag
            .params()
            .iter()
            .map(|p| (p.name.trim_start_matches("transformer.").to_owned(), p.shape.clone()))
            .collect();
        tensors.push(("lm_head.weight".to_owned(), vec![256, 8]));
        let weights = folder.path().join("model.safetensors");
        testing::write_tensors(&weights, &tensors);
        assert!(load_model(&spec).unwrap().weights.is_some());
        // Of the two names either is enough.
        tensors.remove(0);
        testing::write_tensors(&weights, &tensors);
        assert!(load_model(&spec).unwrap().weights.is_some());
        tensors.pop();
        testing::write_tensors(&weights, &tensors);
        assert!(error(&spec).contains("is missing"), "{}", error(&spec));
    }
}
