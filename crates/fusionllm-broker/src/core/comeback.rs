//! How a job comes back from a fault, phase by phase.

use std::time::Duration;

use fusionllm_protocol::{Fault, Recovery};

use super::ConnectionId;

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
    pub(super) kind: Fault,
    pub(super) who: Vec<String>,
    /// Updates that were done when it happened.
    pub(super) step: u64,
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
    pub(super) members: Vec<ConnectionId>,
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

    /// Of a job on which so many CompNodes have trained on while the broker was away, which had written `step` steps: it did
    /// not stand still.
    pub(super) fn trained_on(step: u64, compnodes: usize, now: Duration) -> Self {
        let mut comeback = Self::new(Fault::BrokerRestart, Vec::new(), step, Duration::ZERO, now);
        comeback.placed(compnodes, now);
        comeback.enter(Phase::Refill, now);
        comeback
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
    pub(super) fn so_far(&self, now: Duration) -> Duration {
        self.detect + self.decide + self.build + self.refill + now.saturating_sub(self.since)
    }

    pub(super) fn add(&mut self, who: Vec<String>) {
        let new: Vec<String> = who.into_iter().filter(|name| !self.who.contains(name)).collect();
        self.who.extend(new);
    }
}
