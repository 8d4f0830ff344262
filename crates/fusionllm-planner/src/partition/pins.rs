//! Which ops must stay with the data owner.

use fusionllm_graph::{DType, OpClass, OpDag, OpId, OpKind};

use crate::PlanError;

/// Ops `0..head` and `tail..n` of the topological order belong to CompNode 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pins {
    pub(crate) head: usize,
    pub(crate) tail: usize,
    pub(crate) pinned: Vec<bool>,
}

/// Of each op of an OP-DAG, whether it stays with the data owner under `data.private`, where that keeps the first and the last
/// so many blocks (`data.keep_blocks`) besides what comes before and after all of them.
///
/// # Errors
/// [`PlanError::KeepBlocks`] if the model has not so many blocks and one more, [`PlanError::KeptParam`] if a parameter of
/// these ops is used elsewhere too.
pub fn kept_ops(dag: &OpDag, keep_blocks: [u32; 2]) -> Result<Vec<bool>, PlanError> {
    Ok(Pins::private(dag, keep_blocks)?.pinned)
}

impl Pins {
    /// Placeholders always stay with the owner, since only it has the data; with `private` so does what [`kept_ops`] says.
    pub(crate) fn of(dag: &OpDag, private: bool, keep_blocks: [u32; 2]) -> Result<Self, PlanError> {
        if private { Self::private(dag, keep_blocks) } else { Ok(Self::around(placeholders(dag), dag.ops().len())) }
    }

    /// With `private` all stays that comes before the first block or after the last one: embedding, final norm, head and loss;
    /// and the blocks at the ends that are to be kept. A model that has no blocks keeps what reads the input, and all from
    /// the head on, with a norm right before it.
    fn private(dag: &OpDag, keep_blocks: [u32; 2]) -> Result<Self, PlanError> {
        let [first, last] = keep_blocks.map(|count| count as usize);
        let blocks = dag.blocks();
        let n = dag.ops().len();
        if first + last > 0 && first + last >= blocks.len() {
            return Err(PlanError::KeepBlocks { keep: keep_blocks, blocks: blocks.len() });
        }
        let mut pins = match (blocks.get(first), blocks.get(blocks.len().saturating_sub(last + 1))) {
            (Some(begin), Some(end)) => {
                let mut pinned = placeholders(dag);
                pinned.iter_mut().take(begin.start).for_each(|p| *p = true);
                Self::around(pinned, end.end)
            }
            _ => {
                let mut pins = Self::ends(dag);
                let reads = |op: &fusionllm_graph::Op| {
                    op.inputs.iter().any(|&input| matches!(dag.op(input).kind.class(), OpClass::Placeholder))
                };
                for (at, op) in dag.ops().iter().enumerate() {
                    pins.pinned[at] |= reads(op);
                }
                let tail = norms_before(dag, pins.tail);
                Self::around(pins.pinned, tail)
            }
        };
        pins.pinned = (0..n).map(|at| at < pins.head || at >= pins.tail).collect();
        let is_pinned = |op: &OpId| pins.pinned[op.index()];
        for param in dag.param_ids() {
            let users = dag.users_of(param);
            if let (Some(&kept), Some(&other)) =
                (users.iter().find(|op| is_pinned(op)), users.iter().find(|op| !is_pinned(op)))
            {
                let name = |op: OpId| dag.op(op).name.clone();
                let param = dag.param(param).name.clone();
                return Err(PlanError::KeptParam { param, kept: name(kept), other: name(other) });
            }
        }
        Ok(pins)
    }

    /// The pins under which the data owner holds both ends of the model, if a parameter is used at more than one place:
    /// as with private data, though nothing has to stay. Then no gradient of a table has to travel.
    pub(crate) fn u_shape(dag: &OpDag) -> Option<Self> {
        let mut uses = vec![0u32; dag.params().len()];
        for param in dag.ops().iter().flat_map(|op| &op.params) {
            uses[param.index()] += 1;
        }
        let is_shared = uses.iter().zip(dag.params()).any(|(&uses, param)| uses > 1 && !param.frozen);
        is_shared.then(|| Self::ends(dag)).filter(|pins| pins.tail < pins.pinned.len())
    }

    /// All ops that read integers (embedding, loss) and everything from the last parameter-carrying op before the loss on:
    /// the gradient of the logits is the softmax minus the one-hot label.
    fn ends(dag: &OpDag) -> Self {
        let mut pinned = placeholders(dag);
        let n = pinned.len();
        for (i, op) in dag.ops().iter().enumerate() {
            if op.inputs.iter().any(|&input| dag.op(input).output.dtype == DType::I32) {
                pinned[i] = true;
            }
        }
        if let Some(logits) = dag.logits() {
            pin_to_last_parameter(dag, logits, &mut pinned);
        }
        let half = dag.loss().map_or(n, OpId::index);
        let tail = (0..n).filter(|&i| pinned[i] && reaches_tail(dag, i, half)).min().unwrap_or(n);
        Self::around(pinned, tail)
    }

    /// With this tail, and a head with all that is pinned before it.
    fn around(pinned: Vec<bool>, tail: usize) -> Self {
        let head = (0..tail).filter(|&i| pinned[i]).map(|i| i + 1).max().unwrap_or(0);
        Self { head, tail, pinned }
    }
}

/// Of each op, whether it is a placeholder.
fn placeholders(dag: &OpDag) -> Vec<bool> {
    dag.ops().iter().map(|op| matches!(op.kind.class(), OpClass::Placeholder)).collect()
}

/// The place of the first of the norms that come right before `tail`.
fn norms_before(dag: &OpDag, mut tail: usize) -> usize {
    let is_norm = |at: usize| matches!(dag.ops()[at].kind, OpKind::LayerNorm { .. } | OpKind::RmsNorm { .. });
    while tail > 0 && tail < dag.ops().len() && is_norm(tail - 1) {
        tail -= 1;
    }
    tail
}

/// Pins `op` and its producers up to and with the first op that carries parameters.
fn pin_to_last_parameter(dag: &OpDag, op: OpId, pinned: &mut [bool]) {
    let mut open = vec![op];
    while let Some(id) = open.pop() {
        pinned[id.index()] = true;
        if !matches!(dag.op(id).kind.class(), OpClass::Parameter) {
            open.extend(dag.op(id).inputs.iter().copied().filter(|i| !pinned[i.index()]));
        }
    }
}

/// Whether a pinned op lies on the tail side: it is the loss, or all paths from it pass only pinned ops to it.
/// In a topological order that is the case for an op after which nothing but pinned ops remains.
fn reaches_tail(dag: &OpDag, op: usize, loss: usize) -> bool {
    if matches!(dag.ops()[op].kind.class(), OpClass::Placeholder) {
        return false;
    }
    let mut at = op;
    while at != loss {
        let next = dag.consumers(OpId(at as u32));
        match next {
            [only] if only.index() > at => at = only.index(),
            _ => return false,
        }
        if at != loss && matches!(dag.ops()[at].kind.class(), OpClass::Parameter) {
            return false;
        }
    }
    true
}
