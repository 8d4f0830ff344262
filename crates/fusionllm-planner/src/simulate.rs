//! The event simulator: how long a training step takes, and what it waits for.
//!
//! It runs the very task orders that the runtime runs and asks the same readiness rule. Each CompNode computes one task
//! at a time, slower while more CompNodes compute on its machine than that has lanes, or while messages are handled on
//! cores that compute; each direction of a link carries one message at a time, in the order in which they were sent.

mod critical;
mod hosts;
mod pauses;
mod trace;

use std::collections::{BTreeMap, VecDeque};

use crate::ready::{Need, needs, touching};
use crate::{Cluster, Deferrable, EdgeId, NodeIndex, Placement, PlanError, StageEdge, StageId, Task};

use hosts::{Agenda, Hosts, Turn};

pub use critical::{Blame, Resource};
pub use trace::{Trace, TraceEvent};

/// Bytes per second that one core encrypts and hands to the kernel, or takes from it and decrypts: 2.8 ns a byte were
/// measured of a CompNode's network threads on an AMD EPYC.
const HANDLED_BYTES_PER_S: f64 = 3.5e8;

/// What a simulation needs to know besides the placement. All times in seconds, all bytes as encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCosts {
    /// FP and BP of a micro-batch, by stage.
    pub stage_s: Vec<(f64, f64)>,
    /// What BP of a micro-batch puts off where the order has WG tasks, by stage.
    pub deferrable: Vec<Deferrable>,
    /// Activation and gradient of a micro-batch, by edge.
    pub edge_bytes: Vec<(f64, f64)>,
    /// Encoding and decoding of an activation and of a gradient, together, by edge. It delays a message, and the compute
    /// of machines that have no core to spare.
    pub codec_s: Vec<(f64, f64)>,
    /// UPDATE, by CompNode.
    pub update_s: Vec<f64>,
    /// Bytes that each holder of each tied parameter sends another, both in the placement's order.
    pub tied_bytes: Vec<Vec<f64>>,
    /// Whether the global norm is exchanged before UPDATE.
    pub clip: bool,
}

/// What made something start when it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing: it was the first.
    Start,
    /// The end of this span.
    Span(usize),
    /// The end of this transfer.
    Transfer(usize),
}

/// A task on its CompNode.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where.
    pub node: NodeIndex,
    /// What.
    pub task: Task,
    /// From when, in seconds from the step's begin.
    pub start_s: f64,
    /// Until when.
    pub end_s: f64,
    /// Why not earlier.
    pub cause: Cause,
}

/// What a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cargo {
    /// An activation of this edge and micro-batch.
    Activation(EdgeId, u32),
    /// A gradient of this edge and micro-batch.
    Gradient(EdgeId, u32),
    /// The gradient of a tied parameter, by its place in the placement.
    Tied(usize),
    /// A part or the total of the gradient norm.
    Norm,
}

/// A message on its link.
#[derive(Clone, Debug, PartialEq)]
pub struct Transfer {
    /// Sender.
    pub from: NodeIndex,
    /// Receiver.
    pub to: NodeIndex,
    /// What it carries.
    pub cargo: Cargo,
    /// Bytes as encoded.
    pub bytes: f64,
    /// When it begins to occupy the link.
    pub start_s: f64,
    /// When the link is free again.
    pub sent_s: f64,
    /// When the receiver has it, decoded.
    pub end_s: f64,
    /// Why it did not start earlier.
    pub cause: Cause,
}

/// A simulated step.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulated {
    /// Seconds until the last UPDATE ends.
    pub step_s: f64,
    /// Every task.
    pub spans: Vec<Span>,
    /// Every message.
    pub transfers: Vec<Transfer>,
}

impl Simulated {
    /// The share of the step for which each CompNode computes.
    pub fn busy(&self, nodes: usize) -> Vec<f64> {
        let mut busy = vec![0.0; nodes];
        for span in &self.spans {
            busy[span.node.index()] += (span.end_s - span.start_s) / self.step_s;
        }
        busy
    }

    /// By direction: bytes, and the share of the step for which it is occupied.
    pub fn links(&self) -> BTreeMap<(NodeIndex, NodeIndex), (f64, f64)> {
        let mut links: BTreeMap<_, (f64, f64)> = BTreeMap::new();
        for transfer in &self.transfers {
            let link = links.entry((transfer.from, transfer.to)).or_default();
            link.0 += transfer.bytes;
            link.1 += (transfer.sent_s - transfer.start_s) / self.step_s;
        }
        links
    }
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

/// When something is there, and what brought it.
type Arrival = Option<(f64, Cause)>;

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
    free: Vec<(f64, Cause)>,
    /// When its last FP or BP ended: tied gradients are then complete.
    passed: Vec<(f64, Cause)>,
    kept: Vec<Vec<Arrival>>,
    activations: Vec<Vec<Arrival>>,
    gradients: Vec<Vec<Arrival>>,
    /// When a direction is free, and after which transfer.
    links: BTreeMap<(usize, usize), (f64, Cause)>,
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
            free: vec![(0.0, Cause::Start); placement.compnodes.len()],
            passed: vec![(0.0, Cause::Start); placement.compnodes.len()],
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
        if ready.is_none_or(|(at_s, _)| at_s > now_s)
            && let Some(&(task, _)) = self.deferred[node].front()
        {
            return self.make_up(node, task, now_s);
        }
        let Some(ready) = ready else { return };
        let (start_s, cause) = if ready.0 > self.free[node].0 { ready } else { self.free[node] };
        self.at_work[node] = Work::Called(cause);
        self.agenda.add(start_s, Turn::Begin(node));
    }

    /// The next task of a CompNode, where it belongs, and its seconds at full speed; nothing before WG and UPDATE.
    fn next_task(&self, node: usize) -> Option<(Task, StageId, f64)> {
        let &task = self.placement.train.orders[node].get(self.next[node])?;
        let costs = |stage: StageId| self.costs.stage_s[stage.index()];
        match task {
            Task::Fp { stage, .. } => Some((task, stage, costs(stage).0)),
            Task::Bp { stage, .. } if self.defers[node] => {
                Some((task, stage, (costs(stage).1 - self.costs.deferrable[stage.index()].seconds).max(0.0)))
            }
            Task::Bp { stage, .. } => Some((task, stage, costs(stage).1)),
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
        self.free[node] = (now_s, Cause::Span(span));
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
        let mut last = (0.0, Cause::Start);
        for need in needs(&self.touching[stage.index()], task) {
            let arrival = match need {
                Need::Activation { edge, micro_batch } => self.activations[edge.index()][micro_batch as usize],
                Need::Gradient { edge, micro_batch } => self.gradients[edge.index()][micro_batch as usize],
                Need::Kept { stage, micro_batch } => self.kept[stage.index()][micro_batch as usize],
            }?;
            if arrival.0 > last.0 {
                last = arrival;
            }
        }
        Some(last)
    }

    /// What a task made goes to whoever needs it.
    fn deliver(&mut self, task: Task, end_s: f64, span: usize) {
        let at = (end_s, Cause::Span(span));
        match task {
            Task::Fp { stage, micro_batch } => {
                self.kept[stage.index()][micro_batch as usize] = Some(at);
                for position in 0..self.touching[stage.index()].len() {
                    let edge = &self.touching[stage.index()][position];
                    if edge.from != stage {
                        continue;
                    }
                    let (id, to) = (edge.id, self.node_of[edge.to.index()]);
                    let (bytes, delay) = (self.costs.edge_bytes[id.index()].0, self.costs.codec_s[id.index()].0);
                    let from = self.node_of[stage.index()];
                    let arrival = self.send(from, to, Cargo::Activation(id, micro_batch), bytes, delay, at);
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
                    let (bytes, delay) = (self.costs.edge_bytes[id.index()].1, self.costs.codec_s[id.index()].1);
                    let from = self.node_of[stage.index()];
                    let arrival = self.send(from, to, Cargo::Gradient(id, micro_batch), bytes, delay, at);
                    self.gradients[id.index()][micro_batch as usize] = Some(arrival);
                    self.offer(to, end_s);
                }
            }
            Task::Wg { .. } | Task::Update => {}
        }
    }

    /// Puts a message on its link; within a CompNode it is there at once.
    fn send(&mut self, from: usize, to: usize, cargo: Cargo, bytes: f64, delay: f64, at: (f64, Cause)) -> (f64, Cause) {
        if from == to {
            return at;
        }
        let link = self.cluster.link(from, to);
        let free = self.links.get(&(from, to)).copied().unwrap_or((0.0, Cause::Start));
        let (start_s, cause) = if free.0 > at.0 { free } else { at };
        let sent_s = start_s + link.occupied_s(bytes);
        let end_s = sent_s + link.latency_s + delay;
        let (from_node, to_node) = (NodeIndex(from as u32), NodeIndex(to as u32));
        let index = Cause::Transfer(self.transfers.len());
        self.transfers.push(Transfer { from: from_node, to: to_node, cargo, bytes, start_s, sent_s, end_s, cause });
        let handled_s = bytes / HANDLED_BYTES_PER_S + delay / 2.0;
        if handled_s > 0.0 {
            self.hosts.call_handler(from, handled_s, start_s, &mut self.agenda);
            self.hosts.call_handler(to, handled_s, sent_s + link.latency_s, &mut self.agenda);
        }
        self.links.insert((from, to), (sent_s, index));
        (end_s, index)
    }

    /// The step's end: tied gradients, the global norm, UPDATE.
    fn finish(&mut self) {
        let later = |a: (f64, Cause), b: (f64, Cause)| if b.0 > a.0 { b } else { a };
        let nodes = self.free.len();
        let mut ready = self.free.clone();
        for (index, tied) in self.placement.tied.iter().enumerate() {
            let of_tied = self.costs.tied_bytes.get(index).map_or(&[][..], Vec::as_slice);
            for (place, a) in tied.holders.iter().map(|a| a.index()).enumerate() {
                let (at, bytes) = (self.passed[a], of_tied.get(place).copied().unwrap_or(0.0));
                for b in tied.holders.iter().map(|b| b.index()) {
                    let arrival = self.send(a, b, Cargo::Tied(index), bytes, 0.0, at);
                    ready[b] = later(ready[b], arrival);
                }
            }
        }
        if self.costs.clip && nodes > 1 {
            let mut total = ready[0];
            for (node, at) in ready.clone().into_iter().enumerate().skip(1) {
                total = later(total, self.send(node, 0, Cargo::Norm, 0.0, 0.0, at));
            }
            ready[0] = total;
            for (node, at) in ready.iter_mut().enumerate().skip(1) {
                *at = self.send(0, node, Cargo::Norm, 0.0, 0.0, total);
            }
        }
        for (node, (start_s, cause)) in ready.into_iter().enumerate() {
            // All CompNodes update at about the same time.
            let seconds = self.costs.update_s.get(node).copied().unwrap_or(0.0) * self.hosts.slowdown(node);
            let end_s = start_s + seconds;
            self.spans.push(Span { node: NodeIndex(node as u32), task: Task::Update, start_s, end_s, cause });
        }
    }
}

#[cfg(test)]
mod tests;
