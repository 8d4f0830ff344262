//! From an assignment to something that can run: graph, data, executor.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement};
use fusionllm_protocol::{Assignment, DataReport, FromCompNode, JobSpec, RunKey, StepRules, TrainSpec};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::scratch::{check_scratch_room, shard_bytes};
use crate::backend::{Backend, ExecutorSpec, FirstParams, Load, check_ops};
use crate::checkpoint::{ShardFile, ShardTensors};
use crate::data::{
    Batches, ChatTemplate, Corpus, ImageBatches, ImageSet, ReadableData, Reading, TextBatches, Tokenizer, Tokenizing,
};
use crate::executor::{Executor, NamedTensor, TensorSource};
use crate::mailbox::Mailbox;
use crate::optimizer::OptimizerSpec;
use crate::params::initial_values;
use crate::residuals;
use crate::task_loop::TrainPlan;
use crate::{CompNodeError, ExchangeError, ExecutorError, ShardError};

/// The message that this CompNode cannot go on with the job.
pub(super) fn failed(key: RunKey, error: &CompNodeError) -> FromCompNode {
    match error {
        CompNodeError::Exchange(ExchangeError::Unreached { node, reason, .. }) => {
            FromCompNode::LinkLost { key, peer: *node, reason: reason.clone() }
        }
        error => FromCompNode::Failed { key, reason: error.to_string(), bad_input: error.is_bad_input() },
    }
}

/// An assignment that is ready to start.
pub(crate) struct Prepared {
    pub(super) key: RunKey,
    pub(super) plan: TrainPlan,
    /// Samples in a micro-batch.
    pub(super) batch: u32,
    /// What its shard of a checkpoint takes.
    pub(super) shard_bytes: u64,
    pub(super) executor: Box<dyn Executor>,
    pub(super) batches: Option<Box<dyn Batches>>,
    pub(super) data: Option<DataReport>,
    /// Dropped last, when the rest is gone from memory.
    pub(super) permit: OwnedSemaphorePermit,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("key", &self.key).finish_non_exhaustive()
    }
}

/// Files with what the part begins with, on their way from the broker or from those who keep snapshots.
pub(super) type WeightsReceiver = oneshot::Receiver<Result<Vec<ShardFile>, CompNodeError>>;

/// Where an assignment is built.
pub(super) struct BuildSite {
    pub(super) backend: Arc<dyn Backend>,
    /// Bytes that a job may fill, if that is known.
    pub(super) free_bytes: Option<u64>,
    /// Bytes of the machine's memory that are free, where the device has its own.
    pub(super) host_bytes: Option<u64>,
    /// What the job may read here.
    pub(super) readable: Arc<ReadableData>,
    /// How far that is; others watch it.
    pub(super) reading: Arc<Reading>,
    /// Where shards lie while they come and go.
    pub(super) scratch: Arc<Path>,
    /// Bytes of the weights that lie there already.
    pub(super) arrived: Arc<AtomicU64>,
    pub(super) permit: OwnedSemaphorePermit,
    /// Closed when the job is dropped.
    pub(super) mailbox: Arc<Mailbox>,
}

impl BuildSite {
    /// Whether the job is still there.
    fn check(&self) -> Result<(), CompNodeError> {
        self.mailbox.closed().map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Builds what the assignment describes. Reads data and waits for weights: for a blocking thread.
pub(super) fn prepare(
    assignment: &Assignment,
    site: BuildSite,
    weights: Option<WeightsReceiver>,
) -> Result<Prepared, CompNodeError> {
    let key = assignment.key;
    let dag = Arc::new(OpDag::from_json(&assignment.graph)?);
    check_ops(site.backend.as_ref(), &dag)?;
    let spec = &assignment.spec;
    let optimizer = OptimizerSpec::of(&spec.train);
    let (placement, node) = (&assignment.placement, assignment.node);
    let first = if weights.is_some() { FirstParams::Imported } else { FirstParams::Drawn };
    let held = ExecutorSpec::of_placement(Arc::clone(&dag), placement, node, optimizer, spec.train.seed, first);
    let held = held.computing_in(spec.train.precision);
    let planned = check_memory(assignment, &held, &*site.backend, site.free_bytes)?;
    let shard_bytes = shard_bytes(&dag, placement, node, &spec.train);
    check_scratch_room(&site.scratch, shard_bytes, &site.arrived)?;
    site.check()?;
    // On a CPU, all that and the tokens lie in the same memory.
    if let Some(room) = site.host_bytes.or(site.free_bytes.map(|room| room - planned)) {
        site.reading.limit(room);
    }
    let (batches, data) = open_data(assignment, &dag, &site)?;
    site.check()?;
    if !site.backend.has(spec.train.precision) {
        tracing::warn!(device = site.backend.name(), precision = ?spec.train.precision, "this device computes in f32");
    }
    let mut executor = site.backend.build(held, site.mailbox.stop_flag())?;
    let mut residuals = Vec::new();
    if let Some(weights) = weights {
        let lost = |_| CompNodeError::Broker { reason: "the weights did not come".to_owned() };
        let files = weights.blocking_recv().map_err(lost)??.into_iter();
        let seed = (assignment.start_step == 0).then_some(spec.train.seed);
        let files = files.map(ShardFile::into_tensors).collect::<Result<_, _>>()?;
        let mut tensors = AllOf { files, dag: Arc::clone(&dag), seed };
        executor.import(&mut tensors)?;
        residuals = residuals::take(&dag, placement, node, &mut tensors)?;
    }
    site.check()?;
    let plan = TrainPlan {
        dag,
        placement: Arc::new(placement.clone()),
        node,
        rules: StepRules::of(spec, assignment.start_step),
        residuals,
        codecs: Arc::default(),
    };
    Ok(Prepared {
        key,
        plan,
        batch: spec.micro_batch_size(),
        shard_bytes,
        executor,
        batches,
        data,
        permit: site.permit,
    })
}

/// Holds what an assignment takes against the room in the device's memory, before any of it is filled. Gives the bytes that
/// the plan counts on.
///
/// # Errors
/// [`CompNodeError::Memory`] with the numbers, [`ExecutorError::NoKernel`] if the device cannot compute an op.
pub(super) fn check_memory(
    assignment: &Assignment,
    held: &ExecutorSpec,
    backend: &dyn Backend,
    room: Option<u64>,
) -> Result<u64, CompNodeError> {
    let (placement, node, spec) = (&assignment.placement, assignment.node, &assignment.spec);
    let fits = |what: &str, needed: u64| match room.filter(|&room| needed > room) {
        Some(room) => Err(CompNodeError::Memory { what: what.to_owned(), needed, room }),
        None => Ok(()),
    };
    let least = least_bytes(&held.dag, placement, node, &spec.train);
    fits("parameters, gradients and optimizer state", least)?;
    let planned = assignment.planned_bytes.max(least);
    fits("parameters, their state, activations and messages, as planned,", planned)?;
    let batch = spec.micro_batch_size() as usize;
    let held_at_once = if placement.recomputes(node) { BTreeMap::new() } else { placement.held_bound(node) };
    let between_pieces = placement.kept_between_pieces(&held.dag, node, batch);
    let load = Load { batch, held: held_at_once, between_pieces };
    if let Some(needed) = backend.needs(held, &load)? {
        fits("parameters, their state and activations, as this device lays them out,", needed)?;
    }
    Ok(planned)
}

/// Tensors of several files, which agree on those that they share.
struct AllOf {
    files: Vec<ShardTensors>,
    dag: Arc<OpDag>,
    /// What adapters are drawn from that are in no file: those of a model that begins with the weights of a folder.
    seed: Option<u64>,
}

impl TensorSource for AllOf {
    fn take(&mut self, name: &str) -> Result<Option<NamedTensor>, ShardError> {
        for file in &mut self.files {
            if let Some(tensor) = file.take(name)? {
                return Ok(Some(tensor));
            }
        }
        let param = self.dag.find_param(name).map(|id| self.dag.param(id));
        let adapter = param.filter(|param| !param.frozen && self.dag.has_frozen());
        let (Some(param), Some(seed)) = (adapter, self.seed) else { return Ok(None) };
        Ok(Some(NamedTensor {
            name: name.to_owned(),
            shape: param.shape.clone(),
            values: initial_values(param, seed)?,
        }))
    }
}

/// Bytes that a CompNode's part fills at the least: its parameters, their gradients, and what the optimizer keeps.
fn least_bytes(dag: &OpDag, placement: &Placement, node: NodeIndex, train: &TrainSpec) -> u64 {
    let trained = placement.trained_bytes_of(dag, node);
    train.state_bytes(placement.param_bytes_of(dag, node), trained).saturating_add(trained)
}

type OpenedData = (Option<Box<dyn Batches>>, Option<DataReport>);

/// Reads the data if this CompNode holds the placeholders.
fn open_data(assignment: &Assignment, dag: &OpDag, site: &BuildSite) -> Result<OpenedData, CompNodeError> {
    let placeholders = [dag.input(), dag.label()];
    let holds = |op| assignment.placement.stages_of(assignment.node).any(|s| s.ops.contains(&op));
    if !placeholders.into_iter().flatten().any(holds) {
        return Ok((None, None));
    }
    let spec = &assignment.spec;
    if let Some([_, size, _]) = dag.image_size() {
        return open_images(spec, dag, size, site);
    }
    let tokenizer = Tokenizer::of_job_within(&spec.data, assignment.tokenizer.as_deref(), &site.readable)?;
    let template = ChatTemplate::of_job(&spec.data, &assignment.chat, &site.readable)?;
    let by = Tokenizing { tokenizer: &tokenizer, template: template.as_ref() };
    let corpus = Corpus::read_within(&spec.data, by, &site.readable, &site.reading)?;
    let vocab = logits_of(dag)?;
    let note = corpus.check_vocabulary(vocab, spec.model.path.is_none())?;
    let mut data = corpus.report(vocab)?;
    data.notes.extend(note);
    let batches = TextBatches::new(Arc::new(corpus), spec);
    Ok((Some(Box::new(batches)), Some(data)))
}

/// Entries of the vocabulary, or classes.
fn logits_of(dag: &OpDag) -> Result<usize, ExecutorError> {
    dag.vocab().ok_or_else(|| ExecutorError::Internal { what: "the graph has no logits".to_owned() })
}

/// The same for a model that reads images of `size` pixels a side.
fn open_images(spec: &JobSpec, dag: &OpDag, size: usize, site: &BuildSite) -> Result<OpenedData, CompNodeError> {
    let images = ImageSet::read_within(&spec.data, &site.readable, &site.reading)?;
    let note = images.check_classes(logits_of(dag)?)?;
    let mut data = images.report();
    data.notes.extend(note);
    let batches = ImageBatches::new(Arc::new(images), spec, size);
    Ok((Some(Box::new(batches)), Some(data)))
}
