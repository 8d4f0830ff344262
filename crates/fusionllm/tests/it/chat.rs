//! Whole runs on conversations against `transformers`, and the order and the cache of data.
//!
//! `tests/golden/chat/make.py` made the folders.

use std::path::PathBuf;

use serde_json::Value;

use crate::golden::{golden, numbers};
use crate::process::{Bench, json_lines};

/// Seven conversations to train on, three held out.
const JOB: &str = "
name = \"chat\"
[model]
path = \"hf\"
[data]
path = \"data.jsonl\"
format = \"jsonl\"
rows = \"chat\"
order = \"sequential\"
seq_len = 96
eval_fraction = 0.2
[train]
steps = 5
batch = 4
micro_batches = 4
optimizer = \"sgd\"
momentum = 0.0
weight_decay = 0.0
lr = 0.1
schedule = \"constant\"
warmup = 0
clip = 0.0
eval_every = 1
eval_batches = 3
[compression]
policy = \"dense\"
[checkpoint]
every = 2
";

fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("hf")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden("chat", "chatml").join(name), bench.path("hf").join(name)).unwrap();
    }
    std::fs::copy(golden("chat", "data.jsonl"), bench.path("data.jsonl")).unwrap();
    bench.write("job.toml", JOB);
    bench
}

fn column(bench: &Bench, out: &str, name: &str) -> Vec<f64> {
    let lines = json_lines(&bench.path(out).join("metrics.jsonl"));
    lines.iter().filter_map(|line| line[name].as_f64()).collect()
}

fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

#[test]
fn answers_are_learnt_as_in_pytorch_however_batch_and_model_are_cut() {
    let found: Value = serde_json::from_slice(&std::fs::read(golden("chat", "cases.json")).unwrap()).unwrap();
    let steps = numbers(&found["steps"]);
    let bench = bench();
    let close = |what: &str, got: &[f64], expected: &[f64]| {
        assert_eq!(got.len(), expected.len(), "{what}");
        let all = got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-5 * b);
        assert!(all, "{what}: {got:?} against {expected:?}");
    };
    let mut alike = Vec::new();
    for (out, sets) in [
        ("one", "--compnodes 1"),
        ("three", "--compnodes 3"),
        ("private", "--compnodes 3 --set data.private=true --set data.private_seed=job"),
        ("halves", "--compnodes 2 --set train.micro_batches=2 --set train.eval_batches=2"),
        ("whole", "--compnodes 1 --set train.micro_batches=1 --set train.eval_batches=1"),
    ] {
        bench.succeed(&format!("train job.toml --out {out} {sets}"));
        let losses = column(&bench, out, "loss");
        close(out, &losses, &steps);
        if out != "halves" && out != "whole" {
            alike.push((bits(&losses), bits(&column(&bench, out, "eval_loss"))));
        }
    }
    assert!(alike.iter().all(|of| *of == alike[0]), "a cut changes the losses: {alike:?}");
    // Before the first update there is none: the evaluation of a step that learns nothing.
    bench.succeed("train job.toml --out still --compnodes 2 --set train.steps=1 --set train.lr=1e-30");
    close("evaluation", &column(&bench, "still", "eval_loss"), &[found["eval"].as_f64().unwrap()]);
    let report = std::fs::read_to_string(bench.path("still/report.md")).unwrap();
    let perplexity = format!("perplexity {:.2}", found["eval"].as_f64().unwrap().exp());
    assert!(report.contains(&perplexity), "{report}");
    assert!(report.contains("chat template: tokenizer_config.json; the loss is that of the answers alone"), "{report}");
}

#[test]
fn a_run_that_goes_on_does_so_with_the_very_sample() {
    let bench = bench();
    bench.succeed("train job.toml --out whole --compnodes 2 --set data.order=shuffled");
    bench.succeed("train job.toml --out part --compnodes 1 --set data.order=shuffled --set train.steps=2");
    bench.succeed("train --resume part --compnodes 2 --set train.steps=5");
    let (whole, part) = (column(&bench, "whole", "loss"), column(&bench, "part", "loss"));
    assert_eq!(bits(&whole), bits(&part));
    let mut sequential = column(&bench, "whole", "loss");
    sequential.dedup();
    assert_eq!(sequential.len(), 5);
    let text = "train job.toml --compnodes 1 --set model.path=hf --set data.path=text.txt --set data.format=text \
                --set data.rows=documents --set data.order=shuffled --set data.seq_len=16";
    bench.succeed(&format!("{text} --out text-whole"));
    bench.succeed(&format!("{text} --out text-part --set train.steps=4"));
    bench.succeed("train --resume text-part --compnodes 2 --set train.steps=5");
    assert_eq!(bits(&column(&bench, "text-whole", "loss")), bits(&column(&bench, "text-part", "loss")));
}

#[test]
fn tokens_on_the_disk_change_no_loss_and_damage_is_said() {
    let bench = bench();
    bench.succeed("train job.toml --out memory --compnodes 1 --set data.cache=false");
    assert_eq!(std::fs::read_dir(bench.token_cache()).unwrap().count(), 0);
    bench.succeed("train job.toml --out disk --compnodes 1");
    let entries: Vec<PathBuf> = std::fs::read_dir(bench.token_cache()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(entries.len(), 1);
    let written = std::fs::metadata(entries[0].join("train.bin")).unwrap().modified().unwrap();
    bench.succeed("train job.toml --out again --compnodes 1");
    assert_eq!(std::fs::metadata(entries[0].join("train.bin")).unwrap().modified().unwrap(), written);
    std::fs::write(entries[0].join("train.bin"), "damage").unwrap();
    let out = bench.succeed("train job.toml --out anew --compnodes 1");
    let losses = bits(&column(&bench, "memory", "loss"));
    for out in ["disk", "again", "anew"] {
        assert_eq!(bits(&column(&bench, out, "loss")), losses, "{out}");
    }
    // The first of the two processes that read it has made it anew, and shows it.
    assert!(out.contains("the token cache was damaged and is made anew: train.bin is not what was written"), "{out}");
}

#[test]
fn what_is_wrong_with_conversations_is_said_in_a_line() {
    let bench = bench();
    bench.write("bad.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"messages\": [{\"role\": \"user\"}]}\n");
    let refused = |sets: &str| {
        let output = bench.run(&format!("train job.toml --out bad {sets}"));
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{err}");
        err
    };
    let err = refused("--set data.path=bad.jsonl");
    assert!(err.contains("bad.jsonl: line 2: `messages[0].content` is missing, expected a string"), "{err}");
    let err = refused("--set data.rows=chats");
    assert!(err.contains("`data.rows`: is `chats`, expected `documents` or `chat`"), "{err}");
    let err = refused("--set data.format=text");
    assert!(err.contains("`data.rows`: is `chat`, but data.format = \"text\" has no rows"), "{err}");
    let err = refused("--set data.tokenizer=bytes");
    assert!(err.contains("`data.chat_template`: is missing"), "{err}");
    std::fs::remove_file(bench.path("hf/tokenizer_config.json")).unwrap();
    let err = refused("");
    assert!(err.contains("chat template of the model: there is none beside the tokenizer"), "{err}");
}
