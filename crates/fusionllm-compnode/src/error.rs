//! What can go wrong on a CompNode.

mod data;
mod export;

use std::path::PathBuf;

use fusionllm_codec::CodecError;
use fusionllm_graph::{DType, GraphError, ParamId};
use fusionllm_planner::{NodeIndex, StageId, format_bytes};
use fusionllm_protocol::ProtocolError;
use fusionllm_transport::{io_reason, is_of_path};

pub use data::DataError;
pub use export::ExportError;

/// Why a sub-DAG could not be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// A task came whose inputs are not those of its stage. A bug of the task order, not of the user.
    #[error("op `{op}` has no value for its input `{input}` (internal error)")]
    MissingInput {
        /// Name of the op.
        op: String,
        /// The input that is missing.
        input: String,
    },
    /// An op that the device has no kernel for.
    #[error("op `{op}` is {family}, which {device} cannot compute: train on CPUs (`--device cpu`)")]
    NoKernel {
        /// Name of the op.
        op: String,
        /// The op's family, such as `conv2d`.
        family: &'static str,
        /// The device, for people.
        device: String,
    },
    /// A tensor came with another type of element than the OP-DAG says.
    #[error("tensor of op `{op}` has {got} elements, expected {expected}")]
    Element {
        /// Name of the op.
        op: String,
        /// Element type in the graph.
        expected: DType,
        /// Element type of the tensor that came.
        got: DType,
    },
    /// A tensor came in another shape than the OP-DAG says.
    #[error("tensor of op `{op}` has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Name of the op.
        op: String,
        /// Shape in the graph.
        expected: Vec<usize>,
        /// Shape of the tensor that came.
        got: Vec<usize>,
    },
    /// A state that the task order rules out.
    #[error("{what} (internal error)")]
    Internal {
        /// Which invariant broke.
        what: String,
    },
    /// The work was taken back before it was done.
    #[error("stopped before it was done")]
    Stopped,
    /// The device failed or the tensor library refused.
    #[error("device: {reason}")]
    Device {
        /// What the device's driver or the tensor library said.
        reason: String,
    },
    /// A parameter from a checkpoint does not fit.
    #[error("parameter `{name}`: {reason}")]
    Param {
        /// Name of the parameter.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Loss or gradient is no longer a number.
    #[error("{what} of step {} is {value}; {advice}", .step + 1)]
    NotFinite {
        /// What is not finite: the loss or the gradient norm, as words.
        what: &'static str,
        /// The value: an infinity or NaN.
        value: f64,
        /// Updates done before it.
        step: u64,
        /// What may help.
        advice: &'static str,
    },
}

impl ExecutorError {
    /// A task names a stage of another CompNode.
    pub(crate) fn stage_not_held(stage: StageId) -> Self {
        Self::Internal { what: format!("{stage} is not held on this CompNode") }
    }

    /// Somebody asks for a parameter of another CompNode.
    pub(crate) fn param_not_held(param: ParamId) -> Self {
        Self::Internal { what: format!("parameter {} is not held here", param.0) }
    }

    /// BP of a micro-batch of which nothing is kept.
    pub(crate) fn before_fp(stage: StageId, micro_batch: u32) -> Self {
        Self::Internal { what: format!("BP of micro-batch {micro_batch} at {stage} came before its FP") }
    }
}

/// Why a message could not be sent or received.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The job was stopped from outside.
    #[error("job aborted: {reason}")]
    Aborted {
        /// Why it was stopped, in words.
        reason: String,
    },
    /// A peer cannot be reached any more.
    #[error("its peer `{peer}`: {reason}")]
    Peer {
        /// Name of the CompNode.
        peer: String,
        /// Why it cannot be reached.
        reason: String,
    },
    /// There is no connection to a peer, and none can be made: it may be alive all the same.
    #[error("its peer `{peer}`: {reason}")]
    Unreached {
        /// Its place in the placement.
        node: NodeIndex,
        /// Name of the CompNode that is not reached.
        peer: String,
        /// Why it cannot be reached.
        reason: String,
    },
    /// This CompNode's own program is at fault.
    #[error("{reason} (internal error)")]
    Internal {
        /// What went wrong.
        reason: String,
    },
    /// A tensor cannot be encoded or decoded.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The device of a tensor that is to be sent failed.
    #[error("{reason}")]
    Device {
        /// What the executor says, in one line.
        reason: String,
    },
}

impl From<ExecutorError> for ExchangeError {
    fn from(error: ExecutorError) -> Self {
        Self::Device { reason: error.to_string() }
    }
}

/// Why a shard could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The bytes are no safetensors file.
    #[error("not a readable safetensors file: {reason}")]
    Format {
        /// The parser's message.
        reason: String,
    },
    /// A tensor is not of the form expected.
    #[error("tensor `{name}`: {reason}")]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The device did not give a tensor.
    #[error(transparent)]
    Device(#[from] ExecutorError),
    /// A file could not be read or written.
    #[error("{path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
}

/// Why a CompNode cannot do its part of a job, or cannot join.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompNodeError {
    /// Compute failed, as this says.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// Its own address cannot be had.
    #[error(transparent)]
    Bind(#[from] fusionllm_transport::BindError),
    /// A snapshot that it was to begin with, or to keep, cannot be had.
    #[error("the snapshot of step {step}: {reason}")]
    Snapshot {
        /// Its updates done.
        step: u64,
        /// Why it cannot be had, in one line.
        reason: String,
    },
    /// Data is unusable.
    #[error(transparent)]
    Data(DataError),
    /// Messages do not pass.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// A shard is unusable.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The graph of the assignment is unusable.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A message of the broker is unusable.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The device asked for does not exist here.
    #[error("{reason}")]
    DeviceChoice {
        /// What is wrong and what there is.
        reason: String,
    },
    /// The broker does not let us in.
    #[error("the broker refused: {reason}")]
    Refused {
        /// Why, in its words.
        reason: String,
    },
    /// The broker cannot be reached, or the connection to it broke.
    #[error("broker: {reason}")]
    Broker {
        /// What happened to the connection.
        reason: String,
    },
    /// The device's memory is too small, which is known before any of it is filled.
    #[error("{what} take {} here, jobs may fill {} (what is free, or join's --memory-gb)", format_bytes(*.needed as f64), format_bytes(*.room as f64))]
    Memory {
        /// What needs it.
        what: String,
        /// Bytes it needs.
        needed: u64,
        /// Bytes that may be filled.
        room: u64,
    },
    /// Weights and shards cannot pass.
    #[error(
        "{source}: weights and checkpoint shards pass through this folder: make it writable, or give another one (`join --state DIR`, `train --out DIR`)"
    )]
    Scratch {
        /// Which folder, and what the system says.
        source: ShardError,
    },
    /// The data owner's own seed cannot be had.
    #[error("the data owner's own seed, {}: {reason}", .path.display())]
    OwnSeed {
        /// Its file, or the folder of the file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A placement would give away what is to stay with the data owner.
    #[error(
        "the placement gives op `{op}` to {node}, and data.private keeps it here: the broker is of another mind than this CompNode"
    )]
    GivenAway {
        /// Name of the op.
        op: String,
        /// Who would get it.
        node: NodeIndex,
    },
    /// What is to stay with the data owner cannot be told.
    #[error(transparent)]
    Plan(#[from] fusionllm_planner::PlanError),
    /// A shard of this CompNode's part would never fit.
    #[error(
        "a checkpoint shard of its part takes {}, there is room for {} in {path}, through which it passes: make room there, or \
         give a folder on another disk (`join --state DIR`, `train --out DIR`)",
        format_bytes(*.needed as f64), format_bytes(*.room as f64), path = path.display()
    )]
    ScratchRoom {
        /// The folder through which shards pass.
        path: PathBuf,
        /// Bytes of a shard.
        needed: u64,
        /// Bytes that are free there.
        room: u64,
    },
    /// A checkpoint of a run whose CompNodes share a disk would never fit.
    #[error(
        "a checkpoint takes {} and its shards as much again on their way, there is room for {} in {path}: make room there, or \
         give a folder on another disk (`train --out DIR`, checkpoint.to)",
        format_bytes(*.bytes as f64), format_bytes(*.room as f64), path = path.display()
    )]
    RunRoom {
        /// The folder where the run's checkpoints go.
        path: PathBuf,
        /// Bytes of a checkpoint.
        bytes: u64,
        /// Bytes there are.
        room: u64,
    },
    /// The job before does not end.
    #[error("the job or measurement before still holds this CompNode's memory after {limit_s} s")]
    MemoryHeld {
        /// How long it was waited for, in seconds.
        limit_s: u64,
    },
    /// A thread of this CompNode panicked.
    #[error("a thread of this CompNode ended unexpectedly: {reason}")]
    ComputeThread {
        /// The panic's message.
        reason: String,
    },
}

impl CompNodeError {
    /// Whether the job's input is at fault rather than a machine.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Data(error) => !matches!(error, DataError::Unopened { .. } | DataError::Cache { .. }),
            Self::Bind(error) => error.is_bad_input(),
            Self::Graph(_) | Self::Plan(_) | Self::DeviceChoice { .. } => true,
            Self::Executor(ExecutorError::Param { .. } | ExecutorError::NoKernel { .. }) => true,
            _ => false,
        }
    }
}

impl CompNodeError {
    /// Whether whoever starts a CompNode or a command is at fault: by its input, by its ticket, or by a folder that cannot
    /// be used.
    pub fn is_bad_start(&self) -> bool {
        match self {
            Self::Refused { .. } => true,
            Self::Scratch { source: ShardError::Io { source, .. } } => is_of_path(source),
            other => other.is_bad_input(),
        }
    }
}

impl From<DataError> for CompNodeError {
    fn from(error: DataError) -> Self {
        match error {
            // Another machine, or another time, and the data would do.
            DataError::Memory { needed, room } => {
                let what = "beside the model, the data's text and tokens at least".to_owned();
                Self::Memory { what, needed, room }
            }
            DataError::Stopped => Self::Executor(ExecutorError::Stopped),
            error => Self::Data(error),
        }
    }
}

impl From<tokio::task::JoinError> for CompNodeError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::ComputeThread { reason: crate::join_message(error) }
    }
}
