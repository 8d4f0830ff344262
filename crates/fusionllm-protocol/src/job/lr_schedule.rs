//! The learning rate of each update.

use serde::{Deserialize, Serialize};

use crate::TrainView;

/// Learning rate after warm-up, by the names that `transformers` has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// Half a cosine from `lr` down to `lr * min_lr_ratio` at the last step.
    #[default]
    Cosine,
    /// A straight line from `lr` down to `lr * min_lr_ratio` at the last step.
    Linear,
    /// `lr` times the square root of warm-up steps over steps; without a warm-up, as after one of 10,000 steps.
    #[serde(rename = "inverse_sqrt")]
    InverseSqrt,
    /// `lr` after the warm-up, to the end.
    Constant,
}

/// What stands for the warm-up in an inverse square root without one, as in `transformers`.
const TIMESCALE: u64 = 10_000;

impl LrSchedule {
    /// Every schedule with its name in job files.
    pub const ALL: [(&'static str, Self); 4] = [
        ("cosine", Self::Cosine),
        ("linear", Self::Linear),
        ("inverse_sqrt", Self::InverseSqrt),
        ("constant", Self::Constant),
    ];
}

/// The learning rate of each update of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    lr: f64,
    min_lr_ratio: f64,
    warmup: u64,
    steps: u64,
    schedule: LrSchedule,
}

impl LearningRates {
    /// Those that the job file asks for.
    pub fn of(train: &TrainView) -> Self {
        let &TrainView { lr, min_lr_ratio, warmup, steps, schedule, .. } = train;
        Self { lr, min_lr_ratio, warmup, steps, schedule }
    }

    /// Learning rate of the update after `step` updates: linear warm-up to `lr` over `warmup` updates, then the
    /// schedule.
    pub fn at(&self, step: u64) -> f64 {
        let Self { lr, min_lr_ratio, warmup, steps, schedule } = *self;
        if step < warmup {
            return lr * (step + 1) as f64 / warmup as f64;
        }
        let least = lr * min_lr_ratio;
        let span = steps.saturating_sub(warmup).max(1);
        let progress = ((step - warmup) as f64 / span as f64).min(1.0);
        match schedule {
            LrSchedule::Constant => lr,
            LrSchedule::Cosine => least + 0.5 * (lr - least) * (1.0 + (std::f64::consts::PI * progress).cos()),
            LrSchedule::Linear => lr + (least - lr) * progress,
            LrSchedule::InverseSqrt => {
                let timescale = if warmup > 0 { warmup } else { TIMESCALE };
                lr * (timescale as f64 / (step - warmup + timescale) as f64).sqrt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JobSpec;

    fn rates(schedule: &str, steps: &[u64]) -> Vec<f64> {
        let sets = ["train.steps=100", "train.warmup=10", "train.lr=1.0", "train.min_lr_ratio=0.2"].map(str::to_owned);
        let sets = [sets.as_slice(), &[format!("train.schedule={schedule}")]].concat();
        let job = "[model]\nname=\"gpt2\"\n[data]\npath=\"x\"";
        let spec = JobSpec::from_toml(job, &sets).unwrap();
        let rates = LearningRates::of(&spec.train.view());
        steps.iter().map(|&step| (rates.at(step) * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn stored_jobs_and_job_files_name_a_schedule_alike() {
        for (name, schedule) in LrSchedule::ALL {
            assert_eq!(serde_json::to_value(schedule).unwrap(), name);
        }
    }

    #[test]
    fn every_schedule_warms_up_and_goes_its_way() {
        let steps = [0, 4, 9, 10, 55, 100, 200];
        assert_eq!(rates("constant", &steps), [0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates("linear", &steps), [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]);
        assert_eq!(rates("cosine", &steps), [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]);
        assert_eq!(rates("inverse_sqrt", &steps), [0.1, 0.5, 1.0, 1.0, 0.426401, 0.316228, 0.223607]);
    }
}
