//! `data.private`: the owner's own seed, blocks that stay, organisations.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster::{broker, status};
use crate::process::{Bench, json_lines, losses, text, wait_until};

const PRIVATE: &str = "--set data.private=true --set model.n_layer=4 --set model.dropout=0.1";

/// The files with seeds that only data owners have.
fn seeds(bench: &Bench) -> Vec<PathBuf> {
    let folder = bench.path("state-home/fusionllm/owner-seeds");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn placement(run: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(run.join("placement.json")).unwrap()).unwrap()
}

fn notices(bench: &Bench, run: &str) -> String {
    std::fs::read_to_string(bench.path(run).join("report.md")).unwrap()
}

#[test]
fn a_private_run_has_a_seed_of_its_own_and_goes_on_with_it() {
    let bench = Bench::new();
    bench.succeed(&format!("train job.toml --out run --compnodes 2 {PRIVATE}"));
    let whole = losses(&bench.path("run"));
    let first = seeds(&bench);
    assert_eq!(first.len(), 1, "one run, one seed: {first:?}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&first[0]).unwrap().permissions().mode() & 0o777, 0o600);
    }
    // Nothing of it is where others see it.
    let secret = std::fs::read_to_string(&first[0]).unwrap();
    for entry in walk(&bench.path("run")) {
        let bytes = std::fs::read(&entry).unwrap();
        let found = bytes.windows(32).any(|part| part == &secret.as_bytes()[..32]);
        assert!(!found, "{} has the seed", entry.display());
    }
    // As if the run had ended between the two checkpoints.
    std::fs::remove_dir_all(bench.path("run/checkpoints/step-8")).unwrap();
    bench.succeed("train --resume run --compnodes 3");
    let resumed = losses(&bench.path("run"));
    for (a, b) in resumed.iter().zip(&whole) {
        assert!((a - b).abs() <= 1e-5 * b, "{resumed:?}\n{whole:?}");
    }
    assert!(!notices(&bench, "run").contains("a new one is made"));
    // A new run that begins with its checkpoint goes on with it, too.
    bench.succeed("train --resume run --step 4 --out branch --compnodes 2");
    let branch = json_lines(&bench.path("branch/metrics.jsonl"));
    for (line, expected) in branch.iter().zip(&whole[4..]) {
        assert!((line["loss"].as_f64().unwrap() - expected).abs() <= 1e-5 * expected, "{line} {whole:?}");
    }
    // Another run has another one, and a public one that of the job.
    bench.succeed(&format!("train job.toml --out other --compnodes 2 {PRIVATE}"));
    assert_ne!(losses(&bench.path("other")), whole);
    assert_eq!(seeds(&bench).len(), 3);
}

#[test]
fn a_seed_that_is_gone_is_made_anew_and_that_is_told() {
    let bench = Bench::new();
    bench.succeed(&format!("train job.toml --out run --compnodes 2 {PRIVATE}"));
    let whole = losses(&bench.path("run"));
    std::fs::remove_dir_all(bench.path("run/checkpoints/step-8")).unwrap();
    std::fs::remove_file(&seeds(&bench)[0]).unwrap();
    bench.succeed("train --resume run --compnodes 2");
    let told = notices(&bench, "run");
    assert!(told.contains("a new one is made") && told.contains("up to step 4"), "{told}");
    let resumed = losses(&bench.path("run"));
    assert_eq!(resumed[..4], whole[..4]);
    assert_ne!(resumed[4..], whole[4..], "other samples");
    assert!(
        resumed[4..].iter().zip(&whole[4..]).all(|(a, b)| (a - b).abs() < 0.2 * b),
        "the same weights: {resumed:?}"
    );
}

#[test]
fn with_the_jobs_seed_a_private_run_has_the_losses_of_a_public_one() {
    let bench = Bench::new();
    let model = "--set model.n_layer=4";
    bench.succeed(&format!("train job.toml --out one --compnodes 1 {model}"));
    let private = "--set data.private=true --set data.private_seed=job";
    for (out, more) in [("u", ""), ("kept", "--set data.keep_blocks=[1,2]")] {
        bench.succeed(&format!("train job.toml --out {out} --compnodes 3 {model} {private} {more}"));
        for (a, b) in losses(&bench.path(out)).iter().zip(&losses(&bench.path("one"))) {
            assert!((a - b).abs() <= 1e-5 * b, "{out}: {a} {b}");
        }
        let placement = placement(&bench.path(out));
        let holder = |op: &str| {
            let stages = placement["stages"].as_array().unwrap();
            let holds = |stage: &&Value| stage["ops"].as_array().unwrap().iter().any(|name| name == op);
            stages.iter().find(holds).unwrap()["compnode"].as_str().unwrap().to_owned()
        };
        for op in ["wte", "wpe", "ln_f", "lm_head", "loss"] {
            assert_eq!(holder(op), "compnode-0", "{op}");
        }
        let kept = ["h.0.attn", "h.2.attn", "h.3.mlp.act"].map(|op| holder(op) == "compnode-0");
        assert!(out == "u" || kept == [true; 3], "{kept:?}");
        assert_ne!(holder("h.1.attn"), "compnode-0");
    }
    assert_eq!(seeds(&bench), Vec::<PathBuf>::new(), "nobody needs one");
}

#[test]
fn keys_of_private_data_without_it_and_blocks_that_are_not_there_are_refused() {
    let bench = Bench::new();
    for (sets, words) in [
        ("--set data.keep_blocks=[1,0]", "`data.keep_blocks`: is given, but data.private is not set"),
        ("--set data.private_seed=job", "`data.private_seed`: is given, but data.private is not set"),
        ("--set data.private=true --set data.private_seed=none", "expected `own` or `job`"),
        ("--set data.private=true --set data.keep_blocks=[1]", "such as [1, 1]"),
        ("--set data.private=true --set data.keep_blocks=[1,1]", "the model has one block"),
    ] {
        for command in ["plan job.toml", "train job.toml --out run"] {
            let output = bench.run(&format!("{command} {sets}"));
            let err = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command} {sets}: {err}");
            assert!(err.contains(words), "{command} {sets}: {err}");
        }
    }
}

#[test]
fn plan_keeps_organisations_apart_and_shows_what_stays() {
    let bench = Bench::new();
    let device = |name: &str, org: &str| format!("[[device]]\nname = \"{name}\"\nflop_per_s = 1e6\norg = \"{org}\"\n");
    let link = "[[link]]\nfrom = \"*\"\nto = \"*\"\nlatency_ms = 1\nmbit_per_s = 1000\n";
    let cluster = |devices: &[(&str, &str)]| {
        let devices: String = devices.iter().map(|(name, org)| device(name, org)).collect();
        bench.write("orgs.toml", &format!("{devices}{link}"));
    };
    let private = "--set model.n_layer=6 --set data.private=true --set data.keep_blocks=[1,1]";
    cluster(&[("own", "us"), ("a-0", "acme"), ("a-1", "acme"), ("b-0", "bolt")]);
    let out = bench.succeed(&format!("plan job.toml --cluster orgs.toml {private} --set placement.strategy=op-fence"));
    assert!(out.contains("own") && out.contains("input .. h.0.add_2"), "{out}");
    assert!(out.contains("stay with the data owner"), "{out}");
    assert!(!(out.contains("a-0") && out.contains("a-1")), "{out}");
    cluster(&[("own", "us"), ("a-0", "acme"), ("a-1", "acme")]);
    let output = bench.run(&format!("plan job.toml --cluster orgs.toml {private}"));
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(2) && err.contains("2 of 2 CompNodes belong to `acme`"), "{err}");
}

#[test]
fn machines_say_where_they_belong() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let join = |name: &str, more: &str| {
        bench.start(&format!("join {ticket} --name {name} --bind 127.0.0.1:0 --device cpu --data . {more}"))
    };
    let count = || status(&bench)["compnodes"].as_array().unwrap().len();
    let mut nodes = Vec::new();
    for (at, (name, more)) in [("own", ""), ("a", "--org acme"), ("b", "--org acme")].into_iter().enumerate() {
        nodes.push(join(name, more));
        wait_until(|| count() > at, "it has joined");
    }
    for command in ["status", "inventory"] {
        let out = bench.succeed(&format!("{command} --state state"));
        assert_eq!(out.matches("of acme").count(), 2, "{out}");
    }
    assert_eq!(status(&bench)["compnodes"][1]["org"], "acme");
    let file = bench.succeed("inventory --state state --toml");
    assert_eq!(file.matches("org = \"acme\"").count(), 2, "{file}");
    // Two that belong together would be neighbours, or one of them alone would see both ends.
    let submit = format!("submit job.toml --state state --follow {PRIVATE} --set placement.strategy=equal-compute");
    let output = bench.run(&format!("{submit} --set placement.compnodes=3"));
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(2) && err.contains("2 of 2 CompNodes belong to `acme`"), "{err}");
    nodes.push(join("c", "--org bolt"));
    wait_until(|| count() > 3, "it has joined");
    let output = bench.run(&format!("{submit} --set placement.compnodes=4"));
    assert_eq!(output.status.code(), Some(2), "two of three: {}", text(&output.stderr));
    nodes.push(join("d", "--org bolt"));
    wait_until(|| count() > 4, "it has joined");
    bench.succeed(&format!("{submit} --set placement.compnodes=5"));
    let run = PathBuf::from(status(&bench)["jobs"][2]["run_dir"].as_str().unwrap());
    let placement = placement(&run);
    let org = |name: &Value| if ["a", "b"].contains(&name.as_str().unwrap()) { "acme" } else { "bolt" };
    let orgs: Vec<&str> = placement["placement"]["compnodes"].as_array().unwrap().iter().skip(1).map(org).collect();
    assert!(orgs == ["acme", "bolt", "acme", "bolt"] || orgs == ["bolt", "acme", "bolt", "acme"], "{placement}");
    let output = bench.run(&format!("join {ticket} --org {}", "x".repeat(101)));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
