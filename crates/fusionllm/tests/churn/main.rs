//! Machines come and go while a job trains: real processes over loopback, and faults drawn from a seed at Poisson times.
//!
//!     cargo test --release -p fusionllm --test churn -- --seeds 1..=20 --out churn.json
//!
//! First the job runs undisturbed. Then it runs once for each seed, and each run must end with the same losses, every step
//! told once, no process left over, and memory and descriptors of those that lived through it as they were.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a harness that fails is a run that fails, and what it prints is its result"
)]

mod checks;
mod faults;
#[path = "../it/process.rs"]
#[expect(dead_code, reason = "it serves other tests, too")]
mod process;
mod run;
mod scene;
mod table;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Parser;
use serde_json::json;

use run::{disturbed, undisturbed};

/// What is asked for.
#[derive(Debug, Parser)]
#[command(name = "churn")]
struct Options {
    /// Seeds, a run each: such as 7 or 1..=20
    #[arg(long, default_value = "1", value_parser = seeds)]
    seeds: RangeInclusive<u64>,
    /// CompNodes of the job
    #[arg(long, default_value_t = 3)]
    compnodes: usize,
    /// Steps of the job
    #[arg(long, default_value_t = 400)]
    steps: u64,
    /// Mean seconds from one fault to the next
    #[arg(long, default_value_t = 8.0)]
    mean: f64,
    /// Only these kinds of faults, such as kill,broker [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// The least useful share of the time that will do
    #[arg(long, default_value_t = 0.0)]
    floor: f64,
    /// File for the results
    #[arg(long)]
    out: Option<PathBuf>,
}

fn seeds(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |part: &str| part.parse().map_err(|_| format!("{part:?} is no seed"));
    match text.split_once("..=") {
        Some((first, last)) => Ok(number(first)?..=number(last)?),
        None => number(text).map(|seed| seed..=seed),
    }
}

fn main() {
    let options = Options::parse();
    let calm = undisturbed(&options);
    println!(
        "undisturbed: {} steps in {:.1} s, the median one {:.1} ms",
        calm.losses.len(),
        calm.wall_s,
        calm.step_s * 1e3
    );
    let mut runs = Vec::new();
    for seed in options.seeds.clone() {
        let run = disturbed(&options, &calm, seed);
        println!("{}", table::line(&run));
        runs.push(run);
        // Whoever ends it early has what came of the runs so far.
        if let Some(out) = &options.out {
            let document = json!({
                "compnodes": options.compnodes,
                "steps": options.steps,
                "mean_s": options.mean,
                "undisturbed": { "step_s": calm.step_s, "wall_s": calm.wall_s },
                "runs": runs,
                "table": table::of(&runs),
            });
            std::fs::write(out, serde_json::to_vec_pretty(&document).unwrap()).unwrap();
        }
    }
    print!("{}", table::of(&runs));
    let mut failures: Vec<String> = Vec::new();
    for run in &runs {
        failures.extend(run.failures.iter().map(|failure| format!("seed {}: {failure}", run.seed)));
        if run.useful_share < options.floor {
            let (seed, share, floor) = (run.seed, run.useful_share, options.floor);
            failures.push(format!("seed {seed}: only {share:.3} of the time was useful, less than {floor}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
