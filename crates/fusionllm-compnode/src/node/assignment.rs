//! From an assignment to something that can run: graph, data, executor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement, kept_ops};
use fusionllm_protocol::{Assignment, DataReport, FromCompNode, OwnerView, RunKey, StepRules, TrainView};
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
use crate::seeds::{Found, Seeds, find_or_make};
use crate::snapshots::SnapshotStore;
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
    /// Where the seeds lie that only this CompNode has.
    pub(super) seeds: Arc<Path>,
    /// Where its snapshots lie.
    pub(super) snapshots: Arc<SnapshotStore>,
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
    let train = &assignment.job.train;
    let optimizer = OptimizerSpec::of(train);
    let (placement, node) = (&assignment.placement, assignment.node);
    let first = if weights.is_some() { FirstParams::Imported } else { FirstParams::Drawn };
    let kept = kept_here(assignment, &dag)?;
    if let Some(kept) = &kept {
        site.snapshots.keep_back(key.job, params_of(&dag, kept))?;
    }
    let (seeds, made_anew) = seeds_of(assignment, kept, &site.seeds)?;
    let held = ExecutorSpec::of_placement(Arc::clone(&dag), placement, node, optimizer, seeds.clone(), first);
    let held = held.computing_in(train.precision);
    let planned = check_memory(assignment, &held, &*site.backend, site.free_bytes)?;
    let shard_bytes = shard_bytes(&dag, placement, node, train);
    check_scratch_room(&site.scratch, shard_bytes, &site.arrived)?;
    site.check()?;
    // On a CPU, all that and the tokens lie in the same memory.
    if let Some(room) = site.host_bytes.or(site.free_bytes.map(|room| room - planned)) {
        site.reading.limit(room);
    }
    let (batches, mut data) = open_data(assignment, &dag, seeds.of_samples(), &site)?;
    if let Some(data) = &mut data {
        data.notes.extend(made_anew);
    }
    site.check()?;
    if !site.backend.has(train.precision) {
        tracing::warn!(device = site.backend.name(), precision = ?train.precision, "this device computes in f32");
    }
    let mut executor = site.backend.build(held, site.mailbox.stop_flag())?;
    let mut residuals = Vec::new();
    if let Some(weights) = weights {
        let lost = |_| CompNodeError::Broker { reason: "the weights did not come".to_owned() };
        let files = weights.blocking_recv().map_err(lost)??.into_iter();
        let seeds = (assignment.start_step == 0).then_some(seeds);
        let files = files.map(ShardFile::into_tensors).collect::<Result<_, _>>()?;
        let mut tensors = AllOf { files, dag: Arc::clone(&dag), seeds };
        executor.import(&mut tensors)?;
        residuals = residuals::take(&dag, placement, node, &mut tensors)?;
    }
    site.check()?;
    let plan = TrainPlan {
        dag,
        placement: Arc::new(placement.clone()),
        node,
        rules: StepRules::of(&assignment.job, assignment.start_step),
        residuals,
        codecs: Arc::default(),
    };
    Ok(Prepared {
        key,
        plan,
        batch: train.micro_batch_size(),
        shard_bytes,
        executor,
        batches,
        data,
        permit: site.permit,
    })
}

/// Of each op, whether it stays with the data owner, if this is the owner of a private job's data. All of these are here.
fn kept_here(assignment: &Assignment, dag: &OpDag) -> Result<Option<Vec<bool>>, CompNodeError> {
    let owner = assignment.job.owner.as_deref().filter(|owner| owner.data.private);
    let Some(owner) = owner else { return Ok(None) };
    let kept = kept_ops(dag, owner.data.keep_blocks)?;
    let given = assignment.placement.stages.iter().filter(|stage| stage.compnode != assignment.node);
    let mut given = given.flat_map(|stage| stage.ops.iter().map(|&op| (op, stage.compnode)));
    match given.find(|(op, _)| kept.get(op.index()).copied().unwrap_or(false)) {
        Some((op, node)) => Err(CompNodeError::GivenAway { op: dag.op(op).name.clone(), node }),
        None => Ok(Some(kept)),
    }
}

/// Names of the parameters of the ops that are kept.
fn params_of(dag: &OpDag, kept: &[bool]) -> BTreeSet<String> {
    let ops = dag.ops().iter().zip(kept).filter(|(_, kept)| **kept);
    ops.flat_map(|(op, _)| op.params.iter().map(|&param| dag.param(param).name.clone())).collect()
}

/// What this CompNode draws from: with ops that are kept here, a seed of its own for them. With what is to be told where that
/// is not the seed of the steps before.
fn seeds_of(
    assignment: &Assignment,
    kept: Option<Vec<bool>>,
    folder: &Path,
) -> Result<(Seeds, Option<String>), CompNodeError> {
    let (job, start_step) = (&assignment.job, assignment.start_step);
    let owner = job.owner.as_deref().filter(|owner| owner.data.has_own_seed());
    let (Some(owner), Some(kept)) = (owner, kept) else { return Ok((job.train.seed.into(), None)) };
    let (own, found) = find_or_make(folder, &owner.run, owner.begins_with.as_ref())?;
    let note = (found == Found::New && start_step > 0).then(|| {
        format!(
            "the seed that the data owner alone had up to step {start_step} is not on this machine: a new one is made, so \
             samples come in another order from here on; the weights are those that were kept"
        )
    });
    Ok((Seeds::with_own(job.train.seed, own, kept), note))
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
    let (placement, node, train) = (&assignment.placement, assignment.node, &assignment.job.train);
    let fits = |what: &str, needed: u64| match room.filter(|&room| needed > room) {
        Some(room) => Err(CompNodeError::Memory { what: what.to_owned(), needed, room }),
        None => Ok(()),
    };
    let least = least_bytes(&held.dag, placement, node, train);
    fits("parameters, gradients and optimizer state", least)?;
    let planned = assignment.planned_bytes.max(least);
    fits("parameters, their state, activations and messages, as planned,", planned)?;
    let batch = train.micro_batch_size() as usize;
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
    seeds: Option<Seeds>,
}

impl TensorSource for AllOf {
    fn take(&mut self, name: &str) -> Result<Option<NamedTensor>, ShardError> {
        for file in &mut self.files {
            if let Some(tensor) = file.take(name)? {
                return Ok(Some(tensor));
            }
        }
        let adapter = self.dag.find_param(name).filter(|&id| !self.dag.param(id).frozen && self.dag.has_frozen());
        let (Some(id), Some(seeds)) = (adapter, &self.seeds) else { return Ok(None) };
        let param = self.dag.param(id);
        Ok(Some(NamedTensor {
            name: name.to_owned(),
            shape: param.shape.clone(),
            values: initial_values(param, seeds.of_param(&self.dag, id))?,
        }))
    }
}

/// Bytes that a CompNode's part fills at the least: its parameters, their gradients, and what the optimizer keeps.
fn least_bytes(dag: &OpDag, placement: &Placement, node: NodeIndex, train: &TrainView) -> u64 {
    let trained = placement.trained_bytes_of(dag, node);
    train.state_bytes(placement.param_bytes_of(dag, node), trained).saturating_add(trained)
}

type OpenedData = (Option<Box<dyn Batches>>, Option<DataReport>);

/// Reads the data if this CompNode holds the placeholders.
fn open_data(assignment: &Assignment, dag: &OpDag, seed: u64, site: &BuildSite) -> Result<OpenedData, CompNodeError> {
    let placeholders = [dag.input(), dag.label()];
    let holds = |op| assignment.placement.stages_of(assignment.node).any(|s| s.ops.contains(&op));
    if !placeholders.into_iter().flatten().any(holds) {
        return Ok((None, None));
    }
    let train = &assignment.job.train;
    let Some(owner) = assignment.job.owner.as_deref() else {
        return Err(
            ExecutorError::Internal { what: "the data is read here, and nothing was said of it".to_owned() }.into()
        );
    };
    if let Some([_, size, _]) = dag.image_size() {
        return open_images((owner, train), dag, (size, seed), site);
    }
    let spec = &owner.data;
    let tokenizer = Tokenizer::of_job_within(spec, owner.tokenizer.as_deref(), &site.readable)?;
    let template = ChatTemplate::of_job(spec, &owner.chat, &site.readable)?;
    let by = Tokenizing { tokenizer: &tokenizer, template: template.as_ref() };
    let corpus = Corpus::read_within(spec, by, &site.readable, &site.reading)?;
    let vocab = logits_of(dag)?;
    let note = corpus.check_vocabulary(vocab, !owner.model_by_path)?;
    let mut data = corpus.report(vocab)?;
    data.notes.extend(note);
    let batches = TextBatches::new(Arc::new(corpus), spec, train, seed);
    Ok((Some(Box::new(batches)), Some(data)))
}

/// Entries of the vocabulary, or classes.
fn logits_of(dag: &OpDag) -> Result<usize, ExecutorError> {
    dag.vocab().ok_or_else(|| ExecutorError::Internal { what: "the graph has no logits".to_owned() })
}

/// The same for a model that reads images of `size` pixels a side.
fn open_images(
    (owner, train): (&OwnerView, &TrainView),
    dag: &OpDag,
    (size, seed): (usize, u64),
    site: &BuildSite,
) -> Result<OpenedData, CompNodeError> {
    let images = ImageSet::read_within(&owner.data, &site.readable, &site.reading)?;
    let note = images.check_classes(logits_of(dag)?)?;
    let mut data = images.report();
    data.notes.extend(note);
    let batches = ImageBatches::new(Arc::new(images), size, &owner.data, train, seed);
    Ok((Some(Box::new(batches)), Some(data)))
}
