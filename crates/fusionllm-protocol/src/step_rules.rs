//! What every CompNode of a job does in which step, and by which numbers.

use std::ops::Range;

use crate::{Cadence, JobView, LrSchedule, TopKBackward, TrainView};

/// What the steps of a job go by: the few of its keys that are read while it trains.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRules {
    /// The steps that are to be done, counted from 0.
    pub steps: Range<u64>,
    /// After which updates the loss of the text that is held out is taken.
    pub evaluations: Cadence,
    /// After which updates the shards of a checkpoint are handed in.
    pub checkpoints: Cadence,
    /// The learning rate of each update.
    pub rates: LearningRates,
    /// The largest norm of the gradient of all parameters; nothing: it stays as it is, and nobody asks for the norm.
    pub clip: Option<f64>,
    /// Whether what codecs drop of gradients over edges is added to later ones.
    pub error_feedback: bool,
    /// How gradients go back over what Top-K dropped.
    pub backward: TopKBackward,
    /// Whether messages of an evaluation are encoded as those of training: private data gets no finer a look for it.
    pub evaluates_as_trained: bool,
}

impl StepRules {
    /// Those of a job of which `done` updates are done.
    pub fn of(job: &JobView, done: u64) -> Self {
        Self {
            steps: done..job.train.steps,
            evaluations: job.evaluations(),
            checkpoints: job.checkpoints(),
            rates: LearningRates::of(&job.train),
            clip: (job.train.clip > 0.0).then_some(job.train.clip),
            error_feedback: job.compression.error_feedback,
            backward: job.compression.backward,
            evaluates_as_trained: job.is_private,
        }
    }
}

/// What stands for the warm-up in an inverse square root without one, as in `transformers`.
const TIMESCALE: u64 = 10_000;

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
    fn every_schedule_warms_up_and_goes_its_way() {
        let steps = [0, 4, 9, 10, 55, 100, 200];
        assert_eq!(rates("constant", &steps), [0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates("linear", &steps), [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]);
        assert_eq!(rates("cosine", &steps), [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]);
        assert_eq!(rates("inverse_sqrt", &steps), [0.1, 0.5, 1.0, 1.0, 0.426401, 0.316228, 0.223607]);
    }
}
