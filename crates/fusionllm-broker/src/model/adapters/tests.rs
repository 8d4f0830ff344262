//! Folders of adapters that are read, and those that are refused.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::model::{load_model, read_model};
use crate::testing;

/// A GPT-2 folder with weights, and a job of it.
fn job(folder: &Path, overrides: &[&str]) -> JobSpec {
    let config = json!({
        "model_type": "gpt2", "vocab_size": 256, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let mut spec = testing::spec(overrides);
    spec.model = fusionllm_protocol::ModelSpec { path: Some(folder.to_owned()), ..Default::default() };
    let plain = JobSpec { lora: LoraSpec::default(), ..spec.clone() };
    let params: Vec<_> = read_model(&plain).unwrap().dag.params().to_vec();
    let tensors: Vec<(String, Vec<usize>)> = params.into_iter().map(|p| (p.name, p.shape)).collect();
    testing::write_tensors(&folder.join("model.safetensors"), &tensors);
    spec
}

fn peft(folder: &Path, keys: &Value, tensors: &[(&str, [usize; 2])]) {
    std::fs::write(folder.join(CONFIG), keys.to_string()).unwrap();
    let tensors: Vec<(String, Vec<usize>)> =
        tensors.iter().map(|(name, shape)| (format!("{PREFIX}{name}.weight"), shape.to_vec())).collect();
    testing::write_tensors(&folder.join(WEIGHTS), &tensors);
}

const OF_FIRST: [(&str, [usize; 2]); 2] =
    [("transformer.h.0.attn.c_attn.lora_A", [2, 8]), ("transformer.h.0.attn.c_attn.lora_B", [24, 2])];

#[test]
fn new_adapters_are_left_to_be_drawn_and_the_rest_comes_from_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let model = load_model(&job(folder.path(), &["lora.rank=2"])).unwrap();
    assert_eq!(model.dag.adapters().len(), 2);
    assert!(model.dag.adapters().iter().all(|adapter| adapter.module.ends_with("c_attn") && adapter.scaling == 2.0));
    let names: Vec<String> = model.dag.params().iter().map(|param| param.name.clone()).collect();
    let (mut bytes, weights) = (Vec::new(), model.weights.unwrap());
    weights.write_part(&names, &mut bytes, Path::new("memory")).unwrap();
    let written = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(written.names().len(), names.len() - 4);
    assert!(written.names().iter().all(|name| !name.contains("lora")));
    let said: Vec<String> = model.notes.iter().map(ToString::to_string).collect();
    assert!(said.iter().any(|n| n.starts_with("adapters of rank 2 beside 2 linear ops: 128 of ")), "{said:?}");
}

#[test]
fn a_model_of_no_family_says_which_targets_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("graph.json");
    std::fs::write(&path, load_model(&testing::spec(&[])).unwrap().dag.to_json()).unwrap();
    let mut spec = testing::spec(&["lora.rank=2"]);
    spec.model = fusionllm_protocol::ModelSpec { path: Some(path), ..Default::default() };
    let error = load_model(&spec).unwrap_err().to_string();
    assert!(error.contains("lora.targets is not given, expected some") && error.contains("c_attn, c_fc"), "{error}");
    spec.lora.targets = vec!["c_fc".to_owned()];
    assert!(load_model(&spec).unwrap().dag.has_frozen());
    spec.lora.targets = vec!["q_proj".to_owned()];
    let error = load_model(&spec).unwrap_err();
    assert!(error.is_bad_input() && error.to_string().contains("lora.targets is `q_proj`, expected"), "{error}");
}

#[test]
fn a_peft_folder_says_which_adapters_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = tempfile::tempdir().unwrap();
    let keys = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.25, "use_rslora": true,
                       "target_modules": ["c_attn"], "modules_to_save": null, "rank_pattern": {}, "use_dora": false });
    peft(adapter.path(), &keys, &OF_FIRST);
    let mut spec = job(folder.path(), &[]);
    spec.lora.adapter = Some(adapter.path().to_owned());
    let model = load_model(&spec).unwrap();
    let adapters = model.dag.adapters();
    assert_eq!((adapters.len(), adapters[0].dropout), (1, 0.25));
    assert!((adapters[0].scaling - 8.0 / 2f64.sqrt()).abs() < 1e-12);
    let weights = model.weights.unwrap();
    let (shape, _) = weights.tensor("transformer.h.0.attn.c_attn.lora_B.weight").unwrap();
    assert_eq!(shape, [24, 2]);

    let error = |spec: &JobSpec| {
        let error = load_model(spec).unwrap_err();
        assert!(error.is_bad_input(), "{error}");
        error.to_string()
    };
    let other = |change: &dyn Fn(&mut LoraSpec)| {
        let mut other = spec.clone();
        change(&mut other.lora);
        error(&other)
    };
    assert!(other(&|lora| lora.rank = 4).contains("says r = 2, but lora.rank = 4"));
    assert!(other(&|lora| lora.alpha = Some(2.0)).contains("says lora_alpha = 8, but lora.alpha = 2"));
    assert!(other(&|lora| lora.dropout = 0.5).contains("says lora_dropout = 0.25, but lora.dropout = 0.5"));
    let said = other(&|lora| lora.targets = vec!["c_attn".to_owned()]);
    assert!(said.contains("has no adapter beside `transformer.h.1.attn.c_attn`, unlike lora.targets"), "{said}");
    let mut same = spec.clone();
    same.lora = LoraSpec {
        rank: 2,
        alpha: Some(8.0),
        targets: vec!["h.0.attn.c_attn".to_owned()],
        dropout: 0.25,
        rslora: true,
        adapter: same.lora.adapter,
    };
    assert_eq!(load_model(&same).unwrap().dag, model.dag);
    let mut new = spec.clone();
    new.model.weights = fusionllm_protocol::WeightsChoice::New;
    assert!(error(&new).contains("expected model.path with its weights"), "{}", error(&new));

    peft(adapter.path(), &keys, &OF_FIRST[..1]);
    assert!(error(&spec).contains("lora_B.weight"), "{}", error(&spec));
    peft(adapter.path(), &keys, &[OF_FIRST[0], ("transformer.h.0.attn.c_attn.lora_B", [24, 3])]);
    assert!(error(&spec).contains("has shape [24, 3], expected [24, 2]"), "{}", error(&spec));
    peft(adapter.path(), &keys, &[("transformer.h.7.attn.c_attn.lora_A", [2, 8])]);
    assert!(error(&spec).contains("`transformer.h.7.attn.c_attn`"), "{}", error(&spec));
    peft(adapter.path(), &keys, &[("transformer.wte.lora_embedding_A", [2, 8])]);
    assert!(error(&spec).contains("is no adapter of a linear op"), "{}", error(&spec));
    std::fs::remove_file(adapter.path().join(CONFIG)).unwrap();
    assert!(error(&spec).contains("expected a folder of PEFT's"), "{}", error(&spec));
}

#[test]
fn what_peft_computes_and_we_do_not_is_refused_by_name() {
    let of = |more: Value| {
        let mut keys = json!({ "peft_type": "LORA", "r": 4 });
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Config::of(keys.as_object().unwrap())
    };
    assert_eq!(of(json!({})).unwrap(), Config { rank: 4, alpha: 8.0, dropout: 0.0, rslora: false });
    for (key, value) in [
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({ "q_proj": 4 })),
        ("alpha_pattern", json!({ "q_proj": 4 })),
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 4]])),
        ("trainable_token_indices", json!([7])),
        ("target_parameters", json!(["experts"])),
        ("some_later_switch", json!("on")),
        ("bias", json!("all")),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
        ("lora_alpha", json!("8")),
        ("lora_dropout", json!(1.0)),
        ("use_rslora", json!(1)),
        ("peft_type", json!("IA3")),
    ] {
        let error = of(json!({ key: value })).unwrap_err();
        assert!(error.starts_with(&format!("{key} is {value}, expected ")), "{error}");
    }
}
