//! What goes wrong around a job: readers that leave, processes that die, queues that must outlive their broker.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Bench, text};

fn status(bench: &Bench) -> Value {
    serde_json::from_str(&bench.succeed("status --state state --json")).unwrap()
}

#[cfg(unix)]
#[test]
fn training_whose_output_nobody_reads_any_more_is_stopped_and_says_so() {
    let bench = Bench::new();
    let mut command = bench.command("train job.toml --out run --set train.steps=100000");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("standard output cannot be written"), "{err}");
}

/// A log on a full disk, or whose reader has gone, costs its lines and nothing else.
#[cfg(target_os = "linux")]
#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let bench = Bench::new();
    let code = |line: &str| {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = bench.command(line);
        command.env("FUSIONLLM_LOG", "info").stdin(Stdio::null()).stdout(Stdio::null()).stderr(full);
        command.status().unwrap().code()
    };
    assert_eq!(code("plan none.toml"), Some(2));
    assert_eq!(code("plan --unknown"), Some(2));
    assert_eq!(code("train job.toml --out run"), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn a_compnode_process_that_dies_before_training_ends_the_run() {
    let bench = Bench::new();
    let mut training = bench.start("train job.toml --out run --fresh-profile --set train.steps=100000");
    training.wait_for("starting");
    let parent = training.id().to_string();
    let deadline = Instant::now() + Duration::from_secs(60);
    let child = loop {
        assert!(Instant::now() < deadline, "no child");
        match bench.pids().into_iter().find(|pid| *pid != parent) {
            Some(child) => break child,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    assert!(Command::new("kill").args(["-KILL", &child]).status().unwrap().success());
    let (code, out, err) = training.finish();
    assert_eq!(code, Some(1), "{out}\n{err}");
    assert!(err.contains("compnode-0") && err.contains("signal: 9"), "{err}");
    assert_eq!(bench.processes(), 0, "orphans");
}

#[test]
fn an_owner_that_no_compnode_is_is_refused() {
    let bench = Bench::new();
    let output = bench.run("train job.toml --out run --compnodes 2 --set data.owner=offcie");
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("offcie") && err.contains("compnode-0 to compnode-1"), "{err}");
}

#[test]
fn jobs_that_wait_survive_a_killed_broker() {
    let bench = Bench::new();
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json --show-ticket");
    broker.wait_for("ticket");
    for _ in 0..2 {
        bench.succeed("submit job.toml --state state --set placement.compnodes=1");
    }
    broker.signal("KILL");
    broker.finish();
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json --show-ticket");
    let line: Value = serde_json::from_str(&broker.wait_for("ticket")).unwrap();
    let ticket = line["ticket"].as_str().unwrap().to_owned();
    let _node = bench.start(&format!("join {ticket} --name a --bind 127.0.0.1:0 --device cpu --data ."));
    let deadline = Instant::now() + crate::process::LIMIT;
    loop {
        let jobs = status(&bench)["jobs"].clone();
        let states: Vec<&str> =
            jobs.as_array().unwrap().iter().map(|j| j["state"]["state"].as_str().unwrap()).collect();
        if states == ["done", "done"] {
            break;
        }
        assert!(states.iter().all(|s| *s != "failed") && Instant::now() < deadline, "{jobs}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(broker);
}

/// Whatever cannot be opened for want of open files, the limit is to blame, and no folder and no checkpoint.
#[cfg(target_os = "linux")]
#[test]
fn too_many_open_files_are_named_as_such() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out run --compnodes 1");
    let mut seen = 0;
    for (line, limits) in [
        ("export run hf", 10..24),
        ("generate run --prompt a --tokens 1", 10..24),
        ("plan job.toml", 6..24),
        ("train --resume run --compnodes 1 --set train.steps=9", 12..40),
        ("train job.toml --compnodes 1 --out other", 12..40),
    ] {
        for limit in limits.step_by(if line.starts_with("train") { 3 } else { 1 }) {
            let output = bench.shell(&format!("ulimit -n {limit}; exec fusionllm {line}")).output().unwrap();
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            let _ = std::fs::remove_dir_all(bench.path("hf"));
            let _ = std::fs::remove_dir_all(bench.path("other"));
            if output.status.success() {
                break;
            }
            // With fewer still the system does not even load the program.
            if output.status.code() == Some(127) {
                continue;
            }
            seen += 1;
            let said = format!("{line} with {limit} open files: {out}\n{err}");
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(err.contains("Too many open files"), "{said}");
            for blamed in
                ["in the way", "not empty", "holds no checkpoint", "damaged", "passed over", "holds a run already"]
            {
                assert!(!err.contains(blamed) && !out.contains(blamed), "{said}");
            }
        }
    }
    assert!(seen > 3, "{seen}");
    // Nothing was harmed.
    bench.succeed("train --resume run --compnodes 1 --set train.steps=10");
}

/// A file that may not grow any more is as a full disk: a checkpoint is left out, and nothing dies by a signal.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_to_the_size_of_files_costs_what_does_not_fit_and_no_process() {
    let bench = Bench::new();
    let train = "train job.toml --compnodes 1 --set model.n_embd=192 --set model.n_head=4";
    // In blocks of 512 or 1024 bytes: less than a checkpoint, and more than the state of a broker.
    let output = bench.shell(&format!("ulimit -f 4000; exec fusionllm {train} --out run")).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{out}\n{err}");
    assert!(out.contains("note: there is no checkpoint of step 4"), "{out}");
    assert!(err.contains("File too large") && err.contains("`ulimit -f`"), "{err}");
    assert_eq!(crate::process::losses(&bench.path("run")).len(), 8, "{out}");
    let output = bench.shell("ulimit -f 1; exec fusionllm train job.toml --out none --compnodes 1").output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("File too large") && err.contains("`ulimit -f`"), "{err}");
}
