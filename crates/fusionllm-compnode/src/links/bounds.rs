//! What the plan lets a peer send: looked at before anything is allocated for a message.

use std::collections::BTreeMap;
use std::fmt;

use fusionllm_codec::{Codec, ElementType};
use fusionllm_graph::{DType, OpDag};
use fusionllm_planner::{EdgeId, NodeIndex, Pieces, Placement, Shared, SharedId};
use fusionllm_protocol::{Channel, OpDataHeader, Pass};

use super::JobLinks;
use super::breach::Breach;

/// What flows over each edge of a placement, and of its shared parameters, by the OP-DAG.
#[derive(Debug)]
pub(crate) struct EdgeTensors {
    edges: BTreeMap<EdgeId, EdgeTensor>,
    shared: BTreeMap<SharedId, SharedTensor>,
}

#[derive(Debug)]
struct SharedTensor {
    name: String,
    pieces: Pieces,
    /// The holders that send only rows, which they name first.
    row_senders: Vec<NodeIndex>,
}

#[derive(Debug)]
struct EdgeTensor {
    op: String,
    /// Of one micro-batch.
    shape: Vec<usize>,
    element: ElementType,
}

impl EdgeTensors {
    /// With micro-batches of `batch` samples.
    pub(crate) fn of(dag: &OpDag, placement: &Placement, batch: usize) -> Self {
        let tensor = |edge: &fusionllm_planner::StageEdge| {
            let op = dag.ops().get(edge.op.index())?;
            let element = match op.output.dtype {
                DType::F32 => ElementType::F32,
                DType::I32 => ElementType::I32,
            };
            Some((edge.id, EdgeTensor { op: op.name.clone(), shape: op.output.shape.resolve(batch), element }))
        };
        let shared = |shared: &Shared| {
            let holders = shared.holders.iter().copied();
            let row_senders = holders.filter(|&holder| placement.sends_rows(dag, shared, holder).is_some()).collect();
            let (name, pieces) = (shared.name(dag), Pieces::of(&shared.shape(dag)));
            Some((shared.id, SharedTensor { name, pieces, row_senders }))
        };
        Self {
            edges: placement.edges.iter().filter_map(tensor).collect(),
            shared: placement.shared.iter().filter_map(shared).collect(),
        }
    }
}

impl SharedTensor {
    /// What would be right, if a holder may not send a tensor of this shape and type as message `number` of a step.
    fn misfit(&self, from: NodeIndex, number: u32, shape: &[usize], element: ElementType) -> Option<String> {
        let sends_rows = self.row_senders.contains(&from);
        let (name, pieces, columns) = (&self.name, self.pieces.count(), self.pieces.columns());
        let Some(piece) = number.checked_sub(1) else {
            let most = self.pieces.rows();
            let fits = sends_rows && element == ElementType::I32 && matches!(shape, [rows] if *rows <= most);
            return (!fits).then(|| format!("number 0 of `{name}` has at most the {most} numbers of its rows"));
        };
        if piece >= pieces {
            return Some(format!("`{name}` has {pieces} pieces"));
        }
        let rows = self.pieces.rows_of(piece).len();
        let fits = match shape {
            [got, width] => *width == columns && (*got == rows || sends_rows && (1..rows).contains(got)),
            _ => false,
        };
        let fits = fits && element == ElementType::F32;
        (!fits).then(|| format!("expected real numbers [{rows}, {columns}], that of piece {piece} of `{name}`"))
    }
}

#[cfg(test)]
impl EdgeTensors {
    /// Of one edge.
    pub(super) fn one(edge: EdgeId, op: &str, shape: Vec<usize>, element: ElementType) -> Self {
        let edges = BTreeMap::from([(edge, EdgeTensor { op: op.to_owned(), shape, element })]);
        Self { edges, shared: BTreeMap::new() }
    }

    /// Of one shared parameter.
    pub(super) fn one_shared(id: SharedId, name: &str, shape: &[usize], row_senders: Vec<NodeIndex>) -> Self {
        let shared = SharedTensor { name: name.to_owned(), pieces: Pieces::of(shape), row_senders };
        Self { edges: BTreeMap::new(), shared: BTreeMap::from([(id, shared)]) }
    }
}

/// Where in a job a message belongs, in the order in which a channel carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    step: u64,
    pass: Pass,
    micro_batch: u32,
}

impl Position {
    pub(super) fn of(header: &OpDataHeader) -> Self {
        Self { step: header.step, pass: header.pass, micro_batch: header.micro_batch }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pass = match self.pass {
            Pass::Train => "",
            Pass::Eval => " of the evaluation",
        };
        write!(f, "step {}, micro-batch {}{pass}", self.step, self.micro_batch)
    }
}

/// The shape that a header announces.
pub(super) fn shape_of(header: &OpDataHeader) -> Vec<usize> {
    header.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect()
}

impl JobLinks {
    /// Largest payload of a message, whose tensor must be one that flows over this channel.
    pub(super) fn most_bytes(&self, channel: Channel, header: &OpDataHeader) -> Result<u64, Breach> {
        let shape = shape_of(header);
        let elements = Codec::Dense.encoded_bytes(&shape)? / 4;
        let wrong =
            |expected: String| Breach::Plan(format!("sent a tensor of shape {shape:?} over {channel:?}, {expected}"));
        match channel {
            Channel::Activation(id) | Channel::Gradient(id) => {
                let known = self.tensors.get().and_then(|tensors| tensors.edges.get(&id));
                let edge = self.placement.edges.get(id.index()).map(|edge| edge.elements);
                match known {
                    Some(EdgeTensor { op, shape: expected, .. }) if *expected != shape => {
                        return Err(wrong(format!("expected {expected:?}, that of op `{op}`")));
                    }
                    Some(EdgeTensor { op, element, .. }) if *element != header.element => {
                        let (got, expected) = (header.element, element);
                        let what = format!("sent {got:?} elements for op `{op}`, expected {expected:?}");
                        return Err(Breach::Plan(what));
                    }
                    None if edge != Some(elements) => {
                        return Err(wrong(format!("expected {} elements", edge.unwrap_or(0))));
                    }
                    Some(_) | None => {}
                }
            }
            Channel::Shared { id, from } => {
                let most = self.placement.shared(id).map_or(0, |shared| shared.elements);
                match self.tensors.get().and_then(|tensors| tensors.shared.get(&id)) {
                    Some(known) => {
                        let misfit = known.misfit(from, header.micro_batch, &shape, header.element);
                        misfit.map_or(Ok(()), |expected| Err(wrong(expected)))?;
                    }
                    None if elements > most => return Err(wrong(format!("{id} has {most} elements"))),
                    None => {}
                }
            }
            Channel::NormPart { .. } | Channel::NormTotal { .. } => {
                if !shape.is_empty() || header.element != ElementType::F32 {
                    return Err(wrong("expected one real number".to_owned()));
                }
            }
        }
        Ok(header.codec.encoded_bytes(&shape)?)
    }

    /// Whether the plan has this message next on a channel whose last one was `last`. Every channel has messages in
    /// every step, and a stage works on micro-batches in their order.
    pub(super) fn check_place(&self, channel: Channel, last: Option<Position>, place: Position) -> Result<(), Breach> {
        let Position { step, pass, micro_batch } = place;
        let misplaced = |why: String| Err(Breach::Plan(format!("sent {place} over {channel:?}: {why}")));
        let (first, furthest) =
            last.map_or((self.rules.steps.start, self.rules.steps.start), |last| (last.step, last.step + 1));
        if !self.rules.steps.contains(&step) || step < first || step > furthest {
            return misplaced(format!("step {first} or {furthest} was due, of {}", self.rules.steps.end));
        }
        let is_evaluated = self.rules.evaluations.is_due(step + 1);
        let micro_batches = match (channel, pass) {
            // The numbers of rows, and the pieces in their order.
            (Channel::Shared { id, .. }, Pass::Train) => {
                let known = self.tensors.get().and_then(|tensors| tensors.shared.get(&id));
                known.map_or(u32::MAX, |known| known.pieces.count().saturating_add(1))
            }
            (Channel::Activation(_), Pass::Eval) if is_evaluated => self.placement.eval.micro_batches,
            (Channel::Activation(_) | Channel::Gradient(_), Pass::Train) => self.placement.train.micro_batches,
            (Channel::NormPart { .. } | Channel::NormTotal { .. }, Pass::Train) => 1,
            _ => return misplaced("there is no such pass".to_owned()),
        };
        if micro_batch >= micro_batches {
            return misplaced(format!("the pass has {micro_batches} micro-batches"));
        }
        match last.filter(|last| place <= *last) {
            Some(last) => misplaced(format!("it came after {last}")),
            None => Ok(()),
        }
    }
}
