//! Tests of the job file.

use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::JobError;

const LEAST: &str = "[model]\nname = \"gpt2\"\n[data]\npath = \"text\"\n";

fn read(text: &str, overrides: &[&str]) -> Result<JobSpec, JobError> {
    let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
    let spec = JobSpec::from_toml(text, &overrides)?;
    spec.validate()?;
    Ok(spec)
}

fn check_error(overrides: &[&str], expected: &str) {
    assert_eq!(read(LEAST, overrides).unwrap_err().to_string(), expected, "{overrides:?}");
}

#[test]
fn the_least_job_gets_every_default() {
    let spec = read(LEAST, &[]).unwrap();
    assert_eq!(spec.name, "run");
    assert_eq!((spec.data.seq_len, spec.data.tokenizer.as_str(), spec.data.eval_fraction), (128, "bytes", 0.1));
    assert_eq!((spec.train.steps, spec.train.batch, spec.train.micro_batches), (1000, 8, 4));
    assert_eq!((spec.train.lr, spec.train.betas, spec.train.clip), (3e-4, [0.9, 0.95], 1.0));
    assert_eq!((spec.train.warmup, spec.train.eval_batches, spec.checkpoint.keep), (20, 8, 3));
    assert_eq!((spec.placement.strategy, spec.placement.pipeline), (Strategy::OpFence, Pipeline::OneFOneB));
    let config = spec.gpt2_config().unwrap();
    assert_eq!((config.vocab_size, config.n_positions, config.n_embd), (256, 128, 768));
    assert_eq!((spec.micro_batch_size(), spec.tokens_per_step()), (2, 1024));
}

#[test]
#[expect(clippy::too_many_lines, reason = "every key of a job")]
fn every_key_can_be_set() {
    let text = r#"
name = "all"
[model]
name = "gpt2-medium"
weights = "new"
vocab_size = 300
n_positions = 64
n_embd = 32
n_layer = 2
n_head = 4
dropout = 0.1
[lora]
rank = 4
alpha = 8
targets = ["c_attn", "c_proj"]
dropout = 0.05
rslora = true
adapter = "adapters"
[data]
path = ["a", "b"]
format = "jsonl"
rows = "chat"
chat_template = "chat.jinja"
order = "sequential"
cache = false
tokenizer = "tok.json"
seq_len = 32
private = true
owner = "office"
eval_fraction = 0.2
[train]
steps = 7
batch = 6
micro_batches = 3
optimizer = "sgd"
lr = 1
min_lr_ratio = 0
warmup = 2
schedule = "constant"
betas = [0, 0.5]
epsilon = 1e-6
weight_decay = 0
momentum = 0.5
clip = 0
seed = 9
precision = "f32"
eval_every = 3
eval_batches = 2
[placement]
compnodes = 2
strategy = "equal-number"
pipeline = "gpipe"
stages = [{ compnode = 0, last_op = "wpe" }, { compnode = 1, last_op = "loss" }]
[compression]
policy = "dense"
values = "bf16"
[checkpoint]
every = 5
keep = 0
to = "kept"
[survive]
enabled = false
min_compnodes = 2
every = 20
copies = 2
mtbf_h = 0.5
"#;
    let mut spec = read(text, &[]).unwrap();
    assert_eq!(
        spec.survive,
        crate::SurviveSpec { enabled: false, min_compnodes: 2, every: Some(20), copies: 2, mtbf_h: 0.5 }
    );
    assert_eq!(spec.placement.stages.len(), 2);
    assert_eq!(spec.codec(), fusionllm_codec::Codec::Bf16);
    assert_eq!(spec.placement_spec().micro_batch_size, 2);
    spec.resolve_paths(Path::new("/jobs"));
    let targets = vec!["c_attn".to_owned(), "c_proj".to_owned()];
    let adapter = Some("/jobs/adapters".into());
    assert_eq!(spec.lora, LoraSpec { rank: 4, alpha: Some(8.0), targets, dropout: 0.05, rslora: true, adapter });
    assert_eq!(spec.data.path, [Path::new("/jobs/a"), Path::new("/jobs/b")]);
    assert_eq!(spec.data.chat_template.as_deref(), Some(Path::new("/jobs/chat.jinja")));
    assert_eq!((spec.data.sample_order(), spec.data.cache), (crate::SampleOrder::Sequential, false));
    assert_eq!(
        (spec.data.tokenizer.as_str(), spec.checkpoint.to.as_deref()),
        ("/jobs/tok.json", Some(Path::new("/jobs/kept")))
    );

    let serde_json::Value::Object(sections) = serde_json::to_value(&spec).unwrap() else { panic!("not an object") };
    let serialised: BTreeSet<(String, String)> = sections
        .iter()
        .flat_map(|(section, value)| match value {
            serde_json::Value::Object(keys) => keys.keys().map(|k| (section.clone(), k.clone())).collect(),
            _ => vec![(String::new(), section.clone())],
        })
        .collect();
    let known = job_keys().iter().map(|&(s, k)| (s.to_owned(), k.to_owned())).collect();
    assert_eq!(serialised, known);
    assert!(job_keys().iter().all(|(section, key)| text.contains(&format!("[{section}]")) || text.contains(key)));
}

#[test]
fn an_empty_value_is_not_a_path() {
    let empty = "is empty, expected a value; leave the key out for its default";
    for key in ["data.tokenizer", "data.chat_template", "checkpoint.to", "placement.cluster"] {
        check_error(&[&format!("{key}=")], &format!("`{key}`: {empty}"));
        check_error(&[&format!("{key}=\" \"")], &format!("`{key}`: {empty}"));
    }
    let model = read("[model]\npath = \"\"\n[data]\npath = \"text\"\n", &[]).unwrap_err().to_string();
    assert_eq!(model, format!("`model.path`: {empty}"));
    let expected = "`data.path`: is empty, expected the path of a file or folder, or a list of paths";
    check_error(&["data.path="], expected);
    check_error(&["data.path=[\"a\", \"\"]"], expected);
    // Before paths are made absolute, and for whoever makes a job without a file.
    let mut spec = read(LEAST, &[]).unwrap();
    spec.checkpoint.to = Some(std::path::PathBuf::new());
    assert_eq!(spec.validate().unwrap_err().to_string(), "`checkpoint.to`: is empty, expected a path");
}

#[test]
fn a_model_by_path_brings_its_tokenizer() {
    let by_path = "[model]\npath = \"folder\"\n[data]\npath = \"text\"\n";
    let mut spec = read(by_path, &[]).unwrap();
    assert_eq!((spec.data.tokenizer.as_str(), spec.model.weights), (DataSpec::MODEL, WeightsChoice::Model));
    spec.resolve_paths(Path::new("/jobs"));
    assert_eq!((spec.data.tokenizer.as_str(), spec.data.tokenizer_file()), (DataSpec::MODEL, None));
    assert_eq!(read(by_path, &["data.tokenizer=bytes"]).unwrap().data.tokenizer, DataSpec::BYTES);
    let error = read(LEAST, &["data.tokenizer=model"]).unwrap_err().to_string();
    assert!(error.contains("model.name has no tokenizer"), "{error}");
    check_error(&["model.weights=old"], "`model.weights`: is `old`, expected `model` or `new`");
}

#[test]
fn an_unknown_key_names_the_nearest() {
    check_error(&["train.step=3"], "unknown key `train.step`, did you mean `train.steps`?");
    check_error(&["train.learning_rate=3"], "unknown key `train.learning_rate`");
    check_error(&["train.microbatches=3"], "unknown key `train.microbatches`, did you mean `train.micro_batches`?");
    check_error(&["train.seq_len=3"], "unknown key `train.seq_len`, did you mean `data.seq_len`?");
    check_error(&["trian.steps=3"], "unknown key `trian`, did you mean `train`?");
    check_error(&["zebra.quux=3"], "unknown key `zebra`");
}

#[test]
fn a_value_of_the_wrong_type_says_what_came_and_what_is_expected() {
    check_error(&["train.steps=ten"], "`train.steps`: is the string \"ten\", expected a whole number of at least 0");
    check_error(&["train.steps=-1"], "`train.steps`: is -1, expected a whole number of at least 0");
    check_error(&["train.batch=5000000000"], "`train.batch`: is 5000000000, expected a smaller number");
    let beyond_toml = "99999999999999999999";
    check_error(
        &[&format!("train.steps={beyond_toml}")],
        &format!("`train.steps`: is {beyond_toml}, expected a smaller number"),
    );
    check_error(&["train.steps=1e3"], "`train.steps`: is 1000.0, expected a whole number of at least 0");
    check_error(&["train.lr=\"x\""], "`train.lr`: is the string \"x\", expected a number");
    check_error(&["train.betas=[1]"], "`train.betas`: is a list of 1, expected two numbers, such as [0.9, 0.95]");
    check_error(&["data.private=1"], "`data.private`: is 1, expected true or false");
    check_error(
        &["data.path=[]"],
        "`data.path`: is a list of 0, expected the path of a file or folder, or a list of paths",
    );
    check_error(&["name=3"], "`name`: is 3, expected a string");
    check_error(
        &["train.schedule=step"],
        "`train.schedule`: is `step`, expected `cosine` or `linear` or `inverse_sqrt` or `constant`",
    );
    check_error(&["train.precision=fp8"], "`train.precision`: is `fp8`, expected `f32` or `tf32` or `bf16`");
}

#[test]
fn a_value_out_of_range_says_what_would_be_right() {
    check_error(
        &["train.batch=10"],
        "`train.batch`: is 10, expected a multiple of train.micro_batches = 4, such as 8 or 12",
    );
    check_error(&["train.batch=3"], "`train.batch`: is 3, expected a multiple of train.micro_batches = 4, such as 4");
    check_error(&["train.steps=0"], "`train.steps`: is 0, expected at least 1");
    check_error(&["train.lr=0"], "`train.lr`: is 0, expected above 0");
    check_error(&["train.lr=nan"], "`train.lr`: is NaN, expected above 0");
    check_error(&["train.betas=[0.9, 1.0]"], "`train.betas`: is 1, expected at least 0 and below 1");
    check_error(&["train.clip=-1"], "`train.clip`: is -1, expected at least 0 (0 turns clipping off)");
    check_error(
        &["train.steps=10", "train.warmup=20"],
        "`train.warmup`: is 20, more than train.steps = 10: set train.warmup=10 or less, too",
    );
    check_error(&["data.eval_fraction=0.6"], "`data.eval_fraction`: is 0.6, expected above 0 and at most 0.5");
    check_error(&["data.seq_len=1"], "`data.seq_len`: is 1, expected at least 2");
    check_error(
        &["data.rows=chat"],
        "`data.rows`: is `chat`, but data.format = \"text\" has no rows: expected `jsonl` or `parquet`",
    );
    check_error(
        &["data.rows=chat", "data.format=jsonl"],
        "`data.chat_template`: is missing: the tokenizer `bytes` has no chat template, expected the path of a Jinja file",
    );
    let chat = ["data.rows=chat", "data.format=parquet", "data.chat_template=x"];
    read(LEAST, &chat).unwrap();
    check_error(
        &[&chat[..], &["data.column=chats"]].concat(),
        "`data.column`: is `chats`, but conversations have keys of their own: leave it out",
    );
    check_error(&["data.chat_template=x"], "`data.chat_template`: is given, but data.rows is not `chat`");
    check_error(&["data.order=random"], "`data.order`: is `random`, expected `drawn` or `shuffled` or `sequential`");
    check_error(&["model.n_head=7"], "`model.n_head`: is 7, expected a divisor of model.n_embd = 768");
    check_error(&["model.n_head=0"], "`model.n_head`: is 0, expected at least 1");
    check_error(&["model.n_positions=64"], "`model.n_positions`: is 64, expected at least data.seq_len = 128");
    check_error(&["model.vocab_size=9"], "`model.vocab_size`: is 9, expected at least 256 for the tokenizer `bytes`");
    check_error(
        &["model.name=gpt3"],
        "`model.name`: is `gpt3`, expected one of `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `llama-3.2-1b`, \
         `llama-3.1-8b`, `mistral-7b`, `qwen2.5-0.5b`, `qwen2.5-7b`, `qwen3-0.6b`, `resnet18`, `resnet50`, \
         `resnet101`",
    );
    check_error(&["model.path=x"], "`model.path`: is given beside model.name, expected exactly one of them");
    check_error(&["name=a/b"], "`name`: is \"a/b\", expected a plain name without path separators");
    check_error(&["placement.compnodes=0"], "`placement.compnodes`: is 0, expected at least 1");
}

#[test]
fn a_name_can_be_a_directorys() {
    let named = |name: &str| {
        let spec = JobSpec { name: name.to_owned(), ..read(LEAST, &[]).unwrap() };
        spec.validate().map_err(|e| e.to_string())
    };
    for name in ["run", "a b", "GPT-2 (täglich) №3", "模型", &"x".repeat(64), "résumé..2"] {
        named(name).unwrap();
    }
    for (name, expected) in [
        ("", "is \"\", expected a name with a visible character, and no dot in front"),
        (" ", "is \" \", expected a name with a visible character, and no dot in front"),
        ("\u{a0}\t", "is \"\\u{a0}\\t\", expected a name with a visible character, and no dot in front"),
        (".", "is \".\", expected a name with a visible character, and no dot in front"),
        ("..", "is \"..\", expected a name with a visible character, and no dot in front"),
        (".hidden", "is \".hidden\", expected a name with a visible character, and no dot in front"),
        ("a\\b", "is \"a\\\\b\", expected a plain name without path separators"),
        ("../b", "is \"../b\", expected a plain name without path separators"),
        ("a ", "is \"a \", expected a name without blanks at its ends"),
        ("a\nb", "is \"a\\nb\", expected visible characters only"),
        ("a\u{1b}[2J", "is \"a\\u{1b}[2J\", expected visible characters only"),
        ("a\0", "is \"a\\0\", expected visible characters only"),
        ("a\u{202e}b", "is \"a\\u{202e}b\", expected visible characters only"),
        (&"x".repeat(300), "has 300 characters (300 bytes in UTF-8), expected at most 64 characters and 192 bytes"),
        (&"😀".repeat(60), "has 60 characters (240 bytes in UTF-8), expected at most 64 characters and 192 bytes"),
    ] {
        assert_eq!(named(name).unwrap_err(), format!("`name`: {expected}"));
    }
}

#[test]
fn other_strings_can_be_shown_and_asked_for() {
    for key in ["data.path", "data.tokenizer", "placement.cluster", "checkpoint.to"] {
        let reason = format!("`{key}`: is \"a\\0b\", expected a path without the character NUL");
        check_error(&[&format!("{key}=\"a\\u0000b\"")], &reason);
        let long = "x".repeat(5000);
        check_error(&[&format!("{key}={long}")], &format!("`{key}`: has 5000 bytes, expected a path of at most 4096"));
    }
    for owner in ["", " ", "a\\u001b[2J"] {
        let error = read(LEAST, &[&format!("data.owner=\"{owner}\"")]).unwrap_err().to_string();
        assert!(error.contains("`data.owner`") && error.contains("expected the name of a CompNode"), "{error}");
    }
}

#[test]
fn sizes_that_no_machine_has_are_refused_at_once() {
    check_error(&["model.n_layer=100000"], "`model.n_layer`: is 100000, expected at most 4096");
    check_error(&["model.n_positions=100000000"], "`model.n_positions`: is 100000000, expected at most 16777216");
    check_error(&["data.seq_len=100000000"], "`data.seq_len`: is 100000000, expected at most 16777216");
    check_error(&["train.steps=2000000000000"], "`train.steps`: is 2000000000000, expected at most 1000000000000");
    check_error(&["train.batch=4000000000"], "`train.batch`: is 4000000000, expected at most 16777216");
    check_error(&["train.micro_batches=100000"], "`train.micro_batches`: is 100000, expected at most 65536");
    check_error(&["train.eval_batches=4000000000"], "`train.eval_batches`: is 4000000000, expected at most 65536");
    check_error(&["placement.compnodes=4000000000"], "`placement.compnodes`: is 4000000000, expected at most 2048");
}

/// Rates are computed with in f32, where 1e39 is infinite, 1e-300 is nothing, and 0.99999999999 is 1.
#[test]
fn numbers_that_f32_does_not_hold_are_refused() {
    let expected = "expected a number that f32 holds: 1.2e-38 to 3.4e38";
    for key in ["train.lr", "train.epsilon", "train.weight_decay", "train.clip"] {
        for value in [1e39, 1e-60] {
            check_error(&[&format!("{key}={value:e}")], &format!("`{key}`: is {value:e}, {expected}"));
        }
        for value in ["nan", "inf", "-inf", "-1"] {
            assert!(read(LEAST, &[&format!("{key}={value}")]).is_err(), "{key}={value}");
        }
    }
    read(LEAST, &["train.lr=1e-30", "train.clip=0", "train.weight_decay=0"]).unwrap();
    for set in ["train.betas=[0.9, 0.99999999999]", "train.momentum=0.99999999999", "model.dropout=0.99999999999"] {
        assert!(read(LEAST, &[set]).unwrap_err().to_string().ends_with("expected at least 0 and below 1"), "{set}");
    }
    for value in ["nan", "inf", "-inf", "-1"] {
        for key in [
            "model.dropout",
            "data.eval_fraction",
            "train.min_lr_ratio",
            "train.momentum",
            "compression.ratio",
            "compression.error_budget",
        ] {
            assert!(read(LEAST, &[&format!("{key}={value}")]).is_err(), "{key}={value}");
        }
        assert!(read(LEAST, &[&format!("train.betas=[0.9, {value}]")]).is_err(), "{value}");
    }
}

#[test]
fn compression_is_read_and_becomes_what_the_planner_takes() {
    use fusionllm_codec::{Codec, TopKValues};
    use fusionllm_planner::Compression;
    let spec = read(LEAST, &[]).unwrap();
    assert_eq!((spec.compression(), spec.codec()), (Compression::Adaptive { ratio: 16.0 }, Codec::Dense));
    let ada = ["compression.policy=ada-topk", "compression.ratio=50", "compression.topk_values=int8"];
    let values = TopKValues::Int8;
    assert_eq!(read(LEAST, &ada).unwrap().compression(), Compression::AdaTopk { ratio: 50.0, values, literal: false });
    let fixed = ["compression.policy=fixed", "compression.activations=int4", "compression.gradients=transform:1.5"];
    let spec = read(LEAST, &fixed).unwrap();
    let (activations, gradients) = (Codec::Int4, "transform:1.5".parse().unwrap());
    assert_eq!(spec.compression(), Compression::Fixed { activations, gradients });
    // A checkpoint's manifest keeps the job as JSON, and a resume reads it as TOML.
    let text = toml::to_string(&spec).unwrap();
    assert_eq!(read(&text, &[]).unwrap(), spec);
    assert_eq!(crate::decode::<JobSpec>(&crate::encode(&spec).unwrap()).unwrap(), spec);
    check_error(&["compression.ratio=0.5"], "`compression.ratio`: is 0.5, expected at least 1 and at most 1000000");
    let error = read(LEAST, &["compression.gradients=int5"]).unwrap_err().to_string();
    assert!(error.contains("`compression.gradients`") && error.contains("int8"), "{error}");
}

#[test]
fn what_is_missing_is_named() {
    let error = |text| read(text, &[]).unwrap_err().to_string();
    assert_eq!(error(""), "`model.name`: is missing, expected model.name = \"gpt2\" or model.path");
    assert_eq!(
        error("[model]\nname = \"gpt2\""),
        "`data.path`: is missing, expected the path of a file or folder, or a list of paths"
    );
    assert!(error("[model\n").starts_with("not valid TOML: "), "{}", error("[model\n"));
    assert!(!error("[model\n").contains('\n'));
    assert_eq!(error("model = 3"), "`model`: is 3, expected a section: [model]");
}

#[test]
fn an_override_wins_over_the_file_and_may_lack_quotes() {
    let spec = read(LEAST, &["model.name=gpt2-xl", "train.steps=50", "name = big", "data.path=[\"x\"]"]).unwrap();
    assert_eq!((spec.model.name.as_deref(), spec.train.steps, spec.name.as_str()), (Some("gpt2-xl"), 50, "big"));
    check_error(&["steps=3"], "override `steps=3` is not of the form section.key=value");
    check_error(&["train.steps"], "override `train.steps` is not of the form section.key=value");
    check_error(&["a.b.c=1"], "override `a.b.c=1` is not of the form section.key=value");
}

#[test]
fn the_learning_rate_warms_up_and_decays_to_its_least() {
    let spec = read(LEAST, &["train.steps=100", "train.warmup=10", "train.lr=1.0"]).unwrap();
    let rates = crate::LearningRates::of(&spec.train.view());
    for (step, rate) in [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1)] {
        assert!((rates.at(step) - rate).abs() < 1e-12);
    }
    let constant = read(LEAST, &["train.schedule=constant", "train.lr=1.0"]).unwrap();
    assert!((crate::LearningRates::of(&constant.train.view()).at(999) - 1.0).abs() < 1e-12);
}

#[test]
fn snapshots_come_by_themselves_or_after_so_many_steps() {
    let every = |value: &str| {
        let text = format!("[model]\nname=\"gpt2\"\n[data]\npath=\"/x\"\n[survive]\nevery={value}");
        JobSpec::from_toml(&text, &[]).map(|spec| spec.survive.every)
    };
    assert_eq!(every("\"auto\"").unwrap(), None);
    assert_eq!(every("0").unwrap(), Some(0));
    assert_eq!(every("7").unwrap(), Some(7));
    for wrong in ["\"often\"", "true", "-1", "1.5"] {
        let error = every(wrong).unwrap_err().to_string();
        assert!(error.contains("survive.every") && error.contains("expected a whole number"), "{error}");
    }
}
