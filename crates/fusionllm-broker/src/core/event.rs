//! What the core is told and what it asks for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_planner::{Cluster, NodeIndex, Placement, Plan, PlanError, PlanSpec, Simulated};
use fusionllm_protocol::{
    DataReport, DataSpec, DeviceProfile, FromBroker, FromCompNode, JobEvent, JobId, JobSpec, JobView, Notice,
    PeerRecord, RowKind, RunKey, Standing, StepMetrics,
};

use crate::BrokerError;
use crate::checkpoint::{FinishSpec, Origin, StoredShard, TensorSet};
use crate::model::ModelFingerprint;
use crate::run_dir::{PlacementFile, RunStart};
use crate::store::JobRecord;

/// A CompNode's time here: one connection, or several if it comes back after a break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u64);

/// A CompNode that wants to join.
#[derive(Clone, Debug)]
pub(crate) struct Joining {
    pub(crate) name: String,
    pub(crate) id: String,
    /// Its public key, by which it is known again after a break.
    pub(crate) key: [u8; 32],
    pub(crate) device: String,
    /// The organisation that it says it belongs to.
    pub(crate) org: Option<String>,
    pub(crate) addr: PeerRecord,
    pub(crate) profile: DeviceProfile,
    /// The job that it is at work on.
    pub(crate) standing: Option<Standing>,
}

/// Why a job cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailedBy {
    /// What its user gave, which fails on every machine.
    Input,
    /// Something on a machine.
    Machine,
}

/// How the notice begins that says whose weights a job starts from.
pub(crate) const WEIGHTS: &str = "weights: ";

/// What a job starts from.
#[derive(Clone, Debug)]
pub(crate) struct StartPoint {
    pub(crate) dag: Arc<OpDag>,
    /// The OP-DAG's JSON form.
    pub(crate) graph: String,
    /// Parameters, and optimizer state if they come from a checkpoint; nothing: from the job's seed.
    pub(crate) weights: Option<Arc<TensorSet>>,
    /// What to plan by instead of what is measured.
    pub(crate) cluster: Option<Cluster>,
    /// Updates already done.
    pub(crate) step: u64,
    /// Training loss of the last of them, if it is known.
    pub(crate) loss: Option<f64>,
    /// What the job's user must know of it, a sentence each; said when the job is placed.
    pub(crate) notices: Vec<String>,
    /// Where the model came from: files that its checkpoints carry, and the data that it was trained on before.
    pub(crate) origin: Origin,
    /// By what its model is known, if it is read from what the job names: nothing where a checkpoint has it.
    pub(crate) model: Option<ModelFingerprint>,
    /// Which run begins or goes on.
    pub(crate) run: RunStart,
    /// Why its weights cannot be read, if they cannot: then the job goes on only with what CompNodes have.
    pub(crate) unread: Option<Unread>,
}

impl StartPoint {
    /// What the data owner is told of the job.
    pub(super) fn owners_view(&self, spec: &JobSpec) -> JobView {
        let mut view = JobView::of_owner(spec, self.run.run.clone());
        let Some(owner) = &mut view.owner else { return view };
        owner.begins_with = self.run.from.as_ref().and_then(|parent| parent.run.clone());
        if spec.data.tokenizer == DataSpec::MODEL {
            owner.tokenizer = self.origin.tokenizer().map(str::to_owned);
            if spec.data.rows == RowKind::Chat {
                owner.chat = self.origin.chat_files();
            }
        }
        view
    }
}

/// What a job starts from is not there any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unread {
    pub(crate) reason: String,
    pub(crate) bad_input: bool,
}

/// What the core is told of.
#[derive(Debug)]
pub(crate) enum CoreEvent {
    /// A CompNode has gone and will not go on where it was.
    Left { connection: ConnectionId, reason: String },
    /// A CompNode's connection broke; it may come back within its lease.
    Broken { connection: ConnectionId, reason: String },
    /// A CompNode says something; it came `at` that time.
    Said { connection: ConnectionId, message: FromCompNode, at: Duration },
    /// Bytes of a shard come in.
    ShardComing { key: RunKey },
    /// A shard lies in its partial folder.
    ShardStored { key: RunKey, step: u64, node: NodeIndex, shard: StoredShard },
    /// A checkpoint is whole.
    CheckpointFinished { key: RunKey, step: u64, path: PathBuf, checksum: String },
    /// A checkpoint cannot be kept. `may_pass` says whether it may be at another time, as where others have moved a folder.
    CheckpointFailed { key: RunKey, step: u64, reason: String, may_pass: bool },
    /// What was left of a checkpoint that cannot be kept is removed, as far as it can be.
    CheckpointDropped { key: RunKey, step: u64 },
    /// All steps up to this one stand in the metrics.
    Recorded { key: RunKey, step: u64 },
    /// Something that a job's user must see.
    Noticed { key: RunKey, text: String },
    /// Newer checkpoints than that of step `left` are not where they were, or there is none any more. The newest of them
    /// `went` there, if that is known.
    CheckpointsGone { key: RunKey, left: Option<u64>, went: Option<PathBuf> },
    /// The files of a run are open.
    RunOpened { key: RunKey },
    /// The files of a run that was to be taken back are not opened: another process has gone on with the run.
    GoneOn { key: RunKey, reason: String },
    /// The files of a run cannot be opened.
    RunNotOpened { key: RunKey, reason: String, by: FailedBy },
    /// The broker itself cannot go on with a job.
    RunFailed { key: RunKey, reason: String, by: FailedBy },
    /// What was to be worked out or read for a job was not, by a defect of ours.
    WorkFailed { job: JobId, reason: String },
    /// The store has all that it was given up to this number.
    Persisted { number: u64 },
    /// The store cannot be written.
    Unpersisted { reason: String },
    /// What a job starts from was read.
    Loaded { job: JobId, number: u64, result: Box<Result<StartPoint, BrokerError>> },
    /// A placement was worked out, or there is none.
    Planned { job: JobId, number: u64, result: Box<Result<Plan, PlanError>> },
    /// The placement at work was held against the best one; nothing if that cannot be.
    Weighed { job: JobId, number: u64, result: Option<Weighed> },
    /// Time has passed: what is due by the clock is looked for.
    Tick,
}

/// Something to do, in this order.
#[derive(Debug)]
pub(crate) enum Action {
    /// Tell a CompNode.
    Send { to: ConnectionId, message: FromBroker },
    /// Send these parameters to a CompNode.
    SendWeights { to: ConnectionId, key: RunKey, params: Vec<String>, from: Arc<TensorSet> },
    /// End the connection.
    Disconnect { to: ConnectionId, reason: String },
    /// Work out a placement where it holds up nobody, and answer [`CoreEvent::Planned`].
    Plan { job: JobId, input: Box<PlanInput> },
    /// Price the placement at work and the best one that there is, and answer [`CoreEvent::Weighed`].
    Weigh { job: JobId, input: Box<PlanInput>, placement: Box<Placement> },
    /// Make or take over the run directory.
    OpenRun(Box<OpenRun>),
    /// Write what the data owner found.
    WriteData { key: RunKey, data: DataReport },
    /// Write what was done when in one step.
    WriteTrace { key: RunKey, measured: Box<Simulated> },
    /// Append a line to the metrics.
    AppendMetrics { key: RunKey, metrics: StepMetrics },
    /// Append a line to the notices. Nobody else is told: that is [`JobEvent::Notice`].
    Notice { run_dir: PathBuf, notice: Notice },
    /// All shards are there: check them and show the checkpoint.
    FinishCheckpoint { key: RunKey, spec: Box<FinishSpec> },
    /// Remove the shards of a checkpoint that cannot be kept, and answer [`CoreEvent::CheckpointDropped`].
    DropCheckpoint { key: RunKey, step: u64 },
    /// Write the report.
    WriteReport { record: Box<JobRecord> },
    /// Write the job to the store, and answer [`CoreEvent::Persisted`] or [`CoreEvent::Unpersisted`]. What is told of the
    /// job after a `barrier` waits for that.
    Persist { number: u64, record: Box<JobRecord>, barrier: bool },
    /// Open the store anew and write all jobs, and answer likewise.
    Rewrite { number: u64, records: Vec<JobRecord> },
    /// Read what a job starts from, and answer [`CoreEvent::Loaded`].
    Load(Box<Loading>),
    /// Tell whoever follows.
    Emit(JobEvent),
}

/// A job as the store has it, and what its run directory knows.
#[derive(Clone, Debug)]
pub(crate) struct Restored {
    pub(crate) record: JobRecord,
    /// The last step of its metrics, with its loss.
    pub(crate) reached: Option<(u64, f64)>,
    /// How long ago that was written.
    pub(crate) gone_for: Duration,
    /// Step of its newest whole checkpoint.
    pub(crate) checkpoint: Option<u64>,
    /// The placement that may still be at work, as the record says; nothing if another process has gone on with the run.
    pub(crate) placement: Option<PlacementFile>,
}

/// What a job starts from is to be read.
#[derive(Clone, Debug)]
pub(crate) struct Loading {
    /// Tells it from those that are not wanted any more.
    pub(crate) number: u64,
    pub(crate) record: JobRecord,
    /// Whether what it reads and writes must be within the broker's reach: after a restart, since who handed it in is not
    /// known any more.
    pub(crate) checks_reach: bool,
}

/// What a weighing has shown: seconds of a step by the placement at work, and by the best that there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weighed {
    /// By the one at work.
    pub(crate) now_s: f64,
    /// By the best one.
    pub(crate) then_s: f64,
}

/// What a placement is worked out from.
#[derive(Clone, Debug)]
pub(crate) struct PlanInput {
    /// Tells it from those that are not wanted any more.
    pub(crate) number: u64,
    pub(crate) dag: Arc<OpDag>,
    pub(crate) cluster: Cluster,
    pub(crate) spec: PlanSpec,
}

impl PlanInput {
    /// Works it out, which may take long.
    pub(crate) fn plan(&self) -> Result<Plan, PlanError> {
        fusionllm_planner::plan(&self.dag, &self.cluster, &self.spec)
    }

    /// Holds a placement at work against the best one that there is, which may take long. Nothing if either cannot be priced.
    pub(crate) fn weigh(&self, placement: &Placement) -> Option<Weighed> {
        let now_s = fusionllm_planner::step_by_cut(&self.dag, &self.cluster, placement, &self.spec).ok()?;
        Some(Weighed { now_s, then_s: self.plan().ok()?.prediction.step_s })
    }
}

/// What a run directory holds from the start.
#[derive(Debug)]
pub(crate) struct OpenRun {
    pub(crate) key: RunKey,
    pub(crate) run_dir: PathBuf,
    pub(crate) run: RunStart,
    pub(crate) spec: JobSpec,
    pub(crate) graph: String,
    pub(crate) placement: PlacementFile,
    /// If it takes back, the content hashes of `placement.json` for the job's placements: see [`crate::store::PlacedWork`].
    pub(crate) hashes: Vec<String>,
    /// The step as it was predicted, if that is still known.
    pub(crate) predicted: Option<Simulated>,
    pub(crate) start_step: u64,
    /// Whether the job goes on by itself in it, after a placement of this broker process.
    pub(crate) goes_on: bool,
    /// Whether the placement is at work already, begun under an earlier broker process. Others may have done anything to
    /// the directory meanwhile.
    pub(crate) takes_back: bool,
}

/// Why a report or a shard of a CompNode is not taken: the plan does not allow it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Breach(pub(crate) String);
