//! What can go wrong in a broker.

mod checkpoint;
mod kind;
mod store;
mod ticket;

use std::path::PathBuf;

use fusionllm_graph::GraphError;
use fusionllm_planner::PlanError;
use fusionllm_protocol::{JobError, JobId, ProtocolError, RunId};
use fusionllm_transport::{BindError, IdentityError, PrivateError, io_reason};

pub use checkpoint::CheckpointError;
pub use store::StoreError;
pub use ticket::TicketError;

/// Why a broker cannot start or do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// A cluster file cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    ClusterFile {
        /// The cluster file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The job file is wrong.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The model's graph is wrong.
    #[error("model {model}: {source}")]
    Graph {
        /// Name or path of the model.
        model: String,
        /// What is wrong with its graph.
        source: GraphError,
    },
    /// The model's files are wrong.
    #[error("model.path {path}: {reason}")]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A folder of adapters is wrong.
    #[error("lora.adapter {path}: {reason}")]
    Adapter {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The job cannot be placed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A checkpoint is unusable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is nothing left to train.
    #[error(
        "{path} is at step {step} already, train.steps = {steps}: raise train.steps to go on, with --set train.steps=N"
    )]
    NothingLeft {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Updates done in the checkpoint.
        step: u64,
        /// Updates that the job asks for.
        steps: u64,
    },
    /// The run directory is in use.
    #[error("run directory {path} exists and is not empty, give another one or resume from it")]
    RunDirNotEmpty {
        /// The run directory.
        path: PathBuf,
    },
    /// Another process works there.
    #[error("{path} is in use by {holder}: wait until it has ended, or give another folder", path = path.display())]
    InUse {
        /// The run directory, or a folder for checkpoints.
        path: PathBuf,
        /// Who works there, in words: a run and its process, or another process.
        holder: String,
    },
    /// Another process has come into a folder whose lock was removed.
    #[error(
        "the lock of {path} was removed or replaced, and {holder} is at work there by now: this run writes nothing more there",
        path = path.display()
    )]
    LostLock {
        /// The run directory, or a folder for checkpoints.
        path: PathBuf,
        /// Who works there, in words.
        holder: String,
    },
    /// What has the name of a lock is none of ours.
    #[error("{path} is not a lock of FusionLLM: move it away, or give another folder", path = path.display())]
    NotALock {
        /// The file that has a lock's name.
        path: PathBuf,
    },
    /// What is to be a folder, or to hold one, is something else.
    #[error("{path} is no folder, give another one", path = path.display())]
    NoFolder {
        /// What is in the way.
        path: PathBuf,
    },
    /// No folder or file can be made where one is needed.
    #[error("nothing can be made in {path} ({}): give another folder", io_reason(source), path = path.display())]
    NotWritable {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// What a run would write there has longer paths than the system has.
    #[error("{path} is a path of {bytes} bytes, expected at most {most}: files of a run lie below it", path = path.display())]
    LongPath {
        /// The folder.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// The longest one for a folder of runs or checkpoints.
        most: usize,
    },
    /// The name of a folder that others must be told of is no text.
    #[error("{path} is not UTF-8, give a folder whose name is", path = path.display())]
    NotUtf8 {
        /// The folder.
        path: PathBuf,
    },
    /// A run would write where it reads.
    #[error("{path} is the job's model.path too, give another folder to write to", path = path.display())]
    NotItsOwn {
        /// The folder that both keys name.
        path: PathBuf,
    },
    /// Something that the run did not make is in the way.
    #[error("{path} is in the way: run {run} did not make it, and leaves it alone; move it away", path = path.display())]
    Foreign {
        /// What is in the way.
        path: PathBuf,
        /// The run that was to write there.
        run: RunId,
    },
    /// The directory is another run's.
    #[error("{path} holds run {holds}, not run {run}: give another --out", path = path.display())]
    OtherRun {
        /// The run directory.
        path: PathBuf,
        /// The run that it holds.
        holds: RunId,
        /// The run that was to go there.
        run: RunId,
    },
    /// What says which run a directory is cannot be read.
    #[error(
        "{path} is damaged ({reason}): move it away, and the run goes on under a new id from the checkpoints in its \
         directory; from one elsewhere, `fusionllm train --resume CHECKPOINT --out DIR` goes on",
        path = path.display()
    )]
    DamagedRun {
        /// Its `run.json`.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The run directory of a checkpoint is not known.
    #[error("{path}: {reason}: say by --out DIR where the run goes on", path = path.display())]
    RunDirUnknown {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Why it is not known.
        reason: String,
    },
    /// A key was changed that a run cannot change.
    #[error(
        "--set {key}: a checkpoint's model and data.seq_len cannot be changed, nor its tokenizer and optimizer; leave it \
         out, or begin a new run"
    )]
    FixedKey {
        /// The job's key, as `section.key`.
        key: String,
    },
    /// A path was given to another machine's process by a name relative to ours.
    #[error("--set {key}: the path is relative, give an absolute one")]
    RelativePath {
        /// The job's key, as `section.key`.
        key: String,
    },
    /// The job store is unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file is not as it was written.
    #[error("{path} is not readable: {reason}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The socket cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The identity file is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A file or folder of the state is not its owner's alone.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// A file with tickets is unusable.
    #[error("{path}: {reason}")]
    Tickets {
        /// The file with tickets.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A ticket cannot be made or revoked.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// A ticket was revoked, and that could not be written.
    #[error(
        "the ticket `{name}` is revoked and its connections are closed, but only as long as this broker runs, since that \
         cannot be written ({reason}): make room there and revoke it again, or it admits again after a restart"
    )]
    RevokedUnwritten {
        /// Name of the ticket.
        name: String,
        /// Why it cannot be written.
        reason: String,
    },
    /// A ticket of the state folder was revoked, and only its file could be removed.
    #[error(
        "the ticket `{name}` is revoked and its connections are closed; that cannot be written ({reason}), but {path} is \
         gone, and the next start of the broker makes a new one",
        path = path.display()
    )]
    RevokedByFile {
        /// Name of the ticket.
        name: String,
        /// The ticket's file in the state folder, which was removed.
        path: PathBuf,
        /// Why it cannot be written.
        reason: String,
    },
    /// There is no room for the state.
    #[error(
        "the disk of the state folder {path} is full ({reason}): make room on it, say of run directories that are not \
         needed any more, or move the whole folder to another disk and give that by --state; what is in it is needed",
        path = path.display()
    )]
    StateFull {
        /// The state folder.
        path: PathBuf,
        /// What could not be written.
        reason: String,
    },
    /// The state folder is used for other things, and by others.
    #[error(
        "{path} has other things in it, such as `{other}`, and can be used by others on this machine: give --state a folder \
         of its own, such as {}", path.join("fusionllm").display(),
        path = path.display()
    )]
    StateShared {
        /// The state folder.
        path: PathBuf,
        /// Name of something in it that is not of a broker.
        other: String,
    },
    /// A job names a file or folder that the broker does not touch for others.
    #[error(
        "{key} {path}: no folder that this broker may {purpose}; it is started with `broker {option} DIR` to allow more",
        path = path.display()
    )]
    OutOfReach {
        /// The job's key.
        key: &'static str,
        /// The file or folder that the key names.
        path: PathBuf,
        /// What the broker would do there.
        purpose: &'static str,
        /// The option that allows it.
        option: &'static str,
    },
    /// The state directory's secret is unusable.
    #[error("{path}: not a broker's secret (64 hexadecimal digits), remove it to make a new one")]
    Secret {
        /// The file with the secret.
        path: PathBuf,
    },
    /// A message could not be encoded.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The store cannot be written, so that nothing is taken in.
    #[error("the broker cannot write its state, and takes no jobs until it can: {reason}")]
    NotDurable {
        /// Why the store cannot be written.
        reason: String,
    },
    /// A job's checkpoints are not where they were.
    #[error(
        "the checkpoint of step {step} is not there any more, nor is any other: {path} has none (is a disk not mounted?); \
         `--step 0` begins anew"
    )]
    CheckpointGone {
        /// Updates done in the checkpoint that is gone.
        step: u64,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A run is not as it was left.
    #[error("another process has gone on with the run meanwhile")]
    GoneOn,
    /// It was done, and the store cannot be written.
    #[error(
        "it is done, but the broker cannot write its state yet, and would not know of it after a restart: {reason}"
    )]
    NotWritten {
        /// Why the store cannot be written.
        reason: String,
    },
    /// No such job.
    #[error("there is no {job}")]
    UnknownJob {
        /// The job that was asked for.
        job: JobId,
    },
    /// There is no such CompNode.
    #[error("no CompNode is named `{name}`; joined are {}", if .names.is_empty() { "none".to_owned() } else { .names.join(", ") })]
    UnknownCompNode {
        /// The name that was asked for.
        name: String,
        /// Those that there are.
        names: Vec<String>,
    },
    /// A job cannot move from one CompNode to others.
    #[error(
        "{job} works on `{name}` and is not to go on without it (survive.enabled = false): stop it first, and resume it later"
    )]
    DoesNotSurvive {
        /// The job.
        job: JobId,
        /// The CompNode.
        name: String,
    },
    /// The job's state does not allow it.
    #[error("{job} {state}, expected {expected}")]
    JobState {
        /// The job that was asked for.
        job: JobId,
        /// Its state, as the predicate of a sentence.
        state: &'static str,
        /// The states in which it could be done.
        expected: &'static str,
    },
    /// The broker has ended.
    #[error("the broker has ended")]
    Ended,
}
