//! What the broker's tasks say to each other: what the actor is asked, and what goes to a CompNode's connection.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fusionllm_protocol::{
    BlobHeader, ControlStream, FromBroker, FromCompNode, Inventory, JobId, JobSpec, Numbered, RunKey, StatusReport,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::events::Submitted;
use crate::BrokerError;
use crate::checkpoint::{ShardPlace, TensorSet};
use crate::core::{Breach, ConnectionId, CoreEvent, Joining, StartPoint};
use crate::report::RunReport;
use crate::store::JobRecord;

/// Where a job's run directory is to be.
#[derive(Debug)]
pub(super) enum RunDirChoice {
    /// In this very folder.
    Given(PathBuf),
    /// There, or beside it under a number if that is taken.
    Free(PathBuf),
}

/// Why the shards of a run can go nowhere.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPlace {
    #[error("its run is not open")]
    NotOpen,
    #[error("another process is at work in its directory")]
    Taken,
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Where the actor answers.
pub(super) type Reply<T> = oneshot::Sender<T>;

/// What the actor is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// A CompNode has a connection. Without a past here it gets `line` for its number.
    Join {
        line: ConnectionId,
        joining: Joining,
        resume: Option<u64>,
        outbox: mpsc::Sender<ToCompNode>,
        reply: Reply<Joined>,
    },
    /// That connection has ended.
    Ended {
        line: ConnectionId,
        connection: ConnectionId,
        reason: String,
        for_good: bool,
    },
    Said {
        connection: ConnectionId,
        message: FromCompNode,
        at: Instant,
    },
    Event(CoreEvent),
    Submit {
        spec: Box<JobSpec>,
        start: Box<StartPoint>,
        run_dir: RunDirChoice,
        reply: Reply<Result<Submitted, BrokerError>>,
    },
    Resume {
        job: JobId,
        spec: Box<JobSpec>,
        start: Box<StartPoint>,
        /// The step that was asked for.
        step: Option<u64>,
        reply: Reply<Result<Submitted, BrokerError>>,
    },
    Stop {
        job: JobId,
        reply: Reply<Result<(), BrokerError>>,
    },
    Drain {
        name: String,
        reply: Reply<Result<(), BrokerError>>,
    },
    Lost {
        name: String,
        reason: String,
        reply: Reply<()>,
    },
    Record {
        job: JobId,
        reply: Reply<Result<JobRecord, BrokerError>>,
    },
    Status {
        reply: Reply<StatusReport>,
    },
    Inventory {
        max_age: Option<Duration>,
        job: Option<Box<(JobSpec, StartPoint)>>,
        reply: Reply<Inventory>,
    },
    Report {
        job: JobId,
        reply: Reply<Result<RunReport, BrokerError>>,
    },
    /// A shard is stored, or nobody wants it: its CompNode need not keep it any more, unless it is of the last checkpoint.
    ShardSettled {
        connection: ConnectionId,
        key: RunKey,
        step: u64,
    },
    /// Answers once everything is written that was to be written before.
    Flush {
        reply: Reply<()>,
    },
    WantsShard {
        connection: ConnectionId,
        header: BlobHeader,
        reply: Reply<Result<bool, Breach>>,
    },
    /// Where the shards of a step go, once that is put right: its folder is not where it was.
    PlaceShards {
        key: RunKey,
        step: u64,
        reply: Reply<Result<ShardPlace, NoPlace>>,
    },
    /// Looks what others have done to the folders of a run, and answers once that is told: whoever fails by it asks before.
    Look {
        key: RunKey,
        reply: Reply<()>,
    },
    Shutdown {
        reply: Reply<()>,
    },
}

/// What goes to a CompNode.
#[derive(Debug)]
pub(super) enum ToCompNode {
    Message(Numbered<FromBroker>),
    Weights { key: RunKey, params: Vec<String>, from: Arc<TensorSet> },
    Disconnect(String),
}

/// A CompNode that was let in.
#[derive(Debug)]
pub(super) struct Joined {
    /// What the core knows it by: after a break the same as before.
    pub(super) connection: ConnectionId,
    pub(super) name: String,
    pub(super) control: Control,
    /// If it goes on after a break: number of the last message that it sent before, and what to send it again.
    pub(super) resumed: Option<(u64, Vec<Numbered<FromBroker>>)>,
}

/// What was sent and received, over all connections of one CompNode.
pub(super) type Control = Arc<Mutex<ControlStream<FromBroker>>>;

/// Whatever the thread was doing that panicked with it, numbers and messages are whole.
pub(super) fn lock(control: &Control) -> MutexGuard<'_, ControlStream<FromBroker>> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}
