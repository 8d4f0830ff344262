//! How a job comes back from a fault, phase by phase, and what a status says of one that stands still meanwhile.

use std::time::Duration;

use fusionllm_protocol::{Fault, JobState, Recovery, RunKey, Standstill, cause};

use super::detector::SUSPECT;
use super::{Action, ConnectionId, Core, Job};

/// What a job that comes back is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It is not placed yet.
    Decide,
    /// Its CompNodes prepare their parts.
    Build,
    /// They have started, and the first step is not done.
    Refill,
}

/// A recovery under way.
#[derive(Debug)]
pub(super) struct Comeback {
    kind: Fault,
    who: Vec<String>,
    /// Updates that were done when it happened.
    step: u64,
    detect: Duration,
    decide: Duration,
    build: Duration,
    refill: Duration,
    phase: Phase,
    /// Since when it is in this phase.
    since: Duration,
    /// With how many CompNodes it goes on.
    compnodes: u32,
    /// The members of the placement that came to nothing: another one of them may turn out to be gone, too.
    members: Vec<ConnectionId>,
}

impl Comeback {
    /// From a fault of these after `step`, which was known after a silence.
    pub(super) fn new(kind: Fault, who: Vec<String>, step: u64, silence: Duration, now: Duration) -> Self {
        let zero = Duration::ZERO;
        Self {
            kind,
            who,
            step,
            detect: silence,
            decide: zero,
            build: zero,
            refill: zero,
            phase: Phase::Decide,
            since: now,
            compnodes: 0,
            members: Vec::new(),
        }
    }

    /// Goes on with another phase.
    pub(super) fn enter(&mut self, phase: Phase, now: Duration) {
        let took = now.saturating_sub(self.since);
        match self.phase {
            Phase::Decide => self.decide += took,
            Phase::Build => self.build += took,
            Phase::Refill => self.refill += took,
        }
        (self.phase, self.since) = (phase, now);
    }

    /// It is placed on so many CompNodes.
    pub(super) fn placed(&mut self, compnodes: usize, now: Duration) {
        self.compnodes = u32::try_from(compnodes).unwrap_or(u32::MAX);
        self.enter(Phase::Build, now);
    }

    /// The first step is done, which came after `from` updates.
    pub(super) fn done(mut self, from: u64, now: Duration) -> Recovery {
        self.enter(Phase::Refill, now);
        Recovery {
            lost_steps: self.step.saturating_sub(from),
            kind: self.kind,
            who: self.who,
            step: self.step,
            compnodes: self.compnodes,
            detect_s: self.detect.as_secs_f64(),
            decide_s: self.decide.as_secs_f64(),
            build_s: self.build.as_secs_f64(),
            refill_s: self.refill.as_secs_f64(),
        }
    }

    /// For how long the job has stood still.
    fn so_far(&self, now: Duration) -> Duration {
        self.detect + self.decide + self.build + self.refill + now.saturating_sub(self.since)
    }

    fn add(&mut self, who: Vec<String>) {
        let new: Vec<String> = who.into_iter().filter(|name| !self.who.contains(name)).collect();
        self.who.extend(new);
    }
}

impl Core {
    /// A placement comes to nothing by a fault of these CompNodes, known after a silence. What comes before the job has done
    /// a step again belongs to the same recovery.
    pub(super) fn fault(&mut self, key: RunKey, kind: Fault, who: Vec<String>, silence: Duration, now: Duration) {
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        let Some(run) = job.run.as_ref().filter(|run| run.key == key) else { return };
        let begins = || Comeback::new(kind, Vec::new(), job.record.step, silence, now);
        let comeback = job.comeback.get_or_insert_with(begins);
        comeback.enter(Phase::Decide, now);
        comeback.add(who);
        comeback.members.clone_from(&run.members);
    }

    /// Names of the other members of a run that give no sign of life either.
    pub(super) fn silent_beside(&self, key: RunKey, gone: ConnectionId, now: Duration) -> Vec<String> {
        let run = self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).filter(|run| run.key == key);
        let members = run.map(|run| run.members.as_slice()).unwrap_or_default();
        let is_silent = |&&m: &&ConnectionId| m != gone && self.compnodes.phi(m, now) >= SUSPECT;
        members.iter().filter(is_silent).map(|&m| self.compnodes.name(m)).collect()
    }

    /// Somebody has gone who had nothing to do any more: perhaps one of those with whom a job was lost.
    pub(super) fn gone_too(&mut self, gone: ConnectionId, name: &str) -> Vec<Action> {
        let was_member = |job: &Job| {
            job.comeback.as_ref().is_some_and(|c| c.members.contains(&gone) && !c.who.iter().any(|known| known == name))
        };
        let Some((&id, job)) = self.jobs.iter_mut().find(|(_, job)| was_member(job)) else { return Vec::new() };
        if let Some(comeback) = &mut job.comeback {
            comeback.add(vec![name.to_owned()]);
        }
        self.notices(id, vec![format!("CompNode `{name}` vanished, too")])
    }

    /// Why a job does no step at present, if it should.
    pub(super) fn standstill(&self, job: &Job) -> Option<Standstill> {
        let now = self.ticked.unwrap_or_default();
        let shown = |is_recovering, since: Duration, reason| {
            Some(Standstill { for_s: since.as_secs_f64(), is_recovering, reason })
        };
        if let Some(comeback) = &job.comeback {
            let doing = match &job.shown {
                JobState::Waiting { reason } => reason.as_str(),
                JobState::Preparing => "the CompNodes prepare their parts",
                JobState::Running => "its first step is under way",
                JobState::Done | JobState::Failed { .. } | JobState::Stopped => return None,
            };
            let cause = cause(comeback.kind, &comeback.who, comeback.step);
            let reason = if doing.starts_with(&cause) { doing.to_owned() } else { format!("{cause}; {doing}") };
            return shown(true, comeback.so_far(now), reason);
        }
        let run = job.run.as_ref().filter(|_| job.shown == JobState::Running)?;
        let is_silent = |&&m: &&ConnectionId| self.compnodes.is_away(m) || self.compnodes.phi(m, now) >= SUSPECT;
        let silent = run.members.iter().filter(is_silent);
        let names: Vec<String> = silent.map(|&m| format!("`{}`", self.compnodes.name(m))).collect();
        if names.is_empty() {
            return None;
        }
        let reason = format!("no sign of life of CompNode {}", names.join(", "));
        shown(false, now.saturating_sub(run.watchdog.moved), reason)
    }
}
