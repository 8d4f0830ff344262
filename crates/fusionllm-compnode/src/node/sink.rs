//! What the task loop gives: reports, checkpoint shards, snapshots.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{FromCompNode, RunKey, SnapshotId, StepReport};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::blob::Again;
use super::{NodeEvent, keeping};
use crate::checkpoint::{ShardFile, free_room};
use crate::mailbox::Mailbox;
use crate::snapshots::SnapshotStore;
use crate::step_log::ClockOffset;
use crate::task_loop::{HeldState, JobSink};
use crate::{CompNodeError, ShardError};

/// Between two looks at whether a placement that stands still has ended.
const HALT_LOOK: Duration = Duration::from_millis(10);

/// A shard for which there is no room waits so long for a broker that is away; then checkpoints are left out until it is back.
const ABSENCE: Duration = Duration::from_secs(2);

/// The snapshot that is asked for next, if any.
#[derive(Debug, Default)]
pub(super) struct SnapshotOrder {
    next: Mutex<Option<Order>>,
    /// Whether training was ever to stand still: it does so until the placement ends.
    halts: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Order {
    step: u64,
    /// Whether training stands still after it.
    halt: bool,
}

impl SnapshotOrder {
    /// Takes the place of one that is not done yet.
    pub(super) fn set(&self, step: u64, halt: bool) {
        self.halts.fetch_or(halt, Ordering::Relaxed);
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(Order { step, halt });
    }

    /// Whether training stands still, or is to.
    pub(super) fn halts(&self) -> bool {
        self.halts.load(Ordering::Relaxed)
    }

    /// Takes the order once its step is done, or has passed.
    fn take(&self, done: u64) -> Option<Order> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take_if(|order| order.step <= done)
    }
}

/// Whether there is a broker that takes shards.
pub(super) struct BrokerAbsence {
    is_there: watch::Receiver<bool>,
    /// Whether it was waited for in vain.
    is_long: bool,
}

impl BrokerAbsence {
    pub(super) fn of(is_there: watch::Receiver<bool>) -> Self {
        Self { is_there, is_long: false }
    }

    fn is_there(&self) -> bool {
        *self.is_there.borrow()
    }

    /// Resolves once it is away for [`ABSENCE`], or is still away since that was last so.
    async fn is_long(&mut self) {
        loop {
            if self.is_long && !*self.is_there.borrow() {
                return;
            }
            self.is_long = false;
            // Where the other end is gone the job is, and whoever waits for room learns that.
            if self.is_there.wait_for(|is_there| !is_there).await.is_err() {
                return std::future::pending().await;
            }
            self.is_long = timeout(ABSENCE, self.is_there.wait_for(|is_there| *is_there)).await.is_err();
        }
    }
}

/// The task loop's reports as events; its checkpoints as shards, and its snapshots as files that stay.
pub(super) struct NodeSink {
    pub(super) key: RunKey,
    pub(super) node: NodeIndex,
    /// Bytes of a shard, nearly.
    pub(super) shard_bytes: u64,
    /// The last step.
    pub(super) steps: u64,
    pub(super) events: mpsc::Sender<NodeEvent>,
    pub(super) shards: mpsc::Sender<(u64, ShardFile)>,
    pub(super) again: watch::Receiver<Again>,
    pub(super) broker: BrokerAbsence,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) clock: Arc<ClockOffset>,
    pub(super) folder: Arc<Path>,
    pub(super) snapshots: Arc<SnapshotStore>,
    pub(super) snapshot_due: Arc<SnapshotOrder>,
    pub(super) runtime: Handle,
    /// Whether training stands still after the snapshot at hand.
    pub(super) halts: bool,
}

impl NodeSink {
    fn tell(&self, message: FromCompNode) -> Result<(), CompNodeError> {
        let sent = self.events.blocking_send(NodeEvent::Report(self.key, Box::new(message)));
        sent.map_err(|_| CompNodeError::Broker { reason: "the connection is gone".to_owned() })
    }

    /// Waits for a place for the shard of this step; nothing if the checkpoint is left out, since nobody takes those before it.
    fn place(&mut self, step: u64) -> Result<Option<mpsc::OwnedPermit<(u64, ShardFile)>>, CompNodeError> {
        let gone = |_| CompNodeError::Broker { reason: "it does not take checkpoint shards any more".to_owned() };
        let (place, is_last) = (self.shards.clone().reserve_owned(), step == self.steps);
        let absence = &mut self.broker;
        self.runtime.block_on(async move {
            tokio::select! {
                biased;
                place = place => place.map(Some).map_err(gone),
                () = absence.is_long(), if !is_last => Ok(None),
            }
        })
    }

    /// Writes a checkpoint's shard. Where the last one does not fit, its state is held until the broker asks for it again, or
    /// another broker process takes the job back, which does not know that it could not be written.
    fn write_shard(&self, step: u64, state: &mut dyn HeldState) -> Result<Option<ShardFile>, CompNodeError> {
        loop {
            let Again { times, .. } = *self.again.borrow();
            self.make_room()?;
            let reason = match ShardFile::write(&self.folder, state.tensors()?) {
                Ok(shard) => return Ok(Some(shard)),
                // A full disk costs the checkpoint, and no more.
                Err(error @ ShardError::Io { .. }) => error.to_string(),
                Err(error) => return Err(error.into()),
            };
            self.tell(FromCompNode::ShardFailed { key: self.key, step, reason })?;
            if step != self.steps {
                return Ok(None);
            }
            let mut was_away = false;
            self.stand_still_until(|| {
                let is_there = self.broker.is_there();
                was_away |= !is_there;
                was_away && is_there || self.again.borrow().is_newer(step, times)
            })?;
        }
    }

    /// A checkpoint goes before snapshots: where both do not fit, these make room.
    fn make_room(&self) -> Result<(), CompNodeError> {
        if free_room(&self.folder).is_none_or(|room| room / 2 >= self.shard_bytes) {
            return Ok(());
        }
        let gone = self.snapshots.all().into_iter().filter(|snapshot| snapshot.id.key.job == self.key.job);
        let gone: Vec<SnapshotId> = gone.map(|snapshot| snapshot.id).collect();
        self.snapshots.release(self.key.job, &[]);
        for id in gone {
            let reason = "it made room for a checkpoint".to_owned();
            self.tell(FromCompNode::SnapshotFailed { id, is_late: false, reason })?;
        }
        Ok(())
    }

    /// Waits until something is so, or the placement ends, which is an error.
    fn stand_still_until(&self, mut is_so: impl FnMut() -> bool) -> Result<(), CompNodeError> {
        while !is_so() {
            if let Some(error) = self.mailbox.closed() {
                return Err(error.into());
            }
            std::thread::sleep(HALT_LOOK);
        }
        Ok(())
    }

    fn write_snapshot(&self, id: SnapshotId, state: &mut dyn HeldState) -> Result<(), CompNodeError> {
        let began = Instant::now();
        let new = self.snapshots.begin(self.shard_bytes)?;
        new.file()?.fill(state.tensors()?)?;
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
        let Some(Order { step: due, halt }) = self.snapshot_due.take(step) else { return Ok(false) };
        self.halts = halt;
        if due < step {
            let id = SnapshotId { key: self.key, step: due, node: self.node };
            let reason = format!("it was asked for after step {step} only");
            self.tell(FromCompNode::SnapshotFailed { id, is_late: true, reason })?;
        }
        Ok(due == step)
    }

    fn checkpoint(&mut self, step: u64, state: &mut dyn HeldState) -> Result<(), CompNodeError> {
        let Some(place) = self.place(step)? else {
            let reason = "the broker was away, and those before it were waiting for it".to_owned();
            return self.tell(FromCompNode::ShardFailed { key: self.key, step, reason });
        };
        if let Some(shard) = self.write_shard(step, state)? {
            place.send((step, shard));
        }
        Ok(())
    }

    fn snapshot(&mut self, step: u64, state: &mut dyn HeldState) -> Result<(), CompNodeError> {
        let id = SnapshotId { key: self.key, step, node: self.node };
        match self.write_snapshot(id, state) {
            Ok(()) => {}
            // A full disk costs the snapshot, and no more.
            Err(error @ CompNodeError::Shard(ShardError::Io { .. })) => self.tell(keeping::failed(id, &error))?,
            Err(error) => return Err(error),
        }
        // What is done from here on would be done again.
        if self.halts { self.stand_still_until(|| false) } else { Ok(()) }
    }
}
