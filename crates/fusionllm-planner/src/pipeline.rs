//! Task orders: what each CompNode computes, in which order, within one pass.
//!
//! The orders come out of a simulation in unit time (FP 1, BP 2) in which every CompNode takes, of the tasks
//! that the readiness rule allows, the one its pipeline prefers. So an order exists only if it can be completed:
//! it cannot deadlock. On a linear chain this gives the textbook GPipe and 1F1B schedules.

use serde::{Deserialize, Serialize};

use crate::ready::{Need, needs};
use crate::{NodeIndex, PlanError, Stage, StageEdge, StageId};

/// Which pipeline the task orders follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Pipeline {
    /// One forward, one backward (Narayanan et al., PipeDream-Flush): few live micro-batches.
    #[default]
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// All forward, then all backward (Huang et al.): every micro-batch is live at once.
    #[serde(rename = "gpipe")]
    GPipe,
}

/// One piece of work of a CompNode within a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Forward pass of a micro-batch through a stage.
    Fp {
        /// The stage.
        stage: StageId,
        /// The micro-batch, counted from 0 within the pass.
        micro_batch: u32,
    },
    /// Backward pass of a micro-batch through a stage.
    Bp {
        /// The stage.
        stage: StageId,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// Optimizer update of all parameters that the CompNode holds.
    Update,
}

/// How many micro-batches may be live (FP done or running, BP not done) in a stage at once.
pub fn in_flight_limit(pipeline: Pipeline, stage: StageId, stages: usize, micro_batches: u32) -> u32 {
    match pipeline {
        Pipeline::OneFOneB => (stages.saturating_sub(stage.index()) as u32).clamp(1, micro_batches),
        Pipeline::GPipe => micro_batches,
    }
}

/// The orders of a training step: FP and BP of every micro-batch, then UPDATE.
pub(crate) fn train_orders(
    stages: &[Stage],
    edges: &[StageEdge],
    compnodes: usize,
    pipeline: Pipeline,
    micro_batches: u32,
) -> Result<Vec<Vec<Task>>, PlanError> {
    let limit = |stage: StageId| in_flight_limit(pipeline, stage, stages.len(), micro_batches);
    let backward_first = pipeline == Pipeline::OneFOneB;
    let mut orders = Simulation::new(stages, edges, compnodes, micro_batches, true, backward_first).run(limit)?;
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

/// Unit-time list scheduling. All lookups are by (stage, micro-batch).
struct Simulation<'a> {
    stages: &'a [Stage],
    edges: &'a [StageEdge],
    micro_batches: u32,
    with_backward: bool,
    backward_first: bool,
    /// Tick from which on a task counts as done, by stage and micro-batch.
    fp_done: Vec<Vec<Option<u64>>>,
    bp_done: Vec<Vec<Option<u64>>>,
    free_at: Vec<u64>,
    orders: Vec<Vec<Task>>,
}

impl<'a> Simulation<'a> {
    fn new(
        stages: &'a [Stage],
        edges: &'a [StageEdge],
        compnodes: usize,
        micro_batches: u32,
        with_backward: bool,
        backward_first: bool,
    ) -> Self {
        let empty = vec![vec![None; micro_batches as usize]; stages.len()];
        Self {
            stages,
            edges,
            micro_batches,
            with_backward,
            backward_first,
            fp_done: empty.clone(),
            bp_done: empty,
            free_at: vec![0; compnodes],
            orders: vec![Vec::new(); compnodes],
        }
    }

    fn run(mut self, limit: impl Fn(StageId) -> u32) -> Result<Vec<Vec<Task>>, PlanError> {
        let passes = if self.with_backward { 2 } else { 1 };
        let total = self.stages.len() * self.micro_batches as usize * passes;
        let mut placed = 0;
        let mut now = 0;
        while placed < total {
            for node in 0..self.orders.len() {
                if self.free_at[node] <= now
                    && let Some(task) = self.choose(NodeIndex(node as u32), now, &limit)
                {
                    self.start(node, task, now);
                    placed += 1;
                }
            }
            let Some(next) = self.next_tick(now) else {
                if placed == total {
                    break;
                }
                return Err(PlanError::Deadlock);
            };
            now = next;
        }
        Ok(self.orders)
    }

    /// The earliest tick after `now` at which some task ends.
    fn next_tick(&self, now: u64) -> Option<u64> {
        self.free_at.iter().copied().filter(|&t| t > now).min()
    }

    fn start(&mut self, node: usize, task: Task, now: u64) {
        match task {
            Task::Fp { stage, micro_batch } => {
                self.free_at[node] = now + FP_TICKS;
                self.fp_done[stage.index()][micro_batch as usize] = Some(now + FP_TICKS);
            }
            Task::Bp { stage, micro_batch } => {
                self.free_at[node] = now + BP_TICKS;
                self.bp_done[stage.index()][micro_batch as usize] = Some(now + BP_TICKS);
            }
            Task::Update => {}
        }
        self.orders[node].push(task);
    }

    /// Later stages first: what is nearest to the loss frees memory soonest.
    fn choose(&self, node: NodeIndex, now: u64, limit: &impl Fn(StageId) -> u32) -> Option<Task> {
        let own = || self.stages.iter().rev().filter(move |s| s.compnode == node);
        let backward = || own().find_map(|s| self.next_backward(s.id, now));
        let forward = || own().find_map(|s| self.next_forward(s.id, now, limit(s.id)));
        if !self.with_backward {
            forward()
        } else if self.backward_first {
            backward().or_else(forward)
        } else {
            forward().or_else(backward)
        }
    }

    fn next_forward(&self, stage: StageId, now: u64, limit: u32) -> Option<Task> {
        let started = self.fp_done[stage.index()].iter().flatten().count() as u32;
        if started == self.micro_batches {
            return None;
        }
        // Without BP a micro-batch is live until the last stage has seen it.
        let ended = if self.with_backward { &self.bp_done[stage.index()] } else { self.fp_done.last()? };
        let finished = ended.iter().flatten().filter(|&&t| t <= now).count() as u32;
        let task = Task::Fp { stage, micro_batch: started };
        (started.saturating_sub(finished) < limit && self.is_ready(task, now)).then_some(task)
    }

    fn next_backward(&self, stage: StageId, now: u64) -> Option<Task> {
        let started = self.bp_done[stage.index()].iter().flatten().count() as u32;
        let task = Task::Bp { stage, micro_batch: started };
        (started < self.micro_batches && self.is_ready(task, now)).then_some(task)
    }

    fn is_ready(&self, task: Task, now: u64) -> bool {
        let done = |table: &[Vec<Option<u64>>], stage: StageId, micro_batch: u32| {
            table[stage.index()][micro_batch as usize].is_some_and(|t| t <= now)
        };
        needs(self.edges, task).all(|need| match need {
            Need::Activation { edge, micro_batch } => done(&self.fp_done, self.edges[edge.index()].from, micro_batch),
            Need::Gradient { edge, micro_batch } => done(&self.bp_done, self.edges[edge.index()].to, micro_batch),
            Need::Kept { stage, micro_batch } => done(&self.fp_done, stage, micro_batch),
        })
    }
}

#[cfg(test)]
mod tests;
