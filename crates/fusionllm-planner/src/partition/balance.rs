//! Contiguous segments whose slowest CompNode is as fast as can be.

use super::pins::Pins;
use crate::{NodeIndex, PlanError, Segment};

/// Splits ops of the given weights over CompNodes of the given speeds, in order, minimising the largest
/// weight / speed. CompNode 0 takes at least the pinned head, and the pinned tail on top of it.
pub(super) fn segments(weights: &[f64], speeds: &[f64], pins: &Pins) -> Result<Vec<Segment>, PlanError> {
    let nodes = speeds.len();
    if nodes == 1 {
        return Ok(vec![Segment { compnode: NodeIndex::DATA_OWNER, ops: 0..weights.len() }]);
    }
    let (head, tail) = (pins.head.max(1), pins.tail);
    let free = tail.saturating_sub(head);
    if free < nodes - 1 {
        return Err(PlanError::MoreCompNodesThanOps { compnodes: nodes, ops: free + 1 });
    }
    let mut prefix = vec![0.0];
    for &w in weights {
        prefix.push(prefix[prefix.len() - 1] + w);
    }
    let tail_weight = prefix[weights.len()] - prefix[tail];

    // best[i]: the least possible slowest time when the CompNodes so far hold the ops before i.
    let mut best: Vec<f64> = vec![f64::INFINITY; tail + 1];
    for (i, slot) in best.iter_mut().enumerate().skip(head) {
        *slot = (prefix[i] + tail_weight) / speeds[0];
    }
    let mut cuts: Vec<Vec<usize>> = Vec::new();
    for &speed in &speeds[1..] {
        let mut next = vec![f64::INFINITY; tail + 1];
        let mut cut = vec![0; tail + 1];
        let first = head + cuts.len();
        // Starts that no later one beats. Among them `best` rises with the start and what is left falls: where they
        // cross, their larger one is least.
        let mut starts: Vec<usize> = Vec::new();
        for end in first + 1..=tail {
            while starts.last().is_some_and(|&s| best[s] >= best[end - 1]) {
                starts.pop();
            }
            starts.push(end - 1);
            let time = |start: usize| (prefix[end] - prefix[start]) / speed;
            let crossing = starts.partition_point(|&s| best[s] < time(s)).min(starts.len() - 1);
            let slowest = |at: usize| best[starts[at]].max(time(starts[at]));
            let before = crossing.saturating_sub(1);
            let at = if slowest(before) <= slowest(crossing) { before } else { crossing };
            (next[end], cut[end]) = (slowest(at), starts[at]);
        }
        best = next;
        cuts.push(cut);
    }

    let mut segments = Vec::new();
    if tail < weights.len() {
        segments.push(Segment { compnode: NodeIndex::DATA_OWNER, ops: tail..weights.len() });
    }
    let mut end = tail;
    for (node, cut) in cuts.iter().enumerate().rev() {
        let start = cut[end];
        segments.push(Segment { compnode: NodeIndex(node as u32 + 1), ops: start..end });
        end = start;
    }
    segments.push(Segment { compnode: NodeIndex::DATA_OWNER, ops: 0..end });
    segments.reverse();
    Ok(segments)
}
