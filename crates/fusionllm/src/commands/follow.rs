//! Waiting: for signals, and for jobs to end.

use fusionllm_protocol::JobState;

use crate::exit::bad_input;

/// Resolves on Ctrl-C or a request to terminate.
pub(super) async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    // Without signals nobody can ask us to end.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
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
