//! The OP-DAG: ops in topological order, their edges and parameters.

mod blocks;
mod costs;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::kind::OpClass;
use crate::op::OpKind;
use crate::ops::image::image;
use crate::param::Param;
use crate::shape::{Dim, TensorType};

/// An op of one OP-DAG: its place in the topological order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u32);

impl OpId {
    /// The place in [`OpDag::ops`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A parameter of one OP-DAG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ParamId(pub u32);

impl ParamId {
    /// The place in [`OpDag::params`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ParamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One operator with one output tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    /// Its name, one of a kind in the OP-DAG.
    pub name: String,
    /// What it does.
    pub kind: OpKind,
    /// The ops whose outputs it reads, in the order the kind documents.
    pub inputs: Vec<OpId>,
    /// The parameters it uses, in the order the kind documents.
    pub params: Vec<ParamId>,
    /// The type of its output.
    pub output: TensorType,
}

/// The parameters of an op whose values FP makes.
fn running(op: &Op) -> impl Iterator<Item = ParamId> {
    let roles = op.kind.param_roles();
    roles.into_iter().zip(op.params.clone()).filter(|(role, _)| role.running).map(|(_, param)| param)
}

/// A model as a DAG of ops, immutable and checked: built by a [`crate::DagBuilder`] or read from JSON.
///
/// `ops()[i]` reads only ops before `i`.
#[derive(Clone, Debug, PartialEq)]
pub struct OpDag {
    name: String,
    ops: Vec<Op>,
    params: Vec<Param>,
    by_name: BTreeMap<String, OpId>,
    consumers: Vec<Vec<OpId>>,
    carries_gradient: Vec<bool>,
    /// Parameters whose values FP makes.
    running: BTreeSet<ParamId>,
}

impl OpDag {
    /// Joins checked parts; `ops` in topological order.
    pub(crate) fn join(name: String, ops: Vec<Op>, params: Vec<Param>, by_name: BTreeMap<String, OpId>) -> Self {
        let mut consumers: Vec<Vec<OpId>> = vec![Vec::new(); ops.len()];
        let mut carries_gradient: Vec<bool> = Vec::with_capacity(ops.len());
        for (op, id) in ops.iter().zip((0..).map(OpId)) {
            let upstream = op.inputs.iter().any(|input| carries_gradient[input.index()]);
            let trains = op.params.iter().any(|param| !params[param.index()].frozen);
            carries_gradient.push(op.output.dtype == DType::F32 && (upstream || trains));
            for input in &op.inputs {
                let of_input = &mut consumers[input.index()];
                if of_input.last() != Some(&id) {
                    of_input.push(id);
                }
            }
        }
        let running = ops.iter().flat_map(running).collect();
        Self { name, ops, params, by_name, consumers, carries_gradient, running }
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Positions per row of the input placeholder, S of `[B, S]` or `[B, S, D]`; `None` if there is no such input.
    pub fn seq_len(&self) -> Option<usize> {
        match self.op(self.input()?).output.shape.dims() {
            [_, Dim::Fixed(seq_len)] | [_, Dim::Fixed(seq_len), _] => Some(*seq_len),
            _ => None,
        }
    }

    /// Channels, height and width of the images that the input placeholder takes, f32 `[B, C, H, W]`; `None` if it takes
    /// something else.
    pub fn image_size(&self) -> Option<[usize; 3]> {
        image(&self.op(self.input()?).output).ok()
    }

    /// Size of the logits' last dimension, V; `None` without a loss.
    pub fn vocab(&self) -> Option<usize> {
        match self.op(self.logits()?).output.shape.dims().last() {
            Some(Dim::Fixed(vocab)) => Some(*vocab),
            Some(Dim::Batch) | None => None,
        }
    }

    /// All ops in topological order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// One op.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG; use `ops().get(op.index())` on an id that came from outside.
    pub fn op(&self, op: OpId) -> &Op {
        &self.ops[op.index()]
    }

    /// All parameters; a tied one is there once.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// One parameter.
    ///
    /// # Panics
    /// If `param` is not of this OP-DAG; use `params().get(param.index())` on an id that came from outside.
    pub fn param(&self, param: ParamId) -> &Param {
        &self.params[param.index()]
    }

    /// The ids of all ops in topological order.
    pub fn op_ids(&self) -> impl DoubleEndedIterator<Item = OpId> + ExactSizeIterator + use<> {
        // The builder stops at MAX_OPS, so a length fits.
        (0..self.ops.len()).map(|index| OpId(index as u32))
    }

    /// The ids of all parameters.
    pub fn param_ids(&self) -> impl DoubleEndedIterator<Item = ParamId> + ExactSizeIterator + use<> {
        (0..self.params.len()).map(|index| ParamId(index as u32))
    }

    /// The op of this name.
    pub fn find(&self, name: &str) -> Option<OpId> {
        self.by_name.get(name).copied()
    }

    /// The parameter of this name.
    pub fn find_param(&self, name: &str) -> Option<ParamId> {
        self.param_ids().find(|&param| self.param(param).name == name)
    }

    /// The ops that read `op`'s output, each once, ascending.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn consumers(&self, op: OpId) -> &[OpId] {
        &self.consumers[op.index()]
    }

    /// The ops that use `param`, ascending; more than one if it is tied.
    pub fn users_of(&self, param: ParamId) -> Vec<OpId> {
        self.op_ids().filter(|&op| self.op(op).params.contains(&param)).collect()
    }

    /// What work an op is for a micro-batch of `batch` rows: family, variant, and the shapes that enter and leave, such
    /// as `linear in-out 4x256x768 > 4x256x2304`. Ops of the same work take the same time on the same device. Before the
    /// first parameter that is trained an op has no BP, which is another work.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn work(&self, op: OpId, batch: usize) -> String {
        let sizes = |id: OpId| {
            let sizes: Vec<String> = self.op(id).output.shape.resolve(batch).iter().map(usize::to_string).collect();
            sizes.join("x")
        };
        let node = self.op(op);
        let mut words = vec![node.kind.family().to_owned()];
        words.extend(node.kind.variant());
        if self.frozen_cost(op, batch).is_some() {
            words.push("frozen".to_owned());
        }
        if !self.carries_gradient(op) && node.kind.class() != OpClass::Placeholder {
            words.push("forward".to_owned());
        }
        words.extend(node.inputs.iter().map(|&input| sizes(input)));
        words.extend([">".to_owned(), sizes(op)]);
        words.join(" ")
    }

    /// Whether `op` has parameters, none of which is trained.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn is_frozen(&self, op: OpId) -> bool {
        let params = &self.op(op).params;
        !params.is_empty() && params.iter().all(|&param| self.param(param).frozen)
    }

    /// Whether training leaves some parameter as it is.
    pub fn has_frozen(&self) -> bool {
        self.params.iter().zip((0..).map(ParamId)).any(|(param, id)| param.frozen && !self.is_running(id))
    }

    /// Whether FP in training makes the values of a parameter, such as a running mean.
    pub fn is_running(&self, param: ParamId) -> bool {
        self.running.contains(&param)
    }

    /// An op of each kind of work, as [`Self::work`] names it, but for placeholders: of several the one whose inputs most
    /// often carry a gradient, since before the first parameter that is trained an op has less to do.
    pub fn works(&self, batch: usize) -> BTreeMap<String, OpId> {
        let mut works: BTreeMap<String, OpId> = BTreeMap::new();
        let flow = |op: OpId| {
            let carrying = self.op(op).inputs.iter().filter(|input| self.carries_gradient(**input)).count();
            (self.carries_gradient(op), carrying)
        };
        for op in self.op_ids().filter(|&op| self.op(op).kind.class() != OpClass::Placeholder) {
            let known = works.entry(self.work(op, batch)).or_insert(op);
            if flow(op) > flow(*known) {
                *known = op;
            }
        }
        works
    }

    /// The loss op.
    pub fn loss(&self) -> Option<OpId> {
        self.op_ids().rev().find(|&op| self.op(op).kind.class() == OpClass::Loss)
    }

    /// The op whose output the loss compares with the labels: the loss op's first input.
    pub fn logits(&self) -> Option<OpId> {
        self.op(self.loss()?).inputs.first().copied()
    }

    /// The input placeholder.
    pub fn input(&self) -> Option<OpId> {
        self.op_ids().find(|&op| matches!(self.op(op).kind, OpKind::Input { .. }))
    }

    /// The label placeholder.
    pub fn label(&self) -> Option<OpId> {
        self.op_ids().find(|&op| matches!(self.op(op).kind, OpKind::Label { .. }))
    }

    /// Whether a gradient must flow back over this op's outgoing edges: its output is f32 and depends on a parameter
    /// that is trained.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn carries_gradient(&self, op: OpId) -> bool {
        self.carries_gradient[op.index()]
    }
}

#[cfg(test)]
mod tests {
    use crate::{DagBuilder, Gpt2Config, Shape, gpt2};

    use super::*;

    fn tiny() -> OpDag {
        let config = Gpt2Config {
            vocab_size: 11,
            n_positions: 8,
            n_embd: 6,
            n_layer: 1,
            n_head: 2,
            layer_norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        gpt2(&config, 4).unwrap()
    }

    #[test]
    fn an_op_is_found_by_name_and_by_role() {
        let dag = tiny();
        assert_eq!(dag.input(), dag.find("input"));
        assert_eq!(dag.label(), dag.find("label"));
        assert_eq!(dag.loss(), dag.find("loss"));
        assert_eq!(dag.logits(), dag.find("lm_head"));
        assert_eq!(dag.find("lm_heap"), None);
        assert_eq!((dag.seq_len(), dag.vocab()), (Some(4), Some(11)));
    }

    #[test]
    fn consumers_are_distinct_and_ascending() {
        let dag = tiny();
        let readers: Vec<_> = dag.consumers(dag.find("wpe").unwrap()).iter().map(|&op| &dag.op(op).name).collect();
        assert_eq!(readers, ["h.0.ln_1", "h.0.add_1"]);

        let mut builder = DagBuilder::new("twice");
        let x = builder.op("x", OpKind::Input { dtype: DType::F32, shape: Shape::batched(&[3]) }, &[], &[]).unwrap();
        let sum = builder.op("sum", OpKind::Add, &[x, x], &[]).unwrap();
        let dag = builder.build().unwrap();
        assert_eq!(dag.consumers(x), [sum]);
        assert_eq!(dag.consumers(sum), []);
    }

    #[test]
    fn a_tied_parameter_has_two_users() {
        let dag = tiny();
        let wte = dag.find_param("transformer.wte.weight").unwrap();
        assert_eq!(dag.users_of(wte), [dag.find("wte").unwrap(), dag.find("lm_head").unwrap()]);
    }

    #[test]
    fn gradients_flow_wherever_a_parameter_lies_upstream() {
        let dag = tiny();
        for op in dag.op_ids() {
            let is_placeholder = dag.op(op).kind.class() == OpClass::Placeholder;
            assert_eq!(dag.carries_gradient(op), !is_placeholder, "{}", dag.op(op).name);
        }
        let mut builder = DagBuilder::new("no parameter");
        let x = builder.op("x", OpKind::Input { dtype: DType::F32, shape: Shape::batched(&[3]) }, &[], &[]).unwrap();
        let sum = builder.op("sum", OpKind::Add, &[x, x], &[]).unwrap();
        assert!(!builder.build().unwrap().carries_gradient(sum));
    }
}
