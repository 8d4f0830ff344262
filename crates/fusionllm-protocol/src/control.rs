//! Messages between broker, CompNodes and clients: one frame each, on one two-way stream per connection.

mod client;
mod numbered;
mod standing;

use fusionllm_codec::Codec;
use fusionllm_planner::{EdgeId, Measured, NodeIndex, Placement, Way};
use serde::{Deserialize, Serialize};

use crate::{
    DataReport, DeviceProfile, Generation, JobId, JobView, LinkBytes, PairProfile, PeerRecord, RunKey, Snapshot,
    SnapshotId, SnapshotSource, StepTrace,
};

pub use client::{
    ClientRequest, CompNodeSummary, JobSummary, StatusReport, TicketRole, TicketState, TicketSummary, ToClient,
};
pub use numbered::{ControlStream, MOST_UNCONFIRMED, Numbered};
pub use standing::{Standing, placement_hash};

/// Second frame from whoever connects to the broker, after its [`crate::Greeting`].
#[derive(Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The secret of a ticket of the role that is asked for.
    pub secret: [u8; 32],
    /// What the sender is.
    pub role: Role,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello").field("role", &self.role).finish_non_exhaustive()
    }
}

/// What connects to a broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "one is made for each connection, and sent")]
pub enum Role {
    /// A machine that will compute.
    CompNode {
        /// Name shown to people.
        name: String,
        /// Device, for people: `flex (CPU, 2 threads)`.
        device: String,
        /// The organisation that it belongs to, if it says so.
        org: Option<String>,
        /// Where other CompNodes reach it.
        addr: PeerRecord,
        /// What its device can do.
        profile: DeviceProfile,
        /// After a break: number of the last message that it received from this broker, so that both can go on where
        /// they were ([`ControlStream::resume`]). Nothing: it has no past here.
        resume: Option<u64>,
        /// The job that it is at work on, which a broker that was started again may take back.
        standing: Option<Standing>,
    },
    /// A command such as `submit` or `status`, of an operator.
    Client,
}

/// The broker's answer to [`Hello`], after its own [`crate::Greeting`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// Come in; a CompNode is known by this name from now on (made unique by the broker).
    Accepted {
        /// The name that this CompNode has from now on; a command is told its key, shortened.
        name: String,
        /// Number of the last message that the broker received from this CompNode before the break: both go on. Nothing:
        /// the broker does not know it any more, and it begins anew with the first message.
        resumed: Option<u64>,
    },
    /// The peer must stay out.
    Refused {
        /// Why the peer is not let in, in one line.
        reason: String,
    },
}

/// Where a CompNode's parameters come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightSource {
    /// Each parameter is drawn, as a function of the seed in the job and its name.
    Seed,
    /// The broker sends them, with optimizer state if there is one, as a [`BlobKind::Weights`] stream.
    Broker,
    /// They lie, with optimizer state, in snapshots here and at other CompNodes.
    Snapshots(Vec<SnapshotSource>),
}

/// Everything a CompNode needs to run its part of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// Which placement of which job it belongs to.
    pub key: RunKey,
    /// Which CompNode of the placement the receiver is.
    pub node: NodeIndex,
    /// What the receiver is told of the job.
    pub job: JobView,
    /// The OP-DAG in its JSON form.
    pub graph: String,
    /// Who holds what.
    pub placement: Placement,
    /// Every CompNode of the placement, in its order.
    pub peers: Vec<PeerRecord>,
    /// Updates already done (0, or a checkpoint's step).
    pub start_step: u64,
    /// Where the parameters come from.
    pub weights: WeightSource,
    /// Bytes of memory that the plan counts on for the receiver.
    pub planned_bytes: u64,
}

/// From the broker to a CompNode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromBroker {
    /// Prepare this part of a job and answer [`FromCompNode::Ready`].
    Assign(Box<Assignment>),
    /// Every CompNode is ready: begin.
    Start {
        /// Which placement of which job it belongs to.
        key: RunKey,
    },
    /// A broker that was started again has the job back as it is: report what it has not written.
    TakenBack {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The last step that it has written.
        recorded: u64,
    },
    /// Encode one direction of a boundary edge by another codec from now on.
    SetCodec {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The boundary edge.
        edge: EdgeId,
        /// What of it.
        way: Way,
        /// The codec of all messages after this one.
        codec: Codec,
    },
    /// The CompNode's shard of a checkpoint need not be kept or sent again: it is stored, or not wanted.
    ShardSettled {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The checkpoint's updates.
        step: u64,
    },
    /// Send the shard of this checkpoint once more, or write it now where it could not be written: what came of it is not
    /// there any more.
    ShardAgain {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The checkpoint's updates.
        step: u64,
    },
    /// Keep what is held after `step` updates as a snapshot, and say [`FromCompNode::Holds`].
    Snapshot {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The step, which is still to come.
        step: u64,
        /// Whether training stands still after it, until the placement ends: the work moves.
        halt: bool,
    },
    /// Be the guardian of another CompNode's snapshot: fetch it, and say [`FromCompNode::Holds`].
    Guard {
        /// The snapshot, which its own CompNode has.
        snapshot: Snapshot,
    },
    /// These may fetch snapshots of this job from now on.
    Lend {
        /// The job of whose snapshots it is.
        job: JobId,
        /// Those who may fetch them; nobody else may.
        to: Vec<PeerRecord>,
    },
    /// Of this job's snapshots none but these are needed any more.
    Release {
        /// The job of whose snapshots it is.
        job: JobId,
        /// By placement and step, those that are kept.
        keep: Vec<(Generation, u64)>,
    },
    /// Another CompNode of the placement is reached at other addresses from now on.
    PeerMoved {
        /// Which placement of which job both belong to.
        key: RunKey,
        /// Who has moved.
        peer: NodeIndex,
        /// Where it is now.
        addr: PeerRecord,
    },
    /// Somebody is silent: answer [`FromCompNode::PeerHeard`].
    CheckPeer {
        /// Which placement of which job both belong to.
        key: RunKey,
        /// Who is silent.
        peer: NodeIndex,
    },
    /// Nothing is left to do here for a CompNode that is leaving: it may go.
    Dismiss {
        /// Whether it keeps its snapshots, since a job waits for somebody like it.
        keep: bool,
    },
    /// Drop the job at once and be idle.
    Abort {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// Why, for the log.
        #[serde(deserialize_with = "crate::text::cleaned")]
        reason: String,
    },
    /// Measure the ops of this job and answer [`FromCompNode::Measured`].
    MeasureOps {
        /// Number of the request.
        request: u64,
        /// What any CompNode is told of the job, whose batch gives the ops their shapes.
        job: Box<JobView>,
        /// Its OP-DAG in JSON form.
        graph: String,
    },
    /// Answer the probe of this peer once it comes, and say [`FromCompNode::ProbeAwaited`] at once.
    AwaitProbe {
        /// Number of the probe.
        probe: u64,
        /// Who will dial.
        peer: PeerRecord,
    },
    /// Measure the links to this peer and back, and answer [`FromCompNode::Probed`].
    Probe {
        /// Number of the probe.
        probe: u64,
        /// Whom to dial.
        peer: PeerRecord,
    },
    /// The measurement of this request is not needed any more: end it, and answer nothing.
    CancelMeasure {
        /// Number of the request.
        request: u64,
    },
    /// Answer to a heartbeat.
    HeartbeatAck {
        /// The heartbeat's number.
        number: u64,
        /// The broker's clock, in seconds since it started.
        now_s: f64,
        /// The last step of the receiver's job that is written: reports up to it need not be kept.
        recorded: Option<(RunKey, u64)>,
    },
}

/// From a CompNode to the broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromCompNode {
    /// The assignment is built; on the data owner the data is read.
    Ready {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// What the data owner found.
        data: Option<DataReport>,
    },
    /// The data is still being read, and that went on since the last time.
    Reading {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// Bytes of the data that are read.
        done: u64,
        /// Bytes of the data, as far as that is known.
        total: u64,
    },
    /// A step is done on this CompNode.
    Step {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// What happened in it.
        report: StepReport,
    },
    /// All steps are done and all shards are sent.
    Finished {
        /// Which placement of which job it belongs to.
        key: RunKey,
    },
    /// This CompNode cannot go on with the job.
    Failed {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// Why, in one line.
        reason: String,
        /// Whether the job's input is at fault (exit code 2) rather than a machine.
        bad_input: bool,
    },
    /// This CompNode's shard of a checkpoint will not come; training goes on. Of the last one, the state is held until
    /// [`FromBroker::ShardAgain`] asks for it.
    ShardFailed {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// The checkpoint's updates.
        step: u64,
        /// Why, in one line.
        reason: String,
    },
    /// A whole snapshot lies here: one's own, or another's that was fetched.
    Holds {
        /// The snapshot, by id, hash and size.
        snapshot: Snapshot,
        /// Seconds for which compute stood still to make it, or that it took to fetch it; 0 if it was here before.
        cost_s: f64,
    },
    /// A snapshot cannot be made, or not be fetched; training goes on.
    SnapshotFailed {
        /// The snapshot that was asked for.
        id: SnapshotId,
        /// Whether it was asked for only when the step had passed.
        is_late: bool,
        /// Why, in one line.
        reason: String,
    },
    /// Answer to [`FromBroker::CheckPeer`], of one to which there is, or was, a connection.
    PeerHeard {
        /// Which placement of which job both belong to.
        key: RunKey,
        /// Who is silent.
        peer: NodeIndex,
        /// Seconds since any packet last came from it.
        ago_s: f64,
    },
    /// It is about to leave: its work should move away, and [`FromBroker::Dismiss`] come.
    Leaving,
    /// What the ops of a job take here, or why that cannot be measured.
    Measured {
        /// Number of the request.
        request: u64,
        /// Seconds by kind of work, or why there are none, in one line.
        result: Result<Measured, String>,
    },
    /// The peer may dial now.
    ProbeAwaited {
        /// Number of the probe.
        probe: u64,
    },
    /// Both directions to the peer that was dialled, or why they cannot be measured.
    Probed {
        /// Number of the probe.
        probe: u64,
        /// What both links can do, or why that is not known, in one line.
        result: Result<PairProfile, String>,
    },
    /// Something that the job's user must see.
    Note {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// What is to be known, in one sentence.
        text: String,
    },
    /// Bytes of memory that a job may fill here now, from a CompNode whose memory nobody fills.
    Room {
        /// Bytes that are free for jobs.
        bytes: u64,
    },
    /// Still alive; sent every few seconds.
    Heartbeat {
        /// Counted from 1 by the CompNode.
        number: u64,
    },
    /// A peer of the job cannot be reached, though it may be alive: this CompNode has given the job up.
    LinkLost {
        /// Which placement of which job both belong to.
        key: RunKey,
        /// Who is not reached.
        peer: NodeIndex,
        /// Why, in one line.
        reason: String,
    },
}

/// What a CompNode reports of one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Updates done, from 1.
    pub step: u64,
    /// Mean training loss; only the holder of the loss op knows it.
    pub loss: Option<f64>,
    /// Mean evaluation loss, where it was evaluated; likewise.
    pub eval_loss: Option<f64>,
    /// Share of images in that evaluation whose class is the likeliest one; likewise.
    pub eval_accuracy: Option<f64>,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global gradient norm, where clipping is on.
    pub grad_norm: Option<f64>,
    /// Wall time of the training step in seconds.
    pub step_s: f64,
    /// Of which the compute thread was busy.
    pub busy_s: f64,
    /// Largest number of micro-batches that were live at once in any stage.
    pub live_max: u32,
    /// Bytes that this CompNode sent, by receiver.
    pub links: Vec<LinkBytes>,
    /// How fast payloads came, by sender.
    pub received: Vec<LinkSpeed>,
    /// What it did when, in seconds of the broker's clock, for the step that is traced.
    pub trace: Option<StepTrace>,
}

/// How fast payloads came over one link in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSpeed {
    /// Name of the sending CompNode.
    pub from: String,
    /// Name of the receiving CompNode.
    pub to: String,
    /// Bytes of payloads.
    pub bytes: u64,
    /// Seconds for which at least one payload was coming in.
    pub busy_s: f64,
    /// Whether the connection led over the broker's relay at the end of the step.
    pub relayed: bool,
}

/// What a one-way stream between broker and CompNode carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlobKind {
    /// A safetensors file with the receiver's parameters and optimizer state: broker to CompNode.
    Weights,
    /// A checkpoint shard of the sender: CompNode to broker.
    Shard {
        /// The step that was done, counted from 1.
        step: u64,
        /// The CompNode that sends its shard.
        node: NodeIndex,
    },
}

/// First frame of a blob stream; frames of content follow until the stream ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobHeader {
    /// Which placement of which job it belongs to.
    pub key: RunKey,
    /// What the content is.
    pub kind: BlobKind,
    /// Bytes of content.
    pub bytes: u64,
}
