//! The job: what `job.toml` says, with every default filled in.
//!
//! `docs/job.md` documents each key.

mod cadence;
mod data_spec;
mod image_data;
mod image_model;
mod keys;
mod lora;
mod lr_schedule;
mod names;
mod overrides;
mod parse;
mod refusal;
mod validate;

use std::path::PathBuf;

use fusionllm_codec::{Codec, TopKValues};
use fusionllm_graph::{ResnetBlock, ResnetStem};
use fusionllm_planner::{Pipeline, Recompute, StageSpec, Strategy};
use serde::{Deserialize, Serialize};

pub use cadence::{Cadence, Measuring};
pub use data_spec::{DataFormat, DataSpec, PrivateSeed, RowKind, SampleOrder};
pub use image_model::SizedFamily;
pub use keys::job_keys;
pub use lora::{LoraSpec, scaling as lora_scaling};
pub use lr_schedule::LrSchedule;

/// A whole job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Name of the run; names its directory.
    pub name: String,
    /// What is trained.
    pub model: ModelSpec,
    /// Adapters that are trained instead of it.
    #[serde(default)]
    pub lora: LoraSpec,
    /// The text, the tokenizer, and how much is read at once.
    pub data: DataSpec,
    /// Steps, batches and the optimizer.
    pub train: TrainSpec,
    /// On which machines it runs, and how it is cut.
    pub placement: PlacementSection,
    /// How tensors are encoded on their way.
    pub compression: CompressionSpec,
    /// When checkpoints are made, and how many stay.
    pub checkpoint: CheckpointSpec,
    /// What becomes of it when machines go.
    #[serde(default)]
    pub survive: SurviveSpec,
}

/// `[model]`: a model by name or family (a GPT-2 or ResNet with sizes of one's own too), a Hugging Face directory, or an OP-DAG file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// A published model, such as `gpt2` or `llama-3.2-1b`; the sizes below replace a GPT-2's own.
    pub name: Option<String>,
    /// A Hugging Face directory (config.json, model.safetensors) or an OP-DAG's JSON file, on the broker's machine.
    pub path: Option<PathBuf>,
    /// Where its first weights come from.
    #[serde(default)]
    pub weights: WeightsChoice,
    /// Entries of the vocabulary; the tokenizer's, where it can be read when the job is handed in, else the named model's.
    pub vocab_size: Option<usize>,
    /// Longest sequence; `data.seq_len` if not given.
    pub n_positions: Option<usize>,
    /// Width of the residual stream.
    pub n_embd: Option<usize>,
    /// Number of transformer blocks.
    pub n_layer: Option<usize>,
    /// Heads of attention.
    pub n_head: Option<usize>,
    /// Dropout probability; 0 by default.
    pub dropout: f64,
    /// The family of a model that has sizes of its own and no name.
    #[serde(default)]
    pub family: Option<SizedFamily>,
    /// What the residual blocks of a ResNet are made of; the named model's if not given, and so with the sizes below.
    #[serde(default)]
    pub block: Option<ResnetBlock>,
    /// Blocks of each layer of a ResNet.
    #[serde(default)]
    pub depths: Option<Vec<usize>>,
    /// Channels inside the blocks of each layer of a ResNet.
    #[serde(default)]
    pub widths: Option<Vec<usize>>,
    /// What comes before the blocks of a ResNet; that for CIFAR where `data.format` is `cifar10`.
    #[serde(default)]
    pub stem: Option<ResnetStem>,
    /// Pixels of a side of a ResNet's images; what the stem is made for if not given.
    #[serde(default)]
    pub image_size: Option<usize>,
    /// Classes of a ResNet; 10 where `data.format` is `cifar10`, else 1000.
    #[serde(default)]
    pub classes: Option<usize>,
}

/// Where a model's first weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightsChoice {
    /// From the Hugging Face directory at `model.path`, which must have them. A model by name and an OP-DAG file have
    /// none, so they begin anew.
    #[default]
    Model,
    /// Anew, from `train.seed`, whatever lies in the directory.
    New,
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Updates until the job is done.
    pub steps: u64,
    /// Sequences in the global batch.
    pub batch: u32,
    /// Micro-batches that the global batch is cut into.
    pub micro_batches: u32,
    /// By which rule parameters are updated.
    pub optimizer: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end of the cosine schedule, as a share of `lr`.
    pub min_lr_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// The lr schedule after warm-up.
    pub schedule: LrSchedule,
    /// Decay rates of AdamW's two moments.
    pub betas: [f64; 2],
    /// What AdamW adds to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay on matrices (biases and norms have none).
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip: f64,
    /// Seed of initial parameters, batches and dropout.
    pub seed: u64,
    /// Precision of compute.
    pub precision: Precision,
    /// Evaluate after every so many steps, and at the end; 0: only at the end.
    pub eval_every: u64,
    /// Micro-batches of an evaluation.
    pub eval_batches: u32,
}

/// Optimizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter).
    #[default]
    Adamw,
    /// Stochastic gradient descent with momentum.
    Sgd,
}

/// Precision of compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// As f32, with the operands of matrix products rounded to 10 bits of mantissa, on devices that can.
    Tf32,
    /// Activations and the operands of matrix products in bf16, on devices that can; parameters, their gradients, the
    /// optimizer's state and all sums stay f32.
    Bf16,
}

/// `[placement]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlacementSection {
    /// CompNodes to use; if not given, `train` starts three and a broker takes all that are idle.
    pub compnodes: Option<u32>,
    /// How the OP-DAG is cut.
    pub strategy: Strategy,
    /// Which task orders.
    pub pipeline: Pipeline,
    /// How many micro-batches further than 1F1B a stage may be ahead; if not given, the plan finds out.
    pub run_ahead: Option<u32>,
    /// Of how many micro-batches weight gradients may wait for a pause; if not given, the plan finds out.
    pub deferred: Option<u32>,
    /// Whether activations are made anew in BP instead of being kept.
    #[serde(default)]
    pub recompute: Recompute,
    /// Explicit stages instead of a strategy.
    pub stages: Vec<StageSpec>,
    /// A cluster file, on the broker's machine, to plan by instead of what is measured.
    pub cluster: Option<PathBuf>,
}

/// `[compression]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompressionSpec {
    /// Which edges are compressed, and how.
    pub policy: CompressionPolicy,
    /// Dense bytes over sent bytes on the slowest link.
    pub ratio: f64,
    /// Form of what is not compressed.
    pub values: ValueFormat,
    /// Form of the values that Top-K keeps.
    pub topk_values: TopKValues,
    /// Codec of all activations under the policy `fixed`.
    #[serde(with = "codec_text")]
    pub activations: Codec,
    /// Codec of all gradients under the policy `fixed`.
    #[serde(with = "codec_text")]
    pub gradients: Codec,
    /// Add what was dropped of a gradient to the next one.
    pub error_feedback: bool,
    /// Send the difference to a running mean that both ends hold.
    pub predict: bool,
    /// How the gradient of a Top-K activation goes back.
    pub backward: TopKBackward,
    /// Move codecs while training, by measured links and errors.
    pub adapt: bool,
    /// Largest relative error that a codec may introduce while the loss falls fast; it tightens as the loss flattens.
    pub error_budget: f64,
}

impl CompressionSpec {
    /// Ratios that make sense: with the largest a message of a gigabyte is a kilobyte.
    pub const RATIOS: std::ops::RangeInclusive<f64> = 1.0..=1e6;
}

/// A codec in its text form, as the job file has it.
mod codec_text {
    use fusionllm_codec::Codec;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(codec: &Codec, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(codec)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Codec, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How the gradient of an activation goes back that Top-K has sparsified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TopKBackward {
    /// As if the activation had come whole.
    Straight,
    /// Only where the activation was kept: the gradient of what was computed.
    #[default]
    Mask,
}

/// Compression policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionPolicy {
    /// Every element is sent.
    Dense,
    /// Top-K by one ratio.
    UniformTopk,
    /// Top-K as each link is slow: the paper's AdaTopK.
    AdaTopk,
    /// The same by the published formula.
    AdaTopkLiteral,
    /// As each link is slow, by the codec that loses least.
    #[default]
    Adaptive,
    /// The codecs that are given.
    Fixed,
}

impl CompressionPolicy {
    /// Every policy by its name.
    pub const NAMES: [(&str, Self); 6] = [
        ("dense", Self::Dense),
        ("uniform-topk", Self::UniformTopk),
        ("ada-topk", Self::AdaTopk),
        ("ada-topk-literal", Self::AdaTopkLiteral),
        ("adaptive", Self::Adaptive),
        ("fixed", Self::Fixed),
    ];
}

/// Form of the values on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ValueFormat {
    /// As they are, 32 bits each.
    #[default]
    F32,
    /// Rounded to bfloat16.
    Bf16,
    /// Rounded to IEEE binary16.
    F16,
}

/// `[checkpoint]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointSpec {
    /// After every so many steps, and at the end; 0: only at the end.
    pub every: u64,
    /// How many to keep, the newest; 0: all.
    pub keep: u32,
    /// Folder for them instead of the run directory's `checkpoints`.
    pub to: Option<PathBuf>,
}

/// `[survive]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SurviveSpec {
    /// Go on by itself, from the newest checkpoint, when a CompNode is lost or fails.
    pub enabled: bool,
    /// The least number of CompNodes to go on with.
    pub min_compnodes: u32,
    /// After how many steps CompNodes take snapshots: by what they cost and how often machines are lost, if not given; 0 for
    /// never, so that the job goes on from its checkpoints.
    #[serde(default)]
    pub every: Option<u64>,
    /// Other CompNodes that keep each snapshot.
    #[serde(default = "SurviveSpec::default_copies")]
    pub copies: u32,
    /// Hours between two failures of the job, as far as is known before it has had any.
    #[serde(default = "SurviveSpec::default_mtbf_h")]
    pub mtbf_h: f64,
}

impl SurviveSpec {
    fn default_copies() -> u32 {
        Self::default().copies
    }

    fn default_mtbf_h() -> f64 {
        Self::default().mtbf_h
    }
}

impl Default for SurviveSpec {
    fn default() -> Self {
        Self { enabled: true, min_compnodes: 1, every: None, copies: 1, mtbf_h: 4.0 }
    }
}

#[cfg(test)]
mod tests;
