//! A job outlives its CompNodes by the snapshots that they keep of each other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster::{broker, join, status, wait_until_done};
use crate::process::{Bench, Running, losses, wait_until};

/// Long enough for something to happen to it, with nothing at the broker to go back to.
const JOB: &str = "--set train.steps=500 --set train.batch=32 --set train.eval_every=0 --set checkpoint.every=0 \
                   --set survive.every=10";

/// Three CompNodes and a job at work on them that has snapshots.
struct Cluster {
    bench: Bench,
    broker: Option<Running>,
    ticket: String,
    nodes: Vec<(&'static str, Running)>,
}

impl Cluster {
    fn at_work(names: &[&'static str], sets: &str) -> Self {
        let bench = Bench::new();
        let (broker, ticket) = broker(&bench);
        let nodes = names.iter().map(|&name| (name, join(&bench, &ticket, name))).collect();
        bench.succeed(&format!("submit job.toml --state state {JOB} {sets}"));
        let cluster = Self { bench, broker: Some(broker), ticket, nodes };
        wait_until(|| cluster.step() > 25, "the job is under way");
        cluster
    }

    fn step(&self) -> u64 {
        status(&self.bench)["jobs"][0]["step"].as_u64().unwrap_or(0)
    }

    fn kill(&mut self, name: &str) {
        let at = self.nodes.iter().position(|(other, _)| *other == name).unwrap();
        self.nodes.remove(at).1.signal("KILL");
    }

    /// Waits until the job is done, whose steps must be there once each, with the losses of an undisturbed one: on other
    /// machines the model is cut anew, which changes the order of sums. Gives its notices.
    fn finish(&self, sets: &str) -> Vec<String> {
        let job = wait_until_done(&self.bench);
        let run = Path::new(job["run_dir"].as_str().unwrap());
        self.bench.succeed(&format!("train job.toml --out calm --compnodes 3 {JOB} {sets}"));
        let (got, calm) = (losses(run), losses(&self.bench.path("calm")));
        assert_eq!(got.len(), calm.len());
        assert!(got.iter().zip(&calm).all(|(a, b)| (a - b).abs() < 1e-4 * b), "{got:?}\n{calm:?}");
        let lines = std::fs::read_to_string(run.join("notices.jsonl")).unwrap();
        let text = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
        lines.lines().map(text).collect()
    }

    /// Snapshots that still lie anywhere.
    fn snapshots_left(&self) -> usize {
        snapshots_below(&self.bench.path(""), ".step-").len()
    }
}

/// Snapshots below a folder whose names have this in them.
fn snapshots_below(folder: &Path, part: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| match entry.path() {
        path if path.is_dir() => snapshots_below(&path, part),
        path => match path.to_string_lossy().contains(part) {
            true => vec![path],
            false => Vec::new(),
        },
    };
    entries.flat_map(of).collect()
}

#[test]
fn what_a_lost_machine_held_is_at_its_guardian() {
    let mut cluster = Cluster::at_work(&["a", "b", "c"], "");
    cluster.kill("b");
    let notices = cluster.finish("");
    let told: Vec<&String> = notices.iter().filter(|text| text.contains("`b` vanished")).collect();
    assert!(told.len() == 1 && told[0].contains("goes on from the snapshots of step"), "{notices:?}");
    // What it had on its own disk is given up when it is back.
    let _back = join(&cluster.bench, &cluster.ticket, "b");
    wait_until(|| cluster.snapshots_left() == 0, "what is not needed any more is gone");
}

/// What the owner of private data holds lies on its own disk and nowhere else; the others are guarded as ever.
#[test]
fn the_owner_of_private_data_survives_on_its_own_disk() {
    let private = "--set data.private=true --set data.private_seed=job";
    let mut cluster = Cluster::at_work(&["a", "b", "c"], private);
    let holders = |part: &str| {
        let kept = snapshots_below(&cluster.bench.path(""), part);
        kept.iter().filter_map(|path| Some(path.parent()?.file_name()?.to_str()?.to_owned())).collect::<BTreeSet<_>>()
    };
    wait_until(|| holders(".part-1.").len() == 2, "another's part has a guardian");
    assert_eq!(holders(".part-0."), BTreeSet::from(["a".to_owned()]));
    cluster.kill("b");
    let step = cluster.step();
    wait_until(|| cluster.step() > step + 30, "the job goes on without it");
    cluster.kill("a");
    let back = join(&cluster.bench, &cluster.ticket, "a");
    cluster.nodes.push(("a", back));
    let notices = cluster.finish(private);
    for name in ["`a` vanished", "`b` vanished"] {
        let told = |text: &&String| text.contains(name) && text.contains("goes on from the snapshots of step");
        assert_eq!(notices.iter().filter(told).count(), 1, "{name}: {notices:?}");
    }
}

#[test]
fn a_machine_that_leaves_hands_its_work_over_and_nothing_is_done_again() {
    let mut cluster = Cluster::at_work(&["a", "b", "c"], "");
    let out = cluster.bench.succeed("drain c --state state");
    assert!(out.contains("`c` has left"), "{out}");
    let (_, left) = cluster.nodes.pop().unwrap();
    assert_eq!(left.finish().0, Some(0));
    // A person at the machine, or a provider that wants it back.
    let step = cluster.step();
    wait_until(|| cluster.step() > step, "the job is at work again");
    let (_, left) = cluster.nodes.pop().unwrap();
    left.signal("TERM");
    let (code, _, err) = left.finish();
    assert!(code == Some(0) && err.contains("the work has moved away"), "{err}");
    let notices = cluster.finish("");
    let moves: Vec<&String> = notices.iter().filter(|text| text.contains(" leaves; ")).collect();
    assert!(moves.len() == 2 && moves.iter().all(|text| !text.contains("done again")), "{notices:?}");
}

/// Where all its CompNodes are still at work it takes the job back as it is; here one dies with it.
#[test]
fn a_restarted_broker_goes_on_from_what_the_compnodes_kept() {
    let mut cluster = Cluster::at_work(&["a", "b"], "");
    cluster.broker.take().unwrap().signal("KILL");
    cluster.kill("b");
    let known: fusionllm::transport::Ticket = cluster.ticket.parse().unwrap();
    let again = format!("broker --bind {} --state state --runs runs --json", known.broker.addrs[0]);
    let mut broker = cluster.bench.start(&again);
    broker.wait_for("ticket");
    cluster.broker = Some(broker);
    let back = join(&cluster.bench, &cluster.ticket, "b");
    cluster.nodes.push(("b", back));
    let notices = cluster.finish("");
    let told = |text: &String| text.contains("the broker restarted") && text.contains("from the snapshots of step");
    assert!(notices.iter().any(told), "{notices:?}");
}

/// On the same machine nothing crosses a wire, and the same cut gives the same bits.
#[test]
fn a_process_that_is_started_again_goes_on_bit_for_bit() {
    let sets = "--set train.steps=1200 --set train.batch=8 --set checkpoint.every=0 --set survive.every=10 \
                --set placement.strategy=equal-compute --set train.eval_every=0";
    let bench = Bench::new();
    // Folders that are there, and empty, will do.
    std::fs::create_dir(bench.path("run")).unwrap();
    std::fs::create_dir(bench.path("kept")).unwrap();
    let kept = format!("--set checkpoint.to={}", bench.path("kept").display());
    let mut train = bench.start(&format!("train job.toml --compnodes 2 --out run --json {sets} {kept}"));
    for _ in 0..3 {
        for _ in 0..40 {
            train.wait_for("\"event\":\"step\"");
        }
        let child = |pid: &String| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("--child") && words.contains("compnode-1")
        };
        let pid = bench.pids().into_iter().find(child).unwrap();
        assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        train.wait_for("vanished after step");
    }
    let (code, _, err) = train.finish();
    assert_eq!(code, Some(0), "{err}");
    let notices = std::fs::read_to_string(bench.path("run/notices.jsonl")).unwrap();
    assert_eq!(notices.matches("goes on from the snapshots of step").count(), 3, "{notices}");
    bench.succeed(&format!("train job.toml --compnodes 2 --out calm {sets}"));
    assert_eq!(losses(&bench.path("run")), losses(&bench.path("calm")));
    assert!(bench.path("kept/step-1200/manifest.json").is_file(), "nobody else uses it");
    let hidden =
        ["", "run", "kept"].into_iter().flat_map(|name| std::fs::read_dir(bench.path(name)).unwrap().flatten());
    let left: Vec<_> = hidden.filter(|e| e.file_name().to_string_lossy().starts_with(".fusionllm")).collect();
    assert!(left.is_empty(), "{left:?}");
}
