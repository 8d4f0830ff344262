//! What segments cost on CompNodes: codecs, bytes, seconds, memory, and a simulated step.

mod memory;

use fusionllm_codec::Codec;
use fusionllm_graph::{OpDag, OpId};

use crate::compression::{codec_s, compress_tied};
use crate::deferred::defer;
use crate::estimate::update_seconds;
use crate::placement::assemble;
use crate::{
    Cluster, Compression, Deferrable, Direction, Estimate, NodeIndex, Pipeline, Placement, PlanError, PlanSpec,
    Segment, Simulated, Stage, StageEdge, StepCosts, TiedParam, Way, compress, simulate,
};

/// How many times faster than the slowest stage the adaptive policy may make links.
const HEADROOMS: [u32; 5] = [1, 2, 4, 8, 16];
/// A step that is longer by this share is worth less compression.
const WORTH_COMPRESSING: f64 = 0.03;

/// A placement with its costs and its simulation.
pub(crate) struct Priced {
    pub(crate) placement: Placement,
    pub(crate) simulated: Simulated,
    pub(crate) ratios: Vec<(f64, f64)>,
    pub(crate) costs: StepCosts,
    /// By CompNode: what it needs, and what it has.
    pub(crate) memory: Vec<(f64, u64)>,
}

/// Micro-batches further ahead than 1F1B that are tried.
const RUN_AHEADS: [u32; 6] = [0, 1, 2, 4, 8, 16];
/// Tasks in a step beyond which orders are not tried, but taken as they are.
const FEW_TASKS: usize = 10_000;
/// A step that is longer by this share is worth fewer live micro-batches.
const WORTH_RUNNING_AHEAD: f64 = 0.03;

/// Micro-batches whose weight gradients wait at once that are tried.
const DEFERRED: [u32; 6] = [0, 1, 2, 4, 8, 16];
/// A step that is longer by this share is worth fewer weight gradients that wait.
const WORTH_DEFERRING: f64 = 0.03;

/// Prices segments in the end: with stages running as far ahead as the step gains from and memory holds, with weight
/// gradients that wait likewise, and links compressed as the policy says. 1F1B keeps few micro-batches live, but over
/// long links it waits for each of them to come back.
pub(crate) fn settle(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    segments: &[Segment],
    spec: &PlanSpec,
) -> Result<Priced, PlanError> {
    let micro_batches = spec.placement.micro_batches;
    let few_tasks = 2 * segments.len() * micro_batches as usize <= FEW_TASKS;
    let tries = |chosen: Option<u32>, tries: [u32; 6], most: u32| match chosen {
        None if few_tasks => tries.into_iter().filter(|&n| n < most).chain([most]).collect(),
        chosen => vec![chosen.unwrap_or(0)],
    };
    let run_aheads = match spec.placement.pipeline {
        Pipeline::OneFOneB => tries(spec.placement.run_ahead, RUN_AHEADS, micro_batches.saturating_sub(1)),
        Pipeline::GPipe => vec![0],
    };
    let try_one = |run_ahead: u32, deferred: Option<u32>| {
        let mut spec = spec.clone();
        (spec.placement.run_ahead, spec.placement.deferred) = (Some(run_ahead), deferred);
        match spec.compression {
            Compression::Adaptive { .. } => gentlest(dag, cluster, estimate, segments, &spec),
            _ => price(dag, cluster, estimate, segments.to_vec(), &spec),
        }
    };
    let deferred = tries(spec.placement.deferred, DEFERRED, micro_batches);
    let most = deferred.last().copied();
    let (run_ahead, _) = first_near_best(run_aheads, WORTH_RUNNING_AHEAD, |n| try_one(n, most))?;
    Ok(first_near_best(deferred, WORTH_DEFERRING, |n| try_one(run_ahead, Some(n)))?.1)
}

/// The first of `numbers` whose step is at most this share longer than the shortest, of those that memory holds. The
/// first one stays, whatever it needs: if that is too much, its error says so.
fn first_near_best(
    numbers: Vec<u32>,
    share: f64,
    price: impl Fn(u32) -> Result<Priced, PlanError>,
) -> Result<(u32, Priced), PlanError> {
    let mut priced = Vec::with_capacity(numbers.len());
    for number in numbers {
        let one = price(number)?;
        if priced.is_empty() || one.over_memory().is_none() {
            priced.push((number, one));
        }
    }
    let best = priced.iter().map(|(_, p)| p.simulated.step_s).fold(f64::INFINITY, f64::min);
    priced.into_iter().find(|(_, p)| p.simulated.step_s <= best * (1.0 + share)).ok_or(PlanError::Deadlock)
}

/// Prices segments with links as many times faster than the slowest stage as the step gains from, and no more: what is
/// not compressed loses nothing.
fn gentlest(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    segments: &[Segment],
    spec: &PlanSpec,
) -> Result<Priced, PlanError> {
    let price = |headroom: u32| price_at(dag, cluster, estimate, segments.to_vec(), spec, f64::from(headroom));
    Ok(first_near_best(HEADROOMS.to_vec(), WORTH_COMPRESSING, price)?.1)
}

/// Prices segments on `cluster`, whose CompNodes are in the placement's order.
pub(crate) fn price(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    segments: Vec<Segment>,
    spec: &PlanSpec,
) -> Result<Priced, PlanError> {
    let headroom = match spec.compression {
        // What is found in the end; the search need not know exactly.
        Compression::Adaptive { .. } => f64::from(HEADROOMS[HEADROOMS.len() / 2]),
        _ => 1.0,
    };
    price_at(dag, cluster, estimate, segments, spec, headroom)
}

/// As [`price`], with links up to `headroom` times faster than the slowest stage.
fn price_at(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    segments: Vec<Segment>,
    spec: &PlanSpec,
    headroom: f64,
) -> Result<Priced, PlanError> {
    let batch = spec.placement.micro_batch_size as usize;
    let ranges: Vec<_> = segments.iter().map(|s| s.ops.clone()).collect();
    let profile = |node: NodeIndex| &cluster.compnodes[node.index()];
    let mut stage_s: Vec<(f64, f64)> = segments.iter().map(|s| estimate.seconds(profile(s.compnode), &s.ops)).collect();
    let mut placement = assemble(dag, cluster, segments, &spec.placement, slowest_stage(&stage_s))?;
    add_copies(dag, &placement, profile, batch, &mut stage_s);
    let Sent { bytes: edge_bytes, codec_s, ratios } = send(dag, cluster, &mut placement, &stage_s, spec, headroom)?;
    compress_tied_params(dag, cluster, &mut placement, &stage_s, spec, headroom);
    let params = |node| placement.params_of(dag, node).into_iter().map(|p| dag.param(p).bytes()).sum::<u64>();
    let nodes = || (0..cluster.compnodes.len() as u32).map(NodeIndex);
    let most_deferred = spec.placement.deferred.unwrap_or(0);
    // The search prices many placements, none of which defers.
    let deferrable = if most_deferred > 0 {
        deferrable(dag, &placement, profile, estimate, batch)
    } else {
        vec![Deferrable::default(); placement.stages.len()]
    };
    let costs = StepCosts {
        deferrable,
        codec_s,
        edge_bytes,
        update_s: nodes()
            .map(|n| update_seconds(profile(n), params(n)) + profile(n).copy_s(tied_copies(dag, &placement, n)))
            .collect(),
        tied_bytes: placement.tied.iter().map(|t| tied_bytes(dag, &placement, t, batch)).collect::<Result<_, _>>()?,
        stage_s,
        clip: spec.clip,
    };
    let mut memory = memory::needed(dag, cluster, estimate, &placement, &ranges, spec);
    defer_weight_gradients(&mut placement, &costs.deferrable, most_deferred, &mut memory);
    let simulated = simulate(&placement, cluster, &costs)?;
    Ok(Priced { placement, simulated, ratios, costs, memory })
}

/// What BP may put off, by stage.
fn deferrable<'a>(
    dag: &OpDag,
    placement: &Placement,
    profile: impl Fn(NodeIndex) -> &'a crate::CompNodeProfile,
    estimate: &Estimate,
    batch: usize,
) -> Vec<Deferrable> {
    let of_stage = |stage: &Stage| {
        let bp_s = |op: OpId| estimate.seconds(profile(stage.compnode), &(op.index()..op.index() + 1)).1;
        Deferrable::of(dag, stage, &placement.tied, batch, bp_s)
    };
    placement.stages.iter().map(of_stage).collect()
}

/// Puts weight gradients of up to `limit` micro-batches off on each CompNode, or of as many as its memory holds.
fn defer_weight_gradients(placement: &mut Placement, deferrable: &[Deferrable], limit: u32, memory: &mut [(f64, u64)]) {
    for (index, order) in placement.train.orders.iter_mut().enumerate() {
        let own = placement.stages.iter().filter(|s| s.compnode.index() == index);
        let bytes = own.map(|s| deferrable[s.id.index()].bytes).fold(0.0, f64::max);
        let (needed, has) = &mut memory[index];
        if bytes > 0.0 {
            let held = ((*has as f64 - *needed) / bytes).max(0.0).min(f64::from(limit)) as u32;
            *order = defer(order, held as usize);
            *needed += f64::from(held) * bytes;
        }
    }
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

/// Bytes that each holder sends another.
fn tied_bytes(dag: &OpDag, placement: &Placement, tied: &TiedParam, batch: usize) -> Result<Vec<f64>, PlanError> {
    let shape = &dag.param(tied.param).shape;
    let columns = shape.iter().skip(1).product::<usize>();
    let bytes = |&holder: &NodeIndex| match placement.most_rows(dag, tied, holder, batch) {
        // With the number of each row.
        Some(rows) => Ok(rows as f64 * 4.0 * (columns + 1) as f64),
        None => tied.codec.steady_bytes(shape).map(|bytes| bytes as f64).map_err(PlanError::Codec),
    };
    tied.holders.iter().map(bytes).collect()
}

/// Seconds of the slowest stage for one micro-batch.
fn slowest_stage(stage_s: &[(f64, f64)]) -> f64 {
    stage_s.iter().map(|(fp, bp)| fp + bp).fold(0.0, f64::max)
}

/// Gives each tied parameter its codec. Links are compared by what a byte takes, as messages of edges and of tables have
/// nothing else in common.
fn compress_tied_params(
    dag: &OpDag,
    cluster: &Cluster,
    placement: &mut Placement,
    stage_s: &[(f64, f64)],
    spec: &PlanSpec,
    headroom: f64,
) {
    let byte_s = |a: usize, b: usize| cluster.link(a, b).occupied_s(1.0);
    let slowest = |pairs: &mut dyn Iterator<Item = (usize, usize)>| {
        pairs.filter(|(a, b)| a != b).map(|(a, b)| byte_s(a, b).max(byte_s(b, a))).fold(0.0, f64::max)
    };
    let node = |stage| placement.compnode_of(stage).map_or(0, NodeIndex::index);
    let of_edges = slowest(&mut placement.edges.iter().map(|e| (node(e.from), node(e.to))));
    for tied in &mut placement.tied {
        let param = dag.param(tied.param);
        let pairs = tied.holders.iter().flat_map(|a| tied.holders.iter().map(|b| (a.index(), b.index())));
        let between = slowest(&mut pairs.into_iter());
        let slowness = if of_edges > 0.0 { between / of_edges } else { 0.0 };
        let dense_s = between * param.bytes() as f64;
        let least_s = slowest_stage(stage_s) / headroom;
        tied.codec = compress_tied(spec.compression, &param.shape, dense_s, slowness, least_s);
    }
}

/// What is sent over each edge: bytes, seconds of encoding and decoding, and ratios of the activation and the gradient.
#[derive(Default)]
struct Sent {
    bytes: Vec<(f64, f64)>,
    codec_s: Vec<(f64, f64)>,
    pub(crate) ratios: Vec<(f64, f64)>,
}

/// Gives each boundary edge its codecs.
fn send(
    dag: &OpDag,
    cluster: &Cluster,
    placement: &mut Placement,
    stage_s: &[(f64, f64)],
    spec: &PlanSpec,
    headroom: f64,
) -> Result<Sent, PlanError> {
    let batch = spec.placement.micro_batch_size as usize;
    let node = |placement: &Placement, stage| placement.compnode_of(stage).map_or(0, NodeIndex::index);
    // Token ids and labels are sent as they are, and what stays on its CompNode is not sent.
    let is_sent = |placement: &Placement, edge: &StageEdge| edge.gradient && placement.is_boundary(edge);
    let mut directions = Vec::with_capacity(2 * placement.edges.len());
    for edge in placement.edges.iter().filter(|e| is_sent(placement, e)) {
        let output = &dag.op(edge.op).output;
        let (a, b) = (node(placement, edge.from), node(placement, edge.to));
        for (link, way) in [(cluster.link(a, b), Way::Activation), (cluster.link(b, a), Way::Gradient)] {
            let dense_s = link.occupied_s(output.bytes(batch) as f64);
            directions.push(Direction { shape: output.shape.resolve(batch), dense_s, way });
        }
    }
    let mut codecs =
        compress(spec.compression, &directions, slowest_stage(stage_s) / headroom, spec.placement.codec).into_iter();
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
        sent.codec_s.push((codec_s(edge.activation_codec, &shape), codec_s(edge.gradient_codec, &shape)));
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
}
