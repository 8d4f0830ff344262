//! The plan: a placement with what it is predicted to take.

use std::collections::BTreeMap;

use fusionllm_graph::OpDag;
use serde::{Deserialize, Serialize};

use crate::partition::{Chain, Judge, Pins, all_apart, best_of_all, check_stages, in_order, op_fence, refused};
use crate::price::{Memory, Priced, Pricing};
use crate::{
    Blame, Cluster, CompNodeProfile, Compression, Estimate, FpBp, Group, LinkUse, NodeIndex, Owner, Placement,
    PlacementSpec, PlanError, PlanSpec, Recompute, Route, Segment, Simulated, Stage, StageEdge, Station, StepCosts,
    Strategy, Way, Ways, format_bytes, pipeline_formula,
};

/// A CompNode has memory in abundance that holds so many times what the whole job takes.
const AMPLE_MEMORY: f64 = 2.0;
/// A step that is shorter by this share is worth making activations anew.
const WORTH_RECOMPUTING: f64 = 0.03;

/// What one CompNode is predicted to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompNodePrediction {
    /// Name of the CompNode.
    pub name: String,
    /// How many ops it holds.
    pub ops: usize,
    /// Elements of its parameters.
    pub parameters: u64,
    /// FP of a micro-batch through all its stages, in seconds.
    pub fp_s: f64,
    /// BP of a micro-batch through all its stages, in seconds.
    pub bp_s: f64,
    /// Weights, gradients, optimizer state, live activations and buffers, in bytes.
    pub memory_bytes: f64,
    /// Bytes that it has; nothing if boundless.
    pub memory_limit_bytes: Option<u64>,
    /// Share of the step for which it computes.
    pub busy: f64,
    /// Whether it makes activations anew in BP, which is part of `bp_s`, instead of keeping them all.
    #[serde(default)]
    pub recomputes: bool,
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
    /// Name of the CompNode that sends.
    pub from: String,
    /// Name of the CompNode that receives.
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
    /// What each CompNode does, in the placement's order.
    pub compnodes: Vec<CompNodePrediction>,
    /// What each direction of a link carries, of those that carry something.
    pub links: Vec<LinkPrediction>,
    /// What the step waits for, in words, the largest share first.
    pub critical_path: Vec<String>,
}

/// A placement with its prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Which CompNode holds which ops, and in which order each works.
    pub placement: Placement,
    /// The CompNodes and links that it uses, in its order.
    pub cluster: Cluster,
    /// By edge: dense bytes over sent bytes.
    pub ratios: Vec<Ways<f64>>,
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
    let found = match spec.recompute {
        Recompute::Never => find(dag, cluster, spec),
        Recompute::Always => find(dag, &cluster.recomputing(true), spec),
        Recompute::Auto => with_or_without_recompute(dag, cluster, spec),
    }?;
    Ok(found.priced.into_plan(dag, found.used, spec))
}

/// What a strategy found.
struct Found {
    /// The CompNodes of the segments, in the placement's order.
    used: Cluster,
    segments: Vec<Segment>,
    priced: Priced,
}

impl Found {
    fn step_s(&self) -> f64 {
        self.priced.simulated.step_s
    }

    /// The same cut, where each CompNode keeps its activations whose memory holds them.
    fn keeping_where_it_fits(self, dag: &OpDag, spec: &PlanSpec) -> Self {
        let estimate = Estimate::new(dag, spec.placement.micro_batch_size as usize, &self.used, spec.states);
        let mut best = self;
        for place in 0..best.used.compnodes.len() {
            let mut used = best.used.clone();
            used.compnodes[place].recompute = false;
            match Pricing::new(dag, &used, &estimate, spec).settle(&best.segments) {
                Ok(priced) if priced.over_memory().is_none() && priced.simulated.step_s <= best.step_s() => {
                    best = Self { used, priced, ..best };
                }
                Ok(_) | Err(_) => {}
            }
        }
        best
    }
}

/// What the strategy finds where activations are kept, or where they are made anew if memory does not hold them all and the
/// step is shorter so, or possible at all.
fn with_or_without_recompute(dag: &OpDag, cluster: &Cluster, spec: &PlanSpec) -> Result<Found, PlanError> {
    let placement = &spec.placement;
    let keeping = find(dag, cluster, spec);
    let estimate = Estimate::new(dag, placement.micro_batch_size as usize, cluster, spec.states);
    let holds_all = |profile: &CompNodeProfile| {
        let all = estimate.memory_bytes(profile, &(0..estimate.ops()), placement.micro_batches);
        AMPLE_MEMORY * all <= profile.memory_bytes as f64
    };
    if cluster.compnodes.iter().all(holds_all) {
        return keeping;
    }
    let anew = find(dag, &cluster.recomputing(true), spec).map(|found| found.keeping_where_it_fits(dag, spec));
    match (keeping, anew) {
        (Ok(keeping), Ok(anew)) if keeping.step_s() <= anew.step_s() * (1.0 + WORTH_RECOMPUTING) => Ok(keeping),
        (Ok(keeping), Err(_)) => Ok(keeping),
        // Where neither fits, the one that needs less says what lacks.
        (_, anew) => anew,
    }
}

/// The chain or the cut of the strategy, with its price.
fn find(dag: &OpDag, cluster: &Cluster, spec: &PlanSpec) -> Result<Found, PlanError> {
    let placement = &spec.placement;
    let batch = placement.micro_batch_size as usize;
    let estimate = Estimate::new(dag, batch, cluster, spec.states);
    let pins = Pins::of(dag, placement.private, placement.keep_blocks)?;
    let is_baseline = matches!(placement.strategy, Strategy::EqualNumber | Strategy::EqualCompute);
    let finish = |order: &[usize], segments: Vec<Segment>| -> Result<Found, PlanError> {
        let used = cluster.select(order);
        let priced = Pricing::new(dag, &used, &estimate, spec).settle(&segments)?;
        priced.over_memory().map_or(Ok(Found { used, segments, priced }), Err)
    };
    if is_baseline || !placement.stages.is_empty() {
        let by_number = placement.strategy == Strategy::EqualNumber;
        let own: Vec<usize> = (0..cluster.compnodes.len()).collect();
        let order = match placement.private && placement.stages.is_empty() {
            true => all_apart(cluster).ok_or_else(|| refused(cluster, None))?,
            false => own,
        };
        let used = cluster.select(&order);
        let segments = in_order(dag, &used, by_number, &placement.stages, &pins, batch)?;
        if placement.private {
            check_stages(&used, &segments)?;
        }
        return finish(&order, segments);
    }
    let search = |pins: &Pins| {
        let chain = search(dag, cluster, &estimate, pins, spec)?;
        finish(&chain.order, chain.segments(pins))
    };
    let found = search(&pins);
    let u_shape = Pins::u_shape(dag).filter(|_| !placement.private);
    match u_shape.filter(|u| *u != pins).map(|u| search(&u)) {
        Some(Ok(u)) if found.as_ref().map_or(true, |found| u.step_s() < found.step_s()) => Ok(u),
        _ if placement.private => found.map_err(|error| why_not(dag, cluster, spec, error)),
        _ => found,
    }
}

/// Why there is no placement of a private job: the organisations, if there would be one without them.
fn why_not(dag: &OpDag, cluster: &Cluster, spec: &PlanSpec, error: PlanError) -> PlanError {
    let mut nobodys = cluster.clone();
    if nobodys.compnodes.iter_mut().filter_map(|compnode| compnode.org.take()).count() == 0 {
        return error;
    }
    if find(dag, &nobodys, spec).is_ok() { refused(cluster, None) } else { error }
}

/// Seconds that a step takes by the cut of a placement that is at work, if machines and links are as `cluster` has them.
/// Task orders and codecs are chosen anew.
///
/// # Errors
/// A [`PlanError`], as where a CompNode of the placement is not in the cluster or cannot hold its part.
pub fn step_by_cut(dag: &OpDag, cluster: &Cluster, placement: &Placement, spec: &PlanSpec) -> Result<f64, PlanError> {
    cluster.validate()?;
    let place_of = |name: &String| {
        let at = cluster.compnodes.iter().position(|compnode| compnode.name == *name);
        at.ok_or_else(|| PlanError::Absent { name: name.clone() })
    };
    let order: Vec<usize> = placement.compnodes.iter().map(place_of).collect::<Result<_, _>>()?;
    let mut used = cluster.select(&order);
    for (node, compnode) in placement.nodes().zip(&mut used.compnodes) {
        compnode.recompute = placement.recomputes(node);
    }
    let segment = |stage: &Stage| {
        let (first, last) = (stage.ops.first()?.index(), stage.ops.last()?.index());
        Some(Segment { compnode: stage.compnode, ops: first..last + 1 })
    };
    let segments: Vec<Segment> = placement.stages.iter().filter_map(segment).collect();
    let estimate = Estimate::new(dag, spec.placement.micro_batch_size as usize, &used, spec.states);
    let priced = Pricing::new(dag, &used, &estimate, spec).settle(&segments)?;
    priced.over_memory().map_or(Ok(priced.simulated.step_s), Err)
}

/// The chain that the strategy finds, with these ops on the data owner.
fn search(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    pins: &Pins,
    spec: &PlanSpec,
) -> Result<Chain, PlanError> {
    let batch = spec.placement.micro_batch_size as usize;
    let owner = (spec.owner == Owner::First).then_some(NodeIndex::DATA_OWNER.index());
    let judge = Judge { dag, cluster, estimate, pins, spec, owner };
    let mut starts = baselines(dag, cluster, pins, batch);
    if spec.compression != Compression::Dense {
        // What is best dense is never slower compressed, so the search may not end behind it.
        let dense = PlanSpec { compression: Compression::Dense, ..spec.clone() };
        starts.extend(op_fence(&Judge { spec: &dense, ..judge }, starts.clone()));
    }
    let chain = op_fence(&judge, starts)?;
    if spec.placement.strategy == Strategy::Optimal { best_of_all(&judge, chain) } else { Ok(chain) }
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

impl Priced {
    fn into_plan(self, dag: &OpDag, cluster: Cluster, spec: &PlanSpec) -> Plan {
        let Self { placement, simulated, ratios, costs, memory } = self;
        let names = &placement.compnodes;
        let busy = simulated.busy(names.len());
        let compnode = |(index, name): (usize, &String)| {
            let node = NodeIndex(index as u32);
            let stages = || placement.stages_of(node);
            let seconds = |part: fn(&FpBp) -> f64| stages().map(|s| part(&costs.stage_s[s.id.index()])).sum();
            let Memory { needed, has } = memory[index];
            CompNodePrediction {
                name: name.clone(),
                ops: stages().map(|s| s.ops.len()).sum(),
                parameters: placement.params_of(dag, node).iter().map(|&p| dag.param(p).elements()).sum(),
                fp_s: seconds(|s| s.fp_s),
                bp_s: seconds(|s| s.bp_s),
                memory_bytes: needed,
                memory_limit_bytes: (has < u64::MAX).then_some(has),
                busy: busy[index],
                recomputes: placement.recomputes(node),
            }
        };
        let link = |(Route { from, to }, LinkUse { bytes, busy })| LinkPrediction {
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
            links: simulated.links().into_iter().filter(|(_, used)| used.bytes > 0.0).map(link).collect(),
            critical_path: simulated.critical_path(names).iter().map(Blame::to_string).collect(),
        };
        Plan { placement, cluster, ratios, prediction, simulated }
    }
}

/// The paper's formula for this placement: C of each stage, and R of what comes into it, both directions.
fn formula(placement: &Placement, cluster: &Cluster, costs: &StepCosts) -> f64 {
    let mut into: BTreeMap<usize, f64> = BTreeMap::new();
    let route = |edge: &StageEdge| placement.route(edge, Way::Activation).filter(|route| route.crosses());
    for (edge, route) in placement.edges.iter().filter_map(|edge| Some((edge, route(edge)?))) {
        let (a, b) = (route.from.index(), route.to.index());
        let Ways { activation, gradient } = costs.edge_bytes[edge.id.index()];
        let back_s = if gradient > 0.0 { cluster.link(b, a).transfer_s(gradient) } else { 0.0 };
        let seconds = cluster.link(a, b).transfer_s(activation) + back_s;
        *into.entry(edge.to.index()).or_default() += seconds;
    }
    let station = |stage: &Stage| Station {
        compute_s: costs.stage_s[stage.id.index()].both_s(),
        transfer_s: into.get(&stage.id.index()).copied().unwrap_or(0.0),
    };
    // Groups work side by side.
    let of_group = |group: Group<'_>| {
        let stations: Vec<Station> = group.stages.iter().map(station).collect();
        pipeline_formula(&stations, group.micro_batches.len() as u32)
    };
    placement.groups().map(of_group).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests;
