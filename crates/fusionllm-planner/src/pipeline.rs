//! Task orders: what each CompNode computes, in which order, within one pass.
//!
//! The orders come out of a simulation in unit time (FP 1, BP 2, a message its link's latency) in which every CompNode
//! takes, of the tasks that the readiness rule allows, the one its pipeline prefers. So an order exists only if it can
//! be completed: it cannot deadlock. On a linear chain this gives the textbook orders of GPipe and 1F1B.

use std::collections::BTreeSet;

use crate::ready::{Need, needs, touching};
use crate::{EdgeId, Pipeline, PlanError, Stage, StageEdge, StageId, Task};

/// How many micro-batches may be live (FP done or running, BP not done) in a stage at once. In 1F1B a stage may run so
/// many micro-batches ahead of what it needs where links take no time.
pub fn in_flight_limit(pipeline: Pipeline, run_ahead: u32, stage: StageId, stages: usize, micro_batches: u32) -> u32 {
    match pipeline {
        Pipeline::OneFOneB => {
            (stages.saturating_sub(stage.index()) as u32).saturating_add(run_ahead).clamp(1, micro_batches)
        }
        Pipeline::GPipe => micro_batches,
    }
}

/// What the task orders of a training step follow from, besides stages and edges.
#[derive(Clone, Debug)]
pub(crate) struct OrderSpec {
    pub(crate) pipeline: Pipeline,
    /// Micro-batches that a stage may be further ahead than 1F1B.
    pub(crate) run_ahead: u32,
    pub(crate) micro_batches: u32,
    /// Ticks that a message takes, by edge; where there is none, no time.
    pub(crate) delays: Vec<u64>,
}

impl OrderSpec {
    /// The ticks of `latency_s` where FP and BP of a micro-batch take `stage_s` seconds.
    pub(crate) fn delay(&self, latency_s: f64, stage_s: f64) -> u64 {
        let tick_s = stage_s / (FP_TICKS + BP_TICKS) as f64;
        // What takes longer than all micro-batches need is long, however much longer.
        let most = u64::from(self.micro_batches) * (FP_TICKS + BP_TICKS);
        ((latency_s / tick_s).ceil() as u64).min(most)
    }
}

/// The orders of a training step: FP and BP of every micro-batch, then UPDATE.
pub(crate) fn train_orders(
    stages: &[Stage],
    edges: &[StageEdge],
    compnodes: usize,
    spec: &OrderSpec,
) -> Result<Vec<Vec<Task>>, PlanError> {
    let OrderSpec { pipeline, run_ahead, micro_batches, ref delays } = *spec;
    let limit = |stage: StageId| in_flight_limit(pipeline, run_ahead, stage, stages.len(), micro_batches);
    let backward_first = pipeline == Pipeline::OneFOneB;
    let mut simulation = Simulation::new(stages, edges, compnodes, micro_batches, true, backward_first);
    simulation.delays.clone_from(delays);
    let mut orders = simulation.run(limit)?;
    for order in &mut orders {
        order.push(Task::Update);
    }
    Ok(orders)
}

/// The orders of an evaluation pass: FP only; no stage runs further ahead than the pipeline is deep.
pub(crate) fn eval_orders(
    stages: &[Stage],
    edges: &[StageEdge],
    compnodes: usize,
    micro_batches: u32,
) -> Result<Vec<Vec<Task>>, PlanError> {
    let limit = |_| (stages.len() as u32).max(1);
    Simulation::new(stages, edges, compnodes, micro_batches, false, false).run(limit)
}

const FP_TICKS: u64 = 1;
const BP_TICKS: u64 = 2;

/// How far a stage is: ticks at which its tasks end, in the order in which they started.
#[derive(Clone, Debug, Default)]
struct Progress {
    fp: Vec<u64>,
    bp: Vec<u64>,
}

impl Progress {
    fn is_done(ended: &[u64], micro_batch: u32, now: u64) -> bool {
        ended.get(micro_batch as usize).is_some_and(|&t| t <= now)
    }

    /// A stage's tasks run one after another, so they end in order.
    fn finished(ended: &[u64], now: u64) -> u32 {
        ended.partition_point(|&t| t <= now) as u32
    }
}

/// List scheduling in unit time: the state of all CompNodes at one tick.
struct Simulation {
    /// Edges that touch a stage, so that a task need not look through all.
    touching: Vec<Vec<StageEdge>>,
    /// Stages of a CompNode, later ones first: what is nearest to the loss frees memory soonest.
    own: Vec<Vec<StageId>>,
    micro_batches: u32,
    with_backward: bool,
    backward_first: bool,
    progress: Vec<Progress>,
    /// Of each edge, the stages at its ends.
    ends: Vec<(StageId, StageId)>,
    /// Of each edge, the ticks that a message takes.
    delays: Vec<u64>,
    /// When something ends or arrives.
    events: BTreeSet<u64>,
    free_at: Vec<u64>,
    orders: Vec<Vec<Task>>,
}

impl Simulation {
    fn new(
        stages: &[Stage],
        edges: &[StageEdge],
        compnodes: usize,
        micro_batches: u32,
        with_backward: bool,
        backward_first: bool,
    ) -> Self {
        let mut own = vec![Vec::new(); compnodes];
        for stage in stages.iter().rev() {
            own[stage.compnode.index()].push(stage.id);
        }
        Self {
            touching: touching(stages.len(), edges),
            own,
            micro_batches,
            with_backward,
            backward_first,
            progress: vec![Progress::default(); stages.len()],
            ends: edges.iter().map(|e| (e.from, e.to)).collect(),
            delays: Vec::new(),
            events: BTreeSet::new(),
            free_at: vec![0; compnodes],
            orders: vec![Vec::new(); compnodes],
        }
    }

    fn run(mut self, limit: impl Fn(StageId) -> u32) -> Result<Vec<Vec<Task>>, PlanError> {
        let passes = if self.with_backward { 2 } else { 1 };
        let total = self.progress.len() * self.micro_batches as usize * passes;
        let mut placed = 0;
        let mut now = 0;
        while placed < total {
            for node in 0..self.orders.len() {
                if self.free_at[node] <= now
                    && let Some(task) = self.choose(node, now, &limit)
                {
                    self.start(node, task, now);
                    placed += 1;
                }
            }
            match self.events.pop_first() {
                Some(next) => now = next,
                None if placed == total => break,
                None => return Err(PlanError::Deadlock),
            }
        }
        Ok(self.orders)
    }

    fn start(&mut self, node: usize, task: Task, now: u64) {
        let (stage, ticks) = match task {
            Task::Fp { stage, .. } => (stage, FP_TICKS),
            Task::Bp { stage, .. } => (stage, BP_TICKS),
            Task::Wg { .. } | Task::Update => return,
        };
        let end = now + ticks;
        let progress = &mut self.progress[stage.index()];
        if ticks == FP_TICKS {
            progress.fp.push(end)
        } else {
            progress.bp.push(end)
        }
        self.free_at[node] = end;
        self.events.insert(end);
        self.events.extend(self.touching[stage.index()].iter().map(|e| end + delay(&self.delays, e.id)));
        self.orders[node].push(task);
    }

    fn choose(&self, node: usize, now: u64, limit: &impl Fn(StageId) -> u32) -> Option<Task> {
        let own = || self.own[node].iter().copied();
        let backward = || own().find_map(|s| self.next_backward(s, now));
        let forward = || own().find_map(|s| self.next_forward(s, now, limit(s)));
        if !self.with_backward {
            forward()
        } else if self.backward_first {
            backward().or_else(forward)
        } else {
            forward().or_else(backward)
        }
    }

    fn next_forward(&self, stage: StageId, now: u64, limit: u32) -> Option<Task> {
        let started = self.progress[stage.index()].fp.len() as u32;
        if started == self.micro_batches {
            return None;
        }
        // Without BP a micro-batch is live until the last stage has seen it.
        let ended = if self.with_backward { &self.progress[stage.index()].bp } else { &self.progress.last()?.fp };
        let live = started.saturating_sub(Progress::finished(ended, now));
        let task = Task::Fp { stage, micro_batch: started };
        (live < limit && self.is_ready(stage, task, now)).then_some(task)
    }

    fn next_backward(&self, stage: StageId, now: u64) -> Option<Task> {
        let started = self.progress[stage.index()].bp.len() as u32;
        let task = Task::Bp { stage, micro_batch: started };
        (started < self.micro_batches && self.is_ready(stage, task, now)).then_some(task)
    }

    fn is_ready(&self, stage: StageId, task: Task, now: u64) -> bool {
        let of = |stage: StageId| &self.progress[stage.index()];
        let sent = |edge: EdgeId| now.checked_sub(delay(&self.delays, edge));
        let arrived = |ended: &[u64], edge: EdgeId, m: u32| sent(edge).is_some_and(|t| Progress::is_done(ended, m, t));
        needs(&self.touching[stage.index()], task).all(|need| match need {
            Need::Activation { edge, micro_batch } => arrived(&of(self.ends[edge.index()].0).fp, edge, micro_batch),
            Need::Gradient { edge, micro_batch } => arrived(&of(self.ends[edge.index()].1).bp, edge, micro_batch),
            Need::Kept { stage, micro_batch } => Progress::is_done(&of(stage).fp, micro_batch, now),
        })
    }
}

fn delay(delays: &[u64], edge: EdgeId) -> u64 {
    delays.get(edge.index()).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests;
