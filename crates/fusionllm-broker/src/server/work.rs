//! What takes long and what the actor has done elsewhere, so that it holds up nobody.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use fusionllm_planner::Placement;
use fusionllm_protocol::JobId;
use tokio::sync::mpsc::WeakSender;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use super::command::Command;
use super::start::start_again;
use crate::core::{CoreEvent, Loading, PlanInput};
use crate::reach::Reach;

/// Works a placement out.
pub(super) fn plan(commands: WeakSender<Command>, job: JobId, input: PlanInput) {
    work(commands, job, "planning", move || {
        let (number, result) = (input.number, Box::new(input.plan()));
        CoreEvent::Planned { job, number, result }
    });
}

/// Holds the placement of a job at work against the best one. A job does not depend on it: where it fails there is none.
pub(super) fn weigh(commands: WeakSender<Command>, job: JobId, input: PlanInput, placement: Placement) {
    work(commands, job, "weighing a placement", move || {
        let weigh = AssertUnwindSafe(|| input.weigh(&placement));
        CoreEvent::Weighed { job, number: input.number, result: catch_unwind(weigh).unwrap_or_default() }
    });
}

/// Reads what a job starts from once the files are `written`. It must still be what the broker touches for others.
pub(super) fn load(commands: WeakSender<Command>, loading: Loading, reach: Arc<Reach>, written: oneshot::Receiver<()>) {
    let Loading { number, record, checks_reach } = loading;
    let job = record.job;
    work(commands, job, "reading what the job starts from", move || {
        // An error means that the file thread is gone, and the broker ends.
        let _ = written.blocking_recv();
        // What it may read was checked when it was handed in, and by whom is not known any more.
        let allowed = if checks_reach { reach.check(&record.spec, true) } else { Ok(()) };
        let result = allowed.and_then(|()| start_again(record));
        CoreEvent::Loaded { job, number, result: Box::new(result) }
    });
}

/// Does the work and tells the actor what came of it; a panic is told, too, or the job would wait for ever.
fn work(
    commands: WeakSender<Command>,
    job: JobId,
    what: &'static str,
    work: impl FnOnce() -> CoreEvent + Send + 'static,
) {
    spawn_blocking(move || {
        let event = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            let reason = format!("{what} ended unexpectedly (internal error; the log has more)");
            CoreEvent::WorkFailed { job, reason }
        });
        if let Some(commands) = commands.upgrade() {
            // If the actor is gone it needs no word.
            let _ = commands.blocking_send(Command::Event(event));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn work_that_panics_is_told() {
        let (commands, mut inbox) = tokio::sync::mpsc::channel(1);
        work(commands.downgrade(), JobId(1), "planning", || panic!("a defect"));
        let Some(Command::Event(CoreEvent::WorkFailed { job, reason })) = inbox.recv().await else { panic!() };
        assert_eq!(job, JobId(1));
        assert!(reason.starts_with("planning ended unexpectedly"), "{reason}");
    }
}
