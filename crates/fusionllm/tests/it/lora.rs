//! Adapters against `peft`: of every family, in and out, merged and not, on one CompNode and on several.
//!
//! `tests/golden/lora/make.py` made the adapters, of the models of `tests/golden/decoders` and `tests/golden/gpt2_folder`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fusionllm::broker::{load_model, load_model_dir};
use fusionllm::compnode::{Generator, NamedTensor, merge_adapters, open_device, read_shard};
use fusionllm::graph::OpDag;
use fusionllm::protocol::JobSpec;
use serde_json::{Map, Value};

use crate::golden::{folder_job, golden, numbers};
use crate::process::{Bench, json_lines, losses, text};

/// What `peft` found, by name of the folder.
fn cases() -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(golden("lora", "cases.json")).unwrap()).unwrap()
}

fn job() -> String {
    let tables = "[lora]\nadapter = \"peft\"\n[compression]\npolicy = \"dense\"";
    folder_job("adapters", tables, "steps = 5\nmomentum = 0.0\nschedule = \"constant\"")
}

/// A bench with the model of a case as `hf`, its adapters as `peft`, and a job that goes on from them.
fn bench(case: &str, found: &Value) -> Bench {
    let bench = Bench::new();
    let copy = |from: &Path, to: &str, names: [&str; 2]| {
        std::fs::create_dir(bench.path(to)).unwrap();
        for name in names {
            std::fs::copy(from.join(name), bench.path(to).join(name)).unwrap();
        }
    };
    copy(&golden("lora", found["base"].as_str().unwrap()), "hf", ["config.json", "model.safetensors"]);
    copy(&golden("lora", case), "peft", ["adapter_config.json", "adapter_model.safetensors"]);
    std::fs::copy(golden("decoders", "text.txt"), bench.path("text.txt")).unwrap();
    bench.write("job.toml", &job());
    bench
}

/// How the case is trained, as options.
fn settings(found: &Value) -> String {
    let job = found["job"].as_object().unwrap();
    let set = |(key, value): (&String, &Value)| format!(" --set {key}={}", value.to_string().trim_matches('"'));
    job.iter().map(set).collect()
}

/// The model of a bench's job, and its tensors.
fn loaded(bench: &Bench) -> (OpDag, Vec<NamedTensor>) {
    let mut spec = JobSpec::from_toml(&job(), &[]).unwrap();
    spec.resolve_paths(&bench.path(""));
    let model = load_model(&spec).unwrap();
    let names: Vec<String> = model.dag.params().iter().map(|p| p.name.clone()).collect();
    let mut bytes = Vec::new();
    model.weights.unwrap().write_part(&names, &mut bytes, Path::new("memory")).unwrap();
    (model.dag, read_shard(&bytes).unwrap())
}

/// Logits of the last position of the held-out sequence.
fn logits(dag: OpDag, tensors: Vec<NamedTensor>) -> Vec<f64> {
    let text = std::fs::read(golden("decoders", "text.txt")).unwrap();
    let held_out: Vec<i32> = text[17..33].iter().map(|&byte| i32::from(byte)).collect();
    let backend = open_device("cpu".parse().unwrap()).unwrap();
    let mut generator = Generator::new(Arc::new(dag), tensors, backend.as_ref()).unwrap();
    let (logits, vocab) = generator.logits(&held_out).unwrap();
    logits[15 * vocab..].iter().map(|&logit| f64::from(logit)).collect()
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() < tolerance * b.abs().max(1.0), "{what}: {a} against {b} in {got:?}");
    }
}

/// All tensors of the newest checkpoint of a run.
fn tensors(run: &Path) -> BTreeMap<String, NamedTensor> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(run.join("checkpoints/step-5")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            let read = read_shard(&std::fs::read(path).unwrap()).unwrap();
            tensors.extend(read.into_iter().map(|tensor| (tensor.name.clone(), tensor)));
        }
    }
    tensors
}

#[test]
fn adapters_have_the_logits_of_peft_merged_and_not() {
    for (case, found) in cases() {
        let bench = bench(&case, &found);
        let (dag, tensors) = loaded(&bench);
        let expected = numbers(&found["logits"]);
        // PEFT's logits are far from those without adapters, so these count.
        let (base, merged) = merge_adapters(&dag, tensors.clone()).unwrap();
        assert_close(&format!("{case}, merged"), &logits(base, merged), &numbers(&found["merged"]), 1e-4);
        assert_close(&case, &logits(dag, tensors), &expected, 1e-4);
        let plain = load_model_dir(&bench.path("hf")).unwrap();
        let names: Vec<String> = plain.dag.params().iter().map(|p| p.name.clone()).collect();
        let mut bytes = Vec::new();
        plain.weights.unwrap().write_part(&names, &mut bytes, Path::new("memory")).unwrap();
        let without = logits(plain.config.unwrap().build(16).unwrap(), read_shard(&bytes).unwrap());
        let differs = without.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 0.1);
        assert!(differs, "{case}");
    }
}

#[test]
fn adapters_train_as_in_peft_and_nothing_else_changes() {
    for (case, found) in cases() {
        let bench = bench(&case, &found);
        let mut by_count = Vec::new();
        for compnodes in [1, 3] {
            let out = format!("on-{compnodes}");
            bench.succeed(&format!("train job.toml --out {out} --compnodes {compnodes}{}", settings(&found)));
            by_count.push(losses(&bench.path(&out)));
            assert_close(
                &format!("{case} on {compnodes}"),
                &by_count[by_count.len() - 1],
                &numbers(&found["steps"]),
                2e-5,
            );
        }
        // The norm for clipping is added up in another order.
        if found["job"]["train.clip"] == 0.0 {
            assert_eq!(by_count[0], by_count[1], "{case}");
        }
        let (dag, before) = loaded(&bench);
        let after = tensors(&bench.path("on-3"));
        for tensor in before {
            let frozen = dag.param(dag.find_param(&tensor.name).unwrap()).frozen;
            assert_eq!(after[&tensor.name].values == tensor.values, frozen, "{case}: {}", tensor.name);
        }
        let with_state = after.keys().filter(|name| name.starts_with("optimizer."));
        assert!(with_state.clone().all(|name| name.contains(".lora_")), "{case}");
        assert_eq!(with_state.count() > 0, found["job"]["train.optimizer"] == "adamw", "{case}");
    }
}

#[test]
fn adapters_go_out_as_they_came_in_and_merged_as_a_whole_model() {
    for (case, found) in cases() {
        let bench = bench(&case, &found);
        let set = settings(&found);
        bench.succeed(&format!("train job.toml --out run --compnodes 2 --set train.steps=5{set}"));
        assert!(bench.succeed("export run out").contains("wrote the adapters to out"));
        let read = |folder: &str| -> Value {
            let text = std::fs::read(bench.path(folder).join("adapter_config.json")).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        let (source, written) = (read("peft"), read("out"));
        for key in ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "task_type"]
        {
            assert_eq!(written[key], source[key], "{case}: {key}");
        }
        // What they were trained beside last.
        let base = written["base_model_name_or_path"].as_str().unwrap();
        assert!(base.ends_with("/hf"), "{case}: {base}");
        let keys = |folder: &str| {
            let bytes = std::fs::read(bench.path(folder).join("adapter_model.safetensors")).unwrap();
            read_shard(&bytes)
                .unwrap()
                .into_iter()
                .map(|tensor| (tensor.name, tensor.shape))
                .collect::<BTreeMap<_, _>>()
        };
        assert_eq!(keys("out"), keys("peft"), "{case}");

        // A job that goes on from what went out is where the run was, and so is the merged model.
        bench.succeed("export run whole --merge");
        let (dag, tensors) = {
            std::fs::remove_dir_all(bench.path("peft")).unwrap();
            std::fs::rename(bench.path("out"), bench.path("peft")).unwrap();
            loaded(&bench)
        };
        let expected = logits(dag, tensors);
        let whole = load_model_dir(&bench.path("whole")).unwrap();
        assert_eq!(whole.config, load_model_dir(&bench.path("hf")).unwrap().config);
        let names: Vec<String> = whole.dag.params().iter().map(|p| p.name.clone()).collect();
        let mut bytes = Vec::new();
        whole.weights.unwrap().write_part(&names, &mut bytes, Path::new("memory")).unwrap();
        let merged = logits(whole.config.unwrap().build(16).unwrap(), read_shard(&bytes).unwrap());
        assert_close(&format!("{case}, exported"), &merged, &expected, 1e-4);
        bench.succeed("generate run --prompt train --tokens 2");
    }
}

/// New adapters follow from the seed alone, so any cut begins and goes on alike; so does a run that is resumed.
#[test]
fn a_run_with_new_adapters_is_the_same_wherever_it_is_cut_and_when_it_goes_on() {
    let bench = Bench::new();
    let lora = "--set lora.rank=2 --set lora.targets=all-linear --set train.clip=0 --set model.n_layer=3";
    for cut in ["--compnodes 1", "--compnodes 3", "--compnodes 3 --set placement.strategy=equal-number"] {
        let out = cut.replace(|c: char| !c.is_alphanumeric(), "");
        bench.succeed(&format!("train job.toml --out {out} {lora} {cut}"));
        assert_eq!(losses(&bench.path(&out)), losses(&bench.path("compnodes1")), "{cut}");
    }
    bench.succeed(&format!("train job.toml --out resumed {lora} --compnodes 3 --set train.steps=4"));
    bench.succeed("train --resume resumed --set train.steps=8");
    // The learning rate's schedule is that of eight steps only from there on.
    let all = losses(&bench.path("resumed"));
    assert_eq!(all.len(), 8);
    bench.succeed(&format!("train job.toml --out whole {lora} --compnodes 1"));
    bench.succeed("train --resume whole/checkpoints/step-4 --out again");
    assert_eq!(losses(&bench.path("again")), losses(&bench.path("whole"))[4..]);
    let refused = bench.run("train --resume resumed --set lora.rank=4 --set train.steps=9");
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("lora.rank"), "{}", text(&refused.stderr));
}

/// A front of the model without anything to train sends no gradients and gets none.
#[test]
fn nothing_goes_back_over_links_before_the_first_adapter() {
    let bench = Bench::new();
    let cut = "placement.stages=[{compnode=0,last_op=\"h.0.add_2\"},{compnode=1,last_op=\"loss\"}]";
    let common = "train job.toml --compnodes 2 --set model.n_layer=2 --set train.steps=4 --set train.eval_every=0";
    let run = |out: &str, more: &str| {
        let mut words: Vec<&str> = common.split_whitespace().collect();
        words.extend(["--set", cut, "--out", out]);
        words.extend(more.split_whitespace());
        let output = bench.command("").args(words).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines = json_lines(&bench.path(out).join("metrics.jsonl"));
        let of = |from: &str| {
            let links = lines[2]["links"].as_array().unwrap().iter();
            links.filter(|link| link["from"] == from).map(|link| link["bytes"].as_u64().unwrap()).sum::<u64>()
        };
        let placement: Value =
            serde_json::from_slice(&std::fs::read(bench.path(out).join("placement.json")).unwrap()).unwrap();
        let names = placement["placement"]["compnodes"].as_array().unwrap().clone();
        let by_name = |index: usize| of(names[index].as_str().unwrap());
        [by_name(0), by_name(1)]
    };
    let whole = run("whole", "");
    let tail = run("tail", "--set lora.rank=2 --set lora.targets=transformer.h.1.attn.c_attn");
    // A step has 4 sequences of 16 tokens, each of 16 numbers; the whole run sends the tied table both ways too.
    let activations = 4 * 16 * 16 * 4;
    assert!(whole[0] > activations && whole[1] > activations, "{whole:?}");
    assert!(tail[0] >= activations && tail[0] < activations + 1000, "{tail:?}");
    assert!(tail[1] < 1000, "{tail:?}");
    assert_eq!(losses(&bench.path("tail")).len(), 4);
}
