//! A link between two CompNodes is cut, and both are alive: the job goes on by a plan that does without it.

use std::time::Duration;

use fusionllm_planner::{NodeIndex, Placement, Route};
use fusionllm_protocol::{Channel, Fault, JobId, PairProfile, RunKey};

use super::around::Around;
use super::detector::SUSPECT;
use super::recovery::Missing;
use super::run::owner_of;
use super::schedule::needed;
use super::{Action, ConnectionId, Core, Job};

/// A CompNode that does not reach a member of a job is not taken in for it until this long after the cut.
const LONG_CUT: Duration = Duration::from_secs(120);

impl Core {
    /// A CompNode has given its job up, since it does not reach another one that it works with.
    pub(super) fn link_lost(
        &mut self,
        key: RunKey,
        from: ConnectionId,
        peer: NodeIndex,
        reason: &str,
        now: Duration,
    ) -> Vec<Action> {
        let name = self.compnodes.name(from);
        if self.is_awaited(key) && self.compnodes.run_of(from) == Some(key) {
            return self.give_back(key.job, format!("CompNode `{name}` does not reach its peer: {reason}"), now);
        }
        let Some(run) = self.run_mut(key).filter(|run| run.node_of(from).is_some()) else { return Vec::new() };
        let Some(to) = run.members.get(peer.index()).copied().filter(|&to| to != from) else { return Vec::new() };
        let other = self.compnodes.name(to);
        // One that is silent is gone, and its links with it.
        if self.compnodes.phi(to, now) < SUSPECT && !self.compnodes.is_away(to) {
            self.survey.cut(from, to, now);
        }
        let reason = format!("CompNode `{name}` does not reach `{other}`: {reason}");
        self.fault(key, Fault::Failed, vec![name, other], Duration::ZERO, now);
        self.recover(key, reason, Missing::Lost, now)
    }

    /// A link was measured, or cannot be.
    pub(super) fn probed(
        &mut self,
        connection: ConnectionId,
        probe: u64,
        result: Result<PairProfile, String>,
        now: Duration,
    ) -> Vec<Action> {
        if let Some((pair, was_cut)) = self.survey.probed(connection, probe, result, &self.compnodes, now) {
            self.link_measured_anew(pair);
            // What could not be placed without the link may be now.
            self.jobs.values_mut().filter(|_| was_cut).for_each(|job| job.recoveries.try_again());
        }
        self.schedule(now)
    }

    /// Two of `members` that would send to each other by a placement, and cannot.
    pub(super) fn cut_in(
        &self,
        job: JobId,
        placement: &Placement,
        members: &[ConnectionId],
    ) -> Option<(ConnectionId, ConnectionId)> {
        let Job { record, recoveries, .. } = self.jobs.get(&job)?;
        let named = |node: NodeIndex| {
            let name = placement.compnodes.get(node.index())?;
            members.iter().copied().find(|&member| self.compnodes.name(member) == *name)
        };
        let mut routes = Channel::all(placement, record.spec.train.clips()).map(|(_, route)| route);
        let cut = |Route { from, to }: Route| {
            let (a, b) = (named(from)?, named(to)?);
            self.survey.is_unreachable(a, b).then_some((a, b))
        };
        if recoveries.goes_on { routes.find_map(cut) } else { None }
    }

    /// A plan for `members` uses a link that is cut: the job is placed without one of its ends, or waits.
    pub(super) fn plan_around(
        &mut self,
        job: JobId,
        (a, b): (ConnectionId, ConnectionId),
        members: Vec<ConnectionId>,
        now: Duration,
    ) -> Vec<Action> {
        let (names, Some(known)) = ([a, b].map(|c| self.compnodes.name(c)), self.jobs.get_mut(&job)) else {
            return Vec::new();
        };
        let owner = owner_of(&members).filter(|_| known.owner().is_some());
        let least = known.start.as_ref().map_or(1, |start| needed(&known.record.spec, start, true));
        let reason =
            format!("`{}` and `{}` do not reach each other, and no plan does without that", names[0], names[1]);
        let around = known.around.get_or_insert_with(|| Around::new(members.clone(), reason));
        // Who comes later in the order is left out first.
        let mut ends = [a, b];
        ends.sort_by_key(|end| members.iter().position(|member| member == end));
        for end in ends.into_iter().filter(|&end| Some(end) != owner) {
            let rest: Vec<ConnectionId> = members.iter().copied().filter(|&member| member != end).collect();
            if rest.len() >= least.max(1) {
                around.add(rest);
            }
        }
        self.plan_next_around(job, now).unwrap_or_default()
    }

    /// Tries the next set of CompNodes; nothing if the job is not being placed around a cut link. Where another job has taken
    /// one of the set meanwhile, or it would not be chosen any more, the search is dropped: whoever schedules then begins it
    /// again with those that are left.
    pub(super) fn plan_next_around(&mut self, job: JobId, now: Duration) -> Option<Vec<Action>> {
        let known = self.jobs.get_mut(&job)?;
        if let Some(members) = known.around.as_mut()?.take_next() {
            if members.iter().all(|&member| self.may_have(job, member, now)) {
                return Some(self.plan(job, members, now));
            }
            self.jobs.get_mut(&job)?.around = None;
            return Some(Vec::new());
        }
        let (all, reason) = known.around.take()?.give_up();
        known.recoveries.cannot_be_placed(all, reason);
        Some(Vec::new())
    }

    /// Whether a job that goes on may be placed on a CompNode.
    fn may_have(&self, job: JobId, member: ConnectionId, now: Duration) -> bool {
        let name = self.compnodes.name(member);
        let is_avoided = self.jobs.get(&job).is_some_and(|job| job.recoveries.avoids(&name, now));
        self.compnodes.is_idle(member) && self.compnodes.phi(member, now) < SUSPECT && !is_avoided
    }

    /// Whether a CompNode would be of no use to a run: its link to one of the members was cut not long ago.
    pub(super) fn is_cut_off(&self, connection: ConnectionId, members: &[ConnectionId], now: Duration) -> bool {
        members.iter().any(|&member| self.survey.is_cut_within(connection, member, LONG_CUT, now))
    }
}
