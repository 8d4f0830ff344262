//! What sets the families of decoders with RMS norms, rotary positions and gated feed-forward parts apart.
//!
//! A family is an entry of [`FAMILIES`]; what its config.json does not say is as in `transformers`.

/// Where a family has biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// If this key of config.json is true.
    Asked(&'static str),
}

/// When attention looks back no further than `sliding_window` positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    /// The key means nothing to the family.
    Never,
    /// In every layer, if there is a number; this one if config.json is silent.
    Always(usize),
    /// In the layers that `layer_types` or `max_window_layers` name, if `use_sliding_window` is true; of this size if
    /// config.json is silent.
    IfUsed(usize),
}

/// A family of decoders.
#[derive(Debug, PartialEq)]
pub struct DecoderFamily {
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// Hugging Face's class.
    pub architecture: &'static str,
    /// Biases of the projections to queries, keys and values.
    pub(super) query_bias: Bias,
    /// Bias of the projection after attention.
    pub(super) output_bias: Bias,
    /// Biases of the feed-forward part.
    pub(super) mlp_bias: Bias,
    /// Whether each head of queries and keys has an RMS norm.
    pub(super) head_norms: bool,
    pub(super) window: Window,
    /// Size of a head where config.json is silent; `None` is hidden size over heads.
    pub(super) head_dim: Option<usize>,
    /// Heads of keys and values where config.json is silent; `None` is as many as of queries.
    pub(super) kv_heads: Option<usize>,
    /// Longest sequence where config.json is silent.
    pub(super) positions: usize,
    /// What its published models add to the mean square in norms.
    pub(super) published_eps: f64,
}

pub(super) const FAMILIES: [DecoderFamily; 4] = [
    // Touvron et al., arXiv 2302.13971; Grattafiori et al., arXiv 2407.21783.
    DecoderFamily {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        query_bias: Bias::Asked("attention_bias"),
        output_bias: Bias::Asked("attention_bias"),
        mlp_bias: Bias::Asked("mlp_bias"),
        head_norms: false,
        window: Window::Never,
        head_dim: None,
        kv_heads: None,
        positions: 2048,
        published_eps: 1e-5,
    },
    // Jiang et al., arXiv 2310.06825.
    DecoderFamily {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        query_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        head_norms: false,
        window: Window::Always(4096),
        head_dim: None,
        kv_heads: Some(8),
        positions: 131_072,
        published_eps: 1e-5,
    },
    // Yang et al., arXiv 2407.10671; Qwen2.5 has its form.
    DecoderFamily {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        query_bias: Bias::Always,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        head_norms: false,
        window: Window::IfUsed(4096),
        head_dim: None,
        kv_heads: Some(32),
        positions: 32_768,
        published_eps: 1e-6,
    },
    // Yang et al., arXiv 2505.09388.
    DecoderFamily {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        query_bias: Bias::Asked("attention_bias"),
        output_bias: Bias::Asked("attention_bias"),
        mlp_bias: Bias::Never,
        head_norms: true,
        window: Window::IfUsed(4096),
        head_dim: Some(128),
        kv_heads: Some(32),
        positions: 32_768,
        published_eps: 1e-6,
    },
];

impl DecoderFamily {
    /// The family of a Hugging Face `model_type`.
    pub fn of_type(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }
}
