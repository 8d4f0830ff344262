//! Whole runs from Hugging Face folders of decoders against `transformers`: Llama, Mistral, Qwen2 and Qwen3, and each setting
//! of a config.json that changes what is computed.
//!
//! `tests/golden/decoders/make.py` made the folders.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm::broker::load_model_dir;
use fusionllm::compnode::{Generator, open_device, read_shard};
use fusionllm::graph::Model;
use serde_json::Value;

use crate::process::{Bench, json_lines};

/// The text has one sequence to train on, which both rows of a batch are, and one held out.
const JOB: &str = "
name = \"decoder\"
[model]
path = \"hf\"
[data]
path = \"text.txt\"
tokenizer = \"bytes\"
seq_len = 16
eval_fraction = 0.5
[train]
steps = 5
batch = 2
micro_batches = 2
optimizer = \"sgd\"
momentum = 0.0
weight_decay = 0.0
lr = 0.1
schedule = \"constant\"
warmup = 0
clip = 0.0
eval_every = 1
eval_batches = 1
";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/decoders").join(name)
}

/// What `transformers` found, by name of the folder.
fn cases() -> serde_json::Map<String, Value> {
    let text = std::fs::read(golden("cases.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A bench with the folder of a case as `hf`.
fn bench(case: &str) -> Bench {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("hf")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(case).join(name), bench.path("hf").join(name)).unwrap();
    }
    std::fs::copy(golden("text.txt"), bench.path("text.txt")).unwrap();
    bench.write("job.toml", JOB);
    bench
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() < tolerance * b.abs().max(1.0), "{what}: {got:?} against {expected:?}");
    }
}

#[test]
fn every_family_has_the_logits_of_transformers() {
    let text = std::fs::read(golden("text.txt")).unwrap();
    let held_out: Vec<i32> = text[17..33].iter().map(|&byte| i32::from(byte)).collect();
    for (case, found) in cases() {
        let model = load_model_dir(&golden(&case)).unwrap();
        let names: Vec<String> = model.dag.params().iter().map(|p| p.name.clone()).collect();
        let mut bytes = Vec::new();
        model.weights.unwrap().write_part(&names, &mut bytes, Path::new("memory")).unwrap();
        let dag = Arc::new(model.config.unwrap().build(16).unwrap());
        let backend = open_device("cpu".parse().unwrap()).unwrap();
        let mut generator = Generator::new(dag, read_shard(&bytes).unwrap(), backend.as_ref()).unwrap();
        let (logits, vocab) = generator.logits(&held_out).unwrap();
        let last: Vec<f64> = logits[15 * vocab..].iter().map(|&logit| f64::from(logit)).collect();
        let expected = numbers(&found["logits"]);
        assert_eq!(last.len(), expected.len());
        for (a, b) in last.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-4, "{case}: {a} against {b}");
        }
    }
}

#[test]
fn every_family_trains_as_in_pytorch_and_goes_out_again() {
    for (case, found) in cases() {
        let bench = bench(&case);
        let steps = numbers(&found["steps"]);
        for compnodes in [1, 3] {
            let out = format!("on-{compnodes}");
            bench.succeed(&format!("train job.toml --out {out} --compnodes {compnodes}"));
            let lines = json_lines(&bench.path(&out).join("metrics.jsonl"));
            let losses: Vec<f64> = lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect();
            assert_close(&format!("{case} on {compnodes}"), &losses, &steps, 2e-5);
        }
        bench.succeed("export on-3 out");
        let written = std::fs::read_to_string(bench.path("out/config.json")).unwrap();
        let source = std::fs::read_to_string(golden(&case).join("config.json")).unwrap();
        let of = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(of(&written), of(&source), "{case}");
        let exported = load_model_dir(&bench.path("out")).unwrap();
        assert_eq!(exported.config, load_model_dir(&golden(&case)).unwrap().config);
    }
}

#[test]
fn a_decoder_that_begins_anew_is_exported_as_the_model_that_it_is() {
    let bench = bench("qwen3");
    std::fs::remove_file(bench.path("hf/model.safetensors")).unwrap();
    bench.succeed("train job.toml --out new --set model.weights=new --set train.steps=1 --set train.eval_every=0");
    bench.succeed("export new out");
    let text = std::fs::read_to_string(bench.path("out/config.json")).unwrap();
    let read = Model::from_hugging_face(&text).unwrap();
    assert_eq!((read.model.architecture(), read.passed_over.len()), ("Qwen3ForCausalLM", 0));
    bench.succeed("generate out --prompt train --tokens 3 --tokenizer out/tokenizer.json");
}
