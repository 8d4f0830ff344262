//! What is known of machines and links, and what is being measured.
//!
//! Every pair of idle CompNodes is probed once, and again when somebody asks for fresher figures; the ops of a job are
//! measured before it is placed. A CompNode takes part in one measurement at a time, and so does each machine, since
//! CompNodes on one machine would disturb each other. What cannot be measured is remembered as such, so that no job
//! waits for it.

mod inventory;
mod work_key;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fusionllm_planner::Measured;
use fusionllm_protocol::{FromBroker, JobSpec, JobView, PairProfile};

use super::registry::Registry;
use super::{Action, ConnectionId, StartPoint};
pub(super) use work_key::WorkKey;

/// A probe that has not been answered for this long is given up.
const PROBE_LIMIT: Duration = Duration::from_secs(60);
/// The measurement of a job's ops is given up after this long.
const OPS_LIMIT: Duration = Duration::from_secs(600);

/// A link that was cut is tried again after this long, when both ends are idle.
const HEALED: Duration = Duration::from_secs(30);

/// Two CompNodes; the first one dials.
type Pair = (ConnectionId, ConnectionId);

#[derive(Debug)]
struct PairState {
    /// Nothing if they could not reach each other.
    result: Option<PairProfile>,
    at: Duration,
    /// Whether they could reach each other before.
    is_cut: bool,
}

#[derive(Debug)]
enum Activity {
    Probe { pair: Pair, since: Duration, is_asked: bool },
    Ops { connection: ConnectionId, key: WorkKey, since: Duration },
}

impl Activity {
    fn involves(&self, connection: ConnectionId) -> bool {
        match self {
            Self::Probe { pair, .. } => pair.0 == connection || pair.1 == connection,
            Self::Ops { connection: at, .. } => *at == connection,
        }
    }
}

/// Ops that somebody wants measured.
#[derive(Debug)]
struct Wanted {
    job: Box<JobView>,
    graph: String,
    members: BTreeSet<ConnectionId>,
}

/// The state of all measurements.
#[derive(Debug, Default)]
pub(super) struct Survey {
    count: u64,
    due: BTreeSet<Pair>,
    pairs: BTreeMap<Pair, PairState>,
    wanted: BTreeMap<WorkKey, Wanted>,
    ops: BTreeMap<(ConnectionId, WorkKey), Option<Measured>>,
    active: BTreeMap<u64, Activity>,
    /// Pairs that were cut and are measured again before the next plan.
    healing: BTreeSet<Pair>,
    /// Pairs that are measured though one of them is at work: the other one is new, and may be of use to it.
    beside_work: BTreeSet<Pair>,
}

impl Survey {
    /// Numbers go on after this one. An earlier broker process has asked under others, and what is answered to it may come
    /// here.
    pub(super) fn number_from(&mut self, number: u64) {
        self.count = number;
    }

    /// A CompNode has joined: its links to all others are due.
    pub(super) fn joined(&mut self, connection: ConnectionId, others: impl Iterator<Item = ConnectionId>) {
        self.due.extend(others.filter(|&o| o != connection).map(|o| (o.min(connection), o.max(connection))));
    }

    /// A CompNode has gone, and with it all that was measured of it.
    pub(super) fn left(&mut self, connection: ConnectionId) {
        let concerns = |pair: &Pair| pair.0 == connection || pair.1 == connection;
        self.due.retain(|pair| !concerns(pair));
        self.pairs.retain(|pair, _| !concerns(pair));
        self.healing.retain(|pair| !concerns(pair));
        self.beside_work.retain(|pair| !concerns(pair));
        self.ops.retain(|(at, _), _| *at != connection);
        for wanted in self.wanted.values_mut() {
            wanted.members.remove(&connection);
        }
        // What the other one of a probe measured is lost; with one end gone nobody needs it.
        self.active.retain(|_, activity| !activity.involves(connection));
    }

    /// Links between those at work and those that are new are to be measured: these, and no others.
    pub(super) fn measure_beside_work(&mut self, pairs: impl IntoIterator<Item = Pair>) {
        self.beside_work = pairs.into_iter().collect();
    }

    /// Links that were measured before `then` are due again.
    pub(super) fn refresh(&mut self, then: Duration) {
        self.due.extend(self.pairs.iter().filter(|(_, state)| state.at < then).map(|(&pair, _)| pair));
    }

    /// The ops of a job are to be measured on these CompNodes.
    pub(super) fn want(&mut self, spec: &JobSpec, start: &StartPoint, members: &[ConnectionId]) {
        let key = WorkKey::of(spec, start);
        let at_it = |m: ConnectionId| {
            let same =
                |a: &Activity| matches!(a, Activity::Ops { connection, key: k, .. } if (*connection, *k) == (m, key));
            self.active.values().any(same)
        };
        let missing = members.iter().copied().filter(|&m| !self.ops.contains_key(&(m, key)) && !at_it(m));
        let missing: BTreeSet<ConnectionId> = missing.collect();
        if missing.is_empty() {
            return;
        }
        let new = || Wanted { job: Box::new(JobView::of(spec)), graph: start.graph.clone(), members: BTreeSet::new() };
        self.wanted.entry(key).or_insert_with(new).members.extend(missing);
    }

    /// The ops of this work need not be measured any more.
    pub(super) fn cancel(&mut self, key: WorkKey) -> Vec<Action> {
        self.wanted.remove(&key);
        let mut actions = Vec::new();
        self.active.retain(|&request, activity| match activity {
            Activity::Ops { connection, key: of, .. } if *of == key => {
                let message = FromBroker::CancelMeasure { request };
                actions.push(Action::Send { to: *connection, message });
                false
            }
            _ => true,
        });
        actions
    }

    /// Whether all is known that a plan over these CompNodes needs.
    pub(super) fn is_complete(&self, members: &[ConnectionId], key: WorkKey) -> bool {
        let ops = members.iter().all(|&m| self.ops.contains_key(&(m, key)));
        let pair = |&a: &ConnectionId, &b: &ConnectionId| a >= b || self.pairs.contains_key(&(a, b));
        ops && members.iter().all(|a| members.iter().all(|b| pair(a, b)))
    }

    /// Whether all of that is known by measuring, so that they can be held against each other.
    pub(super) fn is_measured(&self, members: &[ConnectionId], key: WorkKey) -> bool {
        let ops = members.iter().all(|&m| self.ops.get(&(m, key)).is_some_and(Option::is_some));
        let is_reached = |&a: &ConnectionId, &b: &ConnectionId| {
            a >= b || self.pairs.get(&(a, b)).is_some_and(|state| state.result.is_some())
        };
        ops && members.iter().all(|a| members.iter().all(|b| is_reached(a, b)))
    }

    /// Starts whatever can start now.
    pub(super) fn advance(&mut self, registry: &Registry, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut busy: BTreeSet<&str> = BTreeSet::new();
        for activity in self.active.values() {
            busy.extend(match activity {
                Activity::Probe { pair, .. } => vec![registry.host(pair.0), registry.host(pair.1)],
                Activity::Ops { connection, .. } => vec![registry.host(*connection)],
            });
        }
        let idle: BTreeSet<ConnectionId> = registry.idle().into_iter().collect();
        for (&key, wanted) in &mut self.wanted {
            let free: Vec<ConnectionId> = wanted.members.intersection(&idle).copied().collect();
            for connection in free {
                if !busy.insert(registry.host(connection)) {
                    continue;
                }
                wanted.members.remove(&connection);
                self.count += 1;
                self.active.insert(self.count, Activity::Ops { connection, key, since: now });
                let (job, graph) = (wanted.job.clone(), wanted.graph.clone());
                let message = FromBroker::MeasureOps { request: self.count, job, graph };
                actions.push(Action::Send { to: connection, message });
            }
        }
        self.wanted.retain(|_, wanted| !wanted.members.is_empty());
        let mut started = Vec::new();
        for &(a, b) in &self.due {
            let hosts = (registry.host(a), registry.host(b));
            let may = idle.contains(&a) && idle.contains(&b) || self.beside_work.contains(&(a, b));
            if !may || busy.contains(hosts.0) || busy.contains(hosts.1) {
                continue;
            }
            busy.extend([hosts.0, hosts.1]);
            self.count += 1;
            self.active.insert(self.count, Activity::Probe { pair: (a, b), since: now, is_asked: false });
            let message = FromBroker::AwaitProbe { probe: self.count, peer: registry.addr(a) };
            actions.push(Action::Send { to: b, message });
            started.push((a, b));
        }
        self.due.retain(|pair| !started.contains(pair));
        actions
    }

    /// The one that is dialled is ready for a probe: the other one may dial.
    pub(super) fn awaited(&mut self, connection: ConnectionId, probe: u64, registry: &Registry) -> Vec<Action> {
        match self.active.get_mut(&probe) {
            Some(Activity::Probe { pair, is_asked, .. }) if pair.1 == connection && !*is_asked => {
                *is_asked = true;
                let message = FromBroker::Probe { probe, peer: registry.addr(connection) };
                vec![Action::Send { to: pair.0, message }]
            }
            _ => Vec::new(),
        }
    }

    /// A probe has ended. The pair that was measured, if it was, and whether its link is there again after it was cut.
    pub(super) fn probed(
        &mut self,
        connection: ConnectionId,
        probe: u64,
        result: Result<PairProfile, String>,
        registry: &Registry,
        now: Duration,
    ) -> Option<(Pair, bool)> {
        let Some(&Activity::Probe { pair, .. }) = self.active.get(&probe) else { return None };
        // Only the one that dialled says what came of it.
        if pair.0 != connection {
            return None;
        }
        self.active.remove(&probe);
        let sane = |pair: &PairProfile| {
            let fits = |l: &fusionllm_planner::LinkProfile| {
                l.latency_s.is_finite() && l.latency_s >= 0.0 && l.bytes_per_s.is_finite() && l.bytes_per_s > 0.0
            };
            fits(&pair.there) && fits(&pair.back)
        };
        let result = match result {
            Ok(profile) if sane(&profile) => Some(profile),
            // No link has such figures, and no plan may go by them.
            Ok(_) => None,
            // Where one is at work and the other one still idle, as when it began, no job has ended it.
            Err(reason) if self.beside_work.remove(&pair) && registry.is_idle(pair.0) != registry.is_idle(pair.1) => {
                tracing::info!(from = ?pair.0, to = ?pair.1, reason, "a link to one at work could not be measured");
                // Once both are idle it is tried again.
                self.cut(pair.0, pair.1, now);
                return None;
            }
            Err(_) if !registry.is_idle(pair.0) || !registry.is_idle(pair.1) => {
                // A job came in between; there is another time.
                self.due.insert(pair);
                return None;
            }
            Err(reason) => {
                tracing::warn!(from = ?pair.0, to = ?pair.1, reason, "two CompNodes do not reach each other");
                None
            }
        };
        let was_cut = self.pairs.get(&pair).is_some_and(|state| state.is_cut);
        self.set(pair, result, now);
        result.map(|_| (pair, was_cut))
    }

    fn set(&mut self, pair: Pair, result: Option<PairProfile>, now: Duration) {
        let before = self.pairs.get(&pair);
        let was_there =
            self.healing.remove(&pair) || before.is_some_and(|state| state.is_cut || state.result.is_some());
        self.pairs.insert(pair, PairState { result, at: now, is_cut: was_there && result.is_none() });
    }

    /// Two CompNodes that trained together do not reach each other any more: no plan may go by what was measured before.
    pub(super) fn cut(&mut self, a: ConnectionId, b: ConnectionId, now: Duration) {
        let pair = (a.min(b), a.max(b));
        self.pairs.insert(pair, PairState { result: None, at: now, is_cut: true });
    }

    /// Whether two CompNodes cannot reach each other, as far as is known.
    pub(super) fn is_unreachable(&self, a: ConnectionId, b: ConnectionId) -> bool {
        a != b && self.pairs.get(&(a.min(b), a.max(b))).is_some_and(|state| state.result.is_none())
    }

    /// Whether a link was cut, or tried in vain since, within this time.
    pub(super) fn is_cut_within(&self, a: ConnectionId, b: ConnectionId, time: Duration, now: Duration) -> bool {
        let state = self.pairs.get(&(a.min(b), a.max(b)));
        state.is_some_and(|state| state.is_cut && now.saturating_sub(state.at) < time)
    }

    /// Links among these that were cut, or last tried, long ago.
    fn old_cuts(&self, members: &[ConnectionId], now: Duration) -> Vec<Pair> {
        let is_of = |pair: &Pair| members.contains(&pair.0) && members.contains(&pair.1);
        let is_old = |state: &PairState| state.is_cut && now.saturating_sub(state.at) >= HEALED;
        let is_tried =
            |of: &Pair| self.active.values().any(|a| matches!(a, Activity::Probe { pair, .. } if pair == of));
        let old =
            |(pair, state): (&Pair, &PairState)| (is_of(pair) && is_old(state) && !is_tried(pair)).then_some(*pair);
        self.pairs.iter().filter_map(old).collect()
    }

    /// Before a plan for these is made, such links are measured: they may have healed.
    pub(super) fn measure_cut_ones(&mut self, members: &[ConnectionId], now: Duration) {
        let old = self.old_cuts(members, now);
        self.pairs.retain(|pair, _| !old.contains(pair));
        self.healing.extend(&old);
        self.due.extend(old);
    }

    /// Such links between idle CompNodes are measured again.
    pub(super) fn try_cut_ones(&mut self, registry: &Registry, now: Duration) {
        let old = self.old_cuts(&registry.idle(), now);
        self.due.extend(old);
    }

    /// Messages of a job went from one CompNode to another over the relay, or directly. What was measured of another way is not
    /// true any more: both are probed again once they are idle.
    pub(super) fn seen(&mut self, from: ConnectionId, to: ConnectionId, relayed: bool) {
        let pair = (from.min(to), from.max(to));
        let known = self.pairs.get_mut(&pair).and_then(|state| state.result.as_mut());
        if let Some(known) = known.filter(|known| known.relayed != relayed) {
            known.relayed = relayed;
            self.due.insert(pair);
        }
    }

    /// Each two CompNodes whose link leads over the relay.
    pub(super) fn relayed(&self) -> impl Iterator<Item = Pair> + '_ {
        let is_relayed = |state: &PairState| state.result.is_some_and(|pair| pair.relayed);
        self.pairs.iter().filter(move |(_, state)| is_relayed(state)).map(|(&pair, _)| pair)
    }

    /// The ops of some work were measured: of which, if that was asked for.
    pub(super) fn measured(
        &mut self,
        connection: ConnectionId,
        request: u64,
        result: Result<Measured, String>,
    ) -> Option<WorkKey> {
        let Some(&Activity::Ops { connection: asked, key, .. }) = self.active.get(&request) else { return None };
        if asked != connection {
            return None;
        }
        self.active.remove(&request);
        if let Err(reason) = &result {
            tracing::warn!(?connection, reason, "a CompNode cannot measure the ops of a job");
        }
        self.ops.insert((connection, key), result.ok().filter(Measured::is_sane));
        Some(key)
    }

    /// Gives up what takes too long.
    pub(super) fn tick(&mut self, now: Duration) {
        let overdue = |since: Duration, limit: Duration| now.saturating_sub(since) > limit;
        let mut given_up = Vec::new();
        self.active.retain(|_, activity| {
            let is_over = match activity {
                Activity::Probe { since, .. } => overdue(*since, PROBE_LIMIT),
                Activity::Ops { since, .. } => overdue(*since, OPS_LIMIT),
            };
            if is_over {
                given_up.push(match activity {
                    Activity::Probe { pair, .. } => (Some(*pair), None),
                    Activity::Ops { connection, key, .. } => (None, Some((*connection, *key))),
                });
            }
            !is_over
        });
        // Remembered as what cannot be measured, so that no job waits for it again.
        for (pair, ops) in given_up {
            match pair {
                // Once both are idle it is tried again.
                Some(pair) if self.beside_work.remove(&pair) => self.cut(pair.0, pair.1, now),
                Some(pair) => self.set(pair, None, now),
                None => {}
            }
            self.ops.extend(ops.map(|ops| (ops, None)));
        }
    }

    /// Whether a measurement is under way.
    #[cfg(test)]
    pub(super) fn is_measuring(&self) -> bool {
        !self.active.is_empty()
    }

    /// Bytes a second from one CompNode to another; 0 if that is not known.
    pub(super) fn bytes_per_s(&self, from: ConnectionId, to: ConnectionId) -> f64 {
        let state = self.pairs.get(&(from.min(to), from.max(to)));
        let pair = state.and_then(|state| state.result);
        pair.map_or(0.0, |pair| if from < to { pair.there.bytes_per_s } else { pair.back.bytes_per_s })
    }
}
