//! A line of CompNodes, each with one contiguous piece of the topological order; with private data the first one holds
//! the tail too. OP-Fence, second half: where to cut, by dynamic programming.

use crate::compression::Compression;
use crate::partition::orgs::may_close;
use crate::partition::pins::Pins;
use crate::{Cluster, Estimate, NodeIndex, Pipeline, Segment, in_flight_limit};

/// The bottleneck is known well enough when it lies between bounds this close.
const PRECISION: f64 = 1e-3;
/// Halvings at the most.
const HALVINGS: usize = 60;

/// CompNodes of the cluster in pipeline order, and where each one's piece ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Indices into the cluster.
    pub(crate) order: Vec<usize>,
    /// Where each piece ends; ascending, the last one at the tail.
    pub(crate) ends: Vec<usize>,
}

impl Chain {
    /// As segments of a placement over `order`.
    pub(crate) fn segments(&self, pins: &Pins) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(self.ends.len() + 1);
        let mut start = 0;
        for (node, &end) in (0..).map(NodeIndex).zip(&self.ends) {
            segments.push(Segment { compnode: node, ops: start..end });
            start = end;
        }
        let ops = pins.pinned.len();
        match segments.as_mut_slice() {
            [only] => only.ops.end = ops,
            _ if pins.tail < ops => segments.push(Segment { compnode: NodeIndex::DATA_OWNER, ops: pins.tail..ops }),
            _ => {}
        }
        segments
    }
}

/// What the cuts are weighed by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<'a> {
    pub(crate) estimate: &'a Estimate,
    pub(crate) cluster: &'a Cluster,
    pub(crate) pins: &'a Pins,
    pub(crate) compression: Compression,
    /// Dense fp32 bytes over the bytes of the codec that sends what is not sparsified.
    pub(crate) codec_ratio: f64,
    pub(crate) pipeline: Pipeline,
    pub(crate) micro_batches: u32,
    /// Whether machines of one organisation must be apart.
    pub(crate) private: bool,
}

impl Weights<'_> {
    /// Seconds for which the cut before `position` occupies the link from `a` to `b` and back, whichever is longer.
    pub(crate) fn crossing(&self, a: usize, b: usize, position: usize) -> f64 {
        // What the slowest link gets, which is the one that the bottleneck is about.
        let ratio = self.compression.highest_ratio().max(self.codec_ratio);
        let cut = self.estimate.cut(position);
        let forward = self.cluster.link(a, b).occupied_s(cut.forward / ratio);
        forward.max(self.cluster.link(b, a).occupied_s(cut.backward / ratio))
    }

    /// The cuts of `order` whose slowest stage, its compute and its transfers, is as fast as can be under every
    /// CompNode's memory; it may end before the line does. Several: for the best bottleneck, and for slower ones with
    /// fewer CompNodes. Nothing if it fits nowhere.
    pub(crate) fn cuts(&self, order: &[usize]) -> Vec<Chain> {
        let ops = self.estimate.ops();
        let slowest = order.iter().map(|&d| self.time(d, 0, ops)).fold(0.0, f64::max);
        let widest = (0..=ops).max_by(|&a, &b| self.estimate.cut(a).forward.total_cmp(&self.estimate.cut(b).forward));
        let crossings = order.windows(2).map(|w| self.crossing(w[0], w[1], widest.unwrap_or(0)));
        let longest = crossings.filter(|s| s.is_finite()).fold(0.0, f64::max);
        let mut high = slowest.max(longest) * 1.000_001 + f64::MIN_POSITIVE;
        if self.fit(order, high).is_none() {
            return Vec::new();
        }
        let mut low = 0.0;
        for _ in 0..HALVINGS {
            if high - low <= PRECISION * high {
                break;
            }
            let middle = 0.5 * (low + high);
            if self.fit(order, middle).is_some() { high = middle } else { low = middle }
        }
        let mut chains: Vec<Chain> = Vec::new();
        for slack in [1.0, 1.1, 1.3, 1.7, 2.5, 4.0] {
            if let Some(chain) = self.fit(order, high * slack)
                && !chains.contains(&chain)
            {
                chains.push(chain);
            }
        }
        chains
    }

    fn time(&self, device: usize, start: usize, end: usize) -> f64 {
        self.estimate.seconds(&self.cluster.compnodes[device], &(start..end)).both_s()
    }

    /// Cuts with no stage and no crossing above `bottleneck`, on as few CompNodes of the line as reach the end.
    fn fit(&self, order: &[usize], bottleneck: f64) -> Option<Chain> {
        let (ops, tail) = (self.estimate.ops(), self.pins.tail);
        let mut reached: Vec<Vec<bool>> = Vec::new();
        let mut farthest: Vec<Vec<usize>> = Vec::new();
        let mut starts = vec![false; tail + 1];
        starts[0] = true;
        for (place, &device) in order.iter().enumerate() {
            let far = self.far(order, place, device, bottleneck, &starts);
            let mut ends = vec![0i64; tail + 2];
            for start in (0..tail).filter(|&s| starts[s] && far[s] > s) {
                ends[start + 1] += 1;
                ends[far[start] + 1] -= 1;
            }
            let mut sum = 0;
            let least = if place == 0 { self.pins.head.max(1) } else { 1 };
            let mut reach: Vec<bool> = ends
                .iter()
                .take(tail + 1)
                .map(|change| {
                    sum += change;
                    sum > 0
                })
                .collect();
            reach.iter_mut().take(least).for_each(|r| *r = false);
            farthest.push(far);
            let closes = tail == ops || place == 0 || self.crossing(device, order[0], tail) <= bottleneck;
            let closes = closes && (!self.private || may_close(self.cluster, &order[..=place]));
            if reach[tail] && closes {
                reached.push(reach);
                return Some(self.trace_back(order, &reached, &farthest));
            }
            let next = order.get(place + 1)?;
            for (position, r) in reach.iter_mut().enumerate() {
                *r = *r && self.crossing(device, *next, position) <= bottleneck;
            }
            starts.clone_from(&reach);
            reached.push(reach);
        }
        None
    }

    /// By start, the farthest end that a CompNode can hold: its time is at most `bottleneck`, and it fits its memory.
    fn far(&self, order: &[usize], place: usize, device: usize, bottleneck: f64, starts: &[bool]) -> Vec<usize> {
        let (ops, tail) = (self.estimate.ops(), self.pins.tail);
        let profile = &self.cluster.compnodes[device];
        let live = in_flight_limit(self.pipeline, 0, order.len() - place, self.micro_batches);
        let is_owner_of_tail = place == 0 && tail < ops && order.len() > 1;
        let (tail_s, tail_bytes) = if is_owner_of_tail {
            (self.time(device, tail, ops), self.estimate.memory_bytes(profile, &(tail..ops), 1))
        } else {
            (0.0, 0.0)
        };
        let Some((fp, bp)) = self.estimate.sums(profile) else { return vec![0; tail + 1] };
        let last = if order.len() == 1 { ops } else { tail };
        let fits = |start: usize, end: usize| {
            let end = if end == tail { last } else { end };
            let seconds = (fp[end] - fp[start]) + (bp[end] - bp[start]) + tail_s;
            let bytes = self.estimate.memory_bytes(profile, &(start..end), live) + tail_bytes;
            seconds <= bottleneck && bytes <= profile.memory_bytes as f64
        };
        let mut far = vec![0; tail + 1];
        let mut end = 0;
        for start in (0..tail).filter(|&s| starts[s]) {
            end = end.max(start);
            while end < tail && fits(start, end + 1) {
                end += 1;
            }
            far[start] = end;
        }
        far
    }

    fn trace_back(&self, order: &[usize], reached: &[Vec<bool>], farthest: &[Vec<usize>]) -> Chain {
        let used = reached.len();
        let mut ends = vec![self.pins.tail];
        let mut end = self.pins.tail;
        for place in (1..used).rev() {
            let far = &farthest[place];
            // Of all starts, the one that gives this stage and the rest before it the most even times.
            let share = self.time(order[place], 0, end) / (place + 1) as f64;
            let candidates = (0..end).filter(|&s| reached[place - 1][s] && far[s] >= end);
            let away = |s: usize| (self.time(order[place], s, end) - share).abs();
            let start = candidates.min_by(|&a, &b| away(a).total_cmp(&away(b))).unwrap_or(0);
            ends.push(start);
            end = start;
        }
        ends.reverse();
        Chain { order: order.get(..used).unwrap_or_default().to_vec(), ends }
    }
}
