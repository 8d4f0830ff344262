//! GPT-2 as an OP-DAG with Hugging Face's parameter names, layouts and initial values (`GPT2LMHeadModel`).
//!
//! Shapes: B batch, S sequence, D `n_embd`, V `vocab_size`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::builder::DagBuilder;
use crate::dag::{OpDag, OpId, ParamId};
use crate::dtype::DType;
use crate::error::GraphError;
use crate::kind::{ActivationFunction, WeightLayout};
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::plain::read_value;
use crate::shape::Shape;

use super::MAX_LAYERS;

pub(super) const MODEL: &str = "gpt2";
/// What a `config.json` must say.
const SIZES: [&str; 5] = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"];
/// GPT-2's `initializer_range`.
pub(super) const INIT_STD: f64 = 0.02;
/// The hidden layer of the feed-forward part is this many times D wide.
const HIDDEN_FACTOR: usize = 4;

/// Sizes of a GPT-2, under the names of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpt2Config {
    /// V: entries of the vocabulary.
    pub vocab_size: usize,
    /// Tokens of the longest sequence.
    pub n_positions: usize,
    /// D: width.
    pub n_embd: usize,
    /// Number of transformer blocks.
    pub n_layer: usize,
    /// Heads; divides `n_embd`.
    pub n_head: usize,
    /// Added to the variance in layer norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_epsilon: f64,
    /// Probability with which embeddings and the two projections of a block are dropped in training; 0 leaves the
    /// dropout ops out. Hugging Face's `resid_pdrop`; its dropout of attention probabilities is not modelled.
    #[serde(default, rename = "resid_pdrop", alias = "dropout")]
    pub dropout: f64,
}

/// A key of `config.json` and the values with which [`gpt2`] builds the model.
type Accepted<'a> = (&'static str, &'a [Value]);

/// Holds the settings that are given against what is built.
fn check_settings(keys: &Map<String, Value>, built: &[Accepted<'_>]) -> Result<(), GraphError> {
    for &(key, accepted) in built {
        if let Some(got) = keys.get(key)
            && !accepted.contains(got)
        {
            let expected = accepted.iter().map(Value::to_string).collect::<Vec<_>>().join(" or ");
            return Err(GraphError::Model { model: MODEL, key, expected, got: got.to_string() });
        }
    }
    Ok(())
}

fn default_epsilon() -> f64 {
    1e-5
}

impl Gpt2Config {
    /// The published sizes `gpt2`, `gpt2-medium`, `gpt2-large` and `gpt2-xl`, without dropout.
    pub fn named(name: &str) -> Option<Self> {
        let (n_layer, n_head, n_embd) = match name {
            "gpt2" => (12, 12, 768),
            "gpt2-medium" => (24, 16, 1024),
            "gpt2-large" => (36, 20, 1280),
            "gpt2-xl" => (48, 25, 1600),
            _ => return None,
        };
        let (vocab_size, n_positions) = (50257, 1024);
        let layer_norm_epsilon = default_epsilon();
        Some(Self { vocab_size, n_positions, n_embd, n_layer, n_head, layer_norm_epsilon, dropout: 0.0 })
    }

    /// Reads the keys of Hugging Face's `config.json`. Those that change nothing here are passed over.
    ///
    /// # Errors
    /// A size is missing, a value is not readable, or one asks for a variant that [`gpt2`] does not build.
    pub(crate) fn from_keys(keys: &Map<String, Value>) -> Result<Self, GraphError> {
        let unreadable = |reason: String| GraphError::Config { model: MODEL, reason };
        if let Some(key) = SIZES.into_iter().find(|&key| keys.get(key).is_none()) {
            return Err(unreadable(format!("`{key}` is missing")));
        }
        let config: Self = read_value(Value::Object(keys.clone())).map_err(unreadable)?;
        let gelu = [Value::from("gelu_new"), Value::from("gelu_pytorch_tanh")];
        let off = [Value::from(false), Value::Null];
        let hidden = config.n_embd.saturating_mul(HIDDEN_FACTOR);
        let built: [Accepted<'_>; 14] = [
            ("activation_function", &gelu),
            ("n_inner", &[Value::Null, Value::from(hidden)]),
            ("tie_word_embeddings", &[Value::from(true)]),
            ("scale_attn_weights", &[Value::from(true)]),
            ("scale_attn_by_inverse_layer_idx", &off),
            ("reorder_and_upcast_attn", &off),
            ("add_cross_attention", &off),
            ("is_encoder_decoder", &off),
            ("quantization_config", &[Value::Null]),
            ("pruned_heads", &[Value::Null, Value::Object(serde_json::Map::new())]),
            // Other names of the sizes, which must not say something else.
            ("hidden_size", &[Value::from(config.n_embd)]),
            ("num_hidden_layers", &[Value::from(config.n_layer)]),
            ("num_attention_heads", &[Value::from(config.n_head)]),
            ("max_position_embeddings", &[Value::from(config.n_positions)]),
        ];
        check_settings(keys, &built)?;
        Ok(config)
    }

    /// The keys of config.json that say what is computed.
    pub(crate) fn keys(&self) -> Map<String, Value> {
        let keys = serde_json::json!({
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        });
        if let Value::Object(keys) = keys { keys } else { Map::new() }
    }

    /// The configuration that [`gpt2`] built `dag` from, whatever its name; `None` if it is another model.
    pub fn of(dag: &OpDag) -> Option<Self> {
        let kind = |name: &str| dag.find(name).map(|op| &dag.op(op).kind);
        let &OpKind::Embedding { vocab, dim } = kind("wte")? else { return None };
        let &OpKind::Position { positions, .. } = kind("wpe")? else { return None };
        let &OpKind::LayerNorm { eps, .. } = kind("ln_f")? else { return None };
        let is_attention = |op: &&crate::Op| matches!(op.kind, OpKind::Attention { .. });
        let n_layer = dag.ops().iter().filter(is_attention).count();
        let &OpKind::Attention { heads, .. } = kind("h.0.attn")? else { return None };
        let dropout = if let Some(&OpKind::Dropout { p }) = kind("embd.drop") { p } else { 0.0 };
        let config = Self {
            vocab_size: vocab,
            n_positions: positions,
            n_embd: dim,
            n_layer,
            n_head: heads,
            layer_norm_epsilon: eps,
            dropout,
        };
        let same = gpt2(&config, dag.seq_len()?).ok()?;
        (same.ops() == dag.ops() && same.params() == dag.params()).then_some(config)
    }

    fn check(&self, seq_len: usize) -> Result<(), GraphError> {
        let wrong = |key: &'static str, got: usize, expected: String| {
            Err(GraphError::Model { model: MODEL, key, expected, got: got.to_string() })
        };
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("seq_len", seq_len),
        ];
        for (key, size) in sizes {
            // The largest size that a product of four of them and the hidden factor cannot overflow with.
            const LARGEST: usize = 1 << 28;
            let largest = if key == "n_layer" { MAX_LAYERS } else { LARGEST };
            if size == 0 || size > largest {
                return wrong(key, size, format!("1 to {largest}"));
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return wrong("n_head", self.n_head, format!("a divisor of n_embd {}", self.n_embd));
        }
        if seq_len > self.n_positions {
            return wrong("seq_len", seq_len, format!("at most n_positions {}", self.n_positions));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let (expected, got) = ("at least 0 and less than 1".to_owned(), self.dropout.to_string());
            return Err(GraphError::Model { model: MODEL, key: "dropout", expected, got });
        }
        Ok(())
    }
}

/// GPT-2 with its loss, for sequences of `seq_len` tokens. The head is tied to the embedding
/// (`transformer.wte.weight`); labels are taken as given, without a shift.
///
/// # Errors
/// A size is 0, `n_head` does not divide `n_embd`, `seq_len` is over `n_positions`, or another setting is out of range.
pub fn gpt2(config: &Gpt2Config, seq_len: usize) -> Result<OpDag, GraphError> {
    config.check(seq_len)?;
    let ids = Shape::batched(&[seq_len]);
    let (vocab, dim, positions) = (config.vocab_size, config.n_embd, config.n_positions);
    let mut model = Gpt2Builder { dag: DagBuilder::new(MODEL), config };
    let input = model.dag.op("input", OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[], &[])?;
    let label = model.dag.op("label", OpKind::Label { shape: ids }, &[], &[])?;

    let table = model.weight("wte", &[vocab, dim], INIT_STD)?;
    let tokens_bsd = model.dag.op("wte", OpKind::Embedding { vocab, dim }, &[input], &[table])?;
    let position_table = model.weight("wpe", &[positions, dim], INIT_STD)?;
    let placed_bsd = model.dag.op("wpe", OpKind::Position { positions, dim }, &[tokens_bsd], &[position_table])?;
    let mut hidden_bsd = model.dropout("embd.drop", placed_bsd)?;
    for layer in 0..config.n_layer {
        hidden_bsd = model.block(layer, hidden_bsd)?;
    }
    let normed_bsd = model.norm("ln_f", hidden_bsd)?;

    let head = OpKind::Linear { inputs: dim, outputs: vocab, bias: false, layout: WeightLayout::OutIn };
    let logits_bsv = model.dag.op("lm_head", head, &[normed_bsd], &[table])?;
    model.dag.op("loss", OpKind::CrossEntropy, &[logits_bsv, label], &[])?;
    model.dag.build()
}

/// Adds the parts of a GPT-2. A parameter's key is `transformer.`, the op's name, and its role.
struct Gpt2Builder<'a> {
    dag: DagBuilder,
    config: &'a Gpt2Config,
}

impl Gpt2Builder<'_> {
    /// One pre-norm block: attention and feed-forward, each added to what came in.
    fn block(&mut self, layer: usize, input_bsd: OpId) -> Result<OpId, GraphError> {
        let name = |part: &str| format!("h.{layer}.{part}");
        let dim = self.config.n_embd;
        let inner = dim * HIDDEN_FACTOR;
        // Hugging Face scales what enters the residual stream by the number of additions to it.
        let residual_std = INIT_STD / (2.0 * self.config.n_layer as f64).sqrt();

        let normed = self.norm(&name("ln_1"), input_bsd)?;
        let packed = self.conv1d(&name("attn.c_attn"), normed, [dim, 3 * dim], INIT_STD)?;
        let core = OpKind::Attention { heads: self.config.n_head, causal: true };
        let attended = self.dag.op(&name("attn"), core, &[packed], &[])?;
        let projected = self.conv1d(&name("attn.c_proj"), attended, [dim, dim], residual_std)?;
        let dropped = self.dropout(&name("attn.drop"), projected)?;
        let between_bsd = self.dag.op(&name("add_1"), OpKind::Add, &[input_bsd, dropped], &[])?;

        let normed = self.norm(&name("ln_2"), between_bsd)?;
        let wide = self.conv1d(&name("mlp.c_fc"), normed, [dim, inner], INIT_STD)?;
        let gelu = OpKind::Activation { function: ActivationFunction::GeluTanh };
        let active = self.dag.op(&name("mlp.act"), gelu, &[wide], &[])?;
        let projected = self.conv1d(&name("mlp.c_proj"), active, [inner, dim], residual_std)?;
        let dropped = self.dropout(&name("mlp.drop"), projected)?;
        self.dag.op(&name("add_2"), OpKind::Add, &[between_bsd, dropped], &[])
    }

    fn norm(&mut self, name: &str, input: OpId) -> Result<OpId, GraphError> {
        let dim = self.config.n_embd;
        let weight = self.param(name, "weight", &[dim], Init::Ones, false)?;
        let bias = self.param(name, "bias", &[dim], Init::Zeros, false)?;
        let kind = OpKind::LayerNorm { dim, eps: self.config.layer_norm_epsilon };
        self.dag.op(name, kind, &[input], &[weight, bias])
    }

    /// Hugging Face's `Conv1D`: a linear op whose weight lies `[inputs, outputs]`.
    fn conv1d(&mut self, name: &str, input: OpId, weight_io: [usize; 2], std: f64) -> Result<OpId, GraphError> {
        let [inputs, outputs] = weight_io;
        let weight = self.weight(name, &weight_io, std)?;
        let bias = self.param(name, "bias", &[outputs], Init::Zeros, false)?;
        let kind = OpKind::Linear { inputs, outputs, bias: true, layout: WeightLayout::InOut };
        self.dag.op(name, kind, &[input], &[weight, bias])
    }

    /// `input` itself if there is no dropout.
    fn dropout(&mut self, name: &str, input: OpId) -> Result<OpId, GraphError> {
        let p = self.config.dropout;
        if p > 0.0 { self.dag.op(name, OpKind::Dropout { p }, &[input], &[]) } else { Ok(input) }
    }

    fn weight(&mut self, op: &str, shape: &[usize], std: f64) -> Result<ParamId, GraphError> {
        self.param(op, "weight", shape, Init::Normal { std: std as f32 }, true)
    }

    fn param(&mut self, op: &str, role: &str, shape: &[usize], init: Init, decay: bool) -> Result<ParamId, GraphError> {
        self.dag.param(Param {
            name: format!("transformer.{op}.{role}"),
            shape: shape.to_vec(),
            init,
            decay,
            frozen: false,
        })
    }
}

#[cfg(test)]
mod tests;
