//! What failures leave of a job's time: `plan --mtbf`.

use std::time::Duration;

use fusionllm_planner::{FailureCost, GoesOnFrom, Plan, format_seconds};
use serde_json::{Value, json};

use super::Job;

/// What a failure of the job costs, and which share of its time is useful.
pub(super) struct Survival {
    mtbf: Duration,
    cost: FailureCost,
    kept: GoesOnFrom,
}

impl Survival {
    /// Of a job that is hit after `mtbf` of work on the average.
    pub(super) fn of(job: &Job, plan: &Plan, mtbf: Duration) -> Self {
        let (steps, every) = (job.spec.train.steps, job.spec.checkpoint.every);
        let kept = match job.spec.survive.every {
            // Without checkpoints it begins anew.
            Some(0) => GoesOnFrom::Checkpoints(if every == 0 { steps } else { every.min(steps) }),
            every => GoesOnFrom::Snapshots(every.map(|every| every.min(steps))),
        };
        let cost = FailureCost::of(plan, &job.dag, kept, mtbf.as_secs_f64(), |all, trained| {
            job.spec.train.state_bytes(all, trained)
        });
        Self { mtbf, cost, kept }
    }

    fn useful_share(&self) -> f64 {
        self.cost.useful_share(self.mtbf.as_secs_f64())
    }

    /// Each part, and where it comes from.
    fn parts(&self) -> [(&'static str, f64, String); 6] {
        let FailureCost { detect_s, decide_s, move_s, build_s, refill_s, again_s } = self.cost;
        let (what, every, moves) = match self.kept {
            GoesOnFrom::Snapshots(every) => {
                ("set of snapshots", every, "for the largest part, from its guardian over the links")
            }
            GoesOnFrom::Checkpoints(every) => {
                ("checkpoint", Some(every), "for the weights, from the first CompNode's site over the links")
            }
        };
        let again = match every {
            None => format!("done again: half of the time from one {what} to the next, which is worked out"),
            Some(1) => format!("done again: half a step, with a {what} after each"),
            Some(every) => format!("done again: half of the {every} steps from one {what} to the next"),
        };
        [
            ("detect_s", detect_s, "until it is known, assumed".to_owned()),
            ("decide_s", decide_s, "until the job is placed again, assumed".to_owned()),
            ("move_s", move_s, moves.to_owned()),
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
            "goes_on_from": match self.kept {
                GoesOnFrom::Snapshots(every) => json!({ "snapshots": every.map_or(json!("auto"), Value::from) }),
                GoesOnFrom::Checkpoints(every) => json!({ "checkpoints": every }),
            },
            "parts": serde_json::Map::from_iter(parts),
        })
    }
}
