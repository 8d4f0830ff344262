//! What must hold after a run.

use serde::Serialize;
use serde_json::Value;

use crate::scene::{Process, Sample, Scene};

/// Losses may differ by this much, relatively, once the model was cut otherwise than in the undisturbed run.
const CLOSE: f64 = 1e-5;
/// Processes that live for less than this have no course of memory to speak of.
const LEAST_LIFE_S: f64 = 20.0;
/// Growth from the second quarter of a life to the last that says nothing: kilobytes, share, descriptors.
const LEAST_GROWTH: (u64, f64, usize) = (32 << 10, 0.25, 8);

/// How losses compare with those of the undisturbed run.
#[derive(Serialize)]
pub(crate) struct Losses {
    /// Steps up to which every bit must be the same: then the model was cut otherwise for the first time.
    pub(crate) same_cut_up_to: u64,
    /// Steps whose loss is the same, bit for bit.
    pub(crate) equal_bits: usize,
    /// The largest relative difference.
    pub(crate) worst: f64,
}

/// What a process took in the middle and at the end of its life.
#[derive(Serialize)]
pub(crate) struct Growth {
    pub(crate) who: String,
    pub(crate) life_s: f64,
    pub(crate) rss_kb: [u64; 2],
    pub(crate) descriptors: [usize; 2],
}

/// Holds the lines of the metrics against the undisturbed losses: each step once and in order, and the same losses.
pub(crate) fn losses(lines: &[Value], calm: &[f64], compnodes: usize) -> (Losses, Vec<String>) {
    let mut failures = Vec::new();
    let steps: Vec<u64> = lines.iter().filter_map(|line| line["step"].as_u64()).collect();
    if !steps.iter().copied().eq(1..=calm.len() as u64) {
        let wrong = steps.iter().zip(1..).find(|(step, expected)| **step != *expected);
        failures.push(format!("{} lines for {} steps, the first wrong one: {wrong:?}", steps.len(), calm.len()));
    }
    let is_cut_anew = |line: &&Value| {
        let recoveries = line["recoveries"].as_array();
        recoveries.is_some_and(|all| all.iter().any(|r| r["compnodes"].as_u64() != Some(compnodes as u64)))
    };
    let cut_anew = lines.iter().find(is_cut_anew).and_then(|line| line["step"].as_u64());
    let same_cut_up_to = cut_anew.map_or(calm.len() as u64, |step| step.saturating_sub(1));
    let (mut equal_bits, mut worst) = (0, 0.0f64);
    for line in lines {
        let (Some(step), Some(loss)) = (line["step"].as_u64(), line["loss"].as_f64()) else { continue };
        let Some(&expected) = calm.get(step as usize - 1) else { continue };
        let is_equal = loss.to_bits() == expected.to_bits();
        equal_bits += usize::from(is_equal);
        worst = worst.max(((loss - expected) / expected).abs());
        if !is_equal && step <= same_cut_up_to && failures.len() < 3 {
            failures.push(format!("step {step} of the same cut has the loss {loss}, and undisturbed {expected}"));
        }
    }
    if worst > CLOSE {
        failures.push(format!("a loss differs by {worst:.1e} of the undisturbed one"));
    }
    (Losses { same_cut_up_to, equal_bits, worst }, failures)
}

/// The most that processes took.
#[derive(Clone, Copy)]
pub(crate) struct Peak {
    rss_kb: u64,
    descriptors: usize,
}

/// The most that CompNodes took, and the broker.
pub(crate) fn peaks(scene: &Scene) -> [Peak; 2] {
    [peak(scene.nodes.iter().filter_map(|node| node.process.as_ref())), peak(scene.broker.iter())]
}

fn peak<'a>(processes: impl Iterator<Item = &'a Process>) -> Peak {
    let samples: Vec<&Sample> = processes.flat_map(|process| &process.samples).collect();
    Peak {
        rss_kb: samples.iter().map(|s| s.rss_kb).max().unwrap_or(0),
        descriptors: samples.iter().map(|s| s.descriptors).max().unwrap_or(0),
    }
}

/// What processes took that lived for long, and what has grown of it. One that had nothing to do at first may take what
/// the undisturbed ones took at the most.
pub(crate) fn growth(scene: &Scene, undisturbed: [Peak; 2]) -> (Vec<Growth>, Vec<String>) {
    let nodes = scene.nodes.iter().filter_map(|node| Some((node.name.as_str(), node.process.as_ref()?)));
    let all = nodes.chain(scene.broker.as_ref().map(|broker| ("broker", broker)));
    let growth: Vec<Growth> = all.filter_map(|(who, process)| of(who, process)).collect();
    let (most_kb, most_share, most_descriptors) = LEAST_GROWTH;
    let has_grown = |g: &&Growth| {
        let peak = undisturbed[usize::from(g.who == "broker")];
        let (before, descriptors) = (g.rss_kb[0].max(peak.rss_kb), g.descriptors[0].max(peak.descriptors));
        let by = g.rss_kb[1].saturating_sub(before);
        by > most_kb && by as f64 > before as f64 * most_share || g.descriptors[1] > descriptors + most_descriptors
    };
    let say = |g: &Growth| format!("{} grows: {:?} kB, {:?} descriptors", g.who, g.rss_kb, g.descriptors);
    let grown = growth.iter().filter(has_grown).map(say).collect();
    (growth, grown)
}

fn of(who: &str, process: &Process) -> Option<Growth> {
    let life_s = process.samples.last()?.at_s;
    if life_s < LEAST_LIFE_S {
        return None;
    }
    let quarter = |from: f64, to: f64| -> Vec<&Sample> {
        process.samples.iter().filter(|s| s.at_s >= from * life_s && s.at_s <= to * life_s).collect()
    };
    let (second, last) = (quarter(0.25, 0.5), quarter(0.75, 1.0));
    let median = |samples: &[&Sample]| {
        let mut rss: Vec<u64> = samples.iter().map(|s| s.rss_kb).collect();
        rss.sort_unstable();
        rss.get(rss.len() / 2).copied()
    };
    let most = |samples: &[&Sample]| samples.iter().map(|s| s.descriptors).max();
    Some(Growth {
        who: who.to_owned(),
        life_s,
        rss_kb: [median(&second)?, median(&last)?],
        descriptors: [most(&second)?, most(&last)?],
    })
}
