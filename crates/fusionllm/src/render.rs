//! Reports as text and as JSON, from the same types.

use std::collections::BTreeSet;
use std::io::Write;

use anyhow::Context;
use fusionllm_graph::OpDag;
use fusionllm_planner::{Placement, format_bytes};
use fusionllm_protocol::{JobState, StatusReport};
use serde::Serialize;

/// Prints one JSON document or line to standard output.
pub(crate) fn json<T: Serialize>(value: &T, pretty: bool) -> anyhow::Result<()> {
    let text = if pretty { serde_json::to_string_pretty(value)? } else { serde_json::to_string(value)? };
    line(&text)
}

/// Prints a line to standard output; a closed pipe is an error that the exit code forgives.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("standard output cannot be written")
}

/// A job's state in a few words.
pub(crate) fn state(state: &JobState) -> String {
    match state {
        JobState::Waiting { reason } => format!("waiting: {reason}"),
        JobState::Preparing => "preparing".to_owned(),
        JobState::Running => "running".to_owned(),
        JobState::Done => "done".to_owned(),
        JobState::Failed { reason, .. } => format!("failed: {reason}"),
        JobState::Stopped => "stopped".to_owned(),
    }
}

/// How far the data is read.
pub(crate) fn reading(done: u64, total: u64) -> String {
    let share = 100.0 * done as f64 / total.max(1) as f64;
    format!("{share:.0} % of {} of data is read", format_bytes(total as f64))
}

/// Jobs and CompNodes as two tables.
pub(crate) fn status(report: &StatusReport) -> String {
    let mut text = report.trouble.as_ref().map_or_else(String::new, |trouble| format!("{trouble}\n\n"));
    if report.jobs.is_empty() {
        text.push_str("no jobs\n");
    } else {
        text.push_str(&format!("{:<5} {:<20} {:>13} {:>9}  {}\n", "job", "name", "step", "loss", "state"));
    }
    for job in &report.jobs {
        let step = format!("{}/{}", job.step, job.steps);
        let loss = job.loss.map_or_else(|| "-".to_owned(), |l| format!("{l:.4}"));
        let mut state = job.standstill.as_ref().map_or_else(|| state(&job.state), ToString::to_string);
        if let Some((done, total)) = job.reading.filter(|(_, total)| *total > 0) {
            state.push_str(&format!(", {}", reading(done, total)));
        }
        text.push_str(&format!("{:<5} {:<20} {step:>13} {loss:>9}  {state}\n", job.job.0, job.name));
    }
    text.push('\n');
    if report.compnodes.is_empty() {
        text.push_str("no CompNodes have joined");
    } else {
        text.push_str(&format!("{:<20} {:<12} {:<20} {}", "CompNode", "id", "device", "job"));
    }
    for node in &report.compnodes {
        let mut job = node.job.map_or_else(|| "idle".to_owned(), |j| j.0.to_string());
        if node.is_leaving {
            job.push_str(", leaving");
        }
        if let Some(org) = &node.org {
            job.push_str(&format!(", of {org}"));
        }
        text.push_str(&format!("\n{:<20} {:<12} {:<20} {job}", node.name, node.id, node.device));
    }
    if !report.relayed.is_empty() {
        let links: Vec<String> = report.relayed.iter().map(|(a, b)| format!("{a} - {b}")).collect();
        text.push_str(&format!("\n\nover the relay: {}", links.join(", ")));
    }
    text
}

/// A placement as a table: a line a stage, a line a boundary edge.
pub(crate) fn placement(dag: &OpDag, placement: &Placement, micro_batch_size: usize) -> String {
    let mut text = format!("{:<6} {:<14} {:>5} {:>12}  {}\n", "stage", "CompNode", "ops", "parameters", "from .. to");
    let mut counted = BTreeSet::new();
    for stage in &placement.stages {
        let name = placement.compnodes.get(stage.compnode.index()).map_or("?", String::as_str);
        // A CompNode holds a parameter once, in however many of its stages it is used.
        let all = stage.ops.iter().flat_map(|&op| dag.op(op).params.iter().copied());
        let new = all.filter(|&param| counted.insert((stage.compnode, param)));
        let params: u64 = new.map(|param| dag.param(param).elements()).sum();
        let end = |op: Option<&fusionllm_graph::OpId>| op.map_or("-", |&op| dag.op(op).name.as_str());
        text.push_str(&format!(
            "{:<6} {name:<14} {:>5} {params:>12}  {} .. {}\n",
            stage.id.0,
            stage.ops.len(),
            end(stage.ops.first()),
            end(stage.ops.last())
        ));
    }
    let boundary: Vec<_> = placement.edges.iter().filter(|e| placement.is_boundary(e)).collect();
    if !boundary.is_empty() {
        text.push_str("\nboundary edges, dense bytes per micro-batch and direction\n");
    }
    for edge in boundary {
        let name = |stage| {
            let node = placement.compnode_of(stage).and_then(|n| placement.compnodes.get(n.index()));
            node.map_or("?", String::as_str)
        };
        let op = dag.op(edge.op);
        let arrow = if edge.gradient { "<->" } else { "-->" };
        text.push_str(&format!(
            "  {} {arrow} {}  {:<20} {:>12}  {}\n",
            name(edge.from),
            name(edge.to),
            op.name,
            op.output.bytes(micro_batch_size),
            edge.activation_codec.name()
        ));
    }
    text.push_str(&shared(dag, placement));
    text.trim_end().to_owned()
}

/// Parameters of which several CompNodes hold a copy, a line each: tables that count what each holds have them more than
/// once.
pub(crate) fn shared(dag: &OpDag, placement: &Placement) -> String {
    let mut lines = String::new();
    for shared in &placement.shared {
        let holders: Vec<_> =
            shared.holders.iter().filter_map(|n| placement.compnodes.get(n.index())).cloned().collect();
        let holders = holders.join(", ");
        for &param in &shared.params {
            let (name, elements) = (&dag.param(param).name, dag.param(param).elements());
            let line = format!("  tied: {name}, one parameter of {elements} elements, counted in each of {holders}\n");
            lines.push_str(&line);
        }
    }
    lines
}
