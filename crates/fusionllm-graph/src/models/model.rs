//! The models that are known by family, as one type.

use serde_json::{Map, Value};

use crate::dag::OpDag;
use crate::error::GraphError;
use crate::plain::read_json;

use super::decoder::{DecoderConfig, decoder};
use super::families::{DecoderFamily, FAMILIES};
use super::gpt2::{Gpt2Config, gpt2};
use super::resnet::{ResnetConfig, resnet};

/// Sizes and settings of a model of a family that is known here.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// GPT-2, with learned positions.
    Gpt2(Gpt2Config),
    /// Llama and its kin.
    Decoder(DecoderConfig),
    /// ResNet, of images.
    Resnet(ResnetConfig),
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
    /// A published model, without its weights; see [`Gpt2Config::named`], [`DecoderConfig::named`] and
    /// [`ResnetConfig::named`].
    pub fn named(name: &str) -> Option<Self> {
        let gpt2 = Gpt2Config::named(name).map(Self::Gpt2);
        let language = gpt2.or_else(|| DecoderConfig::named(name).map(Self::Decoder));
        language.or_else(|| ResnetConfig::named(name).map(Self::Resnet))
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
        if model_type.is_some_and(|value| value == super::resnet::MODEL_TYPE) {
            let model = Self::Resnet(ResnetConfig::from_keys(&keys)?);
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
        let language = gpt2.or_else(|| DecoderConfig::of(dag).map(Self::Decoder));
        language.or_else(|| ResnetConfig::of(dag).map(Self::Resnet))
    }

    /// Its OP-DAG with the loss, for sequences of `seq_len` tokens, which a model of images has none of.
    ///
    /// # Errors
    /// A size or setting is out of range, or `seq_len` is longer than its longest sequence.
    pub fn build(&self, seq_len: usize) -> Result<OpDag, GraphError> {
        match self {
            Self::Gpt2(config) => gpt2(config, seq_len),
            Self::Decoder(config) => decoder(config, seq_len),
            Self::Resnet(config) => resnet(config),
        }
    }

    /// With this dropout probability in training.
    ///
    /// # Errors
    /// The family has no dropout, and `dropout` is not 0.
    pub fn with_dropout(self, dropout: f64) -> Result<Self, GraphError> {
        match self {
            Self::Gpt2(config) => Ok(Self::Gpt2(Gpt2Config { dropout, ..config })),
            other if dropout == 0.0 => Ok(other),
            other => Err(GraphError::Model {
                model: other.model_type(),
                key: "dropout",
                expected: "0: this family is trained without".to_owned(),
                got: dropout.to_string(),
            }),
        }
    }

    /// Whether it is a model of images, and not of language.
    pub fn is_of_images(&self) -> bool {
        matches!(self, Self::Resnet(_))
    }

    /// Tokens of the longest sequence that it can be built for; 0 for a model of images.
    pub fn longest_sequence(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.n_positions,
            Self::Decoder(config) => {
                let positions = config.max_position_embeddings;
                config.sliding_window.map_or(positions, |window| positions.min(window))
            }
            Self::Resnet(_) => 0,
        }
    }

    /// V: entries of its vocabulary, or classes.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.vocab_size,
            Self::Decoder(config) => config.vocab_size,
            Self::Resnet(config) => config.classes,
        }
    }

    /// Standard deviation with which new weights of a language model are drawn; those of a model of images have each its
    /// own, and 0 stands for them.
    pub fn initial_deviation(&self) -> f64 {
        match self {
            Self::Gpt2(_) => super::gpt2::INIT_STD,
            Self::Decoder(config) => config.initializer_range,
            Self::Resnet(_) => 0.0,
        }
    }

    /// Hugging Face's `model_type`, or the family's name where Hugging Face has other tensors.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => super::gpt2::MODEL,
            Self::Decoder(config) => config.family.model_type,
            Self::Resnet(_) => super::resnet::MODEL_TYPE,
        }
    }

    /// The class of Hugging Face, or of torchvision.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "GPT2LMHeadModel",
            Self::Decoder(config) => config.family.architecture,
            Self::Resnet(_) => "ResNet",
        }
    }

    /// The linear ops that adapters are for where nothing else is asked, by the last part of their names: those that PEFT
    /// takes for the family.
    pub fn lora_targets(&self) -> &'static [&'static str] {
        match self {
            Self::Gpt2(_) => &["c_attn"],
            Self::Decoder(_) => &["q_proj", "v_proj"],
            Self::Resnet(_) => &[],
        }
    }

    /// How the names of tensors begin in a file of the whole model; files of one without its head may leave it out.
    pub fn prefix(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "transformer.",
            Self::Decoder(_) => "model.",
            Self::Resnet(_) => "",
        }
    }

    /// The table of embeddings, by its name in files; a model of images has none.
    pub fn embedding(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "transformer.wte.weight",
            Self::Decoder(_) => "model.embed_tokens.weight",
            Self::Resnet(_) => "",
        }
    }

    /// The keys of config.json that say what is computed.
    pub fn keys(&self) -> Map<String, Value> {
        match self {
            Self::Gpt2(config) => config.keys(),
            Self::Decoder(config) => config.keys(),
            Self::Resnet(config) => config.keys(),
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
        for name in [
            "gpt2",
            "llama-3.2-1b",
            "llama-3.1-8b",
            "mistral-7b",
            "qwen2.5-0.5b",
            "qwen2.5-7b",
            "qwen3-0.6b",
            "resnet18",
            "resnet101",
        ] {
            let model = Model::named(name).unwrap();
            let dag = model.build(64).unwrap();
            let again = Model::of(&OpDag::from_json(&dag.to_json()).unwrap()).unwrap();
            assert_eq!(again.build(64).unwrap(), dag, "{name}");
        }
        assert_eq!(Model::named("gpt-5"), None);
    }

    #[test]
    fn an_exported_resnet_is_read_again() {
        let model = Model::named("resnet18").unwrap();
        let mut keys = model.keys();
        keys.insert("model_type".to_owned(), model.model_type().into());
        keys.insert("architectures".to_owned(), serde_json::json!([model.architecture()]));
        let text = Value::Object(keys).to_string();
        assert_eq!(Model::from_hugging_face(&text).unwrap().model, model);
        let error = Model::from_hugging_face(&text.replace("\"classes\":1000", "\"classes\":0")).unwrap_err();
        assert_eq!(error.to_string(), "resnet: classes is 0, expected 1 to 1048576");
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
