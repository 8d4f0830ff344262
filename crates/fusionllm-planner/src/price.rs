//! What segments cost on CompNodes: codecs, bytes, seconds, memory, and a simulated step.

mod memory;

use fusionllm_codec::Codec;
use fusionllm_graph::{OpDag, OpId};

use crate::assemble::assemble;
use crate::compression::{codec_s, compress_shared};
use crate::deferred::defer;
use crate::estimate::update_seconds;
use crate::{
    Cluster, CompNodeProfile, Compression, Deferrable, Direction, Estimate, FpBp, NodeIndex, Pieces, Pipeline,
    Placement, PlanError, PlanSpec, Segment, Shared, Simulated, Stage, StageEdge, StepCosts, Way, Ways, compress,
    simulate,
};

/// How many times faster than the slowest stage the adaptive policy may make links.
const HEADROOMS: [u32; 5] = [1, 2, 4, 8, 16];
/// A step that is longer by this share is worth less compression.
const WORTH_COMPRESSING: f64 = 0.03;

/// A placement with its costs and its simulation.
pub(crate) struct Priced {
    pub(crate) placement: Placement,
    pub(crate) simulated: Simulated,
    /// By edge: dense bytes over sent bytes.
    pub(crate) ratios: Vec<Ways<f64>>,
    pub(crate) costs: StepCosts,
    /// Memory that it takes, by CompNode in the placement's order.
    pub(crate) memory: Vec<Memory>,
}

/// The memory of a CompNode, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Memory {
    /// What its part of the job takes.
    pub(crate) needed: f64,
    /// What it has for the job; [`u64::MAX`] if there is no limit.
    pub(crate) has: u64,
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

/// What the price of segments depends on besides the segments.
#[derive(Clone, Copy)]
pub(crate) struct Pricing<'a> {
    dag: &'a OpDag,
    /// The CompNodes of the segments, in the placement's order.
    cluster: &'a Cluster,
    estimate: &'a Estimate,
    spec: &'a PlanSpec,
    /// How many times faster than the slowest stage compression may make links.
    headroom: f64,
}

impl<'a> Pricing<'a> {
    pub(crate) fn new(dag: &'a OpDag, cluster: &'a Cluster, estimate: &'a Estimate, spec: &'a PlanSpec) -> Self {
        let headroom = match spec.compression {
            // `settle` finds the right one; the search before it need not know exactly.
            Compression::Adaptive { .. } => f64::from(HEADROOMS[HEADROOMS.len() / 2]),
            _ => 1.0,
        };
        Self { dag, cluster, estimate, spec, headroom }
    }

    /// Prices the segments of the plan: stages run as far ahead as the step gains from and memory holds, as many weight
    /// gradients wait, and links are compressed as the policy says. 1F1B keeps few micro-batches live, but over long
    /// links it waits for each of them to come back.
    pub(crate) fn settle(&self, segments: &[Segment]) -> Result<Priced, PlanError> {
        let asked = &self.spec.placement;
        let micro_batches = asked.micro_batches;
        let few_tasks = 2 * segments.len() * micro_batches as usize <= FEW_TASKS;
        let tries = |chosen: Option<u32>, tries: [u32; 6], most: u32| match chosen {
            None if few_tasks => tries.into_iter().filter(|&n| n < most).chain([most]).collect(),
            chosen => vec![chosen.unwrap_or(0)],
        };
        let run_aheads = match asked.pipeline {
            Pipeline::OneFOneB => tries(asked.run_ahead, RUN_AHEADS, micro_batches.saturating_sub(1)),
            Pipeline::GPipe => vec![0],
        };
        let try_one = |run_ahead: u32, deferred: Option<u32>| {
            let mut spec = self.spec.clone();
            (spec.placement.run_ahead, spec.placement.deferred) = (Some(run_ahead), deferred);
            let pricing = Pricing { spec: &spec, ..*self };
            match spec.compression {
                Compression::Adaptive { .. } => pricing.gentlest(segments),
                _ => pricing.price(segments.to_vec()),
            }
        };
        let deferred = tries(asked.deferred, DEFERRED, micro_batches);
        let most = deferred.last().copied();
        let (run_ahead, _) = first_near_best(run_aheads, WORTH_RUNNING_AHEAD, |n| try_one(n, most))?;
        Ok(first_near_best(deferred, WORTH_DEFERRING, |n| try_one(run_ahead, Some(n)))?.1)
    }

    /// Prices segments with links as many times faster than the slowest stage as the step gains from, and no more: what
    /// is not compressed loses nothing.
    fn gentlest(&self, segments: &[Segment]) -> Result<Priced, PlanError> {
        let price = |headroom: u32| Self { headroom: f64::from(headroom), ..*self }.price(segments.to_vec());
        Ok(first_near_best(HEADROOMS.to_vec(), WORTH_COMPRESSING, price)?.1)
    }

    /// Prices segments with the run-ahead and the number of waiting weight gradients that the spec gives.
    pub(crate) fn price(&self, segments: Vec<Segment>) -> Result<Priced, PlanError> {
        let Self { dag, cluster, estimate, spec, .. } = *self;
        let batch = self.batch();
        let ranges: Vec<_> = segments.iter().map(|s| s.ops.clone()).collect();
        let seconds = |s: &Segment| estimate.seconds(self.profile(s.compnode), &s.ops);
        let mut stage_s: Vec<FpBp> = segments.iter().map(seconds).collect();
        let mut placement = assemble(dag, cluster, segments, &spec.placement, slowest_stage(&stage_s))?;
        self.add_copies(&placement, &mut stage_s);
        let Sent { bytes: edge_bytes, codec_s, ratios } = self.compress_edges(&mut placement, &stage_s)?;
        self.compress_shared_params(&mut placement, &stage_s);
        let update_s = |node: NodeIndex| {
            let profile = self.profile(node);
            update_seconds(profile, placement.trained_bytes_of(dag, node))
                + profile.copy_s(shared_copies(&placement, node))
        };
        let most_deferred = spec.placement.deferred.unwrap_or(0);
        // The search prices many placements, none of which defers.
        let deferrable = if most_deferred > 0 {
            self.deferrable(&placement)
        } else {
            vec![Deferrable::default(); placement.stages.len()]
        };
        let costs = StepCosts {
            deferrable,
            codec_s,
            edge_bytes,
            update_s: placement.nodes().map(update_s).collect(),
            shared_bytes: placement
                .shared
                .iter()
                .map(|s| shared_bytes(dag, &placement, s, batch))
                .collect::<Result<_, _>>()?,
            stage_s,
            clip: spec.clip,
        };
        let mut memory = memory::needed(self, &placement, &ranges);
        defer_weight_gradients(&mut placement, &costs.deferrable, most_deferred, &mut memory);
        let simulated = simulate(&placement, cluster, &costs)?;
        Ok(Priced { placement, simulated, ratios, costs, memory })
    }

    /// Samples in a micro-batch.
    fn batch(&self) -> usize {
        self.spec.placement.micro_batch_size as usize
    }

    fn profile(&self, node: NodeIndex) -> &'a CompNodeProfile {
        &self.cluster.compnodes[node.index()]
    }

    /// What BP may put off, by stage.
    fn deferrable(&self, placement: &Placement) -> Vec<Deferrable> {
        let of_stage = |stage: &Stage| {
            let profile = self.profile(stage.compnode);
            // What waits would have to be kept.
            if profile.recompute {
                return Deferrable::default();
            }
            let bp_s = |op: OpId| self.estimate.seconds(profile, &(op.index()..op.index() + 1)).bp_s;
            Deferrable::of(self.dag, stage, &placement.shared, self.batch(), bp_s)
        };
        placement.stages.iter().map(of_stage).collect()
    }

    /// Adds what a task takes besides its ops: the copies between host and device of what enters and leaves the stage.
    fn add_copies(&self, placement: &Placement, stage_s: &mut [FpBp]) {
        for edge in &placement.edges {
            let bytes = self.dag.op(edge.op).output.bytes(self.batch()) as f64;
            for stage in [edge.from, edge.to] {
                let Some(node) = placement.compnode_of(stage) else { continue };
                let copy = self.profile(node).copy_s(bytes);
                let seconds = &mut stage_s[stage.index()];
                seconds.fp_s += copy;
                seconds.bp_s += if edge.gradient { copy } else { 0.0 };
            }
        }
    }

    /// Gives each shared parameter its codec. Links are compared by what a byte takes, as messages of edges and of tables
    /// have nothing else in common.
    fn compress_shared_params(&self, placement: &mut Placement, stage_s: &[FpBp]) {
        let byte_s = |a: usize, b: usize| self.cluster.link(a, b).occupied_s(1.0);
        let slowest = |pairs: &mut dyn Iterator<Item = (usize, usize)>| {
            pairs.filter(|(a, b)| a != b).map(|(a, b)| byte_s(a, b).max(byte_s(b, a))).fold(0.0, f64::max)
        };
        let routes = placement.edges.iter().filter_map(|edge| placement.route(edge, Way::Activation));
        let of_edges = slowest(&mut routes.map(|route| (route.from.index(), route.to.index())));
        for shared in &mut placement.shared {
            let pairs = shared.holders.iter().flat_map(|a| shared.holders.iter().map(|b| (a.index(), b.index())));
            let between = slowest(&mut pairs.into_iter());
            let slowness = if of_edges > 0.0 { between / of_edges } else { 0.0 };
            let dense_s = between * shared.bytes() as f64;
            let least_s = slowest_stage(stage_s) / self.headroom;
            shared.codec = compress_shared(self.spec.compression, &shared.shape(self.dag), dense_s, slowness, least_s);
        }
    }

    /// Gives each boundary edge its codecs.
    fn compress_edges(&self, placement: &mut Placement, stage_s: &[FpBp]) -> Result<Sent, PlanError> {
        let Self { dag, cluster, spec, .. } = *self;
        let batch = self.batch();
        // Token ids and labels are sent as they are, and what stays on its CompNode is not sent.
        let sent_by = |placement: &Placement, edge: &StageEdge| {
            placement.route(edge, Way::Activation).filter(|route| edge.is_real(dag) && route.crosses())
        };
        let mut directions = Vec::with_capacity(2 * placement.edges.len());
        for (edge, route) in placement.edges.iter().filter_map(|edge| Some((edge, sent_by(placement, edge)?))) {
            let output = &dag.op(edge.op).output;
            let (a, b) = (route.from.index(), route.to.index());
            for way in edge.ways() {
                let link = if way == Way::Activation { cluster.link(a, b) } else { cluster.link(b, a) };
                let dense_s = link.occupied_s(output.bytes(batch) as f64);
                directions.push(Direction { shape: output.shape.resolve(batch), dense_s, way });
            }
        }
        let most_s = slowest_stage(stage_s) / self.headroom;
        let mut codecs = compress(spec.compression, &directions, most_s, spec.placement.codec).into_iter();
        let mut sent = Sent::default();
        for index in 0..placement.edges.len() {
            let compressed = sent_by(placement, &placement.edges[index]).is_some();
            let edge = &mut placement.edges[index];
            for way in edge.ways().filter(|_| compressed) {
                let Some(codec) = codecs.next() else { continue };
                match way {
                    Way::Activation => edge.activation_codec = codec,
                    Way::Gradient => edge.gradient_codec = codec,
                }
            }
            sent.add(edge, dag, batch)?;
        }
        Ok(sent)
    }
}

/// What is sent over each edge, for one micro-batch.
#[derive(Default)]
struct Sent {
    /// By edge, bytes of a message each way, as encoded.
    bytes: Vec<Ways<f64>>,
    /// Seconds of encoding and decoding, together.
    codec_s: Vec<Ways<f64>>,
    /// Dense bytes over sent bytes.
    ratios: Vec<Ways<f64>>,
}

impl Sent {
    /// Adds an edge, whose codecs are chosen.
    fn add(&mut self, edge: &StageEdge, dag: &OpDag, batch: usize) -> Result<(), PlanError> {
        let output = &dag.op(edge.op).output;
        let (shape, elements) = (output.shape.resolve(batch), output.shape.elements(batch) as f64);
        let bytes = |codec: Codec| codec.steady_bytes(&shape).map(|bytes| bytes as f64).map_err(PlanError::Codec);
        let (activation, gradient) = (bytes(edge.activation_codec)?, bytes(edge.gradient_codec)?);
        let bytes = Ways { activation, gradient: if edge.gradient { gradient } else { 0.0 } };
        self.ratios.push(bytes.map(|bytes| if bytes > 0.0 { 4.0 * elements / bytes } else { 1.0 }));
        self.bytes.push(bytes);
        self.codec_s.push(Ways::from_fn(|way| codec_s(edge.codec(way), &shape)));
        Ok(())
    }
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

/// Puts weight gradients of up to `limit` micro-batches off on each CompNode, or of as many as its memory holds.
fn defer_weight_gradients(placement: &mut Placement, deferrable: &[Deferrable], limit: u32, memory: &mut [Memory]) {
    for (index, order) in placement.train.orders.iter_mut().enumerate() {
        let own = placement.stages.iter().filter(|s| s.compnode.index() == index);
        let bytes = own.map(|s| deferrable[s.id.index()].bytes).fold(0.0, f64::max);
        let memory = &mut memory[index];
        if bytes > 0.0 {
            let waiting = ((memory.has as f64 - memory.needed) / bytes).max(0.0).min(f64::from(limit)) as u32;
            *order = defer(order, waiting as usize);
            memory.needed += f64::from(waiting) * bytes;
        }
    }
}

/// Bytes of shared gradients that a CompNode copies before UPDATE: its own to the host, the sum of all holders' back.
fn shared_copies(placement: &Placement, node: NodeIndex) -> f64 {
    let held = placement.shared.iter().filter(|s| s.holders.contains(&node));
    held.map(|s| s.bytes() as f64 * (1 + s.holders.len()) as f64).sum()
}

/// Bytes that each holder sends another.
fn shared_bytes(dag: &OpDag, placement: &Placement, shared: &Shared, batch: usize) -> Result<Vec<f64>, PlanError> {
    let shape = shared.shape(dag);
    let columns = Pieces::of(&shape).columns();
    let bytes = |&holder: &NodeIndex| match placement.most_rows(dag, shared, holder, batch) {
        // With the number of each row.
        Some(rows) => Ok(rows as f64 * 4.0 * (columns + 1) as f64),
        None => shared.codec.steady_bytes(&shape).map(|bytes| bytes as f64).map_err(PlanError::Codec),
    };
    shared.holders.iter().map(bytes).collect()
}

/// Seconds of the slowest stage for one micro-batch.
fn slowest_stage(stage_s: &[FpBp]) -> f64 {
    stage_s.iter().map(|s| s.both_s()).fold(0.0, f64::max)
}

impl Priced {
    /// The first CompNode whose memory does not hold its part.
    pub(crate) fn over_memory(&self) -> Option<PlanError> {
        let over = self.memory.iter().position(|m| m.needed > m.has as f64)?;
        let Memory { needed, has } = self.memory[over];
        let compnode = self.placement.compnodes[over].clone();
        Some(PlanError::OverMemory { compnode, needed_gb: needed / 1e9, memory_gb: has as f64 / 1e9 })
    }
}
