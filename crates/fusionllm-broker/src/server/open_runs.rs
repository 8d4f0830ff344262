//! Which runs are open, and where their checkpoints go.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_protocol::{JobId, RunKey};
use tokio::sync::watch;

use crate::checkpoint::ShardPlace;

/// What the file thread has opened. Shards are written only where it says: it opens a run before their placement's first
/// shard, however long its queue is.
#[derive(Clone, Debug)]
pub(super) struct OpenRuns(Arc<watch::Sender<BTreeMap<JobId, Opening>>>);

#[derive(Clone, Debug)]
struct Opening {
    key: RunKey,
    /// Nothing if the run could not be opened or has ended.
    place: Option<ShardPlace>,
}

impl OpenRuns {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::default()))
    }

    /// The run of a placement is open, or will never be.
    pub(super) fn set(&self, key: RunKey, place: Option<ShardPlace>) {
        self.0.send_modify(|runs| drop(runs.insert(key.job, Opening { key, place })));
    }

    /// The job has no open run any more.
    pub(super) fn close(&self, job: JobId) {
        self.0.send_modify(|runs| {
            if let Some(opening) = runs.get_mut(&job) {
                opening.place = None;
            }
        });
    }

    /// Where the checkpoints of a placement go, once its run is open. Nothing if that is over.
    pub(super) async fn place(&self, key: RunKey) -> Option<ShardPlace> {
        let mut runs = self.0.subscribe();
        let is_settled = |runs: &BTreeMap<JobId, Opening>| runs.get(&key.job).is_some_and(|o| o.key >= key);
        // The sender lives as long as we do.
        let runs = runs.wait_for(is_settled).await.ok()?;
        runs.get(&key.job).filter(|opening| opening.key == key)?.place.clone()
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, RunId};

    use super::*;

    fn key(generation: u32) -> RunKey {
        RunKey { job: JobId(1), generation: Generation(generation) }
    }

    #[tokio::test]
    async fn a_shard_waits_until_its_run_is_open() {
        let runs = OpenRuns::new();
        let folder = tempfile::tempdir().unwrap();
        let place = ShardPlace::new(RunId::from_bytes([1; 16]), folder.path().to_owned()).unwrap();
        let waiting = tokio::spawn({
            let runs = runs.clone();
            async move { runs.place(key(1)).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        runs.set(key(1), Some(place.clone()));
        assert_eq!(waiting.await.unwrap().map(|place| place.folder), Some(place.folder.clone()));
        runs.set(key(2), None);
        assert!(runs.place(key(1)).await.is_none(), "an earlier placement's");
        assert!(runs.place(key(2)).await.is_none(), "it could not be opened");
        runs.set(key(3), Some(place));
        runs.close(JobId(1));
        assert!(runs.place(key(3)).await.is_none(), "it has ended");
    }
}
