//! Adapters beside a job's model: new ones, or those of a PEFT folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::{GraphError, Lora, OpDag, read_json};
use fusionllm_protocol::hugging_face::{ADAPTER_CONFIG as CONFIG, ADAPTER_WEIGHTS as WEIGHTS, is_base};
use fusionllm_protocol::{JobSpec, LoraSpec, lora_scaling};
use fusionllm_transport::read_regular_text;
use serde_json::{Map, Value};

use super::{LoadedModel, ModelNote, graph_error};
use crate::BrokerError;
use crate::checkpoint::TensorFile;
use crate::files::named_error;

/// How PEFT's names of tensors begin.
pub(crate) const PREFIX: &str = "base_model.model.";
/// How they end after the module's name.
const MATRICES: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// Keys that change nothing of what is computed, or nothing that the tensors do not tell: which modules have adapters is
/// told by their names.
const HARMLESS: [&str; 17] = [
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "bias",
];
/// Keys that are read.
const READ: [&str; 4] = ["r", "lora_alpha", "lora_dropout", "use_rslora"];

/// Puts the job's adapters beside a model.
pub(super) fn adapt(model: LoadedModel, spec: &JobSpec) -> Result<LoadedModel, BrokerError> {
    if !spec.lora.is_on() {
        return Ok(model);
    }
    let LoadedModel { dag, config, weights, mut carried, mut notes } = model;
    let fail = |source: GraphError| graph_error(&named(spec), source);
    let (lora, folder) = match &spec.lora.adapter {
        Some(path) => {
            let folder = Folder::read(path)?;
            folder.check(&spec.lora, &dag)?;
            (folder.lora.clone(), Some(folder))
        }
        None => (asked(&spec.lora, config.as_ref(), &dag).map_err(fail)?, None),
    };
    let adapted = match &folder {
        Some(folder) => dag.with_lora(&lora).map_err(|e| folder.error(CONFIG, e.to_string()))?,
        None => dag.with_lora(&lora).map_err(fail)?,
    };
    let drawn = adapted.params().iter().filter(|param| !param.frozen).map(|param| param.name.clone());
    let mut file = None;
    if let Some(folder) = folder {
        folder.check_tensors(&adapted)?;
        notes.extend(folder.other_base(spec).map(ModelNote::Unusual));
        notes.extend(folder.other_targets(&dag).map(ModelNote::Unusual));
        Arc::make_mut(&mut carried).insert(CONFIG.to_owned(), folder.config);
        notes.push(ModelNote::Unusual(format!("adapters: {}", folder.file.path().display())));
        file = Some(folder.file);
    }
    let mut weights = weights;
    if let Some(set) = weights.as_mut().map(Arc::make_mut) {
        match file {
            Some(file) => set.add_adapters(file, drawn, PREFIX),
            None => set.leave_out(drawn),
        }
    }
    if weights.is_none() {
        let note =
            "the adapters' base is drawn at random: they are of use to nobody without it, which export --merge writes";
        notes.push(ModelNote::Unusual(note.to_owned()));
    }
    let (ops, trained, all) = (adapted.adapters().len(), adapted.trained_elements(), adapted.param_elements());
    notes.push(ModelNote::Unusual(format!(
        "adapters of rank {} beside {ops} linear ops: {trained} of {all} parameters are trained",
        lora.rank
    )));
    Ok(LoadedModel { dag: adapted, config, weights, carried, notes })
}

/// `target_modules`, if that is a list and no other key takes something from it.
fn named_modules(keys: &Map<String, Value>) -> Option<Vec<String>> {
    let is_empty =
        |key: &str| keys.get(key).is_none_or(|value| value.is_null() || value.as_array().is_some_and(Vec::is_empty));
    let names = keys
        .get("target_modules")?
        .as_array()
        .filter(|_| is_empty("exclude_modules") && is_empty("layers_to_transform"))?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

/// The model's name for errors.
fn named(spec: &JobSpec) -> String {
    let path = spec.model.path.as_ref().map(|path| path.display().to_string());
    path.or_else(|| spec.model.name.clone()).unwrap_or_default()
}

/// The adapters that a job asks for.
fn asked(spec: &LoraSpec, model: Option<&fusionllm_graph::Model>, dag: &OpDag) -> Result<Lora, GraphError> {
    let own = || model.map(|model| model.lora_targets().iter().map(|&target| target.to_owned()).collect());
    let targets = match &spec.targets[..] {
        [] => own().ok_or_else(|| GraphError::Lora {
            key: "targets",
            expected: format!(
                "some of the linear ops of an OP-DAG of no known family: {}",
                dag.lora_targets().join(", ")
            ),
            got: "not given".to_owned(),
        })?,
        targets => targets.to_vec(),
    };
    Ok(Lora { rank: spec.rank as usize, scaling: spec.scaling(), dropout: spec.dropout, targets })
}

/// A PEFT folder.
struct Folder {
    path: PathBuf,
    lora: Lora,
    alpha: f64,
    rslora: bool,
    /// The model that they were trained beside, as the folder calls it.
    base: Option<String>,
    /// The modules that it names, where it names all.
    named: Option<Vec<String>>,
    /// Content of its adapter_config.json.
    config: String,
    file: TensorFile,
}

impl Folder {
    fn read(path: &Path) -> Result<Self, BrokerError> {
        let fail = |name: &str, reason: String| error(&path.join(name), reason);
        let config = path.join(CONFIG);
        let text = read_regular_text(&config).map_err(|e| {
            named_error(&config, e, |e| fail(CONFIG, format!("not readable ({e}), expected a folder of PEFT's")))
        })?;
        let keys: Value = read_json(text.as_bytes()).map_err(|e| fail(CONFIG, e))?;
        let Value::Object(keys) = keys else {
            return Err(fail(CONFIG, "it is no object, expected the settings of adapters".to_owned()));
        };
        let Config { rank, alpha, dropout, rslora } = Config::of(&keys).map_err(|reason| fail(CONFIG, reason))?;
        let base = keys.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let named = named_modules(&keys);
        let weights = path.join(WEIGHTS);
        if !weights.exists() && path.join("adapter_model.bin").exists() {
            let reason = "expected adapter_model.safetensors beside it: save the adapters with safe_serialization=True";
            return Err(fail("adapter_model.bin", reason.to_owned()));
        }
        let file = TensorFile::open(&weights)?;
        let mut targets = BTreeSet::new();
        for name in file.names() {
            let module = name.strip_prefix(PREFIX).and_then(|n| MATRICES.iter().find_map(|end| n.strip_suffix(end)));
            let Some(module) = module else {
                let reason =
                    format!("tensor `{name}` is no adapter of a linear op, expected `{PREFIX}MODULE.lora_A.weight`");
                return Err(fail(WEIGHTS, reason));
            };
            targets.insert(module.to_owned());
        }
        if targets.is_empty() {
            return Err(fail(WEIGHTS, "there are no adapters in it".to_owned()));
        }
        let lora = Lora {
            rank: rank as usize,
            scaling: lora_scaling(alpha, rank, rslora),
            dropout,
            targets: targets.into_iter().collect(),
        };
        Ok(Self { path: path.to_owned(), lora, alpha, rslora, base, named, config: text, file })
    }

    fn error(&self, name: &str, reason: String) -> BrokerError {
        error(&self.path.join(name), reason)
    }

    /// A sentence if the folder says that the adapters were trained beside another model.
    fn other_base(&self, spec: &JobSpec) -> Option<String> {
        let (base, path) = (self.base.as_ref()?, spec.model.path.as_ref()?);
        (!is_base(base, path)).then(|| {
            format!(
                "the adapters were trained beside `{base}`, by their {CONFIG}, and go on beside {}: in another model they \
                 mean nothing",
                path.display()
            )
        })
    }

    /// A sentence if the folder names other modules than it has adapters for, as after a loss.
    fn other_targets(&self, dag: &OpDag) -> Option<String> {
        let asked = dag.with_lora(&Lora { targets: self.named.clone()?, ..self.lora.clone() }).ok()?.adapters();
        let asked: BTreeSet<&String> = asked.iter().map(|adapter| &adapter.module).collect();
        let own: BTreeSet<&String> = self.lora.targets.iter().collect();
        let module = asked.symmetric_difference(&own).next()?;
        let which = if own.contains(module) { "has an adapter" } else { "has no adapter" };
        Some(format!("{WEIGHTS} {which} beside `{module}`, unlike target_modules of {CONFIG}: it goes by what it has"))
    }

    /// Holds what the job says besides against what the folder says.
    fn check(&self, spec: &LoraSpec, dag: &OpDag) -> Result<(), BrokerError> {
        let other = |key: &str, job: String, own: String| {
            Err(self.error(CONFIG, format!("says {own}, but lora.{key} = {job}: leave that out, the folder says it")))
        };
        let rank = self.lora.rank;
        if spec.rank != 0 && spec.rank as usize != rank {
            return other("rank", spec.rank.to_string(), format!("r = {rank}"));
        }
        if let Some(alpha) = spec.alpha.filter(|&alpha| alpha != self.alpha) {
            return other("alpha", alpha.to_string(), format!("lora_alpha = {}", self.alpha));
        }
        if spec.dropout != 0.0 && spec.dropout != self.lora.dropout {
            return other("dropout", spec.dropout.to_string(), format!("lora_dropout = {}", self.lora.dropout));
        }
        if spec.rslora && !self.rslora {
            return other("rslora", "true".to_owned(), "use_rslora = false".to_owned());
        }
        if spec.targets.is_empty() {
            return Ok(());
        }
        let asked = dag.with_lora(&Lora { targets: spec.targets.clone(), ..self.lora.clone() });
        let asked = asked.map_err(|e| self.error(CONFIG, e.to_string()))?.adapters();
        let asked: BTreeSet<&String> = asked.iter().map(|adapter| &adapter.module).collect();
        let own: BTreeSet<&String> = self.lora.targets.iter().collect();
        match asked.symmetric_difference(&own).next() {
            None => Ok(()),
            Some(module) => {
                let which = if own.contains(module) { "has an adapter" } else { "has no adapter" };
                let reason =
                    format!("{which} beside `{module}`, unlike lora.targets: leave that out, the folder says it");
                Err(self.error(WEIGHTS, reason))
            }
        }
    }

    /// Holds the tensors against the matrices of a model with these adapters.
    fn check_tensors(&self, dag: &OpDag) -> Result<(), BrokerError> {
        use safetensors::tensor::Dtype::{BF16, F16, F32};
        for adapter in dag.adapters() {
            for param in [adapter.a, adapter.b].map(|param| dag.param(param)) {
                self.file.check(&format!("{PREFIX}{}", param.name), &param.shape, &[F32, F16, BF16])?;
            }
        }
        let (there, used) = (self.file.names().count(), 2 * dag.adapters().len());
        if there != used {
            let reason = format!("{there} tensors are in it, of which the model's linear ops have {used}");
            return Err(self.error(WEIGHTS, reason));
        }
        Ok(())
    }
}

fn error(path: &Path, reason: String) -> BrokerError {
    BrokerError::Adapter { path: path.to_owned(), reason }
}

/// What adapter_config.json says.
#[derive(Debug, PartialEq)]
struct Config {
    rank: u32,
    alpha: f64,
    dropout: f64,
    rslora: bool,
}

impl Config {
    fn of(keys: &Map<String, Value>) -> Result<Self, String> {
        let is = |key: &str, got: &Value, expected: &str| Err(format!("{key} is {got}, expected {expected}"));
        let value = |key: &str| keys.get(key).filter(|value| !value.is_null());
        match value("peft_type") {
            Some(kind) if kind == "LORA" => {}
            kind => return is("peft_type", kind.unwrap_or(&Value::Null), "\"LORA\", the adapters that are computed"),
        }
        if let Some(bias) = value("bias").filter(|bias| *bias != "none") {
            return is("bias", bias, "\"none\": biases are not trained beside adapters");
        }
        // Others begin with changed weights of the model, which the folder does not have.
        let usual = [Value::from(true), Value::from(false), Value::from("gaussian")];
        if let Some(init) = value("init_lora_weights").filter(|init| !usual.contains(init)) {
            return is("init_lora_weights", init, "true, false or \"gaussian\": others change the model's own weights");
        }
        for (key, got) in keys.iter().filter(|(key, _)| ![&READ[..], &HARMLESS].concat().contains(&key.as_str())) {
            let is_empty = match got {
                Value::Null | Value::Bool(false) => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
            };
            if !is_empty {
                return is(key, got, "none: that is not computed");
            }
        }
        let rank = value("r").and_then(Value::as_u64).and_then(|r| u32::try_from(r).ok()).filter(|&r| r > 0);
        let Some(rank) = rank else {
            return is("r", keys.get("r").unwrap_or(&Value::Null), "a whole number of at least 1");
        };
        let real = |key: &str, default: f64, holds: fn(f64) -> bool, expected: &str| match value(key) {
            None => Ok(default),
            Some(got) => match got.as_f64().filter(|&number| holds(number)) {
                Some(number) => Ok(number),
                None => Err(format!("{key} is {got}, expected {expected}")),
            },
        };
        // PEFT's defaults.
        let alpha = real("lora_alpha", 8.0, |alpha| alpha != 0.0, "a number that is not 0")?;
        let dropout = real("lora_dropout", 0.0, |p| (0.0..1.0).contains(&p), "at least 0 and below 1")?;
        let rslora = match value("use_rslora") {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => return is("use_rslora", other, "true or false"),
        };
        Ok(Self { rank, alpha, dropout, rslora })
    }
}

#[cfg(test)]
mod tests;
