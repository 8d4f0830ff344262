//! Whole runs from Hugging Face folders of decoders against `transformers`: Llama, Mistral, Qwen2 and Qwen3, and each setting
//! of a config.json that changes what is computed.
//!
//! `tests/golden/decoders/make.py` made the folders.

use std::path::Path;
use std::sync::Arc;

use fusionllm::broker::load_model_dir;
use fusionllm::compnode::{Generator, open_device, read_shard};
use fusionllm::graph::Model;
use serde_json::Value;

use crate::golden::{folder_job, golden, numbers};
use crate::process::{Bench, json_lines};

/// What `transformers` found, by name of the folder.
fn cases() -> serde_json::Map<String, Value> {
    let text = std::fs::read(golden("decoders", "cases.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// A bench with the folder of a case as `hf`.
fn bench(case: &str) -> Bench {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("hf")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("decoders", case).join(name), bench.path("hf").join(name)).unwrap();
    }
    std::fs::copy(golden("decoders", "text.txt"), bench.path("text.txt")).unwrap();
    let train = "steps = 5\noptimizer = \"sgd\"\nmomentum = 0.0\nweight_decay = 0.0\nlr = 0.1\nschedule = \"constant\"\nclip = 0.0\n\
                 eval_every = 1";
    bench.write("job.toml", &folder_job("decoder", "", train));
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
    let text = std::fs::read(golden("decoders", "text.txt")).unwrap();
    let held_out: Vec<i32> = text[17..33].iter().map(|&byte| i32::from(byte)).collect();
    for (case, found) in cases() {
        let model = load_model_dir(&golden("decoders", &case)).unwrap();
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
        let source = std::fs::read_to_string(golden("decoders", &case).join("config.json")).unwrap();
        let of = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(of(&written), of(&source), "{case}");
        let exported = load_model_dir(&bench.path("out")).unwrap();
        assert_eq!(exported.config, load_model_dir(&golden("decoders", &case)).unwrap().config);
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
