//! Names of the files in a Hugging Face folder, for whoever reads one and whoever writes one.

/// What the model is. Without it a folder is not taken for a model.
pub const CONFIG: &str = "config.json";
/// The file with all weights.
pub const WEIGHTS: &str = "model.safetensors";
/// What the adapters are, in a folder of PEFT's.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The weights of adapters.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// In which file each weight lies, where there are several.
pub const INDEX: &str = "model.safetensors.index.json";
/// The tokenizer, in the form of the `tokenizers` library.
pub const TOKENIZER: &str = "tokenizer.json";
/// How `transformers` loads the tokenizer.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Which tokens are special, as older folders have it.
pub const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// The form in which a model reads conversations, in Jinja.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The files that say how conversations become text.
pub const CHAT_FILES: [&str; 3] = [TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE];
/// The files that say what the tokenizer's tokens are.
pub const OF_TOKENIZER: [&str; 3] = [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS];
/// The files that training does not change, and that a trained model keeps of the one it began as.
pub const CARRIED: [&str; 6] =
    [CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, "generation_config.json", CHAT_TEMPLATE];
