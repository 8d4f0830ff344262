//! Snapshots of a job: when they are taken, who keeps them, and from which step the job goes on with them.
//!
//! All CompNodes of a placement take one after the same step, and guardians fetch each, so that a step is lost only with
//! two machines. A set is whole when each part is there; it takes the place of the one before, which is released then. One
//! is under way at a time, so that a CompNode keeps few: two of its own, and two of each that it guards.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement};
use fusionllm_protocol::{FromBroker, Generation, JobId, PeerRecord, RunKey, Snapshot, SnapshotId, SnapshotSource};

use super::run::param_names;
use super::snapshot_book::RecoveryPoint;
use super::{Action, ConnectionId, Core, Job};

/// A link that has this share of the fastest one's speed does as well for a guardian.
const SIMILAR_SPEED: f64 = 0.5;

/// What the CompNodes of a placement begin with.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// By CompNode, in the placement's order.
    pub(super) of_members: Vec<Vec<SnapshotSource>>,
    /// Borrower, snapshot and lender; who has a file of its own lends it itself.
    pub(super) loans: Vec<(ConnectionId, SnapshotId, ConnectionId)>,
    /// What lenders are told before.
    pub(super) lends: Vec<Action>,
}

impl Core {
    /// Has the next snapshots of a run taken, once it is time.
    pub(super) fn take_snapshots(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(Job { record, run: Some(run), snapshots, .. }) = self.jobs.get_mut(&key.job) else {
            return Vec::new();
        };
        let spec = &record.spec;
        // Of a step that has passed already they would hear too late.
        let Some(step_time) = run.step_time().filter(|_| run.has_caught_up()) else { return Vec::new() };
        snapshots.step_time = step_time;
        let bytes = spec.train.state_bytes(run.dag.param_bytes(), run.dag.trained_bytes());
        let wanted = 1 + (spec.survive.copies as usize).min(run.members.len().saturating_sub(1));
        // Those of an earlier placement, of which some may be gone, are replaced at once.
        let is_old = snapshots.newest_placement().is_some_and(|generation| generation != key.generation);
        let is_thin = is_old && snapshots.is_thin(wanted, |holder| self.compnodes.stays(holder));
        let due = snapshots.due(spec, run.merged(), step_time.as_secs_f64(), bytes, is_thin, now);
        let Some(step) = due else { return Vec::new() };
        snapshots.begin(key, step, run.params_by_node(), now);
        let tell = |&to| Action::Send { to, message: FromBroker::Snapshot { key, step, halt: false } };
        run.members.iter().map(tell).collect()
    }

    /// A CompNode has a snapshot: its own, one that it guards, or one from before it came back.
    pub(super) fn holds(&mut self, by: ConnectionId, snapshot: Snapshot, cost_s: f64, now: Duration) -> Vec<Action> {
        let key = snapshot.id.key;
        let guardians = self.guardians(by, &snapshot);
        let Some(job) = self.jobs.get_mut(&key.job) else { return vec![release(by, key.job, Vec::new())] };
        // When the work moves, who makes it lends it.
        let guardians = guardians.map(|guardians| if job.snapshots.halts() { Vec::new() } else { guardians });
        if let Some(guardians) = guardians
            && job.snapshots.is_made(by, snapshot, cost_s, &guardians)
        {
            let guard = |to| Action::Send { to, message: FromBroker::Guard { snapshot } };
            let mut actions: Vec<Action> = guardians.into_iter().map(guard).collect();
            actions.extend(self.snapshots_complete(key, now));
            return actions;
        }
        if job.snapshots.is_held(by, snapshot, cost_s) {
            return self.snapshots_complete(key, now);
        }
        vec![release(by, key.job, job.snapshots.needed())]
    }

    /// There is no such snapshot with a CompNode: training goes on without it, or cannot begin with it.
    pub(super) fn snapshot_failed(
        &mut self,
        by: ConnectionId,
        id: SnapshotId,
        is_late: bool,
        reason: &str,
        now: Duration,
    ) -> Vec<Action> {
        if let Some(job) = self.jobs.get_mut(&id.key.job)
            && let Some(run) = &mut job.run
            && let Some(lender) = run.lender(by, id)
        {
            job.snapshots.is_not_with(lender, id);
            run.loan_failed = true;
            return Vec::new();
        }
        let key = id.key;
        if let Some(job) = self.jobs.get_mut(&key.job) {
            job.snapshots.is_not_with(by, id);
        }
        let Some(node) = self.run_mut(key).and_then(|run| run.node_of(by)) else { return Vec::new() };
        let Some(job) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let halts = job.snapshots.halts();
        let is_new = job.snapshots.has_failed(by, id, node == id.node, is_late);
        let mut actions = Vec::new();
        if job.snapshots.is_abandoned() {
            // Those who have made their part of it need not keep it.
            let needed = job.snapshots.needed();
            actions.extend(self.compnodes.all().map(|to| release(to, key.job, needed.clone())));
        }
        if is_new {
            let name = self.compnodes.name(by);
            let text = format!(
                "CompNode `{name}` cannot keep {}: {reason}",
                match node == id.node {
                    true => "a snapshot of its part, so that a failure costs the steps since the newest checkpoint",
                    false => "another's snapshots, so that more is lost when that one's machine is",
                }
            );
            actions.extend(self.notices(key.job, vec![text]));
        }
        if halts && !self.jobs.get(&key.job).is_some_and(|job| job.snapshots.halts()) {
            // Some stand still: with what is kept already they move all the same.
            actions.extend(self.move_on(key, now));
        }
        actions.extend(self.snapshots_complete(key, now));
        actions
    }

    /// What follows once a set is whole: it is remembered, and then the ones before it are released.
    pub(super) fn snapshots_complete(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(job) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let halts = job.snapshots.halts();
        if !job.snapshots.is_complete() {
            return Vec::new();
        }
        job.record.snapshots = job.snapshots.to_store();
        let (record, needed) = (job.record.clone(), job.snapshots.needed());
        let mut actions = vec![self.persist(record)];
        actions.extend(self.compnodes.all().map(|to| release(to, key.job, needed.clone())));
        if halts {
            actions.extend(self.move_on(key, now));
        }
        actions
    }

    /// Where a job goes on that has a checkpoint of `step`: with the newest snapshots after it, if all parts are there.
    pub(super) fn recovery_point(&mut self, job: JobId, step: u64) -> Option<RecoveryPoint> {
        let Self { jobs, compnodes, .. } = self;
        let known = jobs.get_mut(&job).filter(|known| known.recoveries.goes_on && known.record.from_step.is_none())?;
        known.snapshots.recovery_point(step, |holder| compnodes.is_here(holder))
    }

    /// What each CompNode of a placement begins with, and who must lend it to whom.
    pub(super) fn sources(
        &self,
        job: JobId,
        point: &RecoveryPoint,
        dag: &OpDag,
        placement: &Placement,
        members: &[ConnectionId],
    ) -> Sources {
        let mut borrowers: BTreeMap<ConnectionId, Vec<PeerRecord>> = BTreeMap::new();
        let mut loans = Vec::new();
        let mut all = Vec::with_capacity(members.len());
        for (node, &to) in (0..).map(NodeIndex).zip(members) {
            let mut wanted = param_names(dag, placement, node);
            let mut sources = Vec::new();
            let parts = || point.set.parts.iter().zip(&point.holders);
            // What lies there already needs no wire.
            let own = parts().filter(|(_, holders)| holders.contains(&to));
            let others = parts().filter(|(_, holders)| !holders.contains(&to));
            for (part, holders) in own.chain(others) {
                let params: Vec<String>;
                (params, wanted) = wanted.into_iter().partition(|name| part.params.contains(name));
                if params.is_empty() {
                    continue;
                }
                let speed = |lender: &&ConnectionId| self.survey.bytes_per_s(**lender, to);
                let fastest = holders.iter().max_by(|a, b| speed(a).total_cmp(&speed(b))).copied();
                let lender = fastest.filter(|_| !holders.contains(&to));
                loans.push((to, part.snapshot.id, lender.unwrap_or(to)));
                if let Some(lender) = lender {
                    borrowers.entry(lender).or_default().push(self.compnodes.addr(to));
                }
                let from = lender.map(|lender| self.compnodes.addr(lender));
                sources.push(SnapshotSource { snapshot: part.snapshot, from, params });
            }
            all.push(sources);
        }
        let lend = |(to, borrowers)| Action::Send { to, message: FromBroker::Lend { job, to: borrowers } };
        Sources { of_members: all, loans, lends: borrowers.into_iter().map(lend).collect() }
    }

    /// A job needs its snapshots no more.
    pub(super) fn release_all(&mut self, job: JobId) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        known.record.snapshots.clear();
        match known.snapshots.give_up() {
            true => self.compnodes.all().map(|to| release(to, job, Vec::new())).collect(),
            false => Vec::new(),
        }
    }

    /// Who is to guard a snapshot that a member of a run has made of itself; nothing if it has not.
    fn guardians(&self, by: ConnectionId, snapshot: &Snapshot) -> Option<Vec<ConnectionId>> {
        let SnapshotId { key, node, .. } = snapshot.id;
        let Job { record, run: Some(run), .. } = self.jobs.get(&key.job)? else { return None };
        if run.key != key || run.node_of(by) != Some(node) || !run.may_hold(node, snapshot.bytes) {
            return None;
        }
        // Where the owner of private data is not there, nobody can go on: others would only learn what it keeps.
        if record.spec.data.private && node == NodeIndex::DATA_OWNER {
            return Some(Vec::new());
        }
        let mut others: Vec<ConnectionId> = run.members.iter().copied().filter(|&other| other != by).collect();
        // What is on the same machine goes with it.
        let is_near = |other: &ConnectionId| self.compnodes.host(*other) == self.compnodes.host(by);
        let speed = |to: &ConnectionId| self.survey.bytes_per_s(by, *to);
        let fastest = others.iter().map(speed).fold(0.0, f64::max);
        // Links that are about as fast share the work, from the next CompNode of the pipeline on.
        let is_slow = |to: &ConnectionId| speed(to) < fastest * SIMILAR_SPEED;
        let count = run.members.len();
        let after =
            |to: &ConnectionId| run.node_of(*to).map_or(count, |at| (at.index() + count - node.index()) % count);
        others.sort_by(|a, b| {
            let by_speed =
                if is_slow(a) && is_slow(b) { speed(b).total_cmp(&speed(a)) } else { is_slow(a).cmp(&is_slow(b)) };
            is_near(a).cmp(&is_near(b)).then(by_speed).then(after(a).cmp(&after(b)))
        });
        others.truncate(record.spec.survive.copies as usize);
        Some(others)
    }
}

fn release(to: ConnectionId, job: JobId, keep: Vec<(Generation, u64)>) -> Action {
    Action::Send { to, message: FromBroker::Release { job, keep } }
}
