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
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json");
    broker.wait_for("ticket");
    for _ in 0..2 {
        bench.succeed("submit job.toml --state state --set placement.compnodes=1");
    }
    broker.signal("KILL");
    broker.finish();
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json");
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
