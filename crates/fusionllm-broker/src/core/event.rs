//! What the core is told and what it asks for.

use std::path::PathBuf;
use std::sync::Arc;

use fusionllm_graph::OpDag;
use fusionllm_planner::{Cluster, NodeIndex, Simulated};
use fusionllm_protocol::{
    DataReport, DeviceProfile, FromBroker, FromCompNode, Generation, JobEvent, JobId, JobSpec, Notice, PeerRecord,
    StepMetrics,
};

use crate::checkpoint::{FinishSpec, Origin, StoredShard, TensorSet};
use crate::run_dir::{PlacementFile, RunStart};
use crate::store::JobRecord;

/// One connection of a CompNode. A CompNode that comes back has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u64);

/// A placement of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RunKey {
    pub(crate) job: JobId,
    pub(crate) generation: Generation,
}

/// A CompNode that wants to join.
#[derive(Clone, Debug)]
pub(crate) struct Joining {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) device: String,
    pub(crate) addr: PeerRecord,
    pub(crate) profile: DeviceProfile,
}

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
    /// What the job's user must know of it, a sentence each; said when the job is placed.
    pub(crate) notices: Vec<String>,
    /// Where the model came from: files that its checkpoints carry, and the data that it was trained on before.
    pub(crate) origin: Origin,
    /// Which run begins or goes on.
    pub(crate) run: RunStart,
}

/// Something happened.
#[derive(Debug)]
pub(crate) enum CoreEvent {
    /// A CompNode's connection ended.
    Left { connection: ConnectionId, reason: String },
    /// A CompNode says something.
    Said { connection: ConnectionId, message: FromCompNode },
    /// A shard lies in its partial folder.
    ShardStored { key: RunKey, step: u64, node: NodeIndex, shard: StoredShard },
    /// A checkpoint is whole.
    CheckpointFinished { key: RunKey, step: u64, path: PathBuf, checksum: String },
    /// A checkpoint cannot be kept.
    CheckpointFailed { key: RunKey, step: u64, reason: String },
    /// Something that a job's user must see.
    Noticed { key: RunKey, text: String },
    /// The broker itself cannot go on with a job.
    RunFailed { key: RunKey, reason: String },
    /// Time passes.
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
    /// Make or take over the run directory.
    OpenRun(Box<OpenRun>),
    /// Write what the data owner found.
    WriteData { key: RunKey, run_dir: PathBuf, data: DataReport },
    /// Write what was done when in one step.
    WriteTrace { key: RunKey, measured: Box<Simulated> },
    /// Append a line to the metrics.
    AppendMetrics { key: RunKey, metrics: StepMetrics },
    /// Append a line to the notices. Nobody else is told: that is [`JobEvent::Notice`].
    Notice { run_dir: PathBuf, notice: Notice },
    /// All shards are there: check them and show the checkpoint.
    FinishCheckpoint { key: RunKey, spec: Box<FinishSpec> },
    /// Remove the shards of a checkpoint that cannot be kept.
    DropCheckpoint { key: RunKey, step: u64 },
    /// Write the report.
    WriteReport { record: Box<JobRecord> },
    /// Remember the job.
    Persist(Box<JobRecord>),
    /// Tell whoever follows.
    Emit(JobEvent),
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
    /// The step as it was predicted.
    pub(crate) predicted: Simulated,
    pub(crate) start_step: u64,
}
