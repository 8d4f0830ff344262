//! How all stands.

use fusionllm_protocol::{JobState, JobSummary, StatusReport};

use super::Core;

impl Core {
    /// Jobs and CompNodes.
    pub(crate) fn status(&self) -> StatusReport {
        StatusReport {
            jobs: self
                .jobs
                .values()
                .map(|job| JobSummary {
                    state: job.shown.clone(),
                    standstill: self.standstill(job),
                    reading: job.run.as_ref().filter(|_| job.shown == JobState::Preparing).and_then(|run| run.reading),
                    ..job.record.summary()
                })
                .collect(),
            compnodes: self.compnodes.summaries(),
            relayed: self.survey.relayed().map(|(a, b)| (self.compnodes.name(a), self.compnodes.name(b))).collect(),
            trouble: self
                .trouble()
                .map(|reason| format!("the broker takes no jobs, it cannot write its state: {reason}")),
            lost_leaving: self.lost_leaving.values().cloned().collect(),
        }
    }
}
