//! `train`, `plan`, `export` and `generate`.

use serde_json::Value;

use crate::process::{Bench, json_lines, losses, text};

#[test]
fn training_leaves_a_run_directory_with_all_its_parts() {
    let bench = Bench::new();
    let out = bench.succeed("train job.toml --out run");
    for words in ["unigram model", "evaluation loss", "bits per byte", "the model writes:", "run directory:"] {
        assert!(out.contains(words), "`{words}` is missing in\n{out}");
    }
    let run = bench.path("run");
    let metrics = json_lines(&run.join("metrics.jsonl"));
    assert_eq!(metrics.iter().map(|m| m["step"].as_u64().unwrap()).collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
    for line in &metrics {
        assert_eq!(line["tokens"], 64);
        assert!(line["loss"].as_f64().unwrap() > 0.0 && line["step_s"].as_f64().unwrap() > 0.0);
        assert_eq!(line["eval_loss"].is_f64(), line["step"].as_u64().unwrap() % 4 == 0);
        let links = line["links"].as_array().unwrap();
        assert!(links.iter().any(|l| l["from"] == "compnode-0" && l["to"] == "compnode-1"));
        assert!(links.iter().all(|l| l["bytes"].as_u64().unwrap() > 0 && l["codec"].is_string()));
    }
    assert!(losses(&run)[7] < losses(&run)[0]);
    let placement: Value = serde_json::from_slice(&std::fs::read(run.join("placement.json")).unwrap()).unwrap();
    assert_eq!(placement["stages"].as_array().unwrap().len(), 3);
    for step in ["step-4", "step-8"] {
        assert!(run.join("checkpoints").join(step).join("manifest.json").is_file());
    }
    assert!(placement["prediction"]["step_s"].as_f64().unwrap() > 0.0);
    assert!(out.contains("measured (median)") && out.contains("predicted"), "{out}");
    let trace: Value = serde_json::from_slice(&std::fs::read(run.join("trace.json")).unwrap()).unwrap();
    let names: Vec<&str> = trace["traceEvents"].as_array().unwrap().iter().filter_map(|e| e["name"].as_str()).collect();
    // Two micro-batches through three stages, measured and predicted.
    assert_eq!(names.iter().filter(|n| n.starts_with("FP")).count(), 12, "{names:?}");
    assert!(names.iter().filter(|n| n.starts_with("activation")).count() >= 8, "{names:?}");
    let report = std::fs::read_to_string(run.join("report.md")).unwrap();
    assert!(report.contains("## Links") && report.contains("loss-bytes.svg"), "{report}");
    let svg = std::fs::read_to_string(run.join("loss-bytes.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("polyline"), "{svg}");
    let leftovers: Vec<_> = std::fs::read_dir(run.join("checkpoints")).unwrap().flatten().collect();
    assert_eq!(leftovers.len(), 2, "{leftovers:?}");
}

#[test]
fn json_output_is_one_object_a_line() {
    let bench = Bench::new();
    let out = bench.succeed("train job.toml --out run --json --compnodes 1");
    let events: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps = events.iter().filter(|e| e["event"] == "step").count();
    assert_eq!(steps, 8);
    let last = events.last().unwrap();
    assert_eq!(last["event"], "done");
    assert!(last["report"]["eval_loss"].as_f64().unwrap() > 0.0 && last["sample"].is_string());
}

#[test]
fn a_resumed_run_has_the_losses_of_an_uninterrupted_one() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out run --compnodes 2");
    let whole = losses(&bench.path("run"));
    // As if the run had ended between the two checkpoints.
    std::fs::remove_dir_all(bench.path("run/checkpoints/step-8")).unwrap();
    bench.succeed("train --resume run --compnodes 3");
    let resumed = losses(&bench.path("run"));
    assert_eq!(resumed.len(), 8);
    for (a, b) in resumed.iter().zip(&whole) {
        assert!((a - b).abs() <= 1e-5 * b, "{resumed:?}\n{whole:?}");
    }
    let output = bench.run("train --resume run --set model.n_layer=2");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("model and data.seq_len cannot be changed"), "{}", text(&output.stderr));
    let output = bench.run("train --resume run");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("8 of train.steps = 8 are done"), "{}", text(&output.stderr));
}

/// CompNodes that are not neighbours have something to tell each other too: the gradient norm.
#[test]
fn four_compnodes_give_the_losses_of_one() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out four --compnodes 4");
    bench.succeed("train job.toml --out one --compnodes 1");
    for (a, b) in losses(&bench.path("four")).iter().zip(&losses(&bench.path("one"))) {
        assert!((a - b).abs() <= 1e-5 * b, "{a} {b}");
    }
}

#[test]
fn compressed_training_sends_less_and_resumes_where_it_was() {
    let bench = Bench::new();
    let keys = "--set compression.policy=fixed --set compression.activations=int8 \
                --set compression.gradients=topk:0.2:bf16 --set compression.error_feedback=true --compnodes 2";
    bench.succeed(&format!("train job.toml --out run {keys}"));
    let links = |line: &Value| -> Vec<(u64, u64, String)> {
        let links = line["links"].as_array().unwrap().iter();
        links
            .map(|l| (l["bytes"].as_u64().unwrap(), l["dense_bytes"].as_u64().unwrap(), l["codec"].to_string()))
            .collect()
    };
    let metrics = json_lines(&bench.path("run/metrics.jsonl"));
    for (bytes, dense, codec) in metrics.iter().flat_map(links) {
        // Messages are small, so their headers weigh; the tied table and the norm go as they are.
        assert!(bytes < dense, "{bytes} of {dense} by {codec}");
    }
    let codecs = format!("{:?}", links(&metrics[0]));
    assert!(codecs.contains("int8") && codecs.contains("topk:0.2:bf16"), "{codecs}");
    let whole = losses(&bench.path("run"));
    std::fs::remove_dir_all(bench.path("run/checkpoints/step-8")).unwrap();
    bench.succeed("train --resume run --compnodes 2");
    for (a, b) in losses(&bench.path("run")).iter().zip(&whole) {
        assert!((a - b).abs() <= 1e-5 * b, "what error feedback held back was lost: {a} {b}");
    }
}

#[test]
fn a_job_can_be_planned_by_a_cluster_file_instead_of_what_is_measured() {
    let bench = Bench::new();
    let device = "[[device]]\nname = \"gpu\"\ncount = 3\nflop_per_s = 1e12\n";
    let link = "[[link]]\nfrom = \"*\"\nto = \"*\"\nlatency_ms = 1\nmbit_per_s = 1\n";
    bench.write("slow.toml", &format!("{device}{link}"));
    let keys = "--set placement.cluster=slow.toml --set compression.policy=ada-topk --set compression.ratio=20";
    bench.succeed(&format!("train job.toml --out run {keys}"));
    let placement: Value = serde_json::from_slice(&std::fs::read(bench.path("run/placement.json")).unwrap()).unwrap();
    assert_eq!(placement["placement"]["compnodes"].as_array().unwrap().len(), 3);
    let edges = placement["placement"]["edges"].to_string();
    assert!(edges.contains("top-k"), "{edges}");
}

#[test]
fn a_graph_read_from_a_file_trains_the_same_way() {
    let bench = Bench::new();
    bench.succeed("plan job.toml --write-graph graph.json");
    bench.succeed("train job.toml --out named --compnodes 2");
    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    assert!(job.contains(model));
    bench.write("from-file.toml", &job.replace(model, "path = \"graph.json\"\n"));
    bench.succeed("train from-file.toml --out from-file --compnodes 2");
    assert_eq!(losses(&bench.path("named")), losses(&bench.path("from-file")));
}

#[test]
fn an_export_generates_what_its_checkpoint_does_and_can_be_trained_on() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out run");
    bench.succeed("export run hf");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(bench.path("hf").join(file).is_file(), "{file}");
    }
    let generate =
        |from: &str| bench.succeed(&format!("generate {from} --prompt machines --tokens 20 --temperature 0"));
    let from_run = generate("run");
    assert!(from_run.starts_with("machines") && from_run.len() > 20);
    assert_eq!(from_run, generate("hf"));

    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    let tuned = job.replace(model, "path = \"hf\"\n").replace("warmup = 2", "warmup = 0");
    bench.write("tune.toml", &tuned);
    bench.succeed("train tune.toml --out tuned --compnodes 2");
    assert!(losses(&bench.path("tuned"))[0] < losses(&bench.path("run"))[1], "it starts from trained weights");
}

#[test]
fn plan_shows_graph_and_placement() {
    let bench = Bench::new();
    let out = bench.succeed("plan job.toml --compnodes 2 --graph");
    for words in ["h.0.attn", "compnode-1", "boundary edges", "tied: transformer.wte.weight"] {
        assert!(out.contains(words), "`{words}` is missing in\n{out}");
    }
    // 7664 elements, of which the 4096 of the tied table lie on both.
    let column = |out: &str| -> u64 {
        let rows = out.lines().filter(|line| line.contains(" .. ") && !line.contains("from .. to"));
        rows.map(|row| row.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()).sum()
    };
    assert_eq!(column(&out), 7664 + 4096, "{out}");
    assert!(out.contains("one parameter of 4096 elements, counted in each of compnode-0, compnode-1"), "{out}");
    let out = bench.succeed("plan job.toml --compnodes 1");
    assert_eq!(column(&out), 7664, "{out}");
    let json: Value = serde_json::from_str(&bench.succeed("plan job.toml --json --set train.batch=8")).unwrap();
    assert_eq!(json["placement"]["compnodes"].as_array().unwrap().len(), 3);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_stops_the_job_and_leaves_no_process() {
    let bench = Bench::new();
    let mut training = bench.start("train job.toml --out run --set train.steps=100000 --json");
    training.wait_for("\"event\":\"step\"");
    assert_eq!(bench.processes(), 4);
    training.signal("INT");
    let (code, out, err) = training.finish();
    assert_eq!(code, Some(1), "{out}\n{err}");
    assert!(err.contains("the job was stopped after step") && err.contains("of 100000: "), "{err}");
    assert_eq!(bench.processes(), 0, "orphans");
    assert!(std::fs::read_to_string(bench.path("run/report.md")).unwrap().contains("stopped"));
}

/// The way on is a command that a shell takes, whatever the folder is called; the end of the terminal does as Ctrl-C.
#[cfg(target_os = "linux")]
#[test]
fn whoever_stops_training_is_told_how_it_goes_on() {
    let bench = Bench::new();
    let dir = "it's a run";
    let line = "train job.toml --compnodes 1 --set train.steps=100000 --set checkpoint.keep=0 --json --out";
    let mut command = bench.command(line);
    command.arg(dir);
    let mut training = crate::process::Running::spawn(command);
    training.wait_for("\"event\":\"checkpoint\"");
    training.signal("HUP");
    let (code, _, err) = training.finish();
    assert_eq!(code, Some(1), "{err}");
    let shown = err.split('`').nth(1).unwrap_or_default().to_owned();
    assert!(shown.starts_with("fusionllm train --resume "), "{err}");
    let more = format!("{shown} --compnodes 1 --step 4 --set train.steps=5");
    let output = bench.shell(&more).stdin(std::process::Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{more}\n{}", text(&output.stderr));

    let mut training = bench
        .start("train job.toml --compnodes 1 --set train.steps=100000 --set checkpoint.every=0 --json --out early");
    training.wait_for("\"event\":\"step\"");
    training.signal("TERM");
    let (code, _, err) = training.finish();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("there is no checkpoint yet to go on from; to train anew, remove "), "{err}");
}

/// Who starts it by `nohup` wants it to outlive the terminal.
#[cfg(target_os = "linux")]
#[test]
fn a_hangup_that_is_ignored_stays_so() {
    let bench = Bench::new();
    let line = "trap '' HUP; exec fusionllm train job.toml --compnodes 1 --set train.steps=100000 --json --out run";
    let mut training = crate::process::Running::spawn(bench.shell(line));
    let step =
        |line: String| serde_json::from_str::<serde_json::Value>(&line).unwrap()["metrics"]["step"].as_u64().unwrap();
    let before = step(training.wait_for("\"event\":\"step\""));
    training.signal("HUP");
    // Far more than what may have been on its way.
    while step(training.wait_for("\"event\":\"step\"")) < before + 500 {}
    // Ctrl-C still ends it.
    training.signal("INT");
    let (code, _, err) = training.finish();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("interrupted, the job was stopped after step"), "{err}");
}

/// What begins with another run's checkpoint and ends before its own first one begins again with that.
#[cfg(target_os = "linux")]
#[test]
fn a_new_run_without_a_checkpoint_names_the_one_that_it_began_with() {
    let bench = Bench::new();
    bench.succeed("train job.toml --compnodes 1 --out first --set checkpoint.keep=0");
    let line = "train --resume first --step 4 --compnodes 1 --set train.steps=100000 --set checkpoint.every=0 --json";
    for (out, words) in [
        ("--out second", "begins again with the one of step 4"),
        ("", "train --resume FOLDER/first --step 4` goes on from the checkpoint of step 4"),
    ] {
        let mut training = bench.start(&format!("{line} {out}"));
        training.wait_for("\"event\":\"step\"");
        training.signal("INT");
        let (code, _, err) = training.finish();
        let words = words.replace("FOLDER", bench.path("").to_str().unwrap().trim_end_matches('/'));
        assert!(code == Some(1) && err.contains(&words), "{err}");
        if !out.is_empty() {
            let shown = err.split('`').nth(1).unwrap().replace("--out DIR", "--out third --set train.steps=5");
            let output = bench.shell(&shown).stdin(std::process::Stdio::null()).output().unwrap();
            assert!(output.status.success(), "{shown}\n{}", text(&output.stderr));
        }
    }
}

#[test]
fn momentum_that_is_switched_off_is_left_out_and_that_is_said() {
    let bench = Bench::new();
    bench.succeed("train job.toml --compnodes 1 --out run --set train.optimizer=sgd --set train.momentum=0.9");
    let names = |step: u64| {
        let bytes = std::fs::read(bench.path(&format!("run/checkpoints/step-{step}/shard-0.safetensors"))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.names().into_iter().filter(|name| name.contains("momentum")).count()
    };
    assert!(names(8) > 0);
    let out = bench.succeed("train --resume run --compnodes 1 --set train.steps=10 --set train.momentum=0");
    assert!(out.contains("note: the checkpoint's momentum is left out"), "{out}");
    assert_eq!(names(10), 0);
}

/// Weights of a run that goes on do not pass over the disk of temporary files.
#[cfg(target_os = "linux")]
#[test]
fn weights_of_a_run_that_goes_on_stay_on_its_disk() {
    let bench = Bench::new();
    let Some(disk) = crate::disk::Disk::mount(bench.path("tmp"), 4 << 10) else { return };
    bench.succeed("train job.toml --compnodes 1 --out run --set model.n_embd=256 --set train.steps=2");
    let mut command = bench.command("train --resume run --compnodes 1 --set train.steps=3");
    let output = command.env("TMPDIR", disk.path()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    disk.fill();
    let mut command = bench.command("train --resume run --compnodes 1 --set train.steps=4");
    let err = text(&command.env("TMPDIR", disk.path()).output().unwrap().stderr);
    assert!(err.contains(disk.path().to_str().unwrap()) && err.contains("by TMPDIR"), "{err}");
    assert!(!err.contains("--state"), "{err}");
}

/// Four shards and the checkpoint come to one disk, on which each of them would fit.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_takes_each_shard_and_not_the_checkpoint_is_refused_before_training() {
    let bench = Bench::new();
    let Some(disk) = crate::disk::Disk::mount(bench.path("disk"), 200) else { return };
    let output = bench.run("train job.toml --compnodes 4 --out disk/run --set model.n_layer=2");
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("a checkpoint takes ") && err.contains("there is room for "), "{err}");
    assert!(!disk.path().join("run").exists());
}

#[test]
fn a_notice_is_printed_once() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("texts")).unwrap();
    std::fs::copy(bench.path("text.txt"), bench.path("texts/good.txt")).unwrap();
    std::fs::write(bench.path("texts/bad.txt"), [b'a', 0xe9]).unwrap();
    for json in ["", "--json"] {
        let line = format!("fusionllm train job.toml --out run{json} --compnodes 1 --set data.path=texts {json} 2>&1");
        let output = bench.shell(&line).stdin(std::process::Stdio::null()).output().unwrap();
        let out = text(&output.stdout);
        // What was found in the data is part of other objects, too.
        let notices = out.lines().filter(|line| line.contains("bad.txt") && !line.contains("\"notes\""));
        assert_eq!(notices.count(), 1, "{out}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_named() {
    let bench = Bench::new();
    for line in ["train job.toml --out run --compnodes 1", "plan job.toml"] {
        let output = bench.shell(&format!("fusionllm {line} > /dev/full")).output().unwrap();
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("standard output cannot be written: No space left"), "{err}");
    }
}

/// Kills the second CompNode that a training has started.
#[cfg(target_os = "linux")]
fn kill_a_child(bench: &Bench, training: &crate::process::Running) {
    let parent = training.id().to_string();
    let mut children: Vec<u32> = bench.pids().iter().filter(|p| **p != parent).map(|p| p.parse().unwrap()).collect();
    children.sort_unstable();
    let crash = std::process::Command::new("kill").args(["-KILL", &children[1].to_string()]).status().unwrap();
    assert!(crash.success());
}

/// The process is started again, the job goes on from its newest checkpoint, and its losses are those of a run of which
/// nothing was lost.
#[cfg(target_os = "linux")]
#[test]
fn training_goes_on_after_its_compnodes_were_killed() {
    let bench = Bench::new();
    let job = "train job.toml --set train.steps=300 --set train.batch=32 --set checkpoint.every=5 --set checkpoint.keep=0 \
               --set placement.strategy=equal-number --set compression.policy=dense --json";
    bench.succeed(&format!("{job} --out calm"));
    let mut training = bench.start(&format!("{job} --out run"));
    for _ in 0..2 {
        training.wait_for("\"event\":\"checkpoint\"");
        kill_a_child(&bench, &training);
        training.wait_for("goes on from the checkpoint of step");
    }
    let (code, out, err) = training.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    let (got, calm) = (losses(&bench.path("run")), losses(&bench.path("calm")));
    assert_eq!(got.len(), calm.len());
    // The same bits over the same cut; a process that comes back late finds the model cut anew.
    assert!(got.iter().zip(&calm).all(|(a, b)| (a - b).abs() < 1e-3 * b), "{got:?} against {calm:?}");
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    assert!(
        report.contains("vanished after step") && report.contains("goes on from the checkpoint of step"),
        "{report}"
    );
    assert_eq!(bench.processes(), 0, "orphans");
}

/// The program may be upgraded or removed while it trains.
#[cfg(target_os = "linux")]
#[test]
fn processes_are_started_again_by_the_program_that_runs() {
    let bench = Bench::new();
    let (program, built) = (bench.path("fl"), env!("CARGO_BIN_EXE_fusionllm"));
    std::fs::hard_link(built, &program).or_else(|_| std::fs::copy(built, &program).map(drop)).unwrap();
    let line = "exec ./fl train job.toml --out run --compnodes 2 --set train.steps=100000 --json";
    let mut training = crate::process::Running::spawn(bench.shell(line));
    training.wait_for("\"event\":\"checkpoint\"");
    std::fs::remove_file(&program).unwrap();
    kill_a_child(&bench, &training);
    training.wait_for("goes on from the checkpoint of step");
    crate::process::wait_until(|| bench.processes() == 3, "the process is started again");
    training.wait_for("\"event\":\"checkpoint\"");
    training.signal("INT");
    let (code, out, err) = training.finish();
    assert!(code == Some(1) && err.contains("interrupted"), "{out}\n{err}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_compnode_process_that_crashes_is_named_with_its_signal() {
    let bench = Bench::new();
    let job = "train job.toml --out run --set train.steps=100000 --set survive.enabled=false --json";
    let mut training = bench.start(job);
    training.wait_for("\"event\":\"step\"");
    kill_a_child(&bench, &training);
    let (code, out, err) = training.finish();
    assert_eq!(code, Some(1), "{out}\n{err}");
    assert!(err.contains("the process of compnode-1 ended (signal: 9") && err.contains("vanished after step"), "{err}");
    assert_eq!(bench.processes(), 0, "orphans");
}

#[cfg(target_os = "linux")]
#[test]
fn compnodes_end_when_their_parent_is_killed() {
    let bench = Bench::new();
    let mut training = bench.start("train job.toml --out run --set train.steps=100000 --json");
    training.wait_for("\"event\":\"step\"");
    training.signal("KILL");
    drop(training);
    let deadline = std::time::Instant::now() + crate::process::LIMIT;
    while bench.processes() > 0 {
        assert!(std::time::Instant::now() < deadline, "orphans");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
