//! Strategies and compressions side by side.

use fusionllm_planner::{Candidate, Compression, Strategy, format_bytes, format_seconds};
use serde::Serialize;

/// What was compared for one model on one cluster.
pub(super) struct Group {
    pub(super) model: String,
    pub(super) cluster: String,
    pub(super) candidates: Vec<Candidate>,
}

/// One plan, for JSON.
#[derive(Serialize)]
pub(super) struct Row {
    model: String,
    cluster: String,
    strategy: &'static str,
    compression: &'static str,
    /// Nothing if there is no such plan.
    step_s: Option<f64>,
    formula_s: Option<f64>,
    tokens_per_s: Option<f64>,
    bytes_per_step: Option<f64>,
    compnodes: Option<usize>,
    bottleneck: Option<String>,
    /// Why there is no such plan.
    error: Option<String>,
}

pub(super) fn rows(groups: &[Group]) -> Vec<Row> {
    groups.iter().flat_map(|group| group.candidates.iter().map(|c| row(group, c))).collect()
}

fn row(group: &Group, candidate: &Candidate) -> Row {
    let plan = candidate.plan.as_ref().ok();
    let prediction = plan.map(|p| &p.prediction);
    Row {
        model: group.model.clone(),
        cluster: group.cluster.clone(),
        strategy: candidate.strategy.name(),
        compression: candidate.compression.name(),
        step_s: prediction.map(|p| p.step_s),
        formula_s: prediction.map(|p| p.formula_s),
        tokens_per_s: prediction.map(|p| p.tokens_per_s),
        bytes_per_step: prediction.map(|p| p.links.iter().map(|l| l.bytes).sum()),
        compnodes: prediction.map(|p| p.compnodes.len()),
        bottleneck: prediction.and_then(|p| p.critical_path.first().cloned()),
        error: candidate.plan.as_ref().err().map(ToString::to_string),
    }
}

/// A table for each model and cluster, and one over all of them.
pub(super) fn tables(groups: &[Group], ratio: f64) -> String {
    let mut text = String::new();
    for group in groups {
        text.push_str(&format!("{} on {}\n", group.model, group.cluster));
        text.push_str(&format!(
            "{:<14} {:<13} {:>10} {:>12} {:>13} {:>9}  {}\n",
            "strategy", "compression", "step", "tokens/s", "bytes a step", "CompNodes", "bottleneck"
        ));
        for row in group.candidates.iter().map(|c| row(group, c)) {
            let head = format!("{:<14} {:<13}", row.strategy, row.compression);
            let line = match (row.step_s, row.error) {
                (Some(step_s), _) => format!(
                    "{head} {:>10} {:>12.1} {:>13} {:>9}  {}",
                    format_seconds(step_s),
                    row.tokens_per_s.unwrap_or_default(),
                    format_bytes(row.bytes_per_step.unwrap_or_default()),
                    row.compnodes.unwrap_or_default(),
                    row.bottleneck.unwrap_or_default()
                ),
                (None, error) => format!("{head} no plan: {}", error.unwrap_or_default()),
            };
            text.push_str(&line);
            text.push('\n');
        }
        text.push('\n');
    }
    text.push_str(&overview(groups, ratio));
    text
}

/// Step times, and how many times faster OP-Fence is than the faster baseline.
fn overview(groups: &[Group], ratio: f64) -> String {
    let mut text = format!(
        "| cluster | model | equal-number | equal-compute | op-fence | op-fence, AdaTopK {ratio}× | OP-Fence alone | \
         AdaTopK alone | both |\n|---|---|---|---|---|---|---|---|---|"
    );
    for group in groups {
        let step = |strategy: Strategy, is: fn(&Compression) -> bool| {
            let found = group.candidates.iter().find(|c| c.strategy == strategy && is(&c.compression));
            found.and_then(|c| c.plan.as_ref().ok()).map(|p| p.prediction.step_s)
        };
        let dense = |strategy| step(strategy, |c| *c == Compression::Dense);
        let ada = |strategy| step(strategy, |c| matches!(c, Compression::AdaTopk { .. }));
        let best = |of: &dyn Fn(Strategy) -> Option<f64>| {
            [of(Strategy::EqualNumber), of(Strategy::EqualCompute)].into_iter().flatten().reduce(f64::min)
        };
        let time = |seconds: Option<f64>| seconds.map_or_else(|| "does not fit".to_owned(), format_seconds);
        let times = |slow: Option<f64>, fast: Option<f64>| match (slow, fast) {
            (Some(slow), Some(fast)) => format!("{:.2}×", slow / fast),
            _ => "–".to_owned(),
        };
        let (fence, fence_ada) = (dense(Strategy::OpFence), ada(Strategy::OpFence));
        let (baseline, baseline_ada) = (best(&dense), best(&ada));
        text.push_str(&format!(
            "\n| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            group.cluster,
            group.model,
            time(dense(Strategy::EqualNumber)),
            time(dense(Strategy::EqualCompute)),
            time(fence),
            time(fence_ada),
            times(baseline, fence),
            times(baseline, baseline_ada),
            times(baseline, fence_ada)
        ));
    }
    text
}
