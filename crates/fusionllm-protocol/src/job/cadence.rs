//! When something happens that happens again and again while a job trains.

use std::fmt;

use super::{JobSpec, OptimizerKind, Precision, TrainSpec};
use crate::StateKind;

/// Every so many steps, and after the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cadence {
    /// Steps between two times; 0: only at the end.
    pub every: u64,
    /// The last step.
    pub last: u64,
}

impl Cadence {
    /// Whether it happens after `done` updates.
    pub fn is_due(self, done: u64) -> bool {
        done > 0 && (done == self.last || done.is_multiple_of(self.every))
    }
}

impl JobSpec {
    /// When CompNodes hand in the shards of a checkpoint.
    pub fn checkpoints(&self) -> Cadence {
        Cadence { every: self.checkpoint.every, last: self.train.steps }
    }

    /// When the loss of the text that is held out is taken.
    pub fn evaluations(&self) -> Cadence {
        Cadence { every: self.train.eval_every, last: self.train.steps }
    }
}

impl OptimizerKind {
    /// What it keeps of each parameter; `momentum` is SGD's.
    pub fn states(self, momentum: f64) -> &'static [StateKind] {
        match self {
            Self::Adamw => &[StateKind::ExpAvg, StateKind::ExpAvgSq],
            Self::Sgd if momentum > 0.0 => &[StateKind::Momentum],
            Self::Sgd => &[],
        }
    }

    /// Bytes of parameters of `param_bytes` bytes together with what it keeps of the `trained_bytes` of them that are
    /// trained; `momentum` is SGD's.
    pub(crate) fn state_bytes(self, momentum: f64, param_bytes: u64, trained_bytes: u64) -> u64 {
        param_bytes.saturating_add(trained_bytes.saturating_mul(self.states(momentum).len() as u64))
    }
}

impl TrainSpec {
    /// Whether the gradient is clipped by the norm over all parameters, which CompNodes then ask each other for.
    pub fn clips(&self) -> bool {
        self.clip > 0.0
    }

    /// What the optimizer keeps of each parameter.
    pub fn states(&self) -> &'static [StateKind] {
        self.optimizer.states(self.momentum)
    }

    /// Bytes of parameters of `param_bytes` bytes together with what the optimizer keeps of the `trained_bytes` of them
    /// that are trained: what a checkpoint has of them.
    pub fn state_bytes(&self, param_bytes: u64, trained_bytes: u64) -> u64 {
        self.optimizer.state_bytes(self.momentum, param_bytes, trained_bytes)
    }
}

/// All that measuring the ops of an OP-DAG depends on besides the OP-DAG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Measuring {
    /// Samples in a micro-batch.
    pub batch: u32,
    /// What the optimizer keeps of each parameter, by which UPDATE takes its time.
    pub states: &'static [StateKind],
    /// Precision of compute.
    pub precision: Precision,
}

impl fmt::Display for Measuring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states: Vec<&str> = self.states.iter().map(|kind| kind.name()).collect();
        write!(f, "batch {}, {:?}, state [{}]", self.batch, self.precision, states.join(" "))
    }
}

impl JobSpec {
    /// What measuring its ops depends on besides its OP-DAG.
    pub fn measuring(&self) -> Measuring {
        let train = &self.train;
        Measuring { batch: self.micro_batch_size(), states: train.states(), precision: train.precision }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_happens_every_so_many_steps_and_at_the_end() {
        let due = |every, last| (0..=last).filter(|&step| Cadence { every, last }.is_due(step)).collect::<Vec<_>>();
        assert_eq!(due(3, 7), [3, 6, 7]);
        assert_eq!(due(0, 7), [7]);
        assert_eq!(due(1, 2), [1, 2]);
        assert!(due(9, 0).is_empty());
    }
}
