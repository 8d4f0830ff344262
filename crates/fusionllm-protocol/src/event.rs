//! What metrics, progress bars and `--follow` see of a job.

use serde::{Deserialize, Serialize};

use crate::{DataReport, JobId, Recovery};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Updates done, from 1.
    pub step: u64,
    /// Mean training loss of the step, in nats per token or image.
    pub loss: f64,
    /// Tokens in the step's global batch, or images.
    pub tokens: u64,
    /// Wall time of the step in seconds, evaluation and checkpoint not counted.
    pub step_s: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global gradient norm before clipping, where clipping is on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub grad_norm: Option<f64>,
    /// Evaluation loss after the step, where it was evaluated.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
    /// Share of images in that evaluation whose class is the likeliest one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_accuracy: Option<f64>,
    /// What each link carried in the step.
    pub links: Vec<LinkBytes>,
    /// Codecs that change after the step.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub codec_changes: Vec<CodecNote>,
    /// What the job had recovered from when it did this step; also what came before, where the lines that told it were
    /// dropped since their steps are done again.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub recoveries: Vec<Recovery>,
    /// When the broker wrote the line, in seconds since 1970. Lines of earlier builds and events have none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unix_s: Option<f64>,
    /// Whether the job was started here by hand, for the first time or after a stop: for the time before this step nobody
    /// is to blame.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub starts: bool,
}

/// What one link carried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkBytes {
    /// Name of the sending CompNode.
    pub from: String,
    /// Name of the receiving CompNode.
    pub to: String,
    /// Payload and header bytes of all messages.
    pub bytes: u64,
    /// What the same tensors take as dense fp32.
    pub dense_bytes: u64,
    /// Codec of the activations and gradients.
    pub codec: String,
    /// What the codec dropped of a sample of them: norm of the error over norm of the tensor.
    #[serde(default)]
    pub error: Option<f64>,
}

/// A codec that changes while training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecNote {
    /// Name of the CompNode that sends.
    pub from: String,
    /// Name of the CompNode that receives.
    pub to: String,
    /// The op whose output, or its gradient, is sent.
    pub op: String,
    /// Whether it is the gradient.
    pub gradient: bool,
    /// The codec from now on.
    pub codec: String,
    /// Why, as a sentence for people.
    pub reason: String,
}

/// A line of `notices.jsonl`: what the user of a job must see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Updates that were done when it was said.
    pub step: u64,
    /// What is to be known, in one sentence.
    pub text: String,
}

/// State of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum JobState {
    /// Not enough idle CompNodes yet.
    Waiting {
        /// What it waits for.
        reason: String,
    },
    /// The CompNodes prepare their parts.
    Preparing,
    /// Its CompNodes train.
    Running,
    /// All steps done.
    Done,
    /// It cannot go on.
    Failed {
        /// Why, in one line.
        reason: String,
        /// Whether the job's input is at fault.
        bad_input: bool,
    },
    /// Stopped by request.
    Stopped,
}

impl JobState {
    /// Whether nothing more will happen unless it is resumed.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done | Self::Failed { .. } | Self::Stopped)
    }
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum JobEvent {
    /// The job changed its state.
    State {
        /// The job that it is about.
        job: JobId,
        /// The new state.
        state: JobState,
    },
    /// The data owner reads its data; said from time to time.
    Reading {
        /// The job that it is about.
        job: JobId,
        /// Bytes of the data that have become tokens.
        done: u64,
        /// Bytes of the data.
        total: u64,
    },
    /// The data owner has read its data.
    Data {
        /// The job that it is about.
        job: JobId,
        /// What it found.
        data: DataReport,
    },
    /// A step ended on every CompNode.
    Step {
        /// The job that it is about.
        job: JobId,
        /// The step's line of `metrics.jsonl`.
        metrics: StepMetrics,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// The job that it is about.
        job: JobId,
        /// Updates that the checkpoint has.
        step: u64,
        /// Its folder on the broker's machine.
        path: String,
    },
    /// Something that the job's user must see, such as files that were left out or weights that were made anew.
    Notice {
        /// The job that it is about.
        job: JobId,
        /// What is to be known, in one sentence.
        text: String,
    },
}

impl JobEvent {
    /// The job it is about.
    pub fn job(&self) -> JobId {
        match self {
            Self::State { job, .. }
            | Self::Reading { job, .. }
            | Self::Data { job, .. }
            | Self::Step { job, .. }
            | Self::Checkpoint { job, .. }
            | Self::Notice { job, .. } => *job,
        }
    }
}
