//! Checkpoints on their way: which shards are due, and what becomes of them.

use std::path::Path;
use std::time::Duration;

use fusionllm_protocol::{BlobHeader, BlobKind, JobEvent, RunKey};

use super::run::Failed;
use super::{Action, ConnectionId, Core};

impl Core {
    /// Whether a shard that a CompNode offers is due; why it cannot be one if it is too large for its part.
    pub(crate) fn wants_shard(&self, connection: ConnectionId, header: &BlobHeader) -> Result<bool, String> {
        let BlobKind::Shard { step, node } = header.kind else { return Ok(false) };
        let key = header.key;
        let run = self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).filter(|run| run.key == key);
        run.map_or(Ok(false), |run| run.wants_shard(connection, node, step, header.bytes))
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
            actions.push(self.persist(record, true));
        }
        let path = path.display().to_string();
        actions.push(Action::Emit(JobEvent::Checkpoint { job: key.job, step, path }));
        actions.extend(self.advance(key, now));
        actions
    }

    /// Training goes on without a checkpoint, but for the last one.
    pub(super) fn checkpoint_failed(&mut self, key: RunKey, step: u64, reason: &str, now: Duration) -> Vec<Action> {
        let Some(run) = self.run_mut(key) else { return Vec::new() };
        match run.checkpoint_failed(step) {
            Failed::Last => return self.fail(key, format!("checkpoint of step {step}: {reason}"), false, now),
            Failed::Known => return Vec::new(),
            Failed::New => {}
        }
        let mut actions = vec![Action::DropCheckpoint { key, step }];
        actions.extend(self.notices(key.job, vec![format!("there is no checkpoint of step {step}: {reason}")]));
        actions.extend(self.advance(key, now));
        actions
    }
}
