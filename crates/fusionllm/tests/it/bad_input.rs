//! Bad input: one line that says what would be right, exit code 2, nothing half-written.

use crate::process::{Bench, text};

/// Runs a command that must refuse its input in one line with all of `words`.
fn refuses(bench: &Bench, arguments: &str, words: &[&str]) {
    let output = bench.run(arguments);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "fusionllm {arguments}\n{}\n{err}", text(&output.stdout));
    assert_eq!(err.trim_end().lines().count(), 1, "more than a line:\n{err}");
    assert!(err.starts_with("error: "), "{err}");
    for word in words {
        assert!(err.contains(word), "fusionllm {arguments}: `{word}` is missing in {err}");
    }
    assert!(!bench.path("run").exists(), "fusionllm {arguments} left a run directory");
    assert!(!bench.path("runs").exists(), "fusionllm {arguments} left a run directory");
}

#[test]
fn jobs_that_cannot_run() {
    let bench = Bench::new();
    bench.write("short.txt", "too short");
    bench.write("not-toml.toml", "[model\n");
    for (set, words) in [
        ("train.step=5", &["`train.step`", "`train.steps`"] as &[&str]),
        ("trian.steps=5", &["unknown", "train"]),
        ("train.steps=many", &["train.steps", "\"many\""]),
        ("train.batch=5", &["train.batch", "micro_batches"]),
        ("data.path=none.txt", &["none.txt"]),
        ("data.path=short.txt", &["8 tokens", "needs 17"]),
        ("data.seq_len=1000000", &["seq_len"]),
        ("data.tokenizer=none.json", &["none.json"]),
        ("model.name=gpt9", &["gpt9", "gpt2-medium"]),
        ("model.n_head=3", &["n_head", "divisor"]),
        ("placement.strategy=fastest", &["fastest", "op-fence", "equal-compute"]),
        ("compression.policy=topk", &["topk", "ada-topk", "dense"]),
        ("compression.ratio=0.5", &["compression.ratio", "at least 1"]),
        ("compression.activations=topk:2:bf16", &["compression.activations"]),
        ("placement.cluster=none.toml", &["none.toml"]),
        ("placement.compnodes=500", &["500 CompNodes but only", "use at most"]),
        ("train.lr=-1", &["train.lr", "-1"]),
        ("nonsense", &["nonsense", "section.key=value"]),
    ] {
        refuses(&bench, &format!("train job.toml --out run --set {set}"), words);
    }
    refuses(&bench, "train none.toml", &["none.toml"]);
    refuses(&bench, "train not-toml.toml", &["not-toml.toml", "line 1"]);
    refuses(&bench, "train job.toml --compnodes 500 --out run", &["500 CompNodes but only"]);
    refuses(&bench, "train job.toml --device quantum --out run", &["quantum", "cpu"]);
    refuses(&bench, "plan job.toml --set train.batch=5", &["train.batch"]);
}

#[test]
fn graphs_that_do_not_fit() {
    let bench = Bench::new();
    bench.succeed("plan job.toml --write-graph graph.json");
    let graph = std::fs::read_to_string(bench.path("graph.json")).unwrap();
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    bench.write("job.toml", &job.replace(model, "path = \"broken.json\"\n"));
    for (from, to, words) in [
        ("\"wte\"", "\"wte2\"", &["wte"] as &[&str]),
        ("\"heads\": 2", "\"heads\": 3", &["h.0.attn"]),
        ("\"version\": 1", "\"version\": 99", &["version", "99"]),
    ] {
        assert!(graph.contains(from), "{from}");
        bench.write("broken.json", &graph.replacen(from, to, 1));
        refuses(&bench, "train job.toml --out run", words);
    }
}

#[test]
fn checkpoints_that_are_damaged() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out done --compnodes 2");
    let shard = "done/checkpoints/step-8/shard-1.safetensors";
    let whole = std::fs::read(bench.path(shard)).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for (bytes, words) in [
        (flipped, &["shard-1.safetensors", "damaged"] as &[&str]),
        (whole[..whole.len() - 4].to_vec(), &["shard-1.safetensors", "bytes"]),
    ] {
        std::fs::write(bench.path(shard), bytes).unwrap();
        for command in ["train --resume done --step 8", "export done hf", "generate done --prompt a"] {
            refuses(&bench, command, words);
        }
    }
    std::fs::remove_file(bench.path(shard)).unwrap();
    refuses(&bench, "train --resume done --step 8", &["shard-1.safetensors", "missing"]);
    // Where none is whole, the newest one is named.
    let older = bench.path("done/checkpoints/step-4/shard-0.safetensors");
    let bytes = std::fs::read(&older).unwrap();
    std::fs::remove_file(&older).unwrap();
    refuses(&bench, "train --resume done", &["step-8", "shard-1.safetensors", "missing"]);
    // An older one that is whole is gone on from, with a word.
    std::fs::write(&older, bytes).unwrap();
    let out = bench.succeed("train --resume done");
    assert!(out.contains("passed over") && out.contains("shard-1.safetensors is missing"), "{out}");
    refuses(&bench, "train --resume nowhere", &["nowhere", "no checkpoint"]);
    refuses(&bench, "train job.toml --out done", &["done", "--resume"]);
    assert!(!bench.path("hf").exists());
}

#[test]
fn commands_without_what_they_need() {
    let bench = Bench::new();
    refuses(&bench, "join", &["ticket"]);
    refuses(&bench, "join nonsense", &["fusionllm"]);
    refuses(&bench, "status", &["no broker's ticket", "--ticket"]);
    refuses(&bench, "submit job.toml --ticket fusionllmabc", &["cut off or mistyped"]);
    let output = bench.run("train");
    assert_eq!(output.status.code(), Some(2));
    let output = bench.run("--help");
    assert_eq!(output.status.code(), Some(0));
}

/// Whatever is read is not written to, by whichever name.
#[test]
fn an_output_is_never_an_input_nor_a_file_of_another_kind() {
    let bench = Bench::new();
    let link = "[[link]]\nfrom = \"*\"\nto = \"*\"\nlatency_ms = 10\nmbit_per_s = 8\n";
    bench.write("c.toml", &format!("[[device]]\nname = \"gpu\"\ncount = 2\nflop_per_s = 1e12\n{link}"));
    bench.succeed("plan job.toml --write-graph graph.json");
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    bench.write("by-path.toml", &job.replace(model, "path = \"graph.json\"\n"));
    bench.write("notes", "mine");
    bench.write("mine.svg", "<svg xmlns=\"http://www.w3.org/2000/svg\"/>");
    bench.write("mine.dot", "digraph mine { a -> b }");
    bench.write("mine.json", "{\"traceEvents\":[]}");
    bench.succeed("train job.toml --out trained --compnodes 1 --set train.steps=4");
    let checkpoint = bench.path("trained/checkpoints/step-4/manifest.json");
    let manifest = std::fs::read(&checkpoint).unwrap();
    std::fs::copy(&checkpoint, bench.path("manifest-copy")).unwrap();
    for name in [
        "trained/checkpoints/step-4/manifest.json",
        "trained/checkpoints/step-4/x",
        "trained/checkpoints/x",
        "trained/graph.json",
    ] {
        refuses(&bench, &format!("plan job.toml --write-graph {name}"), &[name, "among a run's own files"]);
    }
    refuses(&bench, "plan job.toml --write-graph manifest-copy", &["exists and is not an OP-DAG"]);
    assert_eq!(std::fs::read(&checkpoint).unwrap(), manifest);
    std::fs::hard_link(bench.path("graph.json"), bench.path("hard")).unwrap();
    std::os::unix::fs::symlink("graph.json", bench.path("soft")).unwrap();
    let inputs =
        ["job.toml", "by-path.toml", "c.toml", "text.txt", "graph.json", "notes", "mine.svg", "mine.dot", "mine.json"];
    let before = inputs.map(|name| std::fs::read(bench.path(name)).unwrap());
    for option in ["--svg", "--trace", "--write-graph", "--write-dot"] {
        for input in inputs.iter().filter(|input| (**input, option) != ("graph.json", "--write-graph")) {
            let words = [option, *input, "exists and is not"];
            refuses(&bench, &format!("plan job.toml --cluster c.toml {option} {input}"), &words);
        }
        refuses(&bench, &format!("plan job.toml --cluster c.toml {option} /dev/null"), &[option, "no regular file"]);
    }
    for name in ["graph.json", "hard", "soft"] {
        let words = [&format!("--write-graph {name}"), "would overwrite model.path", "graph.json"];
        refuses(&bench, &format!("plan by-path.toml --write-graph {name}"), &words);
    }
    refuses(&bench, "plan job.toml --cluster c.toml --svg x --trace x", &["--svg and --trace both name x"]);
    refuses(&bench, "plan job.toml job.toml --compare --cluster c.toml --write-dot x", &["--write-dot is for one job"]);
    assert_eq!(inputs.map(|name| std::fs::read(bench.path(name)).unwrap()), before);
    // Its own earlier work is replaced, where a link leads, too.
    std::os::unix::fs::symlink("g.json", bench.path("link")).unwrap();
    for _ in 0..2 {
        let files = "--svg a.svg --trace a.json --write-graph g.json --write-dot g.dot";
        bench.succeed(&format!("plan job.toml --cluster c.toml {files}"));
    }
    bench.write("g.json", "");
    bench.succeed("plan job.toml --write-graph link");
    assert!(bench.path("link").is_symlink());
    assert_eq!(std::fs::read(bench.path("g.json")).unwrap(), std::fs::read(bench.path("graph.json")).unwrap());
}

#[cfg(unix)]
#[test]
fn what_is_wrong_is_named_by_what_it_is() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    refuses(
        &bench,
        "train job.toml --set train.steps=\"9\"",
        &["`train.steps`: is the string \"9\", expected a whole number"],
    );
    std::fs::create_dir(bench.path("folder")).unwrap();
    refuses(&bench, "train job.toml --set data.tokenizer=folder", &["folder: no regular file"]);
    bench.write("empty.json", r#"{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}"#);
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    bench.write("sizes.toml", &job.replace("vocab_size = 256\n", ""));
    refuses(
        &bench,
        "train sizes.toml --set data.tokenizer=empty.json",
        &["empty.json has 0 entries, expected 1 to 2^31"],
    );
    refuses(&bench, "plan job.toml --write-graph none/", &["--write-graph none/ is a directory"]);
    let output = bench.command("train job.toml --out").arg(std::ffi::OsStr::from_bytes(b"bad\xff")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("is not UTF-8"));
}

/// Whatever is refused for what was given is 2: also what only the system knows to be wrong.
#[cfg(target_os = "linux")]
#[test]
fn folders_and_files_that_cannot_be_used_are_bad_input() {
    let bench = Bench::new();
    for line in [
        "train job.toml --out run --set checkpoint.to=/proc",
        "train job.toml --out run --set checkpoint.to=/proc/ck",
        "train job.toml --out /proc/run",
        "plan job.toml --write-graph /proc/x.json",
        "broker --bind 127.0.0.1:0 --state /proc/state",
    ] {
        refuses(&bench, line, &["/proc"]);
    }
    bench.succeed("train job.toml --out done --compnodes 1");
    for line in ["export done /proc/hf", "export done /proc"] {
        refuses(&bench, line, &["/proc"]);
    }
    // A folder in the place of a file of the run is put aside, but for what says which run it is; and one that is not as it
    // was written is refused.
    for (name, steps) in [("metrics.jsonl", 9), ("job.json", 10)] {
        let file = bench.path("done").join(name);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        bench.succeed(&format!("train --resume done --compnodes 1 --set train.steps={steps}"));
        assert!(file.is_file() && bench.path("done").join(format!("{name}.other")).is_dir(), "{name}");
    }
    let resume = "train --resume done --compnodes 1 --set train.steps=11";
    let (file, aside) = (bench.path("done/run.json"), bench.path("aside"));
    std::fs::rename(&file, &aside).unwrap();
    std::fs::create_dir(&file).unwrap();
    refuses(&bench, resume, &["run.json is damaged", "move it away"]);
    std::fs::remove_dir(&file).unwrap();
    std::fs::rename(&aside, &file).unwrap();
    let whole = std::fs::read_to_string(bench.path("done/run.json")).unwrap();
    bench.write("done/run.json", &whole.replacen("\"name\": \"small\"", "\"name\": 3", 1));
    refuses(&bench, resume, &["run.json is damaged", "`name` is 3, expected a string"]);
    bench.write("done/run.json", &whole);
    // The state of a broker that is not one.
    std::fs::create_dir(bench.path("state")).unwrap();
    std::fs::set_permissions(bench.path("state"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    bench.write("state/broker.redb", "not a store");
    let own = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(bench.path("state/broker.redb"), own).unwrap();
    refuses(&bench, "broker --bind 127.0.0.1:0 --state state", &["broker.redb", "it may be damaged"]);
    bench.succeed(resume);
}
