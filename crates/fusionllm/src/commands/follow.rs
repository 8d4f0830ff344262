//! Waiting: for signals, and for jobs to end.

use fusionllm_protocol::JobState;
#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::bad_input;

/// Resolves on Ctrl-C or a request to terminate.
pub(super) async fn interrupted() {
    Interrupts::new().next().await;
}

/// Ctrl-C and requests to terminate. One that comes while nobody waits is not missed.
#[derive(Debug)]
pub(super) struct Interrupts {
    #[cfg(unix)]
    signals: Option<(Signal, Signal)>,
}

impl Interrupts {
    /// From now on.
    pub(super) fn new() -> Self {
        Self {
            #[cfg(unix)]
            signals: signal(SignalKind::interrupt()).ok().zip(signal(SignalKind::terminate()).ok()),
        }
    }

    /// The next one.
    pub(super) async fn next(&mut self) {
        #[cfg(unix)]
        if let Some((interrupt, terminate)) = &mut self.signals {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
        // Without signals nobody can ask us to end.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The final state of a job as the result of the command that ran it.
pub(super) fn outcome(state: &JobState) -> anyhow::Result<()> {
    match state {
        JobState::Failed { reason, bad_input: true } => Err(bad_input(reason)),
        JobState::Failed { reason, bad_input: false } => Err(anyhow::anyhow!("{reason}")),
        JobState::Stopped => Err(anyhow::anyhow!("the job was stopped")),
        JobState::Done | JobState::Waiting { .. } | JobState::Preparing | JobState::Running => Ok(()),
    }
}
