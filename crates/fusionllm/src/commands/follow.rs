//! Waiting: for signals, and for jobs to end.

use fusionllm_protocol::JobState;
#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::client::addressed;
use crate::exit::bad_input;

/// Resolves on Ctrl-C, a request to terminate, or the end of the terminal.
pub(super) async fn interrupted() {
    Interrupts::new().next().await;
}

/// Ctrl-C, requests to terminate and, unless `nohup` or the like has it ignored, the end of the terminal. One that comes
/// while nobody waits is not missed.
#[derive(Debug)]
pub(super) struct Interrupts {
    #[cfg(unix)]
    signals: Option<(Signal, Signal)>,
    #[cfg(unix)]
    hangup: Option<Signal>,
}

impl Interrupts {
    /// Listens for signals from now on.
    pub(super) fn new() -> Self {
        Self {
            #[cfg(unix)]
            signals: signal(SignalKind::interrupt()).ok().zip(signal(SignalKind::terminate()).ok()),
            #[cfg(unix)]
            hangup: Some(SignalKind::hangup()).filter(|_| !hangup_is_ignored()).and_then(|kind| signal(kind).ok()),
        }
    }

    /// The next one.
    pub(super) async fn next(&mut self) {
        #[cfg(unix)]
        if let Some((interrupt, terminate)) = &mut self.signals {
            let hung_up = async {
                match &mut self.hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hung_up => {}
            }
            return;
        }
        // Without signals nobody can ask us to end.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Whether the process was started to outlive its terminal. Where that cannot be found out it is left as it is.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    static IGNORED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // Only before the first handler is in its place does the kernel still say so.
    *IGNORED.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        // The hangup is signal 1, the lowest bit.
        mask.is_none_or(|mask| mask & 1 == 1)
    })
}

/// The final state of a job of a broker that was reached by what was `typed`, as the result of the command that followed it.
pub(super) fn outcome_at(state: &JobState, typed: &str) -> anyhow::Result<()> {
    match state {
        JobState::Failed { reason, bad_input } => {
            outcome(&JobState::Failed { reason: addressed(reason, typed), bad_input: *bad_input })
        }
        other => outcome(other),
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
