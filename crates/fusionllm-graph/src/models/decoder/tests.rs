//! Tests of the decoders against Hugging Face's names, counts and settings.

use super::*;
use crate::models::{HuggingFaceModel, Model};

/// A config.json of a family as `transformers` 4 writes it, with one more line of keys.
fn config(model_type: &str, more: &str) -> String {
    format!(
        r#"{{"model_type": "{model_type}", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "head_dim": 4{more}}}"#
    )
}

fn read(model_type: &str, more: &str) -> Result<(DecoderConfig, Vec<String>), GraphError> {
    let HuggingFaceModel { model, passed_over, .. } = Model::from_hugging_face(&config(model_type, more))?;
    match model {
        Model::Decoder(config) => Ok((config, passed_over)),
        other => panic!("{other:?}"),
    }
}

fn build(model_type: &str, more: &str) -> OpDag {
    decoder(&read(model_type, more).unwrap().0, 8).unwrap()
}

fn refusal(model_type: &str, more: &str) -> String {
    match read(model_type, more).and_then(|(config, _)| decoder(&config, 32)) {
        Ok(_) => panic!("{more} is accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_published_sizes_have_the_published_parameter_counts() {
    let cases = [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
    ];
    for (name, count) in cases {
        let dag = decoder(&DecoderConfig::named(name).unwrap(), 8).unwrap();
        assert_eq!(dag.param_elements(), count, "{name}");
    }
}

#[test]
fn parameters_are_hugging_faces_state_dict() {
    let dag = build("qwen3", ", \"tie_word_embeddings\": true, \"attention_bias\": true");
    let names: Vec<_> = dag.params().iter().map(|p| p.name.as_str()).take(18).collect();
    let expected = [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ];
    assert_eq!(names, expected);
    assert!(dag.find_param("lm_head.weight").is_none());
    assert!(build("llama", "").find_param("lm_head.weight").is_some());
    assert!(build("qwen2", "").find_param("model.layers.0.self_attn.q_proj.bias").is_some());
    assert!(build("qwen2", "").find_param("model.layers.0.self_attn.o_proj.bias").is_none());
}

#[test]
fn both_forms_of_rotary_settings_are_read() {
    let of = |more: &str| read("llama", more).map(|(config, _)| (config.rope_theta, config.rope_scaling));
    assert_eq!(of("").unwrap(), (1e4, RotaryScaling::None));
    let old = of(r#", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}"#).unwrap();
    let new = of(r#", "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}"#).unwrap();
    assert_eq!(old, new);
    assert_eq!(old, (5e5, RotaryScaling::Linear { factor: 2.0 }));
    let dynamic = of(r#", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}"#).unwrap();
    assert_eq!(dynamic.1, RotaryScaling::None);
    let llama3 = r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}"#;
    assert!(matches!(of(llama3).unwrap().1, RotaryScaling::Llama3 { original_positions: 16, .. }));
    // What stands beside goes before.
    let outer = of(&format!("{llama3}, \"original_max_position_embeddings\": 32"));
    assert!(matches!(outer.unwrap().1, RotaryScaling::Llama3 { original_positions: 32, .. }));
    let RotaryScaling::Yarn { factor, beta_fast, attention_factor, original_positions, .. } =
        of(r#", "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}"#).unwrap().1
    else {
        panic!("no YaRN")
    };
    assert_eq!((factor, beta_fast, original_positions), (4.0, 32.0, 16));
    assert!((attention_factor - 1.138_629_436).abs() < 1e-9);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (more, expected) in [
        (r#", "hidden_act": "mish""#, "llama: hidden_act is \"mish\", expected `silu`"),
        (r#", "is_causal": false"#, "llama: is_causal is false, expected true"),
        (r#", "pretraining_tp": 2"#, "llama: pretraining_tp is 2, expected 1"),
        (r#", "quantization_config": {}"#, "llama: quantization_config is {}, expected none"),
        (r#", "partial_rotary_factor": 0.5"#, "llama: partial_rotary_factor is 0.5, expected 1.0"),
        (
            r#", "rope_scaling": {"rope_type": "longrope"}"#,
            "llama: rope_scaling is {\"rope_type\":\"longrope\"}, expected rope_type",
        ),
        (r#", "rope_scaling": {"rope_type": "linear", "alpha": 1}"#, "llama: rope_scaling is"),
        (r#", "rope_scaling": {"rope_type": "linear"}"#, "llama: `factor` is missing"),
        (r#", "rope_parameters": {}, "rope_scaling": {"type": "linear"}"#, "llama: rope_scaling is"),
        (r#", "rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}"#, "llama: rope_theta is 1.0, expected 2"),
        (r#", "max_position_embeddings": 16"#, "llama: seq_len is 32, expected at most max_position_embeddings 16"),
        (
            r#", "num_key_value_heads": 3"#,
            "llama: num_key_value_heads is 3, expected a divisor of num_attention_heads 4",
        ),
        (r#", "head_dim": 5"#, "llama: head_dim is 5, expected an even number"),
        (r#", "vocab_size": "96""#, "llama: vocab_size is \"96\", expected a whole number"),
        (r#", "num_hidden_layers": 0"#, "llama: num_hidden_layers is 0, expected 1 to"),
        (r#", "attention_bias": 1"#, "llama: attention_bias is 1, expected true or false"),
    ] {
        let error = refusal("llama", more);
        assert!(error.starts_with(expected), "{more}: {error}");
    }
}

#[test]
fn a_window_counts_only_where_it_is_used_and_a_sequence_is_longer() {
    let window = |model_type, more: &str| read(model_type, more).unwrap().0.sliding_window;
    assert_eq!(window("mistral", ""), Some(4096));
    assert_eq!(window("mistral", ", \"sliding_window\": null"), None);
    assert!(
        refusal("mistral", ", \"sliding_window\": 16")
            .starts_with("mistral: seq_len is 32, expected at most sliding_window 16")
    );
    assert_eq!(window("llama", ", \"sliding_window\": 16"), None);
    assert_eq!(window("qwen2", ", \"sliding_window\": 16"), None);
    let used = ", \"use_sliding_window\": true, \"sliding_window\": 16";
    assert_eq!(window("qwen2", used), None);
    assert_eq!(window("qwen2", &format!("{used}, \"max_window_layers\": 1")), Some(16));
    let types = |last: &str| format!(r#"{used}, "layer_types": ["full_attention", "{last}"]"#);
    assert_eq!(window("qwen3", &types("full_attention")), None);
    assert_eq!(window("qwen3", &types("sliding_attention")), Some(16));
    assert!(refusal("qwen3", &types("chunked_attention")).starts_with("qwen3: layer_types is \"chunked_attention\""));
}

#[test]
fn keys_that_are_not_known_are_told() {
    let (_, passed_over) = read("llama", r#", "logit_scale": 0.5, "use_cache": true, "foo": null"#).unwrap();
    assert_eq!(passed_over, ["keys that are not known here: `logit_scale`"]);
    let (_, passed_over) = read("llama", r#", "pad_token_id": 3"#).unwrap();
    assert!(passed_over[0].starts_with("`pad_token_id` 3: "), "{passed_over:?}");
}

#[test]
fn what_is_written_is_read_as_the_same() {
    for (model_type, more) in [
        (
            "llama",
            r#", "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16, "truncate": false}"#,
        ),
        ("llama", r#", "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true, "hidden_act": "gelu""#),
        ("mistral", ", \"sliding_window\": 32"),
        ("qwen2", ", \"rope_theta\": 1e6"),
        ("qwen3", ", \"attention_bias\": true"),
    ] {
        let (config, _) = read(model_type, more).unwrap();
        let mut keys = config.keys();
        keys.insert("model_type".to_owned(), model_type.into());
        keys.insert("max_position_embeddings".to_owned(), 64.into());
        let text = serde_json::Value::Object(keys).to_string();
        assert_eq!(Model::from_hugging_face(&text).unwrap().model, Model::Decoder(config));
    }
}

#[test]
fn heads_of_keys_follow_the_family_where_the_file_is_silent() {
    let without = |model_type: &str, value: &str| {
        let text = config(model_type, "").replace("\"num_key_value_heads\": 2,", value);
        match Model::from_hugging_face(&text).unwrap().model {
            Model::Decoder(config) => config.num_key_value_heads,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(without("llama", ""), 4);
    assert_eq!(without("mistral", ""), 8);
    assert_eq!(without("mistral", "\"num_key_value_heads\": null,"), 4);
}
