//! Tests of the GPT-2 builder against Hugging Face's names, counts and initial values.

use super::*;
use crate::models::Model;

fn tiny() -> Gpt2Config {
    Gpt2Config {
        vocab_size: 96,
        n_positions: 32,
        n_embd: 12,
        n_layer: 2,
        n_head: 3,
        layer_norm_epsilon: 1e-5,
        dropout: 0.0,
    }
}

fn read(text: &str) -> Result<Gpt2Config, GraphError> {
    match Model::from_hugging_face(text)?.model {
        Model::Gpt2(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

fn names(dag: &OpDag) -> Vec<&str> {
    dag.ops().iter().map(|op| op.name.as_str()).collect()
}

#[test]
fn the_published_sizes_have_the_published_parameter_counts() {
    let cases =
        [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)];
    for (name, count) in cases {
        let dag = gpt2(&Gpt2Config::named(name).unwrap(), 8).unwrap();
        assert_eq!(dag.param_elements(), count, "{name}");
    }
    assert_eq!(Gpt2Config::named("gpt3"), None);
}

#[test]
fn parameters_are_hugging_faces_state_dict_without_duplicates() {
    let dag = gpt2(&Gpt2Config { n_layer: 1, ..tiny() }, 8).unwrap();
    let params: Vec<_> = dag.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice(), p.decay)).collect();
    let expected: [(&str, &[usize], bool); 16] = [
        ("transformer.wte.weight", &[96, 12], true),
        ("transformer.wpe.weight", &[32, 12], true),
        ("transformer.h.0.ln_1.weight", &[12], false),
        ("transformer.h.0.ln_1.bias", &[12], false),
        ("transformer.h.0.attn.c_attn.weight", &[12, 36], true),
        ("transformer.h.0.attn.c_attn.bias", &[36], false),
        ("transformer.h.0.attn.c_proj.weight", &[12, 12], true),
        ("transformer.h.0.attn.c_proj.bias", &[12], false),
        ("transformer.h.0.ln_2.weight", &[12], false),
        ("transformer.h.0.ln_2.bias", &[12], false),
        ("transformer.h.0.mlp.c_fc.weight", &[12, 48], true),
        ("transformer.h.0.mlp.c_fc.bias", &[48], false),
        ("transformer.h.0.mlp.c_proj.weight", &[48, 12], true),
        ("transformer.h.0.mlp.c_proj.bias", &[12], false),
        ("transformer.ln_f.weight", &[12], false),
        ("transformer.ln_f.bias", &[12], false),
    ];
    assert_eq!(params, expected);
}

#[test]
fn parameters_start_as_hugging_faces_do() {
    let dag = gpt2(&tiny(), 8).unwrap();
    for param in dag.params() {
        let expected = match param.name.as_str() {
            name if name.ends_with(".bias") => Init::Zeros,
            name if name.contains("ln_") => Init::Ones,
            name if name.ends_with("c_proj.weight") => Init::Normal { std: 0.01 },
            _ => Init::Normal { std: 0.02 },
        };
        assert_eq!(param.init, expected, "{}", param.name);
    }
}

#[test]
fn ops_come_in_the_order_of_the_model() {
    let dag = gpt2(&Gpt2Config { n_layer: 1, ..tiny() }, 8).unwrap();
    let without = [
        "input",
        "label",
        "wte",
        "wpe",
        "h.0.ln_1",
        "h.0.attn.c_attn",
        "h.0.attn",
        "h.0.attn.c_proj",
        "h.0.add_1",
        "h.0.ln_2",
        "h.0.mlp.c_fc",
        "h.0.mlp.act",
        "h.0.mlp.c_proj",
        "h.0.add_2",
        "ln_f",
        "lm_head",
        "loss",
    ];
    assert_eq!(names(&dag), without);
    let dag = gpt2(&Gpt2Config { n_layer: 1, dropout: 0.1, ..tiny() }, 8).unwrap();
    let drops: Vec<_> = names(&dag).into_iter().filter(|name| !without.contains(name)).collect();
    assert_eq!(drops, ["embd.drop", "h.0.attn.drop", "h.0.mlp.drop"]);
    let sum = dag.op(dag.find("h.0.add_1").unwrap());
    let inputs: Vec<_> = sum.inputs.iter().map(|&input| dag.op(input).name.as_str()).collect();
    assert_eq!(inputs, ["embd.drop", "h.0.attn.drop"]);
}

#[test]
fn the_logits_are_as_wide_as_the_vocabulary() {
    let dag = gpt2(&tiny(), 8).unwrap();
    let logits = dag.op(dag.logits().unwrap());
    assert_eq!((logits.name.as_str(), logits.output.to_string().as_str()), ("lm_head", "f32 [B, 8, 96]"));
    assert_eq!(dag.op(dag.loss().unwrap()).output.to_string(), "f32 []");
}

#[test]
fn settings_out_of_range_are_named() {
    let cases = [
        (Gpt2Config { n_head: 5, ..tiny() }, 8, "gpt2: n_head is 5, expected a divisor of n_embd 12"),
        (tiny(), 33, "gpt2: seq_len is 33, expected at most n_positions 32"),
        (tiny(), 0, "gpt2: seq_len is 0, expected 1 to 268435456"),
        (Gpt2Config { n_layer: 0, ..tiny() }, 8, "gpt2: n_layer is 0, expected 1 to 4096"),
        (Gpt2Config { n_layer: 100_000, ..tiny() }, 8, "gpt2: n_layer is 100000, expected 1 to 4096"),
        (
            Gpt2Config { n_embd: usize::MAX, ..tiny() },
            8,
            "gpt2: n_embd is 18446744073709551615, expected 1 to 268435456",
        ),
        (Gpt2Config { dropout: 1.0, ..tiny() }, 8, "gpt2: dropout is 1, expected at least 0 and less than 1"),
        (
            Gpt2Config { layer_norm_epsilon: 0.0, ..tiny() },
            8,
            "op `h.0.ln_1` (layer_norm): eps is 0, expected a finite number over 0",
        ),
    ];
    for (config, seq_len, message) in cases {
        assert_eq!(gpt2(&config, seq_len).unwrap_err().to_string(), message);
    }
}

#[test]
fn a_hugging_face_config_is_read_and_its_variants_refused() {
    let text = r#"{"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_inner": null,
        "vocab_size": 96, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3, "resid_pdrop": 0.1}"#;
    assert_eq!(read(text).unwrap(), Gpt2Config { dropout: 0.1, ..tiny() });
    let error = read(&text.replace("gelu_new", "relu")).unwrap_err().to_string();
    let expected = r#"gpt2: activation_function is "relu", expected "gelu_new" or "gelu_pytorch_tanh""#;
    assert_eq!(error, expected);
    assert!(read(&text.replace("null", "47")).is_err());
    assert!(read(&text.replace("null", "48")).is_ok());
    assert!(read(r#"{"model_type": "gpt2"}"#).unwrap_err().to_string().contains("vocab_size"));
    for (key, value, accepted) in [
        ("reorder_and_upcast_attn", "true", "false or null"),
        ("scale_attn_by_inverse_layer_idx", "true", "false or null"),
        ("scale_attn_weights", "false", "true"),
        ("tie_word_embeddings", "false", "true"),
        ("quantization_config", "{}", "null"),
        ("pruned_heads", r#"{"0":[1]}"#, "null or {}"),
        ("num_hidden_layers", "3", "2"),
    ] {
        let changed = text.replace("\"n_layer\": 2", &format!("\"n_layer\": 2, \"{key}\": {value}"));
        let error = read(&changed).unwrap_err().to_string();
        assert_eq!(error, format!("gpt2: {key} is {value}, expected {accepted}"));
    }
}

#[test]
fn an_error_in_a_config_speaks_of_the_config() {
    let text = r#"{"vocab_size": 96, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3}"#;
    assert_eq!(read(&format!("\u{feff}{text}")).unwrap(), tiny());
    let cases = [
        ("{", "not the config.json of a model that is known here: EOF while parsing"),
        ("[]", "not the config.json of a model that is known here: it is no object"),
        (r#"{"vocab_size": 96, "n_positions": 32}"#, "gpt2: `n_embd` is missing"),
    ];
    for (text, start) in cases {
        let error = read(text).unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}");
    }
}

#[test]
fn the_configuration_is_found_again_in_the_dag() {
    for config in [tiny(), Gpt2Config { dropout: 0.25, n_layer: 1, ..tiny() }] {
        let dag = gpt2(&config, 8).unwrap();
        assert_eq!(Gpt2Config::of(&dag), Some(config));
        let other = dag.to_json().replace("gelu_tanh", "relu");
        assert_eq!(Gpt2Config::of(&OpDag::from_json(&other).unwrap()), None);
    }
}
