//! The placement: who holds which ops, what flows between them, and in which order each CompNode works.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use fusionllm_codec::Codec;
use fusionllm_graph::{DType, OpDag, OpId, Param, ParamId};
use serde::{Deserialize, Deserializer, Serialize};

use crate::estimate::training_bytes;
use crate::{EdgeId, GroupId, NodeIndex, Pipeline, Route, SharedId, StageId, Task, Way};

/// A contiguous piece of the topological order on one CompNode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The CompNode that holds it.
    pub compnode: NodeIndex,
    /// Indices of its ops.
    pub ops: Range<usize>,
}

/// One contiguous segment of a sub-DAG along the pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Its number: its place in [`Placement::stages`].
    pub id: StageId,
    /// The group whose pipeline it is of.
    #[serde(default)]
    pub group: GroupId,
    /// The CompNode that holds it.
    pub compnode: NodeIndex,
    /// Its ops, in topological order.
    pub ops: Vec<OpId>,
}

/// A tensor that flows from one stage to another: the output of one op, sent once however many ops of the
/// receiving stage consume it. It is a boundary edge if the two stages live on different CompNodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageEdge {
    /// Its number: its place in [`Placement::edges`].
    pub id: EdgeId,
    /// The op whose output flows.
    pub op: OpId,
    /// The producing stage.
    pub from: StageId,
    /// The consuming stage.
    pub to: StageId,
    /// Whether a gradient flows back.
    pub gradient: bool,
    /// Elements of the tensor of one micro-batch.
    pub elements: u64,
    /// How the activation is encoded.
    pub activation_codec: Codec,
    /// How the gradient is encoded.
    pub gradient_codec: Codec,
}

/// Parameters that the same CompNodes hold, more than one; the holders' gradients are summed before UPDATE, as one vector
/// of all elements in the order of the parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// Its number: its place in [`Placement::shared`].
    #[serde(default = "unnumbered")]
    pub id: SharedId,
    /// The parameters, ascending; at least one.
    #[serde(alias = "param", deserialize_with = "one_or_several")]
    pub params: Vec<ParamId>,
    /// Who holds them, ascending. The first one counts them in the global norm.
    pub holders: Vec<NodeIndex>,
    /// How many elements they have together.
    pub elements: u64,
    /// How each holder's gradient is encoded: plain or quantized, without memory of earlier messages.
    pub codec: Codec,
}

/// The task orders of one kind of pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassPlan {
    /// Micro-batches in the pass.
    pub micro_batches: u32,
    /// The task order of each CompNode, in the placement's order.
    pub orders: Vec<Vec<Task>>,
}

/// One whole pipeline, which holds the whole OP-DAG, with its share of the step's micro-batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// Its number.
    pub id: GroupId,
    /// Its stages along its pipeline.
    pub stages: &'a [Stage],
    /// Which micro-batches of a training step are its own, ascending.
    pub micro_batches: Vec<u32>,
}

/// Op → CompNode, task orders, and the codec of each boundary edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Names of the CompNodes, data owner first.
    pub compnodes: Vec<String>,
    /// The stages along the pipeline of each group, group after group.
    pub stages: Vec<Stage>,
    /// What flows between stages.
    pub edges: Vec<StageEdge>,
    /// Parameters held more than once.
    #[serde(alias = "tied", deserialize_with = "numbered")]
    pub shared: Vec<Shared>,
    /// How FP and BP alternate in a training step.
    pub pipeline: Pipeline,
    /// The CompNodes that make activations anew in BP instead of keeping them all.
    #[serde(default)]
    pub recompute: Vec<NodeIndex>,
    /// Task orders of a training step.
    pub train: PassPlan,
    /// Task orders of an evaluation pass.
    pub eval: PassPlan,
}

/// Until [`numbered`] gives it its number.
fn unnumbered() -> SharedId {
    SharedId(0)
}

/// Shared parameters with their places as numbers: placements that were stored before protocol 18 have none.
fn numbered<'de, D: Deserializer<'de>>(stored: D) -> Result<Vec<Shared>, D::Error> {
    let mut all = Vec::<Shared>::deserialize(stored)?;
    for (id, shared) in (0..).map(SharedId).zip(&mut all) {
        shared.id = id;
    }
    Ok(all)
}

/// The parameters; placements that were stored before protocol 18 have one instead of a list.
fn one_or_several<'de, D: Deserializer<'de>>(stored: D) -> Result<Vec<ParamId>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        One(ParamId),
        Several(Vec<ParamId>),
    }
    // What is sent is no text, and says nothing of its form.
    if !stored.is_human_readable() {
        return Vec::deserialize(stored);
    }
    Ok(match Form::deserialize(stored)? {
        Form::One(param) => vec![param],
        Form::Several(params) => params,
    })
}

impl StageEdge {
    /// Whether its tensor is of real numbers, which codecs may round: token ids and labels are not.
    pub fn is_real(&self, dag: &OpDag) -> bool {
        dag.ops().get(self.op.index()).is_some_and(|op| op.output.dtype == DType::F32)
    }

    /// How what goes this way is encoded.
    pub fn codec(&self, way: Way) -> Codec {
        match way {
            Way::Activation => self.activation_codec,
            Way::Gradient => self.gradient_codec,
        }
    }

    /// The ways that are used: a gradient flows back only where one is needed.
    pub fn ways(&self) -> impl Iterator<Item = Way> + use<> {
        let gradient = self.gradient;
        Way::ALL.into_iter().filter(move |&way| way == Way::Activation || gradient)
    }

    /// The stages that send and receive what goes this way.
    pub fn ends(&self, way: Way) -> (StageId, StageId) {
        match way {
            Way::Activation => (self.from, self.to),
            Way::Gradient => (self.to, self.from),
        }
    }
}

impl PassPlan {
    /// The micro-batches that a stage works on, ascending.
    pub fn micro_batches_of(&self, stage: &Stage) -> Vec<u32> {
        let order = self.orders.get(stage.compnode.index()).map_or(&[][..], Vec::as_slice);
        let own = |task: &Task| match *task {
            Task::Fp { stage: at, micro_batch } if at == stage.id => Some(micro_batch),
            Task::Fp { .. } | Task::Bp { .. } | Task::Wg { .. } | Task::Update => None,
        };
        let mut micro_batches: Vec<u32> = order.iter().filter_map(own).collect();
        micro_batches.sort_unstable();
        micro_batches
    }
}

/// The stages of each group.
pub(crate) fn by_group(stages: &[Stage]) -> impl Iterator<Item = &[Stage]> {
    stages.chunk_by(|a, b| a.group == b.group)
}

impl Placement {
    /// The groups, in their order.
    pub fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        by_group(&self.stages).filter_map(|stages| {
            let first = stages.first()?;
            Some(Group { id: first.group, stages, micro_batches: self.train.micro_batches_of(first) })
        })
    }

    /// Of how many micro-batches of a pass a CompNode computes an op.
    pub fn times(&self, pass: &PassPlan, node: NodeIndex, op: OpId) -> u64 {
        let with_it = self.stages_of(node).filter(|stage| stage.ops.contains(&op));
        with_it.map(|stage| pass.micro_batches_of(stage).len() as u64).sum()
    }

    /// Places of all CompNodes, data owner first.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = NodeIndex> + ExactSizeIterator + Clone + use<> {
        (0..self.compnodes.len() as u32).map(NodeIndex)
    }

    /// The CompNode that adds up the gradient norm and tells it to all.
    pub fn norm_root(&self) -> NodeIndex {
        NodeIndex::DATA_OWNER
    }

    /// The CompNode of a stage.
    pub fn compnode_of(&self, stage: StageId) -> Option<NodeIndex> {
        self.stages.get(stage.index()).map(|s| s.compnode)
    }

    /// Whether a CompNode holds a stage.
    pub fn holds(&self, node: NodeIndex, stage: StageId) -> bool {
        self.compnode_of(stage) == Some(node)
    }

    /// From whom to whom goes what an edge carries this way; nothing if a stage of it is not in the placement.
    pub fn route(&self, edge: &StageEdge, way: Way) -> Option<Route> {
        let (from, to) = edge.ends(way);
        Some(Route { from: self.compnode_of(from)?, to: self.compnode_of(to)? })
    }

    /// Whether the edge crosses CompNodes.
    pub fn is_boundary(&self, edge: &StageEdge) -> bool {
        self.route(edge, Way::Activation).is_none_or(Route::crosses)
    }

    /// The stages that a CompNode holds.
    pub fn stages_of(&self, node: NodeIndex) -> impl Iterator<Item = &Stage> {
        self.stages.iter().filter(move |s| s.compnode == node)
    }

    /// Whether BP on a CompNode puts weight gradients off.
    pub fn defers(&self, node: NodeIndex) -> bool {
        let order = self.train.orders.get(node.index());
        order.is_some_and(|order| order.iter().any(|task| matches!(task, Task::Wg { .. })))
    }

    /// The pieces that a CompNode holds, for people: `input .. h.1.add_2; ln_f .. loss`.
    pub fn pieces(&self, dag: &OpDag, node: NodeIndex) -> String {
        let name = |op: Option<&OpId>| op.map_or("-", |&op| dag.op(op).name.as_str());
        let piece = |s: &Stage| format!("{} .. {}", name(s.ops.first()), name(s.ops.last()));
        self.stages_of(node).map(piece).collect::<Vec<_>>().join("; ")
    }

    /// The parameters that a CompNode holds, ascending.
    pub fn params_of(&self, dag: &OpDag, node: NodeIndex) -> Vec<ParamId> {
        let params: BTreeSet<ParamId> = self
            .stages_of(node)
            .flat_map(|s| &s.ops)
            .filter_map(|op| dag.ops().get(op.index()))
            .flat_map(|op| op.params.iter().copied())
            .collect();
        params.into_iter().collect()
    }

    /// Bytes of the parameters that a CompNode holds, as f32.
    pub fn param_bytes_of(&self, dag: &OpDag, node: NodeIndex) -> u64 {
        let bytes = self.params_of(dag, node).into_iter().map(|param| dag.param(param).bytes());
        bytes.fold(0, u64::saturating_add)
    }

    /// Bytes of the parameters that a CompNode holds and trains, as f32.
    pub fn trained_bytes_of(&self, dag: &OpDag, node: NodeIndex) -> u64 {
        let params = self.params_of(dag, node).into_iter().map(|param| dag.param(param));
        params.filter(|param| !param.frozen).map(Param::bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of the parameters that a CompNode holds, and for those that it trains of their gradients and of as many
    /// states of the optimizer, as f32.
    pub fn training_bytes_of(&self, dag: &OpDag, node: NodeIndex, states: u32) -> u64 {
        training_bytes(self.param_bytes_of(dag, node), self.trained_bytes_of(dag, node), states)
    }

    /// The largest number of messages of one edge and direction that can be on the way at once.
    pub fn window(&self) -> u32 {
        let train = self.nodes().flat_map(|node| self.live_bound(node).into_values()).max().unwrap_or(0);
        let depth = by_group(&self.stages).map(<[Stage]>::len).max().unwrap_or(0);
        train.max(depth as u32) + 1
    }

    /// Largest number of micro-batches that are live at once in a stage of the CompNode's training order, by
    /// stage: the bound on activation memory that the order gives.
    pub fn live_bound(&self, node: NodeIndex) -> BTreeMap<StageId, u32> {
        self.bound(node, false)
    }

    /// As [`Self::live_bound`], where a micro-batch counts until all that its BP has put off is made.
    pub fn held_bound(&self, node: NodeIndex) -> BTreeMap<StageId, u32> {
        self.bound(node, self.defers(node))
    }

    fn bound(&self, node: NodeIndex, until_weight_gradients: bool) -> BTreeMap<StageId, u32> {
        let mut live: BTreeMap<StageId, u32> = BTreeMap::new();
        let mut bound: BTreeMap<StageId, u32> = BTreeMap::new();
        for task in self.train.orders.get(node.index()).into_iter().flatten() {
            match *task {
                Task::Fp { stage, .. } => {
                    let now = live.entry(stage).or_default();
                    *now += 1;
                    let most = bound.entry(stage).or_default();
                    *most = (*most).max(*now);
                }
                Task::Bp { .. } if until_weight_gradients => {}
                Task::Wg { .. } if !until_weight_gradients => {}
                Task::Bp { stage, .. } | Task::Wg { stage, .. } => {
                    let now = live.entry(stage).or_default();
                    *now = now.saturating_sub(1);
                }
                Task::Update => {}
            }
        }
        bound
    }
}
