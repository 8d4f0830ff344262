//! A folder belongs to one run: shared folders, locks, abandoned futures, damage, full disks.

use std::path::Path;

use serde_json::Value;

use crate::copy::copy_fixture;
#[cfg(target_os = "linux")]
use crate::disk::Disk;
#[cfg(unix)]
use crate::process::wait_until;
use crate::process::{Bench, json_lines, losses, text};

/// Names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn manifest(checkpoint: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(checkpoint.join("manifest.json")).unwrap()).unwrap()
}

fn run_id(run: &Path) -> String {
    let file: Value = serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap();
    file["run"].as_str().unwrap().to_owned()
}

/// The weights that `export` takes from there.
fn exported(bench: &Bench, what: &str) -> Vec<u8> {
    let out = format!("hf-{}", what.replace('/', "-"));
    bench.succeed(&format!("export {what} {out}"));
    std::fs::read(bench.path(&out).join("model.safetensors")).unwrap()
}

fn fails(bench: &Bench, arguments: &str, words: &[&str]) {
    let output = bench.run(arguments);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}\n{err}");
    assert!(words.iter().all(|word| err.contains(word)), "{arguments}\n{err}");
}

/// A small run on one CompNode.
fn train(bench: &Bench, keys: &str) -> String {
    bench.succeed(&format!("train job.toml --compnodes 1 {keys}"))
}

#[test]
fn two_runs_share_a_folder_for_checkpoints() {
    let bench = Bench::new();
    let keep = "--set checkpoint.to=vol/ck --set checkpoint.keep=1 --set checkpoint.every=2";
    train(&bench, &format!("--out b {keep} --set train.seed=2"));
    let out = train(&bench, &format!("--out a {keep} --set train.steps=4 --set name=a"));
    assert!(out.contains("note: checkpoint.to =") && out.contains("is used by others"), "{out}");
    assert_ne!(run_id(&bench.path("a")), run_id(&bench.path("b")));
    let own = format!("vol/ck/a-{}", &run_id(&bench.path("a"))[..8]);
    assert_eq!(names(&bench.path(&own)), ["fusionllm.lock", "step-4"]);
    assert_eq!(manifest(&bench.path("vol/ck/step-8"))["job"]["train"]["seed"], 2);
    assert_eq!(exported(&bench, "a"), exported(&bench, &format!("{own}/step-4")));
    assert_eq!(exported(&bench, "b"), exported(&bench, "vol/ck/step-8"));
    fails(&bench, "export vol/ck hf", &["several runs", "step-8", "step-4"]);

    // The one goes on in its own directory, from its own checkpoint, and leaves the other's alone.
    bench.succeed("train --resume a --set train.steps=6");
    assert_eq!(losses(&bench.path("a")).len(), 6);
    assert_eq!(names(&bench.path(&own)), ["fusionllm.lock", "step-6"]);
    assert!(!bench.path("vol/job.json").exists() && !bench.path("vol/ck/job.json").exists());
    // So it does by a checkpoint that lies elsewhere.
    let out = bench.succeed(&format!("train --resume {own}/step-6 --set train.steps=7"));
    assert!(out.contains(&format!("going on in {} after step 6", bench.path("a").display())), "{out}");
    assert_eq!(losses(&bench.path("a")).len(), 7);
    assert_eq!(manifest(&bench.path("vol/ck/step-8"))["job"]["train"]["seed"], 2);
}

#[test]
fn what_others_keep_in_the_folder_stays() {
    let bench = Bench::new();
    let others = ["step-1/x", "step-2/x", "step-4/x", "step-4.partial-1/x", "step-8/manifest.json"];
    for other in others.map(|other| bench.path("vol").join(other)) {
        std::fs::create_dir_all(other.parent().unwrap()).unwrap();
        std::fs::write(other, "mine").unwrap();
    }
    let out = train(&bench, "--out run --set checkpoint.to=vol --set checkpoint.keep=1");
    assert!(out.contains("is not of this run"), "{out}");
    for other in others.map(|other| bench.path("vol").join(other)) {
        assert_eq!(std::fs::read(other).unwrap(), b"mine");
    }
    let own = bench.path(&format!("vol/small-{}", &run_id(&bench.path("run"))[..8]));
    assert_eq!(names(&own), ["fusionllm.lock", "step-8"]);
    exported(&bench, "run");
}

#[test]
fn an_abandoned_future_is_not_taken_up_again() {
    let bench = Bench::new();
    train(&bench, "--out run --set checkpoint.keep=0");
    let before = exported(&bench, "run");
    let out = bench.succeed("train --resume run/checkpoints/step-4 --set train.steps=6 --set train.lr=5e-2");
    assert!(out.contains("note: the run goes on from step 4") && out.contains("step-8.abandoned"), "{out}");
    assert_eq!(names(&bench.path("run/checkpoints")), ["step-4", "step-6", "step-8.abandoned"]);
    assert_eq!(losses(&bench.path("run")).len(), 6);
    assert_eq!(json_lines(&bench.path("run/metrics.after-4.jsonl")).len(), 4);
    let newest = exported(&bench, "run");
    assert_eq!(newest, exported(&bench, "run/checkpoints/step-6"));
    assert_ne!(newest, before);
    assert_eq!(before, exported(&bench, "run/checkpoints/step-8.abandoned"));
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    assert!(report.contains("## Notices") && report.contains("step-8.abandoned"), "{report}");
    fails(&bench, "train --resume run", &["6 of train.steps = 6 are done"]);
    bench.succeed("train --resume run --set train.steps=7");
    fails(&bench, "train --resume run/checkpoints/step-8.abandoned --set train.steps=9", &["--out DIR"]);
}

#[test]
fn a_directory_in_use_is_refused_by_name() {
    let bench = Bench::new();
    train(&bench, "--out run");
    let mut first =
        bench.start("train --resume run --compnodes 1 --json --set train.steps=100000 --set checkpoint.keep=0");
    first.wait_for("\"event\":\"step\"");
    let holder = format!("process {}", first.id());
    // However many steps it has done meanwhile.
    let on = "train --resume run --compnodes 1 --set train.steps=1000000";
    fails(&bench, on, &["run", "is in use by run", &holder]);
    fails(&bench, "train job.toml --out run", &["run holds a run already", "go on with it by --resume"]);
    // The operating system lets go of what a killed process held.
    first.signal("KILL");
    let _ = first.finish();
    bench.succeed("train --resume run --compnodes 1 --step 8 --set train.steps=9");
    let steps: Vec<u64> =
        json_lines(&bench.path("run/metrics.jsonl")).iter().map(|m| m["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=9).collect::<Vec<_>>());
}

/// Whoever did as told would remove somebody's results.
#[test]
fn a_folder_that_is_no_run_is_not_called_one() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("results")).unwrap();
    bench.write("results/metrics.jsonl", "{\"accuracy\": 0.9}\n");
    let output = bench.run("train job.toml --out results");
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(2) && err.contains("results exists and is not empty"), "{err}");
    assert!(!err.contains("run already") && !err.contains("remove"), "{err}");
}

#[test]
fn a_run_goes_on_past_a_damaged_checkpoint() {
    let bench = Bench::new();
    train(&bench, "--out run");
    let whole = losses(&bench.path("run"));
    let shard = bench.path("run/checkpoints/step-8/shard-0.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    fails(&bench, "export run hf", &["shard-0.safetensors", "damaged", "that of step 4"]);
    fails(&bench, "train --resume run --step 8", &["shard-0.safetensors", "damaged"]);
    fails(&bench, "train --resume run --step 5", &["no checkpoint of step 5", "step-8, step-4"]);
    let out = bench.succeed("train --resume run");
    assert!(out.contains("note: a newer checkpoint than that of step 4 is passed over"), "{out}");
    assert!(out.contains("shard-0.safetensors"), "{out}");
    for (a, b) in losses(&bench.path("run")).iter().zip(&whole) {
        assert!((a - b).abs() <= 1e-5 * b);
    }
    assert_eq!(losses(&bench.path("run")).len(), 8);
    exported(&bench, "run");
    // A manifest that is whole, but another one.
    let path = bench.path("run/checkpoints/step-8/manifest.json");
    std::fs::copy(bench.path("run/checkpoints/step-4/manifest.json"), path).unwrap();
    fails(&bench, "export run hf", &["manifest.json has hash"]);
}

/// Written by version 0.1.0; `/fixture` stands for the folder.
fn old_runs(bench: &Bench) {
    let folder = bench.path("");
    copy_fixture("runs-v1", &folder, Some(folder.to_str().unwrap().trim_end_matches('/')));
}

#[test]
fn runs_of_the_first_version_are_read_and_go_on() {
    let bench = Bench::new();
    old_runs(&bench);
    for run in ["run", "elsewhere"] {
        exported(&bench, run);
        let before = losses(&bench.path(run));
        bench.succeed(&format!("train --resume {run} --set train.steps=6"));
        let after = losses(&bench.path(run));
        assert_eq!((after.len(), &after[..4]), (6, &before[..]), "{run}");
        assert_eq!(run_id(&bench.path(run)).len(), 32);
        bench.succeed(&format!("train --resume {run} --step 2 --set train.steps=6"));
        let again = losses(&bench.path(run));
        // The rate of step 4 goes by the number of steps.
        assert!(again.iter().zip(&after).take(3).all(|(a, b)| (a - b).abs() <= 1e-5 * b), "{again:?} {after:?}");
    }
    assert!(bench.path("volume/step-2/manifest.json").is_file());
}

/// A broker and one CompNode; a job that is resumed from a step, with another rate.
#[test]
fn a_brokers_job_goes_on_from_a_step_with_other_keys() {
    let bench = Bench::new();
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json --show-ticket");
    let line: Value = serde_json::from_str(&broker.wait_for("ticket")).unwrap();
    let _node = bench
        .start(&format!("join {} --name n --bind 127.0.0.1:0 --device cpu --data .", line["ticket"].as_str().unwrap()));
    let mut follow =
        bench.start("submit job.toml --state state --follow --json --set train.steps=100000 --set checkpoint.keep=0");
    follow.wait_for("\"step\":8,\"path\"");
    bench.succeed("stop 1 --state state");
    let _ = follow.finish();
    let refused = |arguments: &str, words: &str| {
        let output = bench.run(arguments);
        let err = text(&output.stderr);
        assert!(output.status.code() == Some(2) && err.contains(words), "{arguments}: {err}");
    };
    refused("resume 1 --state state --set model.n_layer=3", "--set model.n_layer");
    refused("resume 1 --state state --set data.path=text.txt", "give an absolute one");
    refused("resume 1 --state state --step 3", "no checkpoint of step 3");
    let out = bench.succeed("resume 1 --state state --follow --step 4 --set train.steps=12 --set train.lr=1e-4");
    assert!(out.contains("step 12/12") && out.contains("note: the run goes on from step 4"), "{out}");
    let run = names(&bench.path("runs")).remove(0);
    let metrics = json_lines(&bench.path("runs").join(run).join("metrics.jsonl"));
    assert_eq!(metrics.len(), 12);
    assert!(metrics[11]["lr"].as_f64().unwrap() <= 1e-4);
    broker.signal("INT");
    assert_eq!(broker.finish().0, Some(0));
}

/// The last checkpoint cannot be left out: what is there, and how to go on from it, is said.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_stays_full_is_told_once_and_ends_with_the_way_on() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("disk"), 700) else { return };
    // All are kept, so the disk is full of them after a few, and stays so.
    let run = bench.start(
        "train job.toml --out disk/run --compnodes 1 --json --set train.steps=150 --set checkpoint.every=1 \
         --set train.eval_every=0 --set checkpoint.keep=0",
    );
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(1), "{out}\n{err}");
    let notices: Vec<&str> = out.lines().filter(|line| line.contains("\"event\":\"notice\"")).collect();
    // Of each kind the first, the tenth and the hundredth, and at the end how many.
    assert!(notices.len() <= 24, "{} notices:\n{}", notices.len(), notices.join("\n"));
    // What was logged of it is of few kinds, too, and the error is one line.
    let kinds: std::collections::BTreeSet<String> = err
        .lines()
        .filter(|line| !line.starts_with("error: "))
        .map(|line| line.replace(|c: char| c.is_ascii_digit(), ""))
        .collect();
    assert!(kinds.len() <= 3 && err.lines().filter(|line| line.starts_with("error: ")).count() == 1, "{err}");
    // But for the folder of the test.
    let said = format!("{out}\n{err}").replace(bench.path("").to_str().unwrap(), "");
    assert!(!said.contains(".tmp"), "{said}");
    let checkpoints = names(&disk.path().join("run/checkpoints"));
    let whole = checkpoints.iter().filter_map(|name| name.strip_prefix("step-")?.parse::<u64>().ok());
    let step = whole.max().unwrap();
    let hint = format!("train --resume {}/run` goes on from the checkpoint of step {step}", disk.path().display());
    assert!(err.contains("checkpoint of step 150: ") && err.contains(&hint), "{err}");
}

/// Shards that the disk has no room for: training goes on, and later checkpoints fit again.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_a_checkpoint_and_no_more() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("disk"), 4000) else { return };
    let mut run = bench.start(
        "train job.toml --out disk/run --compnodes 1 --json --set train.steps=1000000 --set checkpoint.every=200 \
         --set train.eval_every=0 --set checkpoint.keep=1",
    );
    run.wait_for("\"event\":\"step\"");
    // What fills the disk goes away while the run lasts.
    disk.fill();
    let line = run.wait_for("there is no checkpoint of step");
    let told = line.contains("\"event\":\"notice\"") && line.contains("No space left on device");
    disk.make_room();
    run.wait_for("\"event\":\"checkpoint\"");
    run.signal("INT");
    let (code, _, err) = run.finish();
    assert!(told, "{line}");
    assert_eq!(code, Some(1), "{err}");
    let left = names(&disk.path().join("run/checkpoints"));
    let newest = left.iter().filter_map(|name| name.strip_prefix("step-")?.parse::<u64>().ok()).max().unwrap();
    let steps = newest + 3;
    bench.succeed(&format!("train --resume disk/run --compnodes 1 --set train.steps={steps}"));
    // No line of the metrics was lost while there was no room.
    assert_eq!(json_lines(&disk.path().join("run/metrics.jsonl")).len() as u64, steps);
    assert_eq!(names(&disk.path().join("run/checkpoints")), [format!("step-{steps}")]);
}

#[test]
fn an_export_mixes_with_nothing() {
    let bench = Bench::new();
    train(&bench, "--out a");
    train(&bench, "--out b --set train.seed=2");
    bench.succeed("export a hf");
    let first = std::fs::read(bench.path("hf/model.safetensors")).unwrap();
    let out = bench.succeed("export a/checkpoints/step-8 hf");
    assert!(out.contains("wrote hf, in place of an earlier export of the same"), "{out}");
    fails(&bench, "export b hf", &["hf holds the export of run", "give another folder"]);
    assert_eq!(std::fs::read(bench.path("hf/model.safetensors")).unwrap(), first);
    // Another model's shards, a run, a checkpoint, the model itself, and what is no folder.
    std::fs::create_dir(bench.path("other")).unwrap();
    bench.write("other/model.safetensors.index.json", "{}");
    fails(&bench, "export a other", &["other holds `model.safetensors.index.json`"]);
    fails(&bench, "export a b", &["b holds `"]);
    fails(&bench, "export a b/checkpoints/step-8", &["step-8 holds `"]);
    fails(&bench, "export hf hf", &["would overwrite the model, hf"]);
    fails(&bench, "export a hf --tokenizer hf/tokenizer.json", &["would overwrite --tokenizer, hf/tokenizer.json"]);
    for path in ["/dev/null", "job.toml", "job.toml/below"] {
        fails(&bench, &format!("export a {path}"), &["is no folder"]);
    }
    assert_eq!(names(&bench.path("other")), ["model.safetensors.index.json"]);
    std::fs::create_dir(bench.path("empty")).unwrap();
    bench.succeed("export hf empty");
    assert!(!names(&bench.path("empty")).iter().any(|name| name.ends_with(".partial")));
}

/// What is written from then on is not lost, and is where the last line says.
#[cfg(unix)]
#[test]
fn a_run_directory_that_goes_away_while_it_trains_is_told_once_and_made_again() {
    for removed in [false, true] {
        let bench = Bench::new();
        let line = "train job.toml --out run --compnodes 1 --json --set train.steps=4000 --set train.eval_every=0 \
                    --set checkpoint.every=1000 --set checkpoint.keep=0";
        let mut run = bench.start(line);
        run.wait_for("\"step\":50,");
        // Steps are told as they come, and written by and by.
        let has_lines = || std::fs::metadata(bench.path("run/metrics.jsonl")).is_ok_and(|found| found.len() > 0);
        wait_until(has_lines, "metrics");
        match removed {
            true => std::fs::remove_dir_all(bench.path("run")).unwrap(),
            false => std::fs::rename(bench.path("run"), bench.path("moved")).unwrap(),
        }
        let told = run.wait_for("is not there any more, it was renamed or removed");
        assert!(told.contains("\"event\":\"notice\"") && told.contains("training goes on"), "{told}");
        let (code, out, err) = run.finish();
        assert_eq!(code, Some(0), "{out}\n{err}");
        assert!(!out.contains("\"event\":\"notice\""), "one notice is enough:\n{out}");
        let steps: Vec<u64> =
            json_lines(&bench.path("run/metrics.jsonl")).iter().map(|m| m["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=4000).collect::<Vec<_>>());
        let notices = std::fs::read_to_string(bench.path("run/notices.jsonl")).unwrap();
        assert!(notices.contains("it was renamed or removed"), "{notices}");
        let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
        assert!(report.contains("Every step is in") && report.contains("## Data"), "{report}");
        exported(&bench, "run");
        train_on(&bench, "run", 4001);
        if !removed {
            // It still is a run directory, and has become one of its own.
            let there = names(&bench.path("moved/checkpoints"));
            if there.iter().any(|name| name.starts_with("step-")) {
                let out = bench.succeed("train --resume moved --compnodes 1 --set train.steps=4001");
                assert!(out.contains("is a copy of"), "{out}");
            }
        }
    }
}

#[cfg(unix)]
fn train_on(bench: &Bench, run: &str, steps: u64) {
    bench.succeed(&format!("train --resume {run} --compnodes 1 --set train.steps={steps}"));
    assert_eq!(losses(&bench.path(run)).len() as u64, steps);
}

/// Files of a run that is at work, and its folder for checkpoints.
#[cfg(unix)]
#[test]
fn files_of_a_run_that_go_away_while_it_trains_are_written_again() {
    let bench = Bench::new();
    let line = "train job.toml --out run --compnodes 1 --json --set train.steps=4000 --set train.eval_every=0 \
                --set checkpoint.every=1000 --set checkpoint.keep=0 --set checkpoint.to=ck";
    let mut run = bench.start(line);
    run.wait_for("\"step\":50,");
    std::fs::remove_file(bench.path("run/metrics.jsonl")).unwrap();
    let told = run.wait_for("metrics.jsonl was renamed, removed or replaced");
    assert!(told.contains("it is written again"), "{told}");
    std::fs::rename(bench.path("ck"), bench.path("ck-before")).unwrap();
    let told = run.wait_for("is not there any more, it was renamed or removed");
    assert!(told.contains("/ck is not there"), "{told}");
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert_eq!(losses(&bench.path("run")).len(), 4000);
    assert!(bench.path("ck/step-4000/manifest.json").is_file(), "{:?}", names(&bench.path("ck")));
    exported(&bench, "run");
}

/// Another program's folder has come in the place: nothing is written into it.
#[cfg(unix)]
#[test]
fn what_comes_in_the_place_of_a_run_directory_stays_as_it_is() {
    let bench = Bench::new();
    let line = "train job.toml --out run --compnodes 1 --json --set train.steps=4000 --set train.eval_every=0 \
                --set checkpoint.every=1000";
    let mut run = bench.start(line);
    run.wait_for("\"step\":50,");
    std::fs::rename(bench.path("run"), bench.path("moved")).unwrap();
    std::fs::create_dir(bench.path("run")).unwrap();
    bench.write("run/metrics.jsonl", "mine");
    run.wait_for("is not there any more");
    let (code, out, err) = run.finish();
    // The last checkpoint goes to where the directory went.
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("run/metrics.jsonl is in the way") && out.contains("/moved now"), "{out}");
    assert!(bench.path("moved/checkpoints/step-4000/manifest.json").is_file());
    assert_eq!(std::fs::read(bench.path("run/metrics.jsonl")).unwrap(), b"mine");
    assert!(!bench.path("run/report.md").exists() && !bench.path("run/run.json").exists());
    assert_eq!(losses(&bench.path("moved")).len(), 4000);
}
