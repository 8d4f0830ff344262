//! The plan: a placement with what it is predicted to take.

use std::collections::BTreeMap;

use fusionllm_codec::Codec;
use fusionllm_graph::OpDag;
use serde::{Deserialize, Serialize};

use crate::compression::codec_s;
use crate::estimate::update_seconds;
use crate::partition::{Chain, Judge, Pins, best_of_all, in_order, op_fence};
use crate::placement::assemble;
use crate::{
    Blame, Cluster, Compression, Direction, Estimate, NodeIndex, Placement, PlacementSpec, PlanError, Segment,
    Simulated, StageEdge, StepCosts, Strategy, TRAINING_COPIES, compress, format_bytes, pipeline_formula, simulate,
};

/// Which CompNode owns the data and comes first in the pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// The cluster's first one.
    #[default]
    First,
    /// Whichever is best.
    Any,
}

/// What [`plan`] is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanSpec {
    /// Strategy, pipeline, micro-batches, codec.
    pub placement: PlacementSpec,
    /// What the links carry.
    pub compression: Compression,
    /// Who owns the data.
    pub owner: Owner,
    /// Whether senders keep what a gradient's codec dropped, which costs an f32 an element.
    pub error_feedback: bool,
    /// Whether gradients are clipped by the global norm, which costs two messages.
    pub clip: bool,
    /// Tokens in a step.
    pub tokens_per_step: u64,
}

impl PlanSpec {
    /// A plan of `placement` with nothing compressed, on the first CompNode's data.
    pub fn dense(placement: PlacementSpec) -> Self {
        let compression = Compression::Dense;
        Self { placement, compression, owner: Owner::First, error_feedback: false, clip: true, tokens_per_step: 0 }
    }
}

/// What one CompNode is predicted to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompNodePrediction {
    /// Its name.
    pub name: String,
    /// How many ops it holds.
    pub ops: usize,
    /// Elements of its parameters.
    pub parameters: u64,
    /// FP of a micro-batch through all its stages, in seconds.
    pub fp_s: f64,
    /// BP likewise.
    pub bp_s: f64,
    /// Weights, gradients, optimizer state, live activations and buffers, in bytes.
    pub memory_bytes: f64,
    /// Bytes that it has; nothing if boundless.
    pub memory_limit_bytes: Option<u64>,
    /// Share of the step for which it computes.
    pub busy: f64,
}

impl CompNodePrediction {
    /// Memory for people: what it needs, and of how much.
    pub fn memory(&self) -> String {
        let needed = format_bytes(self.memory_bytes);
        self.memory_limit_bytes
            .map_or_else(|| needed.clone(), |limit| format!("{needed} of {}", format_bytes(limit as f64)))
    }
}

/// What one direction of a link is predicted to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkPrediction {
    /// Sender.
    pub from: String,
    /// Receiver.
    pub to: String,
    /// Bytes in a step, as encoded.
    pub bytes: f64,
    /// Share of the step for which it is occupied.
    pub busy: f64,
}

/// What a step is predicted to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Seconds of a step, by simulation.
    pub step_s: f64,
    /// Seconds of a step by the paper's formula.
    pub formula_s: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// By CompNode.
    pub compnodes: Vec<CompNodePrediction>,
    /// By direction of a link that carries something.
    pub links: Vec<LinkPrediction>,
    /// What the step waits for, in words, the largest share first.
    pub critical_path: Vec<String>,
}

/// A placement with its prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Who holds what.
    pub placement: Placement,
    /// The CompNodes and links that it uses, in its order.
    pub cluster: Cluster,
    /// By edge: dense bytes over sent bytes of its activation and of its gradient.
    pub ratios: Vec<(f64, f64)>,
    /// What a step takes.
    pub prediction: Prediction,
    /// Every task and message of the simulated step.
    pub simulated: Simulated,
}

/// A placement of `dag` on `cluster` whose first CompNode owns the data.
///
/// # Errors
/// A [`PlanError`] that says what does not fit and what would.
pub fn place(dag: &OpDag, cluster: &Cluster, spec: &PlacementSpec) -> Result<Placement, PlanError> {
    Ok(plan(dag, cluster, &PlanSpec::dense(spec.clone()))?.placement)
}

/// Plans `dag` on `cluster` and predicts what a step takes.
///
/// # Errors
/// A [`PlanError`] that says what does not fit and what would.
pub fn plan(dag: &OpDag, cluster: &Cluster, spec: &PlanSpec) -> Result<Plan, PlanError> {
    let placement = &spec.placement;
    for (what, count) in [
        ("train.micro_batches", placement.micro_batches),
        ("the micro-batch size", placement.micro_batch_size),
        ("train.eval_batches", placement.eval_micro_batches),
    ] {
        if count == 0 {
            return Err(PlanError::Zero { what });
        }
    }
    cluster.validate()?;
    if dag.ops().is_empty() {
        return Err(PlanError::EmptyGraph);
    }
    let batch = placement.micro_batch_size as usize;
    let pins = Pins::of(dag, placement.private);
    let estimate = Estimate::new(dag, batch, cluster);
    let is_baseline = matches!(placement.strategy, Strategy::EqualNumber | Strategy::EqualCompute);
    let (order, segments) = if is_baseline || !placement.stages.is_empty() {
        let by_number = placement.strategy == Strategy::EqualNumber;
        let segments = in_order(dag, cluster, by_number, &placement.stages, &pins, batch)?;
        ((0..cluster.compnodes.len()).collect(), segments)
    } else {
        let owner = (spec.owner == Owner::First).then_some(0);
        let judge = Judge { dag, cluster, estimate: &estimate, pins: &pins, spec, owner };
        let mut starts = baselines(dag, cluster, &pins, batch);
        if spec.compression != Compression::Dense {
            // What is best dense is never slower compressed, so the search may not end behind it.
            let dense = PlanSpec { compression: Compression::Dense, ..spec.clone() };
            starts.extend(op_fence(&Judge { spec: &dense, ..judge }, starts.clone()));
        }
        let mut chain = op_fence(&judge, starts)?;
        if placement.strategy == Strategy::Optimal {
            chain = best_of_all(&judge, chain)?;
        }
        (chain.order.clone(), chain.segments(&pins))
    };
    let used = cluster.select(&order);
    let priced = price(dag, &used, &estimate, segments, spec)?;
    if let Some(error) = priced.over_memory() {
        return Err(error);
    }
    Ok(priced.into_plan(dag, used, spec))
}

/// The baselines' cuts on all CompNodes, as chains.
fn baselines(dag: &OpDag, cluster: &Cluster, pins: &Pins, batch: usize) -> Vec<Chain> {
    let chain = |by_number: bool| {
        let segments = in_order(dag, cluster, by_number, &[], pins, batch).ok()?;
        let n = cluster.compnodes.len();
        let mut ends: Vec<usize> = segments.iter().take(n).map(|s| s.ops.end).collect();
        if let Some(last) = ends.last_mut() {
            *last = pins.tail;
        }
        Some(Chain { order: (0..n).collect(), ends })
    };
    [true, false].into_iter().filter_map(chain).collect()
}

/// A placement with its costs and its simulation.
pub(crate) struct Priced {
    pub(crate) placement: Placement,
    pub(crate) simulated: Simulated,
    ratios: Vec<(f64, f64)>,
    costs: StepCosts,
    /// By CompNode: what it needs, and what it has.
    memory: Vec<(f64, u64)>,
}

/// Prices segments on `cluster`, whose CompNodes are in the placement's order.
pub(crate) fn price(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    segments: Vec<Segment>,
    spec: &PlanSpec,
) -> Result<Priced, PlanError> {
    let batch = spec.placement.micro_batch_size as usize;
    let ranges: Vec<_> = segments.iter().map(|s| s.ops.clone()).collect();
    let names = cluster.compnodes.iter().map(|c| c.name.clone()).collect();
    let mut placement = assemble(dag, names, segments, &spec.placement)?;
    let profile = |node: NodeIndex| &cluster.compnodes[node.index()];
    let mut stage_s: Vec<(f64, f64)> =
        placement.stages.iter().zip(&ranges).map(|(s, r)| estimate.seconds(profile(s.compnode), r)).collect();
    add_copies(dag, &placement, profile, batch, &mut stage_s);
    let Sent { bytes: edge_bytes, codec_s, ratios } = send(dag, cluster, &mut placement, &stage_s, spec)?;
    let params = |node| placement.params_of(dag, node).into_iter().map(|p| dag.param(p).bytes()).sum::<u64>();
    let nodes = || (0..cluster.compnodes.len() as u32).map(NodeIndex);
    let costs = StepCosts {
        codec_s,
        edge_bytes,
        update_s: nodes()
            .map(|n| update_seconds(profile(n), params(n)) + profile(n).copy_s(tied_copies(dag, &placement, n)))
            .collect(),
        tied_bytes: placement.tied.iter().map(|t| dag.param(t.param).bytes() as f64).collect(),
        stage_s,
        clip: spec.clip,
    };
    let mut memory: Vec<(f64, u64)> =
        nodes().map(|n| ((params(n) * TRAINING_COPIES) as f64, profile(n).memory_bytes)).collect();
    for node in nodes() {
        let live = placement.live_bound(node);
        for (stage, range) in placement.stages.iter().zip(&ranges).filter(|(s, _)| s.compnode == node) {
            let count = live.get(&stage.id).copied().unwrap_or(1);
            memory[node.index()].0 += estimate.kept_bytes(range) * f64::from(count);
        }
    }
    for edge in placement.edges.iter().filter(|e| placement.is_boundary(e)) {
        // A message is held while it is sent, and while it waits to be taken.
        let bytes = dag.op(edge.op).output.bytes(batch) as f64;
        for stage in [edge.from, edge.to] {
            if let Some(node) = placement.compnode_of(stage) {
                memory[node.index()].0 += 2.0 * bytes;
            }
        }
        let feeds_back = spec.error_feedback && edge.gradient && !edge.gradient_codec.is_lossless();
        if let (true, Some(sender)) = (feeds_back, placement.compnode_of(edge.to)) {
            memory[sender.index()].0 += bytes;
        }
    }
    let simulated = simulate(&placement, cluster, &costs)?;
    Ok(Priced { placement, simulated, ratios, costs, memory })
}

/// What a task takes besides its ops: the copies between host and device of what enters and leaves the stage.
fn add_copies<'a>(
    dag: &OpDag,
    placement: &Placement,
    profile: impl Fn(NodeIndex) -> &'a crate::CompNodeProfile,
    batch: usize,
    stage_s: &mut [(f64, f64)],
) {
    for edge in &placement.edges {
        let bytes = dag.op(edge.op).output.bytes(batch) as f64;
        for stage in [edge.from, edge.to] {
            let Some(node) = placement.compnode_of(stage) else { continue };
            let copy = profile(node).copy_s(bytes);
            let seconds = &mut stage_s[stage.index()];
            *seconds = (seconds.0 + copy, seconds.1 + if edge.gradient { copy } else { 0.0 });
        }
    }
}

/// Bytes of tied gradients that a CompNode copies before UPDATE: its own to the host, the sum of all holders' back.
fn tied_copies(dag: &OpDag, placement: &Placement, node: NodeIndex) -> f64 {
    let held = placement.tied.iter().filter(|t| t.holders.contains(&node));
    held.map(|t| dag.param(t.param).bytes() as f64 * (1 + t.holders.len()) as f64).sum()
}

/// What is sent over each edge: bytes, seconds of encoding and decoding, and ratios of the activation and the gradient.
#[derive(Default)]
struct Sent {
    bytes: Vec<(f64, f64)>,
    codec_s: Vec<(f64, f64)>,
    ratios: Vec<(f64, f64)>,
}

/// Gives each boundary edge its codecs.
fn send(
    dag: &OpDag,
    cluster: &Cluster,
    placement: &mut Placement,
    stage_s: &[(f64, f64)],
    spec: &PlanSpec,
) -> Result<Sent, PlanError> {
    let batch = spec.placement.micro_batch_size as usize;
    let node = |placement: &Placement, stage| placement.compnode_of(stage).map_or(0, NodeIndex::index);
    // Token ids and labels are sent as they are, and what stays on its CompNode is not sent.
    let is_sent = |placement: &Placement, edge: &StageEdge| edge.gradient && placement.is_boundary(edge);
    let mut directions = Vec::with_capacity(2 * placement.edges.len());
    for edge in placement.edges.iter().filter(|e| is_sent(placement, e)) {
        let output = &dag.op(edge.op).output;
        let (a, b) = (node(placement, edge.from), node(placement, edge.to));
        for (link, gradient) in [(cluster.link(a, b), false), (cluster.link(b, a), true)] {
            let dense_s = link.occupied_s(output.bytes(batch) as f64);
            directions.push(Direction { shape: output.shape.resolve(batch), dense_s, gradient });
        }
    }
    let slowest = stage_s.iter().map(|(fp, bp)| fp + bp).fold(0.0, f64::max);
    let mut codecs = compress(spec.compression, &directions, slowest, spec.placement.codec).into_iter();
    let mut sent = Sent::default();
    for index in 0..placement.edges.len() {
        let compressed = is_sent(placement, &placement.edges[index]);
        let edge = &mut placement.edges[index];
        if compressed && let (Some(there), Some(back)) = (codecs.next(), codecs.next()) {
            (edge.activation_codec, edge.gradient_codec) = (there, back);
        }
        let output = &dag.op(edge.op).output;
        let (shape, elements) = (output.shape.resolve(batch), output.shape.elements(batch) as f64);
        let bytes = |codec: Codec| codec.steady_bytes(&shape).map(|bytes| bytes as f64).map_err(PlanError::Codec);
        let (there, back) = (bytes(edge.activation_codec)?, bytes(edge.gradient_codec)?);
        let (there, back) = (there, if edge.gradient { back } else { 0.0 });
        let ratio = |bytes: f64| if bytes > 0.0 { 4.0 * elements / bytes } else { 1.0 };
        sent.ratios.push((ratio(there), ratio(back)));
        sent.bytes.push((there, back));
        sent.codec_s.push((codec_s(edge.activation_codec, elements), codec_s(edge.gradient_codec, elements)));
    }
    Ok(sent)
}

impl Priced {
    /// The first CompNode whose memory does not hold its part.
    pub(crate) fn over_memory(&self) -> Option<PlanError> {
        let over = self.memory.iter().position(|&(needed, limit)| needed > limit as f64)?;
        let (needed, limit) = self.memory[over];
        let compnode = self.placement.compnodes[over].clone();
        Some(PlanError::OverMemory { compnode, needed_gb: needed / 1e9, memory_gb: limit as f64 / 1e9 })
    }

    fn into_plan(self, dag: &OpDag, cluster: Cluster, spec: &PlanSpec) -> Plan {
        let Self { placement, simulated, ratios, costs, memory } = self;
        let names = &placement.compnodes;
        let busy = simulated.busy(names.len());
        let compnode = |(index, name): (usize, &String)| {
            let node = NodeIndex(index as u32);
            let stages = || placement.stages_of(node);
            let seconds = |part: fn(&(f64, f64)) -> f64| stages().map(|s| part(&costs.stage_s[s.id.index()])).sum();
            let (memory_bytes, limit) = memory[index];
            CompNodePrediction {
                name: name.clone(),
                ops: stages().map(|s| s.ops.len()).sum(),
                parameters: placement.params_of(dag, node).iter().map(|&p| dag.param(p).elements()).sum(),
                fp_s: seconds(|s| s.0),
                bp_s: seconds(|s| s.1),
                memory_bytes,
                memory_limit_bytes: (limit < u64::MAX).then_some(limit),
                busy: busy[index],
            }
        };
        let link = |((from, to), (bytes, busy)): ((NodeIndex, NodeIndex), (f64, f64))| LinkPrediction {
            from: names[from.index()].clone(),
            to: names[to.index()].clone(),
            bytes,
            busy,
        };
        let step_s = simulated.step_s;
        let prediction = Prediction {
            step_s,
            formula_s: formula(&placement, &cluster, &costs),
            tokens_per_s: spec.tokens_per_step as f64 / step_s,
            compnodes: names.iter().enumerate().map(compnode).collect(),
            links: simulated.links().into_iter().filter(|(_, (bytes, _))| *bytes > 0.0).map(link).collect(),
            critical_path: simulated.critical_path(names).iter().map(Blame::to_string).collect(),
        };
        Plan { placement, cluster, ratios, prediction, simulated }
    }
}

/// The paper's formula for this placement: C of each stage, and R of what comes into it, both directions.
fn formula(placement: &Placement, cluster: &Cluster, costs: &StepCosts) -> f64 {
    let mut into: BTreeMap<usize, f64> = BTreeMap::new();
    for edge in placement.edges.iter().filter(|e| placement.is_boundary(e)) {
        let node = |stage| placement.compnode_of(stage).map_or(0, NodeIndex::index);
        let (a, b) = (node(edge.from), node(edge.to));
        let (there, back) = costs.edge_bytes[edge.id.index()];
        let seconds =
            cluster.link(a, b).transfer_s(there) + if back > 0.0 { cluster.link(b, a).transfer_s(back) } else { 0.0 };
        *into.entry(edge.to.index()).or_default() += seconds;
    }
    let stages: Vec<(f64, f64)> = costs
        .stage_s
        .iter()
        .enumerate()
        .map(|(index, (fp, bp))| (fp + bp, into.get(&index).copied().unwrap_or(0.0)))
        .collect();
    pipeline_formula(&stages, placement.train.micro_batches)
}

#[cfg(test)]
mod tests;
