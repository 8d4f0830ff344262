//! Which ops must stay with the data owner.

use fusionllm_graph::{DType, OpClass, OpDag, OpId};

/// Ops `0..head` and `tail..n` of the topological order belong to CompNode 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pins {
    pub(crate) head: usize,
    pub(crate) tail: usize,
    pub(crate) pinned: Vec<bool>,
}

impl Pins {
    /// Placeholders always stay with the owner, since only it has the data. With `private` so do all ops that
    /// read integers (embedding, loss) and everything from the last parameter-carrying op before the loss on:
    /// the gradient of the logits is the softmax minus the one-hot label, so it must not travel either.
    pub(crate) fn of(dag: &OpDag, private: bool) -> Self {
        let mut pinned: Vec<bool> =
            dag.ops().iter().map(|op| matches!(op.kind.class(), OpClass::Placeholder)).collect();
        let n = pinned.len();
        if private {
            for (i, op) in dag.ops().iter().enumerate() {
                if op.inputs.iter().any(|&input| dag.op(input).output.dtype == DType::I32) {
                    pinned[i] = true;
                }
            }
            if let Some(logits) = dag.logits() {
                pin_to_last_parameter(dag, logits, &mut pinned);
            }
        }
        let half = dag.loss().map_or(n, OpId::index);
        let tail =
            if private { (0..n).filter(|&i| pinned[i] && reaches_tail(dag, i, half)).min().unwrap_or(n) } else { n };
        let head = (0..tail).filter(|&i| pinned[i]).map(|i| i + 1).max().unwrap_or(0);
        Self { head, tail, pinned }
    }

    /// The pins under which the data owner holds both ends of the model, if a parameter is used at more than one place:
    /// as with private data, though nothing has to stay. Then no gradient of a table has to travel.
    pub(crate) fn u_shape(dag: &OpDag) -> Option<Self> {
        let mut uses = vec![0u32; dag.params().len()];
        for param in dag.ops().iter().flat_map(|op| &op.params) {
            uses[param.index()] += 1;
        }
        let is_shared = uses.iter().zip(dag.params()).any(|(&uses, param)| uses > 1 && !param.frozen);
        is_shared.then(|| Self::of(dag, true)).filter(|pins| pins.tail < pins.pinned.len())
    }
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
