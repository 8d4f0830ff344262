//! What is on disk, and what must not be told before it is.
//!
//! Every change of a job that somebody will hear of is written first: what is said of the job after it, to CompNodes and
//! to whoever follows, is held until the store has it. After a failed write the store is written anew as a whole, again and
//! again until that succeeds; until then nothing is taken in.

use std::time::Duration;

use fusionllm_protocol::{FromBroker, JobEvent, JobId, RunKey};

use super::{Action, ConnectionId, Core, Job};
use crate::BrokerError;
use crate::store::JobRecord;

/// First and largest pause between attempts to write the store anew.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Steps of a job that are kept for those who follow it, while the store cannot be written.
const MOST_HELD_STEPS: usize = 1000;

/// Numbers of what was to be written.
#[derive(Debug, Default)]
pub(super) struct Durability {
    asked: u64,
    done: u64,
    trouble: Option<Trouble>,
}

/// The store cannot be written.
#[derive(Debug)]
struct Trouble {
    reason: String,
    pause: Duration,
    /// When to try again; nothing while a try is under way.
    retry_at: Option<Duration>,
}

impl Durability {
    fn next(&mut self) -> u64 {
        self.asked += 1;
        self.asked
    }
}

/// The job that an action tells somebody about.
fn told_of(action: &Action) -> Option<JobId> {
    match action {
        Action::Emit(event) => Some(event.job()),
        Action::Send { message: FromBroker::Release { job, .. } | FromBroker::Lend { job, .. }, .. } => Some(*job),
        action => told_to(action).map(|(_, key)| key.job),
    }
}

impl Core {
    /// Number of the last thing that was to be written.
    pub(crate) fn last_write(&self) -> u64 {
        self.durable.asked
    }

    /// Whether all up to this number is on disk.
    pub(crate) fn is_written(&self, number: u64) -> bool {
        self.durable.done >= number
    }

    /// Whether all that was asked to be written is on disk.
    pub(super) fn is_all_written(&self) -> bool {
        self.durable.done >= self.durable.asked
    }

    /// Why the store cannot be written.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.durable.trouble.as_ref().map(|t| t.reason.as_str())
    }

    /// Nothing is taken in that might be forgotten.
    pub(super) fn check_durable(&self) -> Result<(), BrokerError> {
        self.trouble().map_or(Ok(()), |reason| Err(BrokerError::NotDurable { reason: reason.to_owned() }))
    }

    /// Writes a job. What is told of it after this waits for that.
    pub(super) fn persist(&mut self, record: JobRecord) -> Action {
        Action::Persist { number: self.durable.next(), record: Box::new(record), barrier: true }
    }

    /// Writes a job while others are told of it: should this be lost, nothing is missing but how far it was.
    pub(super) fn persist_meanwhile(&mut self, record: JobRecord) -> Action {
        Action::Persist { number: self.durable.next(), record: Box::new(record), barrier: false }
    }

    /// Keeps back what may not be told yet.
    pub(super) fn hold(&mut self, actions: Vec<Action>) -> Vec<Action> {
        let mut free = Vec::new();
        for action in actions {
            if let Action::Persist { number, record, barrier } = &action {
                if let Some(job) = self.jobs.get_mut(&record.job).filter(|_| *barrier) {
                    job.barrier = *number;
                }
                // While the store is in trouble the next writing of all of it has this, too.
                if self.durable.trouble.is_none() {
                    free.push(action);
                }
                continue;
            }
            self.withdraw(&action);
            let done = self.durable.done;
            match told_of(&action).and_then(|job| self.jobs.get_mut(&job)) {
                Some(job) if job.barrier > done => job.keep_back(action),
                Some(job) => {
                    show(job, &action);
                    free.push(action);
                }
                None => free.push(action),
            }
        }
        free
    }

    /// Who is told to let a placement go is told at once, and nothing of it after that.
    fn withdraw(&mut self, action: &Action) {
        let Action::Send { to, message: FromBroker::Abort { key, .. } } = action else { return };
        if let Some(known) = self.jobs.get_mut(&key.job) {
            known.held.retain(|(_, held)| told_to(held) != Some((*to, *key)));
        }
    }

    /// All up to `number` is on disk: what may be told now, which must not be held again.
    pub(super) fn persisted(&mut self, number: u64) -> Vec<Action> {
        self.durable.done = self.durable.done.max(number);
        let mut released: Vec<(u64, Action)> = Vec::new();
        for job in self.jobs.values_mut() {
            job.is_durable |= job.first_number <= number;
            let held = std::mem::take(&mut job.held);
            let (free, held): (Vec<_>, Vec<_>) = held.into_iter().partition(|(n, _)| *n <= number);
            job.held = held;
            for (_, action) in &free {
                show(job, action);
            }
            released.extend(free);
        }
        // Over all jobs in the order in which it was to be told.
        released.sort_by_key(|(n, _)| *n);
        released.into_iter().map(|(_, action)| action).collect()
    }

    /// The store was written: is it whole again?
    pub(super) fn recovered(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(trouble) = &mut self.durable.trouble {
            if self.durable.done == self.durable.asked {
                self.durable.trouble = None;
                actions.extend(self.schedule(now));
            } else {
                trouble.retry_at = Some(now);
                actions.extend(self.rewrite(now));
            }
        }
        actions
    }

    /// The store cannot be written.
    pub(super) fn unpersisted(&mut self, reason: String, now: Duration) -> Vec<Action> {
        let pause = self.durable.trouble.as_ref().map_or(RETRY.0, |t| (t.pause * 2).min(RETRY.1));
        self.durable.trouble = Some(Trouble { reason, pause, retry_at: Some(now + pause) });
        // Whoever submitted these is told that they were not taken in.
        let forgotten: Vec<JobId> = self.jobs.iter().filter(|(_, job)| !job.is_durable).map(|(&id, _)| id).collect();
        for id in forgotten {
            self.plan_no_more(id);
            if let Some(run) = self.jobs.remove(&id).and_then(|job| job.run) {
                for &member in &run.members {
                    self.compnodes.release(member);
                }
            }
        }
        Vec::new()
    }

    /// Another try to write the store, once it is time.
    pub(super) fn rewrite(&mut self, now: Duration) -> Vec<Action> {
        let Some(trouble) = &mut self.durable.trouble else { return Vec::new() };
        if trouble.retry_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        trouble.retry_at = None;
        let records = self.jobs.values().map(|job| job.record.clone()).collect();
        vec![Action::Rewrite { number: self.durable.asked, records }]
    }
}

/// The CompNode that an action tells of a placement, and which one. To let one go is told at once, so it is none of these.
fn told_to(action: &Action) -> Option<(ConnectionId, RunKey)> {
    match action {
        Action::Send { to, message } => {
            let key = match message {
                FromBroker::Assign(assignment) => assignment.key,
                FromBroker::Start { key }
                | FromBroker::TakenBack { key, .. }
                | FromBroker::SetCodec { key, .. }
                | FromBroker::PeerMoved { key, .. }
                | FromBroker::Snapshot { key, .. } => *key,
                FromBroker::Guard { snapshot } => snapshot.id.key,
                _ => return None,
            };
            Some((*to, key))
        }
        Action::SendWeights { to, key, .. } => Some((*to, *key)),
        _ => None,
    }
}

impl Job {
    /// Keeps an action until all that was to be written before it is.
    fn keep_back(&mut self, action: Action) {
        // Those who follow miss steps then; the metrics have them all.
        let is_step = |action: &Action| matches!(action, Action::Emit(JobEvent::Step { .. }));
        if is_step(&action) && self.held.iter().filter(|(_, held)| is_step(held)).count() >= MOST_HELD_STEPS {
            return;
        }
        self.held.push((self.barrier, action));
    }
}

/// What has been told is what a status shows.
fn show(job: &mut Job, action: &Action) {
    if let Action::Emit(JobEvent::State { state, .. }) = action {
        job.shown = state.clone();
    }
}
