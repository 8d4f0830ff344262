//! What the plan lets a peer send: looked at before anything is allocated for a message.

use std::collections::BTreeMap;
use std::fmt;

use fusionllm_codec::{Codec, ElementType};
use fusionllm_graph::{DType, OpDag};
use fusionllm_planner::{EdgeId, Placement};
use fusionllm_protocol::{Channel, OpDataHeader, Pass};

use super::JobLinks;

/// What flows over each edge of a placement, by the OP-DAG.
#[derive(Debug)]
pub(crate) struct EdgeTensors(BTreeMap<EdgeId, EdgeTensor>);

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
        Self(placement.edges.iter().filter_map(tensor).collect())
    }
}

#[cfg(test)]
impl EdgeTensors {
    /// Of one edge.
    pub(super) fn one(edge: EdgeId, op: &str, shape: Vec<usize>, element: ElementType) -> Self {
        Self(BTreeMap::from([(edge, EdgeTensor { op: op.to_owned(), shape, element })]))
    }
}

/// Where in a job a message belongs, in the order in which a channel carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    step: u64,
    pass: Pass,
    micro_batch: u32,
}

impl Place {
    pub(super) fn of(header: &OpDataHeader) -> Self {
        Self { step: header.step, pass: header.pass, micro_batch: header.micro_batch }
    }
}

impl fmt::Display for Place {
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
    pub(super) fn most_bytes(&self, channel: Channel, header: &OpDataHeader) -> Result<u64, String> {
        let shape = shape_of(header);
        let elements = Codec::Dense.encoded_bytes(&shape).map_err(|e| e.to_string())? / 4;
        let wrong = |expected: String| Err(format!("sent a tensor of shape {shape:?} over {channel:?}, {expected}"));
        match channel {
            Channel::Activation(id) | Channel::Gradient(id) => {
                let known = self.tensors.get().and_then(|tensors| tensors.0.get(&id));
                let edge = self.placement.edges.get(id.index()).map(|edge| edge.elements);
                match known {
                    Some(EdgeTensor { op, shape: expected, .. }) if *expected != shape => {
                        return wrong(format!("expected {expected:?}, that of op `{op}`"));
                    }
                    Some(EdgeTensor { op, element, .. }) if *element != header.element => {
                        let (got, expected) = (header.element, element);
                        return Err(format!("sent {got:?} elements for op `{op}`, expected {expected:?}"));
                    }
                    None if edge != Some(elements) => return wrong(format!("expected {} elements", edge.unwrap_or(0))),
                    Some(_) | None => {}
                }
            }
            Channel::Tied { param, .. } => {
                let tied = self.placement.tied.iter().find(|t| t.param == param).map_or(0, |tied| tied.elements);
                if elements > tied {
                    return wrong(format!("the parameter has {tied} elements"));
                }
            }
            Channel::NormPart { .. } | Channel::NormTotal { .. } => {
                if !shape.is_empty() || header.element != ElementType::F32 {
                    return wrong("expected one real number".to_owned());
                }
            }
        }
        header.codec.encoded_bytes(&shape).map_err(|e| e.to_string())
    }

    /// Whether the plan has this message next on a channel whose last one was `last`. Every channel has messages in
    /// every step, and a stage works on micro-batches in their order.
    pub(super) fn check_place(&self, channel: Channel, last: Option<Place>, place: Place) -> Result<(), String> {
        let Place { step, pass, micro_batch } = place;
        let misplaced = |why: String| Err(format!("sent {place} over {channel:?}: {why}"));
        let (first, furthest) = last.map_or((self.steps.start, self.steps.start), |last| (last.step, last.step + 1));
        if !self.steps.contains(&step) || step < first || step > furthest {
            return misplaced(format!("step {first} or {furthest} was due, of {}", self.steps.end));
        }
        let done = step + 1;
        let is_evaluated = done == self.steps.end || (self.eval_every > 0 && done.is_multiple_of(self.eval_every));
        let micro_batches = match (channel, pass) {
            // Tied gradients may come in several messages, in an order of their own.
            (Channel::Tied { .. }, _) => return Ok(()),
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
