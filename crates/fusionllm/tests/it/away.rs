//! The broker is away, and the CompNodes train on.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{broker, join, status, wait_until_done};
use crate::process::{Bench, Running, json_lines, losses, wait_until};

/// Long enough for a broker to be away meanwhile.
const JOB: &str = "--set train.steps=1000 --set train.batch=32 --set train.eval_every=0 --set checkpoint.every=0 \
                   --set survive.every=20";
/// The same with many checkpoints.
const CHECKPOINTS: &str =
    "--set train.steps=1000 --set train.batch=32 --set train.eval_every=0 --set checkpoint.every=10";
/// One that comes to its end meanwhile.
const SHORT: &str = "--set train.steps=150 --set train.batch=32 --set train.eval_every=0 --set checkpoint.every=40";
/// For so long the broker is away.
const AWAY: Duration = Duration::from_secs(4);

/// Two CompNodes at work on a job, and their broker while it is there.
pub(crate) struct Cluster {
    pub(crate) bench: Bench,
    broker: Option<Running>,
    ticket: String,
    _nodes: [Running; 2],
    pub(crate) run: PathBuf,
}

impl Cluster {
    pub(crate) fn at_work(sets: &str) -> Self {
        let bench = Bench::new();
        let (broker, ticket) = broker(&bench);
        let nodes = ["a", "b"].map(|name| join(&bench, &ticket, name));
        bench.succeed(&format!("submit job.toml --state state {sets}"));
        let run = PathBuf::from(status(&bench)["jobs"][0]["run_dir"].as_str().unwrap());
        let cluster = Self { bench, broker: Some(broker), ticket, _nodes: nodes, run };
        wait_until(|| cluster.step() > 25, "the job is under way");
        cluster
    }

    pub(crate) fn job(&self) -> Value {
        status(&self.bench)["jobs"][0].clone()
    }

    pub(crate) fn step(&self) -> u64 {
        self.job()["step"].as_u64().unwrap_or(0)
    }

    /// Ends the broker by a signal. Gives the last step that it has written.
    pub(crate) fn end_broker(&mut self, signal: &str) -> u64 {
        let broker = self.broker.take().unwrap();
        broker.signal(signal);
        broker.finish();
        json_lines(&self.run.join("metrics.jsonl")).last().unwrap()["step"].as_u64().unwrap()
    }

    /// Starts a broker on the same state and address.
    pub(crate) fn start_broker(&mut self) {
        let known: fusionllm::transport::Ticket = self.ticket.parse().unwrap();
        let again = format!("broker --bind {} --state state --runs runs --json", known.broker.addrs[0]);
        let mut broker = self.bench.start(&again);
        broker.wait_for("ticket");
        self.broker = Some(broker);
    }

    pub(crate) fn wait_until_running(&self) {
        // On a fast machine it may have ended meanwhile.
        let has_it = || ["running", "done"].iter().any(|&state| self.job()["state"]["state"] == state);
        wait_until(has_it, "the broker has its job back");
    }

    /// The job has ended as if the broker had always been there: by the same placement, each step done and told once, with
    /// the losses of an undisturbed run to the last bit.
    pub(crate) fn assert_undisturbed(&self, calm: &[f64]) {
        wait_until_done(&self.bench);
        let lines = json_lines(&self.run.join("metrics.jsonl"));
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=lines.len() as u64).collect::<Vec<_>>());
        assert_eq!(losses(&self.run), calm);
        let placement: Value = serde_json::from_str(&read(&self.run, "placement.json")).unwrap();
        assert_eq!(placement["generation"], 1, "it was placed anew");
        let again = lines.iter().filter_map(|line| line["recoveries"].as_array()).flatten();
        let again: Vec<&Value> = again.map(|recovery| &recovery["lost_steps"]).collect();
        assert!(again.iter().all(|&steps| *steps == 0), "steps were done again: {again:?}");
    }
}

/// The losses of an undisturbed job.
pub(crate) fn undisturbed(sets: &str) -> Vec<f64> {
    let bench = Bench::new();
    bench.succeed(&format!("train job.toml --out calm --compnodes 2 {sets}"));
    losses(&bench.path("calm"))
}

/// Those of [`JOB`], and of [`CHECKPOINTS`].
fn calm() -> &'static [f64] {
    static CALM: LazyLock<Vec<f64>> = LazyLock::new(|| undisturbed(JOB));
    &CALM
}

pub(crate) fn read(run: &Path, name: &str) -> String {
    // The report may come a while after the end.
    wait_until(|| run.join(name).is_file(), "the file is there");
    std::fs::read_to_string(run.join(name)).unwrap()
}

/// Killed, or ended by whoever runs it: both leave the CompNodes at work.
#[test]
fn a_job_goes_on_while_the_broker_is_away_and_is_taken_back_as_it_is() {
    for signal in ["KILL", "INT"] {
        let mut cluster = Cluster::at_work(JOB);
        let written = cluster.end_broker(signal);
        std::thread::sleep(AWAY);
        cluster.start_broker();
        cluster.wait_until_running();
        let told = || json_lines(&cluster.run.join("metrics.jsonl")).len() as u64;
        wait_until(|| told() > written, "the broker hears of what was done");
        std::thread::sleep(Duration::from_millis(200));
        assert!(told() > written + 50, "{} after {written}: nothing was done meanwhile", told());
        cluster.assert_undisturbed(calm());
        assert!(read(&cluster.run, "report.md").contains("the broker restarted after step"));
    }
}

#[test]
fn a_broker_that_is_killed_again_before_it_has_its_job_back_takes_it_back_the_next_time() {
    let mut cluster = Cluster::at_work(JOB);
    cluster.end_broker("KILL");
    cluster.start_broker();
    cluster.end_broker("KILL");
    cluster.start_broker();
    cluster.wait_until_running();
    cluster.end_broker("KILL");
    cluster.start_broker();
    cluster.assert_undisturbed(calm());
}

/// What came to its end meanwhile needs a broker only for its last checkpoint.
#[test]
fn a_broker_that_comes_back_after_the_last_step_finds_the_end() {
    let mut cluster = Cluster::at_work(SHORT);
    cluster.end_broker("KILL");
    std::thread::sleep(2 * AWAY);
    cluster.start_broker();
    cluster.assert_undisturbed(&undisturbed(SHORT));
    assert!(cluster.run.join("checkpoints/step-150/manifest.json").is_file());
}

/// Nobody takes the shards of checkpoints meanwhile: those are left out, and training goes on.
#[test]
fn checkpoints_that_are_due_meanwhile_are_left_out_and_hold_nothing_up() {
    let mut cluster = Cluster::at_work(CHECKPOINTS);
    let written = cluster.end_broker("KILL");
    std::thread::sleep(3 * AWAY);
    cluster.start_broker();
    cluster.wait_until_running();
    wait_until(|| cluster.step() > written + 60, "it is further than the checkpoints that could wait");
    cluster.assert_undisturbed(calm());
    let notices = read(&cluster.run, "notices.jsonl");
    assert!(notices.contains("there is no checkpoint of step"), "{notices}");
    assert!(cluster.run.join("checkpoints/step-1000/manifest.json").is_file());
}
