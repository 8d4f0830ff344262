//! One placement of a job at work: who is ready, what was reported, which shards are there.

mod checkpoints;
mod links;
mod means;
mod taken_back;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_planner::{CodecChange, Controller, NodeIndex, PassPlan, Placement, Simulated};
use fusionllm_protocol::{
    Cadence, CompressionPolicy, JobSpec, RunKey, SnapshotId, StepMetrics, StepReport, StepTrace, measured_step,
};

use super::bounds::Bounds;
use super::drift::Came;
use super::hearsay::Hearsay;
use super::watchdog::Watchdog;
use super::{Breach, ConnectionId, StartPoint};
use crate::checkpoint::{Origin, StoredShard};
use means::mean_of;

/// The data owner, of the members of a placement.
pub(super) fn owner_of(members: &[ConnectionId]) -> Option<ConnectionId> {
    members.get(NodeIndex::DATA_OWNER.index()).copied()
}

/// Names of the parameters that a CompNode holds.
pub(super) fn param_names(dag: &OpDag, placement: &Placement, node: NodeIndex) -> Vec<String> {
    placement.params_of(dag, node).into_iter().map(|p| dag.param(p).name.clone()).collect()
}

/// A whole checkpoint: by CompNode its shard and the names of its parameters.
type Shards = Vec<(StoredShard, Vec<String>)>;

/// A step that every CompNode has reported.
pub(super) struct MergedStep {
    pub(super) metrics: StepMetrics,
    /// Seconds that each CompNode has computed, in the placement's order.
    pub(super) busy_s: Vec<f64>,
    /// What came over links.
    pub(super) came: Vec<Came>,
    /// What was done when, if it was traced.
    pub(super) traced: Option<Simulated>,
    /// Codecs that change, and who must know.
    pub(super) changes: Vec<(ConnectionId, CodecChange)>,
}

/// What it means that a checkpoint cannot be kept.
pub(super) enum Failed {
    /// Training goes on without it.
    New,
    /// That was so before: what else fails of it follows from that.
    Known,
    /// It is the last one, without which the job has no result: its shards are asked for once more.
    Again {
        /// Whether that is so for the first time.
        is_first: bool,
    },
    /// It is the last one, and that was tried for long enough, or comes to nothing at any time.
    Last,
}

/// The last checkpoint, while it cannot be kept.
#[derive(Clone, Copy, Debug)]
struct Retry {
    /// For how long it was waited between tries so far: how long shards take on their way does not count.
    waited: Duration,
    /// How often its shards were asked for since it could not be kept for the first time.
    times: u32,
    /// Whether what is left of the try before is being removed: shards of the next one must not lie there yet.
    is_dropping: bool,
    /// When they are asked for next; nothing while they are on their way.
    due: Option<Duration>,
}

/// The state of one placement.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) key: RunKey,
    /// Connections of its CompNodes, in the placement's order.
    pub(super) members: Vec<ConnectionId>,
    pub(super) dag: Arc<OpDag>,
    /// Where the model came from, and its data once the owner has read it.
    pub(super) origin: Origin,
    placement: Placement,
    ready: BTreeSet<NodeIndex>,
    finished: BTreeSet<NodeIndex>,
    steps: u64,
    /// Whether it was to stop while its last checkpoint was being written.
    insisted: bool,
    tokens_per_step: u64,
    /// Steps that every CompNode has reported.
    merged: u64,
    /// After so many steps comes a checkpoint, and after the last one.
    checkpoints: Cadence,
    /// Checkpoints of steps that are done, and the loss of their step, until they are whole.
    open: BTreeMap<u64, f64>,
    /// Steps still to be done whose checkpoints cannot be kept.
    given_up: BTreeSet<u64>,
    /// What is done about the last one, if it cannot be kept.
    retry: Option<Retry>,
    /// The newest whole one, to go on from.
    pub(super) checkpoint: Option<u64>,
    /// A newer one that others have renamed or removed, and where it is now, if that is known.
    pub(super) gone: Option<(u64, Option<PathBuf>)>,
    /// The step that it began with.
    from: u64,
    /// Steps that are written.
    recorded: u64,
    /// Of one that was taken back: how far its CompNodes were then.
    catches_up_at: u64,
    /// Who lends which snapshot to whom for it to begin with: borrower, snapshot, lender.
    loans: Vec<(ConnectionId, SnapshotId, ConnectionId)>,
    /// Whether one of these came to nothing.
    pub(super) loan_failed: bool,
    /// Whether the broker sends the weights that it began with.
    pub(super) weights_are_sent: bool,
    /// Checkpoints that are being checked and shown.
    finishing: BTreeSet<u64>,
    reports: BTreeMap<u64, BTreeMap<NodeIndex, StepReport>>,
    shards: BTreeMap<u64, BTreeMap<NodeIndex, StoredShard>>,
    /// Where codecs adapt while training.
    controller: Option<Controller>,
    pub(super) watchdog: Watchdog,
    /// How many bytes of the data have become tokens, and how many there are, before it is ready.
    pub(super) reading: Option<(u64, u64)>,
    /// Of members that are silent: what the others hear of them.
    pub(super) hearsay: BTreeMap<ConnectionId, Hearsay>,
    /// When it was placed, and how long it took to get ready.
    placed: Duration,
    prepared: Duration,
    pub(super) bounds: Bounds,
}

impl Run {
    pub(super) fn new(
        key: RunKey,
        members: Vec<ConnectionId>,
        placement: Placement,
        start: &StartPoint,
        spec: &JobSpec,
        predicted_s: f64,
        now: Duration,
    ) -> Self {
        let steps = spec.train.steps;
        let compression = &spec.compression;
        let adapts = compression.adapt && compression.policy != CompressionPolicy::Dense;
        let batch = spec.micro_batch_size() as usize;
        let new = || {
            let (policy, budget) = (spec.compression(), compression.error_budget);
            Controller::new(&start.dag, &placement, batch, policy, spec.codec(), budget)
        };
        let controller = adapts.then(new);
        Self {
            key,
            members,
            dag: Arc::clone(&start.dag),
            origin: start.origin.clone(),
            checkpoints: spec.checkpoints(),
            open: BTreeMap::new(),
            given_up: BTreeSet::new(),
            retry: None,
            checkpoint: None,
            gone: None,
            from: start.step,
            recorded: start.step,
            catches_up_at: 0,
            loans: Vec::new(),
            loan_failed: false,
            weights_are_sent: start.weights.is_some(),
            finishing: BTreeSet::new(),
            bounds: Bounds::new(&start.dag, &placement, spec, start.step),
            placement,
            ready: BTreeSet::new(),
            finished: BTreeSet::new(),
            steps,
            insisted: false,
            tokens_per_step: spec.tokens_per_step(),
            merged: start.step,
            reports: BTreeMap::new(),
            shards: BTreeMap::new(),
            controller,
            watchdog: Watchdog::new(&start.dag, spec, predicted_s, now),
            reading: None,
            hearsay: BTreeMap::new(),
            placed: now,
            prepared: Duration::ZERO,
        }
    }

    /// Nothing has gone on for too long: who is waited for, which is the broker's own disk if it is nobody, and what for.
    pub(super) fn stalled(&self, now: Duration) -> Option<(Vec<ConnectionId>, String)> {
        let waited = now.saturating_sub(self.watchdog.moved);
        let nodes = || (0..).map(NodeIndex).zip(&self.members);
        let missing = |is_there: &dyn Fn(NodeIndex) -> bool| -> Vec<ConnectionId> {
            nodes().filter(|(node, _)| !is_there(*node)).map(|(_, &m)| m).collect()
        };
        let is_ready = |node: NodeIndex| self.ready.contains(&node);
        let (limit, waiting, what) = if self.ready.len() < self.members.len() {
            let limit = self.watchdog.until_ready(is_ready(NodeIndex::DATA_OWNER));
            (limit, missing(&is_ready), "not ready".to_owned())
        } else if self.merged < self.steps {
            let reports = self.reports.get(&(self.merged + 1));
            let has_reported = |node: NodeIndex| reports.is_some_and(|r| r.contains_key(&node));
            (self.watchdog.until_step(), missing(&has_reported), format!("no step after step {}", self.merged))
        } else {
            let step = self.steps;
            let shards = self.shards.get(&step);
            let all_there = self.finishing.contains(&step) || !self.open.contains_key(&step);
            let has_sent = |node: NodeIndex| {
                self.finished.contains(&node) && (all_there || shards.is_some_and(|s| s.contains_key(&node)))
            };
            (self.watchdog.until_end(), missing(&has_sent), format!("the end did not come after step {step}"))
        };
        (waited > limit).then(|| (waiting, format!("{what} for {} s", waited.as_secs())))
    }

    /// Names of the parameters that a CompNode of this run may still wait for.
    pub(super) fn weights_owed(&self, connection: ConnectionId) -> Option<Vec<String>> {
        let node = self.node_of(connection).filter(|node| !self.ready.contains(node))?;
        Some(param_names(&self.dag, &self.placement, node))
    }

    /// The step that it began with.
    pub(super) fn from(&self) -> u64 {
        self.from
    }

    /// Its last step.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Names of its CompNodes.
    pub(super) fn names(&self) -> &[String] {
        &self.placement.compnodes
    }

    /// Steps that every CompNode has reported.
    pub(super) fn merged(&self) -> u64 {
        self.merged
    }

    /// It goes on in a run that has this checkpoint, and begins with snapshots that are lent: borrower, snapshot, lender.
    pub(super) fn goes_on(&mut self, checkpoint: Option<u64>, loans: Vec<(ConnectionId, SnapshotId, ConnectionId)>) {
        (self.checkpoint, self.loans) = (checkpoint, loans);
    }

    /// Who was to lend this one to a member that is not ready yet; a file of its own it lends itself.
    pub(super) fn lender(&self, borrower: ConnectionId, id: SnapshotId) -> Option<ConnectionId> {
        let is_waiting = self.node_of(borrower).is_some_and(|node| !self.ready.contains(&node));
        let loan = self.loans.iter().find(|(to, lent, _)| is_waiting && *to == borrower && *lent == id);
        loan.map(|(_, _, lender)| *lender)
    }

    /// How long its parts took to prepare.
    pub(super) fn prepared(&self) -> Duration {
        self.prepared
    }

    /// How long a step takes, once one is done.
    pub(super) fn step_time(&self) -> Option<Duration> {
        (self.merged > self.from).then(|| self.watchdog.time_of(1))
    }

    /// Whether so many bytes may be what a CompNode holds.
    pub(super) fn may_hold(&self, node: NodeIndex, bytes: u64) -> bool {
        self.bounds.check_shard(node, bytes).is_ok()
    }

    /// Names of the parameters of each CompNode.
    pub(super) fn params_by_node(&self) -> Vec<Vec<String>> {
        let nodes = (0..).map(NodeIndex).take(self.members.len());
        nodes.map(|node| param_names(&self.dag, &self.placement, node)).collect()
    }

    /// Which CompNode of the placement a connection is.
    pub(super) fn node_of(&self, connection: ConnectionId) -> Option<NodeIndex> {
        (0..).map(NodeIndex).zip(&self.members).find(|(_, m)| **m == connection).map(|(node, _)| node)
    }

    /// A CompNode is ready. Whether it was the last one.
    pub(super) fn ready(&mut self, connection: ConnectionId, now: Duration) -> bool {
        let is_new = self.node_of(connection).is_some_and(|node| self.ready.insert(node));
        if is_new {
            self.watchdog.moved = now;
        }
        let all = is_new && self.ready.len() == self.members.len();
        if all {
            self.prepared = now.saturating_sub(self.placed);
        }
        all
    }

    /// Step of the newest checkpoint of its own that there is, or may be before long.
    pub(super) fn newest_checkpoint(&self) -> Option<u64> {
        self.checkpoint.max(self.finishing.iter().max().copied())
    }

    /// A member has gone. Whether all that it had to do is done, and only the last checkpoint is being put in its place.
    pub(super) fn ends_without(&mut self, gone: ConnectionId, now: Duration) -> bool {
        let is_there = self.finishing.contains(&self.steps) || !self.open.contains_key(&self.steps);
        let Some(node) = self.node_of(gone).filter(|_| self.merged == self.steps && is_there) else { return false };
        self.finished.insert(node);
        self.watchdog.moved = now;
        true
    }

    /// It is to stop. Whether all that is left is to keep what was made, and nobody has said so before.
    pub(super) fn ends_by_itself(&mut self) -> bool {
        self.merged == self.steps && !std::mem::replace(&mut self.insisted, true)
    }

    /// How long it would take to be here again from the newest checkpoint on, as far as is known.
    pub(super) fn restart_cost(&self, snapshot: Option<u64>) -> Duration {
        let kept = self.checkpoint.max(snapshot).unwrap_or(0).max(self.from);
        let again = self.merged.saturating_sub(kept);
        self.prepared.saturating_add(self.watchdog.time_of(again))
    }

    /// A member tells when it last heard of another.
    pub(super) fn peer_heard(&mut self, witness: ConnectionId, peer: NodeIndex, ago_s: f64, now: Duration) {
        let is_member = self.node_of(witness).is_some_and(|node| node != peer);
        let Some(&about) = self.members.get(peer.index()).filter(|_| is_member) else { return };
        // What is no number says nothing.
        let ago = Duration::try_from_secs_f64(ago_s).unwrap_or(Duration::ZERO);
        if let Some(hearsay) = self.hearsay.get_mut(&about) {
            hearsay.says(witness, now.saturating_sub(ago), now);
        }
    }

    /// A CompNode that is not ready yet has got further with the data.
    /// `read` is how many bytes of the data have become tokens, and how many there are. Says whether that was to be.
    pub(super) fn reads_on(&mut self, connection: ConnectionId, read: (u64, u64), now: Duration) -> bool {
        let is_due = self.node_of(connection).is_some_and(|node| !self.ready.contains(&node));
        if is_due {
            self.watchdog.moved = now;
            self.reading = Some(read);
        }
        is_due
    }

    pub(super) fn finished(&mut self, connection: ConnectionId, now: Duration) {
        if self.node_of(connection).is_some_and(|node| self.finished.insert(node)) {
            self.watchdog.moved = now;
        }
    }

    /// Takes a report in; each CompNode reports each step once and in order.
    pub(super) fn step_reported(&mut self, connection: ConnectionId, mut report: StepReport) -> Result<(), Breach> {
        let Some(node) = self.node_of(connection) else { return Ok(()) };
        let step = report.step;
        let has_started = self.ready.len() == self.members.len();
        if !has_started || step > self.steps {
            return Err(Breach(format!("CompNode {} reported step {step}, which was not due", node.0)));
        }
        self.bounds.report_comes(node, &mut report, self.merged)?;
        self.reports.entry(step).or_default().insert(node, report);
        Ok(())
    }

    /// Whether a CompNode, which is not ready yet, holds what reads the data.
    pub(super) fn reads_data(&self, connection: ConnectionId) -> bool {
        let Some(node) = self.node_of(connection).filter(|node| !self.ready.contains(node)) else { return false };
        let holds = |op| self.placement.stages_of(node).any(|stage| stage.ops.contains(&op));
        [self.dag.input(), self.dag.label()].into_iter().flatten().any(holds)
    }

    /// The mean over all micro-batches of a pass, of what those say who hold the end of a group's pipeline.
    fn mean(
        &self,
        reports: &BTreeMap<NodeIndex, StepReport>,
        pass: &PassPlan,
        said: impl Fn(&StepReport) -> Option<f64>,
    ) -> Option<f64> {
        let times = |node: NodeIndex| self.dag.loss().map_or(0, |loss| self.placement.times(pass, node, loss));
        let said = reports.iter().filter_map(|(&node, report)| Some((times(node), said(report)?)));
        mean_of(&said.collect::<Vec<_>>())
    }

    /// The next step that every CompNode has reported, as one.
    pub(super) fn next_step(&mut self) -> Option<MergedStep> {
        let step = self.merged + 1;
        if self.reports.get(&step)?.len() < self.members.len() {
            return None;
        }
        let reports = self.reports.remove(&step)?;
        self.merged = step;
        let traces: Option<Vec<StepTrace>> = reports.values().map(|r| r.trace.clone()).collect();
        let traced = traces.map(|traces| measured_step(&traces));
        let changes = self.adapt(step, &reports);
        let all = || reports.values();
        let metrics = StepMetrics {
            step,
            // Without a loss there is nothing to go by: not a number, and the job fails.
            loss: self.mean(&reports, &self.placement.train, |r| r.loss).unwrap_or(f64::NAN),
            tokens: self.tokens_per_step,
            // All wait for the slowest.
            step_s: all().map(|r| r.step_s).fold(0.0, f64::max),
            lr: all().map(|r| r.lr).fold(0.0, f64::max),
            grad_norm: all().find_map(|r| r.grad_norm),
            eval_loss: self.mean(&reports, &self.placement.eval, |r| r.eval_loss),
            eval_accuracy: self.mean(&reports, &self.placement.eval, |r| r.eval_accuracy),
            links: all().flat_map(|r| r.links.iter().cloned()).collect(),
            codec_changes: changes.iter().map(|c| self.note(c)).collect(),
            recoveries: Vec::new(),
            unix_s: None,
            starts: false,
        };
        if !self.given_up.remove(&step) && self.checkpoints.is_due(step) {
            self.open.insert(step, metrics.loss);
        }
        self.watchdog.stepped(metrics.step_s);
        let sender = |change: CodecChange| Some((*self.members.get(change.sender.index())?, change));
        let busy_s = all().map(|r| r.busy_s).collect();
        let came = self.came(&all().flat_map(|r| &r.received).collect::<Vec<_>>());
        Some(MergedStep { metrics, busy_s, came, traced, changes: changes.into_iter().filter_map(sender).collect() })
    }
}
