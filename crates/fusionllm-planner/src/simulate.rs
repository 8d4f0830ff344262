//! The event simulator: how long a training step takes, and what it waits for.
//!
//! It runs the very task orders that the runtime runs and asks the same readiness rule. Each CompNode computes one task
//! at a time, slower while more CompNodes compute on its machine than that has lanes, or while messages are handled on
//! cores that compute; each direction of a link carries one message at a time, in the order in which they were sent.

mod critical;
mod hosts;
mod pauses;
mod step;
mod trace;

use std::collections::{BTreeMap, VecDeque};

use crate::ready::{Need, needs, touching};
use crate::{Cluster, Deferrable, EdgeId, FpBp, NodeIndex, Placement, PlanError, StageEdge, StageId, Task, Way, Ways};

use hosts::{Agenda, Hosts, Turn};

pub use critical::{Blame, Resource};
pub use step::{Cargo, Cause, LinkUse, Simulated, Span, Transfer};
pub use trace::{Trace, TraceEvent};

/// Bytes per second that one core encrypts and hands to the kernel, or takes from it and decrypts: 2.8 ns a byte were
/// measured of a CompNode's network threads on an AMD EPYC.
const HANDLED_BYTES_PER_S: f64 = 3.5e8;

/// What a simulation needs to know besides the placement. All times in seconds, all bytes as encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCosts {
    /// FP and BP of a micro-batch, by stage.
    pub stage_s: Vec<FpBp>,
    /// What BP of a micro-batch puts off where the order has WG tasks, by stage.
    pub deferrable: Vec<Deferrable>,
    /// What a micro-batch sends, by edge.
    pub edge_bytes: Vec<Ways<f64>>,
    /// Encoding and decoding of one message, together, by edge. It delays a message, and the compute of machines that
    /// have no core to spare.
    pub codec_s: Vec<Ways<f64>>,
    /// UPDATE, by CompNode.
    pub update_s: Vec<f64>,
    /// Bytes that each holder of each shared parameter sends another, both in the placement's order.
    pub shared_bytes: Vec<Vec<f64>>,
    /// Whether the global norm is exchanged before UPDATE.
    pub clip: bool,
}

/// Simulates one training step of `placement` on `cluster`, whose CompNodes are those of the placement, in its order.
///
/// # Errors
/// [`PlanError::Deadlock`] if the orders cannot be completed.
pub fn simulate(placement: &Placement, cluster: &Cluster, costs: &StepCosts) -> Result<Simulated, PlanError> {
    let mut state = State::new(placement, cluster, costs);
    for node in 0..placement.compnodes.len() {
        state.offer(node, 0.0);
    }
    while let Some((now_s, turn)) = state.agenda.next() {
        match turn {
            Turn::Begin(node) => state.begin(node, now_s),
            Turn::Host(host, version) => {
                for node in state.hosts.ended(host, version, now_s, &mut state.agenda) {
                    state.end(node, now_s);
                }
            }
            Turn::Handle { host, lanes, seconds } => {
                state.hosts.handle(host, lanes, seconds, now_s, &mut state.agenda);
            }
        }
    }
    let all_done = |(node, order): (usize, &Vec<Task>)| {
        let left = order.get(state.next[node]..).unwrap_or_default();
        left.iter().all(|task| *task == Task::Update) && state.deferred[node].is_empty()
    };
    if !placement.train.orders.iter().enumerate().all(all_done) {
        return Err(PlanError::Deadlock);
    }
    state.finish();
    let step_s = state.spans.iter().map(|s| s.end_s).fold(0.0, f64::max);
    Ok(Simulated { step_s, spans: state.spans, transfers: state.transfers })
}

/// A time in the step, and what made it that time.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// Seconds from the step's begin.
    at_s: f64,
    cause: Cause,
}

impl Moment {
    const BEGIN: Self = Self { at_s: 0.0, cause: Cause::Start };

    /// The later of two; the first if they are at the same time.
    fn or_later(self, other: Self) -> Self {
        if other.at_s > self.at_s { other } else { self }
    }
}

/// When something is there; nothing while that is not known.
type Arrival = Option<Moment>;

/// What a link carries at once.
#[derive(Clone, Copy, Debug)]
struct Message {
    /// Bytes of the message, as encoded.
    bytes: f64,
    /// Seconds of encoding and decoding, together.
    codec_s: f64,
}

impl Message {
    /// A message so small that only latency counts.
    const EMPTY: Self = Self { bytes: 0.0, codec_s: 0.0 };
}

/// What a CompNode does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Work {
    /// It waits for its next task's needs.
    Idle,
    /// Its next task begins at a time that is on the agenda.
    Called(Cause),
    /// It computes the task of this span.
    Busy(usize),
}

struct State<'a> {
    placement: &'a Placement,
    cluster: &'a Cluster,
    costs: &'a StepCosts,
    node_of: Vec<usize>,
    /// Edges that touch a stage, so that a task need not look through all.
    touching: Vec<Vec<StageEdge>>,
    hosts: Hosts,
    agenda: Agenda,
    next: Vec<usize>,
    at_work: Vec<Work>,
    /// By CompNode: whether its order has WG tasks.
    defers: Vec<bool>,
    /// WG tasks that wait, and the products that are left of each.
    deferred: Vec<VecDeque<(Task, u32)>>,
    /// When a CompNode is free, and after which span.
    free: Vec<Moment>,
    /// When its last FP or BP ended: shared gradients are then complete.
    passed: Vec<Moment>,
    kept: Vec<Vec<Arrival>>,
    activations: Vec<Vec<Arrival>>,
    gradients: Vec<Vec<Arrival>>,
    /// When a direction is free, and after which transfer.
    links: BTreeMap<(usize, usize), Moment>,
    spans: Vec<Span>,
    transfers: Vec<Transfer>,
}

impl<'a> State<'a> {
    fn new(placement: &'a Placement, cluster: &'a Cluster, costs: &'a StepCosts) -> Self {
        let micro_batches = placement.train.micro_batches as usize;
        let table = |rows: usize| vec![vec![None; micro_batches]; rows];
        Self {
            placement,
            cluster,
            costs,
            node_of: placement.stages.iter().map(|s| s.compnode.index()).collect(),
            touching: touching(placement.stages.len(), &placement.edges),
            hosts: Hosts::new(cluster),
            agenda: Agenda::default(),
            next: vec![0; placement.compnodes.len()],
            at_work: vec![Work::Idle; placement.compnodes.len()],
            defers: (0..placement.compnodes.len() as u32).map(|n| placement.defers(NodeIndex(n))).collect(),
            deferred: vec![VecDeque::new(); placement.compnodes.len()],
            free: vec![Moment::BEGIN; placement.compnodes.len()],
            passed: vec![Moment::BEGIN; placement.compnodes.len()],
            kept: table(placement.stages.len()),
            activations: table(placement.edges.len()),
            gradients: table(placement.edges.len()),
            links: BTreeMap::new(),
            spans: Vec::new(),
            transfers: Vec::new(),
        }
    }

    /// The next task of an idle CompNode is called, if all that it needs is known to come. If it would wait now, and
    /// has put something off, it makes up for that.
    fn offer(&mut self, node: usize, now_s: f64) {
        if self.at_work[node] != Work::Idle {
            return;
        }
        self.pass_over_done(node);
        let ready = self.next_task(node).and_then(|(task, stage, _)| self.ready(stage, task));
        if ready.is_none_or(|ready| ready.at_s > now_s)
            && let Some(&(task, _)) = self.deferred[node].front()
        {
            return self.make_up(node, task, now_s);
        }
        let Some(ready) = ready else { return };
        let Moment { at_s: start_s, cause } = self.free[node].or_later(ready);
        self.at_work[node] = Work::Called(cause);
        self.agenda.add(start_s, Turn::Begin(node));
    }

    /// The next task of a CompNode, where it belongs, and its seconds at full speed; nothing before WG and UPDATE.
    fn next_task(&self, node: usize) -> Option<(Task, StageId, f64)> {
        let &task = self.placement.train.orders[node].get(self.next[node])?;
        let costs = |stage: StageId| self.costs.stage_s[stage.index()];
        match task {
            Task::Fp { stage, .. } => Some((task, stage, costs(stage).fp_s)),
            Task::Bp { stage, .. } if self.defers[node] => {
                Some((task, stage, (costs(stage).bp_s - self.costs.deferrable[stage.index()].seconds).max(0.0)))
            }
            Task::Bp { stage, .. } => Some((task, stage, costs(stage).bp_s)),
            Task::Wg { .. } | Task::Update => None,
        }
    }

    fn begin(&mut self, node: usize, now_s: f64) {
        let (Work::Called(cause), Some((task, _, seconds))) = (self.at_work[node], self.next_task(node)) else {
            return;
        };
        self.at_work[node] = Work::Busy(self.spans.len());
        self.spans.push(Span { node: NodeIndex(node as u32), task, start_s: now_s, end_s: now_s, cause });
        self.hosts.begin(node, seconds, now_s, &mut self.agenda);
    }

    fn end(&mut self, node: usize, now_s: f64) {
        let Work::Busy(span) = std::mem::replace(&mut self.at_work[node], Work::Idle) else { return };
        self.spans[span].end_s = now_s;
        self.free[node] = Moment { at_s: now_s, cause: Cause::Span(span) };
        let task = self.spans[span].task;
        if matches!(task, Task::Wg { .. }) {
            self.made_up(node);
        } else {
            self.next[node] += 1;
            self.passed[node] = self.free[node];
            self.put_off(node, task);
            self.deliver(task, now_s, span);
        }
        self.offer(node, now_s);
    }

    /// When all that the task needs is there, and what came last; nothing if something is missing.
    fn ready(&self, stage: StageId, task: Task) -> Arrival {
        let mut last = Moment::BEGIN;
        for need in needs(&self.touching[stage.index()], task) {
            let arrival = match need {
                Need::Activation { edge, micro_batch } => self.activations[edge.index()][micro_batch as usize],
                Need::Gradient { edge, micro_batch } => self.gradients[edge.index()][micro_batch as usize],
                Need::Kept { stage, micro_batch } => self.kept[stage.index()][micro_batch as usize],
            }?;
            last = last.or_later(arrival);
        }
        Some(last)
    }

    /// What a task made goes to whoever needs it.
    fn deliver(&mut self, task: Task, end_s: f64, span: usize) {
        let at = Moment { at_s: end_s, cause: Cause::Span(span) };
        match task {
            Task::Fp { stage, micro_batch } => {
                self.kept[stage.index()][micro_batch as usize] = Some(at);
                for position in 0..self.touching[stage.index()].len() {
                    let edge = &self.touching[stage.index()][position];
                    if edge.from != stage {
                        continue;
                    }
                    let (id, to) = (edge.id, self.node_of[edge.to.index()]);
                    let message = self.message(id, Way::Activation);
                    let from = self.node_of[stage.index()];
                    let arrival = self.send(from, to, Cargo::Activation(id, micro_batch), message, at);
                    self.activations[id.index()][micro_batch as usize] = Some(arrival);
                    self.offer(to, end_s);
                }
            }
            Task::Bp { stage, micro_batch } => {
                for position in 0..self.touching[stage.index()].len() {
                    let edge = &self.touching[stage.index()][position];
                    if edge.to != stage || !edge.gradient {
                        continue;
                    }
                    let (id, to) = (edge.id, self.node_of[edge.from.index()]);
                    let message = self.message(id, Way::Gradient);
                    let from = self.node_of[stage.index()];
                    let arrival = self.send(from, to, Cargo::Gradient(id, micro_batch), message, at);
                    self.gradients[id.index()][micro_batch as usize] = Some(arrival);
                    self.offer(to, end_s);
                }
            }
            Task::Wg { .. } | Task::Update => {}
        }
    }

    /// What an edge sends this way for each micro-batch.
    fn message(&self, edge: EdgeId, way: Way) -> Message {
        Message { bytes: self.costs.edge_bytes[edge.index()][way], codec_s: self.costs.codec_s[edge.index()][way] }
    }

    /// Puts a message on its link; within a CompNode it is there at once.
    fn send(&mut self, from: usize, to: usize, cargo: Cargo, message: Message, at: Moment) -> Moment {
        if from == to {
            return at;
        }
        let link = self.cluster.link(from, to);
        let Message { bytes, codec_s } = message;
        let free = self.links.get(&(from, to)).copied().unwrap_or(Moment::BEGIN);
        let Moment { at_s: start_s, cause } = at.or_later(free);
        let sent_s = start_s + link.occupied_s(bytes);
        let end_s = sent_s + link.latency_s + codec_s;
        let (from_node, to_node) = (NodeIndex(from as u32), NodeIndex(to as u32));
        let index = Cause::Transfer(self.transfers.len());
        self.transfers.push(Transfer { from: from_node, to: to_node, cargo, bytes, start_s, sent_s, end_s, cause });
        let handled_s = bytes / HANDLED_BYTES_PER_S + codec_s / 2.0;
        if handled_s > 0.0 {
            self.hosts.call_handler(from, handled_s, start_s, &mut self.agenda);
            self.hosts.call_handler(to, handled_s, sent_s + link.latency_s, &mut self.agenda);
        }
        self.links.insert((from, to), Moment { at_s: sent_s, cause: index });
        Moment { at_s: end_s, cause: index }
    }

    /// The step's end: shared gradients, the global norm, UPDATE.
    fn finish(&mut self) {
        let nodes = self.free.len();
        let mut ready = self.free.clone();
        for shared in &self.placement.shared {
            let of_shared = self.costs.shared_bytes.get(shared.id.index()).map_or(&[][..], Vec::as_slice);
            for (place, a) in shared.holders.iter().map(|a| a.index()).enumerate() {
                let message = Message { bytes: of_shared.get(place).copied().unwrap_or(0.0), codec_s: 0.0 };
                let at = self.passed[a];
                for b in shared.holders.iter().map(|b| b.index()) {
                    let arrival = self.send(a, b, Cargo::Shared(shared.id), message, at);
                    ready[b] = ready[b].or_later(arrival);
                }
            }
        }
        if self.costs.clip && nodes > 1 {
            let root = self.placement.norm_root().index();
            let others = || (0..nodes).filter(|&node| node != root);
            let parts = ready.clone();
            let total = others().fold(ready[root], |total, node| {
                total.or_later(self.send(node, root, Cargo::Norm, Message::EMPTY, parts[node]))
            });
            ready[root] = total;
            for node in others() {
                ready[node] = self.send(root, node, Cargo::Norm, Message::EMPTY, total);
            }
        }
        for (node, Moment { at_s: start_s, cause }) in ready.into_iter().enumerate() {
            // All CompNodes update at about the same time.
            let seconds = self.costs.update_s.get(node).copied().unwrap_or(0.0) * self.hosts.slowdown(node);
            let end_s = start_s + seconds;
            self.spans.push(Span { node: NodeIndex(node as u32), task: Task::Update, start_s, end_s, cause });
        }
    }
}

#[cfg(test)]
mod tests;
