//! `plan` on cluster files, and the examples.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::process::{Bench, text};

const CLUSTER: &str = r#"
name = "two sites"

[[device]]
name = "gpu"
count = 2
site = "berlin"
flop_per_s = 1e10
memory_gb = 4.0

[[device]]
name = "old"
site = "tokyo"
flop_per_s = 4e9

[[link]]
from = "*"
to = "*"
latency_ms = 50.0
mbit_per_s = 8.0

[[link]]
from = "berlin"
to = "berlin"
latency_ms = 0.1
mbit_per_s = 1000.0
"#;

fn bench() -> Bench {
    let bench = Bench::new();
    bench.write("cluster.toml", CLUSTER);
    bench
}

#[test]
fn a_plan_on_a_cluster_predicts_and_draws() {
    let bench = bench();
    let plan = "plan job.toml --cluster cluster.toml";
    let out = bench.succeed(&format!("{plan} --svg plan.svg --trace trace.json"));
    for word in ["gpu-0", "old", "predicted step", "tokens/s", "bottleneck", "of 4.00 GB", "input ..", ".. loss"] {
        assert!(out.contains(word), "`{word}` is missing in\n{out}");
    }
    assert!(std::fs::read_to_string(bench.path("plan.svg")).unwrap().starts_with("<svg "));
    let trace: Value = serde_json::from_slice(&std::fs::read(bench.path("trace.json")).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().iter().any(|e| e["name"] == "FP 0 m0" && e["ph"] == "X"));

    let step = |more: &str| {
        let json: Value = serde_json::from_str(&bench.succeed(&format!("{plan} --json {more}"))).unwrap();
        json["prediction"]["step_s"].as_f64().unwrap()
    };
    let equal = step("");
    assert!(step("--compression ada-topk --ratio 50") < equal);
    assert!(step("--set placement.strategy=op-fence") < equal);
    let json: Value = serde_json::from_str(&bench.succeed(&format!("{plan} --json --set data.owner=old"))).unwrap();
    assert_eq!(json["placement"]["compnodes"][0], "old");
}

#[test]
fn a_plan_says_what_failures_leave_of_the_time() {
    let bench = bench();
    let share = |more: &str| {
        let long = "--set train.steps=4000 --set checkpoint.every=1000";
        let plan = format!("plan job.toml --cluster cluster.toml --json {long} {more}");
        let json: Value = serde_json::from_str(&bench.succeed(&plan)).unwrap();
        let survival = &json["survival"];
        let number = |value: &Value| value.as_f64().unwrap();
        let parts = survival["parts"].as_object().unwrap();
        let sum: f64 = parts.values().map(|part| number(&part["s"])).sum();
        assert!((sum - number(&survival["per_failure_s"])).abs() < 1e-9 && parts.len() == 6, "{survival}");
        let expected = 1.0 - sum / (number(&survival["mtbf_s"]) + sum);
        assert!((number(&survival["useful_share"]) - expected).abs() < 1e-12, "{survival}");
        number(&survival["useful_share"])
    };
    let often = share("--mtbf 10m");
    assert!(often > 0.5 && often < share("--mtbf 4h"));
    let by_checkpoints = share("--mtbf 10m --set survive.every=0");
    assert!(by_checkpoints < often, "snapshots come more often");
    let anew = share("--mtbf 10m --set survive.every=0 --set checkpoint.every=0");
    assert!(anew < by_checkpoints, "without checkpoints it begins anew");
    let out = bench.succeed("plan job.toml --cluster cluster.toml --mtbf 4h");
    assert!(out.contains("useful share") && out.contains("if the job is hit each 4h"), "{out}");
    assert!(out.contains("half of the time from one set of snapshots to the next, which is worked out"), "{out}");
    let out = bench.succeed("plan job.toml --cluster cluster.toml --mtbf 4h --set survive.every=0");
    assert!(out.contains("half of the 4 steps from one checkpoint to the next"), "{out}");
    for (arguments, words) in [
        ("plan job.toml --mtbf 4h", "--cluster FILE"),
        ("plan job.toml --cluster cluster.toml --compare --mtbf 4h", "leave them or --compare out"),
        ("plan job.toml --cluster cluster.toml --mtbf soon", "such as 4h or 30m"),
    ] {
        let output = bench.run(arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
}

#[test]
fn a_comparison_has_a_row_for_every_strategy_and_compression() {
    let bench = bench();
    let compare = "plan job.toml --cluster cluster.toml --compare";
    let json: Value = serde_json::from_str(&bench.succeed(&format!("{compare} --json"))).unwrap();
    let rows = json["strategies"].as_array().unwrap();
    assert_eq!(rows.len(), 12);
    assert!(rows.iter().all(|r| r["step_s"].as_f64().is_some_and(|s| s > 0.0) && r["cluster"] == "two sites"));
    let out = bench.succeed(compare);
    assert!(out.contains("op-fence       ada-topk") && out.contains("| two sites |"), "{out}");
}

#[test]
fn clusters_that_do_not_fit() {
    let bench = bench();
    bench.write("typo.toml", &CLUSTER.replace("mbit_per_s", "mbits"));
    bench.write("site.toml", &CLUSTER.replace("from = \"berlin\"", "from = \"paris\""));
    bench.write("tiny.toml", &CLUSTER.replace("memory_gb = 4.0", "memory_gb = 0.000001"));
    for (arguments, words) in [
        ("plan job.toml --cluster none.toml", &["none.toml"] as &[&str]),
        ("plan job.toml --cluster typo.toml", &["typo.toml", "line", "mbits"]),
        ("plan job.toml --cluster site.toml", &["site.toml", "`paris`, which is neither a device nor a site"]),
        ("plan job.toml --cluster tiny.toml", &["gpu-0", "would need"]),
        ("plan job.toml --cluster cluster.toml --compnodes 4", &["4 CompNodes are asked for", "has 3"]),
        ("plan job.toml --cluster cluster.toml --set data.owner=nobody", &["nobody", "no device of cluster.toml"]),
        ("plan job.toml --cluster cluster.toml --compression ada-topk --ratio 0.5", &["--ratio is 0.5"]),
        ("plan job.toml --cluster cluster.toml --cluster cluster.toml", &["--compare"]),
        ("plan job.toml --compare", &["--cluster"]),
        ("plan job.toml --svg plan.svg", &["--cluster"]),
        ("train job.toml --set model.name=resnet101 --out run", &["model.n_embd", "the model is a ResNet"]),
    ] {
        let output = bench.run(arguments);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "fusionllm {arguments}\n{err}");
        assert_eq!(err.trim_end().lines().count(), 1, "{err}");
        assert!(words.iter().all(|word| err.contains(word)), "fusionllm {arguments}: {err}");
    }
    assert!(!bench.path("plan.svg").exists() && !bench.path("run").exists());
}

#[test]
fn every_example_can_be_planned() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let files = |folder: &str| -> Vec<PathBuf> {
        std::fs::read_dir(examples.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let (jobs, clusters) = (files("plan"), files("clusters"));
    assert!(jobs.len() >= 6 && clusters.len() >= 4);
    let bench = bench();
    bench.write("large.toml", &CLUSTER.replace("memory_gb = 4.0", "memory_gb = 400.0"));
    for job in &jobs {
        let cut = "--set placement.stages=[] --set placement.strategy=equal-compute";
        bench.succeed(&format!("plan {} --cluster large.toml {cut}", job.display()));
    }
    for cluster in &clusters {
        bench.succeed(&format!("plan job.toml --cluster {} --set placement.strategy=op-fence", cluster.display()));
    }
    let (yardstick, cluster) = (examples.join("plan/gpt-204m.toml"), examples.join("clusters/yardstick.toml"));
    bench.succeed(&format!("plan {} --cluster {}", yardstick.display(), cluster.display()));
}
