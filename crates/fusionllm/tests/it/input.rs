//! Weights, data and tokens: what is loaded, left out or changed is said, and refused where it can only be a mistake.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::process::{Bench, json_lines, text};

const MODEL: &str = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";

/// A tokenizer of single characters, whose ids are not those of the bytes.
fn character_tokenizer(characters: &str) -> Value {
    let vocab: serde_json::Map<String, Value> =
        characters.chars().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
    json!({ "version": "1.0", "added_tokens": [], "model": { "type": "BPE", "vocab": vocab, "merges": [] } })
}

/// A bench with a Hugging Face folder `hf` of a model that was trained on characters, and a job `tune.toml` that
/// evaluates it and hardly changes it.
fn trained() -> Bench {
    let bench = Bench::new();
    bench.write("tok.json", &character_tokenizer("zyxwvutsrqponmlkjihgfedcba ").to_string());
    let one = "--compnodes 1 --set train.steps=4 --set train.eval_every=0";
    bench.succeed(&format!("train job.toml --out base --set data.tokenizer=tok.json {one}"));
    bench.succeed("export base hf");
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    let tune = job.replace(MODEL, "path = \"hf\"\n").replace("lr = 3e-3", "lr = 1e-30\nweight_decay = 0");
    bench.write("tune.toml", &tune.replace("steps = 8", "steps = 4").replace("warmup = 2", "warmup = 0"));
    bench
}

fn eval_loss(run: &Path) -> f64 {
    json_lines(&run.join("metrics.jsonl")).last().unwrap()["eval_loss"].as_f64().unwrap()
}

/// Cuts the weights of a folder into two shards with an index.
fn shard(folder: &Path) {
    let whole = folder.join("model.safetensors");
    let bytes = std::fs::read(&whole).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut shards: [BTreeMap<String, TensorView<'_>>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (index, (name, view)) in file.iter().enumerate() {
        map.insert(name.to_owned(), format!("model-0000{}-of-00002.safetensors", index % 2 + 1).into());
        shards[index % 2].insert(name.to_owned(), view);
    }
    for (number, shard) in (1..).zip(shards) {
        let path = folder.join(format!("model-0000{number}-of-00002.safetensors"));
        std::fs::write(path, safetensors::serialize(shard, None).unwrap()).unwrap();
    }
    std::fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    std::fs::remove_file(whole).unwrap();
}

/// Runs a command that must refuse its input, with all of `words`.
fn refuses(bench: &Bench, arguments: &str, words: &[&str]) {
    let output = bench.run(arguments);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "fusionllm {arguments}\n{}\n{err}", text(&output.stdout));
    for word in words {
        assert!(err.contains(word), "fusionllm {arguments}: `{word}` is missing in {err}");
    }
}

#[test]
fn weights_come_from_where_the_first_lines_say() {
    let bench = trained();
    let out = bench.succeed("train tune.toml --out whole --compnodes 1");
    let file = bench.path("hf/model.safetensors").display().to_string();
    assert!(out.contains(&format!("note: weights: {file}\n")), "{out}");
    shard(&bench.path("hf"));
    let out = bench.succeed("train tune.toml --out sharded --compnodes 2");
    assert!(out.contains("note: weights: ") && out.contains("model-00002-of-00002.safetensors"), "{out}");
    let (whole, sharded) = (eval_loss(&bench.path("whole")), eval_loss(&bench.path("sharded")));
    assert!((whole - sharded).abs() < 1e-5 * whole, "{whole} {sharded}");
    let out = bench.succeed("train tune.toml --out new --compnodes 1 --set model.weights=new");
    assert!(out.contains("note: weights: new (seed 0)"), "{out}");
    assert!(std::fs::read_to_string(bench.path("new/report.md")).unwrap().contains("weights: new (seed 0)"));
    assert!(eval_loss(&bench.path("new")) > whole + 0.01, "{whole}");
    // What writes text reads weights the same way.
    bench.succeed("generate hf --prompt machines --tokens 3");

    std::fs::remove_file(bench.path("hf/model-00002-of-00002.safetensors")).unwrap();
    for command in ["train tune.toml --out x", "generate hf --prompt machines", "export hf y"] {
        refuses(&bench, command, &["model.safetensors.index.json", "a shard is missing", "model-00002-of-00002"]);
    }
    std::fs::remove_file(bench.path("hf/model.safetensors.index.json")).unwrap();
    std::fs::remove_file(bench.path("hf/model-00001-of-00002.safetensors")).unwrap();
    refuses(&bench, "train tune.toml --out x", &["no weights to start from", "model.weights = \"new\""]);
    bench.write("hf/pytorch_model.bin", "x");
    refuses(&bench, "train tune.toml --out x", &["pytorch_model.bin", "safe_serialization"]);
    assert!(!bench.path("x").exists());
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_name() {
    let bench = trained();
    let path = bench.path("hf/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    refuses(&bench, "train tune.toml --out x --compnodes 1", &["parameter `transformer.", "is NaN, expected finite"]);
}

#[test]
fn a_folders_tokenizer_is_the_jobs() {
    let bench = trained();
    let out = bench.succeed("train tune.toml --out default --compnodes 1");
    assert!(out.contains("note: tokenizer: tokenizer.json of model.path (27 entries)"), "{out}");
    let out = bench.succeed("train tune.toml --out explicit --compnodes 1 --set data.tokenizer=tok.json");
    assert!(out.contains("tok.json (27 entries)"), "{out}");
    assert_eq!(eval_loss(&bench.path("default")), eval_loss(&bench.path("explicit")));
    // The model's vocabulary is the tokenizer's.
    let config: Value = serde_json::from_slice(&std::fs::read(bench.path("hf/config.json")).unwrap()).unwrap();
    assert_eq!(config["vocab_size"], 27);
    refuses(
        &bench,
        "train tune.toml --out x --set data.tokenizer=bytes",
        &["token id 119", "vocabulary ends at 27", "give in data.tokenizer the tokenizer that the model was made with"],
    );
    std::fs::remove_file(bench.path("hf/tokenizer.json")).unwrap();
    refuses(&bench, "train tune.toml --out x", &["no tokenizer.json in it", "data.tokenizer", "`bytes`"]);
    refuses(&bench, "generate hf --prompt a", &["no tokenizer.json in it", "--tokenizer FILE"]);
    bench.succeed("generate hf --prompt a --tokens 2 --tokenizer tok.json");
    assert!(!bench.path("x").exists());
}

#[test]
fn a_tokenizer_that_drops_text_or_cuts_it() {
    let bench = Bench::new();
    bench.write("few.json", &character_tokenizer("abcdefghijklm ").to_string());
    refuses(
        &bench,
        "train job.toml --out x --set data.tokenizer=few.json",
        &["few.json has no token for", "byte fallback", "'r'"],
    );
    let mut cuts = character_tokenizer("zyxwvutsrqponmlkjihgfedcba ");
    cuts["truncation"] = json!({ "direction": "Right", "max_length": 50, "strategy": "LongestFirst", "stride": 0 });
    bench.write("cuts.json", &cuts.to_string());
    let out =
        bench.succeed("train job.toml --out run --compnodes 1 --set data.tokenizer=cuts.json --set train.steps=2");
    assert!(out.contains("truncation to 50 tokens: passed over"), "{out}");
    let data: Value = serde_json::from_slice(&std::fs::read(bench.path("run/data.json")).unwrap()).unwrap();
    let tokens = data["train_tokens"].as_u64().unwrap() + data["eval_tokens"].as_u64().unwrap();
    assert_eq!(tokens, std::fs::metadata(bench.path("text.txt")).unwrap().len());
}

#[test]
fn an_empty_value_is_refused_before_anything_is_read() {
    let bench = Bench::new();
    for key in ["data.path", "data.tokenizer", "checkpoint.to", "placement.cluster"] {
        refuses(&bench, &format!("train job.toml --out x --set {key}="), &[key, "is empty"]);
    }
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    bench.write("empty.toml", &job.replace(MODEL, "path = \"\"\n"));
    refuses(&bench, "train empty.toml --out x", &["`model.path`: is empty"]);
    bench.write("list.toml", &job.replace("path = \"text.txt\"", "path = [\"text.txt\", \"\"]"));
    refuses(&bench, "plan list.toml", &["`data.path`: is empty"]);
    for command in ["generate  --prompt a", "export  x"] {
        let mut words: Vec<&str> = command.split(' ').collect();
        let output = bench.command(words.remove(0)).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{command}");
    }
    assert!(!bench.path("x").exists());
}

#[test]
fn what_a_folder_has_besides_text_is_said() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("texts")).unwrap();
    std::fs::copy(bench.path("text.txt"), bench.path("texts/good.txt")).unwrap();
    std::fs::write(bench.path("texts/bad.txt"), [b'a', 0xe9]).unwrap();
    std::fs::write(bench.path("texts/nul.txt"), b"a\0b").unwrap();
    let one = "--compnodes 1 --set train.steps=2";
    let out = bench.succeed(&format!("train job.toml --out run {one} --set data.path=texts"));
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    for words in ["not UTF-8 text: `bad.txt`", "with NUL bytes: `nul.txt`"] {
        assert!(out.contains(words) && report.contains(words), "`{words}` is missing in\n{out}\n{report}");
    }
}

#[test]
fn a_run_that_goes_on_says_what_changed() {
    let bench = Bench::new();
    bench.write("tok.json", &character_tokenizer("zyxwvutsrqponmlkjihgfedcba ").to_string());
    let keys = "--compnodes 1 --set data.tokenizer=tok.json --set train.steps=4";
    bench.succeed(&format!("train job.toml --out run {keys}"));
    let more = |steps: u32| format!("train --resume run --compnodes 1 --set train.steps={steps}");
    let out = bench.succeed(&more(5));
    assert!(out.contains("note: weights: ") && out.contains("step-4 (step 4)"), "{out}");
    assert!(!out.contains("not what"), "{out}");

    let text = std::fs::read_to_string(bench.path("text.txt")).unwrap();
    bench.write("text.txt", &format!("{text} {text}"));
    let out = bench.succeed(&more(6));
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    for words in ["the data is not what the checkpoint was trained on: `text.txt` has", "held out are trained on now"] {
        assert!(out.contains(words) && report.contains(words), "`{words}` is missing in\n{out}\n{report}");
    }

    bench.write("tok.json", &character_tokenizer("abcdefghijklmnopqrstuvwxyz ").to_string());
    refuses(&bench, &more(7), &["tok.json", "is not the one that the model was trained with"]);
}

#[test]
fn what_a_run_needs_goes_with_its_checkpoints() {
    let bench = trained();
    // A folder as transformers leaves it, with what training does not change.
    let path = bench.path("hf/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    (config["bos_token_id"], config["eos_token_id"]) = (json!(3), json!(5));
    config["task_specific_params"] = json!({ "kept": true });
    std::fs::write(&path, config.to_string()).unwrap();
    bench.write("hf/generation_config.json", "{\"eos_token_id\":5}");
    bench.succeed("train tune.toml --out run --compnodes 2");
    let before = bench.succeed("generate run --prompt abc --tokens 5 --temperature 0");

    // On another machine there is neither the tokenizer's file nor the folder.
    std::fs::remove_dir_all(bench.path("hf")).unwrap();
    std::fs::rename(bench.path("run"), bench.path("moved")).unwrap();
    std::fs::rename(bench.path("tok.json"), bench.path("other.json")).unwrap();
    assert_eq!(bench.succeed("generate moved --prompt abc --tokens 5 --temperature 0"), before);
    bench.succeed("export moved out");
    let written: Value = serde_json::from_slice(&std::fs::read(bench.path("out/config.json")).unwrap()).unwrap();
    assert_eq!((&written["bos_token_id"], &written["eos_token_id"]), (&json!(3), &json!(5)));
    assert_eq!(written["task_specific_params"]["kept"], true);
    assert_eq!(std::fs::read_to_string(bench.path("out/generation_config.json")).unwrap(), "{\"eos_token_id\":5}");
    assert_eq!(
        std::fs::read(bench.path("out/tokenizer.json")).unwrap(),
        std::fs::read(bench.path("other.json")).unwrap()
    );
    // The base run carries the file that its job named.
    bench.succeed("export base out-of-base");
    bench.write("few.json", &character_tokenizer("abc").to_string());
    refuses(&bench, "generate base --prompt abc --tokenizer few.json", &["few.json has 3 entries", "has 27"]);
}

#[test]
fn a_private_jobs_tokenizer_stays_with_its_owner() {
    let bench = Bench::new();
    bench.write("tok.json", &character_tokenizer("zyxwvutsrqponmlkjihgfedcba ").to_string());
    let keys = "--compnodes 2 --set data.tokenizer=tok.json --set data.private=true --set train.steps=4";
    bench.succeed(&format!("train job.toml --out run {keys}"));
    std::fs::rename(bench.path("tok.json"), bench.path("elsewhere.json")).unwrap();
    refuses(&bench, "export run out", &["tok.json", "which is not here", "--tokenizer FILE"]);
    bench.succeed("export run out --tokenizer elsewhere.json");
    bench.write("tok.json", &character_tokenizer("abcdefghijklmnopqrstuvwxyz ").to_string());
    refuses(&bench, "generate run --prompt a", &["is not the one that the model was trained with"]);
}

#[test]
fn what_a_model_that_writes_does_not_read_is_said() {
    let bench = trained();
    let path = bench.path("hf/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let extra = 1f32.to_le_bytes();
    let extra = TensorView::new(safetensors::Dtype::F32, vec![1], &extra).unwrap();
    let all: BTreeMap<String, TensorView<'_>> =
        file.iter().map(|(name, view)| (name.to_owned(), view)).chain([("extra".to_owned(), extra)]).collect();
    std::fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
    for command in ["generate hf --prompt abc --tokens 2", "export hf out"] {
        let output = bench.run(command);
        let err = text(&output.stderr);
        assert!(output.status.success() && err.contains("the model does not use: `extra`"), "{command}\n{err}");
    }
    let output = bench.run(&format!("generate base --tokens 2 --prompt {}", "a".repeat(20)));
    let err = text(&output.stderr);
    assert!(err.contains("20 tokens") && err.contains("the first 4 are passed over"), "{err}");
}
