//! Names of the files in a Hugging Face folder, for whoever reads one and whoever writes one.

use std::path::Path;

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

/// Whether a folder of adapters that calls the model that they were trained beside `base` may mean the one in `folder`. Only
/// the last parts are compared: a hub has it under another name than a disk, and each machine elsewhere. In the cache of a
/// hub, `models--ORGANISATION--NAME` stands above the files.
pub fn is_base(base: &str, folder: &Path) -> bool {
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().to_lowercase());
    let Some(base) = last(Path::new(base)) else { return true };
    let means = |folder: &Path| {
        let cached = |above: &Path| {
            last(above).is_some_and(|name| name.starts_with("models--") && name.ends_with(&format!("--{base}")))
        };
        last(folder).is_none_or(|name| name == base) || folder.ancestors().any(cached)
    };
    means(folder) || folder.canonicalize().is_ok_and(|real| means(&real))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_known_by_the_last_part_of_its_name() {
        for (base, folder, is) in [
            ("meta-llama/Llama-3.2-1B", "/models/llama-3.2-1b", true),
            ("m/llama", "m/llama/", true),
            ("m/llama", "m/qwen2", false),
            ("gpt2", "/models/gpt2-medium", false),
        ] {
            assert_eq!(is_base(base, Path::new(folder)), is, "{base} {folder}");
        }
        let cached = "/cache/models--meta-llama--Llama-3.2-1B/snapshots/4e20de";
        assert!(is_base("meta-llama/Llama-3.2-1B", Path::new(cached)) && !is_base("gpt2", Path::new(cached)));
    }
}
