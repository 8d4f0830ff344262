//! What takes long and what the actor has done elsewhere, so that it holds up nobody.

use fusionllm_protocol::JobId;
use tokio::sync::mpsc::WeakSender;
use tokio::task::spawn_blocking;

use super::actor::Command;
use super::start_again;
use crate::core::{CoreEvent, PlanInput};
use crate::store::JobRecord;

/// Works a placement out.
pub(super) fn plan(commands: WeakSender<Command>, job: JobId, input: PlanInput) {
    spawn_blocking(move || {
        let (number, result) = (input.number, Box::new(input.plan()));
        tell(&commands, CoreEvent::Planned { job, number, result });
    });
}

/// Reads what a job starts from.
pub(super) fn load(commands: WeakSender<Command>, record: JobRecord) {
    spawn_blocking(move || {
        let (job, result) = (record.job, Box::new(start_again(record)));
        tell(&commands, CoreEvent::Loaded { job, result });
    });
}

fn tell(commands: &WeakSender<Command>, event: CoreEvent) {
    if let Some(commands) = commands.upgrade() {
        // If the actor is gone it needs no word.
        let _ = commands.blocking_send(Command::Event(event));
    }
}
