//! What the task loop gives: reports, checkpoint shards, snapshots.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{FromCompNode, RunKey, SnapshotId, StepReport};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::{NodeEvent, keeping};
use crate::checkpoint::ShardFile;
use crate::executor::LazyTensor;
use crate::mailbox::Mailbox;
use crate::snapshots::SnapshotStore;
use crate::step_log::ClockOffset;
use crate::task_loop::JobSink;
use crate::{CompNodeError, ShardError};

/// Between two looks at whether a placement that stands still has ended.
const HALT_LOOK: Duration = Duration::from_millis(10);

/// The snapshot that is asked for next.
#[derive(Debug, Default)]
pub(super) struct SnapshotOrder {
    /// After which step; 0: none is.
    step: AtomicU64,
    halt: AtomicBool,
}

impl SnapshotOrder {
    pub(super) fn set(&self, step: u64, halt: bool) {
        self.halt.store(halt, Ordering::Relaxed);
        // Whoever sees the step sees the rest.
        self.step.store(step, Ordering::Release);
    }

    /// Takes the order once its step is done, or has passed: its step.
    fn take(&self, done: u64) -> Option<u64> {
        let due = self.step.load(Ordering::Acquire);
        if due == 0 || due > done {
            return None;
        }
        // One that has come meanwhile stays.
        let taken = self.step.compare_exchange(due, 0, Ordering::Relaxed, Ordering::Relaxed);
        taken.is_ok().then_some(due)
    }
}

/// The task loop's reports as events; its checkpoints as shards, and its snapshots as files that stay.
pub(super) struct NodeSink {
    pub(super) key: RunKey,
    pub(super) node: NodeIndex,
    /// Bytes of a shard, nearly.
    pub(super) shard_bytes: u64,
    pub(super) events: mpsc::Sender<NodeEvent>,
    pub(super) shards: mpsc::Sender<(u64, ShardFile)>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) clock: Arc<ClockOffset>,
    pub(super) folder: Arc<Path>,
    pub(super) snapshots: Arc<SnapshotStore>,
    pub(super) snapshot_due: Arc<SnapshotOrder>,
    pub(super) runtime: Handle,
}

impl NodeSink {
    fn tell(&self, message: FromCompNode) -> Result<(), CompNodeError> {
        let sent = self.events.blocking_send(NodeEvent::Report(self.key, Box::new(message)));
        sent.map_err(|_| CompNodeError::Broker { reason: "the connection is gone".to_owned() })
    }

    fn write_snapshot(&self, id: SnapshotId, tensors: Vec<LazyTensor<'_>>) -> Result<(), ShardError> {
        let began = Instant::now();
        let new = self.snapshots.begin(self.shard_bytes)?;
        new.file()?.fill(tensors)?;
        let (store, events) = (Arc::clone(&self.snapshots), self.events.clone());
        self.runtime.spawn(keeping::settle(id, new, began.elapsed(), store, events));
        Ok(())
    }
}

impl JobSink for NodeSink {
    fn step(&mut self, mut report: StepReport) -> Result<(), CompNodeError> {
        report.trace = report.trace.and_then(|trace| self.clock.apply(trace));
        // A CompNode without peers would not notice otherwise that its job was dropped.
        if let Some(error) = self.mailbox.closed() {
            return Err(error.into());
        }
        self.tell(FromCompNode::Step { key: self.key, report })
    }

    fn wants_snapshot(&mut self, step: u64) -> Result<bool, CompNodeError> {
        let Some(due) = self.snapshot_due.take(step) else { return Ok(false) };
        if due < step {
            let id = SnapshotId { key: self.key, step: due, node: self.node };
            let reason = format!("it was asked for after step {step} only");
            self.tell(FromCompNode::SnapshotFailed { id, is_late: true, reason })?;
        }
        Ok(due == step)
    }

    fn checkpoint(&mut self, step: u64, tensors: Vec<LazyTensor<'_>>) -> Result<(), CompNodeError> {
        let shard = match ShardFile::write(&self.folder, tensors) {
            Ok(shard) => shard,
            // A full disk costs the checkpoint, and no more.
            Err(error @ ShardError::Io { .. }) => {
                let reason = error.to_string();
                return self.tell(FromCompNode::ShardFailed { key: self.key, step, reason });
            }
            Err(error) => return Err(error.into()),
        };
        let sent = self.shards.blocking_send((step, shard));
        sent.map_err(|_| CompNodeError::Broker { reason: "it does not take checkpoint shards any more".to_owned() })
    }

    fn snapshot(&mut self, step: u64, tensors: Vec<LazyTensor<'_>>) -> Result<(), CompNodeError> {
        let id = SnapshotId { key: self.key, step, node: self.node };
        match self.write_snapshot(id, tensors) {
            Ok(()) => {}
            // A full disk costs the snapshot, and no more.
            Err(error @ ShardError::Io { .. }) => self.tell(keeping::failed(id, &error.into()))?,
            Err(error) => return Err(error.into()),
        }
        // What is done from here on would be done again.
        while self.snapshot_due.halt.load(Ordering::Relaxed) {
            if let Some(error) = self.mailbox.closed() {
                return Err(error.into());
            }
            std::thread::sleep(HALT_LOOK);
        }
        Ok(())
    }
}
