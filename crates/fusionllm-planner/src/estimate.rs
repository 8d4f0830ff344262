//! What ops, stages and cuts cost on which CompNode (the paper's workload estimator, section on the estimator; the
//! memory model is our reading).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use fusionllm_graph::{Kernels, OpDag, OpId};

use crate::pieces::{piece_ends, pieces};
use crate::{Cluster, CompNodeProfile, FpBp};

/// Times that UPDATE moves the parameters' bytes: AdamW reads four tensors and writes three.
const UPDATE_MOVES: f64 = 7.0;
/// FLOPs of an update per parameter.
const UPDATE_FLOPS: f64 = 16.0;

/// Bytes that cross a cut of the topological order, per micro-batch, dense.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CutBytes {
    /// Activations, forward.
    pub forward: f64,
    /// Gradients, backward.
    pub backward: f64,
}

/// Sums over the topological order for one model and micro-batch size; every question about a contiguous segment is
/// a difference of two of them.
#[derive(Clone, Debug)]
pub struct Estimate {
    ops: usize,
    fp_flops: Vec<f64>,
    bp_flops: Vec<f64>,
    bytes: Vec<f64>,
    kept: Vec<f64>,
    kept_fused: Vec<f64>,
    param_bytes: Vec<u64>,
    /// Of the parameters that are trained.
    trained_bytes: Vec<u64>,
    /// What the optimizer keeps of them, in multiples of their bytes.
    states: u32,
    cuts: Vec<CutBytes>,
    /// Where pieces of a stage end that makes its activations anew.
    piece_ends: Vec<usize>,
    /// Per distinct speed of a CompNode: sums of FP and of BP seconds.
    classes: BTreeMap<Class, (Vec<f64>, Vec<f64>)>,
}

/// CompNodes of one speed share their sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    speed: u64,
    memory: u64,
    /// Address of what was measured, which CompNodes of one kind share; 0 if nothing was.
    measured: usize,
    /// Whether BP does FP once more.
    recompute: bool,
}

impl Class {
    fn of(profile: &CompNodeProfile) -> Self {
        let speed = (profile.flop_per_s * profile.efficiency).to_bits();
        let measured = profile.measured.as_ref().map_or(0, |m| Arc::as_ptr(m) as usize);
        Self { speed, memory: profile.memory_bytes_per_s.to_bits(), measured, recompute: profile.recompute }
    }
}

impl Estimate {
    /// Estimates `dag` in micro-batches of `batch` samples on the CompNodes of `cluster`, with an optimizer that keeps so
    /// many states of a parameter.
    pub fn new(dag: &OpDag, batch: usize, cluster: &Cluster, states: u32) -> Self {
        let ops = dag.ops().len();
        let mut estimate = Self {
            ops,
            fp_flops: Vec::with_capacity(ops),
            bp_flops: Vec::with_capacity(ops),
            bytes: Vec::with_capacity(ops),
            kept: vec![0.0],
            kept_fused: vec![0.0],
            param_bytes: vec![0],
            trained_bytes: vec![0],
            states,
            cuts: cuts(dag, batch),
            piece_ends: piece_ends(dag),
            classes: BTreeMap::new(),
        };
        let mut seen = vec![false; dag.params().len()];
        for op in dag.op_ids() {
            let cost = dag.cost(op, batch);
            estimate.fp_flops.push(cost.fp_flops as f64);
            estimate.bp_flops.push(cost.bp_flops as f64);
            estimate.bytes.push((cost.read_bytes.saturating_add(cost.write_bytes)) as f64);
            push_sum(&mut estimate.kept, cost.kept_bytes as f64);
            push_sum(&mut estimate.kept_fused, dag.kept_bytes(op, batch, Kernels::Fused) as f64);
            let [mut own, mut trained] = [0u64; 2];
            for &param in &dag.op(op).params {
                // A shared parameter is counted once; whoever else holds it holds a copy, which the exact sum shows.
                if !std::mem::replace(&mut seen[param.index()], true) {
                    let param = dag.param(param);
                    own = own.saturating_add(param.bytes());
                    trained = trained.saturating_add(if param.frozen { 0 } else { param.bytes() });
                }
            }
            for (sums, more) in [(&mut estimate.param_bytes, own), (&mut estimate.trained_bytes, trained)] {
                let last = sums.last().copied().unwrap_or(0);
                sums.push(last.saturating_add(more));
            }
        }
        let is_measured = cluster.compnodes.iter().any(|c| c.measured.is_some());
        let works: Vec<String> =
            if is_measured { dag.op_ids().map(|op| dag.work(op, batch)).collect() } else { Vec::new() };
        for profile in &cluster.compnodes {
            estimate.add_class(profile, &works);
            // Who makes activations anew may turn out to have memory enough.
            if profile.recompute {
                estimate.add_class(&CompNodeProfile { recompute: false, ..profile.clone() }, &works);
            }
        }
        estimate
    }

    /// `works` has each op's work, if any CompNode was measured.
    fn add_class(&mut self, profile: &CompNodeProfile, works: &[String]) {
        let class = Class::of(profile);
        if self.classes.contains_key(&class) {
            return;
        }
        let (mut fp, mut bp) = (vec![0.0], vec![0.0]);
        for op in 0..self.ops {
            let measured = profile.measured.as_ref().and_then(|m| m.ops.get(works.get(op)?));
            if let Some(seconds) = measured {
                push_sum(&mut fp, seconds.fp_s);
                push_sum(&mut bp, if self.bp_flops[op] > 0.0 { seconds.bp_s } else { 0.0 });
                continue;
            }
            push_sum(&mut fp, profile.seconds(self.fp_flops[op], self.bytes[op]));
            // BP moves the same tensors twice: once for each of the gradients it makes.
            let has_bp = self.bp_flops[op] > 0.0;
            let bp_bytes = if has_bp { 2.0 * self.bytes[op] } else { 0.0 };
            push_sum(&mut bp, profile.seconds(self.bp_flops[op], bp_bytes));
        }
        if profile.recompute {
            bp.iter_mut().zip(&fp).for_each(|(bp, fp)| *bp += fp);
        }
        self.classes.insert(class, (fp, bp));
    }

    /// Number of ops.
    pub fn ops(&self) -> usize {
        self.ops
    }

    /// Seconds of FP and of BP of one micro-batch through a segment on a CompNode of the cluster.
    pub fn seconds(&self, profile: &CompNodeProfile, segment: &Range<usize>) -> FpBp {
        let Some((fp, bp)) = self.classes.get(&Class::of(profile)) else {
            return FpBp { fp_s: f64::INFINITY, bp_s: f64::INFINITY };
        };
        FpBp { fp_s: fp[segment.end] - fp[segment.start], bp_s: bp[segment.end] - bp[segment.start] }
    }

    /// Sums of FP and BP seconds over all ops before each position.
    pub(crate) fn sums(&self, profile: &CompNodeProfile) -> Option<(&[f64], &[f64])> {
        self.classes.get(&Class::of(profile)).map(|(fp, bp)| (fp.as_slice(), bp.as_slice()))
    }

    /// Bytes of the parameters of a segment, each counted where it is first used.
    pub fn param_bytes(&self, segment: &Range<usize>) -> u64 {
        self.param_bytes[segment.end] - self.param_bytes[segment.start]
    }

    /// Bytes that a CompNode keeps between FP and BP, with `live` micro-batches in flight: of all ops, or if it makes them
    /// anew of one piece, and what lies between pieces.
    pub fn kept_bytes(&self, profile: &CompNodeProfile, segment: &Range<usize>, live: u32) -> f64 {
        let kept = match profile.kernels {
            Kernels::Plain => &self.kept,
            Kernels::Fused => &self.kept_fused,
        };
        let of = |ops: &Range<usize>| kept[ops.end] - kept[ops.start];
        if !profile.recompute {
            return of(segment) * f64::from(live);
        }
        let pieces = || pieces(&self.piece_ends, segment);
        let most = pieces().map(|piece| of(&piece)).fold(0.0, f64::max);
        let between: f64 = pieces().skip(1).map(|piece| self.cut(piece.start).forward).sum();
        between * f64::from(live) + most
    }

    /// What crosses the cut before op `position`.
    pub fn cut(&self, position: usize) -> CutBytes {
        self.cuts.get(position).copied().unwrap_or_default()
    }

    /// Bytes that a segment needs on a CompNode with `live` micro-batches in flight.
    pub fn memory_bytes(&self, profile: &CompNodeProfile, segment: &Range<usize>, live: u32) -> f64 {
        let trained = self.trained_bytes[segment.end] - self.trained_bytes[segment.start];
        let state = training_bytes(self.param_bytes(segment), trained, self.states);
        state as f64 + self.kept_bytes(profile, segment, live)
    }
}

/// Bytes of parameters, and for the `trained` bytes of them of their gradients and of as many states of the optimizer.
pub(crate) fn training_bytes(params: u64, trained: u64, states: u32) -> u64 {
    trained.saturating_mul(1 + u64::from(states)).saturating_add(params)
}

/// Seconds of an UPDATE of this many bytes of f32 parameters.
pub(crate) fn update_seconds(profile: &CompNodeProfile, param_bytes: u64) -> f64 {
    let bytes = param_bytes as f64;
    if let Some(measured) = &profile.measured {
        return measured.update_s_per_byte * bytes;
    }
    profile.seconds(bytes / 4.0 * UPDATE_FLOPS, bytes * UPDATE_MOVES)
}

fn push_sum(sums: &mut Vec<f64>, value: f64) {
    sums.push(sums.last().copied().unwrap_or(0.0) + value);
}

/// What crosses the cut before each op: the outputs of earlier ops that a later one consumes. Placeholders do not
/// count: only the data owner has them, and they are a few bytes per token.
fn cuts(dag: &OpDag, batch: usize) -> Vec<CutBytes> {
    let ops = dag.ops().len();
    let mut changes = vec![CutBytes::default(); ops + 2];
    for op in dag.op_ids() {
        let is_placeholder = dag.op(op).inputs.is_empty();
        let Some(last) = dag.consumers(op).iter().map(|c: &OpId| c.index()).max() else { continue };
        if is_placeholder {
            continue;
        }
        let bytes = dag.op(op).output.bytes(batch) as f64;
        let backward = if dag.carries_gradient(op) { bytes } else { 0.0 };
        let (start, end) = (op.index() + 1, last + 1);
        changes[start].forward += bytes;
        changes[start].backward += backward;
        changes[end].forward -= bytes;
        changes[end].backward -= backward;
    }
    let mut sum = CutBytes::default();
    let mut cuts = Vec::with_capacity(ops + 1);
    for change in changes.into_iter().take(ops + 1) {
        sum = CutBytes { forward: sum.forward + change.forward, backward: sum.backward + change.backward };
        cuts.push(sum);
    }
    cuts
}

/// A stage as the paper's formula sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Station {
    /// C: seconds of FP and BP of a micro-batch.
    pub compute_s: f64,
    /// R: seconds of the transfers between this stage and the one before it, of a micro-batch, both directions.
    pub transfer_s: f64,
}

/// Seconds of a step by the paper's formula, Σ (C + R) + (n − 1)·max max(C, R): exact for a linear chain of stations.
pub fn pipeline_formula(stations: &[Station], micro_batches: u32) -> f64 {
    let fill: f64 = stations.iter().map(|s| s.compute_s + s.transfer_s).sum();
    let beat = stations.iter().map(|s| s.compute_s.max(s.transfer_s)).fold(0.0, f64::max);
    fill + f64::from(micro_batches.saturating_sub(1)) * beat
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::small_gpt2;

    #[test]
    fn a_cut_at_a_block_edge_carries_one_hidden_state() {
        let dag = small_gpt2(2);
        let estimate = Estimate::new(&dag, 2, &Cluster::uniform(1), 2);
        let hidden = 2.0 * 8.0 * 16.0 * 4.0;
        let after = |name: &str| estimate.cut(dag.find(name).unwrap().index() + 1);
        assert_eq!(after("h.0.add_2"), CutBytes { forward: hidden, backward: hidden });
        // Within a block the residual branch crosses too.
        assert_eq!(after("h.0.attn.c_proj"), CutBytes { forward: 2.0 * hidden, backward: 2.0 * hidden });
        assert_eq!(estimate.cut(0), CutBytes::default());
        assert_eq!(estimate.cut(dag.ops().len()), CutBytes::default());
    }

    #[test]
    fn segments_add_up_to_the_whole() {
        let dag = small_gpt2(2);
        let mut cluster = Cluster::uniform(2);
        cluster.compnodes[1].flop_per_s = 4.0;
        let estimate = Estimate::new(&dag, 2, &cluster, 2);
        let (n, node) = (dag.ops().len(), &cluster.compnodes[1]);
        let whole = estimate.seconds(node, &(0..n));
        let parts = [0..7, 7..n].map(|s| estimate.seconds(node, &s));
        assert!((parts[0].fp_s + parts[1].fp_s - whole.fp_s).abs() < 1e-6 * whole.fp_s);
        assert!((whole.fp_s - dag.total_cost(2).fp_flops as f64 / 4.0).abs() < 1e-6 * whole.fp_s);
        assert_eq!(estimate.param_bytes(&(0..n)), dag.param_bytes());
        assert!(estimate.memory_bytes(node, &(0..n), 2) > estimate.memory_bytes(node, &(0..n), 1));
        let without_states = Estimate::new(&dag, 2, &cluster, 0);
        let saved = estimate.memory_bytes(node, &(0..n), 1) - without_states.memory_bytes(node, &(0..n), 1);
        assert_eq!(saved, 2.0 * dag.param_bytes() as f64);
    }

    #[test]
    fn fused_kernels_keep_less_of_attention_than_plain_ones() {
        let dag = small_gpt2(2);
        let mut cluster = Cluster::uniform(3);
        cluster.compnodes[1].kernels = Kernels::Fused;
        // Who computes, and on how many threads, does not matter.
        cluster.compnodes[2].host = Some(crate::Host { name: "office".to_owned(), lanes: 1.0, threads: 2 });
        let estimate = Estimate::new(&dag, 2, &cluster, 2);
        let attention = dag.find("h.0.attn").unwrap().index();
        let kept = |node: usize, range| estimate.kept_bytes(&cluster.compnodes[node], &range, 1);
        // Two sequences of 8 tokens and 2 heads: 8 scores for each row, or the output of 16 and one number for each head.
        let rows = 2.0 * 8.0 * 4.0;
        assert_eq!(kept(0, attention..attention + 1), rows * (48.0 + 2.0 * 8.0));
        assert_eq!(kept(1, attention..attention + 1), rows * (48.0 + 16.0 + 2.0));
        assert_eq!(kept(2, 0..dag.ops().len()), kept(0, 0..dag.ops().len()));
    }

    #[test]
    fn what_was_measured_goes_before_what_follows_from_speeds() {
        let dag = small_gpt2(2);
        let mut cluster = Cluster::uniform(2);
        let linear = dag.find("h.0.attn.c_attn").unwrap();
        let ops = [(dag.work(linear, 2), FpBp { fp_s: 3.0, bp_s: 5.0 })].into();
        let measured = crate::Measured { ops, update_s_per_byte: 2.0, ..Default::default() };
        cluster.compnodes[1].measured = Some(Arc::new(measured));
        let estimate = Estimate::new(&dag, 2, &cluster, 2);
        let only = linear.index()..linear.index() + 1;
        assert_eq!(estimate.seconds(&cluster.compnodes[1], &only), FpBp { fp_s: 3.0, bp_s: 5.0 });
        assert!(estimate.seconds(&cluster.compnodes[0], &only).fp_s > 3.0);
        // What was not measured follows from the speeds.
        let other = only.end..only.end + 1;
        assert_eq!(
            estimate.seconds(&cluster.compnodes[0], &other).fp_s,
            estimate.seconds(&cluster.compnodes[1], &other).fp_s
        );
        assert_eq!(update_seconds(&cluster.compnodes[1], 4), 8.0);
    }

    #[test]
    fn a_slow_memory_bounds_what_has_few_flops() {
        let node = CompNodeProfile { memory_bytes_per_s: 10.0, ..CompNodeProfile::unit("x") };
        assert_eq!((node.seconds(100.0, 10.0), node.seconds(1.0, 100.0)), (100.0, 10.0));
    }

    #[test]
    fn the_formula_is_fill_plus_beats() {
        let (first, second) =
            (Station { compute_s: 2.0, transfer_s: 0.0 }, Station { compute_s: 1.0, transfer_s: 3.0 });
        assert_eq!(pipeline_formula(&[first, second], 4), 6.0 + 9.0);
        assert_eq!(pipeline_formula(&[first], 1), 2.0);
    }
}
