//! Task orders: what each CompNode computes, in which order, within one pass.
//!
//! The orders come out of a simulation in unit time (FP 1, BP 2, a message its link's latency) in which every CompNode
//! takes, of the tasks that the readiness rule allows, the one its pipeline prefers. So an order exists only if it can
//! be completed: it cannot deadlock. On a linear chain this gives the textbook orders of GPipe and 1F1B.

use std::collections::BTreeSet;

use crate::placement::by_group;
use crate::ready::{Need, needs, touching};
use crate::{EdgeId, GroupId, Pipeline, PlanError, Stage, StageEdge, StageId, Task};

/// How many micro-batches may be live (FP done or running, BP not done) at once in a stage that is `from_end` stages from
/// the end of its group's pipeline, the last one 1; of the `micro_batches` that the group has. In 1F1B a stage may run so
/// many micro-batches ahead of what it needs where links take no time.
pub fn in_flight_limit(pipeline: Pipeline, run_ahead: u32, from_end: usize, micro_batches: u32) -> u32 {
    match pipeline {
        Pipeline::OneFOneB => (from_end as u32).saturating_add(run_ahead).min(micro_batches).max(1),
        Pipeline::GPipe => micro_batches,
    }
}

/// The micro-batches of a pass that each group works on, each ascending, in the order of the groups.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shares(Vec<Vec<u32>>);

impl Shares {
    /// One more group.
    pub(crate) fn push(&mut self, micro_batches: Vec<u32>) {
        self.0.push(micro_batches);
    }

    /// All in one group.
    #[cfg(test)]
    pub(crate) fn whole(micro_batches: u32) -> Self {
        Self(vec![(0..micro_batches).collect()])
    }

    fn of(&self, group: GroupId) -> &[u32] {
        self.0.get(group.index()).map_or(&[], Vec::as_slice)
    }

    /// Micro-batches of the group that has most.
    fn most(&self) -> u64 {
        self.0.iter().map(|share| share.len() as u64).max().unwrap_or(0)
    }
}

/// What the task orders of a training step follow from, besides stages and edges.
#[derive(Clone, Debug)]
pub(crate) struct OrderSpec {
    pub(crate) pipeline: Pipeline,
    /// Micro-batches that a stage may be further ahead than 1F1B.
    pub(crate) run_ahead: u32,
    pub(crate) shares: Shares,
    /// Ticks that a message takes, by edge; where there is none, no time.
    pub(crate) delays: Vec<u64>,
}

impl OrderSpec {
    /// The ticks of `latency_s` where FP and BP of a micro-batch take `stage_s` seconds.
    pub(crate) fn delay(&self, latency_s: f64, stage_s: f64) -> u64 {
        let tick_s = stage_s / (FP_TICKS + BP_TICKS) as f64;
        // What takes longer than all micro-batches need is long, however much longer.
        let most = self.shares.most() * (FP_TICKS + BP_TICKS);
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
    let OrderSpec { pipeline, run_ahead, ref shares, ref delays } = *spec;
    let limit =
        |place: &Place<'_>| in_flight_limit(pipeline, run_ahead, place.from_end, place.micro_batches.len() as u32);
    let mut simulation = Simulation::new(stages, edges, compnodes, shares, Some(pipeline));
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
    shares: &Shares,
) -> Result<Vec<Vec<Task>>, PlanError> {
    Simulation::new(stages, edges, compnodes, shares, None).run(|place| place.depth as u32)
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

/// Where a stage is in its group, and what that has to do.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    /// Stages from this one to the last, both counted.
    from_end: usize,
    /// Stages of the group.
    depth: usize,
    /// The last stage of the group.
    last: StageId,
    micro_batches: &'a [u32],
}

/// List scheduling in unit time: the state of all CompNodes at one tick. Tasks are numbered here by the place of their
/// micro-batch among those of the group.
struct Simulation<'a> {
    /// Edges that touch a stage, so that a task need not look through all.
    touching: Vec<Vec<StageEdge>>,
    /// Stages of a CompNode, those nearest to the loss first, which free memory soonest.
    own: Vec<Vec<StageId>>,
    /// By stage.
    places: Vec<Place<'a>>,
    /// How FP and BP alternate; nothing without BP.
    backward: Option<Pipeline>,
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

impl<'a> Simulation<'a> {
    fn new(
        stages: &[Stage],
        edges: &[StageEdge],
        compnodes: usize,
        shares: &'a Shares,
        backward: Option<Pipeline>,
    ) -> Self {
        let mut places = Vec::with_capacity(stages.len());
        for group in by_group(stages) {
            let Some(last) = group.last() else { continue };
            let (depth, last, micro_batches) = (group.len(), last.id, shares.of(last.group));
            places.extend((1..=depth).rev().map(|from_end| Place { from_end, depth, last, micro_batches }));
        }
        let mut own = vec![Vec::new(); compnodes];
        for stage in stages {
            own[stage.compnode.index()].push(stage.id);
        }
        own.iter_mut().for_each(|own| own.sort_by_key(|stage| places[stage.index()].from_end));
        Self {
            touching: touching(stages.len(), edges),
            own,
            places,
            backward,
            progress: vec![Progress::default(); stages.len()],
            ends: edges.iter().map(|e| (e.from, e.to)).collect(),
            delays: Vec::new(),
            events: BTreeSet::new(),
            free_at: vec![0; compnodes],
            orders: vec![Vec::new(); compnodes],
        }
    }

    fn run(mut self, limit: impl Fn(&Place<'_>) -> u32) -> Result<Vec<Vec<Task>>, PlanError> {
        let limits: Vec<u32> = self.places.iter().map(limit).collect();
        let passes = if self.backward.is_some() { 2 } else { 1 };
        let total = passes * self.places.iter().map(|place| place.micro_batches.len()).sum::<usize>();
        let mut placed = 0;
        let mut now = 0;
        while placed < total {
            for node in 0..self.orders.len() {
                if self.free_at[node] <= now
                    && let Some(task) = self.choose(node, now, &limits)
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
        let (stage, place, ticks) = match task {
            Task::Fp { stage, micro_batch: place } => (stage, place, FP_TICKS),
            Task::Bp { stage, micro_batch: place } => (stage, place, BP_TICKS),
            Task::Wg { .. } | Task::Update => return,
        };
        let end = now + ticks;
        let micro_batch = self.number(stage, place);
        let progress = &mut self.progress[stage.index()];
        if ticks == FP_TICKS {
            progress.fp.push(end);
            self.orders[node].push(Task::Fp { stage, micro_batch });
        } else {
            progress.bp.push(end);
            self.orders[node].push(Task::Bp { stage, micro_batch });
        }
        self.free_at[node] = end;
        self.events.insert(end);
        self.events.extend(self.touching[stage.index()].iter().map(|e| end + delay(&self.delays, e.id)));
    }

    /// The number in the step of a group's micro-batch.
    fn number(&self, stage: StageId, place: u32) -> u32 {
        self.places[stage.index()].micro_batches[place as usize]
    }

    fn choose(&self, node: usize, now: u64, limits: &[u32]) -> Option<Task> {
        let backward = || {
            let (stage, micro_batch) = self.soonest(node, |stage| self.next_backward(stage, now))?;
            Some(Task::Bp { stage, micro_batch })
        };
        let forward = || {
            let next = |stage: StageId| self.next_forward(stage, now, limits[stage.index()]);
            let (stage, micro_batch) = self.soonest(node, next)?;
            Some(Task::Fp { stage, micro_batch })
        };
        match self.backward {
            None => forward(),
            Some(Pipeline::OneFOneB) => backward().or_else(forward),
            Some(Pipeline::GPipe) => forward().or_else(backward),
        }
    }

    /// The first of a CompNode's stages that has something next, and what. Of stages of several groups that are equally near
    /// to their end, the one whose micro-batch comes first in the step goes first, so that the groups take turns.
    fn soonest(&self, node: usize, next: impl Fn(StageId) -> Option<u32>) -> Option<(StageId, u32)> {
        let from_end = |stage: &StageId| self.places[stage.index()].from_end;
        self.own[node].chunk_by(|a, b| from_end(a) == from_end(b)).find_map(|equal| {
            let able = equal.iter().filter_map(|&stage| Some((stage, next(stage)?)));
            able.min_by_key(|&(stage, place)| self.number(stage, place))
        })
    }

    fn next_forward(&self, stage: StageId, now: u64, limit: u32) -> Option<u32> {
        let started = self.progress[stage.index()].fp.len() as u32;
        let Place { last, micro_batches, .. } = self.places[stage.index()];
        if started as usize == micro_batches.len() {
            return None;
        }
        // Without BP a micro-batch is live until the last stage of its group has seen it.
        let ended = match self.backward {
            Some(_) => &self.progress[stage.index()].bp,
            None => &self.progress[last.index()].fp,
        };
        let live = started.saturating_sub(Progress::finished(ended, now));
        let task = Task::Fp { stage, micro_batch: started };
        (live < limit && self.is_ready(stage, task, now)).then_some(started)
    }

    fn next_backward(&self, stage: StageId, now: u64) -> Option<u32> {
        let started = self.progress[stage.index()].bp.len() as u32;
        let is_left = (started as usize) < self.places[stage.index()].micro_batches.len();
        let task = Task::Bp { stage, micro_batch: started };
        (is_left && self.is_ready(stage, task, now)).then_some(started)
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
