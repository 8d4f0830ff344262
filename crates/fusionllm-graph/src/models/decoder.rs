//! Decoders with RMS norms, rotary positions, grouped attention and a gated feed-forward part: Llama and its kin, as
//! OP-DAGs with Hugging Face's parameter names, layouts and initial values.
//!
//! Shapes: B batch, S sequence, D `hidden_size`, V `vocab_size`, K `head_dim`.

mod config;

use crate::builder::DagBuilder;
use crate::dag::{OpDag, OpId, ParamId};
use crate::dtype::DType;
use crate::error::GraphError;
use crate::kind::{ActivationFunction, WeightLayout};
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::rotary::RotaryScaling;
use crate::shape::Shape;

use super::MAX_LAYERS;
use super::families::DecoderFamily;

/// Sizes and settings of a decoder, under the names of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Which family it is of.
    pub family: &'static DecoderFamily,
    /// V: entries of the vocabulary.
    pub vocab_size: usize,
    /// D: width.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// K: size of a head, even.
    pub head_dim: usize,
    /// Tokens of the longest sequence.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RotaryScaling,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Function of the gate of the feed-forward part.
    pub hidden_act: ActivationFunction,
    /// Whether the projections to queries, keys and values have biases.
    pub query_bias: bool,
    /// Whether the projection after attention has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward part has biases.
    pub mlp_bias: bool,
    /// How far back a layer looks at the least; `None` is all the way. Longer sequences cannot be built.
    pub sliding_window: Option<usize>,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
}

impl DecoderConfig {
    /// Published sizes, for planning and for training anew: `llama-3.2-1b`, `llama-3.1-8b`, `mistral-7b`,
    /// `qwen2.5-0.5b`, `qwen2.5-7b`, `qwen3-0.6b`.
    pub fn named(name: &str) -> Option<Self> {
        let llama3 = |factor| RotaryScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        };
        // Family, V, D, feed-forward, layers, heads, heads of keys, K, positions, theta, scaling, tied.
        let none = RotaryScaling::None;
        let (family, [vocab, dim, inner, layers, heads, kv_heads, head_dim, positions], rope_theta, scaling, tied) =
            match name {
                "llama-3.2-1b" => {
                    let sizes = [128_256, 2048, 8192, 16, 32, 8, 64, 131_072];
                    ("llama", sizes, 5e5, llama3(32.0), true)
                }
                "llama-3.1-8b" => {
                    let sizes = [128_256, 4096, 14_336, 32, 32, 8, 128, 131_072];
                    ("llama", sizes, 5e5, llama3(8.0), false)
                }
                "mistral-7b" => ("mistral", [32_768, 4096, 14_336, 32, 32, 8, 128, 32_768], 1e6, none, false),
                "qwen2.5-0.5b" => ("qwen2", [151_936, 896, 4864, 24, 14, 2, 64, 32_768], 1e6, none, true),
                "qwen2.5-7b" => ("qwen2", [152_064, 3584, 18_944, 28, 28, 4, 128, 32_768], 1e6, none, false),
                "qwen3-0.6b" => ("qwen3", [151_936, 1024, 3072, 28, 16, 8, 128, 40_960], 1e6, none, true),
                _ => return None,
            };
        let family = DecoderFamily::of_type(family)?;
        Some(Self {
            family,
            vocab_size: vocab,
            hidden_size: dim,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: positions,
            rms_norm_eps: family.published_eps,
            rope_theta,
            rope_scaling: scaling,
            tie_word_embeddings: tied,
            hidden_act: ActivationFunction::Silu,
            query_bias: family.query_bias == super::families::Bias::Always,
            output_bias: false,
            mlp_bias: false,
            sliding_window: None,
            initializer_range: 0.02,
        })
    }

    /// The configuration that [`decoder`] built `dag` from, with sequences no longer than its own; `None` if it is
    /// another model.
    pub fn of(dag: &OpDag) -> Option<Self> {
        let family = DecoderFamily::of_type(dag.name())?;
        let op = |name: &str| dag.find(name).map(|op| dag.op(op));
        let has_bias = |name: &str| matches!(op(name).map(|op| &op.kind), Some(OpKind::Linear { bias: true, .. }));
        let &OpKind::Embedding { vocab, dim } = &op("embed_tokens")?.kind else { return None };
        let &OpKind::RmsNorm { eps, .. } = &op("norm")?.kind else { return None };
        let &OpKind::Linear { outputs: inner, .. } = &op("layers.0.mlp.gate_proj")?.kind else { return None };
        let &OpKind::Activation { function } = &op("layers.0.mlp.act")?.kind else { return None };
        let &OpKind::GroupedAttention { heads, kv_heads, .. } = &op("layers.0.self_attn")?.kind else { return None };
        let OpKind::Rotary { head_dim, base, scaling } = &op("layers.0.self_attn.q_rotary")?.kind else { return None };
        let is_attention = |op: &&crate::Op| matches!(op.kind, OpKind::GroupedAttention { .. });
        let table = *op("embed_tokens")?.params.first()?;
        let tied = op("lm_head")?.params.first() == Some(&table);
        let Init::Normal { std } = dag.param(table).init else { return None };
        let config = Self {
            family,
            vocab_size: vocab,
            hidden_size: dim,
            intermediate_size: inner,
            num_hidden_layers: dag.ops().iter().filter(is_attention).count(),
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: *head_dim,
            max_position_embeddings: dag.seq_len()?,
            rms_norm_eps: eps,
            rope_theta: *base,
            rope_scaling: scaling.clone(),
            tie_word_embeddings: tied,
            hidden_act: function,
            query_bias: has_bias("layers.0.self_attn.q_proj"),
            output_bias: has_bias("layers.0.self_attn.o_proj"),
            mlp_bias: has_bias("layers.0.mlp.gate_proj"),
            sliding_window: None,
            // As it was written, not as it widens: 0.02 rather than 0.0199999995.
            initializer_range: std.to_string().parse().ok()?,
        };
        let same = decoder(&config, dag.seq_len()?).ok()?;
        (same.ops() == dag.ops() && same.params() == dag.params()).then_some(config)
    }

    fn check(&self, seq_len: usize) -> Result<(), GraphError> {
        let model = self.family.model_type;
        let wrong = |key: &'static str, got: &dyn std::fmt::Display, expected: String| {
            Err(GraphError::Model { model, key, expected, got: got.to_string() })
        };
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("seq_len", seq_len),
        ];
        for (key, size) in sizes {
            // The largest size of which a product of two still is far from overflowing.
            const LARGEST: usize = 1 << 28;
            let largest = if key == "num_hidden_layers" { MAX_LAYERS } else { LARGEST };
            if size == 0 || size > largest {
                return wrong(key, &size, format!("1 to {largest}"));
            }
        }
        let heads = self.num_attention_heads;
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads {heads}");
            return wrong("num_key_value_heads", &self.num_key_value_heads, expected);
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong("head_dim", &self.head_dim, "an even number, for rotary positions".to_owned());
        }
        if seq_len > self.max_position_embeddings {
            let expected = format!("at most max_position_embeddings {}", self.max_position_embeddings);
            return wrong("seq_len", &seq_len, expected);
        }
        if let Some(window) = self.sliding_window.filter(|&window| seq_len > window) {
            let expected =
                format!("at most sliding_window {window}: attention that looks back no further is not computed");
            return wrong("seq_len", &seq_len, expected);
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            let expected = "a finite number of at least 0".to_owned();
            return wrong("initializer_range", &self.initializer_range, expected);
        }
        Ok(())
    }
}

/// A decoder with its loss, for sequences of `seq_len` tokens. Labels are taken as given, without a shift.
///
/// # Errors
/// A size is 0 or out of range, heads do not divide, or `seq_len` is over `max_position_embeddings` or the sliding window.
pub fn decoder(config: &DecoderConfig, seq_len: usize) -> Result<OpDag, GraphError> {
    config.check(seq_len)?;
    let ids = Shape::batched(&[seq_len]);
    let (vocab, dim) = (config.vocab_size, config.hidden_size);
    let mut model = Builder { dag: DagBuilder::new(config.family.model_type), config };
    let input = model.dag.op("input", OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[], &[])?;
    let label = model.dag.op("label", OpKind::Label { shape: ids }, &[], &[])?;
    let table = model.weight("model.embed_tokens", &[vocab, dim])?;
    let mut hidden_bsd = model.dag.op("embed_tokens", OpKind::Embedding { vocab, dim }, &[input], &[table])?;
    for layer in 0..config.num_hidden_layers {
        hidden_bsd = model.block(layer, hidden_bsd)?;
    }
    let normed_bsd = model.norm("norm", hidden_bsd, dim)?;
    let table = if config.tie_word_embeddings { table } else { model.weight("lm_head", &[vocab, dim])? };
    let head = OpKind::Linear { inputs: dim, outputs: vocab, bias: false, layout: WeightLayout::OutIn };
    let logits_bsv = model.dag.op("lm_head", head, &[normed_bsd], &[table])?;
    model.dag.op("loss", OpKind::CrossEntropy, &[logits_bsv, label], &[])?;
    model.dag.build()
}

/// Adds the parts of a decoder. A parameter's key is `model.`, the op's name, and its role.
struct Builder<'a> {
    dag: DagBuilder,
    config: &'a DecoderConfig,
}

impl Builder<'_> {
    /// One pre-norm block: attention and feed-forward part, each added to what came in.
    fn block(&mut self, layer: usize, input_bsd: OpId) -> Result<OpId, GraphError> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let dim = self.config.hidden_size;
        let normed = self.norm(&name("input_layernorm"), input_bsd, dim)?;
        let attended = self.attention(&name("self_attn"), normed)?;
        let between_bsd = self.dag.op(&name("add_1"), OpKind::Add, &[input_bsd, attended], &[])?;
        let normed = self.norm(&name("post_attention_layernorm"), between_bsd, dim)?;
        let gated = self.feed_forward(&name("mlp"), normed)?;
        self.dag.op(&name("add_2"), OpKind::Add, &[between_bsd, gated], &[])
    }

    fn attention(&mut self, name: &str, input_bsd: OpId) -> Result<OpId, GraphError> {
        let config = self.config;
        let (dim, head_dim) = (config.hidden_size, config.head_dim);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let part = |what: &str| format!("{name}.{what}");
        let mut query = self.linear(&part("q_proj"), input_bsd, [dim, width], config.query_bias)?;
        let mut key = self.linear(&part("k_proj"), input_bsd, [dim, kv_width], config.query_bias)?;
        let value = self.linear(&part("v_proj"), input_bsd, [dim, kv_width], config.query_bias)?;
        if config.family.head_norms {
            query = self.norm(&part("q_norm"), query, head_dim)?;
            key = self.norm(&part("k_norm"), key, head_dim)?;
        }
        let rotary = OpKind::Rotary { head_dim, base: config.rope_theta, scaling: config.rope_scaling.clone() };
        let query = self.dag.op(&part("q_rotary"), rotary.clone(), &[query], &[])?;
        let key = self.dag.op(&part("k_rotary"), rotary, &[key], &[])?;
        let core = OpKind::GroupedAttention { heads, kv_heads, causal: true };
        let attended = self.dag.op(name, core, &[query, key, value], &[])?;
        self.linear(&part("o_proj"), attended, [width, dim], config.output_bias)
    }

    fn feed_forward(&mut self, name: &str, input_bsd: OpId) -> Result<OpId, GraphError> {
        let config = self.config;
        let (dim, inner, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        let part = |what: &str| format!("{name}.{what}");
        let gate = self.linear(&part("gate_proj"), input_bsd, [dim, inner], bias)?;
        let active = self.dag.op(&part("act"), OpKind::Activation { function: config.hidden_act }, &[gate], &[])?;
        let up = self.linear(&part("up_proj"), input_bsd, [dim, inner], bias)?;
        let gated = self.dag.op(&part("mul"), OpKind::Mul, &[active, up], &[])?;
        self.linear(&part("down_proj"), gated, [inner, dim], bias)
    }

    fn norm(&mut self, name: &str, input: OpId, dim: usize) -> Result<OpId, GraphError> {
        let weight = Param {
            name: format!("model.{name}.weight"),
            shape: vec![dim],
            init: Init::Ones,
            decay: false,
            frozen: false,
        };
        let weight = self.dag.param(weight)?;
        self.dag.op(name, OpKind::RmsNorm { dim, eps: self.config.rms_norm_eps }, &[input], &[weight])
    }

    fn linear(
        &mut self,
        name: &str,
        input: OpId,
        [inputs, outputs]: [usize; 2],
        bias: bool,
    ) -> Result<OpId, GraphError> {
        let mut params = vec![self.weight(&format!("model.{name}"), &[outputs, inputs])?];
        if bias {
            let name = format!("model.{name}.bias");
            params.push(self.dag.param(Param {
                name,
                shape: vec![outputs],
                init: Init::Zeros,
                decay: false,
                frozen: false,
            })?);
        }
        let kind = OpKind::Linear { inputs, outputs, bias, layout: WeightLayout::OutIn };
        self.dag.op(name, kind, &[input], &params)
    }

    fn weight(&mut self, key: &str, shape: &[usize]) -> Result<ParamId, GraphError> {
        let init = Init::Normal { std: self.config.initializer_range as f32 };
        self.dag.param(Param { name: format!("{key}.weight"), shape: shape.to_vec(), init, decay: true, frozen: false })
    }
}

#[cfg(test)]
mod tests;
