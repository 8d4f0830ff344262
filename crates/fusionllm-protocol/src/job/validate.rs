//! What a job must fulfil beyond types, and what follows from it.

use std::path::{Path, PathBuf};

use fusionllm_codec::Codec;
use fusionllm_graph::{Gpt2Config, MAX_LAYERS, Model, ResnetConfig};
use fusionllm_planner::{Compression, MAX_COMPNODES, Owner, PlacementSpec, PlanSpec};

use super::image_model::{given_sizes, resnet_config};
use super::names::{check_name, check_path};
use super::refusal::fail;
use super::{CompressionPolicy, CompressionSpec, DataFormat, DataSpec, JobSpec, RowKind, ValueFormat};
use crate::JobError;

/// The models that are known by name.
const MODELS: [&str; 13] = [
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "resnet18",
    "resnet50",
    "resnet101",
];

/// Vocabulary of the tokenizer `bytes`.
const BYTES_VOCAB: usize = 256;

/// Most updates of a job.
const MAX_STEPS: u64 = 1_000_000_000_000;
/// Most sequences in a step's global batch.
const MAX_BATCH: u64 = 1 << 24;
/// Most micro-batches of a step or of an evaluation: each is a task of every stage, which plans and orders list one by
/// one.
const MAX_MICRO_BATCHES: u64 = 1 << 16;
/// Most tokens in a sequence, and most positions of a model.
const MAX_SEQ_LEN: usize = 1 << 24;

fn at_most(key: &str, value: u64, most: u64) -> Result<(), JobError> {
    match value {
        0 => fail(key, "is 0, expected at least 1".to_owned()),
        _ if value > most => fail(key, format!("is {value}, expected at most {most}")),
        _ => Ok(()),
    }
}

pub(super) fn in_range(key: &str, value: f64, holds: bool, expected: &str) -> Result<(), JobError> {
    // Written so that NaN, for which no comparison holds, is refused.
    if value.is_finite() && holds {
        return Ok(());
    }
    let is_long = value != 0.0 && !(1e-6..1e15).contains(&value.abs());
    let shown = if is_long && value.is_finite() { format!("{value:e}") } else { value.to_string() };
    fail(key, format!("is {shown}, expected {expected}"))
}

/// A number that is computed with in f32, where it must be neither infinite nor, unless it is 0, vanish.
pub(super) fn fits_f32(key: &str, value: f64) -> Result<(), JobError> {
    let range = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
    in_range(key, value, value == 0.0 || range.contains(&value), "a number that f32 holds: 1.2e-38 to 3.4e38")
}

/// Whether a number is at least 0 and below 1, also where it is computed with, which is in f32.
pub(super) fn is_share(value: f64) -> bool {
    value >= 0.0 && (value as f32) < 1.0
}

/// Conversations need a form that has rows, and something that writes them out.
fn check_rows(data: &DataSpec) -> Result<(), JobError> {
    if data.rows != RowKind::Chat {
        return match &data.chat_template {
            Some(_) => fail("data.chat_template", "is given, but data.rows is not `chat`".to_owned()),
            None => Ok(()),
        };
    }
    if !matches!(data.format, DataFormat::Jsonl | DataFormat::Parquet) {
        let format = DataFormat::ALL.iter().find(|(_, format)| *format == data.format).map_or("", |(name, _)| name);
        let reason = format!("is `chat`, but data.format = \"{format}\" has no rows: expected `jsonl` or `parquet`");
        return fail("data.rows", reason);
    }
    if data.column != DataSpec::TEXT_COLUMN {
        let reason = format!("is `{}`, but conversations have keys of their own: leave it out", data.column);
        return fail("data.column", reason);
    }
    if data.tokenizer == DataSpec::BYTES && data.chat_template.is_none() {
        let reason = "is missing: the tokenizer `bytes` has no chat template, expected the path of a Jinja file";
        return fail("data.chat_template", reason.to_owned());
    }
    Ok(())
}

impl JobSpec {
    /// Holds every value against its range and against the others.
    ///
    /// # Errors
    /// [`JobError::Value`] for the first key that cannot be right.
    pub fn validate(&self) -> Result<(), JobError> {
        check_name("name", &self.name)?;
        self.validate_model()?;
        self.lora.validate()?;
        self.validate_data()?;
        self.validate_train()?;
        self.validate_rates()?;
        let c = &self.compression;
        let (least, most) = (CompressionSpec::RATIOS.start(), CompressionSpec::RATIOS.end());
        let expected = format!("at least {least} and at most {most}");
        in_range("compression.ratio", c.ratio, CompressionSpec::RATIOS.contains(&c.ratio), &expected)?;
        in_range("compression.error_budget", c.error_budget, c.error_budget > 0.0, "above 0")?;
        if let Some(count) = self.placement.compnodes {
            at_most("placement.compnodes", count.into(), MAX_COMPNODES as u64)?;
        }
        let least = self.survive.min_compnodes;
        if let Some(asked) = self.placement.compnodes.filter(|&asked| least > asked) {
            return fail(
                "survive.min_compnodes",
                format!("is {least}, expected at most placement.compnodes = {asked}"),
            );
        }
        at_most("survive.min_compnodes", self.survive.min_compnodes.into(), MAX_COMPNODES as u64)?;
        let copies = self.survive.copies;
        in_range(
            "survive.copies",
            copies.into(),
            copies as usize <= MAX_COMPNODES,
            &format!("at most {MAX_COMPNODES}"),
        )?;
        let mtbf_h = self.survive.mtbf_h;
        in_range("survive.mtbf_h", mtbf_h, mtbf_h.is_finite() && mtbf_h > 0.0, "above 0")?;
        self.validate_texts()
    }

    /// What becomes a file's name or stands in tables.
    fn validate_texts(&self) -> Result<(), JobError> {
        if let Some(owner) = &self.data.owner
            && (owner.trim().is_empty() || owner.chars().any(char::is_control))
        {
            return fail("data.owner", format!("is {owner:?}, expected the name of a CompNode, as `status` shows it"));
        }
        self.data.path.iter().try_for_each(|path| check_path("data.path", path))?;
        check_path("data.tokenizer", Path::new(&self.data.tokenizer))?;
        let paths = [
            ("model.path", &self.model.path),
            ("lora.adapter", &self.lora.adapter),
            ("placement.cluster", &self.placement.cluster),
            ("checkpoint.to", &self.checkpoint.to),
            ("data.chat_template", &self.data.chat_template),
        ];
        paths.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?))).try_for_each(|(k, p)| check_path(k, p))
    }

    fn validate_model(&self) -> Result<(), JobError> {
        let m = &self.model;
        let sizes = [
            ("model.vocab_size", m.vocab_size),
            ("model.n_positions", m.n_positions),
            ("model.n_embd", m.n_embd),
            ("model.n_layer", m.n_layer),
            ("model.n_head", m.n_head),
        ];
        match (&m.name, &m.path) {
            (Some(_), Some(_)) => {
                return fail("model.path", "is given beside model.name, expected exactly one of them".to_owned());
            }
            (None, None) if m.family.is_none() => {
                return fail("model.name", "is missing, expected model.name = \"gpt2\" or model.path".to_owned());
            }
            (Some(name), None) if !MODELS.contains(&name.as_str()) => {
                let names = MODELS.map(|m| format!("`{m}`")).join(", ");
                return fail("model.name", format!("is `{name}`, expected one of {names}"));
            }
            (Some(name), None) if Gpt2Config::named(name).is_none() && ResnetConfig::named(name).is_none() => {
                if let Some((key, _)) = sizes.iter().find(|(_, size)| size.is_some()) {
                    return fail(key, format!("is given beside model.name = \"{name}\", which has one size"));
                }
            }
            (None, Some(path)) => {
                if let Some((key, _)) = sizes.iter().find(|(_, size)| size.is_some()) {
                    return fail(key, format!("is given beside model.path, but {} says it", path.display()));
                }
            }
            (Some(_) | None, None) => {}
        }
        self.validate_family()?;
        if let Some((key, _)) = sizes.iter().find(|(_, size)| *size == Some(0)) {
            return fail(key, "is 0, expected at least 1".to_owned());
        }
        in_range("model.dropout", m.dropout, is_share(m.dropout), "at least 0 and below 1")?;
        if self.resnet_config().is_some() != self.data.format.is_images() && m.path.is_none() {
            return fail("data.format", self.wrong_format());
        }
        let Some(config) = self.gpt2_config() else { return Ok(()) };
        at_most("model.n_layer", config.n_layer as u64, MAX_LAYERS as u64)?;
        if let Some(positions) = m.n_positions {
            at_most("model.n_positions", positions as u64, MAX_SEQ_LEN as u64)?;
        }
        if config.n_embd % config.n_head != 0 {
            let (width, heads) = (config.n_embd, config.n_head);
            return fail("model.n_head", format!("is {heads}, expected a divisor of model.n_embd = {width}"));
        }
        if config.n_positions < self.data.seq_len {
            let (got, least) = (config.n_positions, self.data.seq_len);
            return fail("model.n_positions", format!("is {got}, expected at least data.seq_len = {least}"));
        }
        if self.data.tokenizer == DataSpec::BYTES && config.vocab_size < BYTES_VOCAB {
            let got = config.vocab_size;
            return fail(
                "model.vocab_size",
                format!("is {got}, expected at least {BYTES_VOCAB} for the tokenizer `bytes`"),
            );
        }
        Ok(())
    }

    /// Whether keys of a family go with the model.
    fn validate_family(&self) -> Result<(), JobError> {
        let m = &self.model;
        let own = |key: &&(&str, bool)| key.1;
        let by = match (&m.name, &m.path) {
            (_, Some(_)) => "model.path",
            (Some(_), None) => "model.name",
            (None, None) => "model.family",
        };
        if m.family.is_some() && by != "model.family" {
            return fail("model.family", format!("is given beside {by}, expected exactly one of them"));
        }
        let Some(config) = self.resnet_config() else {
            return match given_sizes(m).iter().find(own) {
                Some((key, _)) => fail(key, format!("is given beside {by}, and is a size of ResNets alone")),
                None => Ok(()),
            };
        };
        let of_language =
            [("model.vocab_size", m.vocab_size), ("model.n_positions", m.n_positions), ("model.n_embd", m.n_embd)];
        let of_language = of_language.into_iter().chain([("model.n_layer", m.n_layer), ("model.n_head", m.n_head)]);
        if let Some((key, _)) = of_language.into_iter().find(|(_, size)| size.is_some()) {
            return fail(key, "is a size of GPT-2, and the model is a ResNet".to_owned());
        }
        match config.depths.len() == config.widths.len() {
            true => Ok(()),
            false => {
                let (got, layers) = (config.widths.len(), config.depths.len());
                fail("model.widths", format!("has {got} numbers, expected {layers}, one for each of model.depths"))
            }
        }
    }

    fn wrong_format(&self) -> String {
        let format =
            DataFormat::ALL.iter().find(|(_, format)| *format == self.data.format).map_or("", |(name, _)| name);
        match self.data.format.is_images() {
            true => format!("is `{format}`, expected text or tokens for a language model"),
            false => format!("is `{format}`, expected `images` or `cifar10` for a model of images"),
        }
    }

    fn validate_data(&self) -> Result<(), JobError> {
        let d = &self.data;
        d.validate_images()?;
        let of_private =
            [("data.private_seed", d.private_seed.is_some()), ("data.keep_blocks", d.keep_blocks != [0; 2])];
        if let Some((key, _)) = of_private.iter().find(|(_, given)| *given && !d.private) {
            return fail(key, "is given, but data.private is not set: expected data.private = true too".to_owned());
        }
        if d.path.is_empty() || d.path.iter().any(|p| p.as_os_str().is_empty()) {
            return fail("data.path", "is empty, expected the path of a file or folder".to_owned());
        }
        if d.tokenizer.is_empty() {
            return fail("data.tokenizer", "is empty, expected `bytes` or the path of a tokenizer.json".to_owned());
        }
        if d.tokenizer == DataSpec::MODEL && self.model.path.is_none() {
            let reason =
                "is `model`, but model.name has no tokenizer: expected `bytes` or the path of a tokenizer.json";
            return fail("data.tokenizer", reason.to_owned());
        }
        if d.seq_len < 2 {
            return fail("data.seq_len", format!("is {}, expected at least 2", d.seq_len));
        }
        at_most("data.seq_len", d.seq_len as u64, MAX_SEQ_LEN as u64)?;
        check_rows(d)?;
        let share = d.eval_fraction;
        in_range("data.eval_fraction", share, share > 0.0 && share <= 0.5, "above 0 and at most 0.5")
    }

    fn validate_train(&self) -> Result<(), JobError> {
        let t = &self.train;
        for (key, value, most) in [
            ("train.steps", t.steps, MAX_STEPS),
            ("train.batch", t.batch.into(), MAX_BATCH),
            ("train.micro_batches", t.micro_batches.into(), MAX_MICRO_BATCHES),
            ("train.eval_batches", t.eval_batches.into(), MAX_MICRO_BATCHES),
        ] {
            at_most(key, value, most)?;
        }
        if !t.batch.is_multiple_of(t.micro_batches) {
            let below = t.batch - t.batch % t.micro_batches;
            let above = below.checked_add(t.micro_batches);
            let nearest: Vec<String> =
                [(below > 0).then_some(below), above].iter().flatten().map(u32::to_string).collect();
            let (batch, micro_batches) = (t.batch, t.micro_batches);
            let nearest = nearest.join(" or ");
            let reason =
                format!("is {batch}, expected a multiple of train.micro_batches = {micro_batches}, such as {nearest}");
            return fail("train.batch", reason);
        }
        if t.warmup > t.steps {
            // It may be one that was filled in when the job had more steps.
            let lower = format!("set train.warmup={} or less, too", t.steps);
            return fail("train.warmup", format!("is {}, more than train.steps = {}: {lower}", t.warmup, t.steps));
        }
        Ok(())
    }

    fn validate_rates(&self) -> Result<(), JobError> {
        let t = &self.train;
        let [beta_1, beta_2] = t.betas;
        in_range("train.lr", t.lr, t.lr > 0.0, "above 0")?;
        let share = t.min_lr_ratio;
        in_range("train.min_lr_ratio", share, (0.0..=1.0).contains(&share), "at least 0 and at most 1")?;
        in_range("train.betas", beta_1, is_share(beta_1), "at least 0 and below 1")?;
        in_range("train.betas", beta_2, is_share(beta_2), "at least 0 and below 1")?;
        in_range("train.epsilon", t.epsilon, t.epsilon > 0.0, "above 0")?;
        in_range("train.weight_decay", t.weight_decay, t.weight_decay >= 0.0, "at least 0")?;
        in_range("train.momentum", t.momentum, is_share(t.momentum), "at least 0 and below 1")?;
        in_range("train.clip", t.clip, t.clip >= 0.0, "at least 0 (0 turns clipping off)")?;
        let rates = [
            ("train.lr", t.lr),
            ("train.epsilon", t.epsilon),
            ("train.weight_decay", t.weight_decay),
            ("train.clip", t.clip),
        ];
        rates.into_iter().try_for_each(|(key, value)| fits_f32(key, value))
    }

    /// Makes every path absolute against `base`, the folder of the job file. Nothing is looked up.
    pub fn resolve_paths(&mut self, base: &Path) {
        let resolve = |path: &mut PathBuf| *path = base.join(&*path);
        self.data.path.iter_mut().for_each(resolve);
        self.model.path.iter_mut().for_each(resolve);
        self.lora.adapter.iter_mut().for_each(resolve);
        self.checkpoint.to.iter_mut().for_each(resolve);
        self.placement.cluster.iter_mut().for_each(resolve);
        self.data.chat_template.iter_mut().for_each(resolve);
        if self.data.tokenizer_file().is_some() {
            self.data.tokenizer = base.join(&self.data.tokenizer).to_string_lossy().into_owned();
        }
    }

    /// The model that `model.name` or `model.family` and the sizes beside it describe; `None` for a model by path, or of
    /// an unknown name.
    pub fn named_model(&self) -> Option<Model> {
        let gpt2 = self.gpt2_config().map(Model::Gpt2);
        let resnet = || self.resnet_config().map(Model::Resnet);
        gpt2.or_else(resnet).or_else(|| Model::named(self.model.name.as_deref()?))
    }

    /// The ResNet that `[model]` describes.
    fn resnet_config(&self) -> Option<ResnetConfig> {
        resnet_config(&self.model, &self.data)
    }

    /// The GPT-2 that `model.name` and the sizes beside it describe.
    pub(super) fn gpt2_config(&self) -> Option<Gpt2Config> {
        let m = &self.model;
        let named = Gpt2Config::named(m.name.as_deref()?)?;
        let vocab = if self.data.tokenizer == DataSpec::BYTES { BYTES_VOCAB } else { named.vocab_size };
        Some(Gpt2Config {
            vocab_size: m.vocab_size.unwrap_or(vocab),
            n_positions: m.n_positions.unwrap_or(self.data.seq_len),
            n_embd: m.n_embd.unwrap_or(named.n_embd),
            n_layer: m.n_layer.unwrap_or(named.n_layer),
            n_head: m.n_head.unwrap_or(named.n_head),
            layer_norm_epsilon: named.layer_norm_epsilon,
            dropout: m.dropout,
        })
    }

    /// Sequences in a micro-batch.
    pub fn micro_batch_size(&self) -> u32 {
        self.train.batch.checked_div(self.train.micro_batches).unwrap_or(0)
    }

    /// Codec of every F32 boundary tensor.
    pub fn codec(&self) -> Codec {
        match self.compression.values {
            ValueFormat::F32 => Codec::Dense,
            ValueFormat::Bf16 => Codec::Bf16,
            ValueFormat::F16 => Codec::F16,
        }
    }

    /// What the links carry.
    pub fn compression(&self) -> Compression {
        let CompressionSpec { ratio, topk_values: values, activations, gradients, .. } = self.compression;
        match self.compression.policy {
            CompressionPolicy::Dense => Compression::Dense,
            CompressionPolicy::UniformTopk => Compression::UniformTopk { ratio, values },
            CompressionPolicy::AdaTopk => Compression::AdaTopk { ratio, values, literal: false },
            CompressionPolicy::AdaTopkLiteral => Compression::AdaTopk { ratio, values, literal: true },
            CompressionPolicy::Adaptive => Compression::Adaptive { ratio },
            CompressionPolicy::Fixed => Compression::Fixed { activations, gradients },
        }
    }

    /// What the planner is asked for.
    pub fn placement_spec(&self) -> PlacementSpec {
        PlacementSpec {
            strategy: self.placement.strategy,
            stages: self.placement.stages.clone(),
            pipeline: self.placement.pipeline,
            run_ahead: self.placement.run_ahead,
            deferred: self.placement.deferred,
            micro_batches: self.train.micro_batches,
            micro_batch_size: self.micro_batch_size(),
            eval_micro_batches: self.train.eval_batches,
            private: self.data.private,
            keep_blocks: self.data.keep_blocks,
            codec: self.codec(),
        }
    }

    /// What a plan of this job is asked for. The data owner is the cluster's first CompNode.
    pub fn plan_spec(&self) -> PlanSpec {
        PlanSpec {
            placement: self.placement_spec(),
            compression: self.compression(),
            owner: Owner::First,
            error_feedback: self.compression.error_feedback,
            clip: self.train.clips(),
            tokens_per_step: self.tokens_per_step(),
            states: self.train.states().len() as u32,
            recompute: self.placement.recompute,
        }
    }

    /// Tokens in a step's global batch, or images.
    pub fn tokens_per_step(&self) -> u64 {
        let of_sample = if self.data.format.is_images() { 1 } else { self.data.seq_len as u64 };
        u64::from(self.train.batch).saturating_mul(of_sample)
    }
}
