//! What a CompNode is told of a job.
//!
//! These types are not the job's own, so that a key that the job gets later is not sent by accident: whoever wants it here
//! writes it here. `tests::each_key_goes_to_whom_it_is_for` says of every key of a job file who gets it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    Cadence, CompressionSpec, DataSpec, JobSpec, LrSchedule, Measuring, OptimizerKind, Precision, RunId, StateKind,
    TopKBackward, TrainSpec,
};

/// A job as one of its CompNodes sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    /// Steps, batches, the optimizer, and the seed of what is not the data owner's alone.
    pub train: TrainView,
    /// What senders and receivers of tensors must agree on.
    pub compression: CompressionView,
    /// After how many steps CompNodes hand in the shards of a checkpoint; 0: only at the end.
    pub checkpoint_every: u64,
    /// Whether `data.private` is set.
    pub is_private: bool,
    /// What only the data owner is told.
    pub owner: Option<Box<OwnerView>>,
}

/// `[train]` without anything else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainView {
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
    /// Learning rate at the end, as a share of `lr`.
    pub min_lr_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// The lr schedule after warm-up.
    pub schedule: LrSchedule,
    /// Decay rates of AdamW's two moments.
    pub betas: [f64; 2],
    /// What AdamW adds to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip: f64,
    /// Seed of initial parameters and dropout; under `data.private` with a seed of the owner's own, not of those that stay
    /// with the owner.
    pub seed: u64,
    /// Precision of compute.
    pub precision: Precision,
    /// Evaluate after every so many steps, and at the end; 0: only at the end.
    pub eval_every: u64,
    /// Micro-batches of an evaluation.
    pub eval_batches: u32,
}

/// What of `[compression]` is not in the placement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompressionView {
    /// Add what was dropped of a gradient to the next one.
    pub error_feedback: bool,
    /// Send the difference to a running mean that both ends hold.
    pub predict: bool,
    /// How the gradient of a Top-K activation goes back.
    pub backward: TopKBackward,
}

/// What the data owner is told of a job, and nobody else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwnerView {
    /// The run, by which the owner knows a seed of its own again.
    pub run: RunId,
    /// The run with whose checkpoint a new one begins, and with it the seed.
    pub begins_with: Option<RunId>,
    /// The data: paths, form, tokenizer, order.
    pub data: DataSpec,
    /// Whether the model came from `model.path`, so that the job's user has not chosen its sizes.
    pub model_by_path: bool,
    /// For `data.tokenizer = "model"`, the content of the model's tokenizer.json: it lies on the broker's machine.
    pub tokenizer: Option<String>,
    /// With it, for `data.rows = "chat"`: the contents of those of [`crate::hugging_face::CHAT_FILES`] that lie beside it, by name.
    pub chat: BTreeMap<String, String>,
}

impl JobView {
    /// What every CompNode is told.
    pub fn of(spec: &JobSpec) -> Self {
        Self {
            train: spec.train.view(),
            compression: spec.compression.view(),
            checkpoint_every: spec.checkpoint.every,
            is_private: spec.data.private,
            owner: None,
        }
    }

    /// What the data owner is told of a job of this run, whose model's tokenizer needs no file of the broker's.
    pub fn of_owner(spec: &JobSpec, run: RunId) -> Self {
        let owner = OwnerView {
            run,
            begins_with: None,
            data: spec.data.clone(),
            model_by_path: spec.model.path.is_some(),
            tokenizer: None,
            chat: BTreeMap::new(),
        };
        Self { owner: Some(Box::new(owner)), ..Self::of(spec) }
    }

    /// When CompNodes hand in the shards of a checkpoint.
    pub fn checkpoints(&self) -> Cadence {
        Cadence { every: self.checkpoint_every, last: self.train.steps }
    }

    /// When the loss of the data that is held out is taken.
    pub fn evaluations(&self) -> Cadence {
        self.train.evaluations()
    }
}

impl TrainSpec {
    /// What a CompNode is told of it.
    pub fn view(&self) -> TrainView {
        // Whole, so that a new key is thought about here.
        let Self {
            steps,
            batch,
            micro_batches,
            optimizer,
            lr,
            min_lr_ratio,
            warmup,
            schedule,
            betas,
            epsilon,
            weight_decay,
            momentum,
            clip,
            seed,
            precision,
            eval_every,
            eval_batches,
        } = *self;
        TrainView {
            steps,
            batch,
            micro_batches,
            optimizer,
            lr,
            min_lr_ratio,
            warmup,
            schedule,
            betas,
            epsilon,
            weight_decay,
            momentum,
            clip,
            seed,
            precision,
            eval_every,
            eval_batches,
        }
    }
}

impl CompressionSpec {
    /// What a CompNode is told of it besides the codecs in its placement.
    pub fn view(&self) -> CompressionView {
        let Self { error_feedback, predict, backward, .. } = *self;
        CompressionView { error_feedback, predict, backward }
    }
}

impl TrainView {
    /// Sequences in a micro-batch.
    pub fn micro_batch_size(&self) -> u32 {
        self.batch.checked_div(self.micro_batches).unwrap_or(0)
    }

    /// When the loss of the data that is held out is taken.
    pub fn evaluations(&self) -> Cadence {
        Cadence { every: self.eval_every, last: self.steps }
    }

    /// What the optimizer keeps of each parameter.
    pub fn states(&self) -> &'static [StateKind] {
        self.optimizer.states(self.momentum)
    }

    /// As [`TrainSpec::state_bytes`].
    pub fn state_bytes(&self, param_bytes: u64, trained_bytes: u64) -> u64 {
        self.optimizer.state_bytes(self.momentum, param_bytes, trained_bytes)
    }

    /// What measuring the job's ops depends on besides its OP-DAG.
    pub fn measuring(&self) -> Measuring {
        Measuring { batch: self.micro_batch_size(), states: self.states(), precision: self.precision }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::job_keys;

    /// Who learns of a key.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Goes {
        ToAll,
        ToOwner,
        Nowhere,
    }

    use Goes::{Nowhere, ToAll, ToOwner};

    type Key = (&'static str, &'static str, Value, Goes);

    /// Every key with another value than that of the test's job.
    fn keys() -> Vec<Key> {
        [of_model_and_data(), of_training()].concat()
    }

    fn of_model_and_data() -> Vec<Key> {
        vec![
            ("", "name", json!("secret"), Nowhere),
            ("model", "name", json!("gpt2-xl"), Nowhere),
            // Only whether there is one.
            ("model", "path", json!("/secret"), ToOwner),
            ("model", "weights", json!("new"), Nowhere),
            ("model", "vocab_size", json!(300), Nowhere),
            ("model", "n_positions", json!(300), Nowhere),
            ("model", "n_embd", json!(300), Nowhere),
            ("model", "n_layer", json!(300), Nowhere),
            ("model", "n_head", json!(300), Nowhere),
            ("model", "dropout", json!(0.5), Nowhere),
            ("model", "family", json!("resnet"), Nowhere),
            ("model", "block", json!("basic"), Nowhere),
            ("model", "depths", json!([3]), Nowhere),
            ("model", "widths", json!([3]), Nowhere),
            ("model", "stem", json!("cifar"), Nowhere),
            ("model", "image_size", json!(32), Nowhere),
            ("model", "classes", json!(3), Nowhere),
            ("lora", "rank", json!(3), Nowhere),
            ("lora", "alpha", json!(3.0), Nowhere),
            ("lora", "targets", json!(["x"]), Nowhere),
            ("lora", "dropout", json!(0.5), Nowhere),
            ("lora", "rslora", json!(true), Nowhere),
            ("lora", "adapter", json!("/secret"), Nowhere),
            ("data", "path", json!(["/secret"]), ToOwner),
            ("data", "format", json!("jsonl"), ToOwner),
            ("data", "column", json!("secret"), ToOwner),
            ("data", "rows", json!("chat"), ToOwner),
            ("data", "chat_template", json!("/secret"), ToOwner),
            ("data", "tokenizer", json!("/secret"), ToOwner),
            // The OP-DAG has it.
            ("data", "seq_len", json!(99), ToOwner),
            ("data", "private", json!(true), ToAll),
            ("data", "private_seed", json!("job"), ToOwner),
            ("data", "keep_blocks", json!([1, 1]), ToOwner),
            ("data", "owner", json!("secret"), ToOwner),
            ("data", "eval_fraction", json!(0.4), ToOwner),
            ("data", "order", json!("shuffled"), ToOwner),
            ("data", "cache", json!(false), ToOwner),
            ("data", "mean", json!([0.1, 0.2, 0.3]), ToOwner),
            ("data", "std", json!([0.1, 0.2, 0.3]), ToOwner),
            ("data", "crop_padding", json!(3), ToOwner),
            ("data", "flip", json!(true), ToOwner),
        ]
    }

    fn of_training() -> Vec<Key> {
        let codec = json!("int4");
        vec![
            ("train", "steps", json!(77), ToAll),
            ("train", "batch", json!(77), ToAll),
            ("train", "micro_batches", json!(77), ToAll),
            ("train", "optimizer", json!("sgd"), ToAll),
            ("train", "lr", json!(0.7), ToAll),
            ("train", "min_lr_ratio", json!(0.7), ToAll),
            ("train", "warmup", json!(7), ToAll),
            ("train", "schedule", json!("constant"), ToAll),
            ("train", "betas", json!([0.1, 0.2]), ToAll),
            ("train", "epsilon", json!(0.7), ToAll),
            ("train", "weight_decay", json!(0.7), ToAll),
            ("train", "momentum", json!(0.7), ToAll),
            ("train", "clip", json!(0.7), ToAll),
            ("train", "seed", json!(77), ToAll),
            ("train", "precision", json!("bf16"), ToAll),
            ("train", "eval_every", json!(7), ToAll),
            ("train", "eval_batches", json!(7), ToAll),
            // The placement is what came of these.
            ("placement", "compnodes", json!(7), Nowhere),
            ("placement", "strategy", json!("equal-number"), Nowhere),
            ("placement", "pipeline", json!("gpipe"), Nowhere),
            ("placement", "run_ahead", json!(7), Nowhere),
            ("placement", "deferred", json!(7), Nowhere),
            ("placement", "recompute", json!("always"), Nowhere),
            ("placement", "stages", json!([{ "compnode": 0, "last_op": "loss" }]), Nowhere),
            ("placement", "cluster", json!("/secret"), Nowhere),
            ("compression", "policy", json!("dense"), Nowhere),
            ("compression", "ratio", json!(3.0), Nowhere),
            ("compression", "values", json!("bf16"), Nowhere),
            ("compression", "topk_values", json!("int8"), Nowhere),
            ("compression", "activations", codec.clone(), Nowhere),
            ("compression", "gradients", codec, Nowhere),
            ("compression", "error_feedback", json!(true), ToAll),
            ("compression", "predict", json!(true), ToAll),
            ("compression", "backward", json!("straight"), ToAll),
            ("compression", "adapt", json!(true), Nowhere),
            ("compression", "error_budget", json!(0.7), Nowhere),
            ("checkpoint", "every", json!(7), ToAll),
            ("checkpoint", "keep", json!(7), Nowhere),
            ("checkpoint", "to", json!("/secret"), Nowhere),
            ("survive", "enabled", json!(false), Nowhere),
            ("survive", "min_compnodes", json!(7), Nowhere),
            ("survive", "every", json!(7), Nowhere),
            ("survive", "copies", json!(7), Nowhere),
            ("survive", "mtbf_h", json!(7.0), Nowhere),
        ]
    }

    #[test]
    fn each_key_goes_to_whom_it_is_for() {
        let text = "[model]\nname = \"gpt2\"\n[data]\npath = \"a\"\n[compression]\nbackward = \"mask\"";
        let base = JobSpec::from_toml(text, &[]).unwrap();
        let run = RunId::from_bytes([7; 16]);
        let views = |spec: &JobSpec| {
            let bytes = |view: &JobView| crate::encode(view).unwrap();
            (bytes(&JobView::of(spec)), bytes(&JobView::of_owner(spec, run.clone())))
        };
        let (to_all, to_owner) = views(&base);
        for (section, key, value, goes) in keys() {
            let mut job = serde_json::to_value(&base).unwrap();
            let keys = if section.is_empty() { &mut job } else { &mut job[section] };
            assert_ne!(keys[key], value, "{section}.{key}: the test's job has it");
            keys[key] = value;
            let (all, owner) = views(&serde_json::from_value(job).unwrap());
            let found = match (all != to_all, owner != to_owner) {
                (true, true) => ToAll,
                (false, true) => ToOwner,
                (false, false) => Nowhere,
                (true, false) => panic!("{section}.{key} goes to all but the owner"),
            };
            assert_eq!(found, goes, "{section}.{key}");
        }
        let listed: Vec<_> = keys().iter().map(|(section, key, ..)| (*section, *key)).collect();
        assert_eq!(listed, job_keys(), "say of each key of a job who gets it");
    }
}
