//! Pieces of a stage that makes its activations anew. They end where a single tensor crosses the topological order, such as
//! between two blocks. Planner and CompNode ask the same function where that is.

use std::collections::BTreeSet;
use std::ops::Range;

use fusionllm_graph::{Kernels, OpDag, OpId};

/// A piece keeps at least so many times the bytes of the tensor that enters the next one; else it saves too little.
const WORTH_A_PIECE: u64 = 4;

/// Where pieces may end: places in the topological order before which ops only one tensor is made that is used after.
pub(crate) fn piece_ends(dag: &OpDag) -> Vec<usize> {
    let last_use = |op: OpId| dag.consumers(op).iter().map(|consumer| consumer.index()).max().unwrap_or(0);
    let is_placeholder = |op: OpId| dag.op(op).inputs.is_empty();
    let (mut ends, mut kept, mut before) = (Vec::new(), 0u64, None);
    let mut crossing: BTreeSet<usize> = BTreeSet::new();
    for op in dag.op_ids() {
        let end = op.index() + 1;
        if !is_placeholder(op) && last_use(op) >= end {
            crossing.insert(op.index());
        }
        crossing.retain(|&earlier| last_use(OpId(earlier as u32)) >= end);
        kept = kept.saturating_add(dag.kept_bytes(op, 1, Kernels::Fused));
        let (Some(&one), 1) = (crossing.first(), crossing.len()) else { continue };
        let bytes = dag.op(OpId(one as u32)).output.bytes(1);
        if before != Some(one) && kept >= WORTH_A_PIECE.saturating_mul(bytes) {
            ends.push(end);
            (kept, before) = (0, Some(one));
        }
    }
    ends
}

/// The pieces of a contiguous range of ops, in order.
pub(crate) fn pieces<'a>(ends: &'a [usize], ops: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'a> {
    let (mut start, last) = (ops.start, ops.end);
    let inside = ends.iter().copied().filter(move |&end| end > start && end < last);
    inside.chain([last]).map(move |end| std::mem::replace(&mut start, end)..end)
}

/// Bytes of what is made up to `last` and used after it.
pub(crate) fn crossing_bytes(dag: &OpDag, last: OpId, batch: usize) -> u64 {
    let is_used_after = |&op: &OpId| {
        !dag.op(op).inputs.is_empty() && op <= last && dag.consumers(op).iter().any(|&consumer| consumer > last)
    };
    dag.op_ids().filter(is_used_after).map(|op| dag.op(op).output.bytes(batch)).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::small_gpt2;

    #[test]
    fn pieces_end_where_one_tensor_crosses_and_cover_a_range_once() {
        let dag = small_gpt2(3);
        let ends = piece_ends(&dag);
        let names: Vec<&str> = ends.iter().map(|&end| dag.op(OpId(end as u32 - 1)).name.as_str()).collect();
        assert_eq!(names, ["h.0.add_1", "h.0.add_2", "h.1.add_1", "h.1.add_2", "h.2.add_1", "h.2.add_2"]);
        for range in [0..dag.ops().len(), 3..ends[1], ends[0]..ends[2] + 2, ends[1] + 1..ends[1] + 2] {
            let of: Vec<_> = pieces(&ends, &range).collect();
            assert_eq!((of[0].start, of[of.len() - 1].end), (range.start, range.end));
            assert!(of.windows(2).all(|pair| pair[0].end == pair[1].start && ends.contains(&pair[0].end)));
            assert!(of.iter().all(|piece| !piece.is_empty()));
        }
    }
}
