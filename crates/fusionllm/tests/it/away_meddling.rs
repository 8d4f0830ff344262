//! The broker is away, and others do things to the run meanwhile: what a job survives while its broker lives, it survives
//! while that is away.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::Value;

use crate::away::{Cluster, read, undisturbed};
use crate::cluster::wait_until_done;
use crate::process::{json_lines, wait_until};

const JOB: &str = "--set train.steps=700 --set train.batch=32 --set train.eval_every=0 --set checkpoint.every=20 \
                   --set checkpoint.keep=2 --set survive.every=20";
/// For so long the broker is away.
const AWAY: Duration = Duration::from_millis(1500);

/// The losses of an undisturbed job.
fn calm() -> &'static [f64] {
    static CALM: LazyLock<Vec<f64>> = LazyLock::new(|| undisturbed(JOB));
    &CALM
}

/// Runs a shell command in the run directory.
fn shell(run: &Path, line: &str) {
    assert!(Command::new("sh").args(["-c", line]).current_dir(run).status().unwrap().success(), "{line}");
}

fn generation(run: &Path) -> Value {
    let placement: Value = serde_json::from_str(&read(run, "placement.json")).unwrap();
    placement["generation"].clone()
}

/// The job has ended by the same placement. Each step that is told is told once, with the loss of an undisturbed run, and so
/// is each one after `whole_from`.
fn assert_taken_back(cluster: &Cluster, whole_from: u64) {
    wait_until_done(&cluster.bench);
    let lines = json_lines(&cluster.run.join("metrics.jsonl"));
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");
    let after: Vec<u64> = steps.iter().copied().filter(|&step| step > whole_from).collect();
    assert_eq!(after, (whole_from + 1..=700).collect::<Vec<_>>());
    for line in &lines {
        assert_eq!(line["loss"].as_f64().unwrap(), calm()[line["step"].as_u64().unwrap() as usize - 1], "{line}");
    }
    assert_eq!(generation(&cluster.run), 1, "it was placed anew");
    assert!(cluster.run.join("checkpoints/step-700/manifest.json").is_file());
    let notices = read(&cluster.run, "notices.jsonl");
    assert!(notices.contains("nothing is done again"), "{notices}");
}

fn has_checkpoint(run: &Path) -> bool {
    let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().join("manifest.json").is_file())
}

/// The broker is killed, somebody does this in the run directory, and the broker is started again.
fn meddled_with(line: &str) -> (Cluster, u64) {
    let mut cluster = Cluster::at_work(JOB);
    wait_until(|| has_checkpoint(&cluster.run), "there is a checkpoint");
    let written = cluster.end_broker("KILL");
    shell(&cluster.run, line);
    std::thread::sleep(AWAY);
    cluster.start_broker();
    cluster.wait_until_running();
    (cluster, written)
}

#[test]
fn a_job_is_taken_back_whose_checkpoints_were_removed_meanwhile() {
    let (cluster, _) = meddled_with("rm -rf checkpoints");
    assert_taken_back(&cluster, 0);
    let notices = read(&cluster.run, "notices.jsonl");
    assert!(notices.contains("is not there any more: training goes on, and there is no other one yet"), "{notices}");
}

#[test]
fn a_job_is_taken_back_whose_run_directory_was_moved_meanwhile() {
    let (cluster, written) = meddled_with("mv ../../runs ../../moved");
    assert_taken_back(&cluster, written);
    let notices = read(&cluster.run, "notices.jsonl");
    assert!(notices.contains("was renamed or removed while the broker was away"), "{notices}");
}

#[test]
fn a_job_is_taken_back_whose_metrics_were_replaced_or_removed_meanwhile() {
    let (cluster, written) = meddled_with("mv metrics.jsonl m; mkfifo metrics.jsonl");
    assert_taken_back(&cluster, written);
    assert!(cluster.run.join("metrics.jsonl.other").symlink_metadata().is_ok());
    let (cluster, written) = meddled_with("rm metrics.jsonl");
    assert_taken_back(&cluster, written);
    // The CompNodes tell again what they still hold, which is all of it if the broker was killed early.
    let missing = 700 - json_lines(&cluster.run.join("metrics.jsonl")).len();
    let report = read(&cluster.run, "report.md");
    assert_eq!(report.contains(&format!("no figures of {missing} ")), missing > 0, "{missing} are missing: {report}");
}

/// Something looks at the folder, or copies it, for some seconds.
#[test]
fn a_lock_that_is_held_for_some_seconds_is_waited_for() {
    let mut cluster = Cluster::at_work(JOB);
    cluster.end_broker("KILL");
    let lock = File::open(cluster.run.join("fusionllm.lock")).unwrap();
    lock.lock().unwrap();
    cluster.start_broker();
    let reason = || cluster.job()["state"]["reason"].as_str().unwrap_or_default().to_owned();
    wait_until(|| reason().contains("is in use by"), "it says what it waits for");
    assert!(reason().contains(&format!("in use by process {}", std::process::id())), "{}", reason());
    std::thread::sleep(2 * AWAY);
    drop(lock);
    cluster.wait_until_running();
    assert_taken_back(&cluster, 0);
}

/// That process has the run, and the job goes on where it ends.
#[test]
fn a_run_that_somebody_goes_on_with_by_hand_is_waited_for() {
    let mut cluster = Cluster::at_work(JOB);
    cluster.end_broker("KILL");
    let resume = format!("train --resume {} --set train.steps=2000", cluster.run.display());
    let mut by_hand = cluster.bench.start(&resume);
    by_hand.wait_for("checkpoint at step");
    cluster.start_broker();
    let reason = || cluster.job()["state"]["reason"].as_str().unwrap_or_default().to_owned();
    wait_until(|| reason().contains(&format!("process {}", by_hand.id())), "it says what it waits for");
    by_hand.signal("INT");
    by_hand.finish();
    wait_until_done(&cluster.bench);
    let lines = json_lines(&cluster.run.join("metrics.jsonl"));
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    assert!(steps.len() >= 700, "{}", steps.len());
}

#[test]
fn a_job_that_is_to_fail_with_a_compnode_is_taken_back_all_the_same() {
    let sets = format!("{JOB} --set survive.enabled=false");
    let mut cluster = Cluster::at_work(&sets);
    cluster.end_broker("KILL");
    std::thread::sleep(AWAY);
    cluster.start_broker();
    cluster.wait_until_running();
    cluster.assert_undisturbed(calm());
}
