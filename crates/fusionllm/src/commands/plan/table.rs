//! One plan as tables.

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Plan, format_bytes, format_seconds};

use crate::render;

/// Links shown, the busiest first.
const MOST_LINKS: usize = 24;

/// Who holds what, what the links carry, and what a step takes.
pub(super) fn plan(dag: &OpDag, plan: &Plan) -> String {
    let prediction = &plan.prediction;
    let mut text = format!(
        "{:<16} {:>5} {:>12} {:>22} {:>11} {:>11} {:>6}  {}\n",
        "CompNode", "ops", "parameters", "memory", "FP", "BP", "busy", "from .. to"
    );
    for (node, index) in prediction.compnodes.iter().zip(0..) {
        text.push_str(&format!(
            "{:<16} {:>5} {:>12} {:>22} {:>11} {:>11} {:>4.0} %  {}\n",
            node.name,
            node.ops,
            node.parameters,
            node.memory(),
            format_seconds(node.fp_s),
            format_seconds(node.bp_s),
            node.busy * 100.0,
            plan.placement.pieces(dag, NodeIndex(index))
        ));
    }
    text.push_str(&render::shared(dag, &plan.placement));
    let anew: Vec<&str> = prediction.compnodes.iter().filter(|c| c.recomputes).map(|c| c.name.as_str()).collect();
    if !anew.is_empty() {
        text.push_str(&format!("  activations made anew in BP: {}\n", anew.join(", ")));
    }
    text.push_str(&links(plan));
    text.push_str(&format!("\npredicted step    {}\n", format_seconds(prediction.step_s)));
    text.push_str(&format!("by the formula    {}\n", format_seconds(prediction.formula_s)));
    text.push_str(&format!("speed             {:.1} tokens/s\n", prediction.tokens_per_s));
    let waits: Vec<&str> = prediction.critical_path.iter().take(3).map(String::as_str).collect();
    text.push_str(&format!("bottleneck        {}", waits.join("; ")));
    text
}

fn links(plan: &Plan) -> String {
    let mut links: Vec<_> = plan.prediction.links.iter().collect();
    if links.is_empty() {
        return String::new();
    }
    links.sort_by(|a, b| b.busy.total_cmp(&a.busy));
    let mut text = format!("\n{:<36} {:>12} {:>7} {:>6}\n", "link", "bytes a step", "ratio", "busy");
    for link in links.iter().take(MOST_LINKS) {
        let name = format!("{} → {}", link.from, link.to);
        let ratio = ratio(plan, &link.from, &link.to);
        text.push_str(&format!(
            "{name:<36} {:>12} {ratio:>7.1} {:>4.0} %\n",
            format_bytes(link.bytes),
            link.busy * 100.0
        ));
    }
    if links.len() > MOST_LINKS {
        text.push_str(&format!("and {} less busy ones\n", links.len() - MOST_LINKS));
    }
    text
}

/// The largest ratio of what goes this way.
fn ratio(plan: &Plan, from: &str, to: &str) -> f64 {
    let placement = &plan.placement;
    let name = |stage| {
        let node = placement.compnode_of(stage).and_then(|n| placement.compnodes.get(n.index()));
        node.map_or("", String::as_str)
    };
    let ratios = placement.edges.iter().zip(&plan.ratios).filter_map(|(edge, ratio)| {
        let ends = (name(edge.from), name(edge.to));
        if ends == (from, to) {
            Some(ratio.activation)
        } else if ends == (to, from) && edge.gradient {
            Some(ratio.gradient)
        } else {
            None
        }
    });
    ratios.reduce(f64::max).unwrap_or(1.0)
}
