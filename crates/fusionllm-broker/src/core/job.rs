//! What the core knows of one job.

use std::time::Duration;

use fusionllm_protocol::JobState;

use super::around::Around;
use super::awaited::TakeBack;
use super::comeback::Comeback;
use super::drift::Drift;
use super::growth::Growth;
use super::notices::Told;
use super::recovery::Recoveries;
use super::run::Run;
use super::snapshot_book::Snapshots;
use super::{Action, ConnectionId, StartPoint};
use crate::store::JobRecord;

/// A job that is known.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) record: JobRecord,
    /// Not known after a restart; a resume brings it.
    pub(super) start: Option<StartPoint>,
    pub(super) run: Option<Run>,
    pub(super) persisted: Duration,
    /// The state that was last told.
    pub(super) shown: JobState,
    /// Whether the store has it.
    pub(super) is_durable: bool,
    /// Number of its first writing.
    pub(super) first_number: u64,
    /// Since when it cannot be placed.
    pub(super) waits_since: Option<Duration>,
    /// The placement that is being worked out: its number, and who is kept for it.
    pub(super) planning: Option<(u64, Vec<ConnectionId>)>,
    /// Sets of CompNodes that are tried since the plan for all uses a cut link.
    pub(super) around: Option<Around>,
    /// What is told of it waits for this writing.
    pub(super) barrier: u64,
    /// What is to be told of it, and the writing that it waits for.
    pub(super) held: Vec<(u64, Action)>,
    /// What its user was told, and how often.
    pub(super) told: Told,
    /// What it has been through.
    pub(super) recoveries: Recoveries,
    /// What CompNodes keep of it.
    pub(super) snapshots: Snapshots,
    pub(super) growth: Growth,
    /// Whether its CompNodes are as fast as planned.
    pub(super) drift: Drift,
    /// The recovery under way.
    pub(super) comeback: Option<Comeback>,
    /// The placement from before the broker's restart, while it may still be taken back.
    pub(super) takeback: Option<TakeBack>,
    /// Number of the start that is being read.
    pub(super) loading: Option<u64>,
    /// Why that cannot be read now, since another process is at work there, and when it is tried again.
    pub(super) in_use: Option<(String, Duration)>,
}

impl Job {
    /// One that was handed in, or that the store has.
    pub(super) fn new(record: JobRecord, start: Option<StartPoint>, now: Duration) -> Self {
        let shown = record.state.clone();
        let snapshots = Snapshots::of_store(record.snapshots.clone());
        Self {
            record,
            start,
            run: None,
            persisted: now,
            shown,
            is_durable: false,
            first_number: 0,
            waits_since: None,
            planning: None,
            around: None,
            barrier: 0,
            held: Vec::new(),
            told: Told::default(),
            recoveries: Recoveries::default(),
            snapshots,
            growth: Growth::default(),
            drift: Drift::default(),
            comeback: None,
            takeback: None,
            loading: None,
            in_use: None,
        }
    }

    /// What it begins or goes on with was read.
    pub(super) fn begins_with(&mut self, start: StartPoint) {
        self.record.run = Some(start.run.run.clone());
        if start.model.is_some() {
            self.record.model.clone_from(&start.model);
        }
        self.start = Some(start);
    }

    /// It has a new placement, on these CompNodes of those over which it was planned. Whether it goes on by itself.
    pub(super) fn placed(&mut self, members: &[ConnectionId], all: &[ConnectionId]) -> bool {
        self.recoveries.placed();
        self.around = None;
        self.growth.left_out(all.iter().filter(|c| !members.contains(c)));
        self.growth.placed(members.len());
        self.drift.placed();
        self.recoveries.goes_on
    }

    /// Name of the CompNode that must read its data: the one that it names, or if it goes on, the one that did; another may
    /// have none, or other data.
    pub(super) fn owner(&self) -> Option<&String> {
        let before = self.record.owner.as_ref().filter(|_| self.recoveries.goes_on);
        self.record.spec.data.owner.as_ref().or(before)
    }
}
