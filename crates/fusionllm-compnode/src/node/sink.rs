//! What the task loop gives: reports, checkpoint shards, snapshots.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

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
    /// The step after which a snapshot is due; 0: none is.
    pub(super) snapshot_due: Arc<AtomicU64>,
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
        let due = self.snapshot_due.load(Ordering::Relaxed);
        if due == 0 || due > step {
            return Ok(false);
        }
        // Only once: the next one has another step.
        let _ = self.snapshot_due.compare_exchange(due, 0, Ordering::Relaxed, Ordering::Relaxed);
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
            Ok(()) => Ok(()),
            // A full disk costs the snapshot, and no more.
            Err(error @ ShardError::Io { .. }) => self.tell(keeping::failed(id, &error.into())),
            Err(error) => Err(error.into()),
        }
    }
}
