//! The compute thread: runs the task orders of one CompNode, step after step.
//!
//! Tasks run in the order that the placement gives; each waits until the readiness rule has all it needs. Sending
//! never waits for the wire, so compute and transfers overlap; what is live is bounded by the order.

mod borders;
mod pauses;
mod shared;
mod update;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fusionllm_codec::HostTensor;
use fusionllm_graph::{OpDag, OpId};
use fusionllm_planner::{EdgeId, Need, NodeIndex, PassPlan, Placement, Stage, StageEdge, StageId, Task, Way, needs};
use fusionllm_protocol::{Channel, Pass, StepReport, StepRules};

use crate::border::BorderTensor;
use crate::codec_table::CodecTable;
use crate::data::Batches;
use crate::exchange::Exchange;
use crate::executor::{Executor, LazyTensor, MicroBatch};
use crate::mailbox::Slot;
use crate::recompute::Recomputation;
use crate::residuals;
use crate::step_log::StepLog;
use crate::{CompNodeError, ExecutorError};

/// What a task loop works by.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// The whole OP-DAG, of which this CompNode has a part.
    pub dag: Arc<OpDag>,
    /// Who holds what, and the task orders.
    pub placement: Arc<Placement>,
    /// This CompNode, by its place in the placement.
    pub node: NodeIndex,
    /// What is done in which step.
    pub rules: StepRules,
    /// What error feedback held back at the checkpoint.
    pub residuals: Vec<(Channel, HostTensor)>,
    /// Codecs that change while training.
    pub codecs: Arc<CodecTable>,
}

/// What a CompNode holds between two steps.
pub trait HeldState {
    /// All parameters, optimizer state, and what error feedback holds back. A tensor is looked at where it is, or copied by
    /// being read; they can be asked for again.
    ///
    /// # Errors
    /// If what is held cannot be had, which ends the job.
    fn tensors(&mut self) -> Result<Vec<LazyTensor<'_>>, CompNodeError>;
}

/// Where a task loop reports to.
pub trait JobSink {
    /// A step is done here.
    ///
    /// # Errors
    /// If nobody listens any more: the loop then ends.
    fn step(&mut self, report: StepReport) -> Result<(), CompNodeError>;

    /// A checkpoint is due of the state after `step` updates.
    ///
    /// # Errors
    /// If training cannot go on.
    fn checkpoint(&mut self, step: u64, state: &mut dyn HeldState) -> Result<(), CompNodeError>;

    /// Whether a snapshot after `step` updates was asked for. It is asked once after each step.
    ///
    /// # Errors
    /// If nobody listens any more.
    fn wants_snapshot(&mut self, _step: u64) -> Result<bool, CompNodeError> {
        Ok(false)
    }

    /// The snapshot that was asked for, of the state after `step` updates.
    ///
    /// # Errors
    /// If training cannot go on.
    fn snapshot(&mut self, _step: u64, _state: &mut dyn HeldState) -> Result<(), CompNodeError> {
        Ok(())
    }
}

/// How good the model is: nothing where the loss op is not here.
#[derive(Clone, Copy, Debug, Default)]
struct Scores {
    loss: Option<f64>,
    /// Share of images whose class is the likeliest one.
    accuracy: Option<f64>,
}

/// The task loop of one CompNode.
pub struct TaskLoop {
    plan: TrainPlan,
    executor: Box<dyn Executor>,
    recomputation: Recomputation,
    exchange: Box<dyn Exchange>,
    /// Only the data owner has them.
    batches: Option<Box<dyn Batches>>,
    /// Tensors between two stages that are both here.
    local: BTreeMap<Slot, BorderTensor>,
    /// Which elements of the activation that came over an edge are not 0, row-major, for gradients that go back only
    /// there.
    masks: BTreeMap<(EdgeId, u32), Vec<bool>>,
    busy: Duration,
    live_max: usize,
    log: StepLog,
    shared: shared::SharedGradients,
}

impl std::fmt::Debug for TaskLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskLoop").field("node", &self.plan.node).finish_non_exhaustive()
    }
}

impl HeldState for TaskLoop {
    fn tensors(&mut self) -> Result<Vec<LazyTensor<'_>>, CompNodeError> {
        let residuals = self.residuals()?;
        let residuals = residuals::to_tensors(&self.plan.dag, &self.plan.placement, residuals);
        let mut tensors = self.executor.export();
        tensors.extend(residuals.map(LazyTensor::from));
        Ok(tensors)
    }
}

impl TaskLoop {
    /// A loop over `executor` and `exchange`. `batches` is there on the CompNode that holds the placeholders.
    pub fn new(
        plan: TrainPlan,
        executor: Box<dyn Executor>,
        exchange: Box<dyn Exchange>,
        batches: Option<Box<dyn Batches>>,
    ) -> Self {
        Self {
            recomputation: Recomputation::of(&plan.dag, &plan.placement, plan.node),
            plan,
            executor,
            exchange,
            batches,
            local: BTreeMap::new(),
            masks: BTreeMap::new(),
            busy: Duration::ZERO,
            live_max: 0,
            log: StepLog::default(),
            shared: shared::SharedGradients::default(),
        }
    }

    /// Runs all steps that are left.
    ///
    /// # Errors
    /// The first [`CompNodeError`]; the job cannot go on then.
    pub fn run(&mut self, sink: &mut dyn JobSink) -> Result<(), CompNodeError> {
        self.run_steps(sink).map_err(|error| match error {
            // Compute ends because the job has; why it has is known here.
            CompNodeError::Executor(ExecutorError::Stopped) => {
                self.exchange.check().map_or_else(CompNodeError::from, |()| ExecutorError::Stopped.into())
            }
            error => error,
        })
    }

    fn run_steps(&mut self, sink: &mut dyn JobSink) -> Result<(), CompNodeError> {
        self.restore_residuals();
        for step in self.plan.rules.steps.clone() {
            let report = self.step(step)?;
            let done = report.step;
            sink.step(report)?;
            if self.plan.rules.checkpoints.is_due(done) {
                sink.checkpoint(done, self)?;
            }
            if sink.wants_snapshot(done)? {
                sink.snapshot(done, self)?;
            }
        }
        Ok(())
    }

    fn restore_residuals(&mut self) {
        for (channel, residual) in std::mem::take(&mut self.plan.residuals) {
            match channel {
                Channel::Shared { id, .. } => self.restore_shared_residual(id, residual),
                _ => self.exchange.restore_residual(channel, residual),
            }
        }
    }

    /// What error feedback holds back here, for a checkpoint.
    fn residuals(&mut self) -> Result<Vec<(Channel, HostTensor)>, CompNodeError> {
        let mut residuals = if self.plan.rules.error_feedback { self.exchange.residuals()? } else { Vec::new() };
        residuals.extend(self.shared_residuals()?);
        Ok(residuals)
    }

    /// One training step and the evaluation after it, if one is due.
    fn step(&mut self, step: u64) -> Result<StepReport, CompNodeError> {
        let began = Instant::now();
        self.busy = Duration::ZERO;
        self.live_max = 0;
        self.log.begin(step, self.plan.rules.steps.start, self.plan.rules.steps.end);
        let placement = Arc::clone(&self.plan.placement);
        let Scores { loss, .. } = self.pass(&placement.train, Pass::Train, step)?;
        let (lr, grad_norm) = self.update(step)?;
        let step_s = began.elapsed().as_secs_f64();
        let busy_s = self.busy.as_secs_f64();
        let trace = self.log.end();
        let done = step + 1;
        let found = if self.plan.rules.evaluations.is_due(done) {
            self.pass(&placement.eval, Pass::Eval, step)?
        } else {
            Scores::default()
        };
        Ok(StepReport {
            step: done,
            loss,
            eval_loss: found.loss,
            eval_accuracy: found.accuracy,
            lr,
            grad_norm,
            step_s,
            busy_s,
            live_max: u32::try_from(self.live_max).unwrap_or(u32::MAX),
            links: self.exchange.drain_link_bytes(),
            received: self.exchange.drain_link_speeds(),
            trace,
        })
    }

    /// Runs this CompNode's order of a pass. Gives the means over micro-batches if the loss op is here.
    fn pass(&mut self, plan: &PassPlan, pass: Pass, step: u64) -> Result<Scores, CompNodeError> {
        let (mut losses, mut shares) = (Vec::new(), Vec::new());
        let order = plan.orders.get(self.plan.node.index()).map_or(&[][..], Vec::as_slice);
        let last_bp = order.iter().rposition(|task| matches!(task, Task::Bp { .. }));
        for (position, &task) in order.iter().enumerate() {
            self.exchange.check()?;
            match task {
                Task::Fp { stage, micro_batch } => {
                    let micro_batch = MicroBatch { step, pass, index: micro_batch };
                    let Scores { loss, accuracy } = self.forward(stage, micro_batch, task)?;
                    losses.extend(loss);
                    shares.extend(accuracy);
                }
                Task::Bp { stage, micro_batch } => {
                    let micro_batch = MicroBatch { step, pass, index: micro_batch };
                    self.backward(stage, micro_batch, task, 1.0 / f64::from(plan.micro_batches))?;
                    if last_bp == Some(position) {
                        self.send_shared_gradients(step)?;
                    }
                }
                Task::Wg { stage, micro_batch } => self.make_up_for(stage, micro_batch)?,
                // UPDATE closes the order; `step` does it, since it also needs the other CompNodes.
                Task::Update => {}
            }
        }
        let mean = |of: &[f64]| (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64);
        match mean(&losses) {
            Some(loss) if !loss.is_finite() => Err(self.not_finite("the loss", loss, step)),
            loss => Ok(Scores { loss, accuracy: mean(&shares) }),
        }
    }

    /// Something is no number any more. Before the first update the learning rate cannot be why.
    fn not_finite(&self, what: &'static str, value: f64, step: u64) -> CompNodeError {
        let advice = if step == self.plan.rules.steps.start {
            "no update was made before it, so train.lr is not why: look at the weights and the data it starts from"
        } else if self.plan.rules.clip.is_some() {
            "lower train.lr, or raise train.warmup"
        } else {
            "lower train.lr, or set train.clip"
        };
        ExecutorError::NotFinite { what, value, step, advice }.into()
    }

    /// A task that began then has ended.
    fn worked(&mut self, task: Task, began: Instant) {
        let now = Instant::now();
        self.busy += now - began;
        self.log.task(task, began, now);
    }

    fn forward(&mut self, stage: StageId, micro_batch: MicroBatch, task: Task) -> Result<Scores, CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let held = stage_of(&placement, stage)?;
        let mut inputs = self.placeholders(held, micro_batch)?;
        // Placeholders that leave the stage leave it as they came.
        let leaves = |op: OpId| placement.edges.iter().any(|e| e.from == stage && e.op == op);
        let mut outgoing: BTreeMap<OpId, BorderTensor> = inputs.iter().filter(|(op, _)| leaves(*op)).cloned().collect();
        for need in needs(&placement.edges, task) {
            if let Need::Activation { edge, .. } = need {
                let edge = edge_of(&placement, edge.index())?;
                let tensor = self.fetch(&placement, edge.from, Channel::Activation(edge.id), micro_batch)?;
                inputs.push((edge.op, tensor));
            }
        }
        let began = Instant::now();
        let output = self.recomputation.forward(&mut *self.executor, stage, micro_batch, inputs)?;
        for (op, tensor) in output.tensors {
            let reader = |e: &StageEdge| (e.to, self.codec_of(e, Way::Activation, micro_batch.pass));
            let readers = placement.edges.iter().filter(|e| e.from == stage && e.op == op).map(reader);
            outgoing.insert(op, self.on_host_where_sent(&placement, readers, tensor)?);
        }
        self.worked(task, began);
        self.live_max = self.live_max.max(self.executor.live()).max(self.recomputation.live());
        let mut leaving = placement.edges.iter().filter(|e| e.from == stage);
        while let Some(edge) = leaving.next() {
            let is_last = !leaving.clone().any(|later| later.op == edge.op);
            let tensor = if is_last { outgoing.remove(&edge.op) } else { outgoing.get(&edge.op).cloned() }
                .ok_or_else(|| ExecutorError::Internal { what: format!("{stage} gave nothing for {}", edge.id) })?;
            self.deliver(
                &placement,
                edge.to,
                Channel::Activation(edge.id),
                micro_batch,
                tensor,
                self.codec_of(edge, Way::Activation, micro_batch.pass),
            )?;
        }
        Ok(Scores { loss: output.loss, accuracy: output.accuracy })
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        task: Task,
        loss_scale: f64,
    ) -> Result<(), CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let mut gradients = Vec::new();
        for need in needs(&placement.edges, task) {
            if let Need::Gradient { edge, .. } = need {
                let edge = edge_of(&placement, edge.index())?;
                let tensor = self.fetch(&placement, edge.to, Channel::Gradient(edge.id), micro_batch)?;
                gradients.push((edge.to, (edge.op, tensor)));
            }
        }
        // In one order wherever the cuts lie: each sum adds an earlier consumer's gradient to that of all later ones.
        gradients.sort_by_key(|(from, _)| std::cmp::Reverse(*from));
        let gradients = gradients.into_iter().map(|(_, gradient)| gradient).collect();
        let began = Instant::now();
        let mut inputs = BTreeMap::new();
        let found = self.recomputation.backward(&mut *self.executor, stage, micro_batch, gradients, loss_scale)?;
        for (op, tensor) in found {
            let maker = |e: &StageEdge| (e.from, self.codec_of(e, Way::Gradient, micro_batch.pass));
            let makers = placement.edges.iter().filter(|e| e.to == stage && e.op == op).map(maker);
            inputs.insert(op, self.on_host_where_sent(&placement, makers, tensor)?);
        }
        self.worked(task, began);
        for edge in placement.edges.iter().filter(|e| e.to == stage && e.gradient) {
            let mut tensor = inputs
                .remove(&edge.op)
                .ok_or_else(|| ExecutorError::Internal { what: format!("{stage} gave no gradient for {}", edge.id) })?;
            if let Some(mask) = self.masks.remove(&(edge.id, micro_batch.index)) {
                tensor = borders::masked(tensor.into_host()?, &mask)?.into();
            }
            self.deliver(
                &placement,
                edge.from,
                Channel::Gradient(edge.id),
                micro_batch,
                tensor,
                self.codec_of(edge, Way::Gradient, micro_batch.pass),
            )?;
        }
        Ok(())
    }
}

fn slot(channel: Channel, micro_batch: MicroBatch) -> Slot {
    Slot { channel, pass: micro_batch.pass, step: micro_batch.step, micro_batch: micro_batch.index }
}

fn internal(error: fusionllm_codec::CodecError) -> ExecutorError {
    ExecutorError::Internal { what: error.to_string() }
}

fn stage_of(placement: &Placement, stage: StageId) -> Result<&Stage, ExecutorError> {
    let missing = || ExecutorError::Internal { what: format!("the placement has no {stage}") };
    placement.stages.get(stage.index()).ok_or_else(missing)
}

fn edge_of(placement: &Placement, index: usize) -> Result<&StageEdge, ExecutorError> {
    let missing = || ExecutorError::Internal { what: format!("the placement has no edge {index}") };
    placement.edges.get(index).ok_or_else(missing)
}
