//! What failures leave of a job's time: `plan --mtbf`.

use std::time::Duration;

use fusionllm_planner::{FailureCost, Plan, format_seconds};
use serde_json::{Value, json};

use super::Job;

/// What a failure of the job costs, and which share of its time is useful.
pub(super) struct Survival {
    mtbf: Duration,
    cost: FailureCost,
    /// Steps from one checkpoint to the next.
    every: u64,
}

impl Survival {
    /// Of a job that is hit after `mtbf` of work on the average.
    pub(super) fn of(job: &Job, plan: &Plan, mtbf: Duration) -> Self {
        let (steps, every) = (job.spec.train.steps, job.spec.checkpoint.every);
        // Without checkpoints it begins anew.
        let every = if every == 0 { steps } else { every.min(steps) };
        let cost = FailureCost::of(plan, &job.dag, every, |bytes| job.spec.train.state_bytes(bytes));
        Self { mtbf, cost, every }
    }

    fn useful_share(&self) -> f64 {
        self.cost.useful_share(self.mtbf.as_secs_f64())
    }

    /// Each part, and where it comes from.
    fn parts(&self) -> [(&'static str, f64, String); 6] {
        let FailureCost { detect_s, decide_s, move_s, build_s, refill_s, again_s } = self.cost;
        let every = self.every;
        let again = match every {
            1 => "done again: half a step, with a checkpoint after each".to_owned(),
            every => format!("done again: half of the {every} steps from one checkpoint to the next"),
        };
        [
            ("detect_s", detect_s, "until it is known, assumed".to_owned()),
            ("decide_s", decide_s, "until the job is placed again, assumed".to_owned()),
            ("move_s", move_s, "for the weights, from the first CompNode's site over the links".to_owned()),
            ("build_s", build_s, "until all parts are built, assumed".to_owned()),
            ("refill_s", refill_s, "for the first step, predicted".to_owned()),
            ("again_s", again_s, again),
        ]
    }

    pub(super) fn text(&self) -> String {
        let (mtbf, share) = (humantime::format_duration(self.mtbf), self.useful_share() * 100.0);
        let total = format_seconds(self.cost.total_s());
        let mut text = format!(
            "useful share      {share:.1} % of the time, if the job is hit each {mtbf} and loses {total} by it:"
        );
        for (_, seconds, what) in self.parts() {
            text.push_str(&format!("\n{:>27}  {what}", format_seconds(seconds)));
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let parts = self.parts().map(|(name, seconds, what)| (name.to_owned(), json!({ "s": seconds, "what": what })));
        json!({
            "mtbf_s": self.mtbf.as_secs_f64(),
            "useful_share": self.useful_share(),
            "per_failure_s": self.cost.total_s(),
            "checkpoint_every": self.every,
            "parts": serde_json::Map::from_iter(parts),
        })
    }
}
