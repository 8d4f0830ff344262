//! From TOML to a [`JobSpec`]: typed reading with defaults.

use std::path::PathBuf;

use fusionllm_codec::{Codec, CodecError, TopKValues};
use fusionllm_graph::{ResnetBlock, ResnetStem, read_value, without_byte_order_mark};
use fusionllm_planner::{Pipeline, Recompute, StageSpec, Strategy};
use toml::{Table, Value};

use super::keys::{check_keys, full_key};
use super::refusal::{EMPTY, describe};
use super::{
    CheckpointSpec, CompressionPolicy, CompressionSpec, DataFormat, DataSpec, JobSpec, LoraSpec, LrSchedule, ModelSpec,
    OptimizerKind, PlacementSection, Precision, PrivateSeed, RowKind, SampleOrder, SizedFamily, SurviveSpec,
    TopKBackward, TrainSpec, ValueFormat, WeightsChoice, overrides,
};
use crate::JobError;

impl JobSpec {
    /// Reads a job file, with `section.key=value` overrides on top. Defaults are filled in; ranges are not yet
    /// checked, see [`JobSpec::validate`].
    ///
    /// # Errors
    /// [`JobError`] that names the key, what it is, and what would be right.
    pub fn from_toml(text: &str, overrides: &[String]) -> Result<Self, JobError> {
        let syntax = |e: toml::de::Error| JobError::Syntax { reason: one_line(&e.to_string()) };
        let mut table: Table = without_byte_order_mark(text).parse().map_err(syntax)?;
        for given in overrides {
            overrides::apply(&mut table, given)?;
        }
        check_keys(&table)?;
        let top = Section { name: "", table: Some(&table) };
        let section = |name| Section { name, table: table.get(name).and_then(Value::as_table) };
        Ok(Self {
            name: top.text("name")?.unwrap_or_else(|| "run".to_owned()),
            model: model(&section("model"))?,
            lora: lora(&section("lora"))?,
            data: data(&section("data"), section("model").get("path").is_some())?,
            train: train(&section("train"))?,
            placement: placement(&section("placement"))?,
            compression: compression(&section("compression"))?,
            checkpoint: checkpoint(&section("checkpoint"))?,
            survive: survive(&section("survive"))?,
        })
    }
}

fn model(s: &Section<'_>) -> Result<ModelSpec, JobError> {
    let spec = ModelSpec {
        name: s.text("name")?,
        path: s.filled("path")?.map(PathBuf::from),
        weights: s.choice("weights", &[("model", WeightsChoice::Model), ("new", WeightsChoice::New)])?,
        vocab_size: s.integer("vocab_size")?,
        n_positions: s.integer("n_positions")?,
        n_embd: s.integer("n_embd")?,
        n_layer: s.integer("n_layer")?,
        n_head: s.integer("n_head")?,
        dropout: s.real("dropout", 0.0)?,
        family: s.optional_choice("family", &[("resnet", SizedFamily::Resnet)])?,
        block: s.optional_choice("block", &ResnetBlock::ALL)?,
        depths: s.integers("depths")?,
        widths: s.integers("widths")?,
        stem: s.optional_choice("stem", &ResnetStem::ALL)?,
        image_size: s.integer("image_size")?,
        classes: s.integer("classes")?,
    };
    if spec.name.is_none() && spec.path.is_none() && spec.family.is_none() {
        return Err(s.value("name", "is missing, expected model.name = \"gpt2\" or model.path".to_owned()));
    }
    Ok(spec)
}

fn lora(s: &Section<'_>) -> Result<LoraSpec, JobError> {
    Ok(LoraSpec {
        rank: s.integer("rank")?.unwrap_or(0),
        alpha: s.get("alpha").map(|_| s.real("alpha", 0.0)).transpose()?,
        targets: s.texts("targets")?,
        dropout: s.real("dropout", 0.0)?,
        rslora: s.flag("rslora")?,
        adapter: s.filled("adapter")?.map(PathBuf::from),
    })
}

fn data(s: &Section<'_>, has_model_path: bool) -> Result<DataSpec, JobError> {
    let format = s.choice("format", &DataFormat::ALL)?;
    let has_model_path = has_model_path && !format.is_images();
    let tokenizer = if has_model_path { DataSpec::MODEL } else { DataSpec::BYTES };
    Ok(DataSpec {
        path: s.paths("path")?,
        format,
        column: s.filled("column")?.unwrap_or_else(|| DataSpec::TEXT_COLUMN.to_owned()),
        rows: s.choice("rows", &RowKind::ALL)?,
        chat_template: s.filled("chat_template")?.map(PathBuf::from),
        tokenizer: s.filled("tokenizer")?.unwrap_or_else(|| tokenizer.to_owned()),
        seq_len: s.integer("seq_len")?.unwrap_or(DataSpec::SEQ_LEN),
        private: s.flag("private")?,
        private_seed: s.optional_choice("private_seed", &PrivateSeed::ALL)?,
        keep_blocks: s.counts("keep_blocks")?,
        owner: s.text("owner")?,
        eval_fraction: s.real("eval_fraction", 0.1)?,
        order: s.optional_choice("order", &SampleOrder::ALL)?,
        cache: s.flag_or("cache", true)?,
        mean: s.three("mean")?,
        std: s.three("std")?,
        crop_padding: s.integer("crop_padding")?.unwrap_or(0),
        flip: s.flag("flip")?,
    })
}

fn train(s: &Section<'_>) -> Result<TrainSpec, JobError> {
    let steps = s.integer("steps")?.unwrap_or(1000);
    Ok(TrainSpec {
        steps,
        batch: s.integer("batch")?.unwrap_or(8),
        micro_batches: s.integer("micro_batches")?.unwrap_or(4),
        optimizer: s.choice("optimizer", &[("adamw", OptimizerKind::Adamw), ("sgd", OptimizerKind::Sgd)])?,
        lr: s.real("lr", 3e-4)?,
        min_lr_ratio: s.real("min_lr_ratio", 0.1)?,
        // A short trial run should not have to set it.
        warmup: s.integer("warmup")?.unwrap_or(steps.min(20)),
        schedule: s.choice("schedule", &LrSchedule::ALL)?,
        betas: s.pair("betas", [0.9, 0.95])?,
        epsilon: s.real("epsilon", 1e-8)?,
        weight_decay: s.real("weight_decay", 0.1)?,
        momentum: s.real("momentum", 0.9)?,
        clip: s.real("clip", 1.0)?,
        seed: s.integer("seed")?.unwrap_or(0),
        precision: s.choice("precision", &PRECISIONS)?,
        eval_every: s.integer("eval_every")?.unwrap_or(0),
        eval_batches: s.integer("eval_batches")?.unwrap_or(8),
    })
}

const PRECISIONS: [(&str, Precision); 3] =
    [("f32", Precision::F32), ("tf32", Precision::Tf32), ("bf16", Precision::Bf16)];

fn placement(s: &Section<'_>) -> Result<PlacementSection, JobError> {
    let strategy = match s.text("strategy")? {
        None => Strategy::default(),
        Some(name) => Strategy::from_name(&name).map_err(|e| s.value("strategy", e.to_string()))?,
    };
    let pipelines = [("1f1b", Pipeline::OneFOneB), ("gpipe", Pipeline::GPipe)];
    let recompute = Recompute::ALL.map(|choice| (choice.name(), choice));
    Ok(PlacementSection {
        compnodes: s.integer("compnodes")?,
        strategy,
        pipeline: s.choice("pipeline", &pipelines)?,
        run_ahead: s.integer("run_ahead")?,
        deferred: s.integer("deferred")?,
        recompute: s.choice("recompute", &recompute)?,
        stages: stages(s)?,
        cluster: s.filled("cluster")?.map(PathBuf::from),
    })
}

fn stages(s: &Section<'_>) -> Result<Vec<StageSpec>, JobError> {
    const FORM: &str = "expected a list of { compnode = 0, last_op = \"h.0.add_2\" }";
    let Some(value) = s.get("stages") else { return Ok(Vec::new()) };
    let Value::Array(entries) = value else {
        return Err(s.value("stages", format!("is {}, {FORM}", describe(value))));
    };
    let read = |(i, entry): (usize, &Value)| {
        read_value(entry.clone()).map_err(|reason| s.value(&format!("stages[{i}]"), format!("{reason}; {FORM}")))
    };
    entries.iter().enumerate().map(read).collect()
}

fn compression(s: &Section<'_>) -> Result<CompressionSpec, JobError> {
    let topk_values = [("bf16", TopKValues::Bf16), ("int8", TopKValues::Int8), ("f32", TopKValues::F32)];
    let backward = [("straight", TopKBackward::Straight), ("mask", TopKBackward::Mask)];
    let values = [("f32", ValueFormat::F32), ("bf16", ValueFormat::Bf16), ("f16", ValueFormat::F16)];
    Ok(CompressionSpec {
        policy: s.choice("policy", &CompressionPolicy::NAMES)?,
        ratio: s.real("ratio", 16.0)?,
        values: s.choice("values", &values)?,
        topk_values: s.choice("topk_values", &topk_values)?,
        activations: s.codec("activations")?,
        gradients: s.codec("gradients")?,
        error_feedback: s.flag("error_feedback")?,
        predict: s.flag("predict")?,
        backward: s.choice("backward", &backward)?,
        adapt: s.flag("adapt")?,
        error_budget: s.real("error_budget", 0.5)?,
    })
}

fn checkpoint(s: &Section<'_>) -> Result<CheckpointSpec, JobError> {
    Ok(CheckpointSpec {
        every: s.integer("every")?.unwrap_or(0),
        keep: s.integer("keep")?.unwrap_or(3),
        to: s.filled("to")?.map(PathBuf::from),
    })
}

fn survive(s: &Section<'_>) -> Result<SurviveSpec, JobError> {
    let SurviveSpec { enabled, min_compnodes, copies, mtbf_h, .. } = SurviveSpec::default();
    Ok(SurviveSpec {
        enabled: s.flag_or("enabled", enabled)?,
        min_compnodes: s.integer("min_compnodes")?.unwrap_or(min_compnodes),
        every: s.integer_or_auto("every")?,
        copies: s.integer("copies")?.unwrap_or(copies),
        mtbf_h: s.real("mtbf_h", mtbf_h)?,
    })
}

/// One section of the file; all reads name the key in their errors.
struct Section<'a> {
    name: &'static str,
    table: Option<&'a Table>,
}

impl<'a> Section<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.table?.get(key)
    }

    fn value(&self, key: &str, reason: String) -> JobError {
        JobError::Value { key: full_key(self.name, key), reason }
    }

    fn wrong_type(&self, key: &str, got: &Value, expected: &str) -> JobError {
        self.value(key, format!("is {}, expected {expected}", describe(got)))
    }

    fn text(&self, key: &str) -> Result<Option<String>, JobError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.wrong_type(key, other, "a string")),
        }
    }

    /// The same for a path. An empty one, as from an unset variable, would become the job file's folder.
    fn filled(&self, key: &str) -> Result<Option<String>, JobError> {
        match self.text(key)? {
            Some(text) if text.trim().is_empty() => Err(self.value(key, EMPTY.to_owned())),
            text => Ok(text),
        }
    }

    /// A name, or a list of names.
    fn texts(&self, key: &str) -> Result<Vec<String>, JobError> {
        let names = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::String(name)) => Some(vec![name.clone()]),
            Some(value) => value.as_array().and_then(|a| a.iter().map(|e| e.as_str().map(str::to_owned)).collect()),
        };
        let wrong = |value| self.wrong_type(key, value, "a name or a list of names");
        names.ok_or_else(|| self.get(key).map_or_else(|| self.value(key, EMPTY.to_owned()), wrong))
    }

    fn codec(&self, key: &str) -> Result<Codec, JobError> {
        let name = self.text(key)?.unwrap_or_else(|| Codec::Dense.name().to_owned());
        name.parse().map_err(|e: CodecError| self.value(key, e.to_string()))
    }

    fn flag(&self, key: &str) -> Result<bool, JobError> {
        self.flag_or(key, false)
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, JobError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Boolean(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong_type(key, other, "true or false")),
        }
    }

    /// A whole number; nothing for `"auto"`, which is the default.
    fn integer_or_auto<T: TryFrom<i64>>(&self, key: &str) -> Result<Option<T>, JobError> {
        match self.get(key) {
            Some(Value::String(text)) if text == "auto" => Ok(None),
            Some(other @ (Value::String(_) | Value::Boolean(_) | Value::Array(_) | Value::Table(_))) => {
                Err(self.wrong_type(key, other, "a whole number of at least 0, or \"auto\""))
            }
            _ => self.integer(key),
        }
    }

    fn integer<T: TryFrom<i64>>(&self, key: &str) -> Result<Option<T>, JobError> {
        const EXPECTED: &str = "a whole number of at least 0";
        match self.get(key) {
            None => Ok(None),
            Some(value @ Value::Integer(number)) => {
                let too_large = if *number < 0 { EXPECTED } else { "a smaller number" };
                T::try_from(*number).map(Some).map_err(|_| self.wrong_type(key, value, too_large))
            }
            // TOML has no number as large, so that an override becomes text.
            Some(Value::String(digits))
                if digits.chars().all(|c| c.is_ascii_digit())
                    && !digits.is_empty()
                    && digits.parse::<i64>().is_err() =>
            {
                Err(self.value(key, format!("is {digits}, expected a smaller number")))
            }
            Some(other) => Err(self.wrong_type(key, other, EXPECTED)),
        }
    }

    fn real(&self, key: &str, default: f64) -> Result<f64, JobError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => number(value).ok_or_else(|| self.wrong_type(key, value, "a number")),
        }
    }

    fn pair(&self, key: &str, default: [f64; 2]) -> Result<[f64; 2], JobError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let numbers = value.as_array().map(|a| a.iter().map(number).collect::<Option<Vec<f64>>>());
        match numbers.flatten().as_deref() {
            Some(&[first, second]) => Ok([first, second]),
            _ => Err(self.wrong_type(key, value, "two numbers, such as [0.9, 0.95]")),
        }
    }

    /// Two counts; none if the key is not there.
    fn counts(&self, key: &str) -> Result<[u32; 2], JobError> {
        let Some(value) = self.get(key) else { return Ok([0; 2]) };
        let count = |value: &Value| u32::try_from(value.as_integer()?).ok();
        let counts = value.as_array().and_then(|a| a.iter().map(count).collect::<Option<Vec<u32>>>());
        match counts.as_deref() {
            Some(&[first, last]) => Ok([first, last]),
            _ => Err(self.wrong_type(key, value, "two whole numbers of at least 0, such as [1, 1]")),
        }
    }

    fn three(&self, key: &str) -> Result<Option<[f64; 3]>, JobError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().map(|a| a.iter().map(number).collect::<Option<Vec<f64>>>());
        match numbers.flatten().as_deref() {
            Some(&[red, green, blue]) => Ok(Some([red, green, blue])),
            _ => Err(self.wrong_type(key, value, "three numbers, of red, green and blue")),
        }
    }

    /// Whole numbers over 0.
    fn integers(&self, key: &str) -> Result<Option<Vec<usize>>, JobError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = |value: &Value| usize::try_from(value.as_integer()?).ok().filter(|&size| size > 0);
        let sizes = value.as_array().and_then(|a| a.iter().map(size).collect::<Option<Vec<usize>>>());
        let expected = "a list of whole numbers of at least 1";
        sizes.filter(|sizes| !sizes.is_empty()).map(Some).ok_or_else(|| self.wrong_type(key, value, expected))
    }

    fn paths(&self, key: &str) -> Result<Vec<PathBuf>, JobError> {
        const EXPECTED: &str = "the path of a file or folder, or a list of paths";
        let strings = match self.get(key) {
            None => return Err(self.value(key, format!("is missing, expected {EXPECTED}"))),
            Some(Value::String(path)) => vec![path.clone()],
            Some(value @ Value::Array(entries)) => {
                let strings = entries.iter().map(|e| e.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
                strings.filter(|s| !s.is_empty()).ok_or_else(|| self.wrong_type(key, value, EXPECTED))?
            }
            Some(other) => return Err(self.wrong_type(key, other, EXPECTED)),
        };
        if strings.iter().any(|path| path.trim().is_empty()) {
            return Err(self.value(key, format!("is empty, expected {EXPECTED}")));
        }
        Ok(strings.into_iter().map(PathBuf::from).collect())
    }

    /// One of the named values; the type's default if the key is not there.
    fn choice<T: Copy + Default>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, JobError> {
        Ok(self.optional_choice(key, choices)?.unwrap_or_default())
    }

    /// One of the named values, if the key is there.
    fn optional_choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, JobError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        choices.iter().find(|(name, _)| *name == text).map(|(_, value)| Some(*value)).ok_or_else(|| {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
            self.value(key, format!("is `{text}`, expected {}", names.join(" or ")))
        })
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Float(number) => Some(*number),
        Value::Integer(number) => Some(*number as f64),
        _ => None,
    }
}

/// The parser draws a picture over several lines; an error here is one line.
fn one_line(text: &str) -> String {
    let useful = |line: &&str| !line.is_empty() && !line.trim_start().starts_with('|') && !line.contains(" | ");
    text.lines().filter(useful).map(str::trim).collect::<Vec<_>>().join(": ")
}
