//! What came of all runs, for people.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::faults::Kind;
use crate::run::Disturbed;

/// One run in a line.
pub(crate) fn line(run: &Disturbed) -> String {
    let Disturbed { seed, wall_s, useful_share, faults, recoveries, losses, failures, .. } = run;
    let verdict = if failures.is_empty() { "as it should be".to_owned() } else { failures.join("; ") };
    format!(
        "seed {seed}: {} faults, {} recoveries in {wall_s:.1} s, {:.1} % useful; {} losses equal in every bit, the others \
         within {:.1e}: {verdict}",
        faults.len(),
        recoveries.len(),
        useful_share * 100.0,
        losses.equal_bits,
        losses.worst
    )
}

/// Seconds by phase and fault, median and worst, over all runs.
pub(crate) fn of(runs: &[Disturbed]) -> String {
    let mut text = String::from(
        "\n| recovery from | times | detect | decide | build | refill | in all | steps done again |\n|---|---|---|---|---|---|---|---|\n",
    );
    let mut by_kind: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for recovery in runs.iter().flat_map(|run| &run.recoveries) {
        by_kind.entry(recovery["kind"].as_str().unwrap_or("?")).or_default().push(recovery);
    }
    for (kind, recoveries) in &by_kind {
        let seconds = |name: &str| -> Vec<f64> { recoveries.iter().filter_map(|r| r[name].as_f64()).collect() };
        let names = ["detect_s", "decide_s", "build_s", "refill_s"];
        let mut parts: Vec<String> = names.map(|name| spread(seconds(name), 2)).to_vec();
        let sum = |r: &&Value| names.iter().filter_map(|name| r[*name].as_f64()).sum();
        parts.push(spread(recoveries.iter().map(sum).collect(), 2));
        parts.push(spread(seconds("lost_steps"), 0));
        text.push_str(&format!("| {kind} | {} | {} |\n", recoveries.len(), parts.join(" | ")));
    }
    text.push_str("\n| fault | times | until a new step |\n|---|---|---|\n");
    let mut by_fault: BTreeMap<Kind, (usize, Vec<f64>)> = BTreeMap::new();
    for fault in runs.iter().flat_map(|run| &run.faults) {
        let entry = by_fault.entry(fault.kind).or_default();
        entry.0 += 1;
        entry.1.extend(fault.back_s);
    }
    for (kind, (count, back)) in by_fault {
        text.push_str(&format!("| {} | {count} | {} |\n", kind.name(), spread(back, 2)));
    }
    let all: Vec<f64> = runs.iter().flat_map(|run| &run.faults).filter_map(|fault| fault.back_s).collect();
    let count: usize = runs.iter().map(|run| run.faults.len()).sum();
    text.push_str(&format!("| all | {count} | {} |\n", spread(all, 2)));
    let shares: Vec<f64> = runs.iter().map(|run| run.useful_share * 100.0).collect();
    let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut sorted, count) = (shares, runs.len());
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    text.push_str(&format!(
        "\nuseful share of the time over {count} runs: {median:.1} % median, {least:.1} % at worst\n"
    ));
    text
}

/// Median and worst.
fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.last()) {
        (Some(median), Some(worst)) => format!("{median:.digits$}, at worst {worst:.digits$}"),
        _ => "-".to_owned(),
    }
}
