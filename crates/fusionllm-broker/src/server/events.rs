//! The events of one job, for whoever follows it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fusionllm_protocol::{JobEvent, JobId, JobState};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

/// A job that was taken in.
#[derive(Debug)]
pub struct Submitted {
    /// Number of the job.
    pub job: JobId,
    /// Its run directory; made when the job is placed.
    pub run_dir: PathBuf,
    /// All its events from now on.
    pub events: JobEvents,
}

/// Events of one job, to its end.
#[derive(Debug)]
pub struct JobEvents {
    job: JobId,
    receiver: broadcast::Receiver<JobEvent>,
    states: watch::Receiver<BTreeMap<JobId, JobState>>,
    ended: bool,
}

impl JobEvents {
    pub(super) fn new(
        job: JobId,
        receiver: broadcast::Receiver<JobEvent>,
        states: watch::Receiver<BTreeMap<JobId, JobState>>,
    ) -> Self {
        Self { job, receiver, states, ended: false }
    }

    /// The next event; nothing after the one that ends the job, or when the broker ends. A slow follower misses
    /// steps, but never the end. May be dropped before it is done without losing an event.
    pub async fn next(&mut self) -> Option<JobEvent> {
        if self.ended {
            return None;
        }
        let event = self.receive().await?;
        self.ended = matches!(&event, JobEvent::State { state, .. } if state.is_final());
        Some(event)
    }

    async fn receive(&mut self) -> Option<JobEvent> {
        loop {
            match self.receiver.recv().await {
                Ok(event) if event.job() == self.job => return Some(event),
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => {
                    let state = self.states.borrow().get(&self.job).cloned()?;
                    if state.is_final() {
                        return Some(JobEvent::State { job: self.job, state });
                    }
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}
