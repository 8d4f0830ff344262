//! The thread that writes the store. It has nothing else to do, so that no record waits for a checkpoint or a report.

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::command::Command;
use super::watched::Watched;
use crate::StoreError;
use crate::core::{Action, CoreEvent};
use crate::store::Store;

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Records {
    queue: mpsc::UnboundedSender<Action>,
    thread: Watched,
}

/// Opens the store anew.
pub(super) type Reopen = Box<dyn Fn() -> Result<Store, StoreError> + Send>;

impl Records {
    /// Starts the thread. It reports to `commands` what is written and what cannot be.
    pub(super) fn start(store: Store, reopen: Reopen, commands: &mpsc::Sender<Command>) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "the core never waits for a disk, and the thread may wait for the core: a bound could lock both"
        )]
        let (queue, mut work) = mpsc::unbounded_channel();
        // A weak one: the actor ends when all who may ask it have gone.
        let commands = commands.downgrade();
        let thread = spawn_blocking(move || {
            let mut keeper = Keeper { store: Some(store), reopen, reason: String::new() };
            while let Some(action) = work.blocking_recv() {
                if let (Some(event), Some(commands)) = (keeper.perform(action), commands.upgrade()) {
                    // If the actor is gone it needs no word.
                    let _ = commands.blocking_send(Command::Event(event));
                }
            }
        });
        Self { queue, thread: Watched::new("the thread of the store", thread) }
    }

    /// Queues a writing.
    pub(super) fn perform(&self, action: Action) {
        // The thread lives as long as this queue.
        let _ = self.queue.send(action);
    }

    /// Resolves when the thread has ended, which it does by itself only by a panic.
    pub(super) async fn failed(&mut self) {
        self.thread.ended().await;
    }

    /// Waits until all is written.
    pub(super) async fn finish(mut self) {
        drop(self.queue);
        self.thread.ended().await;
    }
}

struct Keeper {
    /// Nothing after a failed write: an open database refuses everything from then on, and what is on disk is not
    /// known until it is opened again.
    store: Option<Store>,
    reopen: Reopen,
    /// Why the last write failed.
    reason: String,
}

impl Keeper {
    fn perform(&mut self, action: Action) -> Option<CoreEvent> {
        match action {
            Action::Persist { number, record, .. } => {
                let written = self.store.as_ref().map(|store| store.put(&record));
                Some(self.written(number, written))
            }
            Action::Rewrite { number, records } => {
                // Two at once could not have the file.
                self.store = None;
                let opened = (self.reopen)();
                let written = opened.and_then(|store| {
                    let written = store.put_all(&records);
                    self.store = Some(store);
                    written
                });
                Some(self.written(number, Some(written)))
            }
            _ => None,
        }
    }

    fn written(&mut self, number: u64, written: Option<Result<(), StoreError>>) -> CoreEvent {
        match written {
            Some(Ok(())) => CoreEvent::Persisted { number },
            Some(Err(error)) => {
                tracing::error!(%error, "the store cannot be written");
                self.store = None;
                self.reason = error.to_string();
                CoreEvent::Unpersisted { reason: self.reason.clone() }
            }
            None => CoreEvent::Unpersisted { reason: self.reason.clone() },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use fusionllm_protocol::{Generation, JobId, JobState};
    use redb::StorageBackend;
    use redb::backends::InMemoryBackend;

    use std::path::PathBuf;

    use super::*;
    use crate::store::JobRecord;
    use crate::testing;

    /// A disk that is full from time to time, and that outlives those who open it.
    #[derive(Clone, Debug, Default)]
    struct Disk {
        content: Arc<InMemoryBackend>,
        is_full: Arc<AtomicBool>,
    }

    impl Disk {
        fn room(&self) -> Result<(), std::io::Error> {
            if self.is_full.load(Ordering::SeqCst) {
                return Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
            }
            Ok(())
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> Result<u64, std::io::Error> {
            self.content.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
            self.content.read(offset, out)
        }

        fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
            self.room()?;
            self.content.set_len(len)
        }

        fn sync_data(&self) -> Result<(), std::io::Error> {
            self.room()?;
            self.content.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
            self.room()?;
            self.content.write(offset, data)
        }
    }

    fn record(job: u64, state: JobState) -> JobRecord {
        let (spec, run_dir) = (testing::spec(&[]), PathBuf::from("/r"));
        JobRecord { state, generation: Generation(1), ..JobRecord::new(JobId(job), spec, run_dir) }
    }

    #[test]
    fn no_record_is_lost_by_a_write_that_failed() {
        let disk = Disk::default();
        let path = PathBuf::from("broker.redb");
        let reopen = {
            let (disk, path) = (disk.clone(), path.clone());
            Box::new(move || Store::on(&path, disk.clone()))
        };
        let store = Some(reopen().unwrap());
        let mut keeper = Keeper { store, reopen, reason: String::new() };
        let persist = |number, record| Action::Persist { number, record: Box::new(record), barrier: true };
        let is_done = |event| matches!(event, Some(CoreEvent::Persisted { .. }));
        assert!(is_done(keeper.perform(persist(1, record(1, JobState::Running)))));

        disk.is_full.store(true, Ordering::SeqCst);
        assert!(!is_done(keeper.perform(persist(2, record(2, JobState::Running)))));
        let all = vec![record(1, JobState::Done), record(3, JobState::Running)];
        let rewrite = |number| Action::Rewrite { number, records: all.clone() };
        assert!(!is_done(keeper.perform(rewrite(3))), "it is still full");

        disk.is_full.store(false, Ordering::SeqCst);
        // An open database would refuse for ever; without the whole rewriting a record would be missing.
        assert!(!is_done(keeper.perform(persist(4, record(4, JobState::Running)))));
        assert!(is_done(keeper.perform(rewrite(5))));
        assert!(is_done(keeper.perform(persist(6, record(4, JobState::Running)))));
        drop(keeper);
        let jobs: Vec<u64> = Store::on(&path, disk).unwrap().jobs().unwrap().iter().map(|r| r.job.0).collect();
        assert_eq!(jobs, [1, 3, 4]);
    }
}
