//! The models that are known by family, as one type.

use serde_json::{Map, Value};

use crate::dag::OpDag;
use crate::error::GraphError;
use crate::plain::read_json;

use super::decoder::{DecoderConfig, decoder};
use super::families::{DecoderFamily, FAMILIES};
use super::gpt2::{Gpt2Config, gpt2};

/// Sizes and settings of a model of a family that is known here.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// GPT-2, with learned positions.
    Gpt2(Gpt2Config),
    /// Llama and its kin.
    Decoder(DecoderConfig),
}

/// What a config.json says.
#[derive(Clone, Debug, PartialEq)]
pub struct HuggingFaceModel {
    /// The model that it describes.
    pub model: Model,
    /// Sentences on what of it is passed over, though it may matter.
    pub passed_over: Vec<String>,
    /// All that it says.
    pub keys: Map<String, Value>,
}

impl Model {
    /// A published model, without its weights; see [`Gpt2Config::named`] and [`DecoderConfig::named`].
    pub fn named(name: &str) -> Option<Self> {
        let gpt2 = Gpt2Config::named(name).map(Self::Gpt2);
        gpt2.or_else(|| DecoderConfig::named(name).map(Self::Decoder))
    }

    /// Reads Hugging Face's config.json, with or without a byte order mark.
    ///
    /// # Errors
    /// The text is not readable, is of a model that is not known, or asks for a variant that is not built.
    pub fn from_hugging_face(text: &str) -> Result<HuggingFaceModel, GraphError> {
        let unreadable = |reason: String| GraphError::ConfigJson { reason };
        let keys: Value = read_json(text.as_bytes()).map_err(unreadable)?;
        let Value::Object(keys) = keys else {
            return Err(unreadable("it is no object, expected the config.json of a model".to_owned()));
        };
        // Old folders of GPT-2 do not say what they are.
        let model_type = keys.get("model_type").filter(|value| !value.is_null());
        if model_type.is_none_or(|value| value == "gpt2") {
            let model = Self::Gpt2(Gpt2Config::from_keys(&keys)?);
            return Ok(HuggingFaceModel { model, passed_over: Vec::new(), keys });
        }
        let family = model_type.and_then(Value::as_str).and_then(DecoderFamily::of_type).ok_or_else(|| {
            let known = FAMILIES.map(|family| format!("`{}`", family.model_type)).join(", ");
            let got = model_type.map(Value::to_string).unwrap_or_default();
            unreadable(format!("model_type is {got}, expected `gpt2`, {known}"))
        })?;
        let (config, passed_over) = DecoderConfig::from_keys(family, &keys)?;
        Ok(HuggingFaceModel { model: Self::Decoder(config), passed_over, keys })
    }

    /// The model that `dag` was built from; `None` if it is of no family. Decoders are known by the name of their family.
    pub fn of(dag: &OpDag) -> Option<Self> {
        let gpt2 = Gpt2Config::of(dag).map(Self::Gpt2);
        gpt2.or_else(|| DecoderConfig::of(dag).map(Self::Decoder))
    }

    /// Its OP-DAG with the loss, for sequences of `seq_len` tokens.
    ///
    /// # Errors
    /// A size or setting is out of range, or `seq_len` is longer than its longest sequence.
    pub fn build(&self, seq_len: usize) -> Result<OpDag, GraphError> {
        match self {
            Self::Gpt2(config) => gpt2(config, seq_len),
            Self::Decoder(config) => decoder(config, seq_len),
        }
    }

    /// With this dropout probability in training.
    ///
    /// # Errors
    /// The family has no dropout, and `dropout` is not 0.
    pub fn with_dropout(self, dropout: f64) -> Result<Self, GraphError> {
        match self {
            Self::Gpt2(config) => Ok(Self::Gpt2(Gpt2Config { dropout, ..config })),
            Self::Decoder(config) if dropout == 0.0 => Ok(Self::Decoder(config)),
            Self::Decoder(config) => Err(GraphError::Model {
                model: config.family.model_type,
                key: "dropout",
                expected: "0: this family is trained without".to_owned(),
                got: dropout.to_string(),
            }),
        }
    }

    /// Tokens of the longest sequence that it can be built for.
    pub fn longest_sequence(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.n_positions,
            Self::Decoder(config) => {
                let positions = config.max_position_embeddings;
                config.sliding_window.map_or(positions, |window| positions.min(window))
            }
        }
    }

    /// V: entries of its vocabulary.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.vocab_size,
            Self::Decoder(config) => config.vocab_size,
        }
    }

    /// Standard deviation with which its new weights are drawn.
    pub fn initial_deviation(&self) -> f64 {
        match self {
            Self::Gpt2(_) => super::gpt2::INIT_STD,
            Self::Decoder(config) => config.initializer_range,
        }
    }

    /// Hugging Face's `model_type`.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => super::gpt2::MODEL,
            Self::Decoder(config) => config.family.model_type,
        }
    }

    /// Hugging Face's class.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "GPT2LMHeadModel",
            Self::Decoder(config) => config.family.architecture,
        }
    }

    /// The linear ops that adapters are for where nothing else is asked, by the last part of their names: those that PEFT
    /// takes for the family.
    pub fn lora_targets(&self) -> &'static [&'static str] {
        match self {
            Self::Gpt2(_) => &["c_attn"],
            Self::Decoder(_) => &["q_proj", "v_proj"],
        }
    }

    /// How the names of tensors begin in a file of the whole model; files of one without its head may leave it out.
    pub fn prefix(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "transformer.",
            Self::Decoder(_) => "model.",
        }
    }

    /// The table of embeddings, by its name in files.
    pub fn embedding(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "transformer.wte.weight",
            Self::Decoder(_) => "model.embed_tokens.weight",
        }
    }

    /// The keys of config.json that say what is computed.
    pub fn keys(&self) -> Map<String, Value> {
        match self {
            Self::Gpt2(config) => config.keys(),
            Self::Decoder(config) => config.keys(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_json_names_its_family() {
        let of = |text: &str| Model::from_hugging_face(text).map(|read| read.model.model_type());
        let error = of(r#"{"model_type": "bert"}"#).unwrap_err().to_string();
        let expected = "model_type is \"bert\", expected `gpt2`, `llama`, `mistral`, `qwen2`, `qwen3`";
        assert_eq!(error, format!("not the config.json of a model that is known here: {expected}"));
        assert!(of("[1]").unwrap_err().to_string().ends_with("it is no object, expected the config.json of a model"));
        assert!(of("{").unwrap_err().to_string().starts_with("not the config.json of a model"));
        let sizes = r#""vocab_size": 9, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2"#;
        assert_eq!(of(&format!("{{{sizes}}}")).unwrap(), "gpt2");
    }

    #[test]
    fn every_named_model_can_be_built_and_is_known_by_its_graph() {
        for name in ["gpt2", "llama-3.2-1b", "llama-3.1-8b", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b"] {
            let model = Model::named(name).unwrap();
            let dag = model.build(64).unwrap();
            let again = Model::of(&OpDag::from_json(&dag.to_json()).unwrap()).unwrap();
            assert_eq!(again.build(64).unwrap(), dag, "{name}");
        }
        assert_eq!(Model::named("gpt-5"), None);
    }

    #[test]
    fn only_gpt2_has_dropout() {
        assert!(Model::named("gpt2").unwrap().with_dropout(0.1).is_ok());
        let llama = Model::named("llama-3.2-1b").unwrap();
        assert_eq!(llama.clone().with_dropout(0.0).unwrap(), llama);
        let error = llama.with_dropout(0.1).unwrap_err().to_string();
        assert_eq!(error, "llama: dropout is 0.1, expected 0: this family is trained without");
    }
}
