//! OP-Fence (the paper's scheduler): communities of fast links in a line, cuts by dynamic programming, and then what
//! the simulator says. The paper is silent on search after the cut; that part is ours.

use std::collections::BTreeSet;

use fusionllm_graph::OpDag;

use super::chain::{Chain, Weights};
use super::order::line;
use super::orgs::{all_apart, are_apart, with_neighbours_apart};
use super::search::{improve, is_valid};
use super::{Pins, optimal};
use crate::price::{Priced, Pricing};
use crate::{Cluster, Estimate, PlanError, PlanSpec, Station, pipeline_formula};

/// Work that one plan may take, in simulated tasks and placed ops: about a second.
const WORK_BUDGET: usize = 1_500_000;
/// Beyond this many tasks a chain is judged by the formula.
const MOST_TASKS: usize = 20_000;
/// Communities that are tried on their own, the fastest ones.
const COMMUNITIES: usize = 6;
/// Chains, each on other CompNodes or in another order, that are searched around.
const STARTS: usize = 6;

/// Everything that a chain is judged by.
#[derive(Clone, Copy)]
pub(crate) struct Judge<'a> {
    pub(crate) dag: &'a OpDag,
    pub(crate) cluster: &'a Cluster,
    pub(crate) estimate: &'a Estimate,
    pub(crate) pins: &'a Pins,
    pub(crate) spec: &'a PlanSpec,
    /// The CompNode that must be first, if that is fixed.
    pub(crate) owner: Option<usize>,
}

impl Judge<'_> {
    /// Predicted seconds of a step; infinite if a CompNode's memory does not hold it, or it brings machines of one
    /// organisation together that must be apart.
    pub(crate) fn seconds(&self, chain: &Chain) -> f64 {
        if self.spec.placement.private && !are_apart(self.cluster, &chain.order) {
            return f64::INFINITY;
        }
        if self.tasks(chain) > MOST_TASKS {
            return self.by_formula(chain);
        }
        match self.price(chain) {
            Ok(priced) if priced.over_memory().is_none() => priced.simulated.step_s,
            Ok(_) | Err(_) => f64::INFINITY,
        }
    }

    pub(crate) fn price(&self, chain: &Chain) -> Result<Priced, PlanError> {
        let cluster = self.cluster.select(&chain.order);
        Pricing::new(self.dag, &cluster, self.estimate, self.spec).price(chain.segments(self.pins))
    }

    fn tasks(&self, chain: &Chain) -> usize {
        2 * chain.order.len() * self.spec.placement.micro_batches as usize
    }

    fn weights(&self) -> Weights<'_> {
        Weights {
            estimate: self.estimate,
            cluster: self.cluster,
            pins: self.pins,
            compression: self.spec.compression,
            codec_ratio: self.spec.placement.codec.ratio(),
            pipeline: self.spec.placement.pipeline,
            micro_batches: self.spec.placement.micro_batches,
            private: self.spec.placement.private,
        }
    }

    fn by_formula(&self, chain: &Chain) -> f64 {
        let weights = self.weights();
        let mut stations = Vec::with_capacity(chain.order.len());
        let mut start = 0;
        for (place, &end) in chain.ends.iter().enumerate() {
            let device = chain.order[place];
            let seconds = self.estimate.seconds(&self.cluster.compnodes[device], &(start..end));
            let transfer_s = match place.checked_sub(1).and_then(|before| chain.order.get(before)) {
                Some(&before) => weights.crossing(before, device, start),
                None => 0.0,
            };
            stations.push(Station { compute_s: seconds.both_s(), transfer_s });
            start = end;
        }
        pipeline_formula(&stations, self.spec.placement.micro_batches)
    }

    /// Bytes of a typical message: the median cut.
    fn typical_bytes(&self) -> f64 {
        let mut cuts: Vec<f64> = (1..self.estimate.ops()).map(|p| self.estimate.cut(p).forward).collect();
        cuts.sort_by(f64::total_cmp);
        cuts.get(cuts.len() / 2).copied().unwrap_or(0.0)
    }
}

/// The chain that OP-Fence finds. `baselines` are chains that it must not be slower than.
///
/// # Errors
/// [`PlanError::OpTooLarge`] or [`PlanError::NoFit`] if no CompNodes hold the job.
pub(crate) fn op_fence(judge: &Judge<'_>, baselines: Vec<Chain>) -> Result<Chain, PlanError> {
    let mut candidates: Vec<Chain> = baselines;
    let weights = judge.weights();
    for order in orders(judge) {
        candidates.extend(weights.cuts(&order));
    }
    candidates.retain(|c| is_valid(c, judge.pins));
    let mut timed: Vec<(f64, Chain)> = candidates.into_iter().map(|c| (judge.seconds(&c), c)).collect();
    timed.retain(|(seconds, _)| seconds.is_finite());
    timed.sort_by(|a, b| a.0.total_cmp(&b.0));
    // The best cut of each order is enough: the search moves cuts, but it leaves few orders for good.
    let mut seen = BTreeSet::new();
    timed.retain(|(_, chain)| seen.insert(chain.order.clone()));
    let Some((_, first)) = timed.first() else { return Err(no_fit(judge)) };
    let mut budget = WORK_BUDGET / (judge.tasks(first) + judge.estimate.ops());
    if judge.tasks(first) > MOST_TASKS {
        return Ok(first.clone());
    }
    let devices = judge.cluster.compnodes.len();
    let fixed = judge.owner.is_some();
    let mut best = (first.clone(), timed[0].0);
    let starts = timed.len().min(STARTS);
    for (index, (_, chain)) in timed.into_iter().take(starts).enumerate() {
        let mut share = budget / (starts - index);
        budget -= share;
        let found = improve(chain, devices, judge.pins, fixed, &mut share, |c| judge.seconds(c));
        budget += share;
        if found.1 < best.1 {
            best = found;
        }
    }
    Ok(best.0)
}

/// The best chain there is.
pub(crate) fn best_of_all(judge: &Judge<'_>, found: Chain) -> Result<Chain, PlanError> {
    let seconds = judge.seconds(&found);
    let (owner, micro_batches) = (judge.owner, judge.spec.placement.micro_batches);
    let begin = (found, seconds);
    optimal::optimal(begin, judge.estimate, judge.cluster, judge.pins, owner, micro_batches, |c| judge.seconds(c))
}

/// Lines of CompNodes to cut: by OP-Fence's path; from its other end; without the slower ones; and by speed.
fn orders(judge: &Judge<'_>) -> Vec<Vec<usize>> {
    let n = judge.cluster.compnodes.len();
    let bytes = judge.typical_bytes();
    let mut orders = vec![line(judge.cluster, bytes, judge.owner)];
    if judge.owner.is_none() {
        orders.push(orders[0].iter().rev().copied().collect());
    }
    let speed = |d: usize| judge.cluster.compnodes[d].flop_per_s * judge.cluster.compnodes[d].efficiency;
    let mut by_speed: Vec<usize> = (0..n).collect();
    by_speed.sort_by(|&a, &b| speed(b).total_cmp(&speed(a)).then(a.cmp(&b)));
    // Half as many CompNodes, the faster ones, in the same line; and again.
    let mut keep = n / 2;
    while keep >= 1 {
        let faster: Vec<usize> = by_speed.iter().copied().take(keep).collect();
        for base in orders.clone().into_iter().take(2) {
            let is_used = |d: &usize| faster.contains(d) || judge.owner == Some(*d);
            orders.push(base.into_iter().filter(is_used).collect());
        }
        keep /= 2;
    }
    // One community after another may be the only one worth using.
    let community = super::clusters_by_bandwidth(judge.cluster);
    let mut fastest: Vec<usize> = (0..community.iter().max().map_or(0, |m| m + 1)).collect();
    let total = |c: usize| (0..n).filter(|&d| community[d] == c).map(speed).sum::<f64>();
    fastest.sort_by(|&a, &b| total(b).total_cmp(&total(a)).then(a.cmp(&b)));
    for c in fastest.into_iter().take(COMMUNITIES) {
        let order = orders[0].iter().copied().filter(|&d| community[d] == c || judge.owner == Some(d));
        orders.push(order.collect());
    }
    if judge.spec.placement.private {
        orders = orders.iter().map(|order| with_neighbours_apart(judge.cluster, order)).collect();
        orders.extend(all_apart(judge.cluster).filter(|order| judge.owner.is_none_or(|owner| order[0] == owner)));
    }
    orders.sort();
    orders.dedup();
    orders
}

fn no_fit(judge: &Judge<'_>) -> PlanError {
    const GB: f64 = 1e9;
    let nodes = &judge.cluster.compnodes;
    if let Some(owner) = judge.owner.and_then(|owner| nodes.get(owner)) {
        let (head, tail, ops) = (judge.pins.head.max(1), judge.pins.tail, judge.estimate.ops());
        let of_tail = if tail < ops { judge.estimate.memory_bytes(owner, &(tail..ops), 1) } else { 0.0 };
        let needed = judge.estimate.memory_bytes(owner, &(0..head), 1) + of_tail;
        if needed > owner.memory_bytes as f64 {
            let (compnode, memory_gb) = (owner.name.clone(), owner.memory_bytes as f64 / GB);
            let kept = head + ops.saturating_sub(tail);
            return PlanError::OwnerTooSmall { compnode, kept, needed_gb: needed / GB, memory_gb };
        }
    }
    let Some(largest) = nodes.iter().max_by_key(|c| c.memory_bytes) else { return PlanError::NoCompNodes };
    let (compnode, memory) = (largest.name.clone(), largest.memory_bytes);
    let heaviest = (0..judge.estimate.ops()).map(|op| (op, judge.estimate.memory_bytes(largest, &(op..op + 1), 1)));
    if let Some((op, needed)) = heaviest.max_by(|a, b| a.1.total_cmp(&b.1))
        && needed > memory as f64
    {
        let op = judge.dag.ops()[op].name.clone();
        return PlanError::OpTooLarge { op, needed_gb: needed / GB, compnode, memory_gb: memory as f64 / GB };
    }
    let needed = judge.estimate.memory_bytes(largest, &(0..judge.estimate.ops()), 1);
    let total: f64 = nodes.iter().map(|c| c.memory_bytes as f64).sum();
    PlanError::NoFit { needed_gb: needed / GB, compnodes: nodes.len(), memory_gb: total / GB }
}
