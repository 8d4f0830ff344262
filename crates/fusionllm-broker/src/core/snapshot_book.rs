//! What is kept of a job, and how often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fusionllm_planner::{NodeIndex, snapshot_cost_s, snapshot_period_s};
use fusionllm_protocol::{Generation, JobSpec, RunKey, Snapshot, SnapshotId};

use super::ConnectionId;
use crate::store::{SnapshotPart, SnapshotSet};

/// A step that CompNodes are told of is so many seconds ahead, and [`LEAST_AHEAD`] steps, so that the word is there in time.
const AHEAD_S: f64 = 0.3;
const LEAST_AHEAD: u64 = 2;
/// Before there is any, one is taken after this many seconds, or this many times what it costs.
const FIRST_PERIOD_S: f64 = 2.0;
const FIRST_SHARE: f64 = 20.0;
/// At the most; and how often it is doubled when it was too late.
const MOST_AHEAD: u64 = 10_000;
const MOST_DOUBLINGS: u32 = 6;
/// A failure is no rarer than one that has just come this soon.
const LEAST_MTBF_S: f64 = 10.0;
/// Parts of snapshots that may come back are waited for, however few steps that would save, and however many.
const WORTH_WAITING: (Duration, Duration) = (Duration::from_secs(45), Duration::from_secs(3600));
/// Guardians that have not answered after this long are not waited for.
const MOST_GUARDING: Duration = Duration::from_secs(1800);
/// Sets that are kept at the most: a new one of which guardians have less may not take the place of an older one.
const MOST_SETS: usize = 2;

/// What is kept of a job, and how often.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    /// Whole ones, oldest first.
    sets: Vec<HeldSet>,
    making: Option<Making>,
    /// When the last one was begun, or the placement was at work.
    begun: Duration,
    /// Seconds for which training stood still for the last one, at the slowest.
    cost_s: Option<f64>,
    /// Seconds that the slowest guardian took.
    guarding_s: f64,
    /// Seconds between two failures of the job, as far as is known.
    mtbf_s: Option<f64>,
    /// When it last failed, or was begun.
    failed: Duration,
    /// How long a step took.
    pub(super) step_time: Duration,
    /// How often in a row a step was passed before the word of it was there.
    late: u32,
    /// Whether it was told that one could not be kept, since the last set that is in more than one place.
    is_told: bool,
    /// Whether one was given up that some may have made their part of.
    is_abandoned: bool,
}

/// A set, and who has each of its parts.
#[derive(Debug)]
struct HeldSet {
    set: SnapshotSet,
    holders: Vec<BTreeSet<ConnectionId>>,
}

impl HeldSet {
    fn copies(&self) -> usize {
        self.holders.iter().map(BTreeSet::len).min().unwrap_or(0)
    }
}

/// One that is under way.
#[derive(Debug)]
struct Making {
    key: RunKey,
    step: u64,
    /// Training loss of that step, once it is done everywhere.
    loss: Option<f64>,
    /// Whether training stands still after it, since the work moves.
    halts: bool,
    /// Names of the parameters of each CompNode.
    params: Vec<Vec<String>>,
    parts: BTreeMap<NodeIndex, Part>,
}

#[derive(Debug)]
struct Part {
    snapshot: Snapshot,
    holders: BTreeSet<ConnectionId>,
    /// Guardians that have not answered.
    awaited: BTreeSet<ConnectionId>,
    /// Seconds that the slowest of them took.
    guarding_s: f64,
}

/// Where a job may go on.
#[derive(Clone, Debug)]
pub(super) struct RecoveryPoint {
    pub(super) set: SnapshotSet,
    /// By part, who has it now.
    pub(super) holders: Vec<Vec<ConnectionId>>,
}

impl Snapshots {
    /// Those of a job that the store knows of. Who has them is still to be heard.
    pub(super) fn of_store(sets: Vec<SnapshotSet>) -> Self {
        let held = |set: SnapshotSet| HeldSet { holders: vec![BTreeSet::new(); set.parts.len()], set };
        Self { sets: sets.into_iter().map(held).collect(), ..Self::default() }
    }

    /// As the store keeps them.
    pub(super) fn to_store(&self) -> Vec<SnapshotSet> {
        self.sets.iter().map(|held| held.set.clone()).collect()
    }

    /// Step of the newest whole set.
    pub(super) fn newest(&self) -> Option<u64> {
        self.sets.last().map(|held| held.set.step)
    }

    /// Step and loss of the newest whole set, if it is after that step.
    pub(super) fn newest_after(&self, (step, loss): (u64, Option<f64>)) -> (u64, Option<f64>) {
        let newest = self.sets.last().filter(|held| held.set.step > step);
        newest.map_or((step, loss), |held| (held.set.step, held.set.loss))
    }

    /// The placement of the newest whole set.
    pub(super) fn newest_placement(&self) -> Option<Generation> {
        self.sets.last().map(|held| held.set.generation)
    }

    /// By placement and step, what must not be released.
    pub(super) fn needed(&self) -> Vec<(Generation, u64)> {
        let sets = self.sets.iter().map(|held| (held.set.generation, held.set.step));
        sets.chain(self.making.iter().map(|making| (making.key.generation, making.step))).collect()
    }

    /// A placement is at work now.
    pub(super) fn at_work(&mut self, now: Duration) {
        (self.begun, self.making) = (now, None);
        if self.mtbf_s.is_none() {
            self.failed = now;
        }
    }

    /// The job has lost a CompNode, or one has failed. What is known of the time between two failures moves half of the
    /// way, by orders of magnitude, to how long it lasted this time.
    pub(super) fn failed(&mut self, mtbf_h: f64, now: Duration) {
        let lasted = now.saturating_sub(self.failed).as_secs_f64().max(LEAST_MTBF_S);
        self.mtbf_s = Some((self.mtbf_s.unwrap_or(mtbf_h * 3600.0) * lasted).sqrt());
        self.failed = now;
        // What every CompNode has made needs no guardian to be used.
        self.finish(|_| true);
        self.making = None;
    }

    /// Seconds between two.
    fn period_s(&self, mtbf_h: f64, bytes: u64, now: Duration) -> f64 {
        let known = self.mtbf_s.unwrap_or(mtbf_h * 3600.0);
        let mtbf = known.max(now.saturating_sub(self.failed).as_secs_f64());
        let cost = self.cost_s.unwrap_or(snapshot_cost_s(bytes));
        snapshot_period_s(cost, mtbf, self.guarding_s)
    }

    /// The step for the next one, if it is time to tell it: `merged` steps of `step_s` seconds are done, and all parts
    /// together have so many bytes. What is kept in too few places is replaced at once.
    pub(super) fn due(
        &self,
        spec: &JobSpec,
        merged: u64,
        step_s: f64,
        bytes: u64,
        is_thin: bool,
        now: Duration,
    ) -> Option<u64> {
        if !spec.survive.enabled || self.making.is_some() {
            return None;
        }
        let soonest = self.soonest(merged, step_s);
        let step = match spec.survive.every {
            Some(0) => return None,
            _ if is_thin => soonest,
            Some(every) => soonest.next_multiple_of(every),
            None => {
                let since = now.saturating_sub(self.begun).as_secs_f64();
                let period_s = self.period_s(spec.survive.mtbf_h, bytes, now);
                // The first one comes soon: without any, all is done again.
                let first_s = FIRST_PERIOD_S.max(FIRST_SHARE * snapshot_cost_s(bytes)).min(period_s);
                let wait_s = if self.sets.is_empty() { first_s } else { period_s };
                Some(soonest).filter(|_| since >= wait_s)?
            }
        };
        (step < spec.train.steps).then_some(step)
    }

    /// All CompNodes are told to take one after this step. `params` are the parameters of each.
    pub(super) fn begin(&mut self, key: RunKey, step: u64, params: Vec<Vec<String>>, now: Duration) {
        self.begun = now;
        self.making = Some(Making { key, step, loss: None, halts: false, params, parts: BTreeMap::new() });
    }

    /// The same, after which training stands still, as soon as may be. Gives the step; nothing if it is the last one, or one
    /// to halt at is told already.
    pub(super) fn begin_halt(
        &mut self,
        key: RunKey,
        (merged, steps): (u64, u64),
        step_s: f64,
        params: Vec<Vec<String>>,
    ) -> Option<u64> {
        if self.halts() {
            return None;
        }
        let step = merged + 2 * (self.soonest(merged, step_s) - merged);
        if step >= steps {
            return None;
        }
        // What all have made is not thrown away.
        self.finish(|_| true);
        self.is_abandoned |= self.making.is_some();
        self.making = Some(Making { key, step, loss: None, halts: true, params, parts: BTreeMap::new() });
        Some(step)
    }

    /// Whether training is to stand still after the one that is under way.
    pub(super) fn halts(&self) -> bool {
        self.making.as_ref().is_some_and(|making| making.halts)
    }

    /// The first step of which word comes in time.
    fn soonest(&self, merged: u64, step_s: f64) -> u64 {
        let ahead = (LEAST_AHEAD + (AHEAD_S / step_s.max(1e-6)) as u64) << self.late.min(MOST_DOUBLINGS);
        merged.saturating_add(ahead.min(MOST_AHEAD))
    }

    /// A step is done everywhere.
    pub(super) fn stepped(&mut self, step: u64, loss: f64) {
        if let Some(making) = self.making.as_mut().filter(|making| making.step == step) {
            making.loss = Some(loss);
        }
    }

    /// A CompNode of the placement has made its part, which stopped it for `cost_s` seconds; `guardians` are to fetch it.
    /// Whether that was due.
    pub(super) fn is_made(
        &mut self,
        by: ConnectionId,
        snapshot: Snapshot,
        cost_s: f64,
        guardians: &[ConnectionId],
    ) -> bool {
        let SnapshotId { key, step, node } = snapshot.id;
        let due = self.making.as_mut().filter(|making| (making.key, making.step) == (key, step));
        let Some(making) = due.filter(|making| !making.parts.contains_key(&node)) else { return false };
        let is_first = making.parts.is_empty();
        let (holders, awaited) = (BTreeSet::from([by]), guardians.iter().copied().collect());
        making.parts.insert(node, Part { snapshot, holders, awaited, guarding_s: 0.0 });
        let cost_s = sane(cost_s);
        self.cost_s = Some(self.cost_s.filter(|_| !is_first).map_or(cost_s, |most| most.max(cost_s)));
        true
    }

    /// A CompNode has a snapshot that somebody made, for whose fetching it took `cost_s` seconds. Whether it is known.
    pub(super) fn is_held(&mut self, by: ConnectionId, snapshot: Snapshot, cost_s: f64) -> bool {
        let mut parts = self.making.iter_mut().flat_map(|making| making.parts.values_mut());
        if let Some(part) = parts.find(|part| part.snapshot == snapshot) {
            if part.awaited.remove(&by) {
                part.guarding_s = part.guarding_s.max(sane(cost_s));
            }
            part.holders.insert(by);
            return true;
        }
        let of_sets = self.sets.iter_mut().flat_map(|held| held.set.parts.iter().zip(&mut held.holders));
        let mut same = of_sets.filter(|(part, _)| part.snapshot == snapshot);
        same.next().is_some_and(|(_, holders)| {
            holders.insert(by);
            true
        })
    }

    /// A CompNode does not get, or does not make, a snapshot; with the latter the whole set fails. Whether that must be told:
    /// once, until it succeeds, and not if the word only came too late.
    pub(super) fn has_failed(&mut self, by: ConnectionId, id: SnapshotId, is_its_own: bool, is_late: bool) -> bool {
        let Some(making) = self.making.as_mut().filter(|m| (m.key, m.step) == (id.key, id.step)) else { return false };
        if let Some(part) = making.parts.get_mut(&id.node) {
            if !part.awaited.remove(&by) {
                return false;
            }
        } else if is_its_own {
            self.making = None;
            self.is_abandoned = true;
            self.late += u32::from(is_late);
        } else {
            return false;
        }
        !is_late && !std::mem::replace(&mut self.is_told, true)
    }

    /// A CompNode has gone, with what it had.
    pub(super) fn gone(&mut self, connection: ConnectionId) {
        for part in self.making.iter_mut().flat_map(|making| making.parts.values_mut()) {
            part.holders.remove(&connection);
            part.awaited.remove(&connection);
        }
        self.sets.iter_mut().flat_map(|held| &mut held.holders).for_each(|holders| {
            holders.remove(&connection);
        });
    }

    /// The one under way becomes the newest set if its step is done, each CompNode has made its part, and guardians have
    /// answered. Whether it does.
    pub(super) fn is_complete(&mut self) -> bool {
        self.finish(|part| part.awaited.is_empty())
    }

    fn finish(&mut self, is_ready: impl Fn(&Part) -> bool) -> bool {
        let is_whole = |making: &mut Making| {
            let is_made = making.params.len() == making.parts.len();
            making.loss.is_some() && is_made && making.parts.values().all(&is_ready)
        };
        let Some(making) = self.making.take_if(is_whole) else { return false };
        self.guarding_s = making.parts.values().map(|part| part.guarding_s).fold(0.0, f64::max);
        let (mut parts, mut holders) = (Vec::new(), Vec::new());
        for (part, params) in making.parts.into_values().zip(making.params) {
            parts.push(SnapshotPart { snapshot: part.snapshot, params });
            holders.push(part.holders);
        }
        let set = SnapshotSet { generation: making.key.generation, step: making.step, loss: making.loss, parts };
        let newest = HeldSet { set, holders };
        // One that guardians have less of does not take its place.
        self.sets.retain(|held| held.copies() > newest.copies());
        self.is_told &= newest.copies() < 2;
        self.sets.push(newest);
        let surplus = self.sets.len().saturating_sub(MOST_SETS);
        self.sets.drain(..surplus);
        // What was too late once may be so again.
        self.late = self.late.saturating_sub(1);
        true
    }

    /// The newest set after `step` of which each part is with somebody who `is_here`. Later ones are given up with that: they
    /// are not the job's future any more.
    pub(super) fn recovery_point(
        &mut self,
        step: u64,
        is_here: impl Fn(ConnectionId) -> bool,
    ) -> Option<RecoveryPoint> {
        let here = |holders: &BTreeSet<ConnectionId>| -> Vec<ConnectionId> {
            holders.iter().copied().filter(|&holder| is_here(holder)).collect()
        };
        let point = self.sets.iter().rev().filter(|held| held.set.step > step).find_map(|held| {
            let holders: Vec<Vec<ConnectionId>> = held.holders.iter().map(here).collect();
            let is_whole = holders.iter().all(|holders| !holders.is_empty());
            is_whole.then(|| RecoveryPoint { set: held.set.clone(), holders })
        });
        let last = point.as_ref().map_or(step, |point| point.set.step);
        self.sets.retain(|held| held.set.step <= last);
        point
    }

    /// Whether some part of the newest set is in fewer than `wanted` places that are to stay.
    pub(super) fn is_thin(&self, wanted: usize, stays: impl Fn(ConnectionId) -> bool) -> bool {
        let places = |holders: &BTreeSet<ConnectionId>| holders.iter().filter(|&&holder| stays(holder)).count();
        self.sets.last().is_some_and(|held| held.holders.iter().any(|holders| places(holders) < wanted))
    }

    /// Whether a CompNode has a part of the newest set.
    pub(super) fn is_with(&self, holder: ConnectionId) -> bool {
        self.sets.last().is_some_and(|held| held.holders.iter().any(|holders| holders.contains(&holder)))
    }

    /// A CompNode does not have this one, or does not give it.
    pub(super) fn is_not_with(&mut self, holder: ConnectionId, id: SnapshotId) {
        for held in &mut self.sets {
            let of_id = held.set.parts.iter().zip(&mut held.holders).filter(|(part, _)| part.snapshot.id == id);
            of_id.for_each(|(_, holders)| {
                holders.remove(&holder);
            });
        }
    }

    /// Whether one was given up, of which some may have made their part. It is asked once.
    pub(super) fn is_abandoned(&mut self) -> bool {
        std::mem::take(&mut self.is_abandoned)
    }

    /// Gives up what is under way for too long: guardians that do not answer are not waited for any more.
    pub(super) fn expire(&mut self, now: Duration) {
        if now.saturating_sub(self.begun) < MOST_GUARDING {
            return;
        }
        if let Some(making) = &mut self.making {
            making.parts.values_mut().for_each(|part| part.awaited.clear());
        }
    }

    /// The newest set after `step` of which some part is with nobody who `is_here`, and for how long it is worth waiting for
    /// that: as long as it would take to be there again without it.
    pub(super) fn missing(&self, step: u64, is_here: impl Fn(ConnectionId) -> bool) -> Option<(u64, Duration)> {
        let newest = self.sets.last().filter(|held| held.set.step > step)?;
        let is_there = |holders: &BTreeSet<ConnectionId>| holders.iter().any(|&holder| is_here(holder));
        if newest.holders.iter().all(is_there) {
            return None;
        }
        let again = self.step_time.saturating_mul(u32::try_from(newest.set.step - step).unwrap_or(u32::MAX));
        Some((newest.set.step, again.clamp(WORTH_WAITING.0, WORTH_WAITING.1)))
    }

    /// None is needed any more. Whether there may be any.
    pub(super) fn give_up(&mut self) -> bool {
        let had = self.making.is_some() || !self.sets.is_empty();
        (self.sets, self.making) = (Vec::new(), None);
        had
    }
}

/// Seconds that a CompNode says something took.
fn sane(seconds: f64) -> f64 {
    if seconds.is_finite() { seconds.clamp(0.0, MOST_GUARDING.as_secs_f64()) } else { 0.0 }
}
