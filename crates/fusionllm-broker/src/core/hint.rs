//! What a user is told of how a job goes on that has ended early.

use std::path::PathBuf;

use fusionllm_protocol::JobId;
use fusionllm_transport::shell_path;

use super::{Core, ResumedBy};
use crate::run_dir::Parent;

impl Core {
    /// How a job goes on, for whoever reads why it ended, from its newest checkpoint; others may have renamed or removed one
    /// that is `gone`. Where a broker is reached is for whoever asks it to know: on another machine, or under another name,
    /// the way there is not the broker's own.
    pub(super) fn resume_hint(
        &self,
        job: JobId,
        checkpoint: Option<u64>,
        gone: Option<(u64, Option<PathBuf>)>,
    ) -> String {
        let dir = || self.jobs.get(&job).map(|j| shell_path(&j.record.run_dir)).unwrap_or_default();
        if let (None, Some((step, went))) = (checkpoint, gone) {
            let then = match (&self.resumed_by, &went) {
                (ResumedBy::Broker, _) => format!("`fusionllm resume {}` goes on once it is back in {}", job.0, dir()),
                (ResumedBy::Train, Some(went)) => {
                    format!("`fusionllm train --resume {}` goes on from it", shell_path(went))
                }
                (ResumedBy::Train, None) => {
                    "`fusionllm train --resume` with the folder where it is now goes on from it".to_owned()
                }
            };
            let where_now = went.map(|went| format!(", it is {} now", went.display())).unwrap_or_default();
            return format!(
                "the checkpoint of step {step} is not where it was{where_now}, others have renamed or removed it: {then}"
            );
        }
        match (&self.resumed_by, checkpoint) {
            (ResumedBy::Broker, checkpoint) => {
                // Until the job does a step after the one that was asked for, a newer checkpoint may be there.
                let chosen = self.jobs.get(&job).and_then(|j| j.record.from_step);
                let option = chosen.map(|step| format!(" --step {step}")).unwrap_or_default();
                let then = match chosen.or(checkpoint) {
                    Some(0) => "begins anew".to_owned(),
                    Some(step) => format!("goes on from the checkpoint of step {step}"),
                    None => "begins anew, there is no checkpoint yet".to_owned(),
                };
                format!("`fusionllm resume {}{option}` {then}", job.0)
            }
            (ResumedBy::Train, Some(step)) => {
                format!("`fusionllm train --resume {}` goes on from the checkpoint of step {step}", dir())
            }
            (ResumedBy::Train, None) => {
                let start = self.jobs.get(&job).and_then(|j| j.start.as_ref());
                match start.and_then(|start| start.run.from.as_ref()) {
                    Some(Parent { path, step, .. }) => format!(
                        "there is no checkpoint yet; `fusionllm train --resume {} --out DIR` begins again with the one of \
                         step {step}",
                        shell_path(path)
                    ),
                    None => "there is no checkpoint yet to go on from".to_owned(),
                }
            }
        }
    }
}
