//! Hugging Face's config.json of a decoder.

use serde_json::{Map, Value};

use crate::error::GraphError;
use crate::kind::ActivationFunction;
use crate::rotary::RotaryScaling;

use super::super::families::{Bias, DecoderFamily, Window};
use super::DecoderConfig;

/// Where config.json is silent, as in `transformers`.
const ROPE_THETA: f64 = 1e4;
const RMS_NORM_EPS: f64 = 1e-6;
const INITIALIZER_RANGE: f64 = 0.02;
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;

/// Keys that are read.
const READ: [&str; 29] = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "initializer_range",
    "pretraining_tp",
    "quantization_config",
    "partial_rotary_factor",
    "is_encoder_decoder",
    "is_causal",
    "original_max_position_embeddings",
    "pad_token_id",
];

/// Keys that change nothing of what is computed in training; dropout is the job's.
const HARMLESS: [&str; 25] = [
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "label2id",
    "name_or_path",
    "_name_or_path",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "use_return_dict",
    "_attn_implementation_autoset",
    "unsloth_version",
];

/// Keys of a rotary scaling that are read, besides its type.
const ROTARY: [&str; 14] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "partial_rotary_factor",
];

/// The object of config.json, with errors that name key and family.
struct Keys<'a> {
    keys: &'a Map<String, Value>,
    model: &'static str,
}

impl<'a> Keys<'a> {
    /// The value of a key; nothing if it is missing or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn wrong<T>(&self, key: &'static str, got: &Value, expected: impl Into<String>) -> Result<T, GraphError> {
        Err(GraphError::Model { model: self.model, key, expected: expected.into(), got: got.to_string() })
    }

    fn read<T>(
        &self,
        key: &'static str,
        of: impl Fn(&Value) -> Option<T>,
        expected: &str,
    ) -> Result<Option<T>, GraphError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match of(value) {
            Some(read) => Ok(Some(read)),
            None => self.wrong(key, value, expected),
        }
    }

    fn size(&self, key: &'static str) -> Result<Option<usize>, GraphError> {
        self.read(key, |value| usize::try_from(value.as_u64()?).ok(), "a whole number")
    }

    fn needed(&self, key: &'static str) -> Result<usize, GraphError> {
        let missing = || GraphError::Config { model: self.model, reason: format!("`{key}` is missing") };
        self.size(key)?.ok_or_else(missing)
    }

    fn real(&self, key: &'static str) -> Result<Option<f64>, GraphError> {
        self.read(key, Value::as_f64, "a number")
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, GraphError> {
        self.read(key, Value::as_bool, "true or false")
    }

    /// A setting that is built with this value alone; null and nothing say the same.
    fn must_be(&self, key: &'static str, built: &Value) -> Result<(), GraphError> {
        let same = |got: &Value| got == built || (got.is_number() && got.as_f64() == built.as_f64());
        match self.get(key).filter(|got| !same(got)) {
            Some(got) => self.wrong(key, got, built.to_string()),
            None => Ok(()),
        }
    }

    fn bias(&self, bias: Bias) -> Result<bool, GraphError> {
        match bias {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Asked(key) => Ok(self.flag(key)?.unwrap_or(false)),
        }
    }
}

impl DecoderConfig {
    /// Reads the keys of a config.json, and gives sentences on what of it is passed over.
    ///
    /// # Errors
    /// A key is missing or out of range, or asks for a variant that [`decoder`](super::decoder) does not build.
    pub(crate) fn from_keys(
        family: &'static DecoderFamily,
        keys: &Map<String, Value>,
    ) -> Result<(Self, Vec<String>), GraphError> {
        let keys = Keys { keys, model: family.model_type };
        keys.must_be("pretraining_tp", &Value::from(1))?;
        keys.must_be("partial_rotary_factor", &Value::from(1.0))?;
        keys.must_be("is_encoder_decoder", &Value::from(false))?;
        keys.must_be("is_causal", &Value::from(true))?;
        if let Some(got) = keys.get("quantization_config") {
            return keys.wrong("quantization_config", got, "none: weights that are not quantized");
        }
        let (hidden_size, heads) = (keys.needed("hidden_size")?, keys.needed("num_attention_heads")?);
        let head_dim = match keys.size("head_dim")?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let expected = format!("a divisor of hidden_size {hidden_size}, or head_dim beside it");
                return keys.wrong("num_attention_heads", &Value::from(heads), expected);
            }
        };
        // Null says as many as of queries.
        let silent = !keys.keys.contains_key("num_key_value_heads");
        let kv_heads = keys.size("num_key_value_heads")?.or(family.kv_heads.filter(|_| silent)).unwrap_or(heads);
        let positions = keys.size("max_position_embeddings")?.unwrap_or(family.positions);
        let num_hidden_layers = keys.needed("num_hidden_layers")?;
        let (rope_theta, rope_scaling) = rotary(&keys, positions)?;
        let config = Self {
            family,
            vocab_size: keys.needed("vocab_size")?,
            hidden_size,
            intermediate_size: keys.needed("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: positions,
            rms_norm_eps: keys.real("rms_norm_eps")?.unwrap_or(RMS_NORM_EPS),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            hidden_act: activation(&keys)?,
            query_bias: keys.bias(family.query_bias)?,
            output_bias: keys.bias(family.output_bias)?,
            mlp_bias: keys.bias(family.mlp_bias)?,
            sliding_window: window(&keys, family.window, num_hidden_layers)?,
            initializer_range: keys.real("initializer_range")?.unwrap_or(INITIALIZER_RANGE),
        };
        let known = |key: &str| READ.contains(&key) || HARMLESS.contains(&key);
        let unknown: Vec<String> = keys
            .keys
            .iter()
            .filter(|(key, value)| !known(key) && !value.is_null())
            .map(|(key, _)| format!("`{key}`"))
            .collect();
        let mut passed_over = Vec::new();
        if !unknown.is_empty() {
            passed_over.push(format!("keys that are not known here: {}", unknown.join(", ")));
        }
        if let Some(id) = keys.get("pad_token_id") {
            passed_over.push(format!(
                "`pad_token_id` {id}: `transformers` never trains its row of the embedding, here it is a token as any other"
            ));
        }
        Ok((config, passed_over))
    }

    /// The keys of config.json that say what is computed; without the longest sequence, which training does not change.
    pub(crate) fn keys(&self) -> Map<String, Value> {
        let scaling = self.rope_scaling_keys();
        let mut keys = object(serde_json::json!({
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": activation_name(self.hidden_act),
            "initializer_range": self.initializer_range,
        }));
        keys.insert("rope_theta".to_owned(), self.rope_theta.into());
        keys.insert("rope_scaling".to_owned(), scaling);
        for (bias, value) in [(self.family.query_bias, self.query_bias), (self.family.mlp_bias, self.mlp_bias)] {
            if let Bias::Asked(key) = bias {
                keys.insert(key.to_owned(), value.into());
            }
        }
        if let Window::Always(_) = self.family.window {
            keys.insert("sliding_window".to_owned(), self.sliding_window.into());
        }
        keys
    }

    fn rope_scaling_keys(&self) -> Value {
        match self.rope_scaling {
            RotaryScaling::None => Value::Null,
            RotaryScaling::Linear { factor } => serde_json::json!({ "rope_type": "linear", "factor": factor }),
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                serde_json::json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_positions,
                })
            }
            RotaryScaling::Yarn { factor, original_positions, beta_fast, beta_slow, truncate, attention_factor } => {
                serde_json::json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original_positions,
                    "beta_fast": beta_fast,
                    "beta_slow": beta_slow,
                    "truncate": truncate,
                    "attention_factor": attention_factor,
                })
            }
        }
    }
}

fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(keys) = value { keys } else { Map::new() }
}

/// Hugging Face's names of the functions that are built, the usual one of each first.
const ACTIVATIONS: [(&str, ActivationFunction); 7] = [
    ("silu", ActivationFunction::Silu),
    ("swish", ActivationFunction::Silu),
    ("gelu", ActivationFunction::GeluErf),
    ("gelu_new", ActivationFunction::GeluTanh),
    ("gelu_pytorch_tanh", ActivationFunction::GeluTanh),
    ("gelu_fast", ActivationFunction::GeluTanh),
    ("relu", ActivationFunction::Relu),
];

fn activation(keys: &Keys<'_>) -> Result<ActivationFunction, GraphError> {
    let Some(value) = keys.get("hidden_act") else { return Ok(ActivationFunction::Silu) };
    let found = ACTIVATIONS.iter().find(|(name, _)| value.as_str() == Some(name));
    match found {
        Some(&(_, function)) => Ok(function),
        None => keys.wrong("hidden_act", value, ACTIVATIONS.map(|(name, _)| format!("`{name}`")).join(", ")),
    }
}

fn activation_name(function: ActivationFunction) -> &'static str {
    ACTIVATIONS.iter().find(|(_, built)| *built == function).map_or("silu", |(name, _)| name)
}

/// The window of the layers that have one.
fn window(keys: &Keys<'_>, window: Window, layers: usize) -> Result<Option<usize>, GraphError> {
    let given = keys.size("sliding_window")?;
    let silent = !keys.keys.contains_key("sliding_window");
    let (default, is_used) = match window {
        Window::Never => return Ok(None),
        Window::Always(default) => (default, true),
        Window::IfUsed(default) => {
            let asked = keys.flag("use_sliding_window")?.unwrap_or(false);
            let some = match keys.get("layer_types") {
                Some(Value::Array(types)) => {
                    let known = |layer: &Value| matches!(layer.as_str(), Some("full_attention" | "sliding_attention"));
                    if let Some(other) = types.iter().find(|layer| !known(layer)) {
                        return keys.wrong(
                            "layer_types",
                            other,
                            "`full_attention` or `sliding_attention` for each layer",
                        );
                    }
                    types.iter().any(|layer| layer.as_str() == Some("sliding_attention"))
                }
                Some(other) => return keys.wrong("layer_types", other, "a list"),
                // Layers from this one on have a window.
                None => keys.size("max_window_layers")?.unwrap_or(28) < layers,
            };
            (default, asked && some)
        }
    };
    Ok(given.or(silent.then_some(default)).filter(|_| is_used))
}

/// Base and scaling of the rotary frequencies, in the forms of `transformers` 4 (`rope_theta`, `rope_scaling`) and 5
/// (`rope_parameters`).
fn rotary(keys: &Keys<'_>, positions: usize) -> Result<(f64, RotaryScaling), GraphError> {
    let both = [keys.get("rope_parameters"), keys.get("rope_scaling")];
    if let [Some(new), Some(old)] = both
        && new != old
    {
        return keys.wrong("rope_scaling", old, "nothing beside rope_parameters");
    }
    let theta = keys.real("rope_theta")?;
    let value = match both {
        [Some(value), _] | [None, Some(value)] => value,
        [None, None] => return Ok((theta.unwrap_or(ROPE_THETA), RotaryScaling::None)),
    };
    let key = if both[0].is_some() { "rope_parameters" } else { "rope_scaling" };
    let Value::Object(inner) = value else { return keys.wrong(key, value, "an object") };
    if let Some((name, _)) = inner.iter().find(|(name, value)| !ROTARY.contains(&name.as_str()) && !value.is_null()) {
        return keys.wrong(key, value, format!("no `{name}` in it, which is not computed"));
    }
    let inner = Keys { keys: inner, model: keys.model };
    inner.must_be("partial_rotary_factor", &Value::from(1.0))?;
    let own = inner.real("rope_theta")?;
    if let (Some(own), Some(theta)) = (own, theta)
        && own != theta
    {
        return keys.wrong("rope_theta", &Value::from(theta), format!("{own}, as in {key}, or nothing"));
    }
    let base = own.or(theta).unwrap_or(ROPE_THETA);
    let kind = inner.get("rope_type").or(inner.get("type")).map_or(Some("default"), Value::as_str).unwrap_or("");
    // Where it stands beside the rotary settings, `transformers` goes by that.
    let original = match keys.size("original_max_position_embeddings")? {
        Some(outer) => Some(outer),
        None => inner.size("original_max_position_embeddings")?,
    };
    let original = original.unwrap_or(positions);
    let scaling = match kind {
        // Sequences are no longer than `max_position_embeddings`, up to which dynamic scaling changes nothing.
        "default" | "dynamic" => RotaryScaling::None,
        "linear" => RotaryScaling::Linear { factor: needed(&inner, "factor")? },
        "llama3" => RotaryScaling::Llama3 {
            factor: needed(&inner, "factor")?,
            low_freq_factor: needed(&inner, "low_freq_factor")?,
            high_freq_factor: needed(&inner, "high_freq_factor")?,
            original_positions: original,
        },
        "yarn" => yarn(&inner, positions, original)?,
        _ => return keys.wrong(key, value, "rope_type `default`, `linear`, `dynamic`, `llama3` or `yarn`"),
    };
    Ok((base, scaling))
}

fn needed(keys: &Keys<'_>, key: &'static str) -> Result<f64, GraphError> {
    let missing =
        || GraphError::Config { model: keys.model, reason: format!("`{key}` is missing in its rotary scaling") };
    keys.real(key)?.ok_or_else(missing)
}

fn yarn(keys: &Keys<'_>, positions: usize, original_positions: usize) -> Result<RotaryScaling, GraphError> {
    let factor = keys.real("factor")?.unwrap_or(positions as f64 / original_positions.max(1) as f64);
    let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    let given = |key| Ok::<_, GraphError>(keys.real(key)?.filter(|&value| value != 0.0));
    let attention_factor = match (keys.real("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
        (Some(factor), _, _) => factor,
        (None, Some(over), Some(under)) => scale(over) / scale(under),
        (None, _, _) => scale(1.0),
    };
    Ok(RotaryScaling::Yarn {
        factor,
        original_positions,
        beta_fast: given("beta_fast")?.unwrap_or(BETA_FAST),
        beta_slow: given("beta_slow")?.unwrap_or(BETA_SLOW),
        truncate: keys.flag("truncate")?.unwrap_or(true),
        attention_factor,
    })
}
