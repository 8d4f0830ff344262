//! Checkpoints on their way: which shards are due, and what becomes of them.

use std::path::Path;
use std::time::Duration;

use fusionllm_protocol::{BlobHeader, BlobKind, FromBroker, JobEvent, RunKey};

use super::run::Failed;
use super::{Action, Breach, ConnectionId, Core, FailedBy};

impl Core {
    /// Whether a shard that a CompNode offers is due; why it cannot be one if it is too large for its part.
    pub(crate) fn wants_shard(&self, connection: ConnectionId, header: &BlobHeader) -> Result<bool, Breach> {
        let BlobKind::Shard { step, node } = header.kind else { return Ok(false) };
        let key = header.key;
        let run = self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).filter(|run| run.key == key);
        run.map_or(Ok(false), |run| run.wants_shard(connection, node, step, header.bytes))
    }

    /// Whether a CompNode is told now that it need not keep a shard which was stored, or is not wanted.
    pub(crate) fn settles(&self, key: RunKey, step: u64) -> bool {
        let run = self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).filter(|run| run.key == key);
        run.is_none_or(|run| run.settles(step))
    }

    /// A checkpoint is in its place: that is remembered before it is told.
    pub(super) fn checkpoint_finished(
        &mut self,
        key: RunKey,
        step: u64,
        path: &Path,
        checksum: String,
        now: Duration,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(run) = self.run_mut(key) {
            run.checkpoint_finished(step);
            run.watchdog.moved = now;
        } else if self
            .jobs
            .get(&key.job)
            .is_none_or(|job| job.loading.is_none() || job.record.generation != key.generation)
        {
            return actions;
        }
        // One of the placement before, from which the job goes on, counts, too.
        if let Some(known) = self.jobs.get_mut(&key.job) {
            known.record.checkpoint = Some((step, checksum));
            let record = known.record.clone();
            actions.push(self.persist(record));
        }
        if let Some(run) = self.run_mut(key).filter(|run| run.steps() == step) {
            let message = FromBroker::ShardSettled { key, step };
            actions.extend(run.members.iter().map(|&to| Action::Send { to, message: message.clone() }));
        }
        let path = path.display().to_string();
        actions.push(Action::Emit(JobEvent::Checkpoint { job: key.job, step, path }));
        actions.extend(self.advance(key, now));
        actions
    }

    /// Training goes on without a checkpoint, but for the last one, which is tried again for a while.
    pub(super) fn checkpoint_failed(
        &mut self,
        key: RunKey,
        step: u64,
        reason: &str,
        may_pass: bool,
        now: Duration,
    ) -> Vec<Action> {
        let Some(run) = self.run_mut(key) else { return Vec::new() };
        let mut actions = vec![Action::DropCheckpoint { key, step }];
        match run.checkpoint_failed(step, may_pass) {
            Failed::Last => {
                return self.fail(key, format!("checkpoint of step {step}: {reason}"), FailedBy::Machine, now);
            }
            Failed::Known => return Vec::new(),
            Failed::Again { is_first } => {
                if is_first {
                    let told = format!(
                        "the last checkpoint could not be written ({reason}): it is tried again, and the CompNodes keep what \
                         it is made of meanwhile"
                    );
                    actions.extend(self.notices(key.job, vec![told]));
                }
                return actions;
            }
            Failed::New => {}
        }
        actions.extend(self.notices(key.job, vec![format!("there is no checkpoint of step {step}: {reason}")]));
        actions.extend(self.advance(key, now));
        actions
    }

    /// What was left of a checkpoint that could not be kept is removed.
    pub(super) fn checkpoint_dropped(&mut self, key: RunKey, step: u64, now: Duration) -> Vec<Action> {
        let Some(run) = self.run_mut(key) else { return Vec::new() };
        run.checkpoint_dropped(step, now);
        self.ask_again(key, now)
    }

    /// Asks for the shards of the last checkpoint once more, if that is due.
    fn ask_again(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(run) = self.run_mut(key) else { return Vec::new() };
        let Some(step) = run.asks_again(now) else { return Vec::new() };
        let message = FromBroker::ShardAgain { key, step };
        run.members.iter().map(|&to| Action::Send { to, message: message.clone() }).collect()
    }

    /// The same for all runs.
    pub(super) fn ask_all_again(&mut self, now: Duration) -> Vec<Action> {
        let runs: Vec<RunKey> = self.jobs.values().filter_map(|job| Some(job.run.as_ref()?.key)).collect();
        runs.into_iter().flat_map(|key| self.ask_again(key, now)).collect()
    }
}
