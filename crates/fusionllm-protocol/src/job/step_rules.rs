//! What every CompNode of a job does in which step, and by which numbers.

use std::ops::Range;

use super::{Cadence, LearningRates, TopKBackward};
use crate::JobView;

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
