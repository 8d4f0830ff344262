//! CompNodes come, break off, come back and go.

use std::time::Duration;

use fusionllm_protocol::{Fault, FromBroker, JobId, JobState, RunKey};

use super::recovery::Missing;
use super::{Action, ConnectionId, Core, Job, Joining, StartPoint};
use crate::BrokerError;

/// A CompNode that gives no sign of life for this long is lost; until then it may come back after a break.
pub(crate) const LEASE: Duration = Duration::from_secs(45);
/// If ticks come less often than this, the broker itself was held up, and silence of others says nothing.
const LATE_TICK: Duration = Duration::from_secs(3);
/// Where another process is at work in the folder of a job, it is looked again so often whether it still is.
const IN_USE: Duration = Duration::from_secs(1);

impl Core {
    /// A CompNode joins. Gives its name here.
    pub(crate) fn join(&mut self, connection: ConnectionId, joining: Joining, now: Duration) -> (String, Vec<Action>) {
        let (wanted, standing) = (joining.name.clone(), joining.standing.clone());
        let was_to_leave = self.lost_leaving.remove(&joining.key).is_some();
        self.compnodes.join(connection, joining, now);
        self.survey.joined(connection, self.compnodes.all());
        // The process that was to leave and was held up; another one that somebody has started since may stay.
        let leaves = was_to_leave && standing.is_some();
        let mut actions = self.stands(connection, &wanted, standing, now);
        if leaves {
            actions.extend(self.leaves(connection, now));
        }
        actions.extend(self.schedule(now));
        (self.compnodes.name(connection), self.hold(actions))
    }

    /// The CompNode with this key, if it is here or may come back.
    pub(crate) fn member(&self, key: &[u8; 32]) -> Option<ConnectionId> {
        self.compnodes.of_key(key)
    }

    /// Whether a CompNode's connection is broken and it may come back.
    pub(crate) fn is_away(&self, connection: ConnectionId) -> bool {
        self.compnodes.is_away(connection)
    }

    /// As if a run was at work on it.
    #[cfg(test)]
    pub(crate) fn set_to_work(&mut self, connection: ConnectionId, key: fusionllm_protocol::RunKey) {
        self.compnodes.take(connection, key);
    }

    /// A CompNode is back after a break, with all that was said meanwhile still to come. Gives its name here.
    pub(crate) fn rejoin(
        &mut self,
        connection: ConnectionId,
        joining: Joining,
        now: Duration,
    ) -> Option<(String, Vec<Action>)> {
        let has_moved = self.compnodes.addr(connection) != joining.addr;
        let addr = joining.addr.clone();
        let name = self.compnodes.is_back(connection, joining.addr, now)?;
        let run = self.jobs.values_mut().find_map(|j| j.run.as_mut().filter(|r| r.node_of(connection).is_some()));
        let mut actions = Vec::new();
        if let Some(run) = run {
            // Without it nothing could go on, and that is not to be counted against the others.
            run.watchdog.moved = now;
            let (key, params, is_sent) = (run.key, run.weights_owed(connection), run.weights_are_sent);
            if let Some(peer) = run.node_of(connection).filter(|_| has_moved) {
                let others = run.members.iter().filter(|&&other| other != connection);
                let tell = |&to| Action::Send { to, message: FromBroker::PeerMoved { key, peer, addr: addr.clone() } };
                actions.extend(others.map(tell));
            }
            let start = self.jobs.get(&key.job).and_then(|job| job.start.as_ref()).filter(|_| is_sent);
            // Weights go by a stream of their own, which broke with the connection and is not taken up again.
            if let Some((params, from)) = params.zip(start.and_then(|start| start.weights.clone())) {
                actions.push(Action::SendWeights { to: connection, key, params, from });
            }
        }
        actions.extend(self.schedule(now));
        Some((name, self.hold(actions)))
    }

    /// A CompNode of this name is known to be gone.
    pub(crate) fn lost(&mut self, name: &str, reason: &str, now: Duration) -> Vec<Action> {
        let Some(connection) = self.compnodes.all().find(|&c| self.compnodes.name(c) == name) else {
            return Vec::new();
        };
        let mut actions = vec![Action::Disconnect { to: connection, reason: reason.to_owned() }];
        actions.extend(self.left(connection, reason, now));
        self.hold(actions)
    }

    /// Does what is due by the clock.
    pub(super) fn tick(&mut self, now: Duration) -> Vec<Action> {
        let since = now.saturating_sub(self.ticked.replace(now).unwrap_or(now));
        if since > LATE_TICK {
            self.compnodes.forgive(since);
            for run in self.jobs.values_mut().filter_map(|job| job.run.as_mut()) {
                run.watchdog.moved += since;
            }
        }
        let mut actions = Vec::new();
        let (questions, mut lost) = self.detect(now);
        actions.extend(questions);
        for (connection, why) in self.compnodes.silent_for(LEASE, now) {
            lost.push((connection, why.unwrap_or_else(|| format!("no heartbeat for {} s", LEASE.as_secs()))));
        }
        for (connection, reason) in lost {
            actions.push(Action::Disconnect { to: connection, reason: reason.clone() });
            let silence = self.compnodes.silence(connection, now);
            actions.extend(self.left_after(connection, &reason, silence, now));
        }
        self.survey.tick(now);
        self.survey.try_cut_ones(&self.compnodes, now);
        actions.extend(self.rewrite(now));
        actions.extend(self.stalled(now));
        self.jobs.values_mut().for_each(|job| job.snapshots.expire(now));
        let runs: Vec<RunKey> = self.jobs.values().filter_map(|job| Some(job.run.as_ref()?.key)).collect();
        actions.extend(runs.into_iter().flat_map(|key| self.take_snapshots(key, now)));
        actions.extend(self.ask_all_again(now));
        actions.extend(self.read_again(now));
        actions.extend(self.awaited_jobs(now));
        actions.extend(self.move_those_that_leave(now));
        actions.extend(self.dismiss(now));
        actions.extend(self.grow(now));
        actions.extend(self.weigh(now));
        actions.extend(self.schedule(now));
        actions
    }

    /// A CompNode has gone for good.
    pub(super) fn left(&mut self, connection: ConnectionId, reason: &str, now: Duration) -> Vec<Action> {
        self.left_after(connection, reason, Duration::ZERO, now)
    }

    /// The same, where that was only known after a silence.
    fn left_after(&mut self, connection: ConnectionId, reason: &str, silence: Duration, now: Duration) -> Vec<Action> {
        let (key, was_to_leave) = (self.compnodes.key(connection), self.compnodes.is_leaving(connection));
        let Some(gone) = self.compnodes.remove(connection) else { return Vec::new() };
        self.survey.left(connection);
        if was_to_leave && gone.run.is_some() {
            self.lost_leaving.insert(key, gone.name.clone());
        }
        self.jobs.values_mut().for_each(|job| job.snapshots.gone(connection));
        if let Some(key) = gone.run.filter(|&key| self.is_awaited(key)) {
            return self.give_back(key.job, format!("CompNode `{}` vanished: {reason}", gone.name), now);
        }
        let Some(key) = gone.run else {
            let mut actions = self.gone_too(connection, &gone.name);
            actions.extend(self.schedule(now));
            return actions;
        };
        // A placement was still being worked out: others are chosen for it, and nothing is lost.
        if self.plan_no_more(key.job) {
            return self.schedule(now);
        }
        if self.is_done_without(key, connection, now) {
            return self.advance(key, now);
        }
        let step = self.jobs.get(&key.job).map_or(0, |job| job.record.step);
        let mut reason = format!("CompNode `{}` vanished after step {step}: {reason}", gone.name);
        let mut who = vec![gone.name];
        for other in self.silent_beside(key, connection, now) {
            reason.push_str(&format!("; no sign of life of `{other}` either"));
            who.push(other);
        }
        // One that is gone before it has done a step may be so again and again: the others need not wait for it each time.
        let is_early =
            self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).is_some_and(|r| r.step_time().is_none());
        if let Some(job) = self.jobs.get_mut(&key.job).filter(|job| is_early && job.recoveries.has_worked) {
            who.iter().for_each(|name| job.recoveries.avoid(name, reason.clone(), Missing::Lost, now));
        }
        self.fault(key, Fault::Lost, who, silence, now);
        self.recover(key, reason, Missing::Lost, now)
    }

    /// A CompNode has no work any more. Whether it is still here: one that is away is given up.
    pub(super) fn release(&mut self, connection: ConnectionId) -> bool {
        let is_here = self.compnodes.release(connection);
        if !is_here {
            self.survey.left(connection);
        }
        is_here
    }

    /// Jobs on which nothing goes on, though all their CompNodes are alive.
    fn stalled(&mut self, now: Duration) -> Vec<Action> {
        let mut stalled = Vec::new();
        for run in self.jobs.values().filter_map(|job| job.run.as_ref()) {
            // Where one is away, its lease says when it is given up.
            let is_whole = !run.members.iter().any(|&m| self.compnodes.is_away(m));
            if let Some((waiting, what)) = run.stalled(now).filter(|_| is_whole) {
                let waiting: Vec<String> = waiting.iter().map(|&m| self.compnodes.name(m)).collect();
                let names: Vec<String> = waiting.iter().map(|name| format!("`{name}`")).collect();
                let who = match names.is_empty() {
                    true => "the disk of the broker".to_owned(),
                    false => format!("CompNode {}", names.join(", ")),
                };
                let silence = now.saturating_sub(run.watchdog.moved);
                stalled.push((run.key, format!("{what}: waited for {who}"), waiting, silence));
            }
        }
        let mut actions = Vec::new();
        for (key, reason, waiting, silence) in stalled {
            self.fault(key, Fault::Stalled, waiting, silence, now);
            actions.extend(self.recover(key, reason, Missing::Failed, now));
        }
        actions
    }

    /// Has what a job starts from read once more, where another process was at work in its folder.
    fn read_again(&mut self, now: Duration) -> Vec<Action> {
        let is_unread = |job: &Job| {
            job.snapshots.newest().is_none() && job.start.as_ref().is_some_and(|start| start.unread.is_some())
        };
        let is_due = |job: &mut Job| {
            let waits = matches!(job.record.state, JobState::Waiting { .. }) && job.loading.is_none();
            let is_free = job.in_use.as_ref().is_some_and(|(_, again)| now >= *again);
            waits && (is_free || is_unread(job) && job.planning.is_none() && job.recoveries.reads_again(now))
        };
        let due = self.jobs.iter_mut().filter_map(|(&id, job)| is_due(job).then_some(id));
        let due: Vec<JobId> = due.collect();
        due.into_iter().filter_map(|job| self.load(job, true)).collect()
    }

    /// What a job starts from that waited when the broker ended, or goes on by itself.
    pub(super) fn loaded(
        &mut self,
        job: JobId,
        number: u64,
        result: Result<StartPoint, BrokerError>,
        now: Duration,
    ) -> Vec<Action> {
        let is_wanted = |job: &&mut Job| !job.record.state.is_final() && job.loading == Some(number);
        let Some(known) = self.jobs.get_mut(&job).filter(is_wanted) else { return Vec::new() };
        (known.loading, known.in_use) = (None, None);
        let mut actions = match result {
            Ok(start) => {
                (known.record.step, known.record.loss) = match known.recoveries.goes_on {
                    // How far it is the metrics say.
                    true if known.takeback.is_some() => (known.record.step, known.record.loss),
                    true => known.snapshots.newest_after((start.step, start.loss)),
                    false => (start.step, start.loss),
                };
                known.begins_with(start);
                let mut actions = self.take_back(job, now);
                actions.extend(self.without_start(job));
                actions
            }
            // Whoever is at work there may change all that is in it.
            Err(error @ BrokerError::InUse { .. }) => {
                known.in_use = Some((error.to_string(), now + IN_USE));
                Vec::new()
            }
            // Its last checkpoint became whole after all.
            Err(BrokerError::NothingLeft { .. }) if known.recoveries.goes_on => {
                self.end(job, JobState::Done, "the job is done")
            }
            Err(error) => {
                let state = JobState::Failed { reason: error.to_string(), bad_input: error.is_bad_input() };
                self.end(job, state, "what it starts from cannot be read")
            }
        };
        actions.extend(self.schedule(now));
        actions
    }
}
