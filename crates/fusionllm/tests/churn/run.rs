//! One run of the job, with or without faults.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::Options;
use crate::checks::{self, Growth, Losses, Peak};
use crate::faults::{Came, Faults};
use crate::process::json_lines;
use crate::scene::Scene;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// Between two samples of what processes take.
const SAMPLE: Duration = Duration::from_secs(1);
/// A job that does no new step for so long has not come back.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a run without faults gives.
pub(crate) struct Calm {
    pub(crate) losses: Vec<f64>,
    pub(crate) step_s: f64,
    pub(crate) wall_s: f64,
    /// The most that CompNodes took, and the broker.
    pub(crate) peaks: [Peak; 2],
}

/// What came of a run with faults.
#[derive(Serialize)]
pub(crate) struct Disturbed {
    pub(crate) seed: u64,
    pub(crate) wall_s: f64,
    pub(crate) useful_share: f64,
    pub(crate) faults: Vec<Came>,
    /// As the broker has measured them.
    pub(crate) recoveries: Vec<Value>,
    pub(crate) losses: Losses,
    pub(crate) growth: Vec<Growth>,
    /// What is not as it should be.
    pub(crate) failures: Vec<String>,
}

/// The job without any fault.
pub(crate) fn undisturbed(options: &Options) -> Calm {
    let mut scene = Scene::new(options.compnodes, options.steps);
    let (wall_s, stuck) = follow(&mut scene, None, &mut Vec::new());
    assert!(stuck.is_none(), "the undisturbed job: {stuck:?}");
    let lines = json_lines(&scene.run_dir.join("metrics.jsonl"));
    let mut times: Vec<f64> = lines.iter().map(|line| line["step_s"].as_f64().unwrap()).collect();
    times.sort_by(f64::total_cmp);
    let losses = lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    Calm { losses, step_s: times[times.len() / 2], wall_s, peaks: checks::peaks(&scene) }
}

/// The job with the faults of a seed.
pub(crate) fn disturbed(options: &Options, calm: &Calm, seed: u64) -> Disturbed {
    let mut scene = Scene::new(options.compnodes, options.steps);
    let mut faults = Faults::new(seed, options.mean, &options.only);
    let mut came = Vec::new();
    let (wall_s, stuck) = follow(&mut scene, Some(&mut faults), &mut came);
    faults.end(&mut scene);
    let lines = json_lines(&scene.run_dir.join("metrics.jsonl"));
    let (losses, mut failures) = checks::losses(&lines, &calm.losses, options.compnodes);
    if let Some(stuck) = stuck {
        failures.insert(0, stuck);
        failures.push(format!("the broker's last words:\n{}", scene.last_of("broker")));
    } else {
        // A broker or a CompNode that was just started is about to be there.
        std::thread::sleep(Duration::from_secs(2));
        let job = scene.status()["jobs"][0].clone();
        if job["state"]["state"] != "done" || job["step"].as_u64() != Some(options.steps) {
            failures.push(format!("the job is not done: {job}"));
        }
    }
    let (growth, grown) = checks::growth(&scene, calm.peaks);
    failures.extend(grown);
    let (rude, left_over) = scene.end();
    failures.extend(rude);
    if left_over > 0 {
        failures.push(format!("{left_over} processes are left over"));
    }
    let told = lines.iter().filter_map(|line| line["recoveries"].as_array());
    let recoveries = told.flatten().cloned().collect();
    let useful_share = calm.step_s * options.steps as f64 / wall_s;
    Disturbed { seed, wall_s, useful_share, faults: came, recoveries, losses, growth, failures }
}

/// Looks on until the job is done, while faults come. Gives the seconds from its first step to its last, and what it is
/// stuck at if it is.
fn follow(scene: &mut Scene, mut faults: Option<&mut Faults>, came: &mut Vec<Came>) -> (f64, Option<String>) {
    let (metrics, report) = (scene.run_dir.join("metrics.jsonl"), scene.run_dir.join("report.md"));
    let mut began: Option<Instant> = None;
    let (mut most, mut moved, mut sampled) = (0, Instant::now(), Instant::now());
    loop {
        std::thread::sleep(LOOK);
        let step = last_step(&metrics).unwrap_or(0);
        if step > most {
            (most, moved) = (step, Instant::now());
            let began = *began.get_or_insert(moved);
            let now_s = began.elapsed().as_secs_f64();
            let open = came.iter_mut().filter(|fault| fault.back_s.is_none());
            open.for_each(|fault| fault.back_s = Some(now_s - fault.at_s));
        }
        let wall_s = began.map_or(0.0, |began| (moved - began).as_secs_f64());
        let ended = std::fs::read_to_string(&report).unwrap_or_default();
        if ended.lines().nth(2) == Some("done") {
            return (wall_s, None);
        }
        if ended.lines().nth(2).is_some_and(|state| state.starts_with("failed")) {
            return (wall_s, Some(ended.lines().nth(2).unwrap_or_default().to_owned()));
        }
        if moved.elapsed() > PATIENCE {
            return (wall_s, Some(format!("no new step after step {most} for {} s", PATIENCE.as_secs())));
        }
        if sampled.elapsed() > SAMPLE {
            sampled = Instant::now();
            scene.sample();
            if let Some(gone) = scene.supervise() {
                return (wall_s, Some(format!("{gone} has ended by itself:\n{}", scene.last_of(&gone))));
            }
        }
        let (Some(began), Some(faults)) = (began, faults.as_deref_mut()) else { continue };
        if let Some((kind, who, for_s)) = faults.act(scene) {
            let at_s = began.elapsed().as_secs_f64();
            came.push(Came { at_s, kind, who, for_s, step: most, back_s: None });
        }
    }
}

/// The step of the last whole line.
fn last_step(metrics: &Path) -> Option<u64> {
    let mut file = std::fs::File::open(metrics).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(1 << 16))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    tail.rsplit(|&byte| byte == b'\n').find_map(|line| serde_json::from_slice::<Value>(line).ok()?["step"].as_u64())
}
